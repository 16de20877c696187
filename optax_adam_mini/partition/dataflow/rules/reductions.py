"""Reductions: the reduced axes go, and the others stay as they are.

A sum of a product is the contraction of its two factors, and is treated like a `dot_general`.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Axes, Facts, Kind, Link, Relation, Value
from optax_adam_mini.partition.dataflow.program import STOPPING, Step
from optax_adam_mini.partition.dataflow.rules.contractions import contraction
from optax_adam_mini.partition.dataflow.rules.inner_products import Side
from optax_adam_mini.partition.dataflow.rules.registry import layout, rule


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
      "reduce_xor", "argmax", "argmin", "reduce")  # fmt: skip
def _reduce(facts: Facts, step: Step) -> Relation:
    value = facts.inputs(step)[0]
    gone = tuple(step.params.get("axes", step.params.get("dimensions", ())))
    kept = [axis for axis in range(len(value.shape)) if axis not in gone]
    found = layout(facts, step, [])
    if step.name in STOPPING:
        found.is_stopped, found.keeps = True, set()
        found.kind = Kind.DATA if value.kind else Kind.CONSTANT
    found.is_summary |= value.is_weight and any(value.is_own(axis) for axis in gone)
    found.drops = step.name != "reduce_sum"
    if found.drops and value.made and value.kind == Kind.WEIGHT:  # maxout
        found.made = 2
        found.cuts += [(0, axis) for axis in gone if value.is_own(axis)]
    for result in range(len(step.outputs)):
        found.links += [Link(min(result, len(step.inputs) - 1), (a,), (i,), result)
                        for i, a in enumerate(kept)]  # fmt: skip
    if step.name == "reduce_sum":
        _sum_products(facts, step, found, value, gone)
    return found


def _sum_products(facts: Facts, step: Step, found: Relation, value: Value, gone: Axes) -> None:
    """Adds to `found` the products that are summed."""
    kept = [axis for axis in range(len(value.shape)) if axis not in gone]
    tags = {
        axis: {tag for factor in value.axes[axis] for tag in factor.products}
        for axis in range(len(value.shape))
    }
    for product in {number for axis in gone for number, _ in tags[axis]}:
        multiplied = facts.products[product]
        # If the product itself is also used, it is a gate and not an inner product, although its
        # mean is taken as well, as in a layer norm.
        goes_into = facts.program.goes_into(multiplied.outputs[0])
        is_spread = any(  # by a kernel that it was multiplied with
            value.is_own(axis) and product not in {number for number, _ in tags[axis]}
            for axis in kept
        )
        if goes_into - STOPPING - {"reduce_sum"} or is_spread:
            continue
        contracted = {axis for a in gone for number, axis in tags[a] if number == product}
        to = {
            axis: place
            for place, a in enumerate(kept)
            for number, axis in tags[a]
            if number == product
        }
        values = facts.inputs(multiplied)
        sides: list[Side] = []
        for operand, own in enumerate(values):
            axes = range(len(own.shape))
            varied = [
                [a for a in axes if a not in contracted and _varies(v, a)]
                for v in (own, values[1 - operand])
            ]
            shared = tuple(a for a in varied[0] if a in varied[1])
            free = tuple(a for a in varied[0] if a not in varied[1])
            sides.append(Side(own, tuple(sorted(contracted)), shared, free, is_written_out=True))
        key = id(step), product
        summed = facts.summed.setdefault(
            key,
            Step(
                step.name,
                multiplied.inputs,
                step.outputs,
                {},
                step.tracebacks or multiplied.tracebacks,
            ),
        )
        if id(step) in facts.program.stopped:
            facts.program.stopped.add(id(summed))
        relation = contraction(facts, summed, sides, [to, to])
        if relation.unread:
            continue
        if relation.chain:  # of parameters alone: still a parameter, and not a norm
            found.made, found.is_summary = relation.made, False
        relation.links = [link for link in relation.links if link.operand in relation.uses]
        relation.keeps = set()
        used = frozenset[int]().union(*(values[operand].params for operand in relation.uses))
        if used >= value.params:
            found.keeps = set()  # it was a kernel; its outputs are data
        found.is_mixture |= relation.is_mixture
        found.sums.append((summed, relation))


def _varies(value: Value, axis: int) -> bool:
    return value.shape[axis] > 1 and not value.is_copied(axis)


@rule("sort", "top_k", "approx_top_k")
def _sort(facts: Facts, step: Step) -> Relation:
    ins = facts.inputs(step)
    along = step.params.get("dimension", step.params.get("reduction_dimension", -1))
    links: list[Link] = []
    rank = len(ins[0].shape)
    for result in range(len(step.outputs)):
        operand = min(result, len(ins) - 1)
        links += [Link(operand, (a,), (a,), result, is_lost=a == along % rank) for a in range(rank)]
    # Where the coordinates of a sorted parameter end up is unknown.
    mixed = {i for i, v in enumerate(ins) if v.shape and v.is_weight and v.is_own(along % rank)}
    return layout(facts, step, links, unread=mixed)
