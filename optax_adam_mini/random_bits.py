"""Rounding at random without a key.

The random bits are a hash of the step, of what is rounded and of the coordinate. They are the same
on any mesh, in any process and after any restart.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, UInt32


def rounding_seed(count: Any, salt: Any) -> UInt32[Array, ""]:
    """The seed for a step, `count`, and for the array that `salt` stands for."""
    return mixed(mixed(jnp.asarray(count, jnp.uint32)) + jnp.asarray(salt, jnp.uint32))


def rounding_seeds(count: Int32[Array, ""], salts: list[Any]) -> list[UInt32[Array, ""]]:
    """The seeds for a step and for several arrays."""
    # JAX cannot trace the loop under `vmap` over an axis of an explicit mesh, nor in `shard_map` if
    # devices have counts of their own.
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(count).sharding.mesh
    is_auto = all({*mesh.axis_types} <= {AxisType.Auto} for mesh in meshes)
    return _rounding_seeds(is_auto, count, salts)


@functools.partial(jax.jit, static_argnums=0)
def _rounding_seeds(is_auto: bool, count: Array, salts: list[Any]) -> list[Array]:
    each = lambda salts: [rounding_seed(count, salt) for salt in salts]
    if not is_auto:
        return each(salts)

    def carried(salts: list[Any]) -> list[Any]:
        # A loop of one iteration. XLA's CPU compiler compiles equal kernels once, and kernels that
        # have a seed as a constant are not equal. What a loop carries is no constant.
        once = lambda carry: (False, each(carry[1]))
        return jax.lax.while_loop(lambda carry: carry[0], once, (count >= 0, salts))[1]

    return jax.lax.platform_dependent(salts, cpu=carried, default=each)


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
    # The seed is added: multiplied by a place that is a power of two, it would lose its high bits.
    return (mixed(place + seed) >> (32 - bits)).astype(jnp.int32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def without_derivative(x: Any, remedy: str) -> Any:
    """`x`, about to be rounded. Derivatives would be 0, so they are refused.

    Args:
        x: an array.
        remedy: what to do instead, for the end of the error.

    Raises:
        TypeError: if it is differentiated.
    """
    del remedy
    return x


@without_derivative.defjvp
def _refuse(remedy: str, primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(f"numbers that are rounded at random have no derivative: {remedy}")


def round_to_bfloat16(x: Float[Array, "*shape"], seed: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    """A bfloat16 neighbour of `x`, as float32; its mean over many seeds is `x`.

    Args:
        x: an array in float32.
        seed: seed of the rounding.

    Raises:
        TypeError: if it is differentiated.

    Examples:
        >>> round_to_bfloat16(jnp.array([1.0, -3e38, jnp.inf]), rounding_seed(1, 0)).dtype
        dtype('float32')
    """
    x = without_derivative(x, "update parameters in float32, without stochastic_rounding")
    # Float32 numbers between two neighbours are evenly spaced in their bits: a random number added
    # to the 16 bits that are cut off carries in proportion.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + random_bits(16, x.shape, seed).astype(jnp.uint32)) & np.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    # Beyond the largest bfloat16, round to nearest, by `reduce_precision`: XLA would remove a
    # conversion to bfloat16 and back.
    nearest = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jnp.where(jnp.abs(x) < float(jnp.finfo(jnp.bfloat16).max), rounded, nearest)


def mixed(x: Any) -> Any:
    """A hash in which every bit depends on every bit of `x` (MurmurHash3's finalizer, Appleby)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
