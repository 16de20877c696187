"""`explain`: why a parameter is cut as it is, and the messages for what cannot be read."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import check_used, first_few, path_str
from optax_adam_mini.partition.dataflow.backward import find_groups
from optax_adam_mini.partition.dataflow.domain import Facts, Relation, Use
from optax_adam_mini.partition.dataflow.interpret import Result, interpret
from optax_adam_mini.partition.dataflow.matrices import Matrix, find_matrices
from optax_adam_mini.partition.dataflow.program import LAYOUT, LINEAR, Step
from optax_adam_mini.partition.dataflow.rows import check_v, outer_of
from optax_adam_mini.partition.dataflow.specs import spec_of
from optax_adam_mini.product import Outer, Spec

# Whose code is not the user's own.
_LIBRARIES = ("jax", "jaxlib", "flax", "haiku", "equinox", "optax", "optax_adam_mini")
_MANY = 8  # uses: up to this many are each tried alone


def explain(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    parameter: str,
    v: Literal["outer", "mean"] = "outer",
    muon: bool = False,
    **kwargs: Any,
) -> str:
    """Explains why `infer_block_specs` cuts a parameter as it does.

    Args:
        fn: as in `infer_block_specs`, with its arguments.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments of `fn`.
        parameter: the path `"a/b/c"` of the parameter to explain; `""` if
            `params` is one array.
        v: `"outer"` or `"mean"`, as in `infer_block_specs`.
        muon: whether to say also which axes make a matrix for Muon, or why
            Muon leaves the parameter to Adam-mini.
        **kwargs: further keyword arguments of `fn`.

    Returns:
        A few lines of text, with files and lines of your code. They list what
        is kept and the paper's cut; each use of the parameter, and which of
        its axes are contracted there; each inner product that couples its
        outputs; and code that was passed over, because no output depends on
        it, no gradient goes through it, or it is a derivative's backward pass.

    Raises:
        ValueError: if no parameter has this path.
        TypeError: if a leaf of `params` is not an array.

    Examples:
        >>> print(explain(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones((5, 2)),
        ...               parameter="w"))  # doctest: +ELLIPSIS
        w (2, 3): kept: 2 rows and 3 columns; v is their product
          the paper's cut: 1 x 3 blocks
          used in dot_general at ...: with (5, 2), axis 0 is contracted, axis 1 is free
    """
    check_v("explain", v)
    leaves = leaves_with_path(params)
    paths = [path_str(keys) for keys, _ in leaves]
    check_used(
        f"explain: parameter={parameter!r}", lambda path: path == parameter, str(parameter), params
    )
    if parameter not in paths:  # there are none, or others are in another part of the tree
        raise ValueError(f"explain: params have no parameter at {parameter!r}")
    results = interpret("explain", fn, params, *args, **kwargs)
    result = results[index := paths.index(parameter)]
    shape = leaves[index][1].shape
    grid = " x ".join(map(str, spec_of(shape, result, index).grid(shape)))
    blocks = f"{grid or 1} block{'s' if grid not in ('', '1') else ''}"
    blocks += "" if shape else ": a number has one"
    lines = [f"{parameter} {shape}: {blocks}"]
    if v == "outer":
        kept = _kept(outer_of(shape, result, index), shape)
        lines = [f"{parameter} {shape}: kept: {kept}", f"  the paper's cut: {blocks}"]
    if muon:
        lines.append(f"  Muon: {_for_muon(find_matrices(results)[index])}")
    lines += _uses(shape, result, index)
    coupled = dict.fromkeys(
        f"{step.name} at {place(step)}, of {_shapes(result.facts, step)}"
        for step in result.coupled.get(index, [])
    )
    lines += [f"  outputs coupled by the inner product in {where}" for where in coupled]
    lines += [
        f"  not read in {step.name} at {place(step)}" for step in result.unread.get(index, [])
    ]
    if index not in result.uses:
        lines.append("  meets no data in fn that an output depends on")
    lines += [f"  passed over: {words}" for words in dict.fromkeys(_passed_over(result, index))]
    return "\n".join(lines)


def _for_muon(matrix: Matrix | str) -> str:
    if isinstance(matrix, str):
        return f"left to Adam-mini, {matrix}"
    inputs, outputs = (_axes(axes, "axis") for axes in matrix)
    return f"a matrix, {inputs} of inputs and {outputs} of outputs"


def _kept(spec: Spec, shape: Sequence[int]) -> str:
    """What `nu` keeps for a parameter."""
    if not isinstance(spec, Outer):
        return "one number for each coordinate"
    return f"{spec.a.size(shape):,} rows and {spec.b.size(shape):,} columns; v is their product"


def place(step: Step) -> str:
    """File and line of a step in the user's code."""
    frames = [frame for found in step.tracebacks if found is not None for frame in found.frames]
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES)
    folders = tuple(os.path.dirname(file) + os.sep for file in files if file)
    own = [frame for frame in frames if not frame.file_name.startswith(folders)]
    if not own:
        return "an unknown place"
    return f"{own[0].file_name}:{own[0].line_num}"


