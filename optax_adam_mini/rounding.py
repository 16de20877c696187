"""Parameters in bfloat16 without a float32 copy: rounded up or down at random, in proportion.

Rounding to nearest loses every step of less than half a unit in the last place, however often the
step is repeated. Rounding at random preserves the step in the mean.

The random numbers are a hash of the step, the parameter's path and the coordinate. No key is
stored, and they are the same on any mesh, in any process and after any restart.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import path_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32, PyTree, UInt32


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        count: number of updates made, shape `()`, int32; the random numbers
            depend on it.
        inner_state: state of the transformation inside, for parameters in
            float32.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: PyTree


def stochastic_rounding(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 parameters as if in float32, and rounds them at random after each step.

    `inner` gets gradients and parameters in float32, also for weight decay,
    and its state is made for these. The new parameter, `p + u` in float32, is
    rounded to one of its two neighbours in bfloat16, with the probabilities
    that make `p + u` the mean. `update` returns the difference between the new
    parameter and the old one, in float32: `optax.apply_updates` adds it and
    gets exactly the new parameter. (In bfloat16 the difference would be
    rounded.)

    It must be the outermost wrapper: a later transformation would round to
    nearest again. Parameters in float32 or wider, and integers, are updated as
    without it. Call `init` under `jax.jit`: otherwise it makes float32 copies
    of the parameters.

    Args:
        inner: any transformation, in any chain or wrapper, whose updates are
            added to the parameters.

    Returns:
        The transformation; its state is a `StochasticRoundingState`.

    Raises:
        TypeError: if `inner` is not a transformation; if a parameter is in
            float16 or narrower.
        ValueError: if no parameter is in bfloat16; in `update`, if `params`
            are missing, or the state is another transformation's.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 6), jnp.bfloat16)}
        >>> tx = stochastic_rounding(adam_mini(1e-3, mu_dtype=jnp.int8))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> optax.apply_updates(params, updates)["kernel"].dtype
        dtype(bfloat16)

    References:
        Zamirai et al., [Revisiting BFloat16
        Training](https://arxiv.org/abs/2010.06192).
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"stochastic_rounding: expected a transformation, got {inner!r}: for example "
            "stochastic_rounding(adam_mini(1e-3))"
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> StochasticRoundingState:
        _check_params(params)
        return StochasticRoundingState(jnp.zeros([], jnp.int32), inner.init(_widened(params)))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError(
                "stochastic_rounding rounds the parameters, and update got none: call "
                "tx.update(grads, state, params)"
            )
        if not isinstance(state, StochasticRoundingState):
            raise ValueError(
                "stochastic_rounding: expected the StochasticRoundingState that init made, got a "
                f"{type(state).__name__}: call tx.update(grads, state, params), in this order; the "
                "state of the transformation inside goes into its field inner_state"
            )
        _check_params(params)
        count = jnp.asarray(optax.safe_increment(state.count))

        def round_leaf(path: Any, u: Any, p: Any) -> Any:
            if u is None or not _is_bfloat16(p):
                return u
            old = p.astype(jnp.float32)
            new = round_to_bfloat16(
                (old + u).astype(jnp.float32),
                rounding_seed(count, salt_of((path, "params"))),
            )
            # Adding -0.0 changes nothing: infinity stays, and zero keeps its sign.
            return jnp.where(new == old, -0.0, new - old)

        updates, inner_state = inner.update(
            _widened(updates), state.inner_state, _widened(params), **extra_args
        )
        treedef = jax.tree.structure(params)
        pairs = zip(leaves_with_path(params), treedef.flatten_up_to(updates), strict=True)
        rounded = [round_leaf(path_of(keys), u, p) for (keys, p), u in pairs]
        return jax.tree.unflatten(treedef, rounded), StochasticRoundingState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def round_to_bfloat16(x: Float[Array, "*shape"], seed: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    """A bfloat16 neighbour of `x`, as float32; its mean over many seeds is `x`.

    Args:
        x: an array in float32.
        seed: seed of the rounding.

    Examples:
        >>> round_to_bfloat16(jnp.array([1.0, -3e38, jnp.inf]), rounding_seed(1, 0)).dtype
        dtype('float32')
    """
    # Float32 numbers between two neighbours are evenly spaced in their bits: a random number added
    # to the 16 bits that are cut off carries in proportion.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + random_bits(16, x.shape, seed).astype(jnp.uint32)) & np.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    # Beyond the largest bfloat16, round to nearest, by `reduce_precision`: XLA would remove a
    # conversion to bfloat16 and back.
    nearest = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.where(jnp.abs(x) < float(jnp.finfo(jnp.bfloat16).max), rounded, nearest)


def rounding_seed(count: Any, salt: Any) -> UInt32[Array, ""]:
    """The seed for a step, `count`, and for the array that `salt` stands for."""
    return mixed(mixed(jnp.asarray(count, jnp.uint32)) + jnp.asarray(salt, jnp.uint32))


def salt_of(what: Hashable) -> np.uint32:
    """A number for a path or another tuple of names, the same in every process.

    Examples:
        >>> int(salt_of(("layer", "kernel")))
        841920579
    """
    return np.uint32(zlib.crc32(repr(what).encode()))  # repr's quotes separate the names


def random_bits(bits: int, shape: Any, seed: Any) -> Int32[Array, "*shape"]:
    """A random number of `bits` bits, at most 31, for each coordinate."""
    place = np.uint32(0)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(np.uint32, shape, axis)
    # Add the seed: multiplied by a place that is a power of two, it would lose bits.
    return (mixed(place + seed) >> (32 - bits)).astype(jnp.int32)


def mixed(x: Any) -> Any:
    """A hash in which every bit depends on every bit of `x` (MurmurHash3's finalizer, Appleby)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _is_bfloat16(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.bfloat16


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_bfloat16(x) else x, tree)


def _check_params(params: Any) -> None:
    dtypes = {path_of(keys): getattr(p, "dtype", None)
              for keys, p in leaves_with_path(params)}  # fmt: skip
    for path, dtype in dtypes.items():
        is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        if is_float and dtype != jnp.bfloat16 and jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f"{'/'.join(path) or 'params'}: expected bfloat16, or float32 and wider, which are "
                f"left alone; got {dtype}, whose few bits of exponent lose small parameters and "
                "gradients before they can be rounded: keep the parameters in bfloat16"
            )
    if dtypes and jnp.bfloat16 not in dtypes.values():
        path, dtype = next(iter(dtypes.items()))
        raise ValueError(
            "stochastic_rounding: expected parameters in bfloat16, and found none "
            f"({'/'.join(path) or 'params'} is {dtype}): leave it out, or cast them, "
            "jax.tree.map(lambda p: p.astype(jnp.bfloat16), params); of a run that had some, what "
            "adds the updates has widened them (eqx.apply_updates does): use optax.apply_updates"
        )
