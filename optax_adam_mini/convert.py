"""Converts the state of a running Adam to Adam-mini's, and back.

The second moment of a block is the mean of Adam's second moments over the block, at every step,
because both are moving averages of the squared gradient and the mean is linear. So the conversion
to Adam-mini's state is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.hyperparams import check_mu_dtype, check_param_dtype
from optax_adam_mini.labels import (
    BlockSpecs,
    has_outer,
    path_of,
    specs_of_some,
)
from optax_adam_mini.messages import check_counts, check_has_state
from optax_adam_mini.partition.flax_layers import flax_layers
from optax_adam_mini.product import Outer, OuterMoments, Spec, pack_nu, unpack_nu
from optax_adam_mini.quantized import Codes, check_stored_dtype, pack_mu, read, unpack_mu, write
from optax_adam_mini.random_bits import rounding_seed, salt_of
from optax_adam_mini.sums import widen
from optax_adam_mini.transform import ScaleByAdamMiniState

if TYPE_CHECKING:
    from jaxtyping import PyTree


def from_adam_state(
    state: PyTree,
    params: PyTree,
    block_specs: BlockSpecs | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> PyTree:
    """Converts the state of `optax.adamw` (or `optax.adam`) to Adam-mini's.

    `mu` and `count` are kept, so `adam_mini` can continue a run of `adamw`.

    Args:
        state: optimizer state that contains an `optax.ScaleByAdamState`, in
            any chain or wrapper, or an `nnx.Optimizer`'s `opt_state`. Not that
            of `optax.adamax`, which has the same type: its `nu` has no
            squares.
        params: the parameters that it was made for: arrays or
            `jax.ShapeDtypeStruct`s.
        block_specs: specs, or label function, of the new `adam_mini`; None for
            its default. Parameters without moments need no specs.
        mu_dtype: `mu_dtype` of the new `adam_mini`; None keeps `mu` as it is.

    Returns:
        The same structure, with a `ScaleByAdamMiniState` in place of each
        `ScaleByAdamState`. Its `nu` has the means over blocks, float32 or
        wider.

    Raises:
        TypeError, ValueError: if `state` contains no `ScaleByAdamState`, if it
            does not belong to `params`, or if the specs do not fit `params`.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 6))}
        >>> state = optax.adamw(1e-3).init(params)
        >>> state = from_adam_state(state, params, per_neuron())
        >>> updates, state = adam_mini(1e-3, block_specs=per_neuron()).update(params, state, params)
        >>> state[0].nu["kernel"].shape
        (1, 6)
    """
    dtype = check_mu_dtype(mu_dtype)

    def convert(path: Any, spec: Spec, m: Any, v: Any, param: Any) -> tuple[Any, Any]:
        if v.shape != jnp.shape(param):
            raise ValueError(f"nu has shape {v.shape}, the parameter {jnp.shape(param)}")
        check_param_dtype("/".join(path), m.dtype, dtype)
        nu: Any = spec.block_mean(jnp.real(v).astype(widen(jnp.real(v).dtype)))
        # Updates count from 1, so no later step uses the random numbers of step 0.
        seed = rounding_seed(0, salt_of(path))
        v = spec.factors(nu, m.shape)
        return write(m.astype(widen(m.dtype)), v, dtype or m.dtype, seed), nu

    return _convert(
        state, params, block_specs, optax.ScaleByAdamState, ScaleByAdamMiniState, convert, dtype
    )


def to_adam_state(state: PyTree, params: PyTree, block_specs: BlockSpecs | None = None) -> PyTree:
    """Converts Adam-mini's state to that of `optax.adamw`.

    Every coordinate gets its block's `v`.

    Args:
        state: optimizer state that contains a `ScaleByAdamMiniState`.
        params: the parameters that it was made for: arrays or
            `jax.ShapeDtypeStruct`s.
        block_specs: the specs, or label function, that it was made with; None
            for `adam_mini`'s default.

    Returns:
        The same structure, with an `optax.ScaleByAdamState` in place of each
        `ScaleByAdamMiniState`. Its `nu` has the parameters' shapes, in float32
        or wider, and so has its `mu` if it was in 8 bits.

    Raises:
        TypeError, ValueError: if `state` contains no `ScaleByAdamMiniState`,
            if it does not belong to `params`, or if the specs do not fit
            `params`.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 6))}
        >>> state = adam_mini(1e-3).init(params)
        >>> to_adam_state(state, params, flax_layers())[0].nu["kernel"].shape
        (4, 6)
    """
    programs: dict[Any, Any] = {}

    def convert(path: Any, spec: Spec, m: Any, v: Any, param: Any) -> tuple[Any, Any]:
        del path
        # `optax.adamw` has complex numbers in both moments of complex parameters.
        of_real = widen(jax.tree.leaves(v)[0].dtype)
        dtype = jnp.promote_types(of_real, m.dtype) if jnp.iscomplexobj(m) else of_real
        spread: Any = lambda v: spec.spread(v, jnp.shape(param)).astype(dtype)
        sharding = None if isinstance(m, jax.core.Tracer) else getattr(m, "sharding", None)
        if isinstance(sharding, NamedSharding):
            # A large array: it is sharded as mu from the start. Equal layers share a program.
            program = spec, jnp.shape(param), dtype, sharding
            spread = programs.setdefault(program, jax.jit(spread, out_shardings=sharding))
        nu = spread(v)  # first, because it refuses a grid of other specs
        if isinstance(m, jax.core.Tracer) and any(jax.typeof(m).sharding.spec):
            nu = jax.sharding.reshard(nu, jax.typeof(m).sharding)  # on an explicit mesh
        # The `mu` of integers in 8 bits has no codes.
        is_codes = m.dtype == jnp.int8 and jnp.issubdtype(jnp.result_type(param), jnp.inexact)
        return read(m, spec.factors(v, m.shape)) if is_codes else m, nu

    return _convert(
        state, params, block_specs, ScaleByAdamMiniState, optax.ScaleByAdamState, convert
    )


_IS_CONVERTED = {
    "ScaleByAdamMiniState": "it is Adam-mini's already",
    "ScaleByAdamState": "it is AdamW's already",
}


def _convert(
    state: Any,
    params: Any,
    block_specs: Any,
    old: type,
    new: type,
    convert_leaf: Callable[..., tuple[Any, Any]],
    new_dtype: Any = None,
) -> Any:
    check_has_state("", old.__name__, {new.__name__: _IS_CONVERTED[new.__name__]}, state)
    block_specs = flax_layers() if block_specs is None else block_specs  # as in `adam_mini`
    by_path = {path_of(keys): p for keys, p in leaves_with_path(params)}

    def convert(node: Any) -> Any:
        if not isinstance(node, old):
            return node
        check_counts(node)
        is_int8 = isinstance(node.mu, Codes)
        mu = unpack_mu(node.mu, jnp.int8 if is_int8 else None)
        paths = [path_of(keys) for keys, _ in leaves_with_path(mu)]
        for path in paths:
            if path not in by_path:
                raise ValueError(
                    f"{'/'.join(path) or 'params'}: the state has moments for this parameter, but "
                    "params do not contain it: pass the params that the state was made with"
                )
        # Parameters without moments (frozen, or matrices of Muon) need no specs.
        needed = {*paths}
        specs = iter(specs_of_some(block_specs, params, [path in needed for path in by_path]))
        pairs_of = {path: (next(specs)[1], p) for path, p in by_path.items() if path in needed}
        found = [pairs_of[path] for path in paths]
        is_outer = any(isinstance(spec, Outer) for spec, _ in found)
        may_be_outer = has_outer(block_specs, [spec for spec, _ in found])
        has_rows = isinstance(node.nu, OuterMoments)
        # The state of a group without rows has two trees if the specs of all groups were given.
        if old is ScaleByAdamMiniState and not is_outer <= has_rows <= may_be_outer:
            stored, given_for = "one number for each block", "an outer for some parameter"
            if has_rows:
                stored, given_for = "rows and columns (v='outer')", "no outer"
            raise ValueError(
                f"the state does not match block_specs: it stores {stored}, and block_specs has "
                f"{given_for}: pass the block_specs that the state was made with"
            )
        nu = unpack_nu(node.nu, [spec for spec, _ in found])
        pairs: list[tuple[Any, Any]] = []
        for path, m, v, (spec, p) in zip(paths, jax.tree.leaves(mu), nu, found, strict=True):
            if jnp.issubdtype(jnp.result_type(p), jnp.inexact):
                check_stored_dtype("/".join(path), m, is_codes=is_int8)
            try:
                pairs.append(convert_leaf(path, spec, m, v, p))
            except ValueError as error:
                raise ValueError(
                    f"{'/'.join(path) or 'params'}: the state is not of these params: {error}"
                ) from None
        new_mu = jax.tree.unflatten(jax.tree.structure(mu), [m for m, _ in pairs])
        is_new_outer = new is ScaleByAdamMiniState and may_be_outer
        nu = pack_nu([v for _, v in pairs], mu, is_new_outer)
        count = jax.tree.map(lambda x: x, node.count)  # another variable of NNX
        return new(count, pack_mu(new_mu, new_dtype), nu)

    return jax.tree.map(convert, state, is_leaf=lambda node: isinstance(node, old))
