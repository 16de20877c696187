"""Contractions: parameters meet data, and activations meet one another.

The contracted axes of a parameter lie inside a block. Its free axes separate blocks and make
features; its batch axes separate blocks. If activations are contracted in an inner product, they
are coupled along the contracted axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from optax_adam_mini.partition.dataflow.axes import Indices, blank
from optax_adam_mini.partition.dataflow.domain import Axes, Facts, Kind, Link, Relation, Value
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.elementwise import combine
from optax_adam_mini.partition.dataflow.rules.inner_products import Side, is_inner_product
from optax_adam_mini.partition.dataflow.rules.registry import rule, unknown

Places = dict[int, int]
"""For each batch and free axis of an operand, the result's axis."""


@rule("dot_general", "scaled_dot")
def _dot_general(facts: Facts, step: Step) -> Relation:
    return _dot(facts, step, step.params["dimension_numbers"])


@rule("ragged_dot_general")
def _ragged_dot(facts: Facts, step: Step) -> Relation:
    """Groups of rows of unequal length, each with its own matrix: experts of a mixture."""
    numbers = step.params["ragged_dot_dimension_numbers"]
    dims, groups = numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
    if not groups:  # the groups divide the contracted axis, as in a gradient
        return unknown(facts, step)
    found = _dot(facts, step, dims, groups)
    if facts.inputs(step)[1].is_weight:
        found.cuts += [(1, axis) for axis in groups]
    return found


def _dot(facts: Facts, step: Step, dims: Any, groups: Axes = ()) -> Relation:
    """A dot of the first two operands; the second's axes `groups` are not in the result."""
    contracted, batch = dims
    sides: list[Side] = []
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
    facts: Facts, step: Step, sides: Sequence[Side], places: Sequence[Places]
) -> Relation:
    """A dot of two sides."""
    values = [side.value for side in sides]
    found = Relation(kind=max(value.kind for value in values))
    for operand, (side, place) in enumerate(zip(sides, places, strict=True)):
        found.links += [
            Link(operand, (a,), (place[a],)) for a in (*side.batch, *side.free) if a in place
        ]
    weights = [side for side in sides if side.value.is_weight]
    if not weights:
        _of_data(facts, found, sides, places)
    elif id(step) in facts.members:  # the result is a parameter still
        ((operand, side),) = ((i, side) for i, side in enumerate(sides) if side.value.is_weight)
        found.kind, found.keeps = side.value.kind, {operand}
        found.cuts = [(operand, axis) for axis in side.contracted if side.value.is_own(axis)]
    elif (
        not _is_layer_of_constants(facts, step)
        and all(
            value.kind <= Kind.WEIGHT
            # An array that the function closes over, with which a convolution's kernel is resized.
            or (value.is_fixed and step.outputs[0] in facts.program.kernels)
            for value in values
        )
        and not _is_lookup(sides)
    ):
        found.kind = Kind.WEIGHT
        _of_parameters(found, sides, places)
    else:
        _of_a_parameter(facts, step, found, sides, places)
    if any(side.is_kernel for side in sides) or all(v.kind == Kind.DATA for v in values):
        if is_inner_product(facts, step, *sides):
            found.couplings += [
                (operand, side.contracted)
                for operand, side in enumerate(sides)
                if not side.is_kernel and side.featured(side.contracted)
            ]
        elif not any(side.is_kernel for side in sides):
            # The norm of a vector leaves only batch axes, and mixes nothing.
            found.is_mixture = any(side.free for side in sides)
    return found


def _is_layer_of_constants(facts: Facts, step: Step) -> bool:
    """Whether constants are a layer's input rather than a factor of its kernel.

    They are input if a derivative pushes a basis through the model, or if the result goes through a
    nonlinear function: a kernel would be contracted with data before that.
    """
    if all(value.kind == Kind.WEIGHT for value in facts.inputs(step)):
        return False
    if not facts.program.zeros.isdisjoint(step.inputs):  # an initial state
        return True
    return step.is_differentiated or facts.goes_through_functions(step.outputs[0])


def _of_data(
    facts: Facts, found: Relation, sides: Sequence[Side], places: Sequence[Places]
) -> None:
    """A contraction of activations; constants mix the features that they are contracted with."""
    for operand in range(2):
        other = sides[1 - operand].value
        if other.kind == Kind.CONSTANT or other.is_fixed:
            _mix(found, operand, sides, places)


