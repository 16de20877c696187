"""Indexing: rows are chosen from an array, or placed into one.

An indexed axis separates blocks (tokens); axes that are taken whole stay as they are. If the
program fixes the indices, indexing activations is a slice.
"""

from __future__ import annotations

import numpy as np

from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.registry import layout, rule, same


@rule("gather")
def _gather(facts: Facts, step: Step) -> Relation:
    value, _ = facts.inputs(step)
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
    known = facts.known(step, 1)
    batch = [a for a in range(len(facts.outputs(step)[0].shape)) if a not in numbers.offset_dims]
    if (
        known is not None
        and not paired
        and len(numbers.start_index_map) == 1
        and numbers.collapsed_slice_dims == numbers.start_index_map
        and not (value.is_weight and _looks_up(facts, step, known))
    ):
        (axis,) = numbers.start_index_map
        links = [Link(0, (a,), (to,)) for a, to in whole.items()]
        positions = np.clip(known.reshape(-1), 0, value.shape[axis] - 1)
        links.append(Link(0, (axis,), tuple(batch), positions=positions))
        return layout(facts, step, links)
    shared = {
        axis: batch[index]
        for axis, index in zip(paired, numbers.start_indices_batching_dims, strict=True)
    }
    return chosen(facts, step, whole, shared | _counted(facts, step, batch))


def _looks_up(facts: Facts, step: Step, known: np.ndarray) -> bool:
    """Whether known indices look rows up: they do not repeat a kernel's, or change their order."""
    (axis,) = step.params["dimension_numbers"].start_index_map
    order, flat = np.arange(facts.inputs(step)[0].shape[axis]), known.ravel()
    is_order = np.array_equal(np.sort(flat), order) and not np.array_equal(flat, order)
    return not is_order and id(step) not in facts.repeats


def _counted(facts: Facts, step: Step, batch: list[int]) -> dict[int, int]:
    """The axes whose index counts an axis of the result, as in `tables[arange(n), tokens]`."""
    value, found = facts.inputs(step)[0], dict[int, int]()
    columns, known = facts.program.columns.get(step.inputs[1], []), facts.program.known
    axes = step.params["dimension_numbers"].start_index_map
    for axis, column in zip(axes, columns, strict=False):
        for place, to in enumerate(batch) if column in known else ():
            along, count = np.moveaxis(known[column], place, -1), np.arange(value.shape[axis])
            is_counted = along.shape[-1] == len(count) and (along == count).all()
            if is_counted and to not in found.values():
                found[axis] = to
    return found if len(found) < len(axes) else {}


def chosen(
    facts: Facts, step: Step, whole: dict[int, int], shared: dict[int, int] | None = None
) -> Relation:
    """Rows of the first operand, chosen by index.

    `whole` maps the axes that are taken whole to the result's axes; `shared` maps the axes along
    which each index has its own rows.
    """
    value = facts.inputs(step)[0]
    shared = shared or {}
    links = [Link(0, (a,), (to,)) for a, to in (shared | whole).items()]
    indexed = [a for a in range(len(value.shape)) if a not in (shared | whole)]
    for place in range(len(facts.outputs(step)[0].shape)):  # chosen features stay features
        if place not in (shared | whole).values() and not value.is_weight:
            links += [Link(0, (a,), (place,), is_lost=True) for a in indexed if value.features(a)]
    found = layout(facts, step, links)
    found.keeps &= {0}
    found.kind = max(v.kind for v in facts.inputs(step))
    if not value.is_weight:
        return found
    rest = [(0, a) for a in range(len(value.shape)) if a not in whole and value.is_own(a)]
    is_scalar = len(facts.outputs(step)[0].shape) == len(shared | whole) or step.name != "gather"
    is_fixed = all(index.kind == Kind.CONSTANT for index in facts.inputs(step)[1:])
    is_counted = is_scalar and is_fixed  # by a loop: one layer of a stack
    if id(step) in facts.members or is_counted:
        found.cuts = rest if id(step) not in facts.taps else []
        found.kind = value.kind
        return found
    found.cuts = rest
    if id(step) in facts.repeats:  # in an unknown order, because there are too many indices
        found.cuts = [(0, axis) for axis in range(len(value.shape)) if value.is_own(axis)]
    if value.kind == Kind.WEIGHT or not facts.acts(value):
        found.uses[0] = tuple(whole.values())
        found.kind, found.is_lookup = Kind.DATA, True
    return found


