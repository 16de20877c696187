"""Train ResNet, with AdamW and with Adam-mini on the same batches, and compare."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.training import train_state
from rich.table import Table

from examples.common import images, optimizers
from examples.common.cli import ConfigError, check_counts
from examples.common.images import Batch, ImageConfig
from examples.common.optimizers import OptimizerConfig
from examples.common.training import Program, Task, TrainingConfig, compare
from examples.resnet.model import CONFIGS, ResNet, ResNetConfig
from optax_adam_mini import (
    block_table,
    infer_block_specs,
    infer_muon_dimension_numbers,
    per_tensor,
)

EVAL_BATCH_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Train ResNet with AdamW and then with Adam-mini: same seed, same batches, same
    hyper-parameters. Without arguments it trains a narrow ResNet-18 on scikit-learn's handwritten
    digits, in about a minute on two CPU cores."""

    model: Literal["nano", "resnet18", "resnet34", "resnet50"] = "nano"
    """Architecture; nano is resnet18 with a quarter of its channels."""
    width: int | None = None
    """Channels of the first stage, instead of the architecture's (16 for nano, 64 for the
    others)."""
    stem: Literal["cifar", "imagenet"] | None = None
    """First layers: for small images or for large ones. Without it, imagenet for the data set of
    this name and cifar for the others."""
    conv: Literal["channel", "tensor"] = "channel"
    """Adam-mini's blocks of a convolution: one for each output channel, or one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, batch statistics and optimizer state stay float32."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images a step."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""

    eval_images: int = 10_000
    """Test images, the same at every evaluation, spread evenly over the test set."""
    runs: str = "runs/resnet"
    """Folder in which every run makes its own."""

    data: Annotated[ImageConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ImageConfig
    )
    hyper: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-3, warmup_share=0.1, b2=0.999, weight_decay=0.1
        )
    )

    @property
    def architecture(self) -> ResNetConfig:
        """The model that these options describe."""
        model = CONFIGS[self.model]
        return dataclasses.replace(
            model,
            width=model.width if self.width is None else self.width,
            stem=self.stem or ("imagenet" if self.data.name == "imagenet" else "cifar"),
            num_classes=self.data.facts.num_classes,
            dtype=self.dtype,
        )

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        check_counts({"width": self.architecture.width, "eval_images": self.eval_images})
        if self.batch_size == 1:
            raise ConfigError(
                "--batch-size is 1, but batch norm compares the images of a batch: give at least 2."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"--label-smoothing is {self.label_smoothing}, but must be from 0 to less than 1."
            )
        self.data.check()
        super().check()


class TrainState(train_state.TrainState):
    """Flax's, with the running averages of batch norm beside the parameters."""

    batch_stats: Any


def init_variables(config: Config, seed: Any = 0) -> Any:
    """New parameters, and the running averages of batch norm."""
    # Their shapes do not depend on the number of images.
    image = jnp.zeros((1, *config.data.facts.image_shape))
    return ResNet(config.architecture).init(jax.random.key(seed), image, train=False)


def abstract_variables(config: Config) -> Any:
    """Their shapes."""
    return jax.eval_shape(lambda: init_variables(config))


def predicted(config: Config) -> tuple[Any, ...]:
    """What the model computes: a function, and shapes of its arguments."""

    def logits(params: Any, rest: Any, images: jax.Array) -> jax.Array:
        return ResNet(config.architecture).apply({"params": params, **rest}, images, train=False)

    rest = dict(abstract_variables(config))
    images = jax.ShapeDtypeStruct((1, *config.data.facts.image_shape), jnp.float32)
    return logits, rest.pop("params"), rest, images


def block_specs(config: Config) -> Any:
    """Adam-mini's partition, read off what the model computes: each output channel of a convolution
    is a block. With --conv tensor, each convolution."""
    overrides = [("conv[^/]*/kernel$", per_tensor())] if config.conv == "tensor" else []
    return infer_block_specs(*predicted(config), overrides=overrides, v=config.v)


def matrices(config: Config) -> Any:
    """Muon's dimension numbers, read off in the same way."""
    return infer_muon_dimension_numbers(*predicted(config))


def make_program(config: Config, optimizer: str) -> Program:
    """Model, loss, gradient and update as plain functions of arrays."""
    facts = config.data.facts
    model = ResNet(config.architecture)
    tx = optimizers.make_optimizer(
        optimizer, config.hyper, config.steps, block_specs(config), lambda: matrices(config)
    )

    def init(seed: Any = config.seed) -> TrainState:
        variables = init_variables(config, seed)
        return TrainState.create(apply_fn=model.apply, tx=tx, **variables)

    def normalized(images: jax.Array) -> jax.Array:
        return (images / 255 - jnp.asarray(facts.mean)) / jnp.asarray(facts.std)

    def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = jax.nn.one_hot(labels, facts.num_classes)
        return optax.softmax_cross_entropy(
            logits.astype(jnp.float32), optax.smooth_labels(targets, config.label_smoothing)
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        def mean_loss(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                normalized(batch.images),
                train=True,
                mutable=["batch_stats"],
            )
            return losses(logits, batch.labels).mean(), updated["batch_stats"]

        (loss, batch_stats), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradient, batch_stats=batch_stats), loss

    def evaluate(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The total loss in nats, and how many images are classified correctly."""
        logits = state.apply_fn(
            {"params": state.params, "batch_stats": state.batch_stats},
            normalized(batch.images),
            train=False,
        )
        correct = logits.argmax(-1) == batch.labels
        return losses(logits, batch.labels).sum(), correct.sum()

    return Program(init, step, evaluate)


def load_task(config: Config, _: Path) -> Task:
    """What the training loop needs, with the images read."""
    facts = config.data.facts
    data = images.load(config.data)
    evaluated = images.evenly(len(data.test), config.eval_images)

    def held_out() -> Iterator[Batch]:
        for indices in np.array_split(evaluated, -(-len(evaluated) // EVAL_BATCH_SIZE)):
            yield data.test.take(indices)

    def measure(sums: tuple[float, float]) -> dict[str, float]:
        loss, correct = sums
        return {"held_out_loss": loss / len(evaluated), "accuracy": correct / len(evaluated)}

    return Task(
        title=f"ResNet {config.model}, {config.steps} steps of {config.batch_size} images",
        description=(
            f"{config.model} on {len(data.train):,} training and {len(data.test):,} test images "
            f"of {config.data.name}"
        ),
        make_program=lambda optimizer: make_program(config, optimizer),
        batch=lambda step: images.batch(data.train, facts, config.seed, step, config.batch_size),
        held_out=held_out,
        measure=measure,
        columns={"test accuracy": lambda row: f"{row['accuracy']:.2%}"},
        unit="images",
        units_per_step=config.batch_size,
        loss_unit="nats per image",
    )


def blocks(config: Config) -> Table:
    """How Adam-mini cuts the parameters."""
    return block_table(abstract_variables(config)["params"], block_specs(config))


def main(config: Config) -> None:
    """What the command line asks for."""
    compare(config, load_task, blocks)
