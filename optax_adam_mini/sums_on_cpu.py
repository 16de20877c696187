"""Sums written so that XLA's CPU compiler runs them fast; other compilers need only plain sums.

Three traits of that compiler make the plain sum slow (2 cores, reading at 30 GB/s):

- It sums over an axis before long rows at a fraction of the memory bandwidth: 28 GB/s for rows of
  3072, 4.6 for 11008, 0.7 for 50257. Summing in two stages, as a dot or unrolled is no faster, or
  stores a copy. Here, long rows are added in a loop, eight at a time: 22 to 33 GB/s.
- If an array is read twice, by a sum and by the code after it, the compiler widens it once for
  both, into memory. With such a copy, the update in bfloat16 takes 1.1 times AdamW's time, and 0.4
  to 0.5 without. Barriers here separate the two readings.
- It reads an array once for each of several sums.

The formulation is chosen while tracing, when shardings by GSPMD are unknown. If GSPMD has sharded
an axis that is split here, the array moves between devices: results on meshes of CPU devices are
right, but slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact

Value = Callable[["Array"], "Array"]


def whole_axes_sum(
    x: Inexact[Array, "*shape"], whole: Sequence[int], value: Value
) -> Callable[[Array], Array] | None:
    """A function that sums `value(x)` over whole axes, kept with size 1; None for the plain sum.

    Args:
        x: an array.
        whole: the axes.
        value: an elementwise function, which widens to float32 first.
    """
    plain = lambda x: jnp.sum(value(x), axis=tuple(whole), keepdims=True)

    def apart(x: Array) -> Array:
        return plain(jax.lax.optimization_barrier(x))

    def looped(x: Array) -> Array:
        # The axis becomes two. The loop runs over the inner one: GSPMD may have sharded the outer.
        outer = x.shape[axis] // steps  # not -1: an array may be empty
        rows = x.reshape(*x.shape[:axis], outer, steps, *x.shape[axis + 1 :])

        def at(i: Any) -> Array:
            # Without the barrier, `rows` would be widened before the loop.
            here, i = jax.lax.optimization_barrier((rows, i))
            return value(jax.lax.dynamic_index_in_dim(here, i, axis + 1, keepdims=False))

        add = lambda i, total: total + at(i)
        total = jax.lax.fori_loop(0, steps, add, jnp.zeros_like(at(0)), unroll=8)
        return jnp.sum(total, axis=tuple(whole), keepdims=True)

    axis = max(whole, default=-1)
    if axis >= 0 and math.prod(x.shape[axis + 1 :]) >= 4096 and not _is_sharded(x, axis):
        few = 1024 // x.dtype.itemsize  # with as many steps or more, the sums take < 0.5% of x
        divisors = [n for n in range(few, x.shape[axis] + 1) if x.shape[axis] % n == 0]
        if divisors:
            # Prefer the outer axis with the most factors of two: meshes usually have powers of two,
            # and an outer axis that they divide stays sharded.
            outer = lambda n: x.shape[axis] // n
            near = [n for n in divisors if n <= max(4 * few, divisors[0])]
            steps = max(near, key=lambda n: outer(n) & -outer(n))
            return looped
    return apart if x.dtype.itemsize < 4 else None


def part_means(
    x: Inexact[Array, "*shape"], axis: int, bounds: Sequence[tuple[int, int]], value: Value
) -> Callable[[Array], Array] | None:
    """A function that averages `value(x)` over each part of an axis; None if that is sharded.

    Args:
        x: an array.
        axis: the axis.
        bounds: the start and stop of each part.
        value: an elementwise function, which widens to float32 first.
    """

    def split(x: Array) -> Array:
        # Split into equal pieces, which divide the parts: with one slice per part, XLA would first
        # store `value` of the whole array.
        n = x.shape[axis] // piece  # not -1: an array may be empty
        pieces = x.reshape(*x.shape[:axis], n, piece, *x.shape[axis + 1 :])
        total = whole_axes_sum(pieces, [axis + 1], value)
        plain = lambda x: jnp.sum(value(x), axis + 1, keepdims=True)
        sums = jnp.squeeze((total or plain)(pieces), axis + 1)
        means = [
            jax.lax.slice_in_dim(sums, start // piece, stop // piece, axis=axis).sum(
                axis, keepdims=True
            )
            / (stop - start)
            for start, stop in bounds
        ]
        return jnp.concatenate(means, axis)

    piece = math.gcd(*(stop - start for start, stop in bounds))
    return None if _is_sharded(x, axis) else split


def _is_sharded(x: Array, axis: int) -> bool:
    return bool(jax.typeof(x).sharding.spec[axis])