@rule("dynamic_slice")
def _dynamic_slice(facts: Facts, step: Step) -> Relation:
    value, out = facts.inputs(step)[0], facts.outputs(step)[0].shape
    return chosen(facts, step, {a: a for a, n in enumerate(value.shape) if n == out[a]})


@rule("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "scatter_min",
      "scatter_max", "scatter-min", "scatter-max", "scatter_sub", "scatter-sub")  # fmt: skip
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
    if step.name == "scatter" and len(window) == len(value.shape):  # overwrites everything
        links = [Link(2, (place,), (axis,)) for place, axis in window.items()]
        found = layout(facts, step, links, keeps={2} if updates.is_weight else set())
        found.kind = updates.kind
        return found
    known, along = facts.known(step, 1), numbers.scatter_dims_to_operand_dims
    if step.name == "scatter" and known is not None and len(along) == 1 and not paired:
        written = known.reshape(-1)
        places = [a for a in range(len(updates.shape)) if a not in numbers.update_window_dims]
        if along[0] in inside:
            places.append(numbers.update_window_dims[inside.index(along[0])])
            written = written[:1] + np.arange(updates.shape[places[-1]])
        if len(places) == 1 and len(window) == len(value.shape) - 1:
            return _overwritten(facts, step, window, (places[0], along[0]), written)
    return _placed(facts, step, 2, window)


def _overwritten(
    facts: Facts, step: Step, window: dict[int, int], along: tuple[int, int], written: np.ndarray
) -> Relation:
    """The indices `written` of one axis are replaced by the updates; the others stay.

    `along` is this axis in the updates and in the first operand.
    """
    value, _, updates = facts.inputs(step)
    size = value.shape[along[1]]
    if Kind.WEIGHT in (value.kind, updates.kind) or not set(written) <= set(range(size)):
        return _placed(facts, step, 2, window)
    replaced, kept = np.full(size, -1), np.arange(size)
    replaced[written], kept[written] = np.arange(len(written)), -1
    links = [Link(2, (a,), (to,)) for a, to in window.items()]
    links += [Link(0, (to,), (to,)) for to in window.values()]
    links.append(Link(2, along[:1], along[1:], positions=replaced))
    links.append(Link(0, along[1:], along[1:], positions=kept))
    return layout(facts, step, links)


@rule("dynamic_update_slice")
def _dynamic_update_slice(facts: Facts, step: Step) -> Relation:
    value, updates = facts.inputs(step)[:2]
    starts = [facts.known(step, 2 + axis) for axis in range(len(value.shape))]
    links: list[Link] = []
    for axis, (size, length) in enumerate(zip(value.shape, updates.shape, strict=True)):
        start = starts[axis]
        if size == length:
            links.append(Link(1, (axis,), (axis,)))
        elif start is not None:
            positions = np.full(size, -1)
            first = int(np.clip(int(start), 0, size - length))
            positions[first : first + length] = np.arange(length)
            links.append(Link(1, (axis,), (axis,), positions=positions))
    window = {a: a for a, size in enumerate(updates.shape) if size == value.shape[a]}
    joined = value.kind == Kind.DATA and updates.kind == Kind.WEIGHT
    if len(links) < len(value.shape) or value.is_weight or value.has_features or joined:
        if len(window) < len(value.shape):
            return _placed(facts, step, 1, window)
        links = same(1, range(len(value.shape)))
    return layout(facts, step, links)  # written into zeros, or over everything


def _placed(facts: Facts, step: Step, updates: int, window: dict[int, int]) -> Relation:
    """Parts of the first operand are replaced by another operand, or combined with it.

    A parameter is used per coordinate as either operand, but one whose parts are replaced by
    constants, or combined with them, is still a parameter: `kernel.at[2:].set(0)`.
    """
    ins = facts.inputs(step)
    if ins[0].kind == Kind.WEIGHT and ins[updates].kind == Kind.CONSTANT:
        return layout(facts, step, same(0, range(len(ins[0].shape))), keeps={0})
    found = Relation(kind=max(value.kind for value in ins))
    links = {0: same(0, range(len(ins[0].shape))),
             updates: [Link(updates, (a,), (to,)) for a, to in window.items()]}  # fmt: skip
    for operand, own in links.items():
        value = ins[operand]
        if value.kind == Kind.WEIGHT:
            found.kind = Kind.DATA
            found.cuts += [(operand, axis) for axis in range(len(value.shape))]
            found.uses[operand] = ()
        else:
            if value.is_weight:
                found.spent.add(operand)
            found.links += own
    return found
