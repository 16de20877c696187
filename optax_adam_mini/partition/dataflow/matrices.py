"""Finds the matrices for Muon: kernels other than tables and output heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from optax_adam_mini.partition.dataflow.domain import Relation, Role
from optax_adam_mini.partition.dataflow.interpret import Result
from optax_adam_mini.partition.dataflow.program import Step

_SORTS = {"sort", "top_k", "approx_top_k"}
_GROUPS = ("feature_group_count", "batch_group_count")  # of a convolution


class Matrix(NamedTuple):
    """The axes of a parameter that are inputs and outputs; other axes stack several matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def find_matrices(results: Sequence[Result]) -> list[Matrix | str]:
    """For every parameter, its matrix or the reason why it has none.

    An output head is a kernel whose outputs meet no further kernel on their way to the loss.
    """
    met = {result: _meeting_kernels(result) for result in set(results)}
    found: list[Matrix | str] = []
    for index, result in enumerate(results):
        roles = result.roles[index]
        inputs, outputs = (
            tuple(axis for axis, found in enumerate(roles) if role in found)
            for role in (Role.REDUCTION, Role.OUTPUT)
        )
        uses = result.uses.get(index, ())
        is_chosen = any(use.is_lookup for use in uses)
        is_grouped = any(use.step.params.get(name, 1) > 1 for use in uses for name in _GROUPS)
        # An output axis may hold heads that each have a kernel of their own.
        of_heads = set[Role]() if is_chosen or is_grouped else {Role.OUTPUT, Role.BATCH}
        has_one_role = all(len(axis) < 2 or axis == of_heads for axis in roles)
        is_kernel = inputs and outputs and has_one_role  # an index may also choose its expert
        if not is_kernel and is_chosen:
            found.append("a table: an index chooses its rows")
        elif not (inputs and outputs):
            found.append("not a kernel: it lacks input or output axes")
        elif not has_one_role:
            found.append("not one matrix: an axis is an input in one use and an output in another")
        elif all(met[result].isdisjoint(step.outputs) for step in _used_in(result, index)):
            found.append("an output head: its outputs meet no further kernel")
        else:
            found.append(Matrix(inputs, outputs))
    return found


def _used_in(result: Result, index: int) -> list[Step]:
    """The steps in which a parameter, or a value that is still that parameter, is a kernel."""
    return [
        step
        for step, relation in result.trail
        for operand in _kernels(result, step, relation)
        if index in result.facts.values[step.inputs[operand]].params
    ]


def _kernels(result: Result, step: Step, relation: Relation) -> list[int]:
    """The operands that are kernels in a step: parameters contracted with data."""
    found: list[int] = []
    for operand in relation.uses:
        shape = result.facts.values[step.inputs[operand]].shape
        linked = {a for link in relation.links if link.operand == operand for a in link.axes}
        if relation.partner.get(operand) is not None and set(range(len(shape))) - linked:
            found.append(operand)
    return found


def _meeting_kernels(result: Result) -> set[int]:
    """The values that meet a kernel, or that such values depend on."""
    found, count = set[int](), -1
    while count != (count := len(found)):
        for step, relation in reversed(result.trail):
            # All steps count for a frozen parameter, and its trail has them all.
            if step.is_backward or (relation.is_stopped and result.trail is not result.facts.trail):
                continue
            if step.name in _SORTS:  # no gradient passes through an index
                found.update(
                    i for i, out in zip(step.inputs, step.outputs, strict=False) if out in found
                )
            elif _kernels(result, step, relation) or not found.isdisjoint(step.outputs):
                found.update(step.inputs)
    return found
