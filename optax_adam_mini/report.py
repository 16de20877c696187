"""`block_table`: how each parameter is cut, and how much memory that saves."""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini.blocks import BlockSpec
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.dimension_numbers import dimension_numbers, rows_of, sizes_of
from optax_adam_mini.hyperparams import check_mu_dtype, check_param_dtype
from optax_adam_mini.labels import (
    BlockSpecs,
    has_outer,
    path_str,
    shapes_of,
    specs_of_some,
)
from optax_adam_mini.product import Outer, Spec
from optax_adam_mini.sums import period, widen

if TYPE_CHECKING:
    from jaxtyping import PyTree
    from optax.contrib import MuonDimensionNumbers
    from rich.table import Table


def block_table(
    params: PyTree,
    block_specs: BlockSpecs,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    muon_weight_dimension_numbers: Any = None,
) -> Table:
    """A table of how every parameter is cut, and how much memory that saves.

    Args:
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        block_specs: pytree of `BlockSpec` like the parameters, or a prefix of
            it, or a label function that returns one.
        mu_dtype: the `mu_dtype` of your `adam_mini`, for the bytes of its
            state. Without it `mu` is counted in the parameters' dtypes; inside
            `stochastic_rounding` it is float32.
        muon_weight_dimension_numbers: the dimension numbers of your
            `muon_mini`. Parameters with dimension numbers go to Muon, which
            has no second moment. None for `adam_mini`.

    Returns:
        A `rich.table.Table`, which `print` and `rich.print` fit to the
        terminal. It has a row for each parameter (path, shape, cut, numbers in
        `nu`, their bytes); equal layers share a row. Below are the totals, which are
        numbers in `v` with Adam and here, bytes of the optimizer state against
        AdamW's, and bytes of parameters, gradients and state.

    Raises:
        TypeError, ValueError: if the specs or the dimension numbers do not fit the parameters, or
            a parameter cannot be trained.

    Examples:
        >>> params = {"kernel": jax.ShapeDtypeStruct((768, 3072), jnp.float32)}
        >>> table = block_table(params, per_neuron())
        >>> [next(column.cells) for column in table.columns]
        ['kernel', '(768, 3072)', '3,072 neurons x (768, 1)', '3,072', '12,288']
        >>> numbers = optax.contrib.MuonDimensionNumbers(0, 1)
        >>> table = block_table(params, per_neuron(), muon_weight_dimension_numbers=numbers)
        >>> [next(column.cells) for column in table.columns]
        ['kernel', '(768, 3072)', 'matrix (768 x 3072), Muon', '0', '0']
    """
    table = _printable_table()(title="Blocks of Adam-mini", title_justify="left")
    matrices = _matrices(muon_weight_dimension_numbers, params)
    is_rest = [matrix is None for _, matrix in matrices]
    of_rest = [spec for _, spec in specs_of_some(block_specs, params, is_rest)]
    for (path, _), leaf in zip(matrices, jax.tree.leaves(params), strict=True):
        check_param_dtype(path, jnp.result_type(leaf))
    specs, is_outer = iter(of_rest), has_outer(block_specs, of_rest)
    _, leaves = shapes_of(params)
    rows: dict[tuple[Any, ...], list[str]] = {}  # parameters that differ only in numbers in paths
    for (path, matrix), leaf in zip(matrices, leaves, strict=True):
        cut = matrix or next(specs)
        note = "" if matrix else cut.note
        alike = (re.sub(r"\d+", "\0", path), leaf.shape, leaf.dtype, cut, note)
        rows.setdefault(alike, []).append(path)

    table.add_column("parameter")
    table.add_column("shape")
    table.add_column("cut")
    table.add_column("numbers", justify="right", no_wrap=True)
    table.add_column("bytes of v", justify="right", no_wrap=True)
    mu_dtype = check_mu_dtype(mu_dtype)
    v_before = v_after = adamw = mu_bytes = nu_bytes = param_bytes = 0
    for (_, shape, dtype, cut, note), paths in rows.items():
        is_matrix = not isinstance(cut, Spec)
        size = len(paths) * math.prod(shape)
        numbers = 0 if is_matrix else len(paths) * cut.size(shape)
        row_bytes = numbers * widen(_real(dtype)).itemsize
        times = f"{len(paths)} x " if len(paths) > 1 else ""
        table.add_row(
            _common_path(paths),
            f"{times}{shape}",
            (_describe_matrix if is_matrix else describe)(cut, shape)
            + (f" ({note})" if note else ""),
            f"{numbers:,}",
            f"{row_bytes:,}",
        )
        if is_outer and not is_matrix and not isinstance(cut, Outer):
            # Beside an `outer`, each other parameter has an unused number in the second tree.
            row_bytes += len(paths) * widen(_real(dtype)).itemsize
        v_before, v_after = v_before + size, v_after + numbers
        param_bytes += size * dtype.itemsize
        mu_bytes += size * (mu_dtype or dtype).itemsize
        if is_matrix and mu_dtype == jnp.int8:  # the largest entry of each row, in bfloat16
            mu_bytes += len(paths) * math.prod(rows_of(shape, cut)[1]) * 2
        adamw, nu_bytes = adamw + 2 * size * dtype.itemsize, nu_bytes + row_bytes
    table.add_section()
    table.add_row("total", f"{v_before:,} numbers", "", f"{v_after:,}", f"{nu_bytes:,}")
    dtypes = sorted({str(mu_dtype or leaf.dtype) for leaf in leaves})
    removed = 1 - v_after / max(v_before, 1)
    state = mu_bytes + nu_bytes
    training = 2 * param_bytes + state
    table.caption = (
        f"v: {v_before:,} numbers in Adam, {v_after:,} here, {removed:.2%} removed\n"
        f"optimizer state: {state:,} bytes, {state / max(adamw, 1):.2%} of AdamW's {adamw:,}\n"
        f"parameters, gradients and state: 2 x {param_bytes:,} + {state:,} bytes, "
        f"{training / max(v_before, 1):.2f} a parameter; of AdamW in float32, 16"
        + f"\nmu: {' and '.join(dtypes)}; for 8 bits: block_table(params, specs, mu_dtype=jnp.int8)"
        * (mu_dtype is None and bool(leaves))
    )
    table.caption_justify = "left"
    return table


