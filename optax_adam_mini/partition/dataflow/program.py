"""The steps of a function in one list, and which of them its outputs depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np

MERGE = "merge"
"""The step that gives a value one of several things that it may be."""

# Steps through which a sum goes: sums of their results are sums of their operands.
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
# Which put arrays beside one another.
PLACING = {"concatenate", "stack", "dynamic_update_slice", "scatter", "complex"}
COMPLEX = {"complex", "real", "imag", "conj"}

# Through which no gradient goes.
STOPPING = {
    "stop_gradient", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to", "is_finite",
    "argmax", "argmin", "not", "and", "or", "xor",
}  # fmt: skip
# After which each index of an axis acts by itself.
TAKES = {"scan_slice", "dynamic_slice", "gather"}
# Which make one number of many, that all go into alike.
SUMS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce", "dot_general", "psum",
    "pmax", "pmin",
}  # fmt: skip
_ADDING = {"add", "add_any", "sub"}
RESHAPES = {"reshape", "squeeze", "expand_dims"}


@dataclasses.dataclass(eq=False)
class Step:
    """One equation, its operands and results as indices into the program's values."""

    name: str
    inputs: list[int]
    outputs: list[int]
    params: dict[str, Any]
    tracebacks: tuple[Any, ...] = ()
    """Where it stands in the user's code, and what called it, innermost first."""
    is_backward: bool = False
    """It is of the backward pass of a derivative."""
    is_differentiated: bool = False
    """It is of a forward pass whose derivative is taken."""
    has_effect: bool = False
    """It changes what another step reads."""


@dataclasses.dataclass
class Program:
    """The steps of a function.

    What several steps may give (the carry of a loop, the result of a condition) is one value.
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
    """What was reshaped into a value."""
    known: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    """Whole numbers that are the same whatever the function is given: indices."""
    kernels: set[int] = dataclasses.field(default_factory=set)
    """What the kernels of convolutions are made of."""
    implied: set[int] = dataclasses.field(default_factory=set)
    """The steps, by their ids, that are kept only because a derivative of theirs is used."""
    stopped: set[int] = dataclasses.field(default_factory=set)
    """The steps, by their ids, through which no output has a gradient."""
    unused: list[Step] = dataclasses.field(default_factory=list)
    """Steps on which no output depends."""

    consumers: dict[int, list[Step]] = dataclasses.field(default_factory=dict)
    """The steps that take in a value."""

    def goes_into(self, place: int, data: Set[int] = frozenset[int]()) -> set[str]:
        """The primitives that a value goes into, moved about and scaled as it may be.

        What is added to one of `data` is not followed.
        """
        seen, todo, found = {place}, [place], set[str]()
        while todo:
            place = todo.pop()
            if place in self.losses:
                found.add("output")
            for step in self.consumers.get(place, ()):
                if step.is_backward or id(step) in self.stopped:
                    continue
                others = data & set(step.inputs) if step.name in _ADDING else ()
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

    def is_kernel(self, place: int) -> bool:
        """Whether the kernel of a convolution is made of a value."""
        return place in self.kernels

    def value(self, aval: Any) -> int:
        """A new value."""
        return self.array(getattr(aval, "shape", ()))

    def array(self, shape: Sequence[int]) -> int:
        """A new value of this shape."""
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1


def depending(program: Program, places: Iterable[int]) -> set[int]:
    """The values that depend on these."""
    found, before = set(places), -1
    while before != (before := len(found)):
        for step in program.steps:
            if not found.isdisjoint(step.inputs):
                found.update(step.outputs)
    return found


def drop_unused(program: Program) -> None:
    """Takes out the steps on which no output depends.

    The forward pass behind a derivative is kept whole: it says what a parameter is that only the
    derivative goes through.
    """
    needed = _reached(program.steps, program.outputs)
    strictly = _reached(program.steps, program.outputs, with_implied=False)
    program.implied = {id(s) for s in program.steps if strictly.isdisjoint(s.outputs)}
    used = [step.has_effect or not needed.isdisjoint(step.outputs) for step in program.steps]
    program.unused = [s for s, is_used in zip(program.steps, used, strict=True) if not is_used]
    program.steps = [s for s, is_used in zip(program.steps, used, strict=True) if is_used]


def without_gradient(program: Program) -> set[int]:
    """The steps whose results reach the loss only where no gradient comes back from there."""
    steps = [step for step in program.steps if step.name not in STOPPING]
    reached = _reached(steps, program.losses)
    return {id(step) for step in steps if reached.isdisjoint(step.outputs)}


def _reached(steps: Sequence[Step], outputs: Sequence[int], with_implied: bool = True) -> set[int]:
    """The values that outputs depend on through these steps."""
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
