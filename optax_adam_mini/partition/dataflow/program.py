"""A jaxpr with all that it calls in one list of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_adam_mini.partition.dataflow.folding import folded, is_index
from optax_adam_mini.partition.dataflow.kernels import written_out

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr

MERGE = "merge"
"""The step that gives a value one of several things that it may be."""

# Primitives that do no more than call a jaxpr with their own operands.
CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "composite", "compute_on",
    "linear_call", "remat_opt", "eval_jaxpr", "call",
}  # fmt: skip
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

# Through which no gradient goes.
STOPPING = {
    "stop_gradient", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to", "is_finite",
    "argmax", "argmin", "not", "and", "or", "xor",
}  # fmt: skip

_EFFECTS = {"WriteEffect", "AccumEffect"}  # of references, which are arrays that change

RESHAPES = {"reshape", "squeeze", "expand_dims"}

_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call", "callee", "fwd_jaxpr")


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

    def goes_into(self, place: int) -> set[str]:
        """The primitives that a value goes into, moved about and scaled as it may be."""
        seen, todo, found = {place}, [place], set[str]()
        while todo:
            place = todo.pop()
            if place in self.outputs:
                found.add("output")
            for step in self.consumers.get(place, ()):
                if step.is_backward:
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


def flatten(closed: ClosedJaxpr) -> Program:
    """The program of a closed jaxpr."""
    program = Program()
    program.inputs = [program.value(var.aval) for var in closed.jaxpr.invars]
    program.outputs = _inline(program, closed, program.inputs, _Callers())
    _drop_unused(program)
    program.stopped = _without_gradient(program)
    for step in program.steps:
        for place in step.inputs:
            program.consumers.setdefault(place, []).append(step)
    for step in reversed(program.steps):
        if step.name == "conv_general_dilated":
            program.kernels.add(step.inputs[1])
        elif not program.kernels.isdisjoint(step.outputs):
            program.kernels.update(step.inputs)
    return program


def _drop_unused(program: Program) -> None:
    """Takes out the steps on which no output depends.

    The forward pass behind a derivative is kept whole: it says what a parameter is that only the
    derivative goes through.
    """
    needed = _reached(program, program.steps)
    strictly = _reached(program, program.steps, with_implied=False)
    program.implied = {id(s) for s in program.steps if strictly.isdisjoint(s.outputs)}
    used = [step.has_effect or not needed.isdisjoint(step.outputs) for step in program.steps]
    program.unused = [s for s, is_used in zip(program.steps, used, strict=True) if not is_used]
    program.steps = [s for s, is_used in zip(program.steps, used, strict=True) if is_used]


def _without_gradient(program: Program) -> set[int]:
    """The steps whose results reach outputs only where no gradient comes back from there."""
    steps = [step for step in program.steps if step.name not in STOPPING]
    reached = _reached(program, steps)
    return {id(step) for step in steps if reached.isdisjoint(step.outputs)}


def _reached(program: Program, steps: Sequence[Step], with_implied: bool = True) -> set[int]:
    """The values that outputs depend on through these steps."""
    reached, before = set(program.outputs), -1
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


@dataclasses.dataclass(frozen=True)
class _Callers:
    """What called a jaxpr, as far as its steps must know."""

    tracebacks: tuple[Any, ...] = ()
    is_backward: bool = False
    is_differentiated: bool = False

    def of(self, eqn: Any) -> _Callers:
        """The callers of what an equation calls, itself included."""
        info = eqn.source_info
        transforms = {
            part.name
            for part in info.name_stack.stack
            if type(part).__name__ == "Transform"  # names that users give are scopes
        }
        return _Callers(
            (info.traceback, *self.tracebacks),
            # A function that is linear, and transposed as such, is a layer.
            self.is_backward or {"transpose", "jvp"} <= transforms,
            self.is_differentiated or "jvp" in transforms,
        )


def _inline(
    program: Program,
    called: ClosedJaxpr | Jaxpr,
    inputs: Sequence[int],
    callers: _Callers,
) -> list[int]:
    """Appends the steps of a jaxpr; its results."""
    from jax.extend.core import ClosedJaxpr, Literal  # takes as long to load as all of ours

    jaxpr, consts = (
        (called.jaxpr, called.consts) if isinstance(called, ClosedJaxpr) else (called, [])
    )
    where: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        where[var] = program.value(var.aval)
        if getattr(const, "ndim", 0):
            program.arrays.append(where[var])
        if is_index(var.aval):
            program.known[where[var]] = np.asarray(const)

    def read(atom: Any) -> int:
        if not isinstance(atom, Literal):
            return where[atom]
        place = program.value(atom.aval)
        if is_index(atom.aval):
            program.known[place] = np.asarray(atom.val)
        if not np.any(np.asarray(atom.val)):
            program.zeros.add(place)
        return place

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        results = _inline_eqn(program, eqn, operands, callers)
        where.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


# What is zero where any operand is, and where all are.
_ZERO_IF_ANY = {"mul", "dot_general", "conv_general_dilated"}
_ZERO_IF_ALL = {
    *LAYOUT, "add", "add_any", "sub", "neg", "convert_element_type", "copy", "reduce_sum", "tanh",
    "sin", "abs", "square", "integer_pow", "tile",
} - {"pad"}  # fmt: skip


def _is_zero(program: Program, name: str, operands: Sequence[int]) -> bool:
    """Whether nothing but zeros comes out, whatever parameters go in."""
    are_zero = [place in program.zeros for place in operands]
    return bool(operands) and (
        (name in _ZERO_IF_ANY and any(are_zero)) or (name in _ZERO_IF_ALL and all(are_zero))
    )


def _inline_eqn(program: Program, eqn: Any, operands: list[int], callers: _Callers) -> list[int]:
    from jax.extend.core import ClosedJaxpr

    name, params = eqn.primitive.name, eqn.params
    here = callers.of(eqn)
    has_effect = any(type(effect).__name__ in _EFFECTS for effect in eqn.effects)

    def inline(called: ClosedJaxpr | Jaxpr, inputs: Sequence[int]) -> list[int]:
        return _inline(program, called, inputs, here)

    def step(
        name: str, inputs: list[int], outputs: list[int], params: dict[str, Any] | None = None
    ) -> None:
        program.steps.append(
            Step(name, inputs, outputs, params or {}, here.tracebacks, here.is_backward,
                 here.is_differentiated, has_effect)
        )  # fmt: skip

    def results() -> list[int]:
        return [program.value(var.aval) for var in eqn.outvars]

    if name in CALLS:
        called = next((params[key] for key in _CALLED if key in params), None)
        if called is not None and len(called.jaxpr.invars if isinstance(called, ClosedJaxpr)
                                      else called.invars) == len(operands):  # fmt: skip
            return inline(called, operands)
    if name == "cond":
        outs = results()
        for branch in params["branches"]:
            for given, out in zip(inline(branch, operands[1:]), outs, strict=True):
                step(MERGE, [given], [out])
        return outs
    if name == "while":
        consts = params["cond_nconsts"], params["body_nconsts"]
        of_cond, of_body = operands[: consts[0]], operands[consts[0] : sum(consts)]
        carry = results()
        for given, out in zip(operands[sum(consts) :], carry, strict=True):
            step(MERGE, [given], [out])
        inline(params["cond_jaxpr"], [*of_cond, *carry])
        for given, out in zip(inline(params["body_jaxpr"], [*of_body, *carry]), carry, strict=True):
            step(MERGE, [given], [out])
        return carry
    if name == "scan":
        body = params["jaxpr"]
        # What the loop runs over, and what it collects, has an axis less inside.
        rank = lambda atom: len(atom.aval.shape)
        n_stacks = sum(
            rank(a) > rank(b) for a, b in zip(eqn.invars, body.jaxpr.invars, strict=True)
        )
        n_carry = sum(
            rank(a) == rank(b) for a, b in zip(eqn.outvars, body.jaxpr.outvars, strict=True)
        )
        n_consts = len(operands) - n_carry - n_stacks
        consts, initial, stacks = (
            operands[:n_consts],
            operands[n_consts : n_consts + n_carry],
            operands[n_consts + n_carry :],
        )
        outs = results()
        carry, stacked = outs[:n_carry], outs[n_carry:]
        for given, out in zip(initial, carry, strict=True):
            step(MERGE, [given], [out])
        slices = [program.value(var.aval) for var in body.jaxpr.invars[n_consts + n_carry :]]
        for given, out in zip(stacks, slices, strict=True):
            step("scan_slice", [given], [out])
        found = inline(body, [*consts, *carry, *slices])
        for given, out in zip(found[:n_carry], carry, strict=True):
            step(MERGE, [given], [out])
        for given, out in zip(found[n_carry:], stacked, strict=True):
            step("scan_stack", [given], [out])
        return outs
    if name == "shard_map":
        inner = params["jaxpr"]
        shards = [program.value(var.aval) for var in inner.invars]
        for given, out in zip(operands, shards, strict=True):
            step("shard", [given], [out])
        outs = results()
        for given, out in zip(inline(inner, shards), outs, strict=True):
            step("unshard", [given], [out])
        return outs
    if (kernel := written_out(eqn)) is not None:
        return inline(kernel, operands)
    outs = results()
    if name == "unstack":  # to iterate over an array is to index it
        axis, shape = params["axis"], program.shapes[operands[0]]
        for index, out in enumerate(outs):
            start = [index if a == axis else 0 for a in range(len(shape))]
            limit = [index + 1 if a == axis else size for a, size in enumerate(shape)]
            one = program.array([b - a for a, b in zip(start, limit, strict=True)])
            where = {"start_indices": start, "limit_indices": limit, "strides": None}
            step("slice", operands, [one], where)
            step("squeeze", [one], [out], {"dimensions": (axis,)})
        return outs
    if name == "tile":  # copies side by side: a new axis that is merged into the old one
        shape, reps = program.shapes[operands[0]], params["reps"]
        sizes = [n for pair in zip(reps, shape, strict=True) for n in pair]
        copies = program.array(sizes)
        old = tuple(range(1, len(sizes), 2))
        step("broadcast_in_dim", operands, [copies], {"broadcast_dimensions": old})
        step("reshape", [copies], outs)
        return outs
    if name == "reshape" and params.get("dimensions") is not None:  # in another order of the axes
        order = tuple(params["dimensions"])
        turned = program.array([program.shapes[operands[0]][axis] for axis in order])
        step("transpose", operands, [turned], {"permutation": order})
        operands, params = [turned], {**params, "dimensions": None}
    if name in RESHAPES and program.shapes[outs[0]] and program.shapes[operands[0]]:
        # Of a reshape of a reshape, what lies between does not matter.
        operands = [program.reshaped.get(operands[0], operands[0])]
        program.reshaped[outs[0]] = operands[0]
    if _is_zero(program, name, operands):
        program.zeros.update(outs)
    step(name, operands, outs, params)
    if len(outs) == 1 and all(place in program.known for place in operands):
        numbers = folded(
            name, [program.known[place] for place in operands], params, eqn.outvars[0].aval
        )
        if numbers is not None:
            program.known[outs[0]] = numbers
    return outs
