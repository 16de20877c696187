"""Would a custom kernel move 5 arrays where XLA moves 6? Counted for a TPU, present or not.

python -m benchmarks.speed.one_reading

The Pallas kernel loads a stripe of columns (whole blocks, by neuron), so it reads the gradient once
for both moments. As part of `tx.update` it returns the update, which another kernel adds to the
parameters. It saves traffic only if it takes the parameters and adds the update itself.
benchmarks/chips.py says how to install the compiler.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console

from benchmarks.chips import CHIPS, devices, without_devices
from benchmarks.speed.traffic import OPTIMIZERS, TREES, compiled, traffic
from examples.common.cli import comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt

B1, B2, EPS, RATE, DECAY = 0.9, 0.999, 1e-8, 1e-4, 1e-4


@dataclasses.dataclass(frozen=True)
class Options:
    """Count what a kernel that reads the gradient once would move."""

    chip: Literal["v5e", "v5p", "v6e"] = "v5e"
    """The TPU to compile for."""
    columns: int = 128
    """Number of columns in a stripe."""


def stripe(g: Any, m: Any, v: Any, p: Any, new_m: Any, new_v: Any, new_p: Any) -> None:
    """Adam-mini on whole columns. Without `p`, `new_p` gets the step to add to it."""
    x = g[...]
    new_v[...] = B2 * v[...] + (1 - B2) * jnp.mean(x * x, 0, keepdims=True)
    new_m[...] = B1 * m[...] + (1 - B1) * x
    step = new_m[...] * (-RATE / (jnp.sqrt(new_v[...]) + EPS))
    new_p[...] = step if p is None else (1 - RATE * DECAY) * p[...] + step


def call(columns: int, g: Any, m: Any, v: Any, p: Any = None) -> list[Any]:
    """The kernel over all stripes; it updates `m`, `v` (and `p`) in place."""
    whole = pl.BlockSpec((g.shape[0], columns), lambda i: (0, i))
    row = pl.BlockSpec((1, columns), lambda i: (0, i))
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    added = [] if p is None else [p]

    def kernel(g: Any, m: Any, v: Any, *rest: Any) -> None:
        stripe(g, m, v, *(rest if added else (None, *rest)))

    return pl.pallas_call(
        kernel,
        out_shape=[shape(m), shape(v), shape(g)],
        grid=(g.shape[1] // columns,),
        in_specs=[whole, whole, row, *(whole for _ in added)],
        out_specs=[whole, row, whole],
        input_output_aliases={1: 0, 2: 1, **({3: 2} if added else {})},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=100 * 2**20),
    )(g, m, v, *added)


def as_update(columns: int, p: Any, m: Any, v: Any, g: Any) -> Any:
    m, v, update = call(columns, g, m, v)
    return p + (update - RATE * DECAY * p), m, v


def with_parameters(columns: int, p: Any, m: Any, v: Any, g: Any) -> Any:
    m, v, p = call(columns, g, m, v, p)
    return p, m, v


def main(options: Options) -> None:
    """Prints a row for each program."""
    name = "neurons, 4096 x 11008"
    tree = TREES[name]()
    where = devices(CHIPS[options.chip].one)[0]
    sharding = jax.sharding.SingleDeviceSharding(where)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    p, v = array(4096, 11008), array(1, 11008)

    def program(step: Callable[..., Any]) -> Any:
        step = functools.partial(step, options.columns)
        return jax.jit(step, donate_argnums=(0, 1, 2)).lower(p, p, v, p).compile()

    programs = {
        "XLA, AdamW": compiled(OPTIMIZERS["AdamW"](tree, "float32"), tree.params, where),
        "XLA, Adam-mini": compiled(OPTIMIZERS["one number"](tree, "float32"), tree.params, where),
        "a kernel that makes the update": program(as_update),
        "a kernel that adds it, too": program(with_parameters),
    }
    rows = [
        {"step": step, "arrays": traffic(compiled.as_text()).moved / (p.size * 4)}
        for step, compiled in programs.items()
    ]
    columns = {"step": lambda row: row["step"], "arrays": lambda row: f"{row['arrays']:.2f}"}
    Console(width=120).print(comparison_table(f"{name}, float32, {options.chip}", columns, rows))


if __name__ == "__main__":
    end_on_interrupt()
    without_devices()
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.speed.one_reading", description=Options.__doc__
    )
    sys.exit(exit_status(lambda: main(parsed)))
