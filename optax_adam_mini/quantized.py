"""Reads and writes the first moment in 8 bits. No other module knows about int8.

`m` and `v` are averages of the same gradients, and so `m` is of the size of `sqrt(v)`: from a
quarter of it, where the gradient is noise, to a few times it. A code stands for a number relative
to that root, which `nu` gives at each coordinate, and no scale is kept. Of the 127 magnitudes most
are where moments are:

    relative to the root / 1.25   2**-6  2**-5  2**-4  ...  2**1  2**2  ...  2**6  ...  2**17
    codes in each binade              4      8     16          8      4         1

Below 2**-5 they are evenly spaced, down to 0. The last code is beyond the largest moment: by the
inequality of Cauchy and Schwarz

    |m|  <=  (1 - b1) / sqrt((1 - b2) (1 - b1**2 / b2)) * sqrt(n v)

for every coordinate of a block of `n` with the second moment `v`. Decay rates with a factor of more
than 32 are refused (`check_decays`), or brought to the nearest that have one
(`allowed_b2`): the bound then holds after every step, whatever the rates were before. The
largest code is 2**17 roots, which is 32 sqrt(n v) in blocks of up to 2**24; in larger ones the root
is scaled by sqrt(n) / 2**12.

Codes are rounded up or down at random, in proportion, so that the mean of many is the moment: what
is too small for one step survives in the mean. The random numbers are a hash of the step, the
parameter's path and the coordinate: the same on any mesh and after any restart.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini import sums
from optax_adam_mini.product import Spec
from optax_adam_mini.rounding import random_bits

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8, UInt32


class Codes(NamedTuple):
    """`mu` of a state in 8 bits. A state in floats has no such node.

    A checkpoint of one kind is no checkpoint of the other, whatever casts whoever restores it.

    Attributes:
        codes: a tree like the parameters, int8.
    """

    codes: Any


_FACTOR = 32.0  # of the bound
_SCALE = 1.25  # of the root
_CUT = 23  # bits of a float32's fraction: a binade is 2**23 floats, evenly spaced
_SMALL, _LARGE = -6, 17
_DENSER = ((3, -6, 6), (4, -5, 2), (8, -4, 1))  # so many codes more in binades from, to: 4, 8, 16
_OFFSET = 2.0**_SMALL  # added before a number is read as bits, so that small ones are evenly spaced
# Equal to zero, but not the constant zero: the gradients of a scan start as zeros, and XLA's GPU
# compiler would keep those arrays until the update, to compare with them.
_ZERO = -0.0
_TINY = float(np.finfo(np.float32).tiny)


def _bits(exponent: int) -> int:
    """The bits of 2.0**exponent in float32."""
    return (127 + exponent) << _CUT


def _code_at(binade: int) -> int:
    """The code of the first number of a binade."""
    codes = [1 + sum(more for more, first, last in _DENSER if first <= b < last)
             for b in range(_SMALL, binade)]  # fmt: skip
    return sum(codes)


def read(spec: Spec, kept: Array, nu: Any) -> Float[Array, "*shape"]:
    """The first moment, in float32 or wider, from the codes in a state.

    Args:
        spec: how the parameter is cut.
        kept: one array of a state's `mu`: codes, or numbers of any inexact dtype.
        nu: the second moment that it was kept with.

    Examples:
        >>> codes, nu = jnp.array([92, 0, -12], jnp.int8), jnp.array([1.0])
        >>> read(per_tensor(), codes, nu)
        Array([ 2.4804688 ,  0.        , -0.05859375], dtype=float32)
    """
    if kept.dtype != jnp.int8:
        return kept.astype(sums.widen(kept.dtype))
    code = jnp.abs(kept.astype(jnp.int32))
    bits, base, density = code << _CUT, _bits(_SMALL), 1
    for more, first, last in _DENSER:  # the inverse of what `write` does
        shorter = (1 << _CUT) // density - (1 << _CUT) // (density + more)
        bits -= shorter * jnp.clip(code, _code_at(first), _code_at(last))
        base += shorter * _code_at(first)
        density += more
    bits += base
    magnitude = jax.lax.bitcast_convert_type(bits, jnp.float32) - _OFFSET
    # 0 times an infinite root is 0, not NaN: a block that has overflowed stands still.
    finite = lambda root: jnp.where(jnp.isfinite(root), root, 0)
    signed = jnp.where(kept < 0, -magnitude, magnitude)
    return _times_roots(signed, spec, nu, finite)


def write(
    spec: Spec, m: Float[Array, "*shape"], nu: Any, dtype: np.dtype, seed: UInt32[Array, ""]
) -> Array:
    """The codes of the first moment; over many seeds, their mean is `m`.

    Args:
        spec: how the parameter is cut.
        m: the moment.
        nu: the second moment after the same gradients.
        dtype: of what is kept, int8 for codes.
        seed: of the rounding.

    Raises:
        TypeError: if codes are differentiated: their derivative is 0 almost everywhere.

    Examples:
        >>> from optax_adam_mini.rounding import rounding_seed
        >>> m, nu = jnp.array([2.4804688, 0.0, -0.05859375]), jnp.array([1.0])
        >>> write(per_tensor(), m, nu, jnp.dtype("int8"), rounding_seed(1, 0))
        Array([ 92,   0, -12], dtype=int8)
    """
    if dtype != jnp.int8:
        return m.astype(dtype)
    return _codes(spec, m, nu, seed)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _codes(spec: Spec, m: Array, nu: Any, seed: Array) -> Int8[Array, "*shape"]:
    # A root that is too small to have an inverse gives the code 0.
    inverse = lambda root: jnp.where(root > _TINY, 1 / root, 0)
    number = _times_roots(jnp.abs(m), spec, nu, inverse).astype(jnp.float32) + _OFFSET
    # In each binade, codes are evenly spaced in the bits, and so in the numbers. Adding a random
    # number to the fraction that is cut off rounds up in proportion.
    bits = jax.lax.bitcast_convert_type(number, jnp.int32) - _bits(_SMALL)
    above = lambda exponent: _bits(exponent) - _bits(_SMALL)
    code, extra = jnp.minimum(bits, above(_LARGE)), 0
    for more, first, last in _DENSER:
        code += more * jnp.clip(bits, above(first), above(last))
        extra += more * above(first)
    code = ((code + (random_bits(_CUT, m.shape, seed) - extra)) >> _CUT).astype(jnp.int8)
    # The sign is applied last, in 8 bits: if a conversion came last, XLA's CPU compiler would
    # compute the codes again for the update, from a copy of the old ones.
    return jnp.where(m < _ZERO, -code, code)


@_codes.defjvp
def _no_derivative(spec: Spec, primals: Any, tangents: Any) -> Any:
    del spec, primals, tangents
    raise TypeError(
        "mu_dtype=int8 keeps codes, which have no derivative: take gradients through the update "
        "with mu_dtype=None"
    )


def _times_roots(x: Array, spec: Spec, nu: Any, of: Any) -> Array:
    """`x` times a function of the root that codes are relative to, at every coordinate."""
    (v, runs), *ratios = spec.factors(nu, x.shape)
    # The root is large enough that the last code reaches the bound, 32 sqrt(n v).
    floor = np.sqrt(sums.block_sizes(runs)) * _FACTOR / 2.0**_LARGE
    if not ratios:
        scale = np.maximum(_SCALE, floor).astype(v.dtype)
        return x * sums.spread(of(jnp.sqrt(v) * scale), runs, x.shape)
    x = x * sums.spread(of(jnp.sqrt(v)), runs, x.shape)
    for ratio, runs in ratios:
        root = jnp.maximum(_SCALE * jnp.sqrt(ratio), np.max(floor, initial=0).astype(v.dtype))
        x = x * sums.spread(of(root), runs, x.shape)
    return x


class RowCodes(NamedTuple):
    """Muon's momentum in 8 bits: there is no second moment that codes could be relative to.

    A code `c` stands for `sign(c) (c / 127)**2` of the largest entry of its row: steps are as fine
    as the number is small.

    Attributes:
        codes: a tree like the parameters, int8.
        largest: of each row, bfloat16, in arrays of the parameters' ranks.
    """

    codes: Any
    largest: Any


_LAST = 127


def read_row(codes: Int8[Array, "*shape"], largest: Float[Array, "*row"]) -> Float[Array, "*shape"]:
    """The numbers that codes stand for, in float32.

    Args:
        codes: of a matrix.
        largest: of each row, of size 1 along the rows' axes.

    Examples:
        >>> read_row(jnp.array([127, 64, 0, -1], jnp.int8), jnp.array([16129.0]))
        Array([ 1.6129e+04,  4.0960e+03,  0.0000e+00, -1.0000e+00], dtype=float32)
    """
    number = codes.astype(jnp.float32)
    return number * jnp.abs(number) * (largest.astype(jnp.float32) / _LAST**2)


def write_row(
    m: Float[Array, "*shape"], axes: tuple[int, ...], seed: UInt32[Array, ""]
) -> tuple[Int8[Array, "*shape"], Float[Array, "*row"]]:
    """The codes of a matrix, whose mean over many seeds is `m`, and what they are relative to.

    Args:
        m: the matrix.
        axes: along which a row lies.
        seed: of the rounding.

    Returns:
        The codes, and of each row its largest magnitude or a little more, in bfloat16.

    Examples:
        >>> from optax_adam_mini.rounding import rounding_seed
        >>> codes, largest = write_row(jnp.ones((2, 5)), (1,), rounding_seed(1, 0))
        >>> codes.dtype, largest.dtype, largest.shape
        (dtype('int8'), dtype(bfloat16), (2, 1))
    """
    magnitude = jnp.abs(m)
    # As much more as bfloat16 may round it down.
    largest = (jnp.max(magnitude, axes, keepdims=True) * (1 + 2.0**-8)).astype(jnp.bfloat16)
    top = largest.astype(m.dtype)
    # Of what is too small to have an inverse nothing is kept.
    square = magnitude * jnp.where(top > _TINY * _LAST**2, _LAST**2 / top, 0)
    code = jnp.floor(jnp.sqrt(square))
    # Between code**2 and (code + 1)**2 up or down at random, in proportion.
    chance = (square - code * code) / (2 * code + 1)
    code += chance * 2.0**_CUT > random_bits(_CUT, m.shape, seed)
    code = jnp.minimum(code, _LAST).astype(jnp.int8)
    return jnp.where(m < _ZERO, -code, code), largest


def in_state(mu: Any, mu_dtype: Any) -> Any:
    """The `mu` of a state, made from a tree like the parameters."""
    return Codes(mu) if mu_dtype == jnp.int8 else mu


def of_state(mu: Any, mu_dtype: Any) -> Any:
    """The tree like the parameters in the `mu` of a state.

    Raises:
        ValueError: if the state is of the other kind.
    """
    if isinstance(mu, Codes) != (mu_dtype == jnp.int8):
        leaves = [] if isinstance(mu, Codes) else jax.tree.leaves(mu)
        if leaves and all(x.dtype == jnp.int8 for x in leaves):
            raise ValueError(_OF_VERSION_0_2)
        raise ValueError(
            f"the state's mu is {'int8' if isinstance(mu, Codes) else 'not int8'}, but the "
            f"transformation has mu_dtype={mu_dtype}: pass the mu_dtype that the state was made "
            f"with, or convert it, {_CONVERT.format(mu_dtype)}"
        )
    return mu.codes if isinstance(mu, Codes) else mu


def check_kept(path: str, kept: Any, is_codes: bool) -> None:
    """Refuses codes that a restore has cast to moments, and moments cast to codes.

    Args:
        path: of a parameter of real numbers.
        kept: what the state keeps of its first moment.
        is_codes: whether the state says that these are codes.

    Raises:
        ValueError: if they are the other.
    """
    if is_codes and kept.dtype != jnp.int8:
        raise ValueError(
            f"{path or 'params'}: the state's mu has codes that were cast to {kept.dtype}: restore "
            "it as it was saved, with a template that has int8 there"
        )
    if not is_codes and kept.dtype == jnp.int8:
        raise ValueError(f"{path or 'params'}: {_OF_VERSION_0_2}")


_OF_VERSION_0_2 = (
    "the state's mu is int8, without the node that this version keeps codes in: if it is of "
    "version 0.2, go to AdamW's state with that version, to_adam_state(state, params, "
    "block_specs), and from there on with this one"
)
_CONVERT = (
    "from_adam_state(to_adam_state(state, params, block_specs), params, block_specs, mu_dtype={})"
)


def allowed_b2(b1: Any) -> tuple[Any, Any]:
    """The smallest and the largest `b2` for which a moment stays within its bound.

    The solutions of (1 - b1)**2 / ((1 - b2) (1 - b1**2 / b2)) = 32**2.

    Args:
        b1: a number, or an array.

    Examples:
        >>> [round(b2, 5) for b2 in allowed_b2(0.9)]
        [0.81004, 0.99995]
    """
    middle = (1 + b1**2 - ((1 - b1) / _FACTOR) ** 2) / 2
    half = (middle**2 - b1**2) ** 0.5
    return middle - half, middle + half


def check_decays(b1: Any, b2: Any) -> None:
    """Refuses decay rates for which a moment may exceed its bound.

    Raises:
        ValueError: if they are such.
    """
    least, greatest = allowed_b2(float(b1))
    if not least <= float(b2) <= greatest:
        raise ValueError(
            f"mu_dtype=int8 keeps no more than {_FACTOR:g} times the root of the second moment, "
            f"and with b1={float(b1):g} and b2={float(b2):g} the first may be more: take b2 "
            f"between {math.ceil(least * 1e5) / 1e5:g} and {math.floor(greatest * 1e5) / 1e5:g}, "
            "or leave mu_dtype out"
        )
