"""The terms of the inference: what is known about an array, and what a rule says about a step.

- An axis has a *feature* if it comes from the free axes of a parameter at one of its uses. In
  `h = x @ w` the last axis of `h` has the feature of that use of `w`.
- An axis is a parameter's *own* while it is still an axis of the parameter: both axes of `w`, of
  `w.T`, of `w * mask`. An axis along which a parameter was repeated is not its own.
- An axis *moves* if data vary along it. In `w * mask` both axes are own, and move with the mask.
- A value is *combined* if a parameter met data in it and may still act as activations or as a
  kernel: a masked kernel, a scaled input, rows chosen by an index. If one of its own axes is later
  contracted with data, it was a kernel. If a kernel takes it in, it was data, and is *spent* there.
- A *group* is a set of coupled indices or coordinates: a block, if a grid can hold it. An axis of
  activations is *apart* if its indices may be in different groups.
- A *use* is a step in which a parameter meets data. `x @ w` is a use of `w`.
- A *coupling* joins coordinates of activations that act through one number, as the features of one
  head of `q` do in the score `q . k`.
- A layer *ran over* an axis of data if it was applied at each index of the axis: a dense layer runs
  over batch and positions. For the features of that layer, the axis holds positions.
- The *role* of a parameter's axis is what the axis does where the parameter is used. In `x @ w` the
  first axis of `w` is contracted, a `REDUCTION`, and the second is an `OUTPUT`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Set
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
    STOPPING,
    Axes,
    Program,
    Step,
    depending,
)

# Nonlinear element-wise functions that may follow a layer.
FUNCTIONS = {
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "erf", "erfc",
    "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "log2", "logistic", "max", "min", "pow",
    "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip


class Kind(enum.IntEnum):
    """What a value depends on."""

    CONSTANT = 0
    WEIGHT = 1
    """Only on parameters."""
    DATA = 2


@dataclasses.dataclass(eq=False)
class Value:
    """What is known about an array."""

    shape: tuple[int, ...]
    kind: Kind = Kind.CONSTANT
    params: frozenset[int] = frozenset()
    """The parameters that the array still is, alone or combined with data."""
    axes: list[Factors] = dataclasses.field(default_factory=list)
    made: int = 0
    """1 for a product of parameters, 2 for a nonlinear function of such a product, or of a
    parameter combined with data; else 0."""
    is_summary: bool = False
    """It sums parameters over their own axes: a norm, a penalty."""
    is_plain: bool = False
    """A loop carries something other than parameters in it, at least in some iteration."""
    dropped: Factors = ()
    """What is known about the axes of size 1 that were dropped."""
    is_fixed: bool = False
    """It is computed only from constants and arrays that the function closes over."""
    mixtures: int = 0
    """The contractions of activations with activations that it depends on, one bit each."""

    def __post_init__(self) -> None:
        self.axes = self.axes or [blank(size) for size in self.shape]

    @property
    def is_weight(self) -> bool:
        """Whether it is still a parameter, alone or combined: its groups are then blocks."""
        return bool(self.params)

    @property
    def is_combined(self) -> bool:
        """Whether it combines a parameter with data."""
        return self.kind == Kind.DATA and bool(self.params)

    def whole(self, axis: int) -> Factor:
        """What is known about an axis, its factors merged into one."""
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
        """Whether any axis has the outputs of a parameter."""
        return any(factor.features for factors in self.axes for factor in factors)

    @property
    def shape_apart(self) -> tuple[int, ...]:
        """The shape, with size 1 for each axis that is not apart."""
        return tuple(
            size if any(factor.is_apart for factor in factors) else 1
            for size, factors in zip(self.shape, self.axes, strict=True)
        )


@dataclasses.dataclass
class Link:
    """Axes of an operand and the axes of a result that they become, each set merged into one."""

    operand: int
    axes: Axes
    result_axes: Axes
    result: int = 0
    positions: np.ndarray | None = None
    """For each index of the result's axis, the operand's index, or a negative number if none."""
    parts: int = 1
    """The result has one of this many parts of the operand's axis; all have the same groups."""
    is_mixed: bool = False
    """Every index of the operand's axes contributes to every index of the result's."""
    is_lost: bool = False
    """It is unknown which index goes where: features stay features, and couple nothing."""


class Combines(enum.Enum):
    """What a parameter does to data that it is combined with."""

    SHIFT = enum.auto()
    """It is added: a bias if the result is spent."""
    SCALED = enum.auto()
    """Data scale it by one number. If the result is spent, it is a layer with one input, unless it
    acts as a gain in between."""
    GAIN = enum.auto()
    """It scales the data along its own axes."""


