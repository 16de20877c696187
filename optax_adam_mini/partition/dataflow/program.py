"""A jaxpr with all that it calls in one list of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optax_adam_mini.partition.dataflow.kernels import written_out

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr

# Primitives that do no more than call a jaxpr with their own operands.
CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class Step:
    """One equation, its operands and results as indices into the program's values."""

    name: str
    inputs: list[int]
    outputs: list[int]
    params: dict[str, Any]
    tracebacks: tuple[Any, ...] = ()
    """Where it stands in the user's code, and what called it, innermost first."""


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
    program.outputs = _inline(program, closed, program.inputs)
    return program


def _inline(
    program: Program,
    called: ClosedJaxpr | Jaxpr,
    inputs: Sequence[int],
    callers: tuple[Any, ...] = (),
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

    def read(atom: Any) -> int:
        return program.value(atom.aval) if isinstance(atom, Literal) else where[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        results = _inline_eqn(program, eqn, operands, callers)
        where.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inline_eqn(
    program: Program, eqn: Any, operands: list[int], callers: tuple[Any, ...]
) -> list[int]:
    name, params = eqn.primitive.name, eqn.params
    sources = (getattr(eqn.source_info, "traceback", None), *callers)

    def inline(called: ClosedJaxpr | Jaxpr, inputs: Sequence[int]) -> list[int]:
        return _inline(program, called, inputs, sources)

    def step(name: str, inputs: list[int], outputs: list[int], **more: Any) -> None:
        program.steps.append(Step(name, inputs, outputs, more, sources))

    def results() -> list[int]:
        return [program.value(var.aval) for var in eqn.outvars]

    if name in CALLS:
        called = next(
            params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if key in params
        )
        return inline(called, operands)
    if name == "cond":
        outs = results()
        for branch in params["branches"]:
            for given, out in zip(inline(branch, operands[1:]), outs, strict=True):
                step("merge", [given], [out])
        return outs
    if name == "while":
        consts = params["cond_nconsts"], params["body_nconsts"]
        of_cond, of_body = operands[: consts[0]], operands[consts[0] : sum(consts)]
        carry = results()
        for given, out in zip(operands[sum(consts) :], carry, strict=True):
            step("merge", [given], [out])
        inline(params["cond_jaxpr"], [*of_cond, *carry])
        for given, out in zip(inline(params["body_jaxpr"], [*of_body, *carry]), carry, strict=True):
            step("merge", [given], [out])
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
            step("merge", [given], [out])
        slices = [program.value(var.aval) for var in body.jaxpr.invars[n_consts + n_carry :]]
        for given, out in zip(stacks, slices, strict=True):
            step("scan_slice", [given], [out])
        found = inline(body, [*consts, *carry, *slices])
        for given, out in zip(found[:n_carry], carry, strict=True):
            step("merge", [given], [out])
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
            step("slice", operands, [one], start_indices=start, limit_indices=limit, strides=None)
            step("squeeze", [one], [out], dimensions=(axis,))
        return outs
    step(name, operands, outs, **params)
    return outs
