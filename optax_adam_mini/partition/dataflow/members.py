"""Finds the indices that choose members of a stack: an expert, an adapter, a layer.

An index that chooses a kernel chooses a member. What the same index chooses from another parameter
is a bias or a gain of that member, and not a row of a table. It also finds the indices that repeat
or order the inputs of a kernel.
"""

from __future__ import annotations

from collections.abc import Hashable

from optax_adam_mini.partition.dataflow.domain import FUNCTIONS, Facts, Kind, Relation
from optax_adam_mini.partition.dataflow.folding import is_index
from optax_adam_mini.partition.dataflow.program import LINEAR, MERGE, RESHAPES, Program, Step

# What indexing, a cast or a one-hot vector makes of an index.
_OF_AN_INDEX = {
    *RESHAPES, "add", "and", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type",
    "copy", "eq", "lt", "max", "min", "rem", "select_n", "stop_gradient", "sub",
}  # fmt: skip
# What lies between the rows of a kernel and what they meet.
_MOVES = {*RESHAPES, "broadcast_in_dim", "transpose"}


def find_members(facts: Facts) -> set[int]:
    """The ids of the steps that take the biases and gains of members from a stack."""
    lookups = {id(step): (step, relation) for step, relation in facts.trail if relation.is_lookup}
    kernels, inputs = set[int](), set[int]()
    for step, relation in facts.trail:
        for operand, partner in relation.partner.items() if id(step) not in lookups else ():
            kernels |= _rows(facts, step.inputs[operand])
            inputs |= _rows(facts, step.inputs[partner])
    if not kernels:
        return set()
    index_of = _Indices(facts.program)
    indices = {each: index_of(*found) for each, found in lookups.items()}
    chosen = {indices[each] for each in kernels}
    return {each for each in indices.keys() - kernels - inputs if indices[each] in chosen}


def _rows(facts: Facts, place: int) -> set[int]:
    """The ids of the lookups that chose a value's rows."""
    value = facts.values[place]
    numbers = {number for axis in range(len(value.shape)) for number in value.features(axis)}
    uses = [facts.uses[number] for number in numbers]
    return {id(use.step) for use in uses if use.is_lookup and use.params & value.params}


def find_repeats(facts: Facts) -> set[int]:
    """The ids of the steps that repeat a kernel's inputs, by indices that the program fixes.

    They look like lookups, but what is contracted is the axis that the index made.
    """
    rows = {
        step.outputs[0]: step
        for step, relation in facts.trail
        if relation.is_lookup
        and step.name == "gather"
        and (facts.values[step.inputs[1]].is_fixed or step.inputs[1] in facts.program.known)
    }
    made = {place: step for step in facts.program.steps for place in step.outputs} if rows else {}
    summed, found = {id(step) for step in facts.summed.values()}, set[int]()
    for step, relation in facts.trail if rows else ():
        is_sum = step.name == "dot_general" or id(step) in summed
        for operand, place in enumerate(step.inputs) if is_sum else ():
            value = facts.values[place]
            kept = {
                axis for link in relation.links if link.operand == operand for axis in link.axes
            }
            gone = [a for a, size in enumerate(value.shape) if size > 1 and a not in kept]
            while place not in rows and (before := _before(facts, made.get(place))) is not None:
                place = before
            if place in rows and not all(value.is_own(axis) for axis in gone):
                found.add(id(rows[place]))
    return found


def _before(facts: Facts, step: Step | None) -> int | None:
    """What a step only moves, scales, masks or applies a function to."""
    if step is None or step.name not in _MOVES | LINEAR | FUNCTIONS or step.name == MERGE:
        return None  # through MERGE, a loop would never end
    is_fixed = lambda value: value.kind == Kind.CONSTANT or value.is_fixed
    others = [place for place in step.inputs if not is_fixed(facts.values[place])]
    return others[0] if len(others) == 1 else None


class _Indices:
    """What the indices of a program were computed from."""

    def __init__(self, program: Program):
        self.program = program
        self.made: dict[int, Step] = {}
        self.same: dict[int, int] = {}
        """For each value, the first one that was computed in the same way."""
        first: dict[Hashable, int] = {}
        for place, known in program.known.items():
            if is_index(known):  # others are copies of one that is
                self.same[place] = first.setdefault((known.shape, known.tobytes()), place)
        for step in program.steps:
            how = step.name, str(step.params), *(self.same.get(i, i) for i in step.inputs)
            for number, place in enumerate(step.outputs):
                if place not in self.made and step.name != MERGE:
                    self.same.setdefault(place, first.setdefault((how, number), place))
                self.made[place] = step

    def __call__(self, step: Step, relation: Relation) -> Hashable:
        """What the index was computed from, or its values if the program fixes it."""
        axes = [axis for _, axis in relation.cuts]
        known, columns = self.program.known, ...
        if step.name == "dynamic_slice":
            todo = [step.inputs[1 + axis] for axis in axes]
        elif step.name == "gather":
            todo = [step.inputs[1]]
            along = step.params["dimension_numbers"].start_index_map
            columns = ..., [column for column, axis in enumerate(along) if axis in axes]
        else:  # a one-hot vector, and what it chooses from
            todo = [
                place for operand, place in enumerate(step.inputs) if operand not in relation.uses
            ]
        if known.keys() >= set(todo):
            return tuple(known[place][columns].tobytes() for place in todo)
        seen, found = set(todo), set[int]()
        while todo:
            place = todo.pop()
            before = self.made.get(place)
            if before is None or before.name not in _OF_AN_INDEX:
                found.add(self.same.get(place, place))
                continue
            todo += {*before.inputs} - seen - known.keys()
            seen.update(before.inputs)
        return frozenset(found)
