"""Transforms and linear algebra: batch axes stay, and the axes of a matrix are mixed.

A Fourier transform mixes the indices of an axis, and a product in the frequency domain is a
convolution. A parameter that is itself decomposed is unread.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.axes import Indices
from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.registry import layout, rule


@rule("fft")
def _fft(facts: Facts, step: Step) -> Relation:
    rank = len(facts.inputs(step)[0].shape)
    transformed = range(rank - len(step.params["fft_lengths"]), rank)
    links = [Link(0, (axis,), (axis,), is_mixed=axis in transformed) for axis in range(rank)]
    return layout(facts, step, links, indices=dict.fromkeys(transformed, Indices.FREQUENCIES))


@rule("custom_linear_solve")
def _linear_solve(facts: Facts, step: Step) -> Relation:
    """The solution has the axes of the right-hand side, which is the last operands."""
    first = len(step.inputs) - len(step.outputs)
    links = [
        Link(first + result, (axis,), (axis,), result, is_lost=True)
        for result, out in enumerate(facts.outputs(step))
        for axis in range(len(out.shape))
    ]
    weights = {i for i, value in enumerate(facts.inputs(step)) if value.is_weight}
    return layout(facts, step, links, keeps=set(), unread=weights)


@rule("cholesky", "cholesky_update", "lu", "qr", "eigh", "eig", "svd", "schur", "hessenberg",
      "tridiagonal", "householder_product", "geqrf", "geqp3", "lu_pivots_to_permutation",
      "triangular_solve", "tridiagonal_solve")  # fmt: skip
def _of_matrices(facts: Facts, step: Step) -> Relation:
    """The last two axes are those of a matrix."""
    ins = facts.inputs(step)
    links: list[Link] = []
    for result, out in enumerate(facts.outputs(step)):
        for operand, value in enumerate(ins):
            batch = range(min(len(value.shape) - 2, len(out.shape)))
            links += [
                Link(operand, (a,), (a,), result) for a in batch if value.shape[a] == out.shape[a]
            ]
    found = layout(facts, step, links, keeps=set())
    if step.name == "triangular_solve":  # the columns of the right-hand side stay
        rank = len(ins[1].shape)
        columns = rank - 1 if step.params["left_side"] else rank - 2
        found.links.append(Link(1, (columns,), (columns,)))
    for operand, value in enumerate(ins):
        linked = {a for link in found.links if link.operand == operand for a in link.axes}
        own = [a for a, n in enumerate(value.shape) if n > 1 and value.is_own(a)]
        mixed = [axis for axis in own if axis not in linked]
        if facts.acts(value):  # activations, each coordinate scaled by a parameter
            found.cuts += [(operand, axis) for axis in mixed]
        elif mixed:
            found.unread.add(operand)
        if value.is_weight:
            found.kind = Kind.DATA
            found.spent.add(operand)
    return found
