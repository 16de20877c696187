"""Layout: axes are moved, split, merged and joined; nothing is used.

A link says which axes of an operand become which of the result's. If only some indices are taken,
or the result is joined from several arrays, it also says which index goes where.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optax_adam_mini.partition.dataflow.axes import Indices
from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step, reshaped
from optax_adam_mini.partition.dataflow.rules.registry import layout, rule


@rule("transpose")
def _transpose(facts: Facts, step: Step) -> Relation:
    order = step.params["permutation"]
    return layout(facts, step, [Link(0, (a,), (i,)) for i, a in enumerate(order)])


@rule("broadcast_in_dim")
def _broadcast(facts: Facts, step: Step) -> Relation:
    (value, *_), out = facts.inputs(step), facts.outputs(step)[0]
    where = step.params["broadcast_dimensions"]
    links = [
        Link(0, (axis,), (to,))
        for axis, to in enumerate(where)
        if value.shape[axis] == out.shape[to]
    ]
    return layout(facts, step, links)


@rule("reshape", "squeeze", "expand_dims")
def _reshape(facts: Facts, step: Step) -> Relation:
    value, out = facts.inputs(step)[0], facts.outputs(step)[0]
    return layout(facts, step, [Link(0, *pair) for pair in reshaped(value.shape, out.shape)])


@rule("slice")
def _slice(facts: Facts, step: Step) -> Relation:
    strides = step.params["strides"] or (1,) * len(facts.inputs(step)[0].shape)
    starts, limits = step.params["start_indices"], step.params["limit_indices"]
    bounds = zip(starts, limits, strides, strict=True)
    return sliced(facts, step, [slice(*bound) for bound in bounds])


def sliced(facts: Facts, step: Step, slices: Sequence[slice]) -> Relation:
    """A part of an array."""
    shape = facts.inputs(step)[0].shape
    links = [
        Link(0, (axis,), (axis,),
             positions=None if (part.start, part.stop, part.step or 1) == (0, shape[axis], 1)
             else np.arange(part.start, part.stop, part.step))
        for axis, part in enumerate(slices)
    ]  # fmt: skip
    return layout(facts, step, links)


@rule("rev")
def _rev(facts: Facts, step: Step) -> Relation:
    shape = facts.inputs(step)[0].shape
    turned = step.params["dimensions"]
    links = [
        Link(0, (a,), (a,), positions=np.arange(size)[::-1] if a in turned else None)
        for a, size in enumerate(shape)
    ]
    return layout(facts, step, links)


@rule("pad")
def _pad(facts: Facts, step: Step) -> Relation:
    shape, out = facts.inputs(step)[0].shape, facts.outputs(step)[0].shape
    links: list[Link] = []
    for axis, (low, high, interior) in enumerate(step.params["padding_config"]):
        if (low, high, interior) == (0, 0, 0):
            links.append(Link(0, (axis,), (axis,)))
            continue
        positions = np.full(out[axis], -1)
        places = low + np.arange(shape[axis]) * (1 + interior)
        inside = (places >= 0) & (places < out[axis])
        positions[places[inside]] = np.arange(shape[axis])[inside]
        links.append(Link(0, (axis,), (axis,), positions=positions))
    return layout(facts, step, links)


@rule("concatenate")
def _concatenate(facts: Facts, step: Step) -> Relation:
    ins, out = facts.inputs(step), facts.outputs(step)[0]
    along, start = step.params["dimension"], 0
    found = _put_together(facts, step, along)
    for operand, value in enumerate(ins):
        size = value.shape[along]
        positions = None
        if size != out.shape[along]:
            positions = np.full(out.shape[along], -1)
            positions[start : start + size] = np.arange(size)
        if operand not in found.uses and size:
            found.links += [
                Link(operand, (a,), (a,), positions=positions if a == along else None)
                for a in range(len(out.shape))
            ]
        start += size
    return found


@rule("stack")
def _stack(facts: Facts, step: Step) -> Relation:
    along, count = step.params["axis"], len(step.inputs)
    found = _put_together(facts, step, along)
    for operand in range(count):
        if operand not in found.uses:
            rank = len(facts.inputs(step)[operand].shape)
            found.links += [Link(operand, (a,), (a + (a >= along),)) for a in range(rank)]
            positions = np.where(np.arange(count) == operand, 0, -1)
            found.links.append(Link(operand, (), (along,), positions=positions))
    return found


def _put_together(facts: Facts, step: Step, along: int) -> Relation:
    """Arrays are joined into one. A parameter that is joined with data is used per coordinate."""
    ins = facts.inputs(step)
    filled = [value for value in ins if 0 not in value.shape]
    has_data = any(
        value.kind == Kind.DATA and (not value.is_weight or facts.acts(value)) for value in filled
    )
    found = layout(facts, step, [])
    for operand, value in enumerate(ins):
        if value.is_weight and not facts.acts(value) and has_data and value in filled:
            found.keeps.discard(operand)
            found.cuts += [(operand, axis) for axis in range(len(value.shape))]
            found.uses[operand] = ()
    if not all(
        place in facts.program.zeros
        or 0 in value.shape
        or any(Indices.ONE_HOT in value.whole(axis).indices for axis in range(len(value.shape)))
        for place, value in zip(step.inputs, ins, strict=True)
    ):
        found.ends = Indices.ONE_HOT
    rank, seen = len(facts.outputs(step)[0].shape), set[int]()
    are_stacked = all(len(value.shape) < rank or value.shape[along] == 1 for value in ins)
    for value in filled:
        own = {use for axis in range(len(value.shape)) for use in value.features(axis)}
        if seen & own or (seen and own and are_stacked):
            found.indices[along] = Indices.PARTS
        seen |= own
    return found


@rule("split")
def _split(facts: Facts, step: Step) -> Relation:
    value = facts.inputs(step)[0]
    along, start = step.params["axis"], 0
    links: list[Link] = []
    for result, size in enumerate(step.params["sizes"]):
        positions = None if size == value.shape[along] else np.arange(start, start + size)
        links += [
            Link(0, (a,), (a,), result, positions if a == along else None)
            for a in range(len(value.shape))
        ]
        start += size
    return layout(facts, step, links)


@rule("iota")
def _iota(facts: Facts, step: Step) -> Relation:
    return Relation(kind=Kind.CONSTANT, indices={step.params["dimension"]: Indices.COUNTED})
