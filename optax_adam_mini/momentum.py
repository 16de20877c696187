"""Muon's momentum: orthogonalized in pieces, stored for whole kernels, in 8 bits if asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_adam_mini.boxes import leaves_with_path, with_kept_names
from optax_adam_mini.dimension_numbers import Pieces, rows_of, scale_of
from optax_adam_mini.hyperparams import check_param_dtype
from optax_adam_mini.labels import first_few, path_of, path_str
from optax_adam_mini.quantized import (
    RowCodes,
    check_stored_dtype,
    narrowed,
    read_row,
    tree_in,
    write_row,
)
from optax_adam_mini.random_bits import rounding_seeds, salt_of
from optax_adam_mini.sums import widen, zeros_beside


def scale_by_muon_in_pieces(
    orthogonalize: Callable[[list[Pieces]], optax.GradientTransformation],
    pieces_of: Callable[[Any], list[Pieces]],
    mu_dtype: Any,
    consistent_rms: Any,
) -> optax.GradientTransformation:
    """`scale_by_muon` on pieces in float32, with momenta stored for whole kernels in `mu_dtype`."""

    def init_fn(params: Any) -> Any:
        for keys, p in leaves_with_path(params):
            path, of_param = path_str(keys) or "params", jnp.result_type(p)
            check_param_dtype(path, of_param, mu_dtype)
            if not jnp.issubdtype(of_param, jnp.inexact):
                raise TypeError(
                    f"{path}: expected a matrix of floating-point numbers, got {of_param}: give "
                    "None in muon_weight_dimension_numbers"
                )
        pieces, treedef = pieces_of(params), jax.tree.structure(params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype or jnp.result_type(p)), params)
        if mu_dtype == jnp.int8:
            of_rows = lambda p, piece: functools.partial(
                _largest, rows_of(p.shape, piece.numbers)[0]
            )
            rows = [  # with the shardings of what `update` makes
                zeros_beside(p, jax.eval_shape(of_rows(p, piece), p))
                for p, piece in zip(jax.tree.leaves(params), pieces, strict=True)
            ]
            mu = RowCodes(mu, with_kept_names(treedef.unflatten(rows), params))
        with_scalars: Any = orthogonalize([]).init([])
        return with_scalars._replace(mu=mu)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        pieces, treedef = pieces_of(updates), jax.tree.structure(updates)
        _check_momentum(state.mu, updates, pieces, mu_dtype)
        wide = lambda x: x.astype(widen(x.dtype))
        split = lambda tree: [
            piece.split(wide(x)) for x, piece in zip(jax.tree.leaves(tree), pieces, strict=True)
        ]
        join = lambda parts: treedef.unflatten(
            piece.join(x) for x, piece in zip(parts, pieces, strict=True)
        )
        new: Any
        after: Any
        new, after = orthogonalize(pieces).update(
            split(updates), state._replace(mu=split(_read(state.mu)))
        )
        scaled = [
            [u * scale_of(u.shape, piece.numbers, consistent_rms) for u in parts]
            for parts, piece in zip(new, pieces, strict=True)
        ]
        return join(scaled), after._replace(
            mu=_written(join(after.mu), state.mu, after.count, pieces, mu_dtype, params)
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _largest(axes: tuple[int, ...], m: Any) -> Any:
    return jnp.max(m, axes, keepdims=True, initial=0).astype(jnp.bfloat16)


def _read(mu: Any) -> Any:
    """The momentum from a state, as a tree like the parameters."""
    if not isinstance(mu, RowCodes):
        return mu
    codes, treedef = jax.tree.flatten(mu.codes)
    pairs = zip(codes, jax.tree.leaves(mu.largest), strict=True)
    return jax.tree.unflatten(treedef, [read_row(*pair) for pair in pairs])


def _check_momentum(mu: Any, updates: Any, pieces: list[Pieces], mu_dtype: Any) -> None:
    """Refuses a momentum of other matrices or with another `mu_dtype`."""
    is_int8 = isinstance(mu, RowCodes)
    if is_int8 != (mu_dtype == jnp.int8):
        raise ValueError(
            f"the state's mu is {'int8' if is_int8 else 'not int8'}, but the transformation has "
            f"mu_dtype={mu_dtype}: pass the mu_dtype that the state was made with. Muon's momentum "
            "cannot be converted: to restart it, use the momentum of tx.init(params)"
        )
    shapes = lambda tree: {
        path_str(keys) or "params": jnp.shape(x) for keys, x in leaves_with_path(tree)
    }
    stored = tree_in(mu)
    for keys, x in leaves_with_path(stored):
        check_stored_dtype(path_str(keys), x, is_codes=is_int8)
    found, expected = shapes(stored), shapes(updates)
    if is_int8 and found == expected:
        found = shapes(mu.largest)
        rows = zip(expected.items(), pieces, strict=True)
        expected = {path: rows_of(shape, piece.numbers)[1] for (path, shape), piece in rows}
    if found != expected:
        differ = [p for p in {**found, **expected} if found.get(p) != expected.get(p)]
        raise ValueError(
            f"the state's momentum does not fit the matrices at {first_few(differ)}: pass the "
            "parameters, and the muon_weight_dimension_numbers, that init got"
        )


def _written(
    mu: Any, old: Any, count: Any, pieces: list[Pieces], mu_dtype: Any, params: Any
) -> Any:
    """The momentum as a state stores it, in the boxes of the old one."""
    if not isinstance(old, RowCodes):
        like = old if params is None else params
        dtypes = [mu_dtype or jnp.result_type(x) for x in jax.tree.leaves(like)]
        cast = [narrowed(m, d) for m, d in zip(jax.tree.leaves(mu), dtypes, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(old), cast)
    seeds = rounding_seeds(count, [salt_of(path_of(keys)) for keys, _ in leaves_with_path(mu)])
    pairs = [
        write_row(m, rows_of(m.shape, piece.numbers)[0], seed)
        for m, piece, seed in zip(jax.tree.leaves(mu), pieces, seeds, strict=True)
    ]
    in_tree_of = lambda i: jax.tree.unflatten(jax.tree.structure(old[i]), [p[i] for p in pairs])
    return RowCodes(in_tree_of(0), in_tree_of(1))


def coefficients(given: Any) -> Any:
    """The coefficients, in an array that no state shares and no donation deletes."""
    from optax.contrib import muon

    if isinstance(given, str):  # a preset: Optax's state has its numbers
        with jax.ensure_compile_time_eval():
            given = optax.tree.get(muon(1.0, given).init(jnp.zeros((1, 1))), "ns_coeffs")
    return given if isinstance(given, jax.core.Tracer) else np.asarray(given)


def check_coefficients(given: Any, steps: int) -> None:
    """Refuses what are no coefficients of the Newton-Schulz iteration.

    Raises:
        ValueError: if they are not.
    """
    from optax.contrib import muon

    found: Any = given
    if isinstance(given, str):  # optimizers may be built before jax.distributed.initialize
        state = jax.eval_shape(muon(1.0, given).init, jax.ShapeDtypeStruct((1, 1), jnp.float32))
        found = optax.tree.get(state, "ns_coeffs")
    elif not isinstance(given, jax.core.Tracer):
        found = np.asarray(given)
    is_number = jnp.issubdtype(found.dtype, jnp.number)
    if found.ndim not in (1, 2) or found.shape[-1] != 3 or not found.size or not is_number:
        raise ValueError(
            f"ns_coeffs must be three numbers, or three for each step, got {given!r} of shape "
            f"{found.shape}"
        )
    if isinstance(found, np.ndarray) and not np.isfinite(found).all():
        raise ValueError(f"ns_coeffs must be finite, got {given!r}")
    if found.ndim == 2 and found.shape[0] > steps:
        raise ValueError(
            f"ns_coeffs has coefficients for {found.shape[0]} steps, and ns_steps is {steps}: give "
            "as many steps"
        )
