"""Which indices of an axis are coupled: partitions of an axis into groups, and their arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Label = Any  # None | int | np.ndarray
"""The groups of one axis: None (every index alone), one number (all indices in that group), or an
array with the group of each index, `ALONE` where it is in none. A group has the same number
wherever it appears, so that what was split into several arrays is found together again."""

ALONE = -1
WHOLE = 0
"""The group of what no use has told apart."""


class Groups:
    """The numbers of groups: new ones, those of pairs, and which have turned out to be the same."""

    def __init__(self) -> None:
        self._parent = [WHOLE]
        self._numbers: dict[Any, int] = {}

    def new(self, count: int = 1) -> int:
        """The first of `count` groups in a row that no index is in yet."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return first

    def named(self, key: Any) -> int:
        """The group of this name."""
        if key not in self._numbers:
            self._numbers[key] = self.new()
        return self._numbers[key]

    def _root(self, group: int) -> int:
        while self._parent[group] != group:
            self._parent[group] = self._parent[self._parent[group]]
            group = self._parent[group]
        return group

    def _unite(self, a: int, b: int) -> None:
        a, b = sorted((self._root(a), self._root(b)))
        self._parent[b] = a

    def resolved(self, label: Label) -> Label:
        """The same groups, each by one number only."""
        if label is None:
            return None
        if isinstance(label, int):
            return self._root(label)
        present, inverse = np.unique(label, return_inverse=True)
        roots = [g if g == ALONE else self._root(int(g)) for g in present]
        return np.array(roots, np.int64)[inverse.reshape(-1)].reshape(label.shape)

    def join(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Coupled by `a` or by `b`: the coarser partition that both refine."""
        self._unite_all(a, b)
        return self.resolved(np.where(a == ALONE, b, a))

    def united(self, label: np.ndarray, axis: int) -> np.ndarray:
        """`axis` shrunk to size 1: its indices are copies of one."""
        while (size := label.shape[axis]) > 1:
            half = size // 2
            first, second = label.take(range(half), axis), label.take(range(half, 2 * half), axis)
            rest = label.take(range(2 * half, size), axis)
            label = np.concatenate([self.join(first, second), rest], axis)
        return label

    def _unite_all(self, a: np.ndarray, b: np.ndarray) -> None:
        both = (a != ALONE) & (b != ALONE) & (a != b)
        for x, y in set(zip(a[both].tolist(), b[both].tolist(), strict=True)):
            self._unite(x, y)

    def meet(self, a: Label, b: Label) -> Label:
        """Coupled by `a` and by `b`: the finer partition that refines both."""
        if a is None or b is None:
            return None
        if isinstance(a, int):
            return b
        if isinstance(b, int):
            return a
        pairs, inverse = np.unique(np.stack([a, b]), axis=1, return_inverse=True)
        numbers = [
            ALONE if ALONE in pair else pair[0] if pair[0] == pair[1] else self.named(pair)
            for pair in map(tuple, pairs.T.tolist())
        ]
        return np.array(numbers, np.int64)[inverse.reshape(-1)]

    def merged(self, labels: Sequence[Label], sizes: Sequence[int]) -> Label:
        """The groups of one axis that is several side by side, the last one fastest."""
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
            ALONE if all(part < 0 for part in parts) else self.named(parts)
            for parts in (
                tuple(int(code[i]) for code, i in zip(codes, index, strict=True))
                for index in np.ndindex(*combined.shape)
            )
        ]
        return np.array(numbers, np.int64)[combined[np.ix_(*places)].reshape(-1)]

    def repeated(self, label: Label, size: int, count: int) -> Label:
        """The groups of an axis of `count` parts, each of `size` with groups like these."""
        if label is None or (isinstance(label, int) and label == WHOLE):
            return label
        part = np.full(size, label) if isinstance(label, int) else label
        numbers = [
            group if group == ALONE else self.named((group, index))
            for index in range(count)
            for group in part.tolist()
        ]
        return np.array(numbers, np.int64)

    def split(self, label: Label, sizes: Sequence[int]) -> list[Label]:
        """The groups of each of several axes that were merged into one."""
        if label is None or isinstance(label, int):
            return [label] * len(sizes)
        return self.along_axes(np.asarray(label).reshape(sizes))

    def along_axes(self, grid: np.ndarray) -> list[Label]:
        """The groups of each axis.

        Where groups do not lie along the axes, what is coupled on an axis is what is coupled at
        every index of the others.
        """
        return [self._rows(np.moveaxis(grid, axis, 0)) for axis in range(grid.ndim)]

    def _rows(self, grid: np.ndarray) -> Label:
        rows, inverse = np.unique(grid.reshape(len(grid), -1), axis=0, return_inverse=True)
        numbers = [
            ALONE if ALONE in row else row[0] if len(set(row)) == 1 else self.named(tuple(row))
            for row in rows.tolist()
        ]
        found = np.array(numbers, np.int64)[inverse.reshape(-1)]
        if (found == ALONE).all() or len(np.unique(found)) == len(found):
            return None
        return int(found[0]) if (found == found[0]).all() else found


def _codes(label: Label, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The groups that occur, an index that is alone as a negative number, and where they occur."""
    if label is None:
        return -1 - np.arange(size), np.arange(size)
    if isinstance(label, int):
        return np.array([label]), np.zeros(size, np.int64)
    return np.unique(np.where(label == ALONE, -1 - np.arange(size), label), return_inverse=True)


def moved(label: Label, positions: np.ndarray, size: int) -> Label:
    """The groups of an axis of `size` of which a result has some indices, with the groups `label`.

    `positions` has these indices, negative for what the result has from elsewhere. The others are
    not told apart.
    """
    taken = positions >= 0
    found = np.full(size, WHOLE, np.int64)
    if label is None:
        found[positions[taken]] = ALONE
    else:
        found[positions[taken]] = label if isinstance(label, int) else label[taken]
    return found
