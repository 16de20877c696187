"""What is known about an axis, and how merging, splitting and meeting axes changes it."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """The outputs of a use that lie along an axis, counted over all axes, the last one fastest."""

    distance: int
    """The stride between neighbours along the axis."""
    start: int
    stop: int


class Indices(enum.IntFlag):
    """Properties of the indices of an axis.

    Where axes meet, the result has the properties of both, until a rule removes one.
    """

    ANY = 0
    COUNTED = enum.auto()
    """0, 1, 2, ..."""
    ONE_HOT = enum.auto()
    """The vectors along the axis are one-hot."""
    FREQUENCIES = enum.auto()
    MEMBERS = enum.auto()
    """Each index has met its own kernel: members of an ensemble, experts."""
    PARTS = enum.auto()
    """The indices are outputs, or parts of one parameter's outputs, placed side by side."""


class Factor(NamedTuple):
    """What is known about an axis, or about one of several axes that were merged into it."""

    size: int
    features: Mapping[int, Part] = {}
    """The uses whose parameters' free axes this axis comes from."""
    own: frozenset[tuple[int, int]] = frozenset()
    """The axes of parameters, `(parameter, axis)`, that this axis still is."""
    moves: bool = False
    over: int = 0
    """The uses that ran over this axis, one bit each."""
    indices: Indices = Indices.ANY
    products: frozenset[tuple[int, int]] = frozenset()
    """The axes of element-wise products, `(step, axis)`, that this axis still is."""

    @property
    def is_apart(self) -> bool:
        """Whether its indices may be in different groups."""
        return bool(self.features) or Indices.PARTS in self.indices

    def without(self, indices: Indices) -> Factor:
        """The axis without these properties of its indices."""
        return self._replace(indices=self.indices & ~indices) if self.indices & indices else self


NOTHING = Factor(1)


def union(a: Factor, b: Factor) -> Factor:
    """What two descriptions of one axis say together."""
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
    """The descriptions of separate axes; those with the same outputs and distances are one."""
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
    """An axis about which nothing is known."""
    return (Factor(size),)


def whole(factors: Factors, size: int | None = None) -> Factor:
    """The factors of an axis as one, or as an axis of this size that comes from it."""
    found = factors[0]
    for factor in factors[1:]:
        found = union(found, factor)
    if len(factors) > 1 and not all(Indices.ONE_HOT in factor.indices for factor in factors):
        found = found.without(Indices.ONE_HOT)
    size = size if size is not None else int(np.prod([factor.size for factor in factors]))
    return found if found.size == size else found._replace(size=size)


def merged(a: Factors, b: Factors) -> Factors:
    """What is known about an axis of an element-wise function of two arrays."""
    if a is b or b == a:
        return a
    if len(a) == len(b) and all(x.size == y.size for x, y in zip(a, b, strict=True)):
        return tuple(map(union, a, b))
    for one, other in ((a, b), (b, a)):
        if len(one) == 1 and one[0]._replace(moves=False) == Factor(one[0].size):
            # One side says at most that the axis moves: the other side's factors stay separate.
            return tuple(f._replace(moves=f.moves or one[0].moves) for f in other)
    return (union(whole(a), whole(b)),)


def regrouped(factors: Sequence[Factor], sizes: Sequence[int]) -> list[Factors]:
    """Merges axes and splits them again; returns the factors of each new axis.

    Each part of a split factor keeps what is known about that factor. If borders do not fit, every
    new axis keeps what is known about all of them.
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
