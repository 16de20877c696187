"""Reads and writes first moments in 8 bits.

`m` and `v` average the same gradients, so `m` is about as large as `sqrt(v)`: from a quarter of it,
if the gradient is noise, to a few times it. A code stores `m` relative to `1.25 sqrt(v)`, and needs
no scale of its own because `nu` gives `v` at each coordinate. Most of the 127 magnitudes lie where
moments do:

    relative to 1.25 sqrt(v)      2**-6  2**-5  2**-4  ...  2**1  2**2  ...  2**6  ...  2**17
    codes in each binade              4      8     16          8      4         1

Below 2**-5 they are evenly spaced, down to 0. The last code lies beyond the largest moment. By the
Cauchy-Schwarz inequality

    |m|  <=  (1 - b1) / sqrt((1 - b2) (1 - b1**2 / b2)) * sqrt(n v)

for every coordinate of a block of `n` coordinates with the second moment `v`. Decay rates with a
factor above 32 are refused (`check_decays`), or replaced by the nearest allowed `b2`
(`allowed_b2`); the bound then holds after every step, whatever the rates were before. The largest
code, 2**17, lies beyond 32 sqrt(n v) in blocks of up to 2**24 coordinates. In larger blocks,
sqrt(n) / 2**12 replaces 1.25 if it is larger.

Codes are rounded up or down at random, in proportion, so that their mean is the moment: a change
too small for one step survives in the mean. The random numbers are a hash of the step, the
parameter's path and the coordinate: the same on any mesh and after any restart.

Muon has no second moment. The codes of its momentum are relative to the largest entry of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini import sums
from optax_adam_mini.random_bits import random_bits, without_derivative
from optax_adam_mini.sums import Factor

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int8, UInt32


class Codes(NamedTuple):
    """`mu` of a state in 8 bits. A state in floats has no such node.

    So a checkpoint of one kind cannot be restored as the other, even if the restore casts dtypes.

    Attributes:
        codes: a tree like the parameters, int8.
    """

    codes: Any


_FACTOR = 32.0  # of the bound
_SCALE = 1.25  # of the root
_CUT = 23  # bits of a float32's fraction: a binade is 2**23 floats, evenly spaced
_SMALL, _LARGE = -6, 17
_DENSER = ((3, -6, 6), (4, -5, 2), (8, -4, 1))  # (additional codes per binade, from, to)
_OFFSET = 2.0**_SMALL  # added before a number is read as bits, to space small numbers evenly
# -0.0 equals 0.0, but XLA does not take it for the same constant. The gradients of a scan start as
# 0.0, and XLA's GPU compiler would keep those arrays until the update, to compare with them.
_ZERO = -0.0
_NO_CODES = "take gradients through an update with mu_dtype=None"
_TINY = float(np.finfo(np.float32).tiny)


def _bits(exponent: int) -> int:
    """The bits of 2.0**exponent in float32."""
    return (127 + exponent) << _CUT


def _code_at(binade: int) -> int:
    """The code of the first number of a binade."""
    codes = [1 + sum(more for more, first, last in _DENSER if first <= b < last)
             for b in range(_SMALL, binade)]  # fmt: skip
    return sum(codes)


def _clamped(x: Array, least: int, most: int) -> Array:
    # One operation; jnp.clip is several, each of which takes time to compile.
    return jax.lax.clamp(np.int32(least), x, np.int32(most))


def read(kept: Array, factors: Sequence[Factor]) -> Float[Array, "*shape"]:
    """The first moment, in float32 or wider, from an array in a state.

    Args:
        kept: one array of a state's `mu`: codes, or numbers of any inexact dtype.
        factors: the factors of the second moment in the same state.

    Examples:
        >>> codes, v = jnp.array([92, 0, -12], jnp.int8), per_tensor().factors(jnp.ones(1), (3,))
        >>> read(codes, v)
        Array([ 2.4804688 ,  0.        , -0.05859375], dtype=float32)
    """
    if kept.dtype != jnp.int8:
        return kept.astype(sums.widen(kept.dtype))
    code = jnp.abs(kept.astype(jnp.int32))
    bits, base, density = code << _CUT, _bits(_SMALL), 1
    for more, first, last in _DENSER:  # the inverse of what `write` does
        shorter = (1 << _CUT) // density - (1 << _CUT) // (density + more)
        bits -= shorter * _clamped(code, _code_at(first), _code_at(last))
        base += shorter * _code_at(first)
        density += more
    bits += base
    magnitude = jax.lax.bitcast_convert_type(bits, jnp.float32) - _OFFSET
    # Replacing infinite roots by 0 avoids 0 * inf = NaN: a block that has overflowed stands still.
    finite = lambda root: jnp.where(jnp.isfinite(root), root, 0.0)
    return _times_roots(jnp.where(kept < 0, -magnitude, magnitude), factors, finite)


def write(
    m: Float[Array, "*shape"], factors: Sequence[Factor], dtype: np.dtype, seed: UInt32[Array, ""]
) -> Array:
    """The first moment as a state stores it: codes, or numbers of another dtype.

    Over many seeds, the mean of what the codes stand for is `m`.

    Args:
        m: the moment.
        factors: the factors of the second moment after the same gradients.
        dtype: the dtype to store; int8 for codes.
        seed: seed of the rounding.

    Raises:
        TypeError: if codes are differentiated.

    Examples:
        >>> from optax_adam_mini.random_bits import rounding_seed
        >>> m = jnp.array([2.4804688, 0.0, -0.05859375])
        >>> v = per_tensor().factors(jnp.ones(1), (3,))
        >>> write(m, v, jnp.dtype("int8"), rounding_seed(1, 0))
        Array([ 92,   0, -12], dtype=int8)
    """
    if dtype != jnp.int8:
        return narrowed(m, dtype)
    # A root too small to have an inverse gives the code 0.
    inverse = lambda root: 1 / jnp.where(root > _TINY, root, jnp.inf)
    number = _times_roots(jnp.abs(m), factors, inverse).astype(jnp.float32) + _OFFSET
    number = without_derivative(number, _NO_CODES)
    # In each binade, codes are evenly spaced in the bits and hence in the numbers. Adding a random
    # number to the fraction that is cut off rounds up in proportion to it.
    bits = jax.lax.bitcast_convert_type(number, jnp.int32) - _bits(_SMALL)
    above = lambda exponent: _bits(exponent) - _bits(_SMALL)
    code, extra = jnp.minimum(bits, above(_LARGE)), 0
    for more, first, last in _DENSER:
        code += more * _clamped(bits, above(first), above(last))
        extra += more * above(first)
    code = ((code + (random_bits(_CUT, m.shape, seed) - extra)) >> _CUT).astype(jnp.int8)
    # The sign is applied last, in 8 bits. If a conversion came last, XLA's CPU compiler would
    # compute the codes again for the update, from a copy of the old codes.
    return jnp.where(m < _ZERO, -code, code)


def narrowed(m: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """A moment in another dtype; within float16's range, because infinity would stay."""
    if dtype == jnp.float16:
        most = float(jnp.finfo(dtype).max)
        m = jnp.clip(m, -most, most)
    return m.astype(dtype)


