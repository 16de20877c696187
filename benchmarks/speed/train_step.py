"""How much time and memory does a whole training step take, with AdamW and with Adam-mini?

python -m benchmarks.speed.train_step

Times the jitted and donated step of GPT-2 (and of ResNet on a CPU) on one batch. Each optimizer
takes turns with AdamW, at the same batch size, and at the largest that needs no more memory than
AdamW does. A separate process for each measures its peak memory. Writes
docs/results/train_step.json and train_step.md.
"""

import dataclasses
import functools
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from benchmarks.results import Columns, machine, write_rows
from benchmarks.speed.update import known
from examples.common.cli import ConfigError, comparison_table, exit_status
from examples.common.images import Batch
from examples.common.interrupts import end_on_interrupt
from examples.common.text import TextConfig
from examples.gpt2 import train as gpt2
from examples.resnet import train as resnet

BPE = TextConfig(tokenizer="bpe", vocab_size=50257)
ON_CPU: dict[str, tuple[Any, Any]] = {
    "GPT-2 nano": (gpt2, gpt2.Config(batch_size=16)),
    "GPT-2 124M": (gpt2, gpt2.Config(model="gpt2", data=BPE, context=128, batch_size=2)),
    "ResNet nano": (resnet, resnet.Config(batch_size=64)),
}
ON_ACCELERATORS: dict[str, tuple[Any, Any]] = {
    "GPT-2 124M, bfloat16": (
        gpt2,
        gpt2.Config(model="gpt2", data=BPE, dtype="bfloat16", scan=True, batch_size=8),
    )
}
MODELS = ON_CPU | ON_ACCELERATORS
# Adam-mini is configured as in the examples, with a row and a column per block.
TITLES = {"adamw": "AdamW", "adam_mini": "Adam-mini", "adam_mini_int8": "Adam-mini, 8 bits"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time whole training steps of AdamW and Adam-mini."""

    models: tuple[str, ...] = ()
    """Names of models; by default, those of a suitable size for the device."""
    rounds: int = 20
    """Steps per median, for each optimizer."""
    quick: bool = False
    """GPT-2 nano, three steps: shows that it runs, not how fast."""
    output: Path = Path("docs/results")
    """Folder for train_step.json and train_step.md."""


def batch_of(config: Any) -> Any:
    """One batch; its content does not affect the time."""
    if isinstance(config, resnet.Config):
        images = jnp.full((config.batch_size, *config.data.facts.image_shape), 100.0)
        return Batch(images, jnp.zeros(config.batch_size, jnp.int32))
    return jnp.ones((config.batch_size, config.architecture.context + 1), jnp.int32)


@functools.cache
def compiled_step(name: str, optimizer: str, batch_size: int) -> tuple[Any, Any, Any]:
    """The program, its batch, and the compiled step."""
    module, config = MODELS[name]
    config = dataclasses.replace(config, batch_size=batch_size)
    program, batch = module.make_program(config, optimizer), batch_of(config)
    training = jax.eval_shape(program.init)
    step = jax.jit(program.step, donate_argnums=0).lower(training, batch).compile()
    return program, batch, step


def step_bytes(step: Any) -> int:
    """The peak memory of the whole step."""
    memory = step.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def peak_after(name: str, optimizer: str, batch_size: int) -> int:
    """The peak memory of a process that compiles the step and makes two: its own memory on a CPU,
    the device's memory on an accelerator."""
    program, batch, step = compiled_step(name, optimizer, batch_size)
    training = jax.jit(program.init)()
    for _ in range(2):
        training, loss = step(training, batch)
    jax.block_until_ready(loss)
    if jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    # getrusage would also count the peak of the processes that this one was started from.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)[1])


def batch_in(name: str, optimizer: str, limit: int, batch_size: int) -> int:
    """A batch size whose step needs no more than `limit` bytes: the largest, if memory is linear in
    the batch; at least `batch_size`."""

    def needs(size: int) -> int:
        return step_bytes(compiled_step(name, optimizer, size)[2])

    # Every guess must be compiled. Memory is nearly linear in the batch, so one guess is close.
    least = needs(batch_size)
    each = max(1, (needs(2 * batch_size) - least) // batch_size)
    larger = batch_size + max(0, limit - least) // each
    while larger > batch_size and needs(larger) > limit:
        larger -= 1
    return larger


class Runner:
    """A compiled step, and the training state that it continues from."""

    def __init__(self, name: str, optimizer: str, batch_size: int):
        program, self._batch, self._step = compiled_step(name, optimizer, batch_size)
        self.bytes = step_bytes(self._step)
        self._training = jax.jit(program.init)()
        self.seconds: list[float] = []

    def __call__(self) -> None:
        clock = time.perf_counter()
        self._training, _ = jax.block_until_ready(self._step(self._training, self._batch))
        self.seconds.append(time.perf_counter() - clock)


def measure(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each optimizer and batch size. Each optimizer takes turns with AdamW, so that at
    most two states are in memory at a time."""
    _, config = MODELS[name]
    size = config.batch_size
    limit = step_bytes(compiled_step(name, "adamw", size)[2])
    cases = [(optimizer, size) for optimizer in TITLES]
    for optimizer in tuple(TITLES)[1:]:
        if (larger := batch_in(name, optimizer, limit, size)) > size:
            cases.append((optimizer, larger))
    is_text = isinstance(config, gpt2.Config)
    spawn = multiprocessing.get_context("spawn")
    adamw = Runner(name, "adamw", size)
    for optimizer, batch_size in cases:
        adamw.seconds.clear()
        run = adamw if optimizer == "adamw" else Runner(name, optimizer, batch_size)
        for _ in range(rounds + 1):
            for turn in {id(adamw): adamw, id(run): run}.values():
                turn()
        low, median, high = statistics.quantiles(run.seconds[1:], n=4)
        rate = batch_size * (config.architecture.context if is_text else 1) / median
        needed = run.bytes
        del run  # frees its memory before another is made, here or in the other process
        peak = None
        if jax.default_backend() in ("cpu", "gpu"):  # only one process can use a TPU
            with spawn.Pool(1) as pool:
                peak = pool.apply(peak_after, (name, optimizer, batch_size))
        yield {
            "model": name,
            "optimizer": TITLES[optimizer],
            "batch": batch_size,
            "ms": 1e3 * median,
            "quartiles": [1e3 * low, 1e3 * high],
            "rate": rate,
            "unit": "tokens" if is_text else "images",
            "of_adamw": batch_size / size * statistics.median(adamw.seconds[1:]) / median,
            "step_bytes": needed,
            "peak_bytes": peak,
        }


COLUMNS: Columns = {
    "model": lambda r: r["model"],
    "optimizer": lambda r: r["optimizer"],
    "batch": lambda r: str(r["batch"]),
    "ms": lambda r: f"{r['ms']:.1f}",
    "quartiles": lambda r: "{:.1f} to {:.1f}".format(*r["quartiles"]),
    "rate": lambda r: f"{r['rate']:,.0f} {r['unit']}/s",
    "of AdamW's": lambda r: f"{r['of_adamw']:.3f}",
    "step MB": lambda r: f"{r['step_bytes'] / 1e6:,.0f}",
    "process MB": lambda r: f"{r['peak_bytes'] / 1e6:,.0f}" if r["peak_bytes"] else "",
}
MEANING = (
    'Rates "of AdamW\'s" are of the same turns; other columns of different rows are of different '
    "minutes. Step MB are the compiler's, process MB the most that a process held which compiles "
    "the step and makes two: of a device's memory, where there is one."
)


def main(options: Options) -> None:
    rounds = 3 if options.quick else options.rounds
    if rounds < 2:
        raise ConfigError(f"--rounds is {rounds}, but quartiles need at least 2.")
    # The process of a case needs room on the device besides this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sized = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATORS
    known("models", options.models, MODELS)
    names = options.models or (("GPT-2 nano",) if options.quick else tuple(sized))
    console = Console(width=140)
    facts = {**machine(), "platform": jax.default_backend(), "rounds": rounds}
    title = (
        f"Training steps on {facts['platform']} ({facts['device']}), JAX {facts['jax']}; medians "
        f"of {rounds} rounds, each in turns with AdamW"
    )
    command = "python -m benchmarks.speed.train_step"
    if options.output != Options.output:
        command += f" --output {options.output}"
    rows: list[dict[str, Any]] = []
    for name in names:
        with console.status(name):
            for row in measure(name, rounds):
                rows.append(row)
                write_rows(
                    options.output, "train_step", "Training steps", command, f"{title}. {MEANING}",
                    COLUMNS, {"machine": facts, "rows": rows},
                )  # fmt: skip
    console.print(comparison_table(title, COLUMNS, rows))


if __name__ == "__main__":
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.speed.train_step", description=Options.__doc__
    )
    end_on_interrupt()
    sys.exit(exit_status(lambda: main(parsed)))
