"""Flattens a jaxpr, and everything that it calls, into one list of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_adam_mini.partition.dataflow.folding import folded, is_index
from optax_adam_mini.partition.dataflow.indices import one_axis_at_a_time, take
from optax_adam_mini.partition.dataflow.kernels import written_out
from optax_adam_mini.partition.dataflow.products import split_products
from optax_adam_mini.partition.dataflow.program import (
    LAYOUT,
    LINEAR,
    MERGE,
    RESHAPES,
    Program,
    Step,
    drop_unused,
    without_gradient,
)

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr

# Primitives that only call a jaxpr with their own operands.
CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "composite", "compute_on",
    "linear_call", "remat_opt", "eval_jaxpr", "call",
}  # fmt: skip
_EFFECTS = {"WriteEffect", "AccumEffect"}  # on references, which are mutable arrays


_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call", "callee", "fwd_jaxpr")


def flatten(closed: ClosedJaxpr) -> Program:
    """The program of a closed jaxpr.

    If its first output is a scalar, that output is the loss, and no other output is trained.
    """
    program = Program()
    program.inputs = [program.value(var.aval) for var in closed.jaxpr.invars]
    program.outputs = _inline(program, closed, program.inputs, _Callers())
    is_loss = closed.out_avals[:1] and not closed.out_avals[0].shape
    program.losses = program.outputs[:1] if is_loss else program.outputs
    split_products(program)
    drop_unused(program)
    program.stopped = without_gradient(program)
    for step in program.steps:
        for place in step.inputs:
            program.consumers.setdefault(place, []).append(step)
    for step in reversed(program.steps):
        if step.name == "conv_general_dilated":
            program.kernels.add(step.inputs[1])
        elif not program.kernels.isdisjoint(step.outputs):
            program.kernels.update(step.inputs)
    return program


@dataclasses.dataclass(frozen=True)
class _Callers:
    """What a jaxpr's steps must know about the equations that called it."""

    tracebacks: tuple[Any, ...] = ()
    is_backward: bool = False
    is_differentiated: bool = False
    has_derivative: bool = False
    """The user says what their derivative is."""

    def of(self, eqn: Any) -> _Callers:
        """The callers of what an equation calls, including the equation."""
        info = eqn.source_info
        transforms = {
            part.name
            for part in info.name_stack.stack
            if type(part).__name__ == "Transform"  # names that users give are scopes
        }
        return _Callers(
            (info.traceback, *self.tracebacks),
            # A transpose without a jvp is a linear function that the model transposes: a layer.
            self.is_backward or {"transpose", "jvp"} <= transforms,
            self.is_differentiated or "jvp" in transforms,
            self.has_derivative or eqn.primitive.name.startswith("custom_vjp_call"),
        )


def _inline(
    program: Program,
    called: ClosedJaxpr | Jaxpr,
    inputs: Sequence[int],
    callers: _Callers,
) -> list[int]:
    """Appends the steps of a jaxpr; returns its results."""
    from jax.extend.core import ClosedJaxpr, Literal  # as slow to import as this whole package

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


# Primitives whose result is zero if any operand is zero, or if all are.
_ZERO_IF_ANY = {"mul", "dot_general", "conv_general_dilated"}
_ZERO_IF_ALL = {
    *LAYOUT, *LINEAR, "reduce_sum", "tanh", "sin", "abs", "square", "integer_pow", "tile",
} - {"pad", "div"}  # fmt: skip


def _is_zero(program: Program, name: str, operands: Sequence[int]) -> bool:
    """Whether the result is all zeros, whatever the parameters are."""
    are_zero = [place in program.zeros for place in operands]
    return bool(operands) and (
        (name in _ZERO_IF_ANY and any(are_zero)) or (name in _ZERO_IF_ALL and all(are_zero))
    )


