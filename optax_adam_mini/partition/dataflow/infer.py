"""`infer_block_specs` and `infer_muon_dimension_numbers`: read the model by tracing the loss."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.dimension_numbers import check_fits
from optax_adam_mini.labels import check_only_params, check_used, compiled_rules, path_str
from optax_adam_mini.partition.dataflow.explain import why_unread
from optax_adam_mini.partition.dataflow.interpret import interpret
from optax_adam_mini.partition.dataflow.matrices import Matrix, find_matrices
from optax_adam_mini.partition.dataflow.rows import check_v, outer_of
from optax_adam_mini.partition.dataflow.specs import spec_of
from optax_adam_mini.product import Spec


def infer_block_specs(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    overrides: Sequence[tuple[str, Spec]] = (),
    unreadable: Spec | None = None,
    v: Literal["outer", "mean"] = "outer",
    **kwargs: Any,
) -> Any:
    """Finds the blocks of every parameter by tracing your loss.

    It traces `fn` with abstract values: nothing is computed, and no array is
    allocated. It does not rely on layer names. Where a parameter meets data,
    its free axes separate blocks (neurons, channels) and its contracted axes
    lie inside a block. Outputs that meet in an inner product, as queries and
    keys do, are one block (a head). An indexed axis separates blocks (tokens),
    and so does an axis along which layers are stacked. A gain is one block. A
    bias is cut per coordinate. A parameter with several uses gets the finest
    cut that every use allows (the paper's section 2.3).

    Args:
        fn: the loss or the forward pass, `fn(params, *args, **kwargs)`.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments of `fn`; arrays may be
            `jax.ShapeDtypeStruct`s, and anything else is passed as it is.
        overrides: pairs `(pattern, spec)`. The first whose regular expression
            is found (`re.search`) in a parameter's path `"a/b/c"` gives its
            spec.
        unreadable: spec of the parameters that cannot be read; None makes them
            an error.
        v: `"outer"` keeps a row and a column (see `outer`): one number for
            each output and, in each part of a fused kernel, one for each
            input. An embedding has one for each token and one for each
            feature; gains and biases keep `v` per coordinate. `"mean"` keeps
            one number for each block, as in the paper; its loss on language
            models is 2 to 3% worse.
        **kwargs: further keyword arguments of `fn`.

    Returns:
        A pytree with the structure of `params`. It has an `Outer` for each
        parameter, or a `BlockSpec` for gains and biases and with `v="mean"`.

    Raises:
        ValueError: if a parameter or its outputs go into a primitive without a
            rule, such as your own kernel, or if a parameter meets no data. The
            message names all such parameters, and the lines of your code. Also
            if an override is not a regular expression, matches no parameter,
            or does not fit the parameter's shape, if `v` is another word, or
            if `params` has NNX variables that are not parameters.
        TypeError: if `fn` is not a function, an override is not a pair of a
            pattern and a spec, `unreadable` is not a spec, or a leaf of
            `params` is not an array.

    Examples:
        >>> def attention(p, x):
        ...     q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "abc")
        ...     weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
        ...     return jnp.einsum("hts,shk->thk", weights, v)
        >>> params = {name: jax.ShapeDtypeStruct((16, 4, 8), "float32") for name in "abc"}
        >>> x = jax.ShapeDtypeStruct((5, 16), "float32")
        >>> infer_block_specs(attention, params, x)["a"]
        outer(per_neuron(axis=0), per_neuron(axis=(1, 2)))
        >>> infer_block_specs(attention, params, x, v="mean")
        {'a': per_neuron(axis=1), 'b': per_neuron(axis=1), 'c': per_neuron(axis=(1, 2))}
    """
    rules = compiled_rules("infer_block_specs: overrides", overrides)
    leaves = leaves_with_path(params)
    check_v("infer_block_specs", v)
    if unreadable is not None and not isinstance(unreadable, Spec):
        raise TypeError(
            "infer_block_specs: unreadable must be a BlockSpec such as per_element(), got "
            f"{unreadable!r} of type {type(unreadable).__name__}"
        )
    paths, treedef = [path_str(keys) for keys, _ in leaves], jax.tree.structure(params)
    _check_params("infer_block_specs", params, rules)
    results = interpret("infer_block_specs", fn, params, *args, **kwargs)
    specs: list[Spec] = []
    unread: list[str] = []
    for index, (path, (_, leaf)) in enumerate(zip(paths, leaves, strict=True)):
        override = next((spec for rule, spec in rules if rule.search(path)), None)
        why = why_unread(path, leaf.shape, results[index], index)
        given = override or (unreadable if why else None)
        if given is not None:
            try:
                given.check(leaf.shape)
            except ValueError as error:
                raise ValueError(f"{path or 'params'}: {error}") from error
            note = "unreadable" if override is None else "override"
            specs.append(dataclasses.replace(given, note=note))
        elif why:
            unread.append(why)
        else:
            specs.append((outer_of if v == "outer" else spec_of)(leaf.shape, results[index], index))
    _refuse_unread(
        "infer_block_specs",
        unread,
        "specs: overrides=[(pattern, spec)], or unreadable=spec for all",
    )
    return jax.tree.unflatten(treedef, specs)


def infer_muon_dimension_numbers(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    overrides: Sequence[tuple[str, Any]] = (),
    unreadable: Any = ...,
    **kwargs: Any,
) -> Any:
    """Finds `optax.contrib.muon`'s dimension numbers by tracing your loss.

    Muon orthogonalizes the matrices of a model. It must know which axes of a
    parameter are inputs, which are outputs, and along which axes matrices are
    stacked. Where a parameter meets data, its contracted axes are inputs and
    its free axes are outputs. The other axes are stacked layers, experts or
    groups.

    Args:
        fn: the loss or the forward pass, `fn(params, *args, **kwargs)`.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments of `fn`; arrays may be
            `jax.ShapeDtypeStruct`s.
        overrides: pairs `(pattern, dimension numbers or None)`. The first
            whose regular expression is found (`re.search`) in a parameter's
            path gives its numbers.
        unreadable: dimension numbers of the parameters that cannot be read, or
            `None` to leave them to Adam; without this option they are an
            error.
        **kwargs: further keyword arguments of `fn`.

    Returns:
        A pytree of `optax.contrib.MuonDimensionNumbers` with the structure of
        `params`, and with `None` for parameters that are left to Adam because
        they are not matrices. These are gains, biases, embeddings, output
        heads (kernels whose outputs meet no further kernel on their way to the
        loss), grouped convolutions, and parameters with an axis that is an
        input in one use and an output in another.

    Raises:
        ValueError: if a parameter or its outputs go into a primitive without a
            rule, if a parameter meets no data, if an override is not a
            regular expression, matches no parameter or does not fit its
            shape, or if `params` has NNX variables that are not parameters.
        TypeError: if an override is not a pair of a pattern and dimension
            numbers or `None`, if `unreadable` is neither, or if a leaf of
            `params` is not an array.

    Examples:
        >>> params = {"w": jnp.ones((4, 16, 2, 8)), "g": jnp.ones(16), "head": jnp.ones((2, 8, 3))}
        >>> def loss(p, x):  # four experts, each with outputs of two axes, and a head
        ...     x = jnp.einsum("ebd,edhk->ebhk", x * p["g"], p["w"])
        ...     return jnp.einsum("ebhk,hkc->ebc", jnp.tanh(x), p["head"]).sum()
        >>> found = infer_muon_dimension_numbers(loss, params, jnp.ones((4, 5, 16)))
        >>> found["w"], found["head"]
        (MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3)), None)
        >>> optimizer = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=found)
    """
    from optax.contrib import MuonDimensionNumbers

    name = "infer_muon_dimension_numbers"
    rules = compiled_rules(f"{name}: overrides", overrides, (MuonDimensionNumbers, type(None)))
    if not isinstance(unreadable, (MuonDimensionNumbers, type(None), type(...))):
        raise TypeError(
            f"{name}: unreadable must be MuonDimensionNumbers, or None to leave the parameter to "
            f"Adam, got {unreadable!r} of type {type(unreadable).__name__}"
        )
    leaves, treedef = leaves_with_path(params), jax.tree.structure(params)
    _check_params(name, params, rules)
    results = interpret(name, fn, params, *args, **kwargs)
    matrices = find_matrices(results)
    numbers: list[Any] = []
    unread: list[str] = []
    for index, (keys, leaf) in enumerate(leaves):
        path = path_str(keys)
        given = [found for rule, found in rules if rule.search(path)]
        if not given and (why := why_unread(path, leaf.shape, results[index], index)):
            unread += [why] if unreadable is ... else []
            given = [unreadable]
        if given:
            if isinstance(given[0], MuonDimensionNumbers):
                check_fits(path or "params", given[0], leaf.shape)
            numbers.append(given[0])
        else:
            matrix = matrices[index]
            numbers.append(MuonDimensionNumbers(*matrix) if isinstance(matrix, Matrix) else None)
    _refuse_unread(
        name,
        unread,
        "dimension numbers: overrides=[(pattern, dimension numbers)], or unreadable=None for Adam",
    )
    return jax.tree.unflatten(treedef, numbers)


def _check_params(name: str, params: Any, rules: Sequence[tuple[re.Pattern[str], Any]]) -> None:
    """Refuses data in the place of parameters, overrides of nothing, and NNX's other variables."""
    leaves = leaves_with_path(params)
    dtypes = [getattr(leaf, "dtype", float) for _, leaf in leaves]
    if leaves and not any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
        raise TypeError(
            f"{name}: expected the parameters after the function, got "
            f"{jnp.result_type(leaves[0][1])} at {path_str(leaves[0][0]) or 'params'}: call "
            f"{name}(fn, params, *args)"
        )
    for rule, _ in rules:
        check_used(f"{name}: the override {rule.pattern!r}", rule.search, rule.pattern, params)
    check_only_params(name, params, lambda path: any(rule.search(path) for rule, _ in rules))


def _refuse_unread(name: str, unread: Sequence[str], remedy: str) -> None:
    if unread:
        raise ValueError(
            f"{name} cannot tell how these parameters, or their outputs, are used:\n"
            + "\n".join(unread)
            + f"\nGive their {remedy}"
        )
