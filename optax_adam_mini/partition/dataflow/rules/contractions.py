"""Contractions: where parameters meet data, and activations meet one another.

The contracted axes of a parameter lie inside a block, its free axes separate blocks and make
features, and its batch axes separate blocks. Activations whose contraction is an inner product are
coupled along the contracted axes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from optax_adam_mini.partition.dataflow.domain import Axes, Facts, Kind, Link, Relation, Value
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.registry import rule, unknown


@dataclasses.dataclass
class Side:
    """An operand of a contraction and the roles of its axes."""

    value: Value
    contracted: Axes
    batch: Axes
    free: Axes
    is_weight: bool = False
    """It is a parameter that meets data."""

    def featured(self, axes: Axes) -> list[dict[int, int]]:
        """The features of those axes that have any."""
        return [self.value.features[axis] for axis in axes if self.value.features[axis]]


def is_inner_product(a: Side, b: Side) -> bool:
    """Whether the contracted coordinates act through one number, and so are coupled.

    Then no features are left but those of heads. Where the other side keeps its own, the
    contraction is a layer whose weights happen to be computed.
    """
    if not a.featured(a.contracted) or not b.featured(b.contracted):
        return False
    if a.is_weight or b.is_weight:
        weight, data = (a, b) if a.is_weight else (b, a)
        # A layer without outputs of its own: one number for each head, as GAT's attention has.
        return not (data.is_weight or weight.free) and bool(data.featured(data.batch))
    if not (a.free or b.free) and a.featured(a.contracted) == b.featured(b.contracted):
        return False  # the norm of a vector, its entropy
    kept = [side for side in (a, b) if side.featured(side.free)]
    if len(kept) != 1:
        return not kept
    # One side keeps features: several heads share the other, if they are the slower axes of the
    # same parameter. (Were they the faster ones, blocks would be strided.)
    (side,) = kept
    return all(
        slow.keys() == fast.keys() and all(slow[use] > fast[use] for use in fast)
        for slow in side.featured(side.free)
        for fast in side.featured(side.contracted)
    )


@rule("dot_general")
def _dot_general(facts: Facts, step: Step) -> Relation:
    return _dot(facts, step, step.params["dimension_numbers"])


@rule("ragged_dot_general")
def _ragged_dot(facts: Facts, step: Step) -> Relation:
    """Rows in groups of several lengths, each with its own matrix: the experts of a mixture."""
    numbers = step.params["ragged_dot_dimension_numbers"]
    dims, groups = numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
    if not groups:  # the groups are parts of the contracted axis, as in a gradient
        return unknown(facts, step)
    found = _dot(facts, step, dims, groups)
    if facts.inputs(step)[1].is_weight:
        found.cuts += [(1, axis) for axis in groups]
    return found


def _dot(facts: Facts, step: Step, dims: Any, groups: Axes = ()) -> Relation:
    """A dot of the first two operands; the result has no axis for `groups` of the second."""
    contracted, batch = dims
    sides = []
    for value, gone, shared, rest in zip(
        facts.inputs(step)[:2], contracted, batch, ((), groups), strict=True
    ):
        free = tuple(a for a in range(len(value.shape)) if a not in (*gone, *shared, *rest))
        sides.append(Side(value, tuple(gone), tuple(shared), free))
    first = len(batch[0])
    places = [
        dict(zip((*s.batch, *s.free), (*range(first), *range(start, start + len(s.free))),
                 strict=True))
        for s, start in zip(sides, (first, first + len(sides[0].free)), strict=True)
    ]  # fmt: skip
    return contraction(facts, step, sides, places)


def contraction(
    facts: Facts, step: Step, sides: list[Side], places: list[dict[int, int]]
) -> Relation:
    """A dot of two sides; `places` has the result's axis for each of their batch and free axes."""
    found = Relation(kind=max(side.value.kind for side in sides))
    for side, other in (sides, sides[::-1]):
        side.is_weight = side.value.kind == Kind.WEIGHT or (
            # Chosen rows are the parameter still where an axis of theirs is contracted with data.
            side.value.is_rows
            and not other.value.is_weight
            and bool(side.featured(side.contracted))
        )
    if all(side.is_weight for side in sides):
        found.chain = tuple(
            (operand, side.contracted, tuple(place[axis] for axis in side.free))
            for operand, (side, place) in enumerate(zip(sides, places, strict=True))
        )
    elif any(side.is_weight for side in sides):
        found.kind = Kind.DATA
    for operand, (side, place) in enumerate(zip(sides, places, strict=True)):
        if side.is_weight and not found.chain:
            other = sides[1 - operand]
            is_lookup = other.value.one_hot is not None and other.value.one_hot in other.contracted
            cut = (*side.contracted, *side.batch) if is_lookup else side.batch
            found.cuts += [(operand, axis) for axis in cut]
            found.uses[operand] = tuple(place[axis] for axis in side.free)
            found.is_rows |= is_lookup
        found.links += [Link(operand, (a,), (place[a],)) for a in (*side.batch, *side.free)]
    if is_inner_product(*sides):
        found.couplings += [
            (operand, side.contracted)
            for operand, side in enumerate(sides)
            if not side.value.is_weight
        ]
    return found


@rule("conv_general_dilated")
def _conv(facts: Facts, step: Step) -> Relation:
    numbers = step.params["dimension_numbers"]
    data, kernel = facts.inputs(step)
    found = Relation(kind=Kind.DATA)
    batch, channels = numbers.lhs_spec[:2]
    out_batch, out_channels = numbers.out_spec[:2]
    outputs = numbers.rhs_spec[0]
    # A parameter as the image, or a kernel that is computed or chosen: nothing is known of these.
    found.unread = data.is_weight or (
        kernel.kind != Kind.WEIGHT and (kernel.is_rows or any(kernel.features))
    )
    found.links.append(Link(0, (batch,), (out_batch,)))
    groups = step.params["feature_group_count"]
    found.in_groups = groups * step.params["batch_group_count"] > 1
    if groups == data.shape[channels] == kernel.shape[outputs] > 1:  # depthwise: channels stay
        found.links.append(Link(0, (channels,), (out_channels,)))
    if kernel.kind == Kind.WEIGHT:
        found.links.append(Link(1, (outputs,), (out_channels,)))
        found.uses[1] = (out_channels,)
    return found
