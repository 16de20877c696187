"""What was cut how, and what it saves: a table of the blocks, and the memory arithmetic."""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini.blocks import BlockSpec
from optax_adam_mini.hyperparams import check_mu_dtype
from optax_adam_mini.labels import BlockSpecs, called, has_outer, resolve_block_specs
from optax_adam_mini.product import Outer, Spec
from optax_adam_mini.sums import period, widen

if TYPE_CHECKING:
    from jaxtyping import PyTree
    from rich.table import Table


def block_table(
    params: PyTree, block_specs: BlockSpecs, mu_dtype: jax.typing.DTypeLike | None = None
) -> Table:
    """A table of how every parameter is cut, and of what that saves.

    Args:
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        block_specs: pytree of [`BlockSpec`][] like the parameters, or a prefix of it, or a label
            function that returns one.
        mu_dtype: that of the `adam_mini`, for the bytes of its state; inside
            [`stochastic_rounding`][] it is float32 if it is not said.

    Returns:
        A `rich.table.Table`, which `print` shows as `rich.print` does: a row for each parameter
        (path, shape, cut, numbers in `nu` and their bytes), repeated layers in one row with their
        number, and totals: numbers in `v` before (Adam) and after, percent removed, bytes of the
        optimizer's state against AdamW's, and bytes of a whole training.

    Raises:
        TypeError, ValueError: if the specs do not fit the parameters.

    Examples:
        >>> params = {"kernel": jax.ShapeDtypeStruct((768, 3072), jnp.float32)}
        >>> table = block_table(params, per_neuron())
        >>> [next(column.cells) for column in table.columns]
        ['kernel', '(768, 3072)', '3,072 neurons x (768, 1)', '3,072', '12,288']
    """
    table = _printable_table()(title="Blocks of Adam-mini", title_justify="left")
    given = called(block_specs, params)
    labels, is_outer = resolve_block_specs(given, params), has_outer(given, params)
    leaves = [
        jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)) for p in jax.tree.leaves(params)
    ]
    rows: dict[tuple[Any, ...], list[str]] = {}  # parameters alike but for the numbers in the path
    for (path, spec), leaf in zip(labels, leaves, strict=True):
        alike = (re.sub(r"\d+", "*", path), leaf.shape, leaf.dtype, spec, spec.note)
        rows.setdefault(alike, []).append(path)

    table.add_column("parameter", no_wrap=True)  # in a narrow terminal, the others are wrapped
    table.add_column("shape")
    table.add_column("cut")
    table.add_column("numbers", justify="right", no_wrap=True)
    table.add_column("bytes of v", justify="right", no_wrap=True)
    mu_dtype = check_mu_dtype(mu_dtype)
    v_before = v_after = adamw = mu_bytes = nu_bytes = param_bytes = 0
    for (_, shape, dtype, spec, note), paths in rows.items():
        size, numbers = len(paths) * math.prod(shape), len(paths) * spec.size(shape)
        row_bytes = numbers * widen(_real(dtype)).itemsize
        times = f"{len(paths)} x " if len(paths) > 1 else ""
        table.add_row(
            _common_path(paths),
            f"{times}{shape}",
            describe(spec, shape) + (f" ({note})" if note else ""),
            f"{numbers:,}",
            f"{row_bytes:,}",
        )
        # Beside an outer's two trees, the second has an array of one number for the others.
        row_bytes += is_outer * (not isinstance(spec, Outer)) * len(paths) * 4
        v_before, v_after = v_before + size, v_after + numbers
        param_bytes += size * dtype.itemsize
        mu_bytes += size * (mu_dtype or dtype).itemsize
        adamw, nu_bytes = adamw + 2 * size * dtype.itemsize, nu_bytes + row_bytes
    table.add_section()
    table.add_row("total", f"{v_before:,} numbers", "", f"{v_after:,}", f"{nu_bytes:,}")
    removed = 1 - v_after / max(v_before, 1)
    state = mu_bytes + nu_bytes
    training = 2 * param_bytes + state
    table.caption = (
        f"v: {v_before:,} numbers in Adam, {v_after:,} here, {removed:.2%} removed\n"
        f"optimizer state: {state:,} bytes, {state / max(adamw, 1):.2%} of AdamW's {adamw:,}\n"
        f"parameters, gradients and state: 2 x {param_bytes:,} + {state:,} bytes, "
        f"{training / max(v_before, 1):.2f} a parameter; of AdamW in float32, 16"
    )
    table.caption_justify = "left"
    return table


@functools.cache
def _printable_table() -> type[Table]:
    """A table of rich's that `print` shows too. Rich is slow to import, and no need of training."""
    from rich.console import Console
    from rich.table import Table

    class BlockTable(Table):
        def __str__(self) -> str:
            console = Console()  # as wide as the terminal, without colors
            with console.capture() as capture:
                console.print(self)
            return capture.get().rstrip("\n")

    return BlockTable


def describe(spec: Spec, shape: tuple[int, ...]) -> str:
    """The cut of an array of `shape` in words.

    Args:
        spec: how it is cut.
        shape: the array's shape.

    Returns:
        The number of blocks and the shape of one, part by part.

    Raises:
        ValueError: if the spec does not fit the shape.

    Examples:
        >>> describe(per_head(12), (768, 768))
        '12 heads x (768, 64)'
    """
    if isinstance(spec, Outer):
        return f"{spec.a.size(shape):,} rows + {spec.b.size(shape):,} columns"
    for i, (axis, cut) in enumerate(spec.cuts):
        if isinstance(cut, tuple):
            words: list[str] = []
            for size, part in cut:
                cuts = (*spec.cuts[:i], (axis, part.cut_along(axis)), *spec.cuts[i + 1 :])
                part_shape = list(shape)
                part_shape[axis] = size
                part = BlockSpec(cuts, rest=spec.rest, unit=part.unit)
                words.append(describe(part, tuple(part_shape)))
            repeats, unit = period(words)
            joined = " + ".join(unit)
            return joined if repeats == 1 else f"{repeats} x [{joined}]"
    blocks = spec.size(shape)
    block = tuple(runs[0][1] if runs else 0 for runs in spec.runs(shape))
    return f"{blocks:,} {spec.unit}{'' if blocks == 1 else 's'} x {block}"


def _common_path(paths: list[str]) -> str:
    """One path for several that differ in their numbers: `h/*/kernel`."""
    pieces = [re.split(r"(\d+)", path) for path in paths]
    return "".join(p[0] if len(set(p)) == 1 else "*" for p in zip(*pieces, strict=True))


def _real(dtype: Any) -> np.dtype:
    return np.zeros((), dtype).real.dtype