@dataclasses.dataclass
class Relation:
    """What a rule says about a step."""

    links: list[Link] = dataclasses.field(default_factory=list)
    cuts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(operand, axis): a parameter has a block at each index of this axis."""
    couplings: list[tuple[int, Axes]] = dataclasses.field(default_factory=list)
    """(operand, axes): activations are coupled along these axes."""
    uses: dict[int, Axes] = dataclasses.field(default_factory=dict)
    """For each operand that is a parameter and meets data here: the result's axes that come from
    the parameter's free axes, in the parameter's order."""
    combines: dict[int, Combines] = dataclasses.field(default_factory=dict)
    """What operands that are still parameters in the result do to the data that they meet."""
    spent: set[int] = dataclasses.field(default_factory=set)
    """Combined operands that act as data here, and are parameters no longer."""
    is_lookup: bool = False
    """An index chooses rows of a parameter."""
    keeps: set[int] = dataclasses.field(default_factory=set)
    """Operands that are still parameters in the result, alone or combined."""
    in_groups: bool = False
    """The kernel's outputs form groups that each have their own inputs."""
    kind: Kind | None = None
    indices: dict[int, Indices] = dataclasses.field(default_factory=dict)
    """What the indices of the result's axes become."""
    ends: Indices = Indices.ANY
    """Properties of the operands' indices that the result's indices lose."""
    is_product: bool = False
    """It is an element-wise product, whose sum would be an inner product."""
    keeps_dropped: bool = False
    """The result inherits what is known about the operands' dropped axes."""
    drops: bool = True
    """If an operand is an element-wise product, the result no longer is."""
    is_stopped: bool = False
    """No gradient passes back through it: the result is data."""
    made: int | None = None
    is_summary: bool = False
    is_mixture: bool = False
    """Activations are contracted with activations."""
    is_plain: bool = False
    unread: set[int] = dataclasses.field(default_factory=set)
    """Operands that the primitive treats in an unknown way."""
    chain: tuple[tuple[int, Axes, Axes], ...] = ()
    """For a product of weights: (operand, its contracted axes, the result's axes from it)."""
    sums: list[tuple[Step, Relation]] = dataclasses.field(default_factory=list)
    """The products that are summed here, each as the contraction that it is."""
    partner: dict[int, int] = dataclasses.field(default_factory=dict)
    """For each operand that is used, the operand that it meets."""


Trail = list[tuple[Step, Relation]]
"""Steps and their relations, in order."""


class Use(NamedTuple):
    """A step in which a parameter meets data."""

    step: Step
    operand: int
    params: frozenset[int]
    is_lookup: bool = False
    partner: int | None = None
    """The operand that it meets."""
    ran_over: int = 0
    """The uses that ran over every axis of data that is contracted here, one bit each."""
    of_features: bool = False
    """An axis of data that is contracted here has features."""


class Role(enum.Enum):
    """What an axis of a parameter does where the parameter meets data."""

    REDUCTION = enum.auto()
    OUTPUT = enum.auto()
    BATCH = enum.auto()
    """The axis holds layers of a stack, experts, rows chosen by an index, or coordinates that act
    alone."""