def _mix(found: Relation, operand: int, sides: Sequence[Side], places: Sequence[Places]) -> None:
    """A constant matrix turns the contracted axes into new ones."""
    new = tuple(places[1 - operand][axis] for axis in sides[1 - operand].free
                if axis in places[1 - operand])  # fmt: skip
    contracted = sides[operand].contracted
    if new and contracted:
        found.links.append(Link(operand, contracted, new, is_mixed=True))


def _is_lookup(sides: Sequence[Side]) -> bool:
    """Whether one-hot vectors choose rows."""
    return any(
        Indices.ONE_HOT in side.value.whole(axis).indices
        for side in sides
        for axis in side.contracted
        if not side.value.is_weight
    )


def _chosen(side: Side, other: Side) -> list[int]:
    """The contracted axes from which one-hot vectors choose an index."""
    return [
        axis
        for axis, met in zip(side.contracted, other.contracted, strict=True)
        if not other.value.is_weight and Indices.ONE_HOT in other.value.whole(met).indices
    ]


def _of_parameters(found: Relation, sides: Sequence[Side], places: Sequence[Places]) -> None:
    """A contraction of parameters, or of a parameter and a constant: the result is a parameter."""
    found.keeps = {operand for operand, side in enumerate(sides) if side.value.is_weight}
    kept = {axis for side in sides for axis in (*side.batch, *side.free)}
    found.is_summary = not kept or all(side.value.is_summary for side in sides)
    if len(found.keeps) < 2:
        (operand,) = found.keeps
        found.is_summary = sides[operand].value.is_summary or not (
            sides[operand].batch or sides[operand].free
        )
        found.made = 1 if places[1 - operand] else None
        return _mix(found, operand, sides, places)
    for operand, side in enumerate(sides):
        other = sides[1 - operand]
        copied = [axis for axis in (*side.batch, *side.free) if side.value.is_copied(axis)]
        is_data = copied or side.value.made == 2
        of_other = [a for a in (*other.batch, *other.free) if other.value.is_copied(a)]
        if is_data and not of_other and other.is_contracted and side.is_contracted:
            # A parameter repeated for each example, or a function of a product of parameters, acts
            # as data.
            found.keeps = set()
            found.kind = Kind.DATA
            found.spent.add(operand)
            # If the product went through a function, it is the output of a layer, and its
            # contracted axes are outputs too.
            axes = [*side.free, *side.batch, *(side.contracted if side.value.made == 2 else ())]
            found.cuts += [(operand, axis) for axis in axes if side.value.is_own(axis)]
            _use_kernel(found, 1 - operand, other, places[1 - operand], operand)
            return None
    found.made = 1
    are_two = sides[0].value.params != sides[1].value.params
    if are_two:
        found.chain = tuple(
            (operand, side.contracted, tuple(place[axis] for axis in side.free if axis in place))
            for operand, (side, place) in enumerate(zip(sides, places, strict=True))
        )
    return None


def _of_a_parameter(
    facts: Facts, step: Step, found: Relation, sides: Sequence[Side], places: Sequence[Places]
) -> None:
    """A contraction of data with a parameter, alone or combined."""
    found.kind = Kind.DATA
    if sides[0].value.params == sides[1].value.params and not any(
        facts.acts(side.value) for side in sides
    ):  # a norm, a proximal term: a parameter that meets itself is not used
        _of_parameters(found, sides, places)
        found.kind = max(side.value.kind for side in sides)
        return
    kernels = [i for i in range(2) if _is_kernel(facts, sides[i], sides[1 - i])]
    if len(kernels) == 2:
        for is_kernel in (
            [side.value.kind == Kind.WEIGHT for side in sides],
            [not facts.acts(side.value) for side in sides],
            [side.has_outputs(facts) for side in sides],
        ):
            if is_kernel[0] != is_kernel[1]:
                kernels = [is_kernel.index(True)]
                break
        else:
            if all(side.has_outputs(facts) for side in sides):
                _of_parameters(found, sides, places)
                found.kind = Kind.DATA
                return
            kernels = []
    for operand, side in enumerate(sides):
        other, value = sides[1 - operand], side.value
        if not value.is_weight:
            continue
        if operand in kernels:
            side.is_kernel = True
            place = places[operand]
            _use_kernel(found, operand, side, place, 1 - operand)
            chosen = _chosen(side, other)
            found.cuts += [(operand, axis) for axis in chosen if value.is_own(axis)]
            if chosen and all(axis in chosen or value.shape[axis] == 1 for axis in side.contracted):
                found.is_lookup = True
                found.keeps.add(operand)
        elif not side.is_contracted and not kernels:
            _multiply(facts, found, operand, sides, places)
        elif kernels or facts.is_activation(value, side.contracted) or side.is_layer(facts):
            found.spent.add(operand)
            if not kernels and side.is_layer(facts):
                found.cuts += [(operand, axis) for axis in side.contracted if value.is_own(axis)]
            found.cuts += [  # a factor for each member of a stack
                (operand, axis)
                for axis, met in zip(side.batch, other.batch, strict=True)
                if value.is_own(axis) and other.value.is_own(met)
            ]
            if not facts.acts(value) and side.has_outputs(facts):
                # It may be one example, or a factor of the kernel that was scaled.
                found.cuts += [(operand, axis) for axis in range(len(value.shape))
                               if value.is_own(axis)]  # fmt: skip


