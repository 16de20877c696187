"""How much device memory the update reads and writes, according to compilers for TPUs and the H100.

python -m benchmarks.speed.traffic

It needs no device, only XLA's compilers: benchmarks/chips.py says how to install them. The compiled
step is the update and its addition to the parameters, with parameters and state donated. For each
of its kernels, the bytes of all operands and results in device memory are counted, including their
layout's padding; a copy into on-chip memory counts what it reads. Temporaries on the chip are free.
An "array" is one of the parameters' size: 5 is the minimum (parameters and first moment read and
written, the gradient read once). Writes docs/results/traffic.json and traffic.md; results of other
chips, trees, dtypes and optimizers stay as they are.
"""

import dataclasses
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import tyro
from rich.console import Console

from benchmarks.chips import CHIPS, devices, versions, without_devices
from benchmarks.results import Columns, write_rows
from benchmarks.speed.update import TREES, Tree, known, rows_of_before
from examples.common.cli import comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from optax_adam_mini import adam_mini, per_element, stochastic_rounding

PER_ELEMENT = "per coordinate, 4096 x 11008"
ROUNDED = "row and column, 8 bits, rounded at random"
CASES: dict[str, Callable[[], Tree]] = {
    **TREES,
    PER_ELEMENT: lambda: TREES["neurons, 4096 x 11008"]()._replace(
        specs={"kernel": per_element()}, outer={"kernel": per_element()}
    ),
}
OPTIMIZERS: dict[str, Callable[[Tree, str], optax.GradientTransformation]] = {
    "AdamW": lambda tree, dtype: optax.adamw(1e-4, mu_dtype=dtype),
    "SGD, momentum": lambda tree, dtype: optax.sgd(1e-4, 0.9),
    "one number": lambda tree, dtype: adam_mini(1e-4, mu_dtype=dtype, block_specs=tree.specs),
    "row and column": lambda tree, dtype: adam_mini(1e-4, mu_dtype=dtype, block_specs=tree.outer),
    "one number, 8 bits": lambda tree, _: adam_mini(1e-4, mu_dtype="int8", block_specs=tree.specs),
    "row and column, 8 bits": lambda tree, _: adam_mini(
        1e-4, mu_dtype="int8", block_specs=tree.outer
    ),
    ROUNDED: lambda tree, _: stochastic_rounding(
        adam_mini(1e-4, mu_dtype="int8", block_specs=tree.outer)
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Count the bytes that the update moves, compiled for accelerators that need not be present."""

    chips: tuple[str, ...] = ()
    """Names of chips; all by default."""
    trees: tuple[str, ...] = ()
    """Names of trees and layouts; all by default."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of parameters and first moment."""
    optimizers: tuple[str, ...] = ()
    """Optimizers, by their names in the table; all by default."""
    output: Path = Path("docs/results")
    """Folder for traffic.json and traffic.md."""


class Array(NamedTuple):
    """An array in a compiled program."""

    size: int
    """Bytes, including the padding of its tiles."""
    on_chip: bool


BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16}
_TYPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_STEP = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)")
NO_WORK = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done",
    "after-all", "opt-barrier",
}  # fmt: skip


