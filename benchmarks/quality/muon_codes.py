"""How much error 8-bit codes of Muon's momentum cause in its updates, for several ways of coding.

python -m benchmarks.quality.muon_codes

Feeds the same gradients to Muon with float32 momentum and with momentum coded between steps in each
way. Measures the error of the updates after Newton-Schulz: the root mean square, relative to that
of the updates, over the last steps. Every way stores one bfloat16 number per row. Writes
docs/results/muon_codes.json and muon_codes.md.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from optax.contrib import scale_by_muon
from rich.console import Console

from benchmarks.results import Columns, machine, write_rows
from examples.common.cli import comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from optax_adam_mini import per_neuron
from optax_adam_mini.quantized import read, read_row, write, write_row
from optax_adam_mini.random_bits import random_bits, rounding_seed

ROWS = (1,)  # the axes that a row lies along


class Codes(NamedTuple):
    """A way of coding."""

    write: Callable[[Any, Any], Any]
    """From a matrix and a seed to what is stored."""
    read: Callable[[Any], Any]
    """From what is stored to the rounded matrix."""


def write_even(m: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes evenly spaced between the largest magnitude of a row and its negative."""
    # Enlarged by as much as bfloat16 may round down.
    largest = jnp.max(jnp.abs(m), ROWS, keepdims=True) * (1 + 2.0**-8)
    largest = largest.astype(jnp.bfloat16)
    random = random_bits(23, m.shape, seed) / 2.0**23
    codes = jnp.floor(m / largest.astype(jnp.float32) * 127 + random)
    return jnp.clip(codes, -127, 127).astype(jnp.int8), largest


def read_even(kept: tuple[jax.Array, jax.Array]) -> jax.Array:
    codes, largest = kept
    return codes / jnp.float32(127) * largest.astype(jnp.float32)


OF_ROWS = per_neuron(0)  # Adam-mini's cut with one number per row


def write_of_root(m: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adam-mini's codes, with the mean square of a row in place of the second moment."""
    mean = OF_ROWS.block_mean(m**2).astype(jnp.bfloat16)
    v = OF_ROWS.factors(mean.astype(jnp.float32), m.shape)
    return write(m, v, np.dtype("int8"), seed), mean


def read_of_root(kept: tuple[jax.Array, jax.Array]) -> jax.Array:
    codes, mean = kept
    return read(codes, OF_ROWS.factors(mean.astype(jnp.float32), codes.shape))


CODES = {
    "these codes": Codes(lambda m, seed: write_row(m, ROWS, seed), lambda kept: read_row(*kept)),
    "evenly spaced codes, of the largest of a row": Codes(write_even, read_even),
    "the codes of `adam_mini`, of a row's root of the mean square": Codes(
        write_of_root, read_of_root
    ),
}


def noise(rng: np.random.Generator, shape: tuple[int, int]) -> Iterator[Any]:
    while True:
        yield rng.normal(size=shape)


def scaled_entries(rng: np.random.Generator, shape: tuple[int, int]) -> Iterator[Any]:
    scales = np.exp(1.5 * rng.normal(size=shape))
    return (scales * g for g in noise(rng, shape))


def scaled_columns(rng: np.random.Generator, shape: tuple[int, int]) -> Iterator[Any]:
    scales = np.exp(1.5 * rng.normal(size=(1, shape[1])))
    return (scales * g for g in noise(rng, shape))


def sparse(rng: np.random.Generator, shape: tuple[int, int]) -> Iterator[Any]:
    return (g * (rng.random(shape) < 0.02) for g in noise(rng, shape))


def signal(rng: np.random.Generator, shape: tuple[int, int]) -> Iterator[Any]:
    left, right = (rng.normal(size=(size, 8)) for size in shape)
    return (left @ right.T / np.sqrt(8) + g for g in noise(rng, shape))


GRADIENTS = {
    "noise of equal scales": noise,
    "scales spread as e^N(0, 1.5)": scaled_entries,
    "a scale for each column, spread alike": scaled_columns,
    "2% of the entries, others each step": sparse,
    "noise, and a signal of rank 8, as large": signal,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure the error of Muon's updates for several ways of coding its momentum in 8 bits."""

    steps: int = 120
    """Steps per way of coding; the error is that of the last 20."""
    seed: int = 0
    """Seed of the gradients."""
    output: Path = Path("docs/results")
    """Folder for muon_codes.json and muon_codes.md."""


SHAPES = ((128, 512), (256, 256))
LAST = 20


def errors(gradients: Iterator[Any], shape: tuple[int, int], steps: int) -> dict[str, float]:
    """The error of the updates for each way of coding."""
    muon: Any = scale_by_muon()

    @jax.jit
    def step(state: Any, kept: Any, g: jax.Array) -> tuple[Any, Any, Any]:
        expected, exact = muon.update(g, state)
        after, found = {}, {}
        for name, codes in CODES.items():
            update, coded = muon.update(g, state._replace(mu=codes.read(kept[name])))
            after[name] = codes.write(coded.mu, rounding_seed(coded.count, 0))
            found[name] = jnp.sum((update - expected) ** 2) / jnp.sum(expected**2)
        return exact, after, found

    zeros = jnp.zeros(shape)
    state = muon.init(zeros)
    kept = {name: codes.write(zeros, rounding_seed(0, 0)) for name, codes in CODES.items()}
    squares: list[dict[str, Any]] = []
    for _ in range(steps):
        state, kept, found = step(state, kept, jnp.asarray(next(gradients), jnp.float32))
        squares.append(found)
    return {name: float(np.sqrt(np.mean([s[name] for s in squares[-LAST:]]))) for name in CODES}


def rows(steps: int, seed: int) -> list[dict[str, Any]]:
    """The rows of the table: the errors for each shape."""
    found: list[dict[str, Any]] = []
    for name, make in GRADIENTS.items():
        by_shape = [
            errors(make(np.random.default_rng(seed), shape), shape, steps) for shape in SHAPES
        ]
        found.append({"gradients": name, **{c: [e[c] for e in by_shape] for c in CODES}})
    return found


COLUMNS: Columns = {
    "gradients": lambda row: row["gradients"],
    **{name: lambda row, n=name: ", ".join(f"{e:.1%}" for e in row[n]) for name in CODES},
}


def main(options: Options) -> None:
    """Prints a row for each kind of gradients."""
    found = rows(options.steps, options.seed)
    shapes = " and ".join(f"{a} x {b}" for a, b in SHAPES)
    title = (
        "Error of Muon's updates, against momentum in float32: root of the mean square, of the "
        f"updates' own, over steps {options.steps - LAST + 1} to {options.steps}, beta 0.95, for "
        f"matrices of {shapes}."
    )
    Console(width=160).print(comparison_table(title, COLUMNS, found))
    content = {"settings": {"steps": options.steps, "seed": options.seed}, "machine": machine()}
    write_rows(
        options.output, "muon_codes", "Muon's momentum in 8 bits",
        "python -m benchmarks.quality.muon_codes", title, COLUMNS, {**content, "rows": found},
    )  # fmt: skip


if __name__ == "__main__":
    end_on_interrupt()
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.quality.muon_codes", description=Options.__doc__
    )
    sys.exit(exit_status(lambda: main(parsed)))