@dataclasses.dataclass
class Facts:
    """What the forward pass found in a program, for the passes after it."""

    program: Program
    n_params: int
    """This many of the program's inputs, the first ones, are parameters."""
    values: list[Value]
    trail: Trail = dataclasses.field(default_factory=list)
    """The relation of each step, in order."""
    uses: dict[int, Use] = dataclasses.field(default_factory=dict)
    products: dict[int, Step] = dataclasses.field(default_factory=dict)
    """The steps that are element-wise products, by id."""
    given: set[int] = dataclasses.field(default_factory=set)
    """The results of loops and branches that at least one `MERGE` step has already set."""
    summed: dict[tuple[int, int], Step] = dataclasses.field(default_factory=dict)
    """For each sum and each product in it, by id: the contraction, as a step of its own."""
    data: set[int] = dataclasses.field(default_factory=set)
    """The values that depend on more than parameters."""
    learned: set[int] = dataclasses.field(default_factory=set)
    """The values that depend on parameters."""
    filters: set[int] = dataclasses.field(default_factory=set)
    """The ids of the products in filters that are written as sums of shifted products."""
    taps: set[int] = dataclasses.field(default_factory=set)
    """The ids of the steps that take one index of such a filter."""
    members: Set[int] = frozenset[int]()
    """The ids of the steps that take from a stack what is no kernel, by an index."""
    repeats: Set[int] = frozenset[int]()
    """The ids of the steps that repeat a kernel's inputs, by indices that the program fixes."""
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
        """The value of an operand, if the program fixes it."""
        return self.program.known.get(step.inputs[operand])

    def made(self, features: Iterable[Mapping[int, Part]]) -> set[int]:
        """The parameters that produced these features."""
        numbers = {use for part in features for use in part}
        return set[int]().union(*(self.uses[number].params for number in numbers))

    def goes_through_functions(self, place: int) -> bool:
        """Whether a nonlinear element-wise function is applied to a value.

        The function must apply to the value itself: a sum of the value and data is not followed.
        """
        return bool(self.program.goes_into(place, self.data) & FUNCTIONS)

    def weights_others(self, place: int) -> bool:
        """Whether activations that do not depend on a value are multiplied by what it becomes."""
        after = depending(self.program, [place])
        others = (self.data & self.learned) - after
        return any(
            step.name in ("mul", "dot_general")
            and not step.is_backward
            and not after.isdisjoint(step.inputs)
            and not others.isdisjoint(step.inputs)
            for step in self.program.steps
        )

    def is_linear(self, place: int, uses: Iterable[int]) -> bool:
        """Whether a value is a linear function of what one of these uses makes."""
        sources = {out for number in uses for out in self.uses[number].step.outputs}
        after = depending(self.program, sources)
        made = {out: step for step in self.program.steps for out in step.outputs}
        seen, todo = {place}, [place]
        while todo:
            if (place := todo.pop()) in sources:
                return True
            step = made[place]
            before = [i for i in step.inputs if i in after]
            # A value times a function of itself (silu), or chosen by its own sign (relu).
            is_function = step.name in ("mul", "div", "select_n") and (
                len(before) > 1 if step.name != "select_n" else step.inputs[0] in after
            )
            if step.name in LINEAR | LAYOUT and not is_function:
                todo += set(before) - seen
                seen.update(before)
        return False

    def is_summed_into_losses(self, place: int) -> bool:
        """Whether the losses are sums of a value's numbers, with factors that are not learned."""
        if any(step.is_backward for step in self.program.steps):
            return False  # a derivative may be used in another way
        learned = self.data & self.learned
        seen, todo = {place}, [place]
        while todo:
            place = todo.pop()
            if place in self.program.losses and self.values[place].shape:
                return False  # an output that the user's code goes on with
            for step in self.program.consumers.get(place, ()):
                if step.name in STOPPING:
                    continue
                others = [i for i in step.inputs if i != place]
                is_learned = not learned.isdisjoint(others)
                if step.name in ("mul", "dot_general"):
                    is_sum = not is_learned and step.inputs.count(place) == 1
                elif step.name == "div":
                    is_sum = not is_learned and step.inputs[0] == place and len(others) == 1
                elif step.name == "select_n":  # not if a learned value chooses
                    is_sum = step.inputs[0] not in learned
                else:
                    is_sum = step.name in LINEAR | LAYOUT | {"reduce_sum", "psum"}
                if not is_sum:
                    return False
                todo += set(step.outputs) - seen
                seen.update(step.outputs)
        return not seen.isdisjoint(self.program.losses)

    def put_together(self, place: int) -> set[int]:
        """The steps that place a value, or a linear function of it, beside other arrays.

        Products with a value that has features are not followed.
        """
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
        """The parameters that the values still are, or whose outputs they come from."""
        found: set[int] = set()
        for value in values:
            found |= value.params
            found |= self.made(value.features(axis) for axis in range(len(value.shape)))
        return found

    def others_features(self, value: Value, axis: int, params: frozenset[int]) -> bool:
        """Whether an axis has features of other parameters than `params`."""
        return any(not self.uses[use].params <= params for use in value.features(axis))

    def acts(self, value: Value) -> bool:
        """Whether a combined value acts as data for another parameter."""
        axes = range(len(value.shape))
        return value.is_combined and (
            self.is_activation(value, axes)
            or any(value.moves(axis) and not value.is_own(axis) for axis in axes)
        )

    def is_rows(self, value: Value) -> bool:
        """Whether a combined value consists of rows of a parameter that an index chose."""
        return any(
            self.uses[use].is_lookup and self.uses[use].params & value.params
            for axis in range(len(value.shape))
            for use in value.features(axis)
        )

    def is_activation(self, value: Value, axes: Iterable[int]) -> bool:
        """Whether a combined value has, along `axes`, features of other parameters."""
        return any(self.others_features(value, axis, value.params) for axis in axes)
