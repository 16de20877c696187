"""The vocabulary of the inference: what is known of an array, and what a rule says of a step.

- A *feature* of an axis: the axis comes from the free axes of a parameter where that was used. In
  `h = x @ w` the last axis of `h` has the feature of that use of `w`.
- An axis is a parameter's *own* where it is an axis of the parameter still: both axes of `w`, of
  `w.T`, of `w * mask`. An axis that a parameter was repeated along is not.
- An axis *moves* where data vary along it. In `w * mask` both axes are own, and move with the mask.
- A value is *combined* where data and a parameter met, and it is open whether as activations or as
  a kernel: a masked kernel, a scaled input, rows chosen by an index. Where an own axis of it is
  contracted with data it was a kernel; where a kernel takes it in it was data, *spent* there.
- A *group* is a set of indices, or of coordinates, that are coupled: a block, where a grid can hold
  it. An axis of activations is *apart* where its indices may be in different groups.
- A *use*: a parameter meets data in a step. `x @ w` is a use of `w`.
- A *coupling*: coordinates of activations that act through one number, as the features of one head
  of `q` do in the score `q . k`.
- A layer *ran over* an axis of data if it was applied at each of its indices: a dense layer runs
  over batch and positions. Of that layer's features, the axis is one of positions.
- A *role* of a parameter's axis: what it is where the parameter is used. In `x @ w` the first axis
  of `w` is contracted, a `REDUCTION`, the second an `OUTPUT`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_adam_mini.partition.dataflow.axes import (
    Factor,
    Factors,
    Indices,
    Part,
    blank,
    whole,
)
from optax_adam_mini.partition.dataflow.program import (
    COMPLEX,
    LAYOUT,
    LINEAR,
    PLACING,
    Program,
    Step,
)

Axes = tuple[int, ...]

# Element-wise functions that are not linear, and that layers are followed by.
FUNCTIONS = {
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "erf", "erfc",
    "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "log2", "logistic", "max", "min", "pow",
    "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip


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
    params: frozenset[int] = frozenset()
    """The parameters that it still is, alone or combined with data."""
    axes: list[Factors] = dataclasses.field(default_factory=list)
    made: int = 0
    """1 if it is a product of parameters, 2 if a function of one that is no product."""
    is_summary: bool = False
    """Parameters were summed over axes of their own to make it: a norm, a penalty."""
    is_plain: bool = False
    """A loop carries something else than parameters in it, sooner or later."""
    dropped: Factors = ()
    """What is known of the axes of size 1 that were left out."""
    is_fixed: bool = False
    """It is made of constants and of arrays that the function closes over."""
    mixtures: int = 0
    """The contractions of activations with activations that are behind it, each a bit."""

    def __post_init__(self) -> None:
        self.axes = self.axes or [blank(size) for size in self.shape]

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter still, alone or combined: its groups are those of blocks."""
        return bool(self.params)

    @property
    def is_combined(self) -> bool:
        """Whether data were combined with a parameter in it."""
        return self.kind == Kind.DATA and bool(self.params)

    def whole(self, axis: int) -> Factor:
        """What is known of an axis as one."""
        factors = self.axes[axis]
        return factors[0] if len(factors) == 1 else whole(factors, self.shape[axis])

    def features(self, axis: int) -> Mapping[int, Part]:
        """The features of an axis."""
        return self.whole(axis).features

    def is_own(self, axis: int) -> bool:
        """Whether an axis is a parameter's own."""
        return any(factor.own for factor in self.axes[axis])

    def is_copied(self, axis: int) -> bool:
        """Whether a parameter was repeated along an axis."""
        found = self.whole(axis)
        return found.size > 1 and not found.own and not found.moves

    def moves(self, axis: int) -> bool:
        """Whether data vary along an axis."""
        return self.shape[axis] > 1 and any(factor.moves for factor in self.axes[axis])

    @property
    def has_features(self) -> bool:
        """Whether outputs of parameters are in it."""
        return any(factor.features for factors in self.axes for factor in factors)

    @property
    def shape_apart(self) -> tuple[int, ...]:
        """The shape without the axes whose indices need not be told apart."""
        return tuple(
            size if any(factor.is_apart for factor in factors) else 1
            for size, factors in zip(self.shape, self.axes, strict=True)
        )


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
    is_mixed: bool = False
    """Every index of the operand's axes goes into every index of the result's."""
    is_lost: bool = False
    """Which index goes where is not known: features stay features, and couple nothing."""


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
    shifts: set[int] = dataclasses.field(default_factory=set)
    """Operands, parameters, that are no factors here: biases, where the result is spent."""
    scaled: set[int] = dataclasses.field(default_factory=set)
    """Operands, parameters, that data scale by one number: layers of one input, where the result is
    spent, unless they are gains in between."""
    gains: set[int] = dataclasses.field(default_factory=set)
    """Operands, parameters or combined, that scale data along their own axes."""
    spent: set[int] = dataclasses.field(default_factory=set)
    """Combined operands that are data here, and no parameters any more."""
    is_lookup: bool = False
    """Rows of a parameter are chosen by an index."""
    keeps: set[int] = dataclasses.field(default_factory=set)
    """Operands that are parameters still in the result, alone or combined."""
    in_groups: bool = False
    """The outputs of a kernel are in groups that each have their own inputs."""
    kind: Kind | None = None
    indices: dict[int, Indices] = dataclasses.field(default_factory=dict)
    """What the indices of the result's axes become."""
    ends: Indices = Indices.ANY
    """What the indices of the operands' axes are, and those of the result's are not."""
    is_product: bool = False
    """It is an element-wise product, whose sum would be an inner product."""
    keeps_dropped: bool = False
    """What is known of axes that were left out is known of the result."""
    drops: bool = True
    """What the operands are the product of, the result is not."""
    is_stopped: bool = False
    """No gradient goes back through it: the result is data."""
    made: int | None = None
    is_summary: bool = False
    is_mixture: bool = False
    """Activations are contracted with activations."""
    is_plain: bool = False
    unread: set[int] = dataclasses.field(default_factory=set)
    """Operands of which it is not known what the primitive makes of them."""
    chain: tuple[tuple[int, Axes, Axes], ...] = ()
    """Of a product of weights: (operand, its contracted axes, the result's axes from it)."""
    sums: list[tuple[Step, Relation]] = dataclasses.field(default_factory=list)
    """The products that are summed here, as the contractions that they are."""
    partner: dict[int, int] = dataclasses.field(default_factory=dict)
    """For each operand that is used, the operand that it meets."""


