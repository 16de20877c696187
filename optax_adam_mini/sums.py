"""Means over the blocks of a grid, and broadcasts back, written so that XLA fuses them.

An array is first summed over the axes that are not cut, in one reduction. Only the small result is
grouped into blocks. On the way back, only the small array is repeated; the rest is a broadcast.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from optax_adam_mini import sums_on_cpu

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact, Real

T = TypeVar("T")

Runs = tuple[tuple[int, int], ...]
"""The cuts of one axis of a known size, in order: `(number of blocks, indices in each)`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """One number per block. `v` is the product of one or two factors.

    Attributes:
        numbers: the numbers, an array with the parameter's rank.
        runs: for each axis, the runs of equal blocks along it.
    """

    numbers: Inexact[Array, "*grid"]
    runs: tuple[Runs, ...] = dataclasses.field(metadata={"static": True})


def block_mean(
    x: Inexact[Array, "*shape"],
    axes: Sequence[Runs],
    of: Callable[[Array], Array] | None = None,
) -> Inexact[Array, "*grid"]:
    """The mean over each block of `x`, or of a function of it, in float32 or wider.

    Args:
        x: an array of any inexact dtype.
        axes: for each of its axes, the runs of equal blocks along it, as
            `BlockSpec.runs` gives them.
        of: an elementwise function of `x` to average; its values are not stored.

    Examples:
        >>> block_mean(jnp.array([1.0, 3.0, 5.0]), [((1, 2), (1, 1))])
        Array([2., 5.], dtype=float32)
    """
    wide = lambda x: x.astype(widen(x.dtype))
    value = lambda x: wide(of(wide(x))) if of else wide(x)  # `of` may return booleans
    if (axis := _axis_in_parts(axes)) is not None:
        bounds = _bounds(axes[axis])
        plain = lambda x: _part_means(x, axis, bounds, value)
        return _by_platform(x, plain, sums_on_cpu.part_means(x, axis, bounds, value))
    sizes, whole = block_sizes(axes), [a for a, runs in enumerate(axes) if _is_whole(runs)]
    plain = lambda x: jnp.sum(value(x), axis=tuple(whole), keepdims=True)
    total = _by_platform(x, plain, sums_on_cpu.whole_axes_sum(x, whole, value))
    for axis, runs in enumerate(axes):
        if not (_is_whole(runs) or _is_each(runs)):
            total = _sum_runs(total, axis, runs)
    return total / np.asarray(sizes, total.dtype)


def spread(
    nu: Inexact[Array, "*grid"], axes: Sequence[Runs], shape: Sequence[int]
) -> Inexact[Array, "*shape"]:
    """The array of `shape` that holds, at every coordinate, its block's entry of `nu`.

    Args:
        nu: one number per block.
        axes: for each axis, the runs of equal blocks along it.
        shape: the shape that these runs cut.

    Examples:
        >>> spread(jnp.array([2.0, 5.0]), [((1, 2), (1, 1))], (3,))
        Array([2., 2., 5.], dtype=float32)
    """
    if (axis := _axis_in_parts(axes)) is not None:
        return _spread_parts(nu, axes, axis, shape)
    for axis, runs in enumerate(axes):
        if not (_is_whole(runs) or _is_each(runs)):
            nu = _repeat_runs(nu, axis, runs)
    if nu.shape == tuple(shape):
        return nu
    # Without the barrier, XLA would move the computation of `nu` (a square root and a division per
    # block) past the broadcast, and do it once per coordinate.
    return jnp.broadcast_to(jax.lax.optimization_barrier(nu), tuple(shape))


def spread_product(
    factors: Sequence[Factor], shape: Sequence[int], of: Callable[[Array], Array] | None = None
) -> Inexact[Array, "*shape"]:
    """The product of factors at every coordinate, or a function of it.

    Args:
        factors: one factor, or two.
        shape: the shape that their runs cut.
        of: an elementwise function of the product. With one factor it is computed once per block.

    Examples:
        >>> spread_product([Factor(jnp.array([4.0, 9.0]), (((1, 2), (1, 1)),))], (3,), jnp.sqrt)
        Array([2., 2., 3.], dtype=float32)
    """
    of = of or (lambda x: x)
    if len(factors) == 1:
        return spread(of(factors[0].numbers), factors[0].runs, shape)
    a, b = (spread(factor.numbers, factor.runs, shape) for factor in factors)
    return of(a * b)


