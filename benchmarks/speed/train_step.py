"""How fast is a whole training step, and in how much memory? AdamW beside Adam-mini.

python -m benchmarks.speed.train_step

Times the jitted and donated step of GPT-2 and of ResNet on random data, each optimizer in turn and
in a process of its own for the high-water mark, at equal batches; and Adam-mini with the greatest
batch that needs no more memory than AdamW's. Writes docs/results/train_step.json and train_step.md.
"""

import dataclasses
import multiprocessing
import re
import statistics
import sys
import time
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
MODELS: dict[str, tuple[Any, Any]] = {
    "GPT-2 nano": (gpt2, gpt2.Config(batch_size=16)),
    "GPT-2 124M": (gpt2, gpt2.Config(model="gpt2", data=BPE, context=128, batch_size=2)),
    "ResNet nano": (resnet, resnet.Config(batch_size=64)),
}
TITLES = {"adamw": "AdamW", "adam_mini": "Adam-mini"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time whole training steps, AdamW beside Adam-mini."""

    models: tuple[str, ...] = ()
    """Names of models; all of them where none is given."""
    rounds: int = 20
    """Steps of each optimizer that the medians are of."""
    quick: bool = False
    """The nano models, three steps: whether it runs, not how fast."""
    output: Path = Path("docs/results")
    """Folder for train_step.json and train_step.md."""


def batch_of(config: Any) -> Any:
    """One batch; what is in it does not matter for the time."""
    if isinstance(config, resnet.Config):
        images = jnp.full((config.batch_size, *config.data.facts.image_shape), 100.0)
        return Batch(images, jnp.zeros(config.batch_size, jnp.int32))
    return jnp.ones((config.batch_size, config.architecture.context + 1), jnp.int32)


def compiled_step(name: str, optimizer: str, batch_size: int) -> tuple[Any, Any, Any]:
    """The program, its batch, and the compiled step."""
    module, config = MODELS[name]
    config = dataclasses.replace(config, batch_size=batch_size)
    program, batch = module.make_program(config, optimizer), batch_of(config)
    training = jax.eval_shape(program.init)
    step = jax.jit(program.step, donate_argnums=0).lower(training, batch).compile()
    return program, batch, step


def step_bytes(step: Any) -> int:
    """What the whole step holds at its highest."""
    memory = step.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def peak_after(name: str, optimizer: str, batch_size: int) -> int:
    """The high-water mark of a process that has compiled the step and made two."""
    program, batch, step = compiled_step(name, optimizer, batch_size)
    training = jax.jit(program.init)()
    for _ in range(2):
        training, loss = step(training, batch)
    jax.block_until_ready(loss)
    # Not getrusage's, which is the greatest of the processes that this one was started from, too.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)[1])


def batch_in(name: str, limit: int, batch_size: int) -> int:
    """A batch whose step with Adam-mini needs no more than `limit` bytes, the greatest where memory
    is linear in the batch; no less than `batch_size`."""

    def needs(size: int) -> int:
        return step_bytes(compiled_step(name, "adam_mini", size)[2])

    # Memory is close to linear in the batch, and every guess is compiled.
    least = needs(batch_size)
    each = max(1, (needs(2 * batch_size) - least) // batch_size)
    larger = batch_size + max(0, limit - least) // each
    while larger > batch_size and needs(larger) > limit:
        larger -= 1
    return larger


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each optimizer and batch, timed in interleaved rounds."""
    _, config = MODELS[name]
    size = config.batch_size
    limit = step_bytes(compiled_step(name, "adamw", size)[2])
    cases = [("adamw", size), ("adam_mini", size)]
    if (larger := batch_in(name, limit, size)) > size:
        cases.append(("adam_mini", larger))
    made = {case: compiled_step(name, *case) for case in cases}
    training = {case: jax.jit(program.init)() for case, (program, _, _) in made.items()}
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds + 1):
        for case, (_, batch, step) in made.items():
            clock = time.perf_counter()
            training[case], _ = jax.block_until_ready(step(training[case], batch))
            seconds[case].append(time.perf_counter() - clock)
    is_text = isinstance(config, gpt2.Config)
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for (optimizer, batch_size), found in seconds.items():
        low, median, high = statistics.quantiles(found[1:], n=4)
        peak = None  # of an accelerator, which this process holds, another would find none
        if jax.default_backend() == "cpu":
            with spawn.Pool(1) as pool:
                peak = pool.apply(peak_after, (name, optimizer, batch_size))
        rows.append(
            {
                "model": name,
                "optimizer": TITLES[optimizer],
                "batch": batch_size,
                "ms": 1e3 * median,
                "quartiles": [1e3 * low, 1e3 * high],
                "rate": batch_size * (config.architecture.context if is_text else 1) / median,
                "unit": "tokens" if is_text else "images",
                "step_bytes": step_bytes(made[optimizer, batch_size][2]),
                "peak_bytes": peak,
            }
        )
    return rows


COLUMNS: Columns = {
    "model": lambda r: r["model"],
    "optimizer": lambda r: r["optimizer"],
    "batch": lambda r: str(r["batch"]),
    "ms": lambda r: f"{r['ms']:.1f}",
    "quartiles": lambda r: "{:.1f} to {:.1f}".format(*r["quartiles"]),
    "rate": lambda r: f"{r['rate']:,.0f} {r['unit']}/s",
    "step MB": lambda r: f"{r['step_bytes'] / 1e6:,.0f}",
    "process MB": lambda r: f"{r['peak_bytes'] / 1e6:,.0f}" if r["peak_bytes"] else "",
}


def main(options: Options) -> None:
    rounds = 3 if options.quick else options.rounds
    if rounds < 2:
        raise ConfigError(f"--rounds is {rounds}, but quartiles need at least 2.")
    nano = tuple(name for name in MODELS if "nano" in name)
    names = known("models", options.models, MODELS)
    if options.quick and not options.models:
        names = nano
    console = Console(width=140)
    facts = {**machine(), "platform": jax.default_backend(), "rounds": rounds}
    title = (
        f"Training steps on {facts['platform']} ({facts['device']}), JAX {facts['jax']}; medians "
        f"of {rounds} interleaved rounds"
    )
    rows: list[dict[str, Any]] = []
    for name in names:
        with console.status(name):
            rows += measure(name, rounds)
        content = {"machine": facts, "rows": rows}
        command = "python -m benchmarks.speed.train_step"
        write_rows(
            options.output, "train_step", "Training steps", command, f"{title}.", COLUMNS, content
        )
    console.print(comparison_table(title, COLUMNS, rows))


if __name__ == "__main__":
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.speed.train_step", description=Options.__doc__
    )
    end_on_interrupt()
    sys.exit(exit_status(lambda: main(parsed)))
