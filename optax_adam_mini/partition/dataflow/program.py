"""A function as one list of steps, and which steps its outputs depend on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np

Axes = tuple[int, ...]

MERGE = "merge"
"""A step that sets a value to one of several alternatives."""

# Primitives that a sum passes through: a sum of their results is a sum of their operands.
LINEAR = {
    "add", "add_any", "convert_element_type", "copy", "copy_p", "device_put", "div", "mul", "name",
    "neg", "optimization_barrier", "pcast", "pvary", "real", "reduce_precision", "reshard",
    "select_n", "sharding_constraint", "stop_gradient", "sub", "mesh_cast", "layout_constraint",
    "tie", "xla_metadata_value", "shard_alike", "preduced", "reduced_vary_cast_p",
    "reduced_vary_cast", "vary_unreduced_cast_p", "vary_unreduced_cast", "relayout",
    "with_memory_space_constraint", "pin", "unpin", MERGE,
}  # fmt: skip
LAYOUT = {
    "transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "rev", "pad",
    "concatenate", "stack", "split", "scan_slice", "scan_stack", "dynamic_slice",
    "dynamic_update_slice", "scatter",
}  # fmt: skip
# Primitives that place arrays side by side.
PLACING = {"concatenate", "stack", "dynamic_update_slice", "scatter", "complex"}
COMPLEX = {"complex", "real", "imag", "conj"}

# Primitives through which no gradient passes.
STOPPING = {
    "stop_gradient", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to", "is_finite",
    "argmax", "argmin", "not", "and", "or", "xor",
}  # fmt: skip
# Primitives after which each index of an axis acts by itself.
TAKES = {"scan_slice", "dynamic_slice", "gather"}
# Primitives that reduce many numbers to one, all in the same way.
SUMS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce", "dot_general", "psum",
    "pmax", "pmin",
}  # fmt: skip
ADDING = {"add", "add_any", "sub"}
RESHAPES = {"reshape", "squeeze", "expand_dims"}


@dataclasses.dataclass(eq=False)
class Step:
    """One equation; its operands and results are indices into the program's values."""

    name: str
    inputs: list[int]
    outputs: list[int]
    params: dict[str, Any]
    tracebacks: tuple[Any, ...] = ()
    """Its place in the user's code and its callers' places, innermost first."""
    is_backward: bool = False
    """It belongs to the backward pass of a derivative."""
    is_differentiated: bool = False
    """It belongs to a forward pass whose derivative is taken."""
    has_effect: bool = False
    """It writes to a reference that another step may read."""


@dataclasses.dataclass
class Program:
    """The steps of a function.

    A value that several steps may set (the carry of a loop, the result of a `cond`) is one value.
    """

    steps: list[Step] = dataclasses.field(default_factory=list)
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    inputs: list[int] = dataclasses.field(default_factory=list)
    arrays: list[int] = dataclasses.field(default_factory=list)
    """Arrays that the function closes over."""
    outputs: list[int] = dataclasses.field(default_factory=list)
    losses: list[int] = dataclasses.field(default_factory=list)
    """The outputs that are differentiated."""
    zeros: set[int] = dataclasses.field(default_factory=set)
    """Values that are zero."""
    reshaped: dict[int, int] = dataclasses.field(default_factory=dict)
    """For each value that is a reshape, the value that was reshaped."""
    known: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    """The indices that do not depend on the function's arguments."""
    scalars: dict[int, int | None] = dataclasses.field(default_factory=dict)
    """For values that repeat one number: the value of that number."""
    columns: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """For indices of several axes: the value that has the index of each axis."""
    kernels: set[int] = dataclasses.field(default_factory=set)
    """The values that kernels of convolutions depend on."""
    implied: set[int] = dataclasses.field(default_factory=set)
    """The ids of the steps that are kept only because their derivative is used."""
    stopped: set[int] = dataclasses.field(default_factory=set)
    """The ids of the steps through which no gradient passes."""
    unused: list[Step] = dataclasses.field(default_factory=list)
    """Steps that no output depends on."""

    consumers: dict[int, list[Step]] = dataclasses.field(default_factory=dict)
    """The steps that take in a value."""

    def goes_into(self, place: int, data: Set[int] = frozenset[int]()) -> set[str]:
        """The primitives that a value goes into, directly or after linear and layout steps.

        A sum of the value and one of `data` is not followed.
        """
        seen, todo, found = {place}, [place], set[str]()
        while todo:
            place = todo.pop()
            if place in self.losses:
                found.add("output")
            for step in self.consumers.get(place, ()):
                if step.is_backward or id(step) in self.stopped:
                    continue
                others = data & set(step.inputs) if step.name in ADDING else ()
                if not seen.issuperset(others):
                    continue
                sums_nothing = step.name == "reduce_sum" and all(
                    self.shapes[step.inputs[0]][axis] == 1 for axis in step.params["axes"]
                )
                if step.name not in LINEAR | LAYOUT and not sums_nothing:
                    found.add(step.name)
                    continue
                todo += set(step.outputs) - seen
                seen.update(step.outputs)
        return found

    def value(self, aval: Any) -> int:
        """A new value."""
        return self.array(getattr(aval, "shape", ()))

    def array(self, shape: Sequence[int]) -> int:
        """A new value of this shape."""
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1