def why_unread(path: str, shape: Sequence[int], result: Result, index: int) -> str:
    """Why it is unknown what a parameter does; empty if it is known."""
    if steps := result.unread.get(index, ()):
        where = dict.fromkeys(f"{step.name} at {place(step)}" for step in steps)
        return (
            f"{path or 'params'} {tuple(shape)}: goes into {first_few(list(where))}, without a rule"
        )
    if index not in result.uses and math.prod(shape) > 1:
        where = dict.fromkeys(f"{s.name} at {place(s)}" for s in _takers(result.facts, index))
        return (
            f"{path or 'params'} {tuple(shape)}: meets no data in fn that an output depends on; "
            + (f"goes into {first_few(list(where))}" if where else "fn does not use it")
        )
    return ""


def _uses(shape: Sequence[int], result: Result, index: int) -> list[str]:
    """A line for each use of a parameter."""
    uses = result.uses.get(index, [])
    words = [f"  {_words(result.facts, use, index)}" for use in uses]
    sizes = [
        math.prod(_alone(shape, result, index, use)) if 1 < len(uses) <= _MANY else 0
        for use in uses
    ]
    if len(set(sizes)) > 1:
        words = [
            f"{line} (the finest cut)" if size == max(sizes) else line
            for line, size in zip(words, sizes, strict=True)
        ]
    return list(dict.fromkeys(words))


def _alone(shape: Sequence[int], result: Result, index: int, use: Use) -> tuple[int, ...]:
    """The grid that a parameter would get from this use alone."""

    def without(step: Step, relation: Relation) -> Relation:
        others = {
            other.operand
            for other in result.uses[index]
            if other.step is step and (other.step, other.operand) != (use.step, use.operand)
        }
        return dataclasses.replace(
            relation,
            uses={
                operand: axes for operand, axes in relation.uses.items() if operand not in others
            },
            cuts=[(operand, axis) for operand, axis in relation.cuts if operand not in others],
            spent=relation.spent - others,
            keeps=relation.keeps - others,
        )

    trail = [(step, without(step, relation)) for step, relation in result.trail]
    labels = find_groups(result.facts, trail)[result.facts.program.inputs[index]]
    alone = dataclasses.replace(result, labels=[*result.labels])
    alone.labels[index] = labels
    return spec_of(shape, alone, index).grid(shape)


def _words(facts: Facts, use: Use, index: int) -> str:
    """Describes a use."""
    step, operand = use.step, use.operand
    relation = next(found for other, found in facts.trail if other is step)
    value = facts.values[step.inputs[operand]]
    where = f"{step.name} at {place(step)}"
    own = [sorted(a for f in factors for p, a in f.own if p == index) for factors in value.axes]
    linked = {a for link in relation.links if link.operand == operand for a in link.axes}
    cut = {axis for found, axis in relation.cuts if found == operand}
    if operand in relation.spent:
        return f"taken as data in {where}"
    if operand not in relation.uses:
        return f"combined with data in {where}"
    if use.is_lookup:
        axes = sorted({a for axis in cut for a in own[axis]})
        return f"used in {where}: rows are chosen along {_axes(axes, 'axis')}"
    if use.partner is None or not set(range(len(value.shape))) - linked:
        return f"used in {where}: " + ("each coordinate by itself" if cut else "as a gain")
    met = facts.values[step.inputs[use.partner]].shape
    roles = {
        "contracted": [a for axis in range(len(own)) if axis not in linked for a in own[axis]],
        "batch": [a for axis in sorted(cut & linked) for a in own[axis]],
        "free": [a for axis in sorted(linked - cut) for a in own[axis]],
    }
    said = [f"{_axes(axes, 'axis')} {_is(axes)} {role}" for role, axes in roles.items() if axes]
    return f"used in {where}: with {met}, " + ", ".join(said)


def _axes(axes: Sequence[int], word: str) -> str:
    return f"{word if len(set(axes)) < 2 else 'axes'} {', '.join(map(str, dict.fromkeys(axes)))}"


def _is(axes: Sequence[int]) -> str:
    return "is" if len(set(axes)) < 2 else "are"


def _shapes(facts: Facts, step: Step) -> str:
    return " and ".join(str(value.shape) for value in facts.inputs(step)[:2])


def _takers(facts: Facts, index: int) -> list[Step]:
    """The steps that take in a parameter, including those that no output depends on."""
    found = facts.program.inputs[index]
    steps = [*facts.program.steps, *facts.program.unused]
    return [step for step in steps if found in step.inputs]


def _passed_over(result: Result, index: int) -> list[str]:
    """The steps that take in a parameter without using it."""
    facts = result.facts
    words: list[str] = []
    for step in facts.program.steps:
        if any(index in value.params for value in facts.inputs(step)):
            if step.is_backward:
                words.append(f"{step.name} at {place(step)}, of a derivative")
            elif id(step) in facts.program.stopped and step.name not in LINEAR | LAYOUT:
                words.append(f"{step.name} at {place(step)}, which no gradient passes through")
    unused = {facts.program.inputs[index]}
    for step in facts.program.unused:
        if not unused.isdisjoint(step.inputs):
            if step.name in LINEAR | LAYOUT:
                unused.update(step.outputs)
            else:
                words.append(f"{step.name} at {place(step)}, which no output depends on")
    return words
