"""Train a graph neural network, with AdamW and with Adam-mini on the same graph, and compare."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.training.train_state import TrainState
from rich.table import Table

from examples.common import graphs, optimizers
from examples.common.cli import ConfigError, check_counts
from examples.common.graphs import Graph, GraphConfig
from examples.common.optimizers import OptimizerConfig
from examples.common.training import Program, Task, TrainingConfig, compare
from examples.gnn.model import CONFIGS, GNN, GNNConfig
from optax_adam_mini import block_table, infer_block_specs


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Train a graph neural network with AdamW and then with Adam-mini: same seed, same graph, same
    hyper-parameters. Without arguments it trains a GCN on the nearest-neighbour graph of
    scikit-learn's handwritten digits, in seconds on two CPU cores."""

    model: Literal["gcn", "gat"] = "gcn"
    """Graph convolutional network or graph attention network."""
    layers: int | None = None
    """Number of layers, instead of the architecture's 2."""
    width: int | None = None
    """Units of a hidden layer, over all heads, instead of the architecture's (16 for gcn, 64 for
    gat)."""
    heads: int | None = None
    """Attention heads of gat's hidden layers, instead of 8."""
    output_heads: int | None = None
    """Attention heads of gat's last layer, which are averaged, instead of 1."""
    dropout: float = 0.5
    """Share of every layer's inputs, and of gat's attention, that is dropped in training."""

    steps: int = 200
    """Optimizer steps; each sees the whole graph."""
    batch_size: Annotated[int, tyro.conf.Fixed, tyro.conf.Suppress] = 1
    """Graphs a step."""
    seed: int = 0
    """Seed of the initial weights and of dropout."""

    eval_every: int = 20
    """Steps between two evaluations on the validation and the test nodes."""
    runs: str = "runs/gnn"
    """Folder in which every run makes its own."""

    data: Annotated[GraphConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=GraphConfig
    )
    hyper: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-2, warmup_share=0.05, b2=0.999, weight_decay=0.1
        )
    )

    @property
    def architecture(self) -> GNNConfig:
        """The model that these options describe."""
        given = {"layers": self.layers, "width": self.width, "heads": self.heads}
        given |= {"output_heads": self.output_heads}
        return dataclasses.replace(
            CONFIGS[self.model],
            num_classes=self.data.facts.num_classes,
            dropout=self.dropout,
            **{name: value for name, value in given.items() if value is not None},
        )

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        model = self.architecture
        counts = ("layers", "width", "heads", "output_heads")
        check_counts({name: getattr(model, name) for name in counts})
        for name in ("heads", "output_heads"):
            if self.model == "gcn" and getattr(self, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for attention, which gcn has not: leave it "
                    "out, or give --model gat."
                )
        if model.width % model.heads:
            raise ConfigError(
                f"--width is {model.width}, which {model.heads} heads do not divide: choose a "
                f"--width that is a multiple of {model.heads}, or --heads that divide "
                f"{model.width}."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout is {self.dropout}, but must be from 0 to less than 1.")
        if self.batch_size != 1:
            raise ConfigError(
                f"--batch-size is {self.batch_size}, but must be 1: a step sees the whole graph."
            )
        self.data.check()
        super().check()


class Batch(NamedTuple):
    """The graph, and the seed of a step's dropout."""

    graph: Graph
    dropout_seed: np.uint32


def init_params(config: Config, seed: Any = 0) -> Any:
    """New parameters."""
    # Their shapes do not depend on the graph: one node with an edge to itself will do.
    x, node = jnp.zeros((1, config.data.facts.num_features)), jnp.zeros(1, jnp.int32)
    return GNN(config.architecture).init(jax.random.key(seed), x, node, node, train=False)["params"]


def abstract_params(config: Config) -> Any:
    """Their shapes."""
    return jax.eval_shape(lambda: init_params(config))


def block_specs(config: Config) -> Any:
    """Adam-mini's blocks, found by tracing the model."""

    def logits(params: Any, x: jax.Array, edges: jax.Array) -> jax.Array:
        return GNN(config.architecture).apply({"params": params}, x, edges, edges, train=False)

    x = jax.ShapeDtypeStruct((2, config.data.facts.num_features), jnp.float32)
    edges = jax.ShapeDtypeStruct((2,), jnp.int32)
    return infer_block_specs(logits, abstract_params(config), x, edges, v=config.v)


def make_program(config: Config, optimizer: str) -> Program:
    """Model, loss, gradient and update as plain functions of arrays."""
    model = GNN(config.architecture)
    specs = block_specs(config)
    tx = optimizers.make_optimizer(optimizer, config.hyper, config.steps, specs)

    def init(seed: Any = config.seed) -> TrainState:
        params = init_params(config, seed)
        return TrainState.create(apply_fn=model.apply, tx=tx, params=params)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        graph, seed = batch

        def mean_loss(params: Any) -> jax.Array:
            logits = state.apply_fn(
                {"params": params},
                graph.features,
                graph.senders,
                graph.receivers,
                train=True,
                rngs={"dropout": jax.random.key(seed)},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, graph.labels)
            return losses.mean(where=graph.train)

        loss, gradient = jax.value_and_grad(mean_loss)(state.params)
        return state.apply_gradients(grads=gradient), loss

    def evaluate(state: TrainState, graph: Graph) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Of the validation and the test nodes, the total loss in nats and how many are classified
        correctly."""
        logits = state.apply_fn(
            {"params": state.params}, graph.features, graph.senders, graph.receivers, train=False
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, graph.labels)
        correct = logits.argmax(-1) == graph.labels
        return {
            name: (losses.sum(where=nodes), correct.sum(where=nodes))
            for name, nodes in (("validation", graph.validation), ("test", graph.test))
        }

    return Program(init, step, evaluate)


def load_task(config: Config, _: Path) -> Task:
    """What the training loop needs, with the graph read."""
    graph = graphs.load(config.data)
    on_device = jax.tree.map(jnp.asarray, graph)
    num_nodes = len(graph.labels)
    num_validation, num_test = int(graph.validation.sum()), int(graph.test.sum())

    def batch(step: int) -> Batch:
        (seed,) = np.random.SeedSequence((config.seed, step)).generate_state(1)
        return Batch(on_device, seed)

    def measure(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        (validation_loss, validation_correct), (loss, correct) = sums["validation"], sums["test"]
        return {
            "held_out_loss": loss / num_test,
            "accuracy": correct / num_test,
            "validation_loss": validation_loss / num_validation,
            "validation_accuracy": validation_correct / num_validation,
        }

    return Task(
        title=f"{config.model.upper()} on {config.data.name}, {config.steps} steps",
        description=(
            f"{config.model} on {config.data.name}, {num_nodes:,} nodes and "
            f"{(len(graph.senders) - num_nodes) // 2:,} edges: {graph.train.sum():,} nodes for "
            f"training, {num_validation:,} for validation, {num_test:,} for test"
        ),
        make_program=lambda optimizer: make_program(config, optimizer),
        batch=batch,
        held_out=lambda: [on_device],
        measure=measure,
        columns={
            "validation accuracy": lambda row: f"{row['validation_accuracy']:.2%}",
            "test accuracy": lambda row: f"{row['accuracy']:.2%}",
        },
        unit="nodes",
        units_per_step=num_nodes,
        loss_unit="nats per node",
    )


def blocks(config: Config) -> Table:
    """How Adam-mini cuts the parameters."""
    return block_table(abstract_params(config), block_specs(config))


def main(config: Config) -> None:
    """What the command line asks for."""
    compare(config, load_task, blocks)
