"""Groups of coupled coordinates, and their arithmetic.

A group is a number. It is the same wherever the group appears, so that an array that was split into
several is found together again. For activations, a group stands for the scores that a coordinate
acts through: a coordinate with several uses acts through the scores of all of them, and coordinates
that act through the same scores are coupled. For parameters, a group stands for a block along one
axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Label = Any  # None | int | np.ndarray
"""The groups of one axis: None (every index alone), one number (all indices in that group), or an
array with the group of each index (`ALONE` if it is in none)."""

Acts = Any  # int | np.ndarray
"""The groups of all coordinates of activations, as an array with size 1 for each axis that is not
apart; or `ALONE` or `UNSEEN`, if that holds for all coordinates."""

UNSEEN = -2
"""The group of indices about which no use has said anything."""
ALONE = -1
"""The group of indices that act by themselves."""
WHOLE = 0
"""The group of indices that a use has seen and not separated."""


def are_all(acts: Acts, group: int) -> bool:
    """Whether all coordinates are known to be in `group`."""
    return isinstance(acts, int) and acts == group


class Groups:
    """Numbers groups: new ones, and those made of other groups."""

    def __init__(self) -> None:
        self._count = WHOLE + 1
        self._numbers: dict[Any, int] = {}
        self._members: dict[int, frozenset[int]] = {}

    def new(self, count: int = 1) -> int:
        """The first of `count` consecutive groups that no index is in yet."""
        first = self._count
        self._count += count
        return first

    def named(self, key: Any) -> int:
        """The group of this name."""
        if key not in self._numbers:
            self._numbers[key] = self.new()
        return self._numbers[key]

    def _union(self, groups: Iterable[int]) -> int:
        """The group of a coordinate that acts through all of these."""
        found = set(groups)
        if ALONE in found:
            return ALONE
        found.discard(UNSEEN)
        if len(found) < 2:
            return next(iter(found), UNSEEN)
        members = frozenset[int]().union(*(self._members.get(g, (g,)) for g in found))
        number = self.named(members)
        self._members[number] = members
        return number

    def _of_rows(self, rows: np.ndarray) -> np.ndarray:
        """For each row, the group of a coordinate that acts through all groups of the row."""
        rows, inverse = _unique_rows(rows)
        found = [self._union(row) for row in rows.tolist()]
        return np.array(found, np.int64)[inverse.reshape(-1)]

    def both(self, a: Acts, b: Acts) -> Acts:
        """The groups of coordinates that act through `a` and through `b`."""
        if are_all(a, ALONE) or are_all(b, UNSEEN):
            return a
        if are_all(b, ALONE) or are_all(a, UNSEEN):
            return b
        if np.array_equal(a, b):
            return a
        shape = np.broadcast_shapes(np.shape(a), np.shape(b))
        rows = np.stack([np.broadcast_to(x, shape).ravel() for x in (a, b)], -1)
        found = self._of_rows(rows)
        return ALONE if (found == ALONE).all() else found.reshape(shape)

    def united(self, label: np.ndarray, axis: int) -> np.ndarray:
        """The groups with `axis` shrunk to size 1, because its indices are copies of one index."""
        if label.shape[axis] == 1:
            return label
        rows = np.moveaxis(label, axis, -1)
        found = self._of_rows(rows.reshape(-1, label.shape[axis]))
        return np.expand_dims(found.reshape(rows.shape[:-1]), axis)

    def through(self, grid: np.ndarray, step: Any) -> np.ndarray:
        """The groups of coordinates that act through a number, which acts through `grid`.

        If the number acts through one score, that score stays the group. If it acts through
        several, as the norm of all heads does, the number itself couples what goes into it.
        """
        groups, inverse = np.unique(grid, return_inverse=True)
        found = [
            self.named(("through", id(step), group)) if group in self._members else group
            for group in groups.tolist()
        ]
        return np.array(found, np.int64)[inverse.reshape(-1)].reshape(grid.shape)

    def meet(self, a: Label, b: Label) -> Label:
        """What both `a` and `b` couple: the partition that refines both."""
        if a is None or b is None:
            return None
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b) if min(a, b) <= WHOLE or a == b else self.named((a, b))
        if isinstance(a, int) or isinstance(b, int):
            one, other = (a, b) if isinstance(a, int) else (b, a)
            return other if one == UNSEEN else np.where(other == UNSEEN, one, other)
        pairs, inverse = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
        numbers = [
            ALONE if ALONE in pair
            else max(pair) if UNSEEN in pair or WHOLE in pair or pair[0] == pair[1]
            else self.named(pair)
            for pair in map(tuple, pairs.T.tolist())
        ]  # fmt: skip
        return np.array(numbers, np.int64)[inverse.reshape(-1)]

    def merged(self, labels: Sequence[Label], sizes: Sequence[int]) -> Label:
        """The groups of several axes merged into one, the last one fastest."""
        labels = [label for label, size in zip(labels, sizes, strict=True) if size > 1]
        sizes = [size for size in sizes if size > 1]
        if all(label is None for label in labels):
            return None
        if len(labels) == 1:
            return labels[0]
        if all(isinstance(label, int) for label in labels):
            return labels[0] if len(set(labels)) == 1 else self.named(tuple(labels))
        codes, places = zip(*map(_codes, labels, sizes), strict=True)
        combined = np.arange(math.prod(map(len, codes))).reshape([len(code) for code in codes])
        numbers = [
            ALONE if all(part < UNSEEN for part in parts) else self.named(parts)
            for parts in (
                tuple(int(code[i]) for code, i in zip(codes, index, strict=True))
                for index in np.ndindex(*combined.shape)
            )
        ]
        return np.array(numbers, np.int64)[combined[np.ix_(*places)].reshape(-1)]

    def put(self, grid: np.ndarray, positions: np.ndarray, size: int, axis: int) -> np.ndarray:
        """The groups with an axis of `size` for `axis`, which has some of its indices.

        `positions` has the index for each place along `axis`, or a negative number if there is
        none. An index that is there more than once acts through all its copies.
        """
        shape = (*grid.shape[:axis], size, *grid.shape[axis + 1 :])
        at: tuple[Any, ...] = (slice(None),) * axis
        result: Acts = UNSEEN
        for once in each_once(positions):
            taken, found = once >= 0, np.full(shape, UNSEEN)
            found[(*at, once[taken])] = grid[(*at, taken)]
            result = self.both(result, found)
        return np.broadcast_to(result, shape)

    def moved(self, label: Label, positions: np.ndarray, size: int) -> Label:
        """The groups of an axis of `size` from those of a result, `label`, that has its indices.

        `positions` has the axis's index for each index of the result, or a negative number if there
        is none. An index that is there more than once gets what all its copies allow. Nothing is
        known about indices that are not there.
        """
        result: Label = UNSEEN
        for once in each_once(positions):
            taken, found = once >= 0, np.full(size, UNSEEN, np.int64)
            every = ALONE if label is None else label
            found[once[taken]] = every if isinstance(every, int) else every[taken]
            result = self.meet(result, found)
        return result

    def repeated(self, label: Label, size: int, count: int) -> Label:
        """The groups of an axis of `count` parts, each of `size` with groups like these."""
        if label is None or (isinstance(label, int) and label in (UNSEEN, WHOLE)):
            return label
        part = np.full(size, label) if isinstance(label, int) else label
        numbers = [
            group if group in (ALONE, UNSEEN) else self.named((group, index))
            for index in range(count)
            for group in part.tolist()
        ]
        return np.array(numbers, np.int64)

    def mixed(self, labels: Sequence[Label]) -> Label:
        """The groups of an axis, every index of which contributes to every index of other axes."""
        if not labels:
            return WHOLE
        return self.merged(labels, [2] * len(labels)) if _are_ints(labels) else None

    def split(self, label: Label, sizes: Sequence[int]) -> list[Label]:
        """The groups of each of several axes that were merged into one."""
        if label is None or isinstance(label, int):
            return [label] * len(sizes)
        return self.along_axes(np.asarray(label).reshape(sizes))

    def along_axes(self, grid: np.ndarray) -> list[Label]:
        """The groups of each axis.

        Two indices of an axis are coupled only if they are coupled at every index of the others.
        """
        return [self._rows(np.moveaxis(grid, axis, 0)) for axis in range(grid.ndim)]

    def _rows(self, grid: np.ndarray) -> Label:
        rows, inverse = np.unique(grid.reshape(len(grid), -1), axis=0, return_inverse=True)
        numbers = [
            ALONE if ALONE in row else row[0] if len(set(row)) == 1 else self.named(tuple(row))
            for row in rows.tolist()
        ]
        found = np.array(numbers, np.int64)[inverse.reshape(-1)]
        is_seen = (grid.reshape(len(grid), -1) != UNSEEN).any(1)
        found = np.where(is_seen, found, UNSEEN)
        if is_seen.all() and ((found == ALONE).all() or len(np.unique(found)) == len(found) > 1):
            return None
        return int(found[0]) if (found == found[0]).all() else found


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique` of rows. Pairs are encoded as one number each, which is ten times as fast."""
    if rows.shape[1] != 2:
        return np.unique(rows, axis=0, return_inverse=True)
    first = rows.min(initial=0)
    span = int(rows.max(initial=0)) - first + 1
    keys = (rows[:, 0] - first) * span + rows[:, 1] - first
    _, index, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return rows[index], inverse


def _are_ints(labels: Sequence[Label]) -> bool:
    return all(isinstance(label, int) for label in labels)


def _codes(label: Label, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups that occur and their places; each index that is alone has its own number."""
    alone = UNSEEN - 1 - np.arange(size)
    if label is None:
        return alone, np.arange(size)
    if isinstance(label, int):
        return np.array([label]), np.zeros(size, np.int64)
    return np.unique(np.where(label == ALONE, alone, label), return_inverse=True)


def each_once(positions: np.ndarray) -> list[np.ndarray]:
    """Splits positions into arrays without repeated indices: the first copies, the second ones, ...

    An array has -1 where the index is in another one.
    """
    taken = positions[positions >= 0]
    if len(set(taken.tolist())) == len(taken):
        return [positions]
    order = np.argsort(positions, kind="stable")
    first = np.searchsorted(positions[order], positions[order])
    copy = np.empty(len(positions), np.int64)
    copy[order] = np.arange(len(positions)) - first
    copy[positions < 0] = 0
    return [np.where(copy == i, positions, -1) for i in range(copy.max(initial=0) + 1)]
