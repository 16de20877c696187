"""The specs of `v="outer"`: a row and a column inside each block that was found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optax_adam_mini.blocks import BlockSpec, per_element
from optax_adam_mini.partition.dataflow.domain import Facts, Role
from optax_adam_mini.partition.dataflow.interpret import Result
from optax_adam_mini.partition.dataflow.program import PLACING
from optax_adam_mini.partition.dataflow.specs import cut_into, spec_of
from optax_adam_mini.product import Spec, outer


def check_v(name: str, v: Any) -> None:
    """Refuses an option `v` that is neither "mean" nor "outer".

    Raises:
        ValueError: if it is refused.
    """
    if v not in ("mean", "outer"):
        raise ValueError(f"{name}: v must be 'mean' or 'outer', got {v!r}")


def outer_of(shape: Sequence[int], result: Result, index: int) -> Spec:
    """The spec of a parameter: a row and a column in each block, or per coordinate.

    Axes of stacked layers or experts stay separate in both grids. Of the other axes, contracted
    ones make rows and the rest make columns; a table's rows are those that are looked up. A row is
    cut where the outputs are taken apart, as in a fused kernel, and where heads end and neurons
    begin. Parameters without rows, such as biases and gains, keep `v` per coordinate, and so do
    parameters for which `outer` would not be smaller.
    """
    spec = spec_of(shape, result, index)
    if spec.size(shape) == math.prod(shape):
        return per_element() if shape else spec
    inputs, outputs, stacked = _sorted(shape, result, index)
    if not (inputs and outputs):
        return per_element()
    borders = _borders(result, index, shape, outputs)
    parts = _parts(shape, spec, outputs, borders)
    groups = _conv_groups(result, index)
    if groups > 1 and len(outputs) == 1:
        parts = {outputs[0]: [shape[outputs[0]] // groups] * groups}
    parts = {axis: sizes for axis, sizes in parts.items() if len(sizes) > 1}
    cuts = [(axis, cut_into(axis, shape[axis], sizes)) for axis, sizes in parts.items()]
    rows = BlockSpec((*((a, None) for a in inputs), *cuts), unit="row")
    # Layers placed side by side along the inputs have their own columns.
    is_contracted = lambda axis: Role.REDUCTION in result.roles[index][axis]
    layers = [(a, cut) for a, cut in spec.cuts if a in inputs and is_contracted(a)]
    columns = BlockSpec((*layers, *((a, None) for a in outputs)), unit="column")
    found = outer(rows, columns, stacked=stacked)
    return found if found.size(shape) < math.prod(shape) else per_element()


def _sorted(
    shape: Sequence[int], result: Result, index: int
) -> tuple[list[int], list[int], list[int]]:
    """The axes of rows, the axes of columns, and the axes of stacked layers or experts."""
    roles = result.roles[index]
    live = [axis for axis, size in enumerate(shape) if size > 1]
    stacked = [axis for axis in live if roles[axis] == {Role.BATCH}]
    rest = [axis for axis in live if axis not in stacked]
    inputs = [axis for axis in rest if Role.REDUCTION in roles[axis]]
    if len(inputs) in (0, len(rest)):  # a table, whose rows may be dotted with activations
        looked_up = _looked_up(result, index)
        if found := [axis for axis in stacked if axis in looked_up]:
            inputs, stacked = found, [axis for axis in stacked if axis not in looked_up]
    outputs = [axis for axis in rest if axis not in inputs]
    are_outputs = any(Role.OUTPUT in roles[axis] for axis in inputs)
    if not outputs and len(inputs) > 1 and are_outputs:  # inputs in one use, outputs in another
        inputs, outputs = inputs[:-1], inputs[-1:]
    return inputs, outputs, stacked


def _looked_up(result: Result, index: int) -> set[int]:
    """The axes of a parameter along which an index chooses rows."""
    steps = {id(use.step) for use in result.uses.get(index, ()) if use.is_lookup}
    kept = lambda relation: {(k.operand, axis) for k in relation.links for axis in k.axes}
    return {
        own
        for step, relation in result.trail
        if id(step) in steps
        for operand, axis in {*relation.cuts} - kept(relation)  # members are kept
        for factor in result.facts.values[step.inputs[operand]].axes[axis]
        for param, own in factor.own
        if param == index
    }


def _conv_groups(result: Result, index: int) -> int:
    """The number of groups of a convolution, each with its own inputs."""
    params = [use.step.params for use in result.uses.get(index, ())]
    return max((p.get("feature_group_count", 1) for p in params), default=1)


def _borders(
    result: Result, index: int, shape: Sequence[int], outputs: Sequence[int]
) -> list[list[set[int]]]:
    """For each output axis, the borders at which a parameter or its outputs are taken apart.

    Each value that is taken apart gives a set of borders.
    """
    facts, sizes = result.facts, [shape[axis] for axis in outputs]
    numbers = {number for number, use in facts.uses.items() if index in use.params}
    found: list[list[set[int]]] = [[] for _ in sizes]
    for place, axis, pieces in _taken_apart(result):
        factor = facts.values[place].whole(axis)
        before = [out for out, own in enumerate(outputs) if (index, own) in factor.own]
        own = numbers & factor.features.keys()
        if not (before or own):
            continue
        ends = {end for piece in _joined(facts, place, factor.size, pieces) for end in piece}
        if ends <= {0, factor.size}:
            continue
        for out in before:  # it meets data
            many, merged = _inner(result, place, axis, (index, outputs[out]))
            size = factor.size * many // merged
            if size and sizes[out] % size == 0:
                starts = range(0, sizes[out], size)
                own_ends = [end * many // merged for end in ends if end * many % merged == 0]
                found[out].append({start + end for start in starts for end in own_ends})
        for number in own:
            part = factor.features[number]
            for out in range(len(sizes)):
                inner = math.prod(sizes[out + 1 :])
                if (factor.size, part.distance) == (sizes[out], inner):
                    found[out].append(ends)  # along this axis
                elif (
                    out == 0
                    and part.stop - part.start == factor.size * part.distance
                    and part.stop <= math.prod(sizes)
                ):  # one after the other, counted through all output axes
                    borders = [part.start + end * part.distance for end in ends]
                    found[0].append({b // inner for b in borders if b % inner == 0})
    return found


def _inner(result: Result, place: int, axis: int, own: tuple[int, int]) -> tuple[int, int]:
    """How many indices of a parameter's axis lie in how many of an axis that comes from it.

    The first is 0 if the axis was not only moved, split and merged.

    Args:
        result: what the passes found.
        place: the value with the axis.
        axis: the axis.
        own: the parameter, and its axis.
    """
    many, merged, values = 1, 1, result.facts.values
    for step, relation in reversed(result.trail):
        if place in step.outputs:
            links = [link for link in relation.links if axis in link.result_axes]
            if len(links) != 1 or links[0].positions is not None:
                return 0, 1
            (link,) = links
            later = link.result_axes[link.result_axes.index(axis) + 1 :]
            many *= math.prod(values[place].shape[a] for a in later)
            place = step.inputs[link.operand]
            axes = [a for a in link.axes if own in values[place].whole(a).own]
            if len(axes) != 1:
                return 0, 1
            (axis,) = axes
            beside = link.axes[link.axes.index(axis) + 1 :]
            merged *= math.prod(values[place].shape[a] for a in beside)
    return many, merged


Piece = tuple[int, int]
"""The start and stop of a piece of an axis."""


def _taken_apart(result: Result) -> Iterable[tuple[int, int, dict[int, Piece]]]:
    """The values from which indices are taken: value, axis, and each result's piece."""
    found: dict[tuple[int, int], dict[int, Piece]] = {}
    for step, relation in result.trail:
        for link in relation.links if step.name not in PLACING else ():
            taken = link.positions if link.positions is not None else np.array([])
            taken = taken[taken >= 0]
            piece = (int(taken.min()), int(taken.max()) + 1) if len(taken) else (0, 0)
            # A grid can hold neither every other index nor another order.
            if len(link.axes) == 1 and len(taken) and piece[1] - piece[0] == len(taken):
                key = step.inputs[link.operand], link.axes[0]
                found.setdefault(key, {})[step.outputs[link.result]] = piece
    return [(place, axis, pieces) for (place, axis), pieces in found.items()]


