"""Language models: what training, measuring and sampling one takes, whatever its architecture."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Table

from examples.common import mesh as meshes
from examples.common import optimizers, runs, text
from examples.common.cli import ConfigError, check_counts
from examples.common.mesh import MeshConfig
from examples.common.optimizers import ParameterConfig
from examples.common.text import TextConfig
from examples.common.training import (
    Program,
    Task,
    TrainingConfig,
    compare,
    load_config,
    refuse_others,
)
from optax_adam_mini import (
    BlockSpec,
    block_table,
    infer_block_specs,
    infer_muon_dimension_numbers,
    opt_state_shardings,
)

Architecture = TypeVar("Architecture")


@dataclasses.dataclass(frozen=True)
class LanguageConfig(TrainingConfig, abc.ABC):
    """The options of every language model. An example adds `model`, the name of an architecture,
    and says what it is."""

    title: ClassVar[str]
    """Of the family of architectures, for tables and plots."""
    shardings: ClassVar[Sequence[tuple[str, PartitionSpec]]] = ()
    """How parameters lie on a mesh, by their paths (see mesh.param_shardings)."""
    where: ClassVar[tuple[str, ...]] = ("devices",)

    layers: int | None = None
    """Number of layers, instead of the architecture's."""
    heads: int | None = None
    """Number of attention heads, instead of the architecture's."""
    width: int | None = None
    """Width of the residual stream, instead of the architecture's."""
    context: int | None = None
    """Tokens a sequence, instead of the architecture's."""
    scan: bool = False
    """Scan over stacked layers: compiles one layer only."""
    remat: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""

    batch_size: int = 16
    """Sequences a step."""
    accumulate: int = 1
    """Micro-batches a step: their gradients are averaged, with the memory of one of them."""
    seed: int = 0
    """Seed of the initial weights, of the batches and of --sample."""
    eval_windows: int = 512
    """Held-out sequences, the same at every evaluation, spread evenly over the held-out text."""

    sample: str | None = None
    """Write text that goes on from this one, from the newest checkpoint of --run."""
    run: str | None = None
    """The run that --sample reads. Without it, the newest one."""
    sample_tokens: int = 400
    """How many tokens --sample writes."""
    temperature: float = 0.8
    """Temperature of --sample; 0 takes the likeliest token."""

    parameters: Annotated[ParameterConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ParameterConfig
    )
    data: Annotated[TextConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=TextConfig
    )
    devices: Annotated[MeshConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=MeshConfig
    )

    @property
    @abc.abstractmethod
    def architecture(self) -> Any:
        """The model that these options describe. It has a `context`, `layers`, `heads`, `width`."""

    @abc.abstractmethod
    def make_model(self, architecture: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The model: tokens (B, T) to logits (B, T, V)."""

    @property
    def overrides(self) -> Sequence[tuple[str, BlockSpec]]:
        """Rules over paths for blocks of the paper that the computation does not ask for."""
        return ()

    def adapt(self, architecture: Architecture, *more: str) -> Architecture:
        """`architecture` with what these options say of it. `more` names options of the example
        that, as --layers, stand in for the architecture's own where they are given."""
        given = {name: getattr(self, name) for name in ("layers", "heads", "width", "context")}
        given |= {name: getattr(self, name) for name in more}
        return dataclasses.replace(
            architecture,
            vocab_size=self.data.vocabulary,
            scan=self.scan,
            remat=self.remat,
            dtype=self.dtype,
            **{name: value for name, value in given.items() if value is not None},
        )

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        model = self.architecture
        check_counts(
            {
                "layers": model.layers,
                "heads": model.heads,
                "width": model.width,
                "context": model.context,
                "accumulate": self.accumulate,
                "eval_windows": self.eval_windows,
            }
        )
        if model.width % model.heads:
            raise ConfigError(
                f"--width is {model.width}, which {model.heads} heads do not divide: choose a "
                f"--width that is a multiple of {model.heads}, or --heads that divide "
                f"{model.width}."
            )
        check_accumulate(self.batch_size, self.accumulate)
        self.devices.check()
        self.check_batch()
        if self.run is not None:
            raise ConfigError("--run names the run of --sample: give --sample, or --resume RUN.")
        self.data.check()
        super().check()

    def check_batch(self) -> None:
        """Refuse a batch that the mesh cannot split."""
        parts = self.devices.batch_parts
        if self.batch_size // self.accumulate % parts:
            raise ConfigError(
                f"--batch-size is {self.batch_size}, in {self.accumulate} micro-batches, which "
                f"--mesh {self.devices.mesh} would split in {parts}: choose a --batch-size that is "
                f"a multiple of {self.accumulate * parts}."
            )


def check_accumulate(batch_size: int, accumulate: int) -> None:
    """Refuse a batch that has no equal micro-batches."""
    if batch_size % accumulate:
        raise ConfigError(
            f"--batch-size is {batch_size}, which {accumulate} micro-batches do not "
            "divide: choose a --batch-size that is a multiple of --accumulate."
        )


def with_adapter(layer: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layer` with a low-rank adapter (LoRA, Hu et al., 2021) beside it, which starts as zero;
    `layer` itself where `rank` is 0."""
    if rank == 0:
        return layer
    return nnx.LoRA(
        layer.in_features,
        rank,
        layer.out_features,
        base_module=layer,
        dtype=layer.dtype,
        rngs=rngs,
    )


class Training(NamedTuple):
    """What changes from step to step, and all that a checkpoint holds."""

    params: Any
    opt_state: optax.OptState


@functools.cache  # tracing takes long, and every program of a run asks for it
def abstract_model(config: LanguageConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its parameters, and their shapes."""
    model = nnx.eval_shape(lambda: config.make_model(config.architecture, nnx.Rngs(0)))
    return nnx.split(model)


def make_logits(config: LanguageConfig) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, tokens) -> logits"""
    graph, _ = abstract_model(config)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens).astype(jnp.float32)

    return logits


def abstract_tokens(config: LanguageConfig) -> jax.ShapeDtypeStruct:
    """The shape of one sequence: a partition does not depend on how many there are."""
    return jax.ShapeDtypeStruct((1, config.architecture.context), jnp.int32)


@functools.cache
def block_specs(config: LanguageConfig) -> Any:
    """Adam-mini's blocks, found by tracing the model."""
    _, params = abstract_model(config)
    tokens = abstract_tokens(config)
    return infer_block_specs(
        make_logits(config), params, tokens, overrides=overrides(config, config.v), v=config.v
    )


def matrices(config: LanguageConfig) -> Any:
    """Muon's dimension numbers, read off in the same way."""
    _, params = abstract_model(config)
    return infer_muon_dimension_numbers(make_logits(config), params, abstract_tokens(config))


def overrides(config: LanguageConfig, v: str) -> Sequence[tuple[str, BlockSpec]]:
    """The rules of the configuration for the paper's blocks; the others have none."""
    return config.overrides if v == "mean" else ()


def sum_over_micro_batches(
    loss: Callable[[Any, Any], jax.Array], params: Any, batch: Any, count: int
) -> tuple[jax.Array, Any]:
    """`loss` (a scalar) of each of `count` parts of the batch, and its gradient, summed. Only one
    part's activations are in memory at a time. Sums are in float32 or wider."""
    if count == 1:
        return jax.value_and_grad(loss)(params, batch)

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, micro_batch)), None

    widened = lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32))
    zero = (jnp.zeros(()), jax.tree.map(widened, params))
    # Every count-th example, so that those of a device stay there.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    total, _ = jax.lax.scan(add, zero, micro_batches)
    return total


def make_program(config: LanguageConfig, optimizer: str) -> Program:
    """Model, loss, gradient and update as plain functions of arrays."""
    architecture = config.architecture
    logits = make_logits(config)
    mesh = config.devices.make_mesh()
    tx = optimizers.make_optimizer(
        optimizer,
        config.hyper,
        config.steps,
        block_specs(config),
        lambda: matrices(config),
        rounds_at_random=config.parameters.rounds_at_random,
    )

    def init(seed: Any = config.seed) -> Training:
        params = nnx.state(config.make_model(architecture, nnx.Rngs(jax.random.key(seed))))
        params = config.parameters.cast(params)
        return Training(params, tx.init(params))

    def losses(params: Any, windows: jax.Array) -> jax.Array:
        with meshes.inside(mesh):
            return optax.softmax_cross_entropy_with_integer_labels(
                logits(params, windows[:, :-1]), windows[:, 1:]
            )

    def mean_loss(params: Any, windows: jax.Array) -> jax.Array:
        return losses(params, windows).mean()

    def step(training: Training, windows: jax.Array) -> tuple[Training, jax.Array]:
        total = sum_over_micro_batches(mean_loss, training.params, windows, config.accumulate)
        loss, gradient = jax.tree.map(lambda value: value / config.accumulate, total)
        updates, opt_state = tx.update(gradient, training.opt_state, training.params)
        return Training(optax.apply_updates(training.params, updates), opt_state), loss

    def evaluate(training: Training, windows: jax.Array) -> jax.Array:
        """The total loss in nats."""
        return losses(training.params, windows).sum()

    if mesh is None:
        return Program(init, step, evaluate)
    params = jax.eval_shape(init).params
    of_params = meshes.param_shardings(params, config.shardings, mesh)
    of_state = opt_state_shardings(tx, params, of_params)
    return Program(init, step, evaluate, shardings=Training(of_params, of_state))


def load_task(config: LanguageConfig, folder: Path) -> Task:
    """What the training loop needs, with the text read; its tokens are kept in `folder`."""
    context, batch_size = config.architecture.context, config.batch_size
    config.check_batch()
    data = meshes.first_then_others(lambda: text.load(config.data, folder / "data"))
    text.check_length(data, context)
    held_out = text.held_out_windows(data.held_out, config.eval_windows, context)
    targets = held_out[:, 1:]
    held_out_bytes = int(data.tokenizer.token_bytes[targets].sum())
    micro_batch_size = batch_size // config.accumulate
    mesh = config.devices.make_mesh()

    def placed(size: int, rows: Callable[[slice], np.ndarray]) -> Any:
        if mesh is None:
            return rows(slice(None))
        return meshes.split_batch(mesh, (size, context + 1), rows)

    def batch(step: int) -> Any:
        return placed(
            batch_size,
            lambda rows: text.batch(data.train, config.seed, step, batch_size, context, rows),
        )

    held_out_batches = [
        placed(len(part), part.__getitem__)
        for part in np.split(held_out, range(micro_batch_size, len(held_out), micro_batch_size))
    ]

    def measure(nats: float) -> dict[str, float]:
        return {"held_out_loss": nats / targets.size, "nats_per_byte": nats / held_out_bytes}

    return Task(
        title=f"{config.title} {config.model}, {config.steps} steps of {batch_size} sequences",
        description=(
            f"{config.model} on {len(data.train):,} training and {len(data.held_out):,} held-out "
            "tokens"
        ),
        make_program=lambda optimizer: make_program(config, optimizer),
        batch=batch,
        held_out=lambda: held_out_batches,
        measure=measure,
        columns={"held-out nats per byte": lambda row: f"{row['nats_per_byte']:.4f}"},
        unit="tokens",
        units_per_step=batch_size * context,
        loss_unit="nats per byte" if config.data.tokenizer == "bytes" else "nats per token",
    )


def blocks(config: LanguageConfig) -> Table:
    """How Adam-mini cuts the parameters."""
    _, params = abstract_model(config)
    params = jax.eval_shape(config.parameters.cast, params)
    return block_table(params, block_specs(config), mu_dtype=config.parameters.mu_dtype)


def generate(
    logits: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    prompt: Sequence[int],
    *,
    context: int,
    count: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """`prompt` and `count` tokens that go on from it. The model sees the last `context` tokens."""

    tokens = list(prompt)
    for key in jax.random.split(jax.random.key(seed), count):
        seen = tokens[-context:]
        # Always the same length, so that one program serves; causal attention ignores the padding.
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        length = np.int32(len(seen))
        tokens.append(int(_next_token(logits, temperature, params, window, length, key)))
    return tokens


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_token(
    logits: Callable[[Any, jax.Array], jax.Array],
    temperature: float,
    params: Any,
    window: jax.Array,
    length: jax.Array,
    key: jax.Array,
) -> jax.Array:
    scores = logits(params, window[None])[0, length - 1]
    if temperature == 0:
        return jnp.argmax(scores)
    return jax.random.categorical(key, scores / temperature)


class Trained(NamedTuple):
    """The parameters of a checkpoint, and whose they are."""

    optimizer: str
    step: int
    params: Any


def load_trained(config: LanguageConfig, folder: Path, names: Sequence[str]) -> Trained | None:
    """The newest checkpoint of one of the optimizers `names` in `folder`, the run of `config`, on
    one device wherever it was trained; None where there is none yet."""
    config = dataclasses.replace(config, devices=MeshConfig())
    trained = [name for name in names if (folder / name / "checkpoints").exists()]
    for optimizer in reversed(trained):  # the last one trained is the newest
        with runs.open_checkpoints(
            folder / optimizer / "checkpoints", to_write=False
        ) as checkpoints:
            step = checkpoints.latest_step()
            if step is not None:
                abstract_state = make_program(config, optimizer).abstract_state()
                params = runs.restore_checkpoint(checkpoints, abstract_state).params
                return Trained(optimizer, step, params)
    return None


def write_sample(config: LanguageConfig, console: Console) -> None:
    """Print text that goes on from config.sample, by the newest checkpoint of the run."""
    if config.sample_tokens < 1:
        raise ConfigError(f"--sample-tokens is {config.sample_tokens}, but must be at least 1.")
    if not config.temperature >= 0:
        raise ConfigError(f"--temperature is {config.temperature}, but must be at least 0.")
    folder = runs.find_run(Path(config.runs), config.run)
    of_run = load_config(type(config), folder)
    names = of_run.optimizer_names if config.optimizer is None else config.optimizer_names
    trained = load_trained(of_run, folder, names)
    if trained is None:
        raise ConfigError(
            f"{folder} has no checkpoint of {' or '.join(names)} yet: train longer, or choose "
            "another --run or --optimizer."
        )
    tokenizer = text.load_tokenizer(of_run.data, folder / "data")
    tokens = generate(
        make_logits(of_run),
        trained.params,
        # Without a prompt, the model begins as after the end of a document.
        tokenizer.encode(config.sample.encode()).tolist() or [text.END_OF_DOCUMENT],
        context=of_run.architecture.context,
        count=config.sample_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    console.print(f"{folder}, {trained.optimizer}, step {trained.step}", style="dim")
    print(tokenizer.decode(tokens))


def main(config: LanguageConfig) -> None:
    """What the command line asks for."""
    if config.sample is None:
        config.devices.start()
        compare(config, load_task, blocks)
        return
    own = {"sample", "run", "runs", "optimizer", "seed", "sample_tokens", "temperature"}
    refuse_others(config, "--sample", own)
    write_sample(config, Console())