def _taken(
    program: Program, name: str, params: dict[str, Any], operands: Sequence[int]
) -> list[tuple[int, int]]:
    """The axis and the index, if a `gather` takes one index that the program fixes."""
    known = program.known.get(operands[1]) if name == "gather" else None
    if known is None or known.size != 1:
        return []
    shape, sizes = program.shapes[operands[0]], params["slice_sizes"]
    axis = params["dimension_numbers"].collapsed_slice_dims
    rest = [a for a, size in enumerate(sizes) if size == shape[a] and a not in axis]
    if known.ndim != 1 or len(axis) != 1 or len(rest) != len(shape) - 1:
        return []
    return [(axis[0], int(np.clip(known[0], 0, shape[axis[0]] - 1)))]


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

    def connect(name: str, sources: Sequence[int], outputs: Sequence[int]) -> None:
        for source, output in zip(sources, outputs, strict=True):
            step(name, [source], [output])

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
            connect(MERGE, inline(branch, operands[1:]), outs)
        return outs
    if name == "while":
        consts = params["cond_nconsts"], params["body_nconsts"]
        of_cond, of_body = operands[: consts[0]], operands[consts[0] : sum(consts)]
        carry = results()
        connect(MERGE, operands[sum(consts) :], carry)
        inline(params["cond_jaxpr"], [*of_cond, *carry])
        connect(MERGE, inline(params["body_jaxpr"], [*of_body, *carry]), carry)
        return carry
    if name == "scan":
        body = params["jaxpr"]
        # Arrays that the loop runs over or collects have one axis fewer inside.
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
        connect(MERGE, initial, carry)
        slices = [program.value(var.aval) for var in body.jaxpr.invars[n_consts + n_carry :]]
        connect("scan_slice", stacks, slices)
        found = inline(body, [*consts, *carry, *slices])
        connect(MERGE, found[:n_carry], carry)
        connect("scan_stack", found[n_carry:], stacked)
        return outs
    if name == "shard_map":
        inner = params["jaxpr"]
        shards = [program.value(var.aval) for var in inner.invars]
        connect("shard", operands, shards)
        outs = results()
        connect("unshard", inline(inner, shards), outs)
        return outs
    if (kernel := written_out(eqn)) is not None:
        return inline(kernel, operands)
    outs = results()
    if here.has_derivative and name in ("ge", "gt", "le", "lt"):  # of a binary kernel
        name, params = "max", {}
    if name == "bcoo_dot_general":  # a sparse array times a dense one
        dense = program.array(params["lhs_spinfo"].shape)
        step("bcoo_todense", operands[:2], [dense])
        name, operands = "dot_general", [dense, operands[2]]
    if name in ("slice", "dynamic_slice", "gather"):
        name, params, operands = one_axis_at_a_time(program, step, name, params, operands)
    if name == "unstack":  # iterating over an array indexes it
        taken = [(params["axis"], index) for index in range(len(outs))]
    else:
        taken = _taken(program, name, params, operands)
    for out, (axis, index) in zip(outs, taken, strict=False):
        one = take(program, step, operands[0], axis, index)
        step("squeeze", [one], [out], {"dimensions": (axis,)})
    if taken:
        return outs
    if name == "tile":  # copies side by side are a new axis, merged into the old one
        shape, reps = program.shapes[operands[0]], params["reps"]
        sizes = [n for pair in zip(reps, shape, strict=True) for n in pair]
        copies = program.array(sizes)
        old = tuple(range(1, len(sizes), 2))
        step("broadcast_in_dim", operands, [copies], {"broadcast_dimensions": old})
        step("reshape", [copies], outs)
        return outs
    if name == "reshape" and params.get("dimensions") is not None:  # it transposes first
        order = tuple(params["dimensions"])
        turned = program.array([program.shapes[operands[0]][axis] for axis in order])
        step("transpose", operands, [turned], {"permutation": order})
        operands, params = [turned], {**params, "dimensions": None}
    if name in RESHAPES and program.shapes[outs[0]] and program.shapes[operands[0]]:
        # A reshape of a reshape is one reshape of the first operand.
        operands = [program.reshaped.get(operands[0], operands[0])]
        program.reshaped[outs[0]] = operands[0]
    if name == "concatenate" and all(program.shapes[place][-1:] == (1,) for place in operands):
        program.columns[outs[0]] = operands
    if name in ("broadcast_in_dim", "convert_element_type"):
        is_scalar = not program.shapes[operands[0]]
        program.scalars[outs[0]] = operands[0] if is_scalar else program.scalars.get(operands[0])
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
