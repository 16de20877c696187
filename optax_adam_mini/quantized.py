"""The first moment in 8 bits: a small float for each coordinate, relative to a bound of its block.

`m` is a moving average of `g`, and so no coordinate of it is larger than the same average of the
norm of its block's gradient, which the second moment's sum gives for nothing:

    a = b1 a + (1 - b1) ||g||               for each block; for each row and column of an `outer`
    m = b1 a_old f(m8) + (1 - b1) g         a: the smallest bound of the blocks a coordinate is in
    m8 = f^-1(m / a)

The bound is known before the values are, and nothing is ever clipped. `f` gives the 127 magnitudes
of a code three bits of fraction in each of 16 binades below 1, and so a bound that is far above the
values costs no digits. Codes are rounded up or down at random, in proportion, so that the mean of
many is the moment: what is too small for one step survives in the mean. The random numbers are a
hash of the step, the parameter and the coordinate: the same on any mesh and after any restart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini import sums
from optax_adam_mini.product import Outer, OuterMoments, Spec

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8, UInt32


class QuantizedMoment(NamedTuple):
    """The first moment of a parameter in 8 bits.

    Attributes:
        values: one code for each coordinate, of the parameter's shape, int8.
        scale: a bound on the moment in each block, like the parameter's `nu`: one array of the
            shape of the grid, float32 or wider, or an
            [`OuterMoments`][optax_adam_mini.product.OuterMoments] of two.
    """

    values: Any
    scale: Any


def is_quantized(x: Any) -> bool:
    """Whether it is a moment in 8 bits."""
    return isinstance(x, QuantizedMoment)


def is_smaller(spec: Spec, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether codes and bounds of a parameter take fewer bytes than a moment of its own `dtype`.

    Examples:
        >>> is_smaller(per_neuron(), (768, 3072), np.float32)
        True
        >>> is_smaller(per_element(), (768,), np.float32)
        False
    """
    size = math.prod(shape)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return size + 4 * spec.size(shape) < size * np.dtype(dtype).itemsize


def norms(spec: Spec, mean: Any, shape: tuple[int, ...]) -> Any:
    """The Euclidean norm of each block, from the mean of its squares."""
    if isinstance(spec, Outer):
        return OuterMoments(norms(spec.a, mean.a, shape), norms(spec.b, mean.b, shape))
    return jnp.sqrt(mean) * np.sqrt(sums.block_sizes(spec.runs(shape))).astype(mean.dtype)


def dequantize(spec: Spec, moment: QuantizedMoment) -> Float[Array, "*shape"]:
    """The values of a moment, in float32 or wider.

    Examples:
        >>> moment = QuantizedMoment(jnp.array([127, 0, -119], jnp.int8), jnp.array([3.0]))
        >>> dequantize(per_tensor(), moment)
        Array([ 3. ,  0. , -1.5], dtype=float32)
    """
    return _decode(moment.values) * _bound(spec, moment.scale, moment.values.shape)


def quantize(
    spec: Spec, m: Float[Array, "*shape"], scale: Any, seed: UInt32[Array, ""]
) -> QuantizedMoment:
    """A moment in 8 bits; its mean over many seeds is `m`.

    Args:
        spec: how the parameter is cut.
        m: the moment.
        scale: for each block, a number that no coordinate of it exceeds.
        seed: of the rounding.
    """
    # Of numbers too small to have an inverse nothing is kept.
    inverse = jax.tree.map(lambda a: jnp.where(a > _TINY, 1 / a, 0), scale)
    ratio = jnp.abs(m) * _bound(spec, inverse, m.shape, jnp.maximum)
    codes = _encode(ratio.astype(jnp.float32), _random_bits(m.shape, seed))
    return QuantizedMoment(jnp.where(m < 0, -codes, codes).astype(jnp.int8), scale)


def quantized(spec: Spec, m: Float[Array, "*shape"], dtype: Any) -> Any:
    """The moment of a parameter of `dtype` in 8 bits, where that is smaller, or else in `dtype`."""
    if not is_smaller(spec, m.shape, dtype):
        return m.astype(dtype)
    m = m.astype(sums.widen(m.dtype))
    scale = norms(spec, spec.block_mean(m, jnp.square), m.shape)
    return quantize(spec, m, scale, rounding_seed(0, 0))


_TINY = float(np.finfo(np.float32).tiny)
_FRACTION = 20  # bits of a float32's fraction that a code does not have
_ONE = 127 << 23  # the bits of 1.0 in float32
_SMALLEST = np.int32(_ONE - (126 << _FRACTION)).view(np.float32)  # what code 1 stands for, 1.9e-5


def _bound(spec: Spec, scale: Any, shape: tuple[int, ...], least: Any = jnp.minimum) -> Array:
    """At every coordinate, the smallest bound of the blocks it is in."""
    if isinstance(spec, Outer):
        return least(spec.a.spread(scale.a, shape), spec.b.spread(scale.b, shape))
    return spec.spread(scale, shape)


def _encode(ratio: Float[Array, "*shape"], random: Any) -> Any:
    """Codes from 0 to 127 of numbers from 0 to 1: a float32's exponent and three more bits.

    Codes are in the order of their numbers, and between two of them numbers are evenly spaced as
    bits: a random number is added to those that are cut off, and rounds up in proportion.
    """
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    code = ((bits + random - _ONE) >> _FRACTION) + 127
    small = (random < ratio * (2.0**_FRACTION / _SMALLEST)).astype(jnp.int32)  # 0 or 1
    return jnp.where(ratio < _SMALLEST, small, jnp.minimum(code, 127))


def _decode(values: Int8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The numbers from -1 to 1 that codes stand for."""
    code = values.astype(jnp.int32)
    bits = ((jnp.abs(code) - 127) << _FRACTION) + _ONE
    magnitude = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(code == 0, 0, jnp.where(code < 0, -magnitude, magnitude))


def rounding_seed(count: Any, index: int) -> UInt32[Array, ""]:
    """The seed of a step and of a parameter."""
    return _mixed(jnp.asarray(count, jnp.uint32) * np.uint32(0x9E3779B9) + np.uint32(index))


def _random_bits(shape: tuple[int, ...], seed: Any) -> Any:
    """For each coordinate a number of `_FRACTION` bits."""
    place = seed
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(np.uint32, shape, axis)
    return (_mixed(place) >> (32 - _FRACTION)).astype(jnp.int32)


def _mixed(x: Any) -> Any:
    """Every bit of the result depends on every bit of `x` (MurmurHash3's finalizer, Appleby)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
