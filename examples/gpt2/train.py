"""Train GPT-2, with AdamW and with Adam-mini on the same batches, and compare."""

import dataclasses
from collections.abc import Callable
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

from examples.common import optimizers, runs, text
from examples.common.cli import ConfigError, check_counts
from examples.common.text import TextConfig
from examples.common.training import (
    Program,
    Task,
    TrainingConfig,
    compare,
    load_config,
    refuse_others,
)
from examples.gpt2.model import CONFIGS, GPT2, GPT2Config, block_specs
from examples.gpt2.sample import generate
from optax_adam_mini import block_table


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Train GPT-2 with AdamW and then with Adam-mini: same seed, same batches, same
    hyper-parameters. Without arguments it trains a small model on the source of Python's standard
    library, in a few minutes on two CPU cores."""

    model: Literal["nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "nano"
    """Architecture; the GPT-2 sizes have GPT-2's own parameter counts with
    --tokenizer bpe --vocab-size 50257."""
    layers: int | None = None
    """Number of layers, instead of the architecture's."""
    heads: int | None = None
    """Number of attention heads, instead of the architecture's."""
    width: int | None = None
    """Width of the residual stream, instead of the architecture's."""
    context: int | None = None
    """Tokens a sequence, instead of the architecture's (64 for nano, 1024 for GPT-2)."""
    scan: bool = False
    """Scan over stacked layers: compiles one layer only."""
    remat: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and optimizer state stay float32."""

    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step."""
    accumulate: int = 1
    """Micro-batches a step: their gradients are averaged, with the memory of one of them."""
    seed: int = 0
    """Seed of the initial weights, of the batches and of --sample."""

    eval_windows: int = 512
    """Held-out sequences, the same at every evaluation, spread evenly over the held-out text."""
    runs: str = "runs/gpt2"
    """Folder in which every run makes its own."""

    sample: str | None = None
    """Write text that goes on from this one, from the newest checkpoint of --run."""
    run: str | None = None
    """The run that --sample reads. Without it, the newest one."""
    sample_tokens: int = 400
    """How many tokens --sample writes."""
    temperature: float = 0.8
    """Temperature of --sample; 0 takes the likeliest token."""

    data: Annotated[TextConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=TextConfig
    )

    @property
    def architecture(self) -> GPT2Config:
        """The model that these options describe."""
        given = {"layers": self.layers, "heads": self.heads, "width": self.width}
        given |= {"context": self.context}
        return dataclasses.replace(
            CONFIGS[self.model],
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
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"--batch-size is {self.batch_size}, which {self.accumulate} micro-batches do not "
                "divide: choose a --batch-size that is a multiple of --accumulate."
            )
        if self.run is not None:
            raise ConfigError("--run names the run of --sample: give --sample, or --resume RUN.")
        self.data.check()
        super().check()


class Training(NamedTuple):
    """What changes from step to step, and all that a checkpoint holds."""

    params: Any
    opt_state: optax.OptState


