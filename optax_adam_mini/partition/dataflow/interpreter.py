"""Follows every axis of every parameter through a program, and what is coupled back to it."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from optax_adam_mini.partition.dataflow.groups import ALONE, WHOLE, Groups, Label, moved
from optax_adam_mini.partition.dataflow.program import Program, Step
from optax_adam_mini.partition.dataflow.rules import (
    RULES,
    Context,
    Kind,
    Link,
    Relation,
    Value,
    unknown,
)


@dataclasses.dataclass(frozen=True)
class Use:
    """A parameter meets data in a step."""

    step: Step
    operand: int
    params: frozenset[int]
    is_lookup: bool
    """Rows of it are chosen by an index."""


class Role(enum.Enum):
    """What an axis of a parameter is where the parameter meets data."""

    REDUCTION = enum.auto()
    OUTPUT = enum.auto()
    BATCH = enum.auto()
    """Layers of a stack, experts, rows chosen by an index, coordinates that act alone."""


@dataclasses.dataclass
class Result:
    """What was found of the parameters, each an index into the program's inputs."""

    labels: list[list[Label]]
    """For each parameter the groups of each axis."""
    roles: list[list[set[Role]]]
    """For each parameter the roles of each axis, one for all uses unless these differ."""
    uses: dict[int, list[Use]]
    unread: dict[int, list[Step]]
    """The steps of unknown primitives that a parameter, or what it makes, goes into."""
    coupled: dict[int, list[Step]]
    """The inner products that couple a parameter's outputs."""