def _times_roots(x: Array, factors: Sequence[Factor], of: Any) -> Array:
    """`x` times `of(1.25 sqrt(v))`, the root that codes are relative to."""
    v, *ratios = factors
    dtype = v.numbers.dtype
    # The root is large enough that the last code reaches the bound, 32 sqrt(n v).
    floor = np.sqrt(sums.block_sizes(v.runs)) * _FACTOR / 2.0**_LARGE
    root = jnp.sqrt(v.numbers)
    if not ratios:
        root *= np.maximum(_SCALE, floor).astype(dtype)
    x = x * sums.spread(of(root), v.runs, x.shape)
    for ratio in ratios:
        least = np.max(floor, initial=0).astype(dtype)
        root = jnp.maximum(_SCALE * jnp.sqrt(ratio.numbers), least)
        x = x * sums.spread(of(root), ratio.runs, x.shape)
    return x


class RowCodes(NamedTuple):
    """Muon's momentum in 8 bits, without a second moment that codes could be relative to.

    A code `c` stands for `sign(c) (c / 127)**2` times the largest entry of its row, so small
    numbers have finer steps.

    Attributes:
        codes: a tree like the parameters, int8.
        largest: the largest entry of each row, bfloat16, in arrays of the parameters' ranks.
    """

    codes: Any
    largest: Any


_LAST = 127


def read_row(codes: Int8[Array, "*shape"], largest: Float[Array, "*row"]) -> Float[Array, "*shape"]:
    """The numbers that codes stand for, in float32.

    Args:
        codes: the codes of a matrix.
        largest: the largest entry of each row, with size 1 along the rows' axes.

    Examples:
        >>> read_row(jnp.array([127, 64, 0, -1], jnp.int8), jnp.array([16129.0]))
        Array([ 1.6129e+04,  4.0960e+03,  0.0000e+00, -1.0000e+00], dtype=float32)
    """
    number = codes.astype(jnp.float32)
    return number * jnp.abs(number) * (jnp.asarray(largest, jnp.float32) / _LAST**2)


