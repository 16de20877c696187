"""`infer_block_specs`: the partition read off the computation, and why it is so."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from optax_adam_mini.blocks import BlockSpec, Cut, per_head, per_neuron
from optax_adam_mini.labels import check_used, compiled_rules, path_str, some
from optax_adam_mini.partition.dataflow.domain import Role
from optax_adam_mini.partition.dataflow.groups import ALONE, UNSEEN, Label
from optax_adam_mini.partition.dataflow.interpret import Result, interpret
from optax_adam_mini.partition.dataflow.program import Step

# Where the code of libraries is, in which no user looks for a layer.
_LIBRARIES = re.compile(r"[\\/](jax|jaxlib|flax|haiku|equinox|optax|optax_adam_mini)[\\/]")


def infer_block_specs(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    overrides: Sequence[tuple[str, BlockSpec]] = (),
    unreadable: BlockSpec | None = None,
    **kwargs: Any,
) -> Any:
    """The blocks of every parameter, read off the computation; no layer is known by its name.

    `fn` is traced on abstract values: nothing is computed, and no array allocated. Where a
    parameter meets data, its contracted axes lie inside a block and its free axes separate blocks:
    neurons, channels. Outputs that are contracted with one another in an inner product, as queries
    and keys are, act through one number, and are one block: a head. An axis that is indexed
    separates blocks (tokens), as does one that layers are stacked along; a gain is one block; a
    bias is cut per coordinate. A parameter that is used several times gets the finest cut that
    every use allows (the principle of the paper's section 2.3).

    Args:
        fn: the loss or the forward pass, `fn(params, *args, **kwargs)`.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments of `fn`; arrays may be `jax.ShapeDtypeStruct`s, and what is no
            array is passed as it is.
        overrides: `(pattern, spec)`: the first rule whose regular expression is found (`re.search`)
            in a parameter's path `"a/b/c"` gives its spec, whatever the computation says.
        unreadable: spec of the parameters that cannot be read, which are an error without it.
        **kwargs: further keyword arguments of `fn`.

    Returns:
        A pytree of `BlockSpec` with the structure of `params`.

    Raises:
        ValueError: if a parameter, or what it makes, goes into a primitive that nothing is known
            of, such as a kernel of your own, or if it meets no data at all; the message names all
            such parameters and where in your code it happens. Also if an override is no regular
            expression, matches no parameter, or does not fit the parameter's shape.
        TypeError: if an override is no pair of a pattern and a spec, or `unreadable` no spec.

    Examples:
        >>> def attention(p, x):
        ...     q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "abc")
        ...     weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
        ...     return jnp.einsum("hts,shk->thk", weights, v)
        >>> params = {name: jax.ShapeDtypeStruct((16, 4, 8), "float32") for name in "abc"}
        >>> specs = infer_block_specs(attention, params, jax.ShapeDtypeStruct((5, 16), "float32"))
        >>> {name: spec.grid((16, 4, 8)) for name, spec in specs.items()}
        {'a': (1, 4, 1), 'b': (1, 4, 1), 'c': (1, 4, 8)}
    """
    rules = compiled_rules("infer_block_specs: overrides", overrides)
    if unreadable is not None and not isinstance(unreadable, BlockSpec):
        raise TypeError(
            "infer_block_specs: unreadable must be a BlockSpec such as per_element(), got "
            f"{unreadable!r} of type {type(unreadable).__name__}"
        )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [path_str(keys) for keys, _ in leaves]
    for rule, _ in rules:
        check_used(f"infer_block_specs: the override {rule.pattern!r}", rule.search, rule.pattern,
                   params)  # fmt: skip
    result = interpret(fn, params, *args, **kwargs)
    specs: list[BlockSpec] = []
    unread: list[str] = []
    for index, (path, (_, leaf)) in enumerate(zip(paths, leaves, strict=True)):
        override = next((spec for rule, spec in rules if rule.search(path)), None)
        why = _why_unread(path, leaf.shape, result, index)
        given = override or (unreadable if why else None)
        if given is not None:
            try:
                given.grid(leaf.shape)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            note = "unreadable" if override is None else "override"
            specs.append(dataclasses.replace(given, note=note))
        elif why:
            unread.append(why)
        else:
            specs.append(_spec(leaf.shape, result, index))
    _refuse_unread(
        "infer_block_specs", unread, "overrides=[(pattern, spec)], or unreadable=spec for all"
    )
    return jax.tree.unflatten(treedef, specs)


def infer_muon_dimension_numbers(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    overrides: Sequence[tuple[str, Any]] = (),
    **kwargs: Any,
) -> Any:
    """`optax.contrib.muon`'s dimension numbers of every matrix, read off the computation.

    Muon orthogonalizes the matrices of a model and has to be told which axes of a parameter are a
    matrix's inputs, which its outputs, and along which there are several matrices. What
    [`infer_block_specs`][] reads tells it: where a parameter meets data, the contracted axes are
    inputs and the free axes outputs; the others are stacked layers, experts, groups.

    Args:
        fn: the loss or the forward pass, `fn(params, *args, **kwargs)`.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments of `fn`; arrays may be `jax.ShapeDtypeStruct`s.
        overrides: `(pattern, dimension numbers or None)`: the first rule whose regular expression
            is found (`re.search`) in a parameter's path gives its numbers. The usual recipe leaves
            the output head to Adam: `[("head", None)]`.
        **kwargs: further keyword arguments of `fn`.

    Returns:
        A pytree with the structure of `params`, of `optax.contrib.MuonDimensionNumbers`, and of
        `None` for what is no matrix and is left to Adam: gains, biases, embeddings, grouped
        convolutions, and parameters that are inputs in one use and outputs in another.

    Raises:
        ValueError: if a parameter, or what it makes, goes into a primitive that nothing is known
            of, if it meets no data at all, or if an override is no regular expression or matches no
            parameter.
        TypeError: if an override is no pair of a pattern and dimension numbers or `None`.

    Examples:
        >>> params = {"w": jnp.ones((4, 16, 2, 8)), "g": jnp.ones(16)}
        >>> def loss(p, x):  # four experts, each with outputs of two axes
        ...     return jnp.einsum("ebd,edhk->ebhk", x * p["g"], p["w"]).sum()
        >>> found = infer_muon_dimension_numbers(loss, params, jnp.ones((4, 5, 16)))
        >>> found["w"]
        MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3))
        >>> optimizer = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=found)
    """
    from optax.contrib import MuonDimensionNumbers

    name = "infer_muon_dimension_numbers"
    rules = compiled_rules(f"{name}: overrides", overrides, (MuonDimensionNumbers, type(None)))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    for rule, _ in rules:
        check_used(f"{name}: the override {rule.pattern!r}", rule.search, rule.pattern, params)
    result = interpret(fn, params, *args, **kwargs)
    numbers: list[Any] = []
    unread: list[str] = []
    for index, (keys, leaf) in enumerate(leaves):
        path = path_str(keys)
        given = [found for rule, found in rules if rule.search(path)]
        if given:
            numbers.append(given[0])
        elif why := _why_unread(path, leaf.shape, result, index):
            unread.append(why)
        else:
            reduction, output = (
                tuple(axis for axis, found in enumerate(result.roles[index]) if role in found)
                for role in (Role.REDUCTION, Role.OUTPUT)
            )
            is_matrix = reduction and output and all(len(f) < 2 for f in result.roles[index])
            numbers.append(MuonDimensionNumbers(reduction, output) if is_matrix else None)
    _refuse_unread(name, unread, "overrides=[(pattern, dimension numbers)]")
    return jax.tree.unflatten(treedef, numbers)


def explain(fn: Callable[..., Any], params: Any, *args: Any, parameter: str, **kwargs: Any) -> str:
    """Why a parameter is cut as `infer_block_specs` cuts it.

    Args:
        fn: as in [`infer_block_specs`][], with its arguments.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments of `fn`.
        parameter: the path `"a/b/c"` of the parameter to explain.
        **kwargs: further keyword arguments of `fn`.

    Returns:
        A few lines of text: the grid, each place where the parameter meets data, and each inner
        product that couples its outputs, with file and line in your code.

    Raises:
        ValueError: if there is no parameter of this path.

    Examples:
        >>> print(explain(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones((5, 2)),
        ...               parameter="w"))  # doctest: +ELLIPSIS
        w (2, 3): 1 x 3 blocks
          used in dot_general at ...
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [path_str(keys) for keys, _ in leaves]
    check_used("explain: parameter", lambda path: path == parameter, parameter, params)
    index = paths.index(parameter)
    result = interpret(fn, params, *args, **kwargs)
    shape = leaves[index][1].shape
    grid = " x ".join(map(str, _spec(shape, result, index).grid(shape)))
    lines = [f"{parameter} {shape}: {grid or 1} block{'s' if grid != '1' else ''}"]
    lines += [
        f"  used in {use.step.name} at {place(use.step)}" for use in result.uses.get(index, [])
    ]
    coupled = dict.fromkeys(place(step) for step in result.coupled.get(index, []))
    lines += [f"  outputs coupled by the inner product at {where}" for where in coupled]
    lines += [
        f"  not read in {step.name} at {place(step)}" for step in result.unread.get(index, [])
    ]
    return "\n".join(lines)


