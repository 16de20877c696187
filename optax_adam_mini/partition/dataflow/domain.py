"""The vocabulary of the inference: what is known of an array, and what a rule says of a step.

- A *feature* of an axis: the axis comes from the free axes of a parameter where that was used. In
  `h = x @ w` the last axis of `h` has the feature of that use of `w`.
- An axis is *apart* where its indices are to be told apart: it has features, or is put together
  from several arrays. In `concatenate([a, b])` the joined axis is apart.
- A *group* is a set of indices, or of coordinates, that are coupled: a block, where a grid can hold
  it.
- A *use*: a parameter meets data in a step. `x @ w` is a use of `w`.
- A *coupling*: coordinates of activations that act through one number, as the features of one head
  of `q` do in the score `q . k`.
- A *role* of a parameter's axis: what it is where the parameter is used. In `x @ w` the first axis
  of `w` is contracted, a `REDUCTION`, the second an `OUTPUT`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any

import numpy as np

from optax_adam_mini.partition.dataflow.program import Program, Step

Axes = tuple[int, ...]


class Kind(enum.IntEnum):
    """What a value depends on."""

    CONSTANT = 0
    WEIGHT = 1
    """On parameters only."""
    DATA = 2


@dataclasses.dataclass(eq=False)
class Value:
    """What is known of an array."""

    shape: tuple[int, ...]
    kind: Kind = Kind.CONSTANT
    is_rows: bool = False
    """Data that are rows of a parameter, chosen by an index: still the parameter where another
    axis of it is contracted."""
    params: frozenset[int] = frozenset()
    """The parameters that a weight is made of."""
    features: list[dict[int, int]] = dataclasses.field(default_factory=list)
    """For each axis, the uses of parameters whose free axes it comes from, with the distance
    between neighbours when those free axes are counted through, the last one fastest."""
    apart: list[bool] = dataclasses.field(default_factory=list)
    """For each axis, whether its indices are to be told apart: it has features, or is put together
    from several arrays."""
    iota: int | None = None
    """The axis along which it counts 0, 1, 2, ..."""
    one_hot: int | None = None
    """The axis along which it is a one-hot vector."""
    product: tuple[Step, int, int] | None = None
    """The step and the two operands, if it is their element-wise product."""

    def __post_init__(self) -> None:
        self.features = [{} for _ in self.shape]
        self.apart = [False for _ in self.shape]

    @property
    def shape_apart(self) -> tuple[int, ...]:
        """The shape without the axes whose indices need not be told apart."""
        return tuple(n if apart else 1 for n, apart in zip(self.shape, self.apart, strict=True))

    def state(self) -> tuple[Any, ...]:
        """What only grows."""
        return self.kind, self.is_rows, self.params, sum(map(len, self.features)), sum(self.apart)

    @property
    def is_weight(self) -> bool:
        """Whether its groups are those of a parameter's blocks."""
        return self.kind == Kind.WEIGHT or self.is_rows


@dataclasses.dataclass
class Link:
    """Axes of an operand that, merged into one, are the axes of a result, merged into one."""

    operand: int
    axes: Axes
    result_axes: Axes
    result: int = 0
    positions: np.ndarray | None = None
    """For each index of the result's axis that of the operand's, negative where it has none."""
    parts: int = 1
    """The result has one of so many parts of the operand's axis, all with the same groups."""


@dataclasses.dataclass
class Relation:
    """What a rule says of a step."""

    links: list[Link] = dataclasses.field(default_factory=list)
    cuts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(operand, axis): a parameter has a block at each index of this axis."""
    couplings: list[tuple[int, Axes]] = dataclasses.field(default_factory=list)
    """(operand, axes): activations are coupled along these axes."""
    uses: dict[int, Axes] = dataclasses.field(default_factory=dict)
    """For each operand that is a parameter meeting data here, the axes of the result that come from
    its free axes, in its own order."""
    in_groups: bool = False
    """The outputs of a kernel are in groups that each have their own inputs."""
    kind: Kind | None = None
    is_rows: bool = False
    iota: int | None = None
    one_hot: int | None = None
    product: tuple[Step, int, int] | None = None
    unread: bool = False
    """Nothing is known of the primitive."""
    chain: tuple[tuple[int, Axes, Axes], ...] = ()
    """Of a product of weights: (operand, its contracted axes, the result's axes from it)."""


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
class Facts:
    """What the forward pass found of a program, for the passes after it."""

    program: Program
    n_params: int
    """The first so many of the program's inputs are parameters."""
    values: list[Value]
    relations: list[Relation] = dataclasses.field(default_factory=list)
    """What the rules say of each step."""
    later: dict[int, Relation] = dataclasses.field(default_factory=dict)
    """Cuts and couplings of steps that a later step has found, by the steps' ids."""
    uses: dict[int, Use] = dataclasses.field(default_factory=dict)

    def inputs(self, step: Step) -> list[Value]:
        """The operands' values."""
        return [self.values[i] for i in step.inputs]

    def outputs(self, step: Step) -> list[Value]:
        """The results' values."""
        return [self.values[i] for i in step.outputs]

    def made(self, features: Iterable[dict[int, int]]) -> set[int]:
        """The parameters whose outputs these are."""
        numbers = {use for part in features for use in part if use >= 0}
        return set().union(*(self.uses[number].params for number in numbers))

    def makers(self, values: Iterable[Value]) -> set[int]:
        """The parameters that values are, or come from the outputs of."""
        found: set[int] = set()
        for value in values:
            found |= value.params if value.is_weight else set()
            found |= self.made(value.features)
        return found