def make_logits(architecture: GPT2Config) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, tokens) -> logits"""
    graph, _ = nnx.split(nnx.eval_shape(lambda: GPT2(architecture, rngs=nnx.Rngs(0))))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens).astype(jnp.float32)

    return logits


def make_program(config: Config, optimizer: str) -> Program:
    """Model, loss, gradient and update as plain functions of arrays."""
    architecture = config.architecture
    logits = make_logits(architecture)
    tx = optimizers.make_optimizer(optimizer, config.hyper, config.steps, block_specs(architecture))

    def init() -> Training:
        params = nnx.state(GPT2(architecture, rngs=nnx.Rngs(config.seed)))
        return Training(params, tx.init(params))

    def losses(params: Any, windows: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, windows[:, :-1]), windows[:, 1:]
        )

    def mean_loss(params: Any, windows: jax.Array) -> jax.Array:
        return losses(params, windows).mean()

    def loss_and_gradient(params: Any, windows: jax.Array) -> tuple[jax.Array, Any]:
        if config.accumulate == 1:
            return jax.value_and_grad(mean_loss)(params, windows)

        def add(total: Any, micro_batch: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(
                jnp.add, total, jax.value_and_grad(mean_loss)(params, micro_batch)
            ), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        micro_batches = windows.reshape(config.accumulate, -1, windows.shape[-1])
        total, _ = jax.lax.scan(add, zero, micro_batches)
        return jax.tree.map(lambda value: value / config.accumulate, total)

    def step(training: Training, windows: jax.Array) -> tuple[Training, jax.Array]:
        loss, gradient = loss_and_gradient(training.params, windows)
        updates, opt_state = tx.update(gradient, training.opt_state, training.params)
        return Training(optax.apply_updates(training.params, updates), opt_state), loss

    def evaluate(training: Training, windows: jax.Array) -> jax.Array:
        """The total loss in nats."""
        return losses(training.params, windows).sum()

    return Program(init, step, evaluate)


def load_task(config: Config, folder: Path) -> Task:
    """What the training loop needs, with the text read; its tokens are kept in `folder`."""
    context, batch_size = config.architecture.context, config.batch_size
    data = text.load(config.data, folder / "data")
    text.check_length(data, context)
    held_out = text.held_out_windows(data.held_out, config.eval_windows, context)
    targets = held_out[:, 1:]
    held_out_bytes = int(data.tokenizer.token_bytes[targets].sum())
    micro_batch_size = batch_size // config.accumulate
    held_out_batches = np.array_split(held_out, -(-len(held_out) // micro_batch_size))

    def measure(nats: float) -> dict[str, float]:
        return {"held_out_loss": nats / targets.size, "nats_per_byte": nats / held_out_bytes}

    return Task(
        title=f"GPT-2 {config.model}, {config.steps} steps of {batch_size} sequences",
        description=(
            f"{config.model} on {len(data.train):,} training and {len(data.held_out):,} held-out "
            "tokens"
        ),
        make_program=lambda optimizer: make_program(config, optimizer),
        batch=lambda step: text.batch(data.train, config.seed, step, batch_size, context),
        held_out=lambda: held_out_batches,
        measure=measure,
        columns={"held-out nats per byte": lambda row: f"{row['nats_per_byte']:.4f}"},
        unit="tokens",
        units_per_step=batch_size * context,
        loss_unit="nats per byte" if config.data.tokenizer == "bytes" else "nats per token",
    )


def blocks(config: Config) -> Table:
    """How Adam-mini cuts the parameters."""
    params = jax.eval_shape(make_program(config, "adam_mini").init).params
    return block_table(params, block_specs(config.architecture))


def write_sample(config: Config, console: Console) -> None:
    """Print text that goes on from config.sample, by the newest checkpoint of the run."""
    if config.sample_tokens < 1:
        raise ConfigError(f"--sample-tokens is {config.sample_tokens}, but must be at least 1.")
    if not config.temperature >= 0:
        raise ConfigError(f"--temperature is {config.temperature}, but must be at least 0.")
    folder = runs.find_run(Path(config.runs), config.run)
    trained = load_config(Config, folder)
    names = trained.optimizer_names if config.optimizer is None else config.optimizer_names
    trained_names = [name for name in names if (folder / name / "checkpoints").exists()]
    for optimizer in reversed(trained_names):  # the last one trained is the newest
        with runs.open_checkpoints(
            folder / optimizer / "checkpoints", to_write=False
        ) as checkpoints:
            if checkpoints.latest_step() is None:
                continue
            program = make_program(trained, optimizer)
            params = runs.restore_checkpoint(checkpoints, jax.eval_shape(program.init)).params
            tokenizer = text.load_tokenizer(trained.data, folder / "data")
            tokens = generate(
                make_logits(trained.architecture),
                params,
                # Without a prompt, the model begins as after the end of a document.
                tokenizer.encode(config.sample.encode()).tolist() or [text.END_OF_DOCUMENT],
                context=trained.architecture.context,
                count=config.sample_tokens,
                temperature=config.temperature,
                seed=config.seed,
            )
            console.print(f"{folder}, {optimizer}, step {checkpoints.latest_step()}", style="dim")
            print(tokenizer.decode(tokens))
            return
    raise ConfigError(
        f"{folder} has no checkpoint of {' or '.join(names)} yet: train longer, or choose another "
        "--run or --optimizer."
    )


def main(config: Config) -> None:
    """What the command line asks for."""
    if config.sample is None:
        compare(config, load_task, blocks)
        return
    own = {"sample", "run", "runs", "optimizer", "seed", "sample_tokens", "temperature"}
    refuse_others(config, "--sample", own)
    write_sample(config, Console())
