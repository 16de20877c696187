"""The first moment in 8 bits: a small float for each coordinate, relative to a bound from `nu`.

`m` and `v` are averages of the same gradients, and so, by the inequality of Cauchy and Schwarz,

    |m|  <=  (1 - b1) / sqrt((1 - b2) (1 - b1**2 / b2)) * sqrt(n v)  <=  8 sqrt(n v)

for every coordinate of a block of `n` with the second moment `v`; the factor is 1.2 for the decays
0.9 and 0.95, and 7.3 for 0.9 and 0.999. The bound is there already, and no scale is kept. Codes are
floats: the 127 magnitudes have three bits of fraction in each of 16 binades below the bound (two,
in twice as many, in large blocks), so that a bound far above the values costs no digits.

Codes are rounded up or down at random, in proportion, so that the mean of many is the moment: what
is too small for one step survives in the mean. The random numbers are a hash of the step, the
parameter and the coordinate: the same on any mesh and after any restart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_adam_mini import sums
from optax_adam_mini.product import Outer, Spec
from optax_adam_mini.rounding import random_bits, rounding_seed

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8, UInt32

_FACTOR = 8.0  # of the bound
_ONE = 127 << 23  # the bits of 1.0 in float32
# Equal to zero, but another constant: zeros are what the gradients of a scan begin as, and XLA's
# GPU compiler would keep those arrays until the update, to compare with them.
_ZERO = -0.0
_TINY = float(np.finfo(np.float32).tiny)


def check_decays(b1: Any, b2: Any) -> None:
    """Refuses decay rates with which a moment can exceed its bound, where they can be known.

    Raises:
        ValueError: if they are such; traced arrays pass.
    """
    if any(isinstance(decay, jax.core.Tracer) for decay in (b1, b2)):
        return
    b1, b2 = float(b1), float(b2)
    # Cauchy and Schwarz: the sum of ((1 - b1) b1**i)**2 / ((1 - b2) b2**i) over the steps before.
    squared = (1 - b1) ** 2 / ((1 - b2) * (1 - b1**2 / b2)) if b1**2 < b2 else np.inf
    if squared > _FACTOR**2:
        largest = np.floor(1e4 * (1 - (1 - b1) / (1 + b1) / _FACTOR**2)) / 1e4  # b1**2 / b2 ~ b1**2
        raise ValueError(
            f"mu_dtype=int8 keeps no more than {_FACTOR:g} times the root of the second moment, "
            f"and with b1={b1:g} and b2={b2:g} the first may be {np.sqrt(squared):.3g} times it: "
            f"take b2 between {b1**2:g} and {largest:g}, or leave mu_dtype out"
        )


def dequantize(spec: Spec, codes: Int8[Array, "*shape"], nu: Any) -> Float[Array, "*shape"]:
    """The moment that codes stand for, in float32 or wider.

    Args:
        spec: how the parameter is cut.
        codes: one for each coordinate.
        nu: the second moment that they were made with.

    Examples:
        >>> codes, nu = jnp.array([127, 0, -119, 0], jnp.int8), jnp.array([1.0])
        >>> dequantize(per_tensor(), codes, nu)
        Array([16., -0., -8., -0.], dtype=float32)
    """
    code = codes.astype(jnp.int32)
    bits = ((jnp.abs(code) - 127) << _bits_cut_off(spec, codes.shape)) + _ONE
    magnitude = jax.lax.bitcast_convert_type(bits, jnp.float32)
    bound = _at_every_coordinate(spec, nu, codes.shape, lambda bound: bound, jnp.minimum)
    # Nothing is nothing of an infinite bound as well: a block that has overflowed stands still.
    return jnp.where(code == 0, _ZERO, jnp.where(code < 0, -magnitude, magnitude) * bound)


def quantize(
    spec: Spec, m: Float[Array, "*shape"], nu: Any, seed: UInt32[Array, ""]
) -> Int8[Array, "*shape"]:
    """The codes of a moment; over many seeds, the mean of what they stand for is `m`.

    Args:
        spec: how the parameter is cut.
        m: the moment.
        nu: the second moment after the same gradients.
        seed: of the rounding.

    Examples:
        >>> m, nu = jnp.array([16.0, 0.0, -8.0, 0.0]), jnp.array([1.0])
        >>> quantize(per_tensor(), m, nu, rounding_seed(1, 0))
        Array([ 127,    0, -119,    0], dtype=int8)
    """
    # Of what is too small to have an inverse nothing is kept.
    inverse = lambda bound: jnp.where(bound > _TINY, 1 / bound, 0)
    ratio = jnp.abs(m) * _at_every_coordinate(spec, nu, m.shape, inverse, jnp.maximum)
    ratio = ratio.astype(jnp.float32)
    cut_off = _bits_cut_off(spec, m.shape)
    random = random_bits(cut_off, m.shape, seed)
    # Codes are in the order of their numbers, and between two of them numbers are evenly spaced as
    # bits: a random number is added to those that are cut off, and rounds up in proportion.
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    code = jnp.minimum(((bits + random - _ONE) >> cut_off) + 127, 127)
    smallest = np.int32(_ONE - (126 << cut_off)).view(np.float32)  # what code 1 stands for
    up = (random < ratio * (2.0**cut_off / smallest)).astype(jnp.int32)
    # The sign is chosen last, in 8 bits: where a conversion is last, XLA's CPU compiler makes the
    # codes again for the update, from a copy of the old ones.
    code = jnp.where(ratio < smallest, up, code).astype(jnp.int8)
    return jnp.where(m < _ZERO, -code, code)


def _at_every_coordinate(spec: Spec, nu: Any, shape: Any, of: Any, choose: Any) -> Array:
    """A function of the bound of the block that a coordinate is in.

    Of a row's and a column's, one is chosen.
    """
    if isinstance(spec, Outer):
        return choose(
            _at_every_coordinate(spec.a, nu.a, shape, of, choose),
            _at_every_coordinate(spec.b, nu.b, shape, of, choose),
        )
    root = _FACTOR * np.sqrt(sums.block_sizes(spec.runs(shape))).astype(nu.dtype)
    return spec.spread(nu, shape, lambda nu: of(root * jnp.sqrt(nu)))


def _bits_cut_off(spec: Spec, shape: Any) -> int:
    """How many bits of a float32's fraction a code does not have."""
    if isinstance(spec, Outer):
        return min(_bits_cut_off(spec.a, shape), _bits_cut_off(spec.b, shape))
    return 20 if np.max(sums.block_sizes(spec.runs(shape)), initial=0) <= 2**16 else 21
