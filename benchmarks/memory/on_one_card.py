"""Train a large Llama on one device, and compare its memory with the prediction.

python -m benchmarks.memory.on_one_card                       # Llama-2-7B, 20 steps of 2,048 tokens
python -m benchmarks.memory.on_one_card --models llama2-13b --batch 1
python -m benchmarks.memory.on_one_card --models gpt2 --optimizers adamw "5 bytes" --seeds 2
python -m benchmarks.memory.on_one_card --models tiny --steps 3      # proves that it runs, on CPU

Trains from random weights with the step that benchmarks.memory.fits compiles (scanned layers,
recomputed in the backward pass, in bfloat16), on the source of Python's standard library. The
predicted memory is XLA's for the compiled step; the measured memory is the device's peak, if the
device reports one. The first step is not timed.
"""

import dataclasses
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks.memory.fits import MODELS
from benchmarks.results import Columns, machine, write_rows
from examples.common.cli import ConfigError, check_counts, comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.language import LanguageConfig, load_task
from examples.common.optimizers import ParameterConfig
from examples.common.text import TextConfig
from examples.llama.train import Config as LlamaTraining


class Optimizer(NamedTuple):
    """An optimizer of the examples, and how parameters are stored."""

    name: str
    parameters: ParameterConfig = ParameterConfig()


OPTIMIZERS = {
    "5 bytes": Optimizer("adam_mini_int8", ParameterConfig("bfloat16")),
    "9 bytes": Optimizer("adam_mini_int8"),
    "adamw": Optimizer("adamw"),
}
# Models have the vocabularies of published tokenizers; of these, only the first 256 tokens occur.
TRAINED: dict[str, Callable[..., LanguageConfig]] = {
    **MODELS,
    "tiny": lambda **given: LlamaTraining(
        layers=2, heads=2, kv_heads=2, width=64, data=TextConfig(), **given
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Train large models on one device, and print predicted and measured memory."""

    models: tuple[str, ...] = ("llama2-7b",)
    """Models of benchmarks.memory.fits, or tiny."""
    optimizers: tuple[str, ...] = ("5 bytes",)
    """5 bytes: outer, 8 bits, bfloat16 parameters rounded at random; 9 bytes: the same with float32
    parameters; adamw: AdamW in float32."""
    steps: int = 20
    """Optimizer steps."""
    context: int = 2048
    """Tokens per sequence."""
    batch: int = 1
    """Sequences per step."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    seeds: int = 1
    """Number of seeds, from 1 on."""
    output: Path = Path("runs/on_one_card")
    """Folder for on_one_card.json and on_one_card.md."""


def config_of(options: Options, model: str, optimizer: Optimizer) -> LanguageConfig:
    """The example's configuration."""
    config = TRAINED[model](
        context=min(options.context, 1024) if model.startswith("gpt2") else options.context,
        dtype="bfloat16", scan=True, remat=True, batch_size=options.batch, steps=options.steps,
        parameters=optimizer.parameters, eval_windows=8,
    )  # fmt: skip
    hyper = dataclasses.replace(config.hyper, learning_rate=options.learning_rate)
    # The vocabulary is the published one, but the text is read as bytes: nothing is downloaded.
    data = dataclasses.replace(config.data, tokenizer="bytes")
    return dataclasses.replace(config, hyper=hyper, data=_Vocabulary.of(data, config))


@dataclasses.dataclass(frozen=True)
class _Vocabulary(TextConfig):
    """Text as bytes, for a model with a larger vocabulary."""

    tokens: int = 256

    @classmethod
    def of(cls, data: TextConfig, config: LanguageConfig) -> "_Vocabulary":
        return cls(**dataclasses.asdict(data), tokens=config.data.vocabulary)

    @property
    def vocabulary(self) -> int:
        return self.tokens


def train(options: Options, model: str, optimizer: str, seed: int) -> dict[str, Any]:
    """A row of the table."""
    who = OPTIMIZERS[optimizer]
    config = dataclasses.replace(config_of(options, model, who), seed=seed)
    device = jax.devices()[0]
    with tempfile.TemporaryDirectory() as folder:
        task = load_task(config, Path(folder))
        program = task.make_program(who.name)
        state = program.abstract_state()
        step = jax.jit(program.step, donate_argnums=0).lower(state, task.batch(1)).compile()
        memory = step.memory_analysis()
        predicted = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        state = jax.jit(program.init)(seed)
        losses = []
        for number in range(1, config.steps + 1):
            state, loss = step(state, task.batch(number))
            if number == 1:
                loss.block_until_ready()
                clock = time.perf_counter()
            losses.append(loss)
        losses = [float(loss) for loss in losses]
        seconds = (time.perf_counter() - clock) / max(config.steps - 1, 1)
    if not np.isfinite(losses).all():
        raise RuntimeError(f"{model}, {optimizer}: the losses are {losses}")
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "model": model,
        "optimizer": optimizer,
        "seed": seed,
        "parameters": parameters,
        "tokens": config.batch_size * config.architecture.context,
        "predicted_bytes": predicted,
        "measured_bytes": peak,
        "tokens_per_second": config.batch_size * config.architecture.context / seconds,
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-max(config.steps // 10, 1) :])),
        "losses": losses,
    }


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "optimizer": lambda row: row["optimizer"],
    "seed": lambda row: str(row["seed"]),
    "parameters": lambda row: f"{row['parameters']:,}",
    "tokens a step": lambda row: f"{row['tokens']:,}",
    "predicted GB": lambda row: f"{row['predicted_bytes'] / 1e9:.2f}",
    "measured GB": lambda row: (
        "" if row["measured_bytes"] is None else f"{row['measured_bytes'] / 1e9:.2f}"
    ),
    "tokens a second": lambda row: f"{row['tokens_per_second']:,.0f}",
    "first loss": lambda row: f"{row['first_loss']:.3f}",
    "loss of the last tenth": lambda row: f"{row['last_loss']:.3f}",
}


def main(options: Options) -> None:
    """Prints a row for each model, optimizer and seed."""
    for name, given, known in (
        ("models", options.models, TRAINED),
        ("optimizers", options.optimizers, OPTIMIZERS),
    ):
        for one in given:
            if one not in known:
                raise ConfigError(f"--{name} got {one}, but must be of {', '.join(known)}.")
    names = ("steps", "context", "batch", "seeds")
    check_counts({name: getattr(options, name) for name in names})
    console = Console(width=160)
    rows: list[dict[str, Any]] = []
    title = f"One {jax.devices()[0].device_kind}, {options.steps} steps"
    for model in options.models:
        for optimizer in options.optimizers:
            for seed in range(1, 1 + options.seeds):
                with console.status(f"{model}, {optimizer}, seed {seed}"):
                    rows.append(train(options, model, optimizer, seed))
                gc.collect()  # frees the arrays of this run before the next
                content = {"machine": machine(), "rows": rows}
                command = "python -m benchmarks.memory.on_one_card"
                write_rows(options.output, "on_one_card", "On one card", command, title + ". "
                           "The peak that a device measures is of its whole process: of several "
                           "rows, the largest so far", COLUMNS, content)  # fmt: skip
    console.print(comparison_table(title, COLUMNS, rows))


if __name__ == "__main__":
    end_on_interrupt()
    parsed = tyro.cli(Options, prog="python -m benchmarks.memory.on_one_card", description=__doc__)
    sys.exit(exit_status(lambda: main(parsed)))
