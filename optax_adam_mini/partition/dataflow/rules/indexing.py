"""Indexing: rows are chosen out of an array, or placed into one.

The axis that is indexed separates blocks (tokens); axes that are taken whole stay what they are.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.registry import rule, same


@rule("gather")
def _gather(facts: Facts, step: Step) -> Relation:
    value = facts.inputs(step)[0]
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    paired = tuple(numbers.operand_batching_dims)
    inside = [
        a for a in range(len(value.shape)) if a not in (*numbers.collapsed_slice_dims, *paired)
    ]
    whole = {
        axis: place
        for axis, place in zip(inside, numbers.offset_dims, strict=True)
        if sizes[axis] == value.shape[axis]
    }
    return chosen(facts, step, whole)


def chosen(facts: Facts, step: Step, whole: dict[int, int]) -> Relation:
    """Rows of the first operand by index.

    `whole` has the axes that are taken whole, and where they are in the result.
    """
    value = facts.inputs(step)[0]
    found = Relation(kind=max(v.kind for v in facts.inputs(step)))
    found.links = [Link(0, (axis,), (place,)) for axis, place in whole.items()]
    if value.kind == Kind.WEIGHT:
        rest = [axis for axis in range(len(value.shape)) if axis not in whole]
        found.cuts = [(0, axis) for axis in rest]
        found.uses[0] = tuple(whole.values())
        found.kind, found.is_rows = Kind.DATA, True
    else:
        found.is_rows = value.is_rows
    return found


@rule("dynamic_slice")
def _dynamic_slice(facts: Facts, step: Step) -> Relation:
    value, out = facts.inputs(step)[0], facts.outputs(step)[0]
    return chosen(facts, step, {a: a for a, size in enumerate(value.shape) if size == out.shape[a]})


@rule("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "scatter_min",
      "scatter_max", "scatter-min", "scatter-max", "scatter_sub")  # fmt: skip
def _scatter(facts: Facts, step: Step) -> Relation:
    value, _, updates = facts.inputs(step)
    numbers = step.params["dimension_numbers"]
    paired = tuple(numbers.operand_batching_dims)
    inside = [
        a for a in range(len(value.shape)) if a not in (*numbers.inserted_window_dims, *paired)
    ]
    window = {
        place: axis
        for axis, place in zip(inside, numbers.update_window_dims, strict=True)
        if updates.shape[place] == value.shape[axis]
    }
    return placed(facts, step, 2, window)


@rule("dynamic_update_slice")
def _dynamic_update_slice(facts: Facts, step: Step) -> Relation:
    value, updates = facts.inputs(step)[:2]
    window = {a: a for a, size in enumerate(updates.shape) if size == value.shape[a]}
    return placed(facts, step, 1, window)


def placed(facts: Facts, step: Step, updates: int, window: dict[int, int]) -> Relation:
    """Parts of the first operand are replaced by, or added to, another operand.

    A parameter is used coordinate by coordinate in both places.
    """
    ins = facts.inputs(step)
    found = Relation(kind=Kind.DATA)
    if all(value.kind == Kind.CONSTANT for value in ins):
        found.kind = Kind.CONSTANT
    links = {0: same(0, range(len(ins[0].shape))),
             updates: [Link(updates, (a,), (to,)) for a, to in window.items()]}  # fmt: skip
    for operand, own in links.items():
        if ins[operand].kind == Kind.WEIGHT:
            found.cuts += [(operand, axis) for axis in range(len(ins[operand].shape))]
            found.uses[operand] = ()
        else:
            found.links += own
    return found