def widen(dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype to compute in: float32, or `dtype` itself if it is wider or complex."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return jnp.dtype(dtype if is_wide else jnp.float32)


def widened(x: Any) -> Any:
    """An array in `widen` of its dtype; `optax.inject_hyperparams` may make them in 16 bits."""
    return x.astype(widen(x.dtype)) if isinstance(x, jax.Array) else x


def zeros_beside(param: Any, block: jax.ShapeDtypeStruct) -> Array:
    """Zeros like `block`; with explicit sharding, on the devices of the parameter."""
    if not isinstance(block.sharding, NamedSharding):
        # Not like `block`: with some axes manual, JAX makes no zeros like a ShapeDtypeStruct.
        return jnp.zeros_like(param, block.dtype, block.shape)
    mesh = getattr(getattr(param, "sharding", None), "mesh", None)  # has devices if param has
    if not isinstance(mesh, Mesh):
        return jnp.zeros_like(block)
    return jnp.zeros_like(block, device=NamedSharding(mesh, block.sharding.spec))


def _is_whole(runs: Runs) -> bool:
    return len(runs) == 1 and runs[0][0] == 1


def _is_each(runs: Runs) -> bool:
    return all(block == 1 for _, block in runs)


_FEW = 8  # the most parts that are selected one by one


def _axis_in_parts(axes: Sequence[Runs]) -> int | None:
    """The axis with few parts, if all others are cut at each index: rows of a fused kernel.

    No other axis can be summed first, so the array is still large when its parts are summed.
    """
    grouped = [a for a, runs in enumerate(axes) if not (_is_whole(runs) or _is_each(runs))]
    whole = [runs for runs in axes if _is_whole(runs) and runs[0][1] > 1]
    if len(grouped) != 1 or whole or len(axes) < 2:
        return None
    return grouped[0] if sum(n for n, _ in axes[grouped[0]]) <= _FEW else None


def _by_platform(x: Array, plain: Callable[[Array], Array], on_cpu: Any) -> Array:
    return plain(x) if on_cpu is None else jax.lax.platform_dependent(x, cpu=on_cpu, default=plain)


def _part_means(
    x: Inexact[Array, "*shape"],
    axis: int,
    bounds: Sequence[tuple[int, int]],
    value: Callable[[Array], Array],
) -> Inexact[Array, "*grid"]:
    """The mean of each part of one axis.

    Splitting a sharded axis would move data between devices. A mask moves nothing, and XLA computes
    several sums of one array in one reading.
    """
    index = _index_along(axis, x.shape)
    parts: list[Array] = []
    for start, stop in bounds:
        kept = jnp.where((start <= index) & (index < stop), value(x), 0)
        parts.append(jnp.sum(kept, axis, keepdims=True) / (stop - start))
    return jnp.concatenate(parts, axis)


def _spread_parts(
    nu: Inexact[Array, "*grid"], axes: Sequence[Runs], axis: int, shape: Sequence[int]
) -> Inexact[Array, "*shape"]:
    """Like `spread`, but selects among the parts: an expression that fuses with its consumer."""
    nu = jax.lax.optimization_barrier(_not_sharded_along(nu, axis))
    bounds = _bounds(axes[axis])
    rows = [jax.lax.slice_in_dim(nu, part, part + 1, axis=axis) for part in range(len(bounds))]
    index = _index_along(axis, shape)
    found = rows[-1]
    for row, (_, stop) in zip(rows[-2::-1], bounds[-2::-1], strict=True):
        found = jnp.where(index < stop, row, found)
    return jnp.broadcast_to(found, tuple(shape))


def _bounds(runs: Runs) -> list[tuple[int, int]]:
    """The start and stop of each block along an axis."""
    ends = np.cumsum([0, *np.repeat([size for _, size in runs], [n for n, _ in runs])]).tolist()
    return list(itertools.pairwise(ends))


def _index_along(axis: int, shape: Sequence[int]) -> Array:
    """The indices of one axis, in an array of size 1 along the others."""
    along = [size if a == axis else 1 for a, size in enumerate(shape)]
    return jax.lax.broadcasted_iota(np.int32, along, axis)


def _not_sharded_along(x: Array, axis: int) -> Array:
    """Unshards one axis, because explicit sharding allows no reshape of a sharded axis.

    The arrays are small: sums over whole axes, or one number per block.
    """
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is None:
        return x
    spec = [None if a == axis else name for a, name in enumerate(sharding.spec)]
    return jax.sharding.reshard(x, sharding.update(spec=jax.sharding.PartitionSpec(*spec)))


def _sum_runs(x: Real[Array, "*shape"], axis: int, runs: Runs) -> Real[Array, "*grouped"]:
    """Sums each block along one axis."""
    x = _not_sharded_along(x, axis)
    repeats, unit = period(runs)
    lead, trail = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*lead, repeats, x.shape[axis] // repeats, *trail)
    sums: list[Array] = []
    start = 0
    for n, size in unit:
        part = jax.lax.slice_in_dim(x, start, start + n * size, axis=axis + 1)
        sums.append(part.reshape(*lead, repeats, n, size, *trail).sum(axis + 2))
        start += n * size
    return jnp.concatenate(sums, axis + 1).reshape(*lead, sum(n for n, _ in runs), *trail)


def _repeat_runs(x: Real[Array, "*grid"], axis: int, runs: Runs) -> Real[Array, "*shape"]:
    """Repeats each block's entry along one axis as often as the block is long."""
    x = _not_sharded_along(x, axis)
    repeats, unit = period(runs)
    lead, trail = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*lead, repeats, x.shape[axis] // repeats, *trail)
    parts: list[Array] = []
    start = 0
    for n, size in unit:
        part = jax.lax.slice_in_dim(x, start, start + n, axis=axis + 1)
        parts.append(jnp.repeat(part, size, axis=axis + 1))
        start += n
    length = sum(n * size for n, size in runs)
    return jnp.concatenate(parts, axis + 1).reshape(*lead, length, *trail)


def block_sizes(axes: Sequence[Runs]) -> float | np.ndarray:
    """The number of coordinates in each block: one number, or an array that broadcasts."""
    if all(len(runs) == 1 for runs in axes):
        return float(math.prod(runs[0][1] for runs in axes))
    sizes = np.ones([1] * len(axes))
    for axis, runs in enumerate(axes):
        along = np.repeat([s for _, s in runs], [n for n, _ in runs]).astype(float)
        sizes = sizes * along.reshape([-1 if a == axis else 1 for a in range(len(axes))])
    return sizes


def period(items: Sequence[T]) -> tuple[int, Sequence[T]]:
    """How often a sequence repeats its shortest unit, and that unit.

    Examples:
        >>> period("qkvqkv")
        (2, 'qkv')
    """
    for length in range(1, len(items) + 1):
        if len(items) % length == 0 and items[length:] == items[:-length]:
            return len(items) // length, items[:length]
    return 1, items