def _is_kernel(facts: Facts, side: Side, other: Side) -> bool:
    """Whether this side is a kernel that the other side is multiplied with."""
    if not side.value.is_weight or not side.is_contracted:
        return False
    if side.value.kind == Kind.WEIGHT:
        return True
    if (other.value.kind == Kind.WEIGHT and other.is_contracted) or side.is_layer(facts):
        return False
    return not facts.is_activation(side.value, side.contracted) or side.has_outputs(facts)


def _use_kernel(found: Relation, operand: int, side: Side, place: Places, partner: int) -> None:
    value = side.value
    batch = [axis for axis in side.batch if value.is_own(axis)]
    found.cuts += [(operand, axis) for axis in batch]
    found.indices |= {place[axis]: Indices.MEMBERS for axis in batch if axis in place}
    outputs = [axis for axis in side.free if axis in place and _is_output(value, axis)]
    found.uses[operand] = tuple(place[axis] for axis in outputs)
    found.partner[operand] = partner


def _is_output(value: Value, axis: int) -> bool:
    return value.is_own(axis) or value.kind == Kind.WEIGHT


def _multiply(
    facts: Facts, found: Relation, operand: int, sides: Sequence[Side], places: Sequence[Places]
) -> None:
    """A dot that contracts no axis of a parameter: an element-wise product, as with a gain."""
    aligned: list[Value] = []
    rank = 1 + max((axis for place in places for axis in place.values()), default=-1)
    for side, place in zip(sides, places, strict=True):
        shape, axes = [1] * rank, [blank(1)] * rank
        for axis, to in place.items():
            shape[to] = side.value.shape[axis]
            axes[to] = side.value.axes[axis]
        aligned.append(dataclasses.replace(side.value, shape=tuple(shape), axes=axes))
    met = Relation()
    combine(facts, met, aligned, is_product=True)
    if operand in met.keeps:
        found.keeps.add(operand)
        found.combines |= {i: what for i, what in met.combines.items() if i == operand}
    elif operand in met.uses:
        found.uses[operand] = ()
        found.partner[operand] = 1 - operand


@rule("conv_general_dilated")
def _conv(facts: Facts, step: Step) -> Relation:
    numbers = step.params["dimension_numbers"]
    data, kernel = facts.inputs(step)
    found = Relation(kind=max(data.kind, kernel.kind))
    batch, channels = numbers.lhs_spec[:2]
    out_batch, out_channels = numbers.out_spec[:2]
    outputs, inputs = numbers.rhs_spec[:2]
    found.links.append(Link(0, (batch,), (out_batch,)))
    groups = step.params["feature_group_count"]
    found.in_groups = groups * step.params["batch_group_count"] > 1
    if groups == data.shape[channels] == kernel.shape[outputs] > 1:  # depthwise: channels stay
        found.links.append(Link(0, (channels,), (out_channels,)))
    found.links.append(Link(1, (outputs,), (out_channels,)))
    if data.is_combined:
        found.spent.add(0)
    elif data.is_weight:  # a parameter as the image: its pixels are not followed
        found.unread.add(0)
    if kernel.is_weight:
        found.kind = Kind.DATA
        found.uses[1] = (out_channels,)
        found.partner[1] = 0
        return found
    sides = [Side(data, (channels,), (), (batch,)), Side(kernel, (inputs,), (), (outputs,))]
    # A sum over positions as well is a mean of many products.
    is_pointwise = all(kernel.shape[axis] == 1 for axis in numbers.rhs_spec[2:])
    if is_pointwise and not found.in_groups and is_inner_product(facts, step, *sides):
        found.couplings += [(0, (channels,)), (1, (inputs,))]
    else:
        found.is_mixture = True
    return found