def depending(program: Program, places: Iterable[int]) -> set[int]:
    """The values that depend on `places`, including these."""
    found, before = set(places), -1
    while before != (before := len(found)):
        for step in program.steps:
            if not found.isdisjoint(step.inputs):
                found.update(step.outputs)
    return found


def drop_unused(program: Program) -> None:
    """Removes the steps that no output depends on.

    The forward pass of a derivative is kept whole, because it shows what a parameter does that only
    the derivative depends on.
    """
    needed = _reached(program.steps, program.outputs)
    strictly = _reached(program.steps, program.outputs, with_implied=False)
    program.implied = {id(s) for s in program.steps if strictly.isdisjoint(s.outputs)}
    used = [step.has_effect or not needed.isdisjoint(step.outputs) for step in program.steps]
    program.unused = [s for s, is_used in zip(program.steps, used, strict=True) if not is_used]
    program.steps = [s for s, is_used in zip(program.steps, used, strict=True) if is_used]


def without_gradient(program: Program) -> set[int]:
    """The ids of the steps whose results reach the loss only where no gradient comes back."""
    steps = [step for step in program.steps if step.name not in STOPPING]
    reached = _reached(steps, program.losses)
    return {id(step) for step in steps if reached.isdisjoint(step.outputs)}


def _reached(steps: Sequence[Step], outputs: Sequence[int], with_implied: bool = True) -> set[int]:
    """The values that `outputs` depend on through these steps."""
    reached, before = set(outputs), -1
    while before != (before := len(reached)):
        has_derivative = any(
            step.is_differentiated and not reached.isdisjoint(step.outputs) for step in steps
        )
        for step in reversed(steps):
            is_kept = has_derivative and step.is_differentiated and not step.is_backward
            is_kept &= with_implied
            if is_kept or step.has_effect or not reached.isdisjoint(step.outputs):
                reached.update(step.inputs)
                reached.update(step.outputs)
    return reached


def reshaped(old: Sequence[int], new: Sequence[int]) -> list[tuple[Axes, Axes]]:
    """The smallest groups of axes that a reshape turns into one another, without size 1."""
    if math.prod(old) == 0:
        return []
    a = [i for i, size in enumerate(old) if size != 1]
    b = [i for i, size in enumerate(new) if size != 1]
    groups: list[tuple[Axes, Axes]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        i, j = i + 1, j + 1
        m, n = old[left[0]], new[right[0]]
        while m != n:
            if m < n and i < len(a):
                left.append(a[i])
                m, i = m * old[a[i]], i + 1
            elif j < len(b):
                right.append(b[j])
                n, j = n * new[b[j]], j + 1
            else:
                break
        groups.append((tuple(left), tuple(right)))
    return groups
