"""Writes indexing as slices of one axis at a time: `w[2, i]` is `w[2][i]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optax_adam_mini.partition.dataflow.program import Program

AddStep = Callable[[str, list[int], list[int], dict[str, Any]], None]
"""Appends a step: primitive, operands, results, parameters."""


def take(
    program: Program, add: AddStep, value: int, axis: int, index: int | None, at: int = -1
) -> int:
    """Appends the slice of one index of an axis: `index`, or what the value `at` holds if None."""
    shape = program.shapes[value]
    sizes = [1 if a == axis else size for a, size in enumerate(shape)]
    found = program.array(sizes)
    if index is None:
        add("dynamic_slice", [value, *[at] * len(shape)], [found], {"slice_sizes": sizes})
    else:
        start = [index if a == axis else 0 for a in range(len(shape))]
        add("slice", [value], [found], _bounds(start, sizes))
    return found


def _bounds(start: Sequence[Any], sizes: Sequence[int], strides: Any = None) -> dict[str, Any]:
    """The parameters of a `slice`."""
    stop = [a + b for a, b in zip(start, sizes, strict=True)]
    return {"start_indices": start, "limit_indices": stop, "strides": strides}


def _known(program: Program, at: int, last: int) -> int | None:
    """The index that a value holds, from 0 to `last`, if the program fixes it."""
    known = program.known.get(at)
    return None if known is None else int(np.clip(known, 0, last))


def squeeze(program: Program, add: AddStep, value: int, axis: int) -> int:
    """Appends the step that drops an axis of size 1."""
    shape = program.shapes[value]
    found = program.array([*shape[:axis], *shape[axis + 1 :]])
    add("squeeze", [value], [found], {"dimensions": (axis,)})
    return found


def one_axis_at_a_time(
    program: Program, add: AddStep, name: str, params: dict[str, Any], operands: Sequence[int]
) -> tuple[str, dict[str, Any], list[int]]:
    """Appends all but the last of the steps that a `slice`, `dynamic_slice` or `gather` becomes."""
    if name == "gather":
        return name, *_without_scalars(program, add, params, operands)
    value, *at = operands
    shape = program.shapes[value]
    if name == "slice":
        start = [*params["start_indices"]]
        sizes = [b - a for a, b in zip(start, params["limit_indices"], strict=True)]
    else:
        sizes = params["slice_sizes"]
        last = [size - length for size, length in zip(shape, sizes, strict=True)]
        start = [_known(program, *each) if each[1] else 0 for each in zip(at, last, strict=True)]
    for axis in [axis for axis, size in enumerate(sizes) if size == 1 < shape[axis]][:-1]:
        value = take(program, add, value, axis, start[axis], at[axis] if at else value)
        start[axis] = 0
    if None in start:
        return name, params, [value, *at]
    return "slice", _bounds(start, sizes, params.get("strides")), [value]


def _without_scalars(
    program: Program, add: AddStep, params: dict[str, Any], operands: Sequence[int]
) -> tuple[dict[str, Any], list[int]]:
    """A `gather` without the axes whose index is the same number for all."""
    (value, indices), numbers = operands, params["dimension_numbers"]
    columns = [*program.columns.get(indices, [])]
    scalars = [program.scalars.get(column) for column in columns]
    if not any(scalar is None for scalar in scalars) or numbers.operand_batching_dims:
        return params, [*operands]
    axes, sizes = [*numbers.start_index_map], [*params["slice_sizes"]]
    for axis, scalar in sorted(zip(axes, scalars, strict=True), reverse=True, key=lambda x: x[0]):
        if scalar is None or axis not in numbers.collapsed_slice_dims:
            continue
        index = _known(program, scalar, program.shapes[value][axis] - 1)
        value = squeeze(program, add, take(program, add, value, axis, index, scalar), axis)
        del columns[axes.index(axis)], sizes[axis]
        lower = lambda places: tuple(a - (a > axis) for a in places if a != axis)  # noqa: B023
        axes = [*lower(axes)]
        numbers = numbers._replace(collapsed_slice_dims=lower(numbers.collapsed_slice_dims))
    if len(columns) == 1:
        indices = columns[0]
    elif len(columns) < len(scalars):
        indices = program.array([*program.shapes[indices][:-1], len(columns)])
        add("concatenate", columns, [indices], {"dimension": len(program.shapes[indices]) - 1})
        program.columns[indices] = columns
    numbers = numbers._replace(start_index_map=tuple(axes))
    return {**params, "dimension_numbers": numbers, "slice_sizes": tuple(sizes)}, [value, indices]
