"""Train GPT-2, with AdamW and with Adam-mini on the same batches, and compare."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console

from examples.common import optimizers, runs, text
from examples.common.cli import ConfigError, comparison_table, progress_bar
from examples.common.optimizers import OptimizerConfig
from examples.common.text import TextConfig
from examples.gpt2.model import CONFIGS, GPT2, GPT2Config, block_specs
from examples.gpt2.sample import generate
from optax_adam_mini import block_table

COMPARED = ("adamw", "adam_mini")
METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Config:
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
    """Tokens a sequence, instead of the architecture's (128 for nano, 1024 for GPT-2)."""
    scan: bool = False
    """Scan over stacked layers: compiles one layer only."""
    remat: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and optimizer state stay float32."""

    optimizer: str | None = None
    """Train with this one alone: adamw or adam_mini. Without it, with both, one after the other."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step."""
    accumulate: int = 1
    """Micro-batches a step: their gradients are averaged, with the memory of one of them."""
    seed: int = 0
    """Seed of the initial weights, of the batches and of --sample."""

    eval_every: int = 100
    """Steps between two held-out losses."""
    eval_windows: int = 512
    """Held-out sequences, the same at every evaluation, spread evenly over the held-out text."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two looks at the loss; between them the device is not waited for."""
    runs: str = "runs/gpt2"
    """Folder in which every run makes its own."""

    resume: str | None = None
    """Go on with this run (a folder, or its name in --runs), with the options it was started
    with."""
    sample: str | None = None
    """Write text that goes on from this one, from the newest checkpoint of --run."""
    run: str | None = None
    """The run that --sample reads. Without it, the newest one."""
    sample_tokens: int = 400
    """How many tokens --sample writes."""
    temperature: float = 0.8
    """Temperature of --sample; 0 takes the likeliest token."""
    show_blocks: bool = False
    """Print how Adam-mini cuts this configuration's parameters, and stop."""

    data: Annotated[TextConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=TextConfig
    )
    hyper: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=OptimizerConfig
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

    @property
    def optimizer_names(self) -> tuple[str, ...]:
        """Names of the optimizers to train with, in order."""
        return COMPARED if self.optimizer is None else (self.optimizer,)

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        model = self.architecture
        counts = {
            "layers": model.layers,
            "heads": model.heads,
            "width": model.width,
            "context": model.context,
        }
        names = ("steps", "batch_size", "accumulate", "eval_every", "eval_windows")
        names += ("checkpoint_every", "log_every")
        counts |= {name: getattr(self, name) for name in names}
        for name, value in counts.items():
            if value < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is {value}, but must be at least 1.")
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
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, but must be at least 0.")
        if self.run is not None:
            raise ConfigError("--run names the run of --sample: give --sample, or --resume RUN.")
        for name in self.optimizer_names:
            optimizers.check_name(name)
        self.data.check()
        self.hyper.check(self.steps)


def load_config(folder: Path) -> Config:
    """The configuration that a run was started with."""
    stored = json.loads((folder / runs.CONFIG_FILE).read_text())
    stored["data"] = TextConfig(**stored["data"])
    stored["hyper"] = OptimizerConfig(**stored["hyper"])
    return Config(**stored)


class Training(NamedTuple):
    """What changes from step to step, and all that a checkpoint holds."""

    params: Any
    opt_state: optax.OptState


class Program(NamedTuple):
    """The functions that a configuration and an optimizer amount to; none is compiled here."""

    init: Any
    """() -> Training"""
    step: Any
    """(Training, windows) -> (Training, mean loss in nats a token)"""
    evaluate: Any
    """(params, windows) -> total loss in nats"""
    logits: Any
    """(params, tokens) -> logits"""


