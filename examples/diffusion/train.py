"""Train a denoising diffusion model, with AdamW and with Adam-mini on the same batches, and
compare."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from examples.common import images, optimizers, runs
from examples.common.cli import ConfigError, check_counts
from examples.common.images import DatasetFacts, ImageConfig
from examples.common.optimizers import OptimizerConfig
from examples.common.training import (
    Program,
    Task,
    TrainingConfig,
    compare,
    load_config,
    refuse_others,
)
from examples.diffusion.model import CONFIGS, UNet, UNetConfig
from examples.diffusion.process import add_noise, make_alpha_bars, sample
from optax_adam_mini import block_table, infer_block_specs

# A held-out image is evaluated at so many times, one in each equal part of them.
EVAL_TIMES = 8
EVAL_BATCH_SIZE = 64
SAMPLES_FILE = "samples.png"
# Faces have no classes, and the pixels are scaled without regard to their mean.
CELEBA = DatasetFacts((64, 64, 3), 0, (), (), flip=True, hub=("flwrlabs/celeba", "test", "image"))


@dataclasses.dataclass(frozen=True)
class DiffusionImages(ImageConfig):
    """Where the images come from."""

    dataset: Literal["digits", "cifar10", "celeba"] | None = None
    """digits: the handwritten digits that come with scikit-learn (8x8). cifar10 (32x32) and celeba
    (faces, 64x64): from the Hugging Face hub. Without it, digits, or cifar10 with --data-dir."""

    @property
    def facts(self) -> DatasetFacts:
        """What is known of it."""
        return CELEBA if self.name == "celeba" else super().facts


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Train a denoising diffusion model with AdamW and then with Adam-mini: same seed, same
    batches, same hyper-parameters. Without arguments it trains a small U-Net on scikit-learn's
    handwritten digits, in a few minutes on two CPU cores, and draws digits of its own."""

    model: Literal["nano", "cifar10", "celeba"] = "nano"
    """Architecture; cifar10 is that of Ho et al. for 32x32, celeba has a level more, for 64x64."""
    width: int | None = None
    """Channels of the first level, instead of the architecture's (16 for nano, 128 for the
    others)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, their average and optimizer state stay float32."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How noise grows with time: as Nichol and Dhariwal have it, or Ho et al."""
    diffusion_steps: int = 1000
    """Times, from an image to noise."""
    ema_decay: float = 0.99
    """Decay of the moving average of the parameters, which is what is evaluated and sampled
    from; 0 for the parameters themselves."""

    steps: int = 1500
    """Optimizer steps."""
    batch_size: int = 64
    """Images a step."""
    seed: int = 0
    """Seed of the initial weights, of the batches and of the samples."""

    eval_every: int = 150
    """Steps between two evaluations on held-out data."""
    checkpoint_every: int = 150
    """Steps between two checkpoints."""
    eval_images: int = 1000
    """Held-out images, the same at every evaluation, spread evenly over the held-out set."""
    runs: str = "runs/diffusion"
    """Folder in which every run makes its own."""

    sample: bool = False
    """Draw new samples by the newest checkpoints of --run, and stop."""
    run: str | None = None
    """The run that --sample reads. Without it, the newest one."""
    samples: int = 64
    """Images that each optimizer's model draws at the end."""
    sample_steps: int | None = None
    """Steps from noise to a sample. Without it, all of the times, but no more than the model was
    trained for."""
    eta: float = 1.0
    """Share of a sample's noise that is drawn anew at each step: 1 is the sampling of Ho et al., 0
    that of DDIM, which needs fewer steps."""

    data: Annotated[DiffusionImages, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DiffusionImages
    )
    hyper: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-2, warmup_share=0.1, b2=0.999, weight_decay=0.0
        )
    )

    @property
    def architecture(self) -> UNetConfig:
        """The model that these options describe."""
        model = CONFIGS[self.model]
        return dataclasses.replace(
            model,
            image_channels=self.data.facts.image_shape[-1],
            width=model.width if self.width is None else self.width,
            dtype=self.dtype,
        )

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        model = self.architecture
        check_counts(
            {
                "width": model.width,
                "diffusion_steps": self.diffusion_steps,
                "eval_images": self.eval_images,
            }
        )
        check_sampling(self, self.diffusion_steps)
        if self.run is not None:
            raise ConfigError("--run names the run of --sample: give --sample, or --resume RUN.")
        if model.width % model.groups:
            raise ConfigError(
                f"--width is {model.width}, which GroupNorm's {model.groups} groups do not divide: "
                f"choose a multiple of {model.groups}."
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"--ema-decay is {self.ema_decay}, but must be from 0 to less than 1."
            )
        self.data.check()
        size, divisor = self.data.facts.image_shape[0], 2 ** (len(model.multipliers) - 1)
        if size % divisor:
            raise ConfigError(
                f"--model {self.model} halves the images {len(model.multipliers) - 1} times, but "
                f"those of {self.data.name} are of {size}x{size}: choose another --model."
            )
        super().check()