class Interpreter:
    """Two passes over a program, each repeated until loops have settled.

    Forward: what is made of which parameter. Backward: what is coupled.
    """

    def __init__(self, program: Program, n_params: int):
        self.program, self.n_params = program, n_params
        self.values = [Value(shape) for shape in program.shapes]
        for index, place in enumerate(program.inputs):
            value = self.values[place]
            if index < n_params:
                value.kind, value.params = Kind.WEIGHT, frozenset([index])
                # To be told from constants that are broadcast along an axis.
                value.features = [{-1 - place: 1} if size > 1 else {} for size in value.shape]
                value.apart = [size > 1 for size in value.shape]
            else:
                value.kind = Kind.DATA
        for place in program.arrays:
            self.values[place].kind = Kind.DATA
        self.groups = Groups()
        self.context = Context(self.values)
        self.relations: list[Relation] = []
        self.uses: dict[int, Use] = {}
        self._use_numbers: dict[tuple[int, int], int] = {}
        self._couplings: dict[tuple[int, int, tuple[int, ...]], np.ndarray] = {}

    def run(self) -> Result:
        """Both passes."""
        while self._forward():
            pass
        labels = self._backward()
        roles = self._roles()
        for step, relation in zip(self.program.steps, self.relations, strict=True):
            for link in relation.links:
                # Of an axis that has shrunk to size 1, and was then dropped, no use is known.
                place = step.outputs[link.result]
                if link.parts > 1 and self.values[place].shape[link.result_axes[0]] == 1:
                    relation.unread |= not roles[place][link.result_axes[0]]
        inputs = self.program.inputs[: self.n_params]
        unread: dict[int, list[Step]] = {}
        coupled: dict[int, list[Step]] = {}
        for step, relation in zip(self.program.steps, self.relations, strict=True):
            if relation.unread:
                for param in sorted(self._makers(self.context.inputs(step))):
                    unread.setdefault(param, []).append(step)
            for part in (relation, self.context.later.get(id(step), Relation())):
                for operand, axes in part.couplings:
                    value = self.values[step.inputs[operand]]
                    for param in self._made(value.features[axis] for axis in axes):
                        coupled.setdefault(param, []).append(step)
        uses: dict[int, list[Use]] = {}
        for use in self.uses.values():
            for param in use.params:
                uses.setdefault(param, []).append(use)
        return Result(
            [labels[place] for place in inputs],
            [roles[place] for place in inputs],
            uses,
            unread,
            coupled,
        )

    def _makers(self, values: Iterable[Value]) -> set[int]:
        """The parameters that values are, or come from the outputs of."""
        found: set[int] = set()
        for value in values:
            found |= value.params if value.is_weight else set()
            found |= self._made(value.features)
        return found

    def _made(self, features: Iterable[dict[int, int]]) -> set[int]:
        """The parameters whose outputs these are."""
        numbers = {use for part in features for use in part if use >= 0}
        return set().union(*(self.uses[number].params for number in numbers))

    def _use(self, step: Step, operand: int, relation: Relation, params: frozenset[int]) -> int:
        number = self._use_numbers.setdefault((id(step), operand), len(self._use_numbers))
        self.uses[number] = Use(step, operand, params, relation.is_rows)
        return number

    # --- forward

    def _forward(self) -> bool:
        """One pass; whether a value that was read before it was given has changed, as in loops."""
        self.context.later.clear()
        self.relations = []
        read: set[int] = set()
        again = False
        for step in self.program.steps:
            read.update(step.inputs)
            relation = RULES.get(step.name, unknown)(self.context, step)
            self.relations.append(relation)
            for result, place in enumerate(step.outputs):
                changed = self._give(step, relation, result, self.values[place])
                again |= changed and place in read
        return again

    def _give(self, step: Step, relation: Relation, result: int, value: Value) -> bool:
        """Adds to a result what the relation says; whether that is new."""
        before = value.state()
        ins = self.context.inputs(step)
        kind = max((v.kind for v in ins), default=Kind.CONSTANT)
        value.kind = max(value.kind, kind if relation.kind is None else relation.kind)
        value.is_rows = relation.is_rows
        value.iota, value.one_hot = relation.iota, relation.one_hot
        value.product = relation.product
        if value.is_weight:
            value.params = value.params.union(*(v.params for v in ins))
        for link in relation.links:
            if link.result == result and link.operand not in relation.uses:
                self._follow(link, ins[link.operand], value)
        for operand, axes in relation.uses.items():
            number = self._use(step, operand, relation, ins[operand].params)
            distance = 1
            for axis in reversed(axes):
                if value.shape[axis] > 1:
                    _add(value.features[axis], number, distance)
                    value.apart[axis] = True
                distance *= value.shape[axis]
        return before != value.state()

    def _follow(self, link: Link, operand: Value, result: Value) -> None:
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

    # --- backward

    def _backward(self) -> list[Any]:
        """What is coupled in every value.

        Of weights the groups of each axis; of data the groups of all coordinates together, an
        array with an axis of size 1 for each that need not be told apart, or None where nothing is
        coupled.
        """
        coupled: list[Any] = [self._fresh(value) for value in self.values]
        while True:
            before = [self._resolved(found) for found in coupled]
            for place, value in enumerate(self.values):
                if value.is_weight:  # refined, from what is known of the others by now
                    coupled[place] = self._fresh(value)
            for step, relation in zip(
                reversed(self.program.steps), reversed(self.relations), strict=True
            ):
                for part in (relation, self.context.later.get(id(step))):
                    if part is not None:
                        self._give_back(step, part, coupled)
            after = [self._resolved(found) for found in coupled]
            if all(map(_equal, before, after)):
                return after

    def _fresh(self, value: Value) -> Any:
        """Before any use: a parameter is one block, and in data nothing is coupled."""
        return [WHOLE] * len(value.shape) if value.is_weight else None

    def _resolved(self, found: Any) -> Any:
        if isinstance(found, list):
            return [self.groups.resolved(label) for label in found]
        return self.groups.resolved(found)

    def _give_back(self, step: Step, relation: Relation, coupled: list[Any]) -> None:
        """Brings what is coupled in the results of a step to its operands."""
        for result, result_place in enumerate(step.outputs):
            for operand, place in enumerate(step.inputs):
                links = [k for k in relation.links if (k.operand, k.result) == (operand, result)]
                value = self.values[place]
                if not links:
                    continue
                shape = self.values[result_place].shape
                if not value.is_weight:
                    if coupled[result_place] is not None:
                        found = self._data_from_data(links, value, coupled[result_place], shape)
                        coupled[place] = self._join(coupled[place], found)
                elif self.values[result_place].is_weight:
                    labels = self._weight_from_weight(links, value, coupled[result_place], shape)
                    self._refine(coupled[place], labels)
                elif operand in relation.uses:
                    labels = self._weight_from_data(links, value, coupled[result_place], shape)
                    self._refine(coupled[place], labels)
        for operand, contracted, free in relation.chain:
            # Of two weights that are multiplied, the one that meets the data first has outputs.
            if all(isinstance(coupled[step.outputs[0]][axis], int) for axis in free):
                self._refine(coupled[step.inputs[operand]], dict.fromkeys(contracted))
        for operand, axis in relation.cuts:
            self._refine(coupled[step.inputs[operand]], {axis: None})
        for operand, axes in relation.couplings:
            place = step.inputs[operand]
            found = self._coupling(step, operand, axes)
            coupled[place] = self._join(coupled[place], found)

    def _roles(self) -> list[list[set[Role]]]:
        """The roles of the axes of every value; none for those of data."""
        roles: list[list[set[Role]]] = [[set() for _ in value.shape] for value in self.values]
        count = -1
        while count != (count := sum(len(axis) for axes in roles for axis in axes)):
            for step, relation in zip(
                reversed(self.program.steps), reversed(self.relations), strict=True
            ):
                self._give_roles_back(step, relation, roles)
        return roles

    def _give_roles_back(
        self, step: Step, relation: Relation, roles: list[list[set[Role]]]
    ) -> None:
        for operand, axis in relation.cuts:
            roles[step.inputs[operand]][axis].add(Role.BATCH)
        for link in relation.links:
            if self.values[step.inputs[link.operand]].is_weight:
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
            if any(self.values[place].is_weight for place in step.outputs):
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

    def _coupling(self, step: Step, operand: int, axes: tuple[int, ...]) -> np.ndarray:
        """Groups of an operand that is coupled along `axes`, at each index of the others apart."""
        key = id(step), operand, axes
        if key not in self._couplings:
            shape = self.values[step.inputs[operand]].shape_apart
            apart = [1 if axis in axes else size for axis, size in enumerate(shape)]
            first = self.groups.new(int(np.prod(apart)))
            numbers = first + np.arange(np.prod(apart)).reshape(apart)
            self._couplings[key] = np.broadcast_to(numbers, shape).copy()
        return self._couplings[key]

    def _join(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        return self.groups.join(a, b)

    def _refine(self, labels: list[Label], others: dict[int, Label]) -> None:
        for axis, label in others.items():
            labels[axis] = self.groups.meet(labels[axis], label)

    def _data_from_data(
        self, links: list[Link], value: Value, found: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray | None:
        """The groups of an operand from those of a result of `shape`."""
        has = value.apart
        active = [k for k in links if k.positions is not None or any(has[a] for a in k.axes)]
        linked = {axis for link in active for axis in link.axes}
        if not active or any(has[axis] and axis not in linked for axis in range(len(has))):
            return None
        grid, axes = self._pulled(active, value, found, shape)
        for index, axis in enumerate(axes):
            if not has[axis]:
                grid = self.groups.united(grid, index)
        return grid.reshape(value.shape_apart)

    def _weight_from_data(
        self, links: list[Link], value: Value, found: np.ndarray | None, shape: tuple[int, ...]
    ) -> dict[int, Label]:
        """The groups of a parameter's axes, where it meets data, from those of the result."""
        if found is None:
            return dict.fromkeys(axis for link in links for axis in link.axes)
        grid, axes = self._pulled(links, value, found, shape)
        return dict(zip(axes, self.groups.along_axes(grid), strict=True))

    def _pulled(
        self, links: list[Link], value: Value, found: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, list[int]]:
        """The groups of a result over the operand's axes that `links` name, and these axes.

        The axes are in order. What is coupled at any index of the result's other axes is coupled.
        """
        order = [axis for link in links for axis in link.result_axes]
        for axis in range(found.ndim):
            if axis not in order:
                found = self.groups.united(found, axis)
        found = found.transpose([*order, *(a for a in range(found.ndim) if a not in order)])
        found = np.broadcast_to(
            found.reshape(found.shape[: len(order)]), [shape[axis] for axis in order]
        )
        found = found.reshape([np.prod([shape[a] for a in link.result_axes]) for link in links])
        for index, link in enumerate(links):
            if link.positions is not None:
                taken = link.positions >= 0
                size = math.prod(value.shape[axis] for axis in link.axes)
                whole = np.full((*found.shape[:index], size, *found.shape[index + 1 :]), ALONE)
                at = (slice(None),) * index
                whole[(*at, link.positions[taken])] = found[(*at, taken)]
                found = whole
        axes = [axis for link in links for axis in link.axes]
        found = found.reshape([value.shape[axis] for axis in axes])
        return found.transpose(np.argsort(axes)), sorted(axes)

    def _weight_from_weight(
        self, links: list[Link], value: Value, found: list[Label], shape: tuple[int, ...]
    ) -> dict[int, Label]:
        """The groups of a parameter's axes before its axes are moved about."""
        labels: dict[int, Label] = {}
        for link in links:
            if not link.axes:
                continue
            given = [found[axis] for axis in link.result_axes]
            if link.positions is not None:
                size = value.shape[link.axes[0]]
                # One index of several is one of a stack.
                label = None if shape[link.result_axes[0]] == 1 else given[0]
                given = [moved(label, link.positions, size)]
            if link.parts > 1:
                given = [self.groups.repeated(given[0], shape[link.result_axes[0]], link.parts)]
            if len(given) > 1:
                given = [self.groups.merged(given, [shape[axis] for axis in link.result_axes])]
            if len(link.axes) > 1:
                given = self.groups.split(given[0], [value.shape[axis] for axis in link.axes])
            labels.update(zip(link.axes, given, strict=True))
        return labels


def _add(features: dict[int, int], use: int, distance: int) -> None:
    features[use] = min(features.get(use, distance), distance)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return all(map(_equal, a, b))
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