def write_row(
    m: Float[Array, "*shape"], axes: tuple[int, ...], seed: UInt32[Array, ""]
) -> tuple[Int8[Array, "*shape"], Float[Array, "*row"]]:
    """The codes of a matrix, and the largest entries that they are relative to.

    Over many seeds, the mean of what the codes stand for is `m`.

    Args:
        m: the matrix.
        axes: the axes along which a row lies.
        seed: seed of the rounding.

    Returns:
        The codes, and the largest magnitude of each row or a little more, in bfloat16.

    Raises:
        TypeError: if codes are differentiated.

    Examples:
        >>> from optax_adam_mini.random_bits import rounding_seed
        >>> codes, largest = write_row(jnp.ones((2, 5)), (1,), rounding_seed(1, 0))
        >>> codes.dtype, largest.dtype, largest.shape
        (dtype('int8'), dtype(bfloat16), (2, 1))
    """
    magnitude = jnp.abs(m)
    # Enlarged by as much as bfloat16 may round down.
    top = jnp.max(magnitude, axes, keepdims=True, initial=0)
    largest = (top * (1 + 2.0**-8)).astype(jnp.bfloat16)
    top = largest.astype(m.dtype)
    # A row whose largest entry is too small to have an inverse is stored as 0.
    is_small = top <= _TINY * _LAST**2
    square = magnitude * jnp.where(is_small, 0, _LAST**2 / jnp.where(is_small, 1, top))
    square = without_derivative(square, _NO_CODES)
    code = jnp.floor(jnp.sqrt(square))
    # Round to code**2 or (code + 1)**2 at random, in proportion.
    chance = (square - code * code) / (2 * code + 1)
    code += chance * 2.0**_CUT > random_bits(_CUT, m.shape, seed)
    code = jnp.minimum(code, _LAST).astype(jnp.int8)
    return jnp.where(m < _ZERO, -code, code), largest


def pack_mu(mu: Any, mu_dtype: Any) -> Any:
    """The `mu` of a state, made from a tree like the parameters."""
    return Codes(mu) if mu_dtype == jnp.int8 else mu


def unpack_mu(mu: Any, mu_dtype: Any) -> Any:
    """The tree like the parameters from the `mu` of a state.

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
    return tree_in(mu)


def tree_in(mu: Any) -> Any:
    """The tree like the parameters in the `mu` of any state."""
    return mu.codes if isinstance(mu, Codes | RowCodes) else mu


def check_stored_dtype(path: str, kept: Any, is_codes: bool) -> None:
    """Refuses codes that a restore has cast to floats, and floats that it has cast to codes.

    Args:
        path: the path of a parameter of real numbers.
        kept: the array that the state has for its first moment.
        is_codes: whether the state says that this array has codes.

    Raises:
        ValueError: if its dtype says otherwise.
    """
    if is_codes and kept.dtype != jnp.int8:
        raise ValueError(
            f"{path or 'params'}: the state's mu has codes that were cast to {kept.dtype}: restore "
            "it as it was saved, with a template that has int8 there"
        )
    if not is_codes and kept.dtype == jnp.int8:
        raise ValueError(f"{path or 'params'}: {_OF_VERSION_0_2}")


_OF_VERSION_0_2 = (
    "the state's mu is a plain int8 array, and this version stores codes in a Codes node: if the "
    "state is of version 0.2, convert it with to_adam_state(state, params, block_specs) of that "
    "version, and what it returns with from_adam_state(...) of this one"
)
_CONVERT = (
    "from_adam_state(to_adam_state(state, params, block_specs), params, block_specs, mu_dtype={})"
)


def allowed_b2(b1: Any) -> tuple[Any, Any]:
    """The smallest and the largest `b2` for which moments stay within the range of codes.

    They solve (1 - b1)**2 / ((1 - b2) (1 - b1**2 / b2)) = 32**2, which is quadratic in 1 - b2.

    Args:
        b1: a number, or an array.

    Examples:
        >>> [round(b2, 5) for b2 in allowed_b2(0.9)]
        [0.81004, 0.99995]
    """
    rest = 1 - b1
    product = (rest / _FACTOR) ** 2  # of the two solutions; `total` is their sum
    total = rest * (1 + b1) + product
    larger = (total + (total**2 - 4 * product) ** 0.5) / 2
    return 1 - larger, 1 - product / larger


def check_decays(b1: Any, b2: Any) -> None:
    """Refuses decay rates for which a moment may exceed the range of codes.

    Raises:
        ValueError: if it may.
    """
    least, greatest = allowed_b2(float(b1))
    if not least <= float(b2) <= greatest:
        raise ValueError(
            f"mu_dtype=int8 stores first moments of at most {_FACTOR:g} sqrt(n v), for blocks of n "
            f"coordinates, and with b1={float(b1):g} and b2={float(b2):g} they may be larger: take "
            f"b2 between {math.ceil(least * 1e5) / 1e5:g} and "
            f"{math.floor(greatest * 1e5) / 1e5:g}, or leave mu_dtype out"
        )