def _joined(facts: Facts, whole: int, size: int, pieces: dict[int, Piece]) -> list[Piece]:
    """The pieces of an axis; pieces that are joined again before they meet anything are one.

    A piece may also be written into the whole value again.
    """
    into = {id(step) for step in facts.program.consumers[whole] if step.name in PLACING}
    parts: list[tuple[set[int], Piece]] = [(into, (0, size))]
    for place, (start, stop) in pieces.items():
        where = facts.put_together(place)
        apart: list[tuple[set[int], Piece]] = []
        for others, (first, last) in parts:
            if where.isdisjoint(others):
                apart.append((others, (first, last)))
            else:
                where, start, stop = where | others, min(start, first), max(stop, last)
        parts = [*apart, (where, (start, stop))]
    return [piece for _, piece in parts]


def _parts(
    shape: Sequence[int],
    spec: BlockSpec,
    outputs: Sequence[int],
    borders: Sequence[Sequence[set[int]]],
) -> dict[int, list[int]]:
    """For each output axis, the sizes of the parts that have their own rows.

    Borders that would make too many parts, such as those of each output by itself, are left out.
    """
    found: dict[int, list[int]] = {}
    for axis, within in zip(outputs, borders, strict=True):
        kinds = set[int]()
        if len(outputs) == 1:  # heads and neurons side by side
            are_heads = [size > 1 for _, size in spec.runs(shape)[axis]]
            sizes = [n * size for n, size in spec.runs(shape)[axis]]
            runs = itertools.groupby(zip(are_heads, sizes, strict=True), key=lambda run: run[0])
            kinds = {*itertools.accumulate(sum(size for _, size in run) for _, run in runs)}
        most = max(2, math.prod(shape[a] for a in outputs) // 8)
        ends = {0, shape[axis]}
        for more in (kinds, *within):
            ends = ends | more if len(ends | more) <= most else ends
        found[axis] = np.diff(sorted(ends)).tolist()
    return found
