"""What is known of an axis, and what becomes of it where axes are merged, split and met."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Which outputs of a use lie along an axis, all counted through, the last axis fastest."""

    distance: int
    """Between neighbours along the axis."""
    start: int
    stop: int


class Indices(enum.IntFlag):
    """What the indices of an axis are: where axes meet, what either's are, until a rule ends it."""

    ANY = 0
    COUNTED = enum.auto()
    """0, 1, 2, ..."""
    ONE_HOT = enum.auto()
    """Choices: vectors along the axis are one-hot."""
    FREQUENCIES = enum.auto()
    MEMBERS = enum.auto()
    """Each has met a kernel of its own: members of an ensemble, experts."""
    PARTS = enum.auto()
    """Parts of one parameter's outputs that were put side by side."""


class Factor(NamedTuple):
    """What is known of an axis, or of one of several axes that were merged into it."""

    size: int
    features: Mapping[int, Part] = {}
    """The uses of parameters whose free axes it comes from."""
    own: frozenset[tuple[int, int]] = frozenset()
    """The axes of parameters, `(parameter, axis)`, that it still is."""
    moves: bool = False
    over: int = 0
    """The uses that ran over it, each a bit."""
    indices: Indices = Indices.ANY
    products: frozenset[tuple[int, int]] = frozenset()
    """The element-wise products, `(step, axis)`, of which this is an axis."""

    @property
    def is_apart(self) -> bool:
        """Whether its indices may be in different groups."""
        return bool(self.features) or Indices.PARTS in self.indices

    def without(self, indices: Indices) -> Factor:
        """The axis, if its indices are not these any more."""
        return self._replace(indices=self.indices & ~indices) if self.indices & indices else self


NOTHING = Factor(1)


def union(a: Factor, b: Factor) -> Factor:
    """What is known of an axis from two sides."""
    if a is b:
        return a
    features = a.features
    if b.features and b.features is not features:
        features = {**a.features}
        for use, part in b.features.items():
            old = features.get(use, part)
            features[use] = Part(
                min(old.distance, part.distance),
                min(old.start, part.start),
                max(old.stop, part.stop),
            )
        features = a.features if features == a.features else features
    return Factor(
        a.size,
        features,
        a.own | b.own,
        a.moves or b.moves,
        a.over | b.over,
        a.indices if a.indices == b.indices else a.indices | b.indices,
        a.products | b.products,
    )


Factors = tuple[Factor, ...]


def beside(a: Factors, b: Factors) -> Factors:
    """What is known of several axes apart, those as one that count the same outputs alike."""
    found = list(a)
    distances = lambda factor: {use: part.distance for use, part in factor.features.items()}
    for factor in b:
        alike = [i for i, old in enumerate(found) if distances(old) == distances(factor)]
        if alike:
            found[alike[0]] = union(found[alike[0]], factor)
        elif factor != NOTHING:
            found.append(factor)
    return tuple(found)


@functools.cache
def blank(size: int) -> Factors:
    """An axis of which nothing is known."""
    return (Factor(size),)


def whole(factors: Factors, size: int | None = None) -> Factor:
    """What is known of an axis as one, or of another axis of this size that comes from it."""
    found = factors[0]
    for factor in factors[1:]:
        found = union(found, factor)
    if len(factors) > 1 and not all(Indices.ONE_HOT in factor.indices for factor in factors):
        found = found.without(Indices.ONE_HOT)
    size = size if size is not None else int(np.prod([factor.size for factor in factors]))
    return found if found.size == size else found._replace(size=size)


def merged(a: Factors, b: Factors) -> Factors:
    """What is known of an axis from two arrays, element by element."""
    if a is b or b == a:
        return a
    if len(a) == len(b) and all(x.size == y.size for x, y in zip(a, b, strict=True)):
        return tuple(map(union, a, b))
    for one, other in ((a, b), (b, a)):
        if len(one) == 1 and one[0]._replace(moves=False) == Factor(one[0].size):
            # Nothing but that it moves: what was merged can still be told apart.
            return tuple(f._replace(moves=f.moves or one[0].moves) for f in other)
    return (union(whole(a), whole(b)),)


def regrouped(factors: Sequence[Factor], sizes: Sequence[int]) -> list[Factors]:
    """Axes that are merged and split again: the factors of each of the new axes.

    A factor that is split is in all its parts. Where the borders do not fit, all is in all.
    """
    rest = [factor for factor in factors if factor.size != 1][::-1]
    found: list[Factors] = []
    for size in sizes:
        own: list[Factor] = []
        left = size
        while left > 1 and rest:
            factor = rest.pop()
            if left % factor.size == 0:
                own.append(factor)
                left //= factor.size
            elif factor.size % left == 0:
                inner = factor.size // left
                slow = {
                    use: part._replace(distance=part.distance * inner)
                    for use, part in factor.features.items()
                }
                own.append(factor._replace(size=left, features=slow))
                rest.append(factor._replace(size=inner))
                left = 1
            else:
                every = whole(tuple(factors))
                return [(every._replace(size=size),) for size in sizes]
        found.append(tuple(own) or blank(size))
    return found
