"""What an update costs besides its arithmetic: tracing and compiling, calling, importing.

python -m benchmarks.speed.overhead

Times AdamW and Adam-mini in turns: tracing and compiling the step of a GPT-2 with 25 layers, whose
parameters are 304 arrays, and of the same with stacked layers, with one number a block, with
`outer` and in 8 bits; and calling the update of a small model outside of `jax.jit`. Also times
importing the package once jax and optax are imported. Writes docs/results/overhead.json and
overhead.md.
"""

import dataclasses
import functools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console

from benchmarks.results import Columns, Row, machine, write_rows
from benchmarks.speed.update import Tree, gpt2
from examples.common.cli import check_counts, comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from optax_adam_mini import adam_mini


@dataclasses.dataclass(frozen=True)
class Options:
    """Time compilation, eager calls and the import."""

    layers: int = 25
    """Layers of GPT-2."""
    rounds: int = 5
    """Compilations per median; calls are timed a hundred times as often."""
    quick: bool = False
    """Two layers, one round: shows that it runs, not how fast."""
    output: Path = Path("docs/results")
    """Folder for overhead.json and overhead.md."""


def optimizers(tree: Tree, kept: str = "") -> dict[str, Any]:
    """AdamW, and Adam-mini with one number a block, or with what `kept` says."""
    specs, mu_dtype = (tree.outer if "outer" in kept else tree.specs), None
    if "8 bits" in kept:
        mu_dtype = jnp.int8
    mini = adam_mini(1e-4, mu_dtype=mu_dtype, block_specs=specs)
    return {"AdamW": optax.adamw(1e-4), "Adam-mini": mini}


def in_turns(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each in seconds, without the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 1):
        for name, seconds_of in timed.items():
            seconds[name].append(seconds_of())
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def compile_seconds(tree: Tree, rounds: int, kept: str) -> dict[str, float]:
    """The time to trace and compile the jitted and donated step, with empty caches."""

    def timed(tx: Any) -> float:
        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, tree.params)
        jax.clear_caches()
        clock = time.perf_counter()
        jax.jit(step, donate_argnums=(0, 1)).lower(tree.params, state, tree.params).compile()
        return time.perf_counter() - clock

    made = optimizers(tree, kept)
    return in_turns({name: functools.partial(timed, tx) for name, tx in made.items()}, rounds)


def call_seconds(tree: Tree, rounds: int) -> dict[str, float]:
    """The time to call the updates as they are, without `jax.jit`."""
    params = jax.tree.map(lambda p: jnp.full(p.shape, 0.02, p.dtype), tree.params)
    made = optimizers(tree)
    updates = {name: tx.update for name, tx in made.items()}
    states = {name: tx.init(params) for name, tx in made.items()}

    def timed(name: str) -> float:
        clock = time.perf_counter()
        jax.block_until_ready(updates[name](params, states[name], params))
        return time.perf_counter() - clock

    return in_turns({name: functools.partial(timed, name) for name in made}, rounds)


def import_seconds() -> float:
    """The time to import the package once jax and optax are imported."""
    code = "import jax, optax, optax_adam_mini"
    found = []
    for _ in range(6):  # the first may have to compile it to bytecode
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        microseconds = re.search(r"\| +(\d+) \| optax_adam_mini$", done.stderr, re.M)
        assert microseconds is not None
        found.append(int(microseconds[1]) / 1e6)
    return statistics.median(found[1:])


COLUMNS: Columns = {
    "what": lambda r: r["what"],
    "AdamW ms": lambda r: f"{1e3 * r['AdamW']:.2f}" if "AdamW" in r else "",
    "Adam-mini ms": lambda r: f"{1e3 * r['Adam-mini']:.2f}",
    "of AdamW's": lambda r: f"{r['Adam-mini'] / r['AdamW']:.2f}" if "AdamW" in r else "",
}


def measure(layers: int, rounds: int) -> list[Row]:
    """A row for each thing that is timed."""
    rows: list[Row] = []
    for scan, name in ((False, "unrolled"), (True, "scanned")):
        tree = gpt2("gpt2", scan, layers=layers)
        arrays = len(jax.tree.leaves(tree.params))
        for kept in ("", ", outer", ", outer, 8 bits"):
            what = f"trace and compile, {name}: {arrays} arrays{kept}"
            rows.append({"what": what, **compile_seconds(tree, rounds, kept)})
    for count, name in ((layers, "unrolled"), (1, "one layer")):
        tree = gpt2("nano", scan=False, layers=count)
        arrays = len(jax.tree.leaves(tree.params))
        what = f"call without jit, nano, {name}: {arrays} arrays"
        rows.append({"what": what, **call_seconds(tree, 100 * rounds)})
    return [*rows, {"what": "import beyond jax and optax", "Adam-mini": import_seconds()}]


def main(options: Options) -> None:
    if options.quick:
        options = dataclasses.replace(options, layers=2, rounds=1)
    check_counts({"layers": options.layers, "rounds": options.rounds})
    facts = {**machine(), "platform": jax.default_backend(), "rounds": options.rounds}
    title = (
        f"On {facts['platform']} ({facts['device']}), JAX {facts['jax']}; medians of "
        f"{options.rounds} compilations in turns, and of {100 * options.rounds} calls"
    )
    rows = measure(options.layers, options.rounds)
    content = {"machine": facts, "rows": rows}
    command = f"python -m benchmarks.speed.overhead --rounds {options.rounds}"
    heading = "Beside the arithmetic"
    write_rows(options.output, "overhead", heading, command, f"{title}.", COLUMNS, content)
    Console(width=120).print(comparison_table(title, COLUMNS, rows))


if __name__ == "__main__":
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.speed.overhead", description=Options.__doc__
    )
    end_on_interrupt()
    sys.exit(exit_status(lambda: main(parsed)))