def _matrices(numbers: Any, params: Any) -> list[tuple[str, Any]]:
    """Every parameter's path and dimension numbers."""
    paths = [path_str(keys) for keys, _ in leaves_with_path(params)]
    found = [None] * len(paths) if numbers is None else dimension_numbers(numbers, params)
    return list(zip(paths, found, strict=True))


def _describe_matrix(numbers: MuonDimensionNumbers, shape: tuple[int, ...]) -> str:
    inputs, outputs = sizes_of(shape, numbers)
    count = math.prod(shape) // max(inputs * outputs, 1)
    matrices = "matrix" if count == 1 else f"{count:,} matrices"
    return f"{matrices} ({inputs} x {outputs}), Muon"


@functools.cache
def _printable_table() -> type[Table]:
    """A table class that fits its terminal, also with `print`. Rich is slow to import."""
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

    class BlockTable(Table):
        def __str__(self) -> str:
            console = Console()  # as wide as the terminal, without colors
            with console.capture() as capture:
                console.print(self)
            return capture.get().rstrip("\n")

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            cells = [[str(cell) for cell in column.cells] for column in self.columns]
            heads = [str(column.header) for column in self.columns]
            fitted = Table(title=self.title, caption=self.caption)
            fitted.title_justify = fitted.caption_justify = "left"
            heads, columns, widths = _fit(heads, cells, options.max_width)
            for head, width in zip(heads, widths, strict=True):
                is_number = head in ("numbers", "bytes of v")
                fitted.add_column(
                    head, width=width, overflow="fold", justify="right" if is_number else "left"
                )
            for section, row in zip(self.rows, zip(*columns, strict=True), strict=True):
                # Names are text, even if they look like markup.
                fitted.add_row(*map(Text, row), end_section=section.end_section)
            yield from fitted.__rich_console__(console, options)

    return BlockTable


def _fit(
    heads: list[str], columns: list[list[str]], width: int
) -> tuple[list[str], list[list[str]], list[int]]:
    """Headings, columns and widths of a table of at most `width` characters, including borders.

    Paths fold at "/" and cuts at "+". If that is not enough, shape and cut go below the path.
    Numbers are never folded.
    """
    lengths = [max(map(len, [head, *cells])) for head, cells in zip(heads, columns, strict=True)]
    (paths, shapes, cuts), numbers = columns[:3], columns[3:]
    text, fixed = lengths[:3], lengths[3:]
    room = width - sum(fixed) - 3 * len(columns) - 1  # of 3 characters between columns
    least = [
        min(max(len(p) for path in paths for p in _AT_SLASH.findall(path)), _PATH),
        max(len(p.strip()) for shape in shapes for p in _AT_SPACE.findall(shape)),
        max(len(p.strip()) for cut in cuts for p in _AT_PLUS.findall(cut) or [heads[2]]),
    ]
    least = [max(n, len(head)) for n, head in zip(least, heads, strict=False)]
    if sum(least) <= room:
        while sum(text) > room:  # narrow the widest column that can be narrower
            text[max(range(3), key=lambda i: (text[i] > least[i], text[i]))] -= 1
        folded = [
            [_from_end(path, text[0]) for path in paths],
            [_filled(_AT_SPACE.findall(shape), text[1]) for shape in shapes],
            [_filled(_AT_PLUS.findall(cut), text[2]) for cut in cuts],
        ]
        return heads, folded + numbers, text + fixed
    room = max(room + 2 * 3, 1)  # two columns are gone
    joined = [
        [_from_end(path, room), *_filled(_AT_SPACE.findall(line), room - 2).split("\n")]
        for path, line in zip(paths, map(": ".join, zip(shapes, cuts, strict=True)), strict=True)
    ]
    first = ["\n  ".join(lines).rstrip(": ") for lines in joined]
    return (
        ["\n  ".join([heads[0], ": ".join(heads[1:3])]), *heads[3:]],
        [first, *numbers],
        [room, *fixed],
    )


_PATH = 36  # a longer name is broken, rather than moving shape and cut below the path
_AT_SLASH = re.compile(r"[^/]*/|[^/]+")
_AT_SPACE = re.compile(r"(?:\([^)]*\)|\S)+ ?")  # but not inside parentheses
_AT_PLUS = re.compile(r"(?:\+ )?[^+]+")


def _filled(pieces: list[str], width: int) -> str:
    """Pieces joined into lines of at most `width`, as full as possible."""
    lines = [""]
    for piece in pieces:
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _from_end(path: str, width: int) -> str:
    """A path folded at "/", filled from its end, so that its end stays on one line."""
    lines = [""]
    for piece in reversed(_AT_SLASH.findall(path)):
        if lines[0] and len(piece + lines[0]) > width:
            lines.insert(0, "")
        lines[0] = piece + lines[0]
    return "\n".join(lines)


def describe(spec: Spec, shape: tuple[int, ...]) -> str:
    """The cut of an array of `shape` in words.

    Args:
        spec: the array's spec.
        shape: the array's shape.

    Returns:
        The number of blocks and the shape of one block, for each part.

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