def check_sampling(config: Config, diffusion_steps: int) -> None:
    """Refuse what cannot work of the options of sampling."""
    check_counts({"samples": config.samples})
    if config.sample_steps is not None and not 1 <= config.sample_steps <= diffusion_steps:
        raise ConfigError(
            f"--sample-steps is {config.sample_steps}, but must be from 1 to the number of times, "
            f"{diffusion_steps}."
        )
    if not 0 <= config.eta <= 1:
        raise ConfigError(f"--eta is {config.eta}, but must be from 0 to 1.")


class Batch(NamedTuple):
    """Images (B, H, W, C), a byte a pixel and channel, with their times (B,) and noises."""

    images: np.ndarray
    times: np.ndarray
    noise: np.ndarray


class Training(NamedTuple):
    """What changes from step to step, and all that a checkpoint holds."""

    params: Any
    average: Any
    """Moving average of the parameters."""
    opt_state: optax.OptState


@functools.cache  # tracing takes seconds where the model is large
def abstract_model(architecture: UNetConfig, image_size: int) -> tuple[nnx.GraphDef, nnx.State]:
    """The U-Net without its parameters, and their shapes."""
    return nnx.split(nnx.eval_shape(lambda: UNet(architecture, image_size, rngs=nnx.Rngs(0))))


def make_predict(config: Config) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """(params, noisy images, times) -> noise"""
    graph, _ = abstract_model(config.architecture, config.data.facts.image_shape[0])

    def predict(params: Any, x: jax.Array, times: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x, times).astype(jnp.float32)

    return predict


def block_specs(config: Config) -> Any:
    """Adam-mini's blocks, found by tracing the model."""
    image_shape = config.data.facts.image_shape
    _, params = abstract_model(config.architecture, image_shape[0])
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    times = jax.ShapeDtypeStruct((1,), jnp.int32)
    return infer_block_specs(make_predict(config), params, images, times, v=config.v)


def make_program(config: Config, optimizer: str) -> Program:
    """Model, loss, gradient and update as plain functions of arrays."""
    predict = make_predict(config)
    alpha_bars = make_alpha_bars(config.schedule, config.diffusion_steps)
    tx = optimizers.make_optimizer(optimizer, config.hyper, config.steps, block_specs(config))

    def init(seed: Any = config.seed) -> Training:
        size = config.data.facts.image_shape[0]
        params = nnx.state(UNet(config.architecture, size, rngs=nnx.Rngs(jax.random.key(seed))))
        return Training(params, jax.tree.map(jnp.copy, params), tx.init(params))

    def losses(params: Any, batch: Batch) -> jax.Array:
        """Of each image, the mean squared error of the predicted noise."""
        alpha_bars_now = jnp.asarray(alpha_bars, jnp.float32)[batch.times]
        noisy = add_noise(batch.images / 127.5 - 1, batch.noise, alpha_bars_now)
        error = predict(params, noisy, batch.times) - batch.noise
        return jnp.mean(error**2, (1, 2, 3))

    def step(training: Training, batch: Batch) -> tuple[Training, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda params: losses(params, batch).mean())(
            training.params
        )
        updates, opt_state = tx.update(gradient, training.opt_state, training.params)
        params = optax.apply_updates(training.params, updates)
        average = optax.incremental_update(params, training.average, 1 - config.ema_decay)
        return Training(params, average, opt_state), loss

    def evaluate(training: Training, batch: Batch) -> jax.Array:
        """The total loss."""
        return losses(training.average, batch).sum()

    return Program(init, step, evaluate)