def make_program(config: Config, optimizer: str) -> Program:
    """Model, loss, gradient and update as plain functions of arrays."""
    architecture = config.architecture
    graph, _ = nnx.split(nnx.eval_shape(lambda: GPT2(architecture, rngs=nnx.Rngs(0))))
    tx = optimizers.make_optimizer(optimizer, config.hyper, config.steps, block_specs(architecture))

    def init() -> Training:
        params = nnx.state(GPT2(architecture, rngs=nnx.Rngs(config.seed)))
        return Training(params, tx.init(params))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens).astype(jnp.float32)

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

    def evaluate(params: Any, windows: jax.Array) -> jax.Array:
        return losses(params, windows).sum()

    return Program(init, step, evaluate, logits)


def train(
    config: Config, optimizer: str, folder: Path, data: text.TextData, console: Console
) -> None:
    """Train with one optimizer, from its newest checkpoint if there is one. Losses and checkpoints
    go to `folder`."""
    context, batch_size = config.architecture.context, config.batch_size
    program = make_program(config, optimizer)
    held_out = text.held_out_windows(data.held_out, config.eval_windows, context)
    held_out_bytes = int(data.tokenizer.token_bytes[held_out[:, 1:]].sum())
    micro_batch_size = batch_size // config.accumulate
    held_out_batches = np.array_split(held_out, -(-len(held_out) // micro_batch_size))

    folder.mkdir(parents=True, exist_ok=True)
    with runs.open_checkpoints(folder / "checkpoints", to_write=True) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start == config.steps:
            console.print(f"{optimizer}: has finished its {config.steps} steps already")
            return
        if start:
            training = runs.restore_checkpoint(checkpoints, jax.eval_shape(program.init))
            console.print(f"{optimizer}: goes on after step {start}")
        else:
            training = jax.jit(program.init)()

        evaluate = jax.jit(program.evaluate)
        windows = text.batch(data.train, config.seed, 1, batch_size, context)
        with console.status(f"{optimizer}: compiling"):
            step = jax.jit(program.step, donate_argnums=0).lower(training, windows).compile()

        metrics = runs.Metrics(folder / METRICS_FILE, start)
        with metrics, progress_bar(console) as progress:
            bar = progress.add_task(
                optimizer,
                total=config.steps,
                completed=start,
                loss=float("nan"),
                rate=0.0,
                unit="tokens",
            )
            losses: list[jax.Array] = []  # of the steps since the device was last waited for
            clock = time.perf_counter()
            for done in range(start + 1, config.steps + 1):
                windows = text.batch(data.train, config.seed, done, batch_size, context)
                training, loss = step(training, windows)
                losses.append(loss)

                last = done == config.steps
                evaluates = last or done % config.eval_every == 0
                saves = last or done % config.checkpoint_every == 0
                if not (evaluates or saves or done % config.log_every == 0):
                    continue

                values = [float(loss) for loss in losses]
                seconds = (time.perf_counter() - clock) / len(values)
                rate = batch_size * context / seconds
                progress.update(bar, completed=done, loss=values[-1], rate=rate)
                metrics.write(
                    {"step": number, "loss": value, "ms": round(1e3 * seconds, 3)}
                    for number, value in enumerate(values, done - len(values) + 1)
                )
                if not np.isfinite(values).all():
                    raise ConfigError(
                        f"the loss of {optimizer} is no longer a number at step {done}: give a "
                        f"--learning-rate smaller than {config.hyper.learning_rate}."
                    )
                if evaluates:
                    nats = sum(float(evaluate(training.params, part)) for part in held_out_batches)
                    per_token, per_byte = nats / held_out[:, 1:].size, nats / held_out_bytes
                    metrics.write(
                        [{"step": done, "held_out_loss": per_token, "nats_per_byte": per_byte}]
                    )
                    progress.console.print(
                        f"{optimizer}: step {done}, held-out loss {per_byte:.4f} nats per byte"
                    )
                if saves:
                    runs.save_checkpoint(checkpoints, done, training)
                losses = []
                clock = time.perf_counter()


def result(config: Config, optimizer: str, folder: Path) -> dict[str, Any]:
    """One row of the table, from what the finished training left in `folder`."""
    state = jax.eval_shape(make_program(config, optimizer).init).opt_state
    records = runs.read_metrics(folder / METRICS_FILE)
    held_out = next(record for record in reversed(records) if "held_out_loss" in record)
    return {
        "optimizer": optimizer,
        **held_out,
        "optimizer_bytes": optimizers.state_bytes(state),
        "numbers_in_v": optimizers.numbers_in_v(state),
        "ms_per_step": float(np.median([record["ms"] for record in records if "ms" in record])),
    }


def load_data(config: Config, folder: Path) -> text.TextData:
    """The run's text, long enough for its model."""
    data = text.load(config.data, folder / "data")
    text.check_length(data, config.architecture.context)
    return data


def train_and_compare(config: Config, folder: Path, data: text.TextData, console: Console) -> None:
    """Train with each of the optimizers what is not trained yet; draw the curves, print the
    table."""
    console.print(
        f"{config.model} on {len(data.train):,} training and {len(data.held_out):,} held-out "
        f"tokens; run folder {folder}"
    )
    for optimizer in config.optimizer_names:
        train(config, optimizer, folder / optimizer, data, console)

    results = [
        result(config, optimizer, folder / optimizer) for optimizer in config.optimizer_names
    ]
    runs.write_json(folder / "results.json", results)
    runs.plot_losses(
        folder / "loss.png",
        {name: runs.read_metrics(folder / name / METRICS_FILE) for name in config.optimizer_names},
        title=f"GPT-2 {config.model}, {config.steps} steps of {config.batch_size} sequences",
        unit="nats per byte" if config.data.tokenizer == "bytes" else "nats per token",
    )
    columns = {
        "optimizer": lambda row: row["optimizer"],
        "held-out nats per byte": lambda row: f"{row['nats_per_byte']:.4f}",
        "optimizer bytes": lambda row: f"{row['optimizer_bytes']:,}",
        "numbers in v": lambda row: f"{row['numbers_in_v']:,}",
        "ms per step": lambda row: f"{row['ms_per_step']:.1f}",
    }
    console.print(comparison_table(f"GPT-2 {config.model}", columns, results))
    console.print(f"Loss curves: {folder / 'loss.png'}")


def write_sample(config: Config, console: Console) -> None:
    """Print text that goes on from config.sample, by the newest checkpoint of the run."""
    if config.sample_tokens < 1:
        raise ConfigError(f"--sample-tokens is {config.sample_tokens}, but must be at least 1.")
    if not config.temperature >= 0:
        raise ConfigError(f"--temperature is {config.temperature}, but must be at least 0.")
    folder = runs.find_run(Path(config.runs), config.run)
    trained = load_config(folder)
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
                program.logits,
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


def refuse_others(config: Config, mode: str, allowed: set[str]) -> None:
    """`mode` takes all options but `allowed` from the run; others would be ignored silently."""
    default = Config()
    given = [
        field.name
        for part, plain in (
            (config, default),
            (config.data, default.data),
            (config.hyper, default.hyper),
        )
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != getattr(plain, field.name)
        and field.name not in allowed | {"data", "hyper"}
    ]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(
            f"{mode} goes by the options that the run was started with: leave out {options}."
        )


def main(config: Config) -> None:
    """What the command line asks for."""
    console = Console()
    root = Path(config.runs)
    if config.sample is not None:
        own = {"sample", "run", "runs", "optimizer", "seed", "sample_tokens", "temperature"}
        refuse_others(config, "--sample", own)
        write_sample(config, console)
    elif config.resume is not None:
        refuse_others(config, "--resume", {"resume", "runs"})
        folder = runs.find_run(root, config.resume)
        config = load_config(folder)
        train_and_compare(config, folder, load_data(config, folder), console)
    else:
        config.check()
        if config.show_blocks:
            params = jax.eval_shape(make_program(config, "adam_mini").init).params
            console.print(block_table(params, block_specs(config.architecture)))
            return
        folder = runs.new_run(root, config)
        try:
            data = load_data(config, folder)
        except ConfigError:
            shutil.rmtree(folder)  # it never was a run
            raise
        train_and_compare(config, folder, data, console)
