"""The backward pass: what is coupled, from where it is coupled back to the parameters.

Coupling goes back along the links of every step, to what outputs of parameters are in, and to
nothing else: a table or a mask that heads share joins no heads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from optax_adam_mini.partition.dataflow.domain import Facts, Link, Relation, Trail, Value
from optax_adam_mini.partition.dataflow.groups import (
    ALONE,
    UNSEEN,
    WHOLE,
    Groups,
    Label,
    moved,
)
from optax_adam_mini.partition.dataflow.program import Step

_MANY = 20  # passes, after which what has not settled will not


def find_groups(facts: Facts, trail: Trail) -> list[list[Label]]:
    """For every value that is a parameter still, the groups of each axis."""
    return _Backward(facts, trail).run()


class _Backward:
    """One pass, repeated until loops have settled, with the groups that it makes."""

    def __init__(self, facts: Facts, trail: Trail):
        self.trail = trail
        self.facts, self.values = facts, facts.values
        self.groups = Groups()
        self.coupled: list[np.ndarray | None] = [None] * len(self.values)
        """The groups of all coordinates of activations together, with an axis of size 1 for each
        that need not be told apart; None where nothing is coupled."""
        self.taken: list[np.ndarray | bool] = [False] * len(self.values)
        """Which coordinates of activations are used: all, none, or an array as of groups, ALONE
        where they are not."""
        for place in facts.program.outputs:
            self.taken[place] = True
        self.given_up: set[int] = set()
        """Values whose groups did not settle: nothing is coupled in them."""
        self.labels: list[list[Label]] = []
        self.spent = [False] * len(self.values)
        """What parameters are combined in as data."""
        self.gains = [False] * len(self.values)
        """Parameters that scale data along their own axes, sooner or later."""
        self.open = [False] * len(self.values)
        """Parameters whose coordinates act alone, unless a step has seen them together."""
        for place in facts.program.outputs:
            self.spent[place] = facts.acts(self.values[place])
        self._couplings: dict[tuple[int, int, tuple[int, ...]], np.ndarray] = {}

    def run(self) -> list[list[Label]]:
        """What `find_groups` gives."""
        count = 0
        while True:
            count += 1
            before = self.labels, [*self.coupled], [*self.spent], [*self.taken]
            # Refined anew, from what is known of the others by now.
            self.labels = [[UNSEEN] * len(value.shape) for value in self.values]
            for step, relation in reversed(self.trail):
                self._give_back(step, relation)
            if _equal(before, (self.labels, self.coupled, self.spent, self.taken)):
                for place, is_open in enumerate(self.open):
                    if is_open:
                        self.labels[place] = [
                            None if _is_unseen(label) else label for label in self.labels[place]
                        ]
                return self.labels
            if count > _MANY:  # a loop that mixes ever more: finer than it has to be
                for place, (old, new) in enumerate(zip(before[1], self.coupled, strict=True)):
                    if not _equal(old, new):
                        self.given_up.add(place)
                        self.coupled[place] = None

    def _give_back(self, step: Step, relation: Relation) -> None:
        """Brings what is coupled in the results of a step to its operands."""
        links: dict[tuple[int, int], list[Link]] = {}
        told: dict[int, set[int]] = {}
        for link in relation.links:
            if link.is_lost:
                continue
            links.setdefault((link.operand, link.result), []).append(link)
        for operand, place in enumerate(step.inputs):
            if self.values[place].has_features and self.taken[place] is not True:
                self._take(step, relation, operand)
        for (operand, result), found in links.items():
            place, result_place = step.inputs[operand], step.outputs[result]
            value, coupled = self.values[place], self.coupled[result_place]
            shape = self.values[result_place].shape
            if (
                operand not in relation.uses
                and coupled is not None
                and value.has_features
                and place not in self.given_up
            ):
                groups = self._of_data(found, value, coupled, shape, step.name == "scan_slice")
                if groups is not None:
                    old = self.coupled[place]
                    self.coupled[place] = groups if old is None else self.groups.join(old, groups)
            if operand in relation.keeps:
                labels = self._of_weight(found, value, self.labels[result_place], shape)
                self._refine(place, labels)
            elif operand in relation.uses:
                labels = self._of_outputs(found, relation, operand, value, coupled, shape)
                self._refine(place, self._of_taken(labels, found, value, result_place))
                told[operand] = told.get(operand, set()) | labels.keys()
        for operand in relation.keeps:
            place = step.inputs[operand]
            self.gains[place] |= operand in relation.gains or any(
                self.gains[out] for out in step.outputs
            )
            self.open[place] |= self._acts_alone(step, relation, operand) or any(
                self.open[out] for out in step.outputs
            )
        for operand in relation.keeps - relation.uses.keys():
            if any(self.spent[place] for place in step.outputs):
                self._spend(step, relation, operand)
        for operand in relation.spent:
            self._spend(step, relation, operand)
        for operand in relation.uses:
            place = step.inputs[operand]
            sizes = self.values[place].shape
            rest = set(range(len(sizes))) - told.get(operand, set())
            self._refine(place, {axis: WHOLE for axis in rest if sizes[axis] > 1})
        for operand, contracted, free in relation.chain:
            # Of two weights that are multiplied, the one that meets the data first has outputs.
            labels = [self.labels[step.outputs[0]][axis] for axis in free]
            if labels and not any(map(_is_unseen, labels)):
                is_first = all(isinstance(label, int) for label in labels)
                label = None if is_first else WHOLE
                self._refine(step.inputs[operand], dict.fromkeys(contracted, label))
        for operand, axis in relation.cuts:
            self._refine(step.inputs[operand], {axis: None})
        for operand, axes in relation.couplings:
            place = step.inputs[operand]
            if place in self.given_up:
                continue
            groups, old = self._coupling(step, operand, axes), self.coupled[place]
            self.coupled[place] = groups if old is None else self.groups.join(old, groups)

    def _acts_alone(self, step: Step, relation: Relation, operand: int) -> bool:
        """Whether each coordinate of a parameter acts alone, if the result is data."""
        is_gain = any(self.gains[place] for place in step.outputs)
        return operand in relation.shifts or (operand in relation.scaled and not is_gain)

    def _take(self, step: Step, relation: Relation, operand: int) -> None:
        """What a step uses of an operand: what is used of what it makes of it."""
        place = step.inputs[operand]
        value = self.values[place]
        apart = {axis for axis, size in enumerate(value.shape_apart) if size > 1}
        for result, result_place in enumerate(step.outputs):
            links = [k for k in relation.links if (k.operand, k.result) == (operand, result)]
            made = self.values[result_place]
            shape = made.shape
            # It is followed as long as there are features: what has none is used, being there.
            taken = self.taken[result_place] if made.has_features else True
            if taken is False and links:
                continue
            drops = taken is not True or any(k.positions is not None for k in links)
            is_plain = not any(k.is_lost or k.is_mixed or k.parts > 1 for k in links)
            if not (drops and is_plain and apart <= {a for k in links for a in k.axes}):
                self.taken[place] = True
                return
            if taken is True:
                taken = np.ones(made.shape_apart, np.int64)
            found = self._of_data(links, value, np.asarray(taken), shape, each=False)
            if found is None or (found != ALONE).all():
                self.taken[place] = True
                return
            old = self.taken[place]
            self.taken[place] = found if isinstance(old, bool) else np.maximum(found, old)

    def _spend(self, step: Step, relation: Relation, operand: int) -> None:
        """A combined value was data: what is no factor in it is a bias."""
        place = step.inputs[operand]
        self.spent[place] = True
        if self._acts_alone(step, relation, operand):
            own = [a for a in range(len(self.values[place].shape)) if self.values[place].is_own(a)]
            self._refine(place, dict.fromkeys(own))

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

    def _refine(self, place: int, others: dict[int, Label]) -> None:
        labels = self.labels[place]
        for axis, label in others.items():
            labels[axis] = self.groups.meet(labels[axis], label)

    def _of_data(
        self,
        links: list[Link],
        value: Value,
        found: np.ndarray,
        shape: tuple[int, ...],
        each: bool,
    ) -> np.ndarray | None:
        """The groups of activations from those of a result of `shape`.

        With `each`, what the result has of an axis that is not linked is each of its indices, as
        in a loop over heads: then they are apart.
        """
        apart = [size > 1 for size in value.shape_apart]
        active = [k for k in links if k.positions is not None or any(apart[a] for a in k.axes)]
        linked = {axis for link in active for axis in link.axes}
        chosen = [axis for axis, is_apart in enumerate(apart) if is_apart and axis not in linked]
        if not active or (chosen and not each):
            return None
        grid, axes = self._pulled(active, value, found, shape)
        for index, axis in enumerate(axes):
            if not apart[axis]:
                grid = self.groups.united(grid, index)
        if not chosen:
            return grid.reshape(value.shape_apart)
        sizes = [1 if axis in chosen else n for axis, n in enumerate(value.shape_apart)]
        count = math.prod(value.shape[axis] for axis in chosen)
        apart_each = self.groups.repeated(grid.ravel(), grid.size, count)
        apart_each = apart_each.reshape(*(value.shape[axis] for axis in chosen), *sizes)
        return _placed_along(apart_each, chosen, value.shape_apart)

    def _of_outputs(
        self,
        links: list[Link],
        relation: Relation,
        operand: int,
        value: Value,
        found: np.ndarray | None,
        shape: tuple[int, ...],
    ) -> dict[int, Label]:
        """The groups of a parameter's axes, where it meets data, from those of the result."""
        outputs = set(relation.uses[operand])
        batch = {axis for cut, axis in relation.cuts if cut == operand}
        links = [
            link for link in links if set(link.result_axes) <= outputs or batch & set(link.axes)
        ]
        if found is None:
            return dict.fromkeys(axis for link in links for axis in link.axes)
        grid, axes = self._pulled(links, value, found, shape)
        return dict(zip(axes, self.groups.along_axes(grid), strict=True))

    def _of_taken(
        self, labels: dict[int, Label], links: list[Link], value: Value, result: int
    ) -> dict[int, Label]:
        """The groups of a parameter's axes, nothing known of outputs that nothing uses."""
        taken = self.taken[result]
        links = [link for link in links if set(link.axes) <= labels.keys()]
        if isinstance(taken, bool) or not links:
            return labels
        grid, axes = self._pulled(links, value, taken, self.values[result].shape)
        for index, axis in enumerate(axes):
            others = tuple(i for i in range(grid.ndim) if i != index)
            is_seen, label = (grid != ALONE).any(others), labels[axis]
            label = np.full(len(is_seen), ALONE if label is None else label) if not isinstance(
                label, np.ndarray) else label  # fmt: skip
            labels[axis] = np.where(is_seen, label, UNSEEN)
        return labels

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
        found = found.reshape([math.prod(shape[a] for a in link.result_axes) for link in links])
        for index, link in enumerate(links):
            size = math.prod(value.shape[axis] for axis in link.axes)
            if link.is_mixed:
                found = np.repeat(self.groups.united(found, index), size, index)
            elif link.positions is not None:
                taken = link.positions >= 0
                whole = np.full((*found.shape[:index], size, *found.shape[index + 1 :]), ALONE)
                at = (slice(None),) * index
                whole[(*at, link.positions[taken])] = found[(*at, taken)]
                found = whole
        axes = [axis for link in links for axis in link.axes]
        found = found.reshape([value.shape[axis] for axis in axes])
        return found.transpose(np.argsort(axes)), sorted(axes)

    def _of_weight(
        self, links: list[Link], value: Value, found: list[Label], shape: tuple[int, ...]
    ) -> dict[int, Label]:
        """The groups of a parameter's axes before its axes are moved about."""
        labels: dict[int, Label] = {}
        for link in links:
            if not link.axes:
                continue
            given = [found[axis] for axis in link.result_axes]
            if link.is_mixed:
                given = [self.groups.mixed(given)] * len(link.axes)
                labels.update(zip(link.axes, given, strict=True))
                continue
            if link.positions is not None:
                size = value.shape[link.axes[0]]
                # One index of several, of which nothing else is known, is one of a stack.
                is_one = shape[link.result_axes[0]] == 1 and _is_unseen(given[0])
                label = None if is_one else given[0]
                given = [moved(label, link.positions, size)]
            if link.parts > 1:
                given = [self.groups.repeated(given[0], shape[link.result_axes[0]], link.parts)]
            if len(given) > 1:
                given = [self.groups.merged(given, [shape[axis] for axis in link.result_axes])]
            if len(link.axes) > 1:
                given = self.groups.split(given[0], [value.shape[axis] for axis in link.axes])
            labels.update(zip(link.axes, given, strict=True))
        return labels


def _placed_along(grid: np.ndarray, axes: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Axes that stand first, each to where one of size 1 stands for it."""
    first, rest = list(range(len(axes))), list(range(len(axes), grid.ndim))
    order = [first[axes.index(a)] if a in axes else rest[a] for a in range(len(shape))]
    left = [rest[axis] for axis in axes]
    return grid.transpose([*order, *left]).reshape(shape)


def _is_unseen(label: Label) -> bool:
    return isinstance(label, int) and label == UNSEEN


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