def arrays(text: str) -> list[Array]:
    """The arrays that a type in a compiled program names."""
    found: list[Array] = []
    for dtype, dims, order, layout in _TYPE.findall(text):
        bits = BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])
        shape = [int(n) for n in dims.split(",") if n]
        tile = re.match(r"T\(([\d,]+)\)", layout)
        if tile and shape:
            sizes = [int(n) for n in tile[1].split(",")]
            minor_first = [int(n) for n in order.split(",")]
            for axis, size in zip(minor_first, reversed(sizes), strict=False):
                shape[axis] = -(-shape[axis] // size) * size
        memory = re.search(r"S\((\d+)\)", layout)
        on_chip = memory is not None and memory[1] != "0"
        found.append(Array(math.prod(shape) * bits // 8, on_chip))
    return found


class Kernel(NamedTuple):
    """The bytes of device memory that a kernel reads and writes."""

    read: int
    written: int


class Traffic(NamedTuple):
    """The kernels and outputs of a compiled program."""

    kernels: list[Kernel]
    outputs: int
    """Bytes of its results."""

    @property
    def moved(self) -> int:
        """The bytes that are read and written."""
        return sum(read + written for read, written in self.kernels)

    @property
    def temporaries(self) -> int:
        """The bytes that are written but are not results, as if all existed at once."""
        return sum(kernel.written for kernel in self.kernels) - self.outputs


def traffic(hlo: str) -> Traffic:
    """What the kernels of the entry computation read and write."""
    made: dict[str, list[Array]] = {}
    kernels: list[Kernel] = []
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        step = _STEP.match(line)
        if not step:
            continue
        name, result, opcode, operands = step.groups()
        made[name] = written = arrays(result)
        if opcode in NO_WORK:
            continue
        if opcode in ("while", "conditional", "call"):
            raise ValueError(f"the program has a {opcode}, whose kernels are not counted")
        if opcode == "slice-start":  # its results: the whole, the slice, a semaphore
            whole, piece, _ = written
            read, written = [piece._replace(on_chip=whole.on_chip)], [piece]
        elif opcode == "copy-start":  # its results: the copy, the original, a semaphore
            copy, copied, _ = written
            read, written = [copied], [copy]
        else:
            of = dict.fromkeys(re.findall(r"%([\w.-]+)", operands))
            read = [array for operand in of for array in made.get(operand, [])]
        in_memory = lambda arrays: sum(array.size for array in arrays if not array.on_chip)
        kernels.append(Kernel(in_memory(read), in_memory(written)))
    return Traffic(kernels, sum(array.size for array in made[name]))


def compiled(tx: Any, params: Any, where: Any) -> Any:
    """The step, compiled for a device that need not be present."""
    sharding = jax.sharding.SingleDeviceSharding(where)
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(placed, params)
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def measure(
    chip: str, tree: Tree, dtype: str, optimizers: Iterable[str] = OPTIMIZERS
) -> dict[str, Any]:
    """For each optimizer, the arrays that it moves and other facts about the program.

    Optimizers in 8 bits are measured with float32 parameters only, because their share of the
    traffic depends on the dtype; those rounded at random are measured in bfloat16 only.
    """
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree.params)
    size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
    where = devices(CHIPS[chip].one)[0]
    ms = 1e3 * size / CHIPS[chip].bandwidth  # to read one array
    row: dict[str, Any] = {"floor_ms": 5 * ms}
    for optimizer in optimizers:
        if "8 bits" in optimizer and dtype != ("bfloat16" if optimizer == ROUNDED else "float32"):
            continue
        start = time.perf_counter()
        program = compiled(OPTIMIZERS[optimizer](tree, dtype), params, where)
        seconds = time.perf_counter() - start
        found = traffic(program.as_text())
        # The compiler's count of temporaries includes those on a TPU's chip.
        temporaries = min(found.temporaries, program.memory_analysis().temp_size_in_bytes)
        row[optimizer] = {
            "arrays": found.moved / size,
            "ms": ms * found.moved / size,
            "kernels": len(found.kernels),
            "temporary_share": temporaries / size,
            "compile_seconds": seconds,
        }
    return row


def of_each(what: str, form: str) -> Callable[[Any], str]:
    """A fact about each optimizer, one after another in a cell."""
    return lambda row: " / ".join(
        format(row[name][what], form) for name in OPTIMIZERS if name in row
    )


def of_adamw(optimizer: str) -> Callable[[Any], str]:
    return lambda row: (
        f"{row[optimizer]['arrays'] / row['AdamW']['arrays']:.3f}"
        if {optimizer, "AdamW"} <= row.keys()
        else ""
    )


COLUMNS: Columns = {
    "tree": lambda row: row["tree"],
    "chip": lambda row: row["chip"],
    "dtype": lambda row: row["dtype"],
    **{
        name: lambda row, name=name: f"{row[name]['arrays']:.2f}" if name in row else ""
        for name in OPTIMIZERS
    },
    **{f"{name}, of AdamW's": of_adamw(name) for name in list(OPTIMIZERS)[2:-1]},
    f"{ROUNDED}, of AdamW's in float32": lambda row: (
        f"{row[ROUNDED]['arrays'] / 2 / row['AdamW']['arrays']:.3f}" if ROUNDED in row else ""
    ),
    "ms at full bandwidth": of_each("ms", ".2f"),
    "5 arrays, ms": lambda row: f"{row['floor_ms']:.2f}",
    "kernels": of_each("kernels", "d"),
    "temporaries": of_each("temporary_share", ".2%"),
    "trace + compile s": of_each("compile_seconds", ".1f"),
}


def main(options: Options) -> None:
    """Prints a row for each chip, tree and dtype."""
    chips = known("chips", options.chips, CHIPS)
    names = known("trees", options.trees, CASES)
    optimizers = known("optimizers", options.optimizers, OPTIMIZERS)
    facts = versions()
    title = (
        f"Arrays of the parameters' size that a step moves; XLA of JAX {facts['jax']}, libtpu "
        f"{facts['libtpu']}. Compiled, not run: ms are the bytes at the chip's published "
        "bandwidth. Of several numbers in a cell: " + ", ".join(OPTIMIZERS) + "."
    )
    rows: list[dict[str, Any]] = []
    console = Console(width=250)
    order = lambda row: (list(CASES).index(row["tree"]), list(CHIPS).index(row["chip"]))
    key = lambda row: (row["tree"], row["chip"], row["dtype"])
    for name in names:
        tree = CASES[name]()
        for chip, dtype in itertools.product(chips, options.dtypes):
            asked = {"tree": name, "chip": chip, "dtype": dtype}
            with console.status(", ".join(asked.values())):
                found = {**asked, **measure(chip, tree, dtype, optimizers)}
            # Read again for each row: another process may have added some.
            before = {
                key(row): row for row in rows_of_before(options.output / "traffic.json", facts)
            }
            before[key(found)] = {**before.get(key(found), {}), **found}
            rows = list(before.values())
            rows.sort(key=order)
            content = {"machine": facts, "rows": rows}
            heading, command = "What the update moves", "python -m benchmarks.speed.traffic"
            write_rows(options.output, "traffic", heading, command, title, COLUMNS, content)
    console.print(comparison_table(title, COLUMNS, rows))


if __name__ == "__main__":
    end_on_interrupt()
    without_devices()
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.speed.traffic", description=Options.__doc__
    )
    sys.exit(exit_status(lambda: main(parsed)))
