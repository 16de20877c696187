"""The forward pass: what every value is made of.

It runs the rules over the steps until what loops carry has settled.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation, Use, Value
from optax_adam_mini.partition.dataflow.program import Program, Step
from optax_adam_mini.partition.dataflow.rules import RULES, unknown


def follow(program: Program, n_params: int) -> Facts:
    """What is made of which of the first `n_params` inputs."""
    facts = Facts(program, n_params, [Value(shape) for shape in program.shapes])
    for index, place in enumerate(program.inputs):
        value = facts.values[place]
        if index < n_params:
            value.kind, value.params = Kind.WEIGHT, frozenset([index])
            # To be told from constants that are broadcast along an axis.
            value.features = [{-1 - place: 1} if size > 1 else {} for size in value.shape]
            value.apart = [size > 1 for size in value.shape]
        else:
            value.kind = Kind.DATA
    for place in program.arrays:
        facts.values[place].kind = Kind.DATA
    numbers: dict[tuple[int, int], int] = {}
    while _pass(facts, numbers):
        pass
    return facts


def _pass(facts: Facts, numbers: dict[tuple[int, int], int]) -> bool:
    """Whether a value that was read before it was given has changed, as in loops."""
    facts.later.clear()
    facts.relations = []
    read: set[int] = set()
    again = False
    for step in facts.program.steps:
        read.update(step.inputs)
        relation = RULES.get(step.name, unknown)(facts, step)
        facts.relations.append(relation)
        for result, place in enumerate(step.outputs):
            changed = _give(facts, numbers, step, relation, result)
            again |= changed and place in read
    return again


def _give(
    facts: Facts,
    numbers: dict[tuple[int, int], int],
    step: Step,
    relation: Relation,
    result: int,
) -> bool:
    """Adds to a result what the relation says; whether that is new."""
    value = facts.values[step.outputs[result]]
    before = value.state()
    ins = facts.inputs(step)
    kind = max((v.kind for v in ins), default=Kind.CONSTANT)
    value.kind = max(value.kind, kind if relation.kind is None else relation.kind)
    value.is_rows = relation.is_rows
    value.iota, value.one_hot = relation.iota, relation.one_hot
    value.product = relation.product
    if value.is_weight:
        value.params = value.params.union(*(v.params for v in ins))
    for link in relation.links:
        if link.result == result and link.operand not in relation.uses:
            _follow(link, ins[link.operand], value)
    for operand, axes in relation.uses.items():
        number = numbers.setdefault((id(step), operand), len(numbers))
        facts.uses[number] = Use(step, operand, ins[operand].params, relation.is_rows)
        distance = 1
        for axis in reversed(axes):
            if value.shape[axis] > 1:
                _add(value.features[axis], number, distance)
                value.apart[axis] = True
            distance *= value.shape[axis]
    return before != value.state()


def _follow(link: Link, operand: Value, result: Value) -> None:
    """The features of a result's axes from those of the operand's."""
    merged: dict[int, int] = {}
    if any(operand.apart[a] for a in link.axes) or (
        link.positions is not None and (link.positions < 0).any()
    ):
        for axis in link.result_axes:
            result.apart[axis] = result.shape[axis] > 1
    for axis in link.axes:
        for use, distance in operand.features[axis].items():
            _add(merged, use, distance)
    for axis in reversed(link.result_axes):
        if result.shape[axis] > 1:
            for use, distance in merged.items():
                _add(result.features[axis], use, distance)
        merged = {use: distance * result.shape[axis] for use, distance in merged.items()}


def _add(features: dict[int, int], use: int, distance: int) -> None:
    features[use] = min(features.get(use, distance), distance)
