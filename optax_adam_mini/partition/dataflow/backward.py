"""The backward pass: what is coupled, from where it is coupled back to the parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from optax_adam_mini.partition.dataflow.domain import Facts, Link, Relation, Value
from optax_adam_mini.partition.dataflow.groups import ALONE, WHOLE, Groups, Label, moved
from optax_adam_mini.partition.dataflow.program import Step


def find_groups(facts: Facts) -> list[Any]:
    """What is coupled in every value.

    Of weights the groups of each axis; of data the groups of all coordinates together, an array
    with an axis of size 1 for each that need not be told apart, or None where nothing is coupled.
    """
    return _Backward(facts).run()


class _Backward:
    """One pass, repeated until loops have settled, with the groups that it makes."""

    def __init__(self, facts: Facts):
        self.facts, self.values = facts, facts.values
        self.groups = Groups()
        self._couplings: dict[tuple[int, int, tuple[int, ...]], np.ndarray] = {}

    def run(self) -> list[Any]:
        """What `find_groups` gives."""
        coupled: list[Any] = [self._fresh(value) for value in self.values]
        while True:
            before = [self._resolved(found) for found in coupled]
            for place, value in enumerate(self.values):
                if value.is_weight:  # refined, from what is known of the others by now
                    coupled[place] = self._fresh(value)
            for step, relation in zip(
                reversed(self.facts.program.steps), reversed(self.facts.relations), strict=True
            ):
                for part in (relation, self.facts.later.get(id(step))):
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


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return all(map(_equal, a, b))
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