def load_task(config: Config, _: Path) -> Task:
    """What the training loop needs, with the images read."""
    facts, size = config.data.facts, config.batch_size
    data = images.load(config.data)
    evaluated = images.evenly(len(data.test), config.eval_images)

    def batch(step: int) -> Batch:
        clean, _ = images.batch(data.train, facts, config.seed, step, size, shift=False)
        random = np.random.default_rng((config.seed, 2, step))
        times = random.integers(1, config.diffusion_steps + 1, size=size, dtype=np.int32)
        return Batch(clean, times, random.standard_normal(clean.shape, np.float32))

    def held_out() -> Iterator[Batch]:
        # One generator from the start, whatever the seed: the same times and noises for every run.
        random = np.random.default_rng(0)
        for indices in np.array_split(evaluated, -(-len(evaluated) // EVAL_BATCH_SIZE)):
            clean = data.test.take(indices).images.repeat(EVAL_TIMES, 0)
            parts = np.tile(np.arange(EVAL_TIMES), len(indices)) + random.random(len(clean))
            times = 1 + (parts / EVAL_TIMES * config.diffusion_steps).astype(np.int32)
            yield Batch(clean, times, random.standard_normal(clean.shape, np.float32))

    def measure(total: float) -> dict[str, float]:
        return {"held_out_loss": total / (EVAL_TIMES * len(evaluated))}

    return Task(
        title=f"Diffusion {config.model}, {config.steps} steps of {size} images",
        description=(
            f"{config.model} on {len(data.train):,} training and {len(data.test):,} held-out "
            f"images of {config.data.name}"
        ),
        make_program=lambda optimizer: make_program(config, optimizer),
        batch=batch,
        held_out=held_out,
        measure=measure,
        columns={"held-out loss": lambda row: f"{row['held_out_loss']:.5f}"},
        unit="images",
        units_per_step=size,
        loss_unit="squared error of the noise",
    )


def blocks(config: Config) -> Table:
    """How Adam-mini cuts the parameters."""
    _, params = abstract_model(config.architecture, config.data.facts.image_shape[0])
    return block_table(params, block_specs(config))


def make_sampler(config: Config, trained: Config) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, key) -> images with pixels from 0 to 1, by the options of sampling in `config` from
    a model of `trained`."""
    predict = make_predict(trained)
    alpha_bars = make_alpha_bars(trained.schedule, trained.diffusion_steps)
    shape = (config.samples, *trained.data.facts.image_shape)
    steps = config.sample_steps or min(trained.diffusion_steps, trained.steps)

    @jax.jit
    def draw(params: Any, key: jax.Array) -> jax.Array:
        x = sample(
            lambda x, times: predict(params, x, times),
            key,
            shape,
            alpha_bars,
            steps=steps,
            eta=config.eta,
        )
        return jnp.clip((x + 1) / 2, 0, 1)

    return draw


def write_samples(config: Config, trained: Config, folder: Path, console: Console) -> None:
    """Draw images by the newest checkpoint of each optimizer in `folder`, from the same noise, and
    put them beside held-out ones."""
    check_sampling(config, trained.diffusion_steps)
    names = trained.optimizer_names if config.optimizer is None else config.optimizer_names
    draw = make_sampler(config, trained)
    drawn: dict[str, np.ndarray] = {}
    for optimizer in names:
        path = folder / optimizer / "checkpoints"
        if not path.exists():
            continue
        with runs.open_checkpoints(path, to_write=False) as checkpoints:
            step = checkpoints.latest_step()
            if step is None:
                continue
            program = make_program(trained, optimizer)
            training = runs.restore_checkpoint(checkpoints, program.abstract_state())
        with console.status(f"{optimizer}: drawing samples"):
            key = jax.random.key(config.seed)
            drawn[f"{optimizer}, step {step}"] = np.asarray(draw(training.average, key))
    if not drawn:
        raise ConfigError(
            f"{folder} has no checkpoint of {' or '.join(names)} yet: train longer, or choose "
            "another --run or --optimizer."
        )
    held_out = images.load(trained.data).test
    real = held_out.take(images.evenly(len(held_out), config.samples)).images / 255
    plot_images(folder / SAMPLES_FILE, {"held-out images": real, **drawn})
    console.print(f"Samples: {folder / SAMPLES_FILE}")


def plot_images(path: Path, panels: dict[str, np.ndarray]) -> None:
    """Draw each panel's images (B, H, W, C) as a square grid."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 4.3), layout="constrained", squeeze=False
    )
    for axes, (title, panel) in zip(row[0], panels.items(), strict=True):
        axes.imshow(grid(panel), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def grid(panel: np.ndarray) -> np.ndarray:
    """Images (B, H, W, C) as one image, row by row, with grey lines between them; as many rows as
    columns, grey where images are missing."""
    side = int(np.ceil(np.sqrt(len(panel))))
    panel = np.pad(panel, ((0, side**2 - len(panel)), (0, 1), (0, 1), (0, 0)), constant_values=0.5)
    _, height, width, channels = panel.shape
    rows = panel.reshape(side, side, height, width, channels).swapaxes(1, 2)
    return rows.reshape(side * height, side * width, channels)[:-1, :-1]


def main(config: Config) -> None:
    """What the command line asks for."""
    if not config.sample:
        compare(
            config,
            load_task,
            blocks,
            lambda trained, folder, console: write_samples(trained, trained, folder, console),
        )
        return
    own = {"sample", "run", "runs", "optimizer", "seed", "samples", "sample_steps", "eta"}
    refuse_others(config, "--sample", own)
    folder = runs.find_run(Path(config.runs), config.run)
    write_samples(config, load_config(Config, folder), folder, Console())