def place(step: Step) -> str:
    """File and line of a step in the user's code."""
    frames = [frame for found in step.tracebacks if found is not None for frame in found.frames]
    own = [frame for frame in frames if not _LIBRARIES.search(frame.file_name)]
    if not own:
        return "an unknown place"
    return f"{own[0].file_name}:{own[0].line_num}"


def _why_unread(path: str, shape: Sequence[int], result: Result, index: int) -> str:
    """Why it is not known what a parameter does; empty if it is."""
    if steps := result.unread.get(index, ()):
        where = dict.fromkeys(f"{step.name} at {place(step)}" for step in steps)
        return f"{path} {tuple(shape)}: goes into {some(list(where))}, which there is no rule for"
    if index not in result.uses and math.prod(shape) > 1:
        return f"{path} {tuple(shape)}: meets no data in fn that an output depends on"
    return ""


def _refuse_unread(name: str, unread: Sequence[str], remedy: str) -> None:
    if unread:
        raise ValueError(
            f"{name} cannot read what these parameters, or their outputs, do:\n"
            + "\n".join(unread)
            + f"\nSay it yourself, {remedy}"
        )


def _spec(shape: Sequence[int], result: Result, index: int) -> BlockSpec:
    labels = result.labels[index]
    cuts: list[tuple[int, Cut]] = []
    for axis, (size, label) in enumerate(zip(shape, labels, strict=True)):
        cut = _cut(axis, size, label)
        if cut != 1 and size > 1:
            cuts.append((axis, cut))
    spec = BlockSpec(tuple(cuts))
    grid, roles = spec.grid(shape), result.roles[index]
    outputs = [found for found in roles if Role.OUTPUT in found]
    is_lookup = any(use.is_lookup for use in result.uses.get(index, ()))
    if grid == tuple(shape) and grid:
        unit = "element"
    elif is_lookup and all(Role.BATCH in found for found in outputs):
        unit = "token"
    elif all(n == 1 for n, found in zip(grid, roles, strict=True) if found != {Role.BATCH}):
        unit = "tensor"
    elif index in result.coupled and any(
        n < size for n, size, found in zip(grid, shape, roles, strict=True) if Role.OUTPUT in found
    ):
        unit = "head"
    else:
        unit = "neuron"
    return dataclasses.replace(spec, unit=unit)


def _cut(axis: int, size: int, label: Label) -> Cut:
    """Neighbours in one group are one block.

    Where the indices of a group are apart, each run of neighbours is a block: finer, never coarser.
    """
    if label is None:
        return None
    if isinstance(label, int):
        return 1
    seen = label[label != UNSEEN]
    if len(seen) == 0 or (seen == seen[0]).all():
        # What no use has seen is as the rest is.
        return None if len(seen) and seen[0] == ALONE else 1
    label = np.where(label == UNSEEN, ALONE, label)
    borders = np.flatnonzero((label[1:] != label[:-1]) | (label[1:] == ALONE)) + 1
    sizes = np.diff([0, *borders.tolist(), size]).tolist()
    runs = [(block, len(list(run))) for block, run in itertools.groupby(sizes)]
    if len(runs) == 1:
        ((block, count),) = runs
        return None if block == 1 else count
    return tuple(
        (block * count, per_neuron(axis) if block == 1 else per_head(count, axis))
        for block, count in runs
    )
