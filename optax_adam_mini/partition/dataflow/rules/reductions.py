"""Reductions: axes go, the others stay what they are.

A sum of a product that was written out is a dot product, and couples as one.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Axes, Facts, Kind, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.contractions import Side, is_inner_product
from optax_adam_mini.partition.dataflow.rules.registry import rule, same


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
      "reduce_xor", "argmax", "argmin", "reduce")  # fmt: skip
def _reduce(facts: Facts, step: Step) -> Relation:
    value = facts.inputs(step)[0]
    gone = tuple(step.params.get("axes", step.params.get("dimensions", ())))
    kept = [axis for axis in range(len(value.shape)) if axis not in gone]
    found = Relation(kind=value.kind)
    for result in range(len(step.outputs)):
        found.links += [Link(min(result, len(step.inputs) - 1), (a,), (i,), result)
                        for i, a in enumerate(kept)]  # fmt: skip
    if step.name == "reduce_sum" and value.product is not None:
        _sum_of_product(facts, value.product, gone, kept)
    return found


def _sum_of_product(
    facts: Facts, product: tuple[Step, int, int], gone: Axes, kept: list[int]
) -> None:
    """A dot product that was written out: operands multiplied, then summed."""
    multiplied, *operands = product
    values = [facts.inputs(multiplied)[operand] for operand in operands]
    if any(len(value.shape) != len(gone) + len(kept) for value in values):
        return
    has = [[bool(value.features[axis]) for axis in range(len(value.shape))] for value in values]
    shared = [axis for axis in kept if has[0][axis] and has[1][axis]]
    sides = [
        Side(value, gone, tuple(shared), tuple(a for a in kept if own[a] and a not in shared))
        for value, own in zip(values, has, strict=True)
    ]
    for side in sides:
        side.is_weight = side.value.kind == Kind.WEIGHT
    if not is_inner_product(*sides):
        return
    later = facts.later.setdefault(id(multiplied), Relation())
    for operand, side in zip(operands, sides, strict=True):
        if side.is_weight:
            later.cuts += [(operand, axis) for axis in shared]
        else:
            later.couplings.append((operand, gone))


@rule("sort", "top_k", "approx_top_k")
def _sort(facts: Facts, step: Step) -> Relation:
    ins = facts.inputs(step)
    along = step.params.get("dimension", step.params.get("reduction_dimension", -1))
    links = []
    for result in range(len(step.outputs)):
        rank = len(ins[0].shape)
        operand = min(result, len(ins) - 1)
        links += [link for link in same(operand, range(rank), result)
                  if link.axes[0] != along % rank]  # fmt: skip
    mixed = any(value.is_weight for value in ins)  # its coordinates are who knows where
    return Relation(links, kind=max(value.kind for value in ins), unread=mixed)