Trail = list[tuple[Step, Relation]]
"""Steps and what the rules say of them, in order."""


class Use(NamedTuple):
    """A parameter meets data in a step."""

    step: Step
    operand: int
    params: frozenset[int]
    is_lookup: bool = False
    partner: int | None = None
    """The operand that it meets."""
    ran_over: int = 0
    """The uses that ran over the axes of data that are contracted here, each a bit."""
    of_features: bool = False
    """The axes of data that are contracted here have features."""


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
    trail: Trail = dataclasses.field(default_factory=list)
    """What the rules say of each step, in order."""
    uses: dict[int, Use] = dataclasses.field(default_factory=dict)
    products: dict[int, Step] = dataclasses.field(default_factory=dict)
    """The steps that are element-wise products, by their ids."""
    given: set[int] = dataclasses.field(default_factory=set)
    """What loops carry and branches end with, as far as it was given."""
    summed: dict[tuple[int, int], Step] = dataclasses.field(default_factory=dict)
    """Products that are summed, each a step of its own, by their ids and those of the sums."""
    data: set[int] = dataclasses.field(default_factory=set)
    """The values that depend on more than parameters."""
    filters: set[int] = dataclasses.field(default_factory=set)
    """The products, by their ids, of filters that are written out."""
    taps: set[int] = dataclasses.field(default_factory=set)
    """The steps, by their ids, that take one index of such a filter."""
    numbers: dict[Any, int] = dataclasses.field(default_factory=dict)

    def number(self, key: Any) -> int:
        """The same small number for the same key."""
        return self.numbers.setdefault(key, len(self.numbers))

    def inputs(self, step: Step) -> list[Value]:
        """The operands' values."""
        return [self.values[i] for i in step.inputs]

    def outputs(self, step: Step) -> list[Value]:
        """The results' values."""
        return [self.values[i] for i in step.outputs]

    def known(self, step: Step, operand: int) -> np.ndarray | None:
        """The numbers that an operand is, where the program says them."""
        return self.program.known.get(step.inputs[operand])

    def made(self, features: Iterable[Mapping[int, Part]]) -> set[int]:
        """The parameters whose outputs these are."""
        numbers = {use for part in features for use in part}
        return set[int]().union(*(self.uses[number].params for number in numbers))

    def goes_through_functions(self, place: int) -> bool:
        """Whether a function that is not linear is applied to a value, element by element.

        To the value itself: what it is added to is followed no further, where that is data.
        """
        return bool(self.program.goes_into(place, self.data) & FUNCTIONS)

    def put_together(self, place: int) -> set[int]:
        """The steps that put what is made of a value beside something else, before it meets it."""
        seen, todo, found = {place}, [place], set[int]()
        while todo:
            place = todo.pop()
            for step in self.program.consumers.get(place, ()):
                others = [i for i in step.inputs if i != place]
                meets = step.name in ("mul", "div") and any(
                    self.values[other].has_features for other in others
                )
                if step.is_backward or meets or step.name not in LINEAR | LAYOUT | COMPLEX:
                    continue
                if step.name in PLACING and others:
                    found.add(id(step))
                todo += set(step.outputs) - seen
                seen.update(step.outputs)
        return found

    def makers(self, values: Iterable[Value]) -> set[int]:
        """The parameters that values are, or come from the outputs of."""
        found: set[int] = set()
        for value in values:
            found |= value.params
            found |= self.made(value.features(axis) for axis in range(len(value.shape)))
        return found

    def others_features(self, value: Value, axis: int, params: frozenset[int]) -> bool:
        """Whether an axis has features of other parameters than `params`."""
        return any(not self.uses[use].params <= params for use in value.features(axis))

    def acts(self, value: Value) -> bool:
        """Whether what a combined value is for another parameter is data."""
        axes = range(len(value.shape))
        return value.is_combined and (
            self.is_activation(value, axes)
            or any(value.moves(axis) and not value.is_own(axis) for axis in axes)
        )

    def is_rows(self, value: Value) -> bool:
        """Whether a combined value is rows of a parameter that were chosen by an index."""
        return any(
            self.uses[use].is_lookup and self.uses[use].params & value.params
            for axis in range(len(value.shape))
            for use in value.features(axis)
        )

    def is_activation(self, value: Value, axes: Iterable[int]) -> bool:
        """Whether a combined value is, along `axes`, what other parameters made."""
        return any(self.others_features(value, axis, value.params) for axis in axes)
