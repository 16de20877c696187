"""Finds filters that are written as sums of shifted products.

`sum(shifted(x, i) * w[i] for i in range(taps))` convolves each channel with its own filter. By
itself, each of its products looks like a gain. `sum(shifted(x, i) @ w[i] for i in range(taps))` is
a convolution too. By itself, each of its products looks like a layer of a stack.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from optax_adam_mini.partition.dataflow.program import (
    LAYOUT,
    LINEAR,
    MERGE,
    RESHAPES,
    Program,
    Step,
    depending,
)

_SLICES = {"slice", "split", "dynamic_slice", "scan_slice", "gather"}
_SUMS = {"add", "add_any", "sub", "scatter-add", "scatter_add"}
_ADDING = {*_SUMS, "neg", "convert_element_type", "copy"}
_MOVES = {*RESHAPES, "broadcast_in_dim", "convert_element_type", "copy", "transpose", MERGE}


class Product(NamedTuple):
    """A product of data and one index of a parameter."""

    step: Step
    slices: list[Step]
    """The steps that take the index, one for each axis, the last one first."""
    moved: int
    """The data that the index is multiplied with."""
    data: int
    """The data before they were shifted."""


def find_taps(program: Program, data: set[int]) -> tuple[set[int], set[int]]:
    """The ids of the products in such filters, and of the steps that take their taps."""
    made = {place: step for step in program.steps for place in step.outputs}
    roots = _roots(program)
    families: dict[tuple[int, int, str], list[Product]] = {}
    for step in program.steps:
        if step.name not in ("mul", "dot_general") or step.is_backward:
            continue
        for weight, other in (step.inputs, step.inputs[::-1]):
            taken = _taken(program, made, weight) if weight not in data and other in data else []
            if taken:
                root = roots.get(other, other)
                origin = _origin(made, taken[-1].inputs[0])
                found = families.setdefault((origin, root, step.name), [])
                found.append(Product(step, taken, other, root))
    products: set[int] = set()
    slices: set[int] = set()
    for family in families.values():
        reached = [_summed_in(program, product.step) for product in family]
        holders: dict[int, set[int]] = {}
        for i, places in enumerate(reached):
            for place in places:
                holders.setdefault(place, set()).add(i)
        for i, product in enumerate(family):
            in_loop = product.slices[0].name not in ("slice", "split")
            if product.step.name == "mul":
                met = {j for j in range(len(family)) if j != i or in_loop}
            else:
                met = {j for j, other in enumerate(family) if other.moved != product.moved}
            added = set[int]()
            for left, right in _sums(program, reached[i]):
                for own, other in ((left, right), (right, left)):
                    if own in reached[i]:
                        added |= holders.get(other, set())
            summed = sorted(met & added)
            is_summed = bool(summed) or (
                product.step.name == "mul" and _is_collected_sum(program, made, reached[i])
            )
            # In a loop, products that depend on one another, or on layers, do not make a filter.
            if is_summed and not (in_loop and _is_recurrent(program, product, data)):
                slices |= _differing(product, [family[j] for j in summed])
                if product.step.name == "mul":
                    products.add(id(product.step))
    return products, slices


def _taken(program: Program, made: dict[int, Step], place: int) -> list[Step]:
    """The steps that take one index of a parameter to make this value, the last one first."""
    found: list[Step] = []
    while (step := made.get(place)) is not None and step.name in _MOVES | _SLICES:
        before, after = program.shapes[step.inputs[0]], program.shapes[place]
        is_one = step.name in _SLICES and (
            len(after) < len(before) or any(n == 1 < m for m, n in zip(before, after, strict=False))
        )
        if step.name in _SLICES and not is_one:
            break
        found += [step] if is_one else []
        place = step.inputs[0]
    return found


def _differing(product: Product, others: list[Product]) -> set[int]:
    """The ids of the steps that take another index in a product that is added.

    `sum(x[i] * w[i, j] for i in range(n))` sums over the first axis, for each `j`.
    """
    index = lambda step: step.params["start_indices"] if step.name == "slice" else None
    pairs = [
        (own, step)
        for other in others
        for own, step in zip(product.slices[::-1], other.slices[::-1], strict=False)
    ]
    found = {id(own) for own, step in pairs if index(own) != index(step)}
    return found or {id(product.slices[0])}


def _origin(made: dict[int, Step], place: int) -> int:
    """The parameter, or what was computed from it, that a value was taken from."""
    while (step := made.get(place)) is not None and step.name in _SLICES | _MOVES:
        place = step.inputs[0]
    return place


def _roots(program: Program) -> dict[int, int]:
    """For values that were shifted, padded or sliced, what they were made from."""
    found: dict[int, int] = {}
    for step in program.steps:
        # A gather at places that data choose is no shift: the edges of a relation, routed tokens.
        is_shift = step.name == "gather" and step.inputs[1] in program.known
        if is_shift or step.name in LAYOUT | RESHAPES | {"convert_element_type"}:
            operands = step.inputs if step.name in ("concatenate", "stack") else step.inputs[:1]
            roots = {found.get(i, i) for i in operands if i not in program.zeros}
            if len(roots) == 1:
                found |= dict.fromkeys(step.outputs, roots.pop())
    return found


def _summed_in(program: Program, step: Step) -> set[int]:
    """The values that a product goes into through sums and layout steps.

    A product of matrices may instead be a layer, whose sum other layers read: it is followed only
    while a value has one reader.
    """
    is_matrix = step.name != "mul"
    through = _ADDING | LAYOUT if is_matrix else LINEAR | _SUMS | LAYOUT
    readers = lambda place: [s for s in program.consumers.get(place, ()) if not s.is_backward]
    seen: set[int] = set()
    todo = [*step.outputs]
    while todo:
        place = todo.pop()
        steps = readers(place)
        if place in seen or (is_matrix and len(steps) > 1):
            continue
        seen.add(place)
        todo += [out for s in steps if s.name in through for out in s.outputs]
    return seen


def _is_recurrent(program: Program, product: Product, data: set[int]) -> bool:
    """Whether a product's data depend on it, or on another parameter that its scan takes apart."""
    steps = program.steps
    first = last = next(i for i, step in enumerate(steps) if step is product.slices[0])
    while first and steps[first - 1].name == steps[last].name == "scan_slice":
        first -= 1
    while steps[last].name == "scan_slice":
        last += 1
    taken = [step.outputs[0] for step in steps[first:last] if step is not product.slices[0]]
    layers = [place for place in taken if place not in data]
    return product.data in depending(program, [*product.step.outputs, *layers])


def _sums(program: Program, places: set[int]) -> list[tuple[int, int]]:
    """The operands of the sums that these values go into.

    A sum of values along different axes is a sum of all pairs, and not of shifts.
    """
    size = lambda place: math.prod(program.shapes[place])
    steps = {
        id(step): step for place in places for step in program.consumers.get(place, ())
        if step.name in _SUMS
        and size(step.outputs[0]) <= max(size(step.inputs[0]), size(step.inputs[-1]))
    }  # fmt: skip
    return [(step.inputs[0], step.inputs[-1]) for step in steps.values()]


def _is_collected_sum(program: Program, made: dict[int, Step], places: set[int]) -> bool:
    """Whether the values that a loop collects are summed."""
    return any(
        step.name == "reduce_sum" and 0 in step.params["axes"] and made[place].name == "scan_stack"
        for place in places
        for step in program.consumers.get(place, ())
    )
