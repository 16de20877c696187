"""Finds the roles of the parameters' axes, from the steps that use the parameters."""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.axes import Indices
from optax_adam_mini.partition.dataflow.domain import Facts, Link, Relation, Role, Trail
from optax_adam_mini.partition.dataflow.program import Step


def find_roles(facts: Facts, trail: Trail) -> list[list[set[Role]]]:
    """The roles of the axes of every value; an axis of data has `BATCH`, or `OUTPUT` beside it.

    Relations in which a parameter is used on members of a stack get cuts along the members' axis.
    """
    roles: list[list[set[Role]]] = [[set() for _ in value.shape] for value in facts.values]
    count = -1
    while count != (count := sum(len(axis) for axes in roles for axis in axes)):
        for step, relation in reversed(trail):
            _give_back(facts, step, relation, roles)
    return roles


def _give_back(facts: Facts, step: Step, relation: Relation, roles: list[list[set[Role]]]) -> None:
    for operand, axis in relation.cuts:
        place = step.inputs[operand]
        if not (operand in relation.spent and facts.acts(facts.values[place])):
            roles[place][axis].add(Role.BATCH)
    for link in relation.links:
        place, result = step.inputs[link.operand], step.outputs[link.result]
        of_axes = [roles[result][axis] for axis in link.result_axes]
        found = set[Role]().union(*of_axes)
        if link.operand not in relation.keeps:  # data: members that each meet a kernel later
            if _are_members(facts, step, relation, link):
                found = {Role.BATCH}
            elif Role.BATCH in found and not all(Role.BATCH in axis for axis in of_axes):
                found.add(Role.OUTPUT)  # members and their outputs, side by side
        elif _is_one_layer(facts, place, link):
            found = {Role.REDUCTION if id(step) in facts.taps else Role.BATCH}
        if len(link.axes) > 1 and Role.BATCH in found:  # one of them is of members
            found.discard(Role.OUTPUT)
        if link.operand not in relation.uses or link.operand in relation.keeps:
            for axis in link.axes:
                roles[place][axis] |= found
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
        members: dict[int, set[Role]] = {}
        for link in relation.links:
            result = step.outputs[link.result]
            found = set[Role]().union(*(roles[result][axis] for axis in link.result_axes))
            if link.operand == operand and Role.BATCH in found:
                members |= dict.fromkeys(link.axes, found)
        for axis, found in enumerate(own):
            if axis in members:
                found |= members[axis]
                if found == {Role.BATCH} and axis not in batch:
                    relation.cuts.append((operand, axis))
            elif axis not in batch:
                found.add(Role.OUTPUT if axis in free else Role.REDUCTION)
            if axis in free and relation.in_groups:
                found.add(Role.BATCH)


def _are_members(facts: Facts, step: Step, relation: Relation, link: Link) -> bool:
    """Whether each index of an axis meets its own kernel, and has its own outputs."""
    if not any(Indices.MEMBERS in relation.indices.get(a, Indices.ANY) for a in link.result_axes):
        return False
    value = facts.values[step.inputs[link.operand]]
    linked = {
        axis for other in relation.links if other.operand == link.operand for axis in other.axes
    }
    gone = {use for a in range(len(value.shape)) if a not in linked for use in value.features(a)}
    return any(use in gone for axis in link.axes for use in value.features(axis))


def _is_one_layer(facts: Facts, place: int, link: Link) -> bool:
    """Whether a link takes one layer of a stack."""
    is_longer = any(facts.values[place].shape[axis] > 1 for axis in link.axes)
    return link.positions is not None and len(link.positions) == 1 and is_longer
