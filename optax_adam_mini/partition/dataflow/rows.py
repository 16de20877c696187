"""A row and a column inside each block that was found: the specs of `v="outer"`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_adam_mini.blocks import BlockSpec, per_element
from optax_adam_mini.partition.dataflow.domain import Role
from optax_adam_mini.partition.dataflow.interpret import Result
from optax_adam_mini.partition.dataflow.specs import cut_into, spec_of
from optax_adam_mini.product import Spec, outer

KEPT = ("mean", "outer")


def check_kept(name: str, v: Any) -> None:
    """Refuses another word for what is kept of a block.

    Raises:
        ValueError: if it is none of `KEPT`.
    """
    if v not in KEPT:
        raise ValueError(f"{name}: v must be 'mean' or 'outer', got {v!r}")


def outer_of(shape: Sequence[int], result: Result, index: int) -> Spec:
    """The spec of a parameter: a row and a column in each block, or per coordinate.

    The axes along which a parameter lies in layers or experts stay apart in both grids. Of the
    others, those that are contracted make rows and the rest columns; of a table the rows are those
    that are looked up. A row is cut where the outputs are taken apart, into the parts of a fused
    kernel, and where heads end and neurons begin. What has no rows, a bias or a gain, is kept per
    coordinate, and so is what would not be smaller otherwise.
    """
    spec = spec_of(shape, result, index)
    if spec.size(shape) == math.prod(shape):
        return per_element() if shape else spec
    inputs, outputs, stacked = _sorted(shape, result, index)
    if not (inputs and outputs):
        return per_element()
    first = outputs[0]
    parts = _parts(shape, spec, outputs, _borders(result, index))
    groups = _conv_groups(result, index)
    if groups > 1 and len(outputs) == 1:
        parts = [shape[first] // groups] * groups
    cut = (first, cut_into(first, shape[first], parts))
    rows = BlockSpec((*((a, None) for a in inputs), cut), unit="row")
    columns = BlockSpec(tuple((a, None) for a in outputs), unit="column")
    found = outer(rows, columns, stacked=stacked)
    return found if found.size(shape) < math.prod(shape) else per_element()


def _sorted(
    shape: Sequence[int], result: Result, index: int
) -> tuple[list[int], list[int], list[int]]:
    """The axes of rows, of columns, and those of layers, experts and the like."""
    roles = result.roles[index]
    live = [axis for axis, size in enumerate(shape) if size > 1]
    stacked = [axis for axis in live if roles[axis] == {Role.BATCH}]
    rest = [axis for axis in live if axis not in stacked]
    inputs = [axis for axis in rest if Role.REDUCTION in roles[axis]]
    if not inputs:
        looked_up = _looked_up(result, index)
        inputs = [axis for axis in stacked if axis in looked_up]
        stacked = [axis for axis in stacked if axis not in looked_up]
    outputs = [axis for axis in rest if axis not in inputs]
    if not outputs and len(inputs) > 1:  # inputs in one use, outputs in another
        inputs, outputs = inputs[:-1], inputs[-1:]
    return inputs, outputs, stacked


def _looked_up(result: Result, index: int) -> set[int]:
    """The axes of a parameter along which rows are chosen."""
    steps = {id(use.step) for use in result.uses.get(index, ()) if use.is_lookup}
    return {
        own
        for step, relation in result.trail
        if id(step) in steps
        for operand, axis in relation.cuts
        for factor in result.facts.values[step.inputs[operand]].axes[axis]
        for param, own in factor.own
        if param == index
    }


def _conv_groups(result: Result, index: int) -> int:
    """In how many groups a convolution's outputs have inputs of their own."""
    params = [use.step.params for use in result.uses.get(index, ())]
    return max((p.get("feature_group_count", 1) for p in params), default=1)


def _borders(result: Result, index: int) -> set[int]:
    """Where the outputs of a parameter are taken apart, counted through all output axes."""
    facts = result.facts
    numbers = {number for number, use in facts.uses.items() if index in use.params}
    found: set[int] = set()
    for step, relation in result.trail:
        for link in relation.links:
            if link.positions is None or len(link.axes) != 1:
                continue
            taken = link.positions[link.positions >= 0]
            factor = facts.values[step.inputs[link.operand]].whole(link.axes[0])
            for number in numbers & factor.features.keys():
                part = factor.features[number]
                if len(taken) and part.stop - part.start == factor.size * part.distance:
                    found.add(part.start + int(taken.min()) * part.distance)
                    found.add(part.start + (int(taken.max()) + 1) * part.distance)
    return found


def _parts(
    shape: Sequence[int], spec: BlockSpec, outputs: Sequence[int], borders: set[int]
) -> list[int]:
    """The sizes of the parts of the first output axis that have rows of their own."""
    first = outputs[0]
    inner = math.prod(shape[axis] for axis in outputs[1:])
    ends = {border // inner for border in borders if border % inner == 0}
    if len(outputs) == 1:  # heads and neurons side by side
        are_heads = [size > 1 for _, size in spec.runs(shape)[first]]
        sizes = [n * size for n, size in spec.runs(shape)[first]]
        kinds = itertools.groupby(zip(are_heads, sizes, strict=True), key=lambda run: run[0])
        ends |= set(itertools.accumulate(sum(size for _, size in runs) for _, runs in kinds))
    ends |= {0, shape[first]}
    if len(ends) > max(2, shape[first] * inner // 8):  # no parts: each output by itself
        ends = {0, shape[first]}
    return np.diff(sorted(ends)).tolist()
