"""The roles of the parameters' axes, brought back from where the parameters are used."""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Facts, Relation, Role, Trail
from optax_adam_mini.partition.dataflow.program import Step


def find_roles(facts: Facts, trail: Trail) -> list[list[set[Role]]]:
    """The roles of the axes of every value; none for those of data."""
    roles: list[list[set[Role]]] = [[set() for _ in value.shape] for value in facts.values]
    count = -1
    while count != (count := sum(len(axis) for axes in roles for axis in axes)):
        for step, relation in reversed(trail):
            _give_back(facts, step, relation, roles)
    return roles


def _give_back(facts: Facts, step: Step, relation: Relation, roles: list[list[set[Role]]]) -> None:
    for operand, axis in relation.cuts:
        roles[step.inputs[operand]][axis].add(Role.BATCH)
    for link in relation.links:
        if link.operand in relation.keeps:
            found = [roles[step.outputs[link.result]][axis] for axis in link.result_axes]
            for axis in link.axes:
                roles[step.inputs[link.operand]][axis].update(*found)
    for operand, contracted, free in relation.chain:
        # x (a b) is (x a) b.
        inner = {
            Role.OUTPUT if role == Role.REDUCTION else Role.REDUCTION
            for axis in free
            for role in roles[step.outputs[0]][axis] - {Role.BATCH}
        }
        for axis in contracted:
            roles[step.inputs[operand]][axis] |= inner
    for operand, outputs in relation.uses.items():
        if operand in relation.keeps:
            continue  # rows that are used later
        own = roles[step.inputs[operand]]
        batch = {axis for found, axis in relation.cuts if found == operand}
        free = {
            axis
            for link in relation.links
            if link.operand == operand and set(link.result_axes) <= set(outputs)
            for axis in link.axes
        }
        for axis, found in enumerate(own):
            if axis not in batch:
                found.add(Role.OUTPUT if axis in free else Role.REDUCTION)
            if axis in free and relation.in_groups:
                found.add(Role.BATCH)
