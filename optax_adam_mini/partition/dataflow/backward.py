"""The backward pass: follows couplings from inner products back to the parameters.

For every coordinate of activations it finds the scores that the coordinate acts through. Two
coordinates of a value are coupled only if every use of the value couples them. A coordinate that
acts through anything but scores is alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from optax_adam_mini.partition.dataflow.domain import (
    Combines,
    Facts,
    Kind,
    Link,
    Relation,
    Trail,
    Value,
)
from optax_adam_mini.partition.dataflow.groups import (
    ALONE,
    UNSEEN,
    WHOLE,
    Acts,
    Groups,
    Label,
    are_all,
)
from optax_adam_mini.partition.dataflow.program import SUMS, TAKES, Step

_MANY = 20  # passes; a loop that has not settled by then never will


def find_groups(facts: Facts, trail: Trail) -> list[list[Label]]:
    """For every value that is still a parameter, the groups of each axis."""
    return _Backward(facts, trail).run()


class _Backward:
    """The pass, repeated until loops have settled, and the groups that it makes."""

    def __init__(self, facts: Facts, trail: Trail):
        self.trail = trail
        self.facts, self.values = facts, facts.values
        self.groups = Groups()
        self.acts: list[Acts] = [UNSEEN] * len(self.values)
        """The scores that each coordinate of activations acts through."""
        for place in facts.program.losses:
            self.acts[place] = ALONE
        self.labels: list[list[Label]] = []
        self.spent = [False] * len(self.values)
        """Whether each value is spent: a combined value that acts as data."""
        self.gains = [False] * len(self.values)
        """Whether each parameter scales data along its own axes, here or in a later step."""
        self.open = [False] * len(self.values)
        """Whether each parameter's coordinates act alone where no use has seen them together."""
        for place in facts.program.losses:
            self.spent[place] = facts.acts(self.values[place])
        self._products = {id(step) for step in facts.summed.values()}
        self._pieces: dict[int, int] = {}
        self._couplings: dict[tuple[int, int, tuple[int, ...]], np.ndarray] = {}

    def run(self) -> list[list[Label]]:
        """The result of `find_groups`."""
        count = 0
        while True:
            count += 1
            before = self.labels, [*self.acts], [*self.spent]
            # Start the labels again, with what is known about activations by now.
            self.labels = [[UNSEEN] * len(value.shape) for value in self.values]
            for step, relation in reversed(self.trail):
                self._give_back(step, relation)
            if _equal(before, (self.labels, self.acts, self.spent)):
                for place, is_open in enumerate(self.open):
                    if is_open:
                        self.labels[place] = [
                            None if _is_unseen(label) else label for label in self.labels[place]
                        ]
                return self.labels
            if count > _MANY:  # it mixes ever more: cut finer than needed
                for place, (old, new) in enumerate(zip(before[1], self.acts, strict=True)):
                    if not _equal(old, new):
                        self.acts[place] = ALONE

    def _give_back(self, step: Step, relation: Relation) -> None:
        """Carries what is known about the results of a step back to its operands."""
        if step.is_backward:  # a derivative is cut as its forward pass is
            return
        links: dict[tuple[int, int], list[Link]] = {}
        told: dict[int, set[int]] = {}
        for link in relation.links:
            if not link.is_lost:
                links.setdefault((link.operand, link.result), []).append(link)
        # Summed products act through the sum. No gradient passes through a comparison.
        if id(step) not in self._products and not relation.is_stopped:
            for operand, place in enumerate(step.inputs):
                if self.values[place].kind == Kind.DATA and not are_all(self.acts[place], ALONE):
                    found = self._of_data(step, relation, operand, links)
                    self.acts[place] = self.groups.both(self.acts[place], found)
        for (operand, result), found in links.items():
            place, result_place = step.inputs[operand], step.outputs[result]
            value, shape = self.values[place], self.values[result_place].shape
            if operand in relation.keeps:
                is_tap = id(step) in self.facts.taps
                labels = self._of_weight(found, value, result_place, is_tap)
                self._refine(place, labels)
            elif operand in relation.uses:
                acts = self.acts[result_place]
                labels = self._of_outputs(found, relation, operand, value, acts, shape)
                self._refine(place, labels)
                told[operand] = told.get(operand, set()) | labels.keys()
        for operand in relation.keeps:
            place = step.inputs[operand]
            self.gains[place] |= relation.combines.get(operand) == Combines.GAIN or any(
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
            # In `x (a b)`, `a` meets the data first: the contracted axis is an output of `a`.
            labels = [self.labels[step.outputs[0]][axis] for axis in free]
            if labels and not any(map(_is_unseen, labels)):
                is_first = all(isinstance(label, int) for label in labels)
                label = None if is_first else WHOLE
                self._refine(step.inputs[operand], dict.fromkeys(contracted, label))
        for operand, axis in relation.cuts:
            self._refine(step.inputs[operand], {axis: None})

    def _acts_alone(self, step: Step, relation: Relation, operand: int) -> bool:
        """Whether each coordinate of a parameter acts alone if the result is data."""
        what = relation.combines.get(operand)
        is_gain = any(self.gains[place] for place in step.outputs)
        return what == Combines.SHIFT or (what == Combines.SCALED and not is_gain)

    def _spend(self, step: Step, relation: Relation, operand: int) -> None:
        """Marks a combined value as data: a parameter that is not a factor in it is a bias."""
        place = step.inputs[operand]
        self.spent[place] = True
        value = self.values[place]
        own = [a for a, size in enumerate(value.shape) if size > 1 and value.is_own(a)]
        if self.facts.is_rows(value):  # a row, or a part of it, is one block
            self._refine(place, dict.fromkeys(own, WHOLE))
        if self._acts_alone(step, relation, operand):
            self._refine(place, dict.fromkeys(own))

    def _refine(self, place: int, others: dict[int, Label]) -> None:
        labels = self.labels[place]
        for axis, label in others.items():
            labels[axis] = self.groups.meet(labels[axis], label)

    def _of_data(
        self,
        step: Step,
        relation: Relation,
        operand: int,
        links: dict[tuple[int, int], list[Link]],
    ) -> Acts:
        """The scores that an operand that is data acts through in a step."""
        value = self.values[step.inputs[operand]]
        sums = [product for _, product in relation.sums]
        if operand in relation.uses:
            return ALONE
        coupled = [axes for index, axes in relation.couplings if index == operand]
        if any(product.couplings for product in sums):
            coupled.append(tuple(step.params["axes"]))
        found: Acts = UNSEEN
        for axes in coupled:
            found = self.groups.both(found, self._coupling(step, operand, axes))
        if coupled:
            return found
        is_sum = step.name in SUMS and not any(r.is_mixture or r.uses for r in (relation, *sums))
        for result, place in enumerate(step.outputs):
            acts = self.acts[place]
            if are_all(acts, UNSEEN) or are_all(found, ALONE):
                continue
            own = links.get((operand, result), [])
            shape = self.values[place].shape
            found = self.groups.both(found, self._through(step, own, value, acts, shape, is_sum))
        return found

    def _through(
        self,
        step: Step,
        links: list[Link],
        value: Value,
        acts: Acts,
        shape: tuple[int, ...],
        is_sum: bool,
    ) -> Acts:
        """What an operand acts through, by way of a result of `shape` that acts through `acts`."""
        apart = value.shape_apart
        links = [k for k in links if k.positions is not None or any(apart[a] > 1 for a in k.axes)]
        linked = {axis for link in links for axis in link.axes}
        gone = [axis for axis, size in enumerate(apart) if size > 1 and axis not in linked]
        is_taken = step.name in TAKES
        if gone and not (is_sum or is_taken):
            return ALONE
        if are_all(acts, ALONE) and all(k.positions is None for k in links):
            return ALONE
        grid, axes = self._pulled(links, value, acts, shape, step)
        for index, axis in enumerate(axes):
            if apart[axis] == 1:
                grid = self.groups.united(grid, index)
        sizes = [1 if axis in gone else size for axis, size in enumerate(apart)]
        grid = grid.reshape(sizes)
        if gone and not is_taken:
            grid = self.groups.through(grid, step)
        elif gone:  # each of its indices by itself, as in a loop over heads
            count = math.prod(value.shape[axis] for axis in gone)
            each = self.groups.repeated(grid.ravel(), grid.size, count)
            each = np.asarray(each).reshape(*(value.shape[axis] for axis in gone), *sizes)
            grid = _placed_along(each, gone, apart)
        return _simple(np.broadcast_to(grid, apart))

    def _coupling(self, step: Step, operand: int, axes: tuple[int, ...]) -> np.ndarray:
        """The groups of an operand that is coupled along `axes`, one per index of the others."""
        key = id(step), operand, axes
        if key not in self._couplings:
            shape = self.values[step.inputs[operand]].shape_apart
            apart = [1 if axis in axes else size for axis, size in enumerate(shape)]
            first = self.groups.new(int(np.prod(apart)))
            numbers = first + np.arange(np.prod(apart)).reshape(apart)
            self._couplings[key] = np.broadcast_to(numbers, shape).copy()
        return self._couplings[key]

    def _of_outputs(
        self,
        links: list[Link],
        relation: Relation,
        operand: int,
        value: Value,
        acts: Acts,
        shape: tuple[int, ...],
    ) -> dict[int, Label]:
        """The groups of a parameter's axes at a use, from what its outputs act through.

        Outputs that nothing uses are alone, for example if only their derivative is taken.
        """
        outputs = set(relation.uses[operand])
        batch = {axis for cut, axis in relation.cuts if cut == operand}
        links = [
            link for link in links if set(link.result_axes) <= outputs or batch & set(link.axes)
        ]
        if are_all(acts, ALONE) or np.all(np.equal(acts, UNSEEN)):
            return dict.fromkeys(axis for link in links for axis in link.axes)
        grid, axes = self._pulled(links, value, acts, shape)
        return dict(zip(axes, self.groups.along_axes(grid), strict=True))

    def _pulled(
        self,
        links: list[Link],
        value: Value,
        acts: Acts,
        shape: tuple[int, ...],
        step: Step | None = None,
    ) -> tuple[np.ndarray, list[int]]:
        """The groups of a result, over the operand's axes in `links`, and these axes in order.

        An index acts through everything that it acts through at any index of the result's other
        axes.
        """
        found = np.full((1,) * len(shape), acts) if isinstance(acts, int) else acts
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
                found = self.groups.through(self.groups.united(found, index), step)
                found = np.repeat(found, size, index)
            elif link.positions is not None:
                found = self.groups.put(found, link.positions, size, index)
        axes = [axis for link in links for axis in link.axes]
        found = found.reshape([value.shape[axis] for axis in axes])
        return found.transpose(np.argsort(axes)), sorted(axes)

    def _of_weight(
        self,
        links: list[Link],
        value: Value,
        result_place: int,
        is_tap: bool,
    ) -> dict[int, Label]:
        """The groups of a parameter's axes, from those of a result that is still a parameter."""
        found, shape = self.labels[result_place], self.values[result_place].shape
        labels: dict[int, Label] = {}
        for link in links:
            if not link.axes:
                continue
            given = [found[axis] for axis in link.result_axes]
            if link.is_mixed:
                given = [self.groups.mixed(given)] * len(link.axes)
                labels.update(zip(link.axes, given, strict=True))
                continue
            if len(given) > 1:
                given = [self.groups.merged(given, [shape[axis] for axis in link.result_axes])]
            if link.positions is not None:
                size = value.shape[link.axes[0]]
                # A single index about which nothing else is known is one layer of a stack.
                is_one = len(link.positions) == 1 and _is_unseen(given[0])
                label = None if is_one and not is_tap else given[0]
                if isinstance(label, int) and label == WHOLE and len(link.positions) < size:
                    label = self._of_piece(result_place)
                given = [self.groups.moved(label, link.positions, size)]
            if link.parts > 1:
                given = [self.groups.repeated(given[0], shape[link.result_axes[0]], link.parts)]
            if len(link.axes) > 1:
                given = self.groups.split(given[0], [value.shape[axis] for axis in link.axes])
            labels.update(zip(link.axes, given, strict=True))
        return labels

    def _of_piece(self, place: int) -> int:
        """The group of a piece of a parameter: a layer of its own, unless pieces are joined again.

        Pieces that are joined again share a group, named by the last step that joins them.
        """
        if place not in self._pieces:
            together = self.facts.put_together(place)
            last = [step for step in self.facts.program.steps if id(step) in together][-1:]
            self._pieces[place] = self.groups.named(("piece", id(last[0]) if last else place))
        return self._pieces[place]


def _placed_along(grid: np.ndarray, axes: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Moves the leading axes to `axes`, where `grid` has placeholders of size 1."""
    first, rest = list(range(len(axes))), list(range(len(axes), grid.ndim))
    order = [first[axes.index(a)] if a in axes else rest[a] for a in range(len(shape))]
    left = [rest[axis] for axis in axes]
    return grid.transpose([*order, *left]).reshape(shape)


def _simple(grid: np.ndarray) -> Acts:
    """`ALONE` or `UNSEEN` if all coordinates are that, otherwise the grid."""
    first = int(grid.flat[0]) if grid.size else UNSEEN
    return first if first in (ALONE, UNSEEN) and (grid == first).all() else grid


def _is_unseen(label: Label) -> bool:
    return isinstance(label, int) and label == UNSEEN


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
