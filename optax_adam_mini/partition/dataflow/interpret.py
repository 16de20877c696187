"""Runs the passes over a program, and gathers what they found for each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import path_str
from optax_adam_mini.partition.dataflow.backward import find_groups
from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Role, Trail, Use
from optax_adam_mini.partition.dataflow.forward import follow
from optax_adam_mini.partition.dataflow.groups import Label
from optax_adam_mini.partition.dataflow.inline import flatten
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.roles import find_roles


@dataclasses.dataclass(eq=False)
class Result:
    """What some steps say about the parameters; each is an index into the program's inputs."""

    facts: Facts
    trail: Trail
    """The steps that the result was found from."""
    labels: list[list[Label]]
    """For each parameter, the groups of each axis."""
    roles: list[list[set[Role]]]
    """For each parameter, the roles of each axis: more than one if its uses differ."""
    uses: dict[int, list[Use]] = dataclasses.field(default_factory=dict)
    unread: dict[int, list[Step]] = dataclasses.field(default_factory=dict)
    """The steps without a rule that a parameter or its outputs go into."""
    coupled: dict[int, list[Step]] = dataclasses.field(default_factory=dict)
    """The inner products that couple a parameter's outputs."""


def interpret(
    name: str, fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> list[Result]:
    """For each leaf of `params`, what the computation says; `name` is the public caller's.

    The steps that a gradient passes through count. A frozen parameter has no use in these, so all
    steps count for it.

    Raises:
        TypeError: if `fn` is not a function, or a leaf of `params` is not an array.
    """
    _check(name, fn, params)
    leaves, treedef = jax.tree.flatten(params)
    rest, rest_def = jax.tree.flatten((args, kwargs))
    traced = [i for i, leaf in enumerate(rest) if _is_array(leaf)]

    def flat(leaves: list[Any], arrays: list[Any]) -> Any:
        filled = list(rest)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(rest_def, filled)
        return fn(jax.tree.unflatten(treedef, leaves), *args, **kwargs)

    closed = jax.make_jaxpr(flat)(leaves, [rest[i] for i in traced])
    facts = follow(flatten(closed), len(leaves))
    stopped = facts.program.stopped
    found = _of_steps(facts, [part for part in facts.trail if id(part[0]) not in stopped])
    is_frozen = [bool(stopped) and index not in found.uses for index in range(len(leaves))]
    of_all = _of_steps(facts, facts.trail) if any(is_frozen) else found
    return [of_all if frozen else found for frozen in is_frozen]


_PARAMETERS_ALONE = """pass the parameters alone, and put the model together inside fn:
  NNX: graph, params, rest = nnx.split(model, nnx.Param, ...)
    fn = lambda p, r, *a: loss_fn(nnx.merge(graph, p, r), *a), called with params, rest, *args
  Equinox: params, static = eqx.partition(model, eqx.is_inexact_array)
    fn = lambda p, *a: loss_fn(eqx.combine(p, static), *a), called with params, *args"""


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _check(name: str, fn: Any, params: Any) -> None:
    """Refuses an `fn` that is not a function, and leaves of `params` that are not arrays."""
    if not callable(fn) or isinstance(params, FunctionType):
        raise TypeError(
            f"{name}: fn must be the loss or the forward pass, got {type(fn).__name__}, and params "
            f"their pytree, got {type(params).__name__}: call {name}(fn, params, *args)"
        )
    for keys, leaf in leaves_with_path(params):
        found = None
        if not _is_array(leaf):
            found = f"{_short(leaf)} of type {type(leaf).__name__}"
        elif jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            found = f"an array of dtype {leaf.dtype}"
        if found is not None:
            raise TypeError(
                f"{name}: {path_str(keys) or 'params'}: expected an array of numbers or a "
                f"jax.ShapeDtypeStruct, got {found}: {_PARAMETERS_ALONE}"
            )


def _short(leaf: Any) -> str:
    text = repr(leaf)
    return text if len(text) < 60 else text[:60] + "..."


def _of_steps(facts: Facts, trail: Trail) -> Result:
    """What the steps of a trail say about all parameters."""
    roles = find_roles(facts, trail)  # first: it adds cuts, which the groups must have
    labels = find_groups(facts, trail)
    for step, relation in trail:
        for link in relation.links:
            # If an axis has shrunk to size 1 and was then dropped, its uses are unknown.
            place = step.outputs[link.result]
            shape = facts.values[place].shape
            if link.parts > 1 and shape[link.result_axes[0]] == 1:
                relation.unread |= set() if roles[place][link.result_axes[0]] else {link.operand}
    inputs = facts.program.inputs[: facts.n_params]
    found = Result(
        facts, trail, [labels[place] for place in inputs], [roles[place] for place in inputs]
    )
    for step, relation in trail:
        ins = facts.inputs(step)
        if relation.unread and id(step) not in facts.program.implied:
            for param in sorted(facts.makers(ins[operand] for operand in relation.unread)):
                found.unread.setdefault(param, []).append(step)
        for operand, axes in relation.couplings:
            for param in facts.made(ins[operand].features(axis) for axis in axes):
                found.coupled.setdefault(param, []).append(step)
        combined = {i for i in relation.keeps if ins[i].kind == Kind.WEIGHT} if any(
            value.is_combined for value in facts.outputs(step)) else set()  # fmt: skip
        for operand in sorted({*relation.uses, *relation.spent, *combined}):
            for param in ins[operand].params:
                use = Use(step, operand, ins[operand].params, relation.is_lookup,
                          relation.partner.get(operand))  # fmt: skip
                found.uses.setdefault(param, []).append(use)
    return found
