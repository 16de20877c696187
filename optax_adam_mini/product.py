"""The product of two grids as a spec: one row and one column inside each block.

Where [`BlockSpec`][optax_adam_mini.BlockSpec] keeps one number for each block,
[`outer`][optax_adam_mini.outer] keeps the means over two grids, and `v` is their product: what a
matrix needs that is not alike along its outputs only, at the price of one number for each input.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini import sums
from optax_adam_mini.blocks import BlockSpec, Runs, stacked_along
from optax_adam_mini.boxes import with_kept_names

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact


class OuterMoments(NamedTuple):
    """What is kept for the two grids of [`outer`][optax_adam_mini.outer].

    Of a parameter these are two arrays, and in an optimizer's state two trees of arrays.

    Attributes:
        a: one number for each block of the first grid, of the parameter's rank. In a state, a tree
            like the parameters; those of which one number is kept for each block are in it too.
        b: one for each block of the second. In a state, `None` for those.
    """

    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Outer:
    """What [`outer`][optax_adam_mini.outer] makes: a spec, as `BlockSpec` is one.

    Static, hashable, comparable, a leaf of a pytree of specs.

    Attributes:
        a: the first grid.
        b: the second.
        note: a remark in tables; it takes no part in comparisons.
    """

    a: BlockSpec
    b: BlockSpec
    note: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, spec in (("a", self.a), ("b", self.b)):
            if not isinstance(spec, BlockSpec):
                raise TypeError(
                    f"outer: {name} must be a BlockSpec such as per_neuron(), got {spec!r} of type "
                    f"{type(spec).__name__}"
                )

    def runs(self, shape: Sequence[int]) -> tuple[Runs, ...]:
        """The cuts that both grids have: those of the blocks that hold a row and a column each.

        Args:
            shape: the parameter's shape.

        Returns:
            For every axis, its runs of equal blocks, as
            [`BlockSpec.runs`][optax_adam_mini.BlockSpec.runs] gives them.

        Raises:
            ValueError: if one of the grids does not fit the shape.

        Examples:
            >>> outer(per_head(12), per_neuron()).runs((768, 768))
            (((1, 768),), ((12, 64),))
        """
        pairs = zip(self.a.runs(shape), self.b.runs(shape), strict=True)
        return tuple(_common(a, b) for a, b in pairs)

    def grid(self, shape: Sequence[int]) -> OuterMoments:
        """The shapes of the two arrays in `nu`.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as [`Outer.runs`][].

        Examples:
            >>> outer(per_neuron(axis=0), per_neuron()).grid((4096, 11008))
            OuterMoments(a=(4096, 1), b=(1, 11008))
        """
        return OuterMoments(self.a.grid(shape), self.b.grid(shape))

    def check(self, shape: Sequence[int]) -> None:
        """Refuses a shape that the grids do not fit, or on which one of them says nothing.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as [`Outer.runs`][]; and if all blocks of one grid lie inside those of the
                other, but for vectors and the like, where it cannot be otherwise.

        Examples:
            >>> outer(per_head(4, stacked=0), per_neuron()).check((64, 64))
        """
        (a, b), both = self.grid(shape), _grid(self.runs(shape))
        longer = [any(size > 1 for _, size in runs) for runs in self.runs(shape)]
        if sum(longer) < 2 or both not in (a, b):  # blocks with less than two axes are vectors
            return
        inner, other = ("b", "a") if both == a else ("a", "b")
        raise ValueError(
            f"{self}: the blocks of {inner} lie inside those of {other} on the shape "
            f"{tuple(shape)}, so that v would be the mean over those of {inner} alone: let {other} "
            "cut other axes too, as in outer(per_head(4, stacked=0), per_neuron()), or give "
            f"{inner} without outer"
        )

    def size(self, shape: Sequence[int]) -> int:
        """How many numbers `nu` has.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as [`Outer.runs`][].

        Examples:
            >>> outer(per_neuron(axis=0), per_neuron()).size((4096, 11008))
            15104
        """
        return self.a.size(shape) + self.b.size(shape)

    def block_mean(
        self, x: Inexact[Array, "*shape"], of: Callable[[Array], Array] | None = None
    ) -> OuterMoments:
        """The means of `x`, or of a function of each number, over the blocks of both grids.

        Args:
            x: an array of the parameter's shape, of any inexact dtype.
            of: an elementwise function whose values are averaged; they are not kept.

        Returns:
            Two arrays of the shapes in `self.grid(x.shape)`, float32 or wider.

        Raises:
            ValueError: as [`Outer.runs`][].

        Examples:
            >>> outer(per_neuron(axis=0), per_neuron()).block_mean(jnp.array([[1.0, 3.0]]))
            OuterMoments(a=Array([[2.]], dtype=float32), b=Array([[1., 3.]], dtype=float32))
        """
        a, b = self.a.runs(x.shape), self.b.runs(x.shape)

        def means(x: Array, again: Array) -> OuterMoments:
            return OuterMoments(sums.block_mean(x, a, of), sums.block_mean(again, b, of))

        # On a TPU one reading makes both sums. XLA's CPU compiler makes one result a loop, and
        # would keep what both sum, an array of x's size: a barrier holds the readings apart there.
        return jax.lax.platform_dependent(
            x,
            cpu=lambda x: means(x, jax.lax.optimization_barrier(x)),
            default=lambda x: means(x, x),
        )

    def spread(
        self,
        nu: OuterMoments,
        shape: Sequence[int],
        of: Callable[[Array], Array] | None = None,
    ) -> Inexact[Array, "*shape"]:
        """The product `v = v_a v_b / v_ab` at every coordinate, or a function of it.

        Args:
            nu: two arrays of the shapes in `self.grid(shape)`, of numbers that are not negative.
            shape: the parameter's shape.
            of: an elementwise function, taken of the product.

        Returns:
            An array of `shape` and of `nu`'s dtype: an expression of small arrays, which fuses with
            what reads it.

        Raises:
            ValueError: if `nu` has not the shapes of the grids, and as [`Outer.runs`][].

        Examples:
            >>> spec = outer(per_neuron(axis=0), per_neuron())
            >>> spec.spread(spec.block_mean(jnp.array([[1.0, 2.0], [3.0, 6.0]])), (2, 2))
            Array([[1., 2.],
                   [3., 6.]], dtype=float32)
        """
        if jax.tree.map(jnp.shape, nu) != self.grid(shape):
            raise ValueError(
                f"{self} cuts the shape {tuple(shape)} into the grids {tuple(self.grid(shape))}, "
                f"but got {jax.tree.map(jnp.shape, nu)}"
            )
        a, b, both = self.a.runs(shape), self.b.runs(shape), self.runs(shape)
        v_ab = _coarser_mean(nu.a, a, both)
        # A block that has overflowed stands still, as one of one number does: its rows are infinite
        # and no ratio is 0. A block of zeros has no ratio; it is zero by its rows. (Sums and
        # quotients, since under explicit sharding a choice needs arrays that are sharded alike.)
        is_over = (v_ab == jnp.inf).astype(v_ab.dtype)
        over = lambda fine: sums.spread(is_over, _counts(fine, both), _grid(fine))
        v_a, v_b = (nu.a + over(a)) / (1 - over(a)), nu.b + over(b)
        v_ab = jnp.where((v_ab == 0) | (is_over > 0), 1, v_ab)
        # The ratio first, which is from 0 to the number of columns: a product of two small numbers
        # would underflow. Scaled by a power of two, since XLA divides by multiplying with the
        # inverse, and that of a number near float32's largest is 0.
        scale = jnp.where(v_ab > 1, 2.0**-60, 2.0**60).astype(v_ab.dtype)
        in_b = lambda x: sums.spread(x, _counts(b, both), nu.b.shape)
        ratio = v_b * in_b(scale) / in_b(v_ab * scale)
        v = sums.spread(v_a, a, shape) * sums.spread(ratio, b, shape)
        return v if of is None else of(v)

    def __str__(self) -> str:
        return f"outer({self.a}, {self.b})"


Spec = BlockSpec | Outer
"""How `v` of a parameter is kept: one number for each block, or a row and a column in each."""


def outer(a: BlockSpec, b: BlockSpec, *, stacked: int | Sequence[int] = ()) -> Outer:
    """The product of two grids: in each block that both have, `v` is a row times a column.

    With the means `v_a` and `v_b` of the squared gradient's moving average over the blocks of the
    two grids, and `v_ab` that over the blocks of their common coarsening (whose cuts are those that
    both have: one matrix, one head, one layer of a stack),

        v = v_a * v_b / v_ab

    at every coordinate. It is exact where the average itself is a row times a column inside each
    block, and where one grid is the other's coarsening it is the finer one's mean; so `init`
    refuses `outer(per_head(12), per_neuron())` of a kernel, whose rows say nothing. Two arrays are
    kept, 15,104 numbers for a kernel of 4096 x 11008: `nu` is an
    [`OuterMoments`][optax_adam_mini.product.OuterMoments] of two trees like the parameters. A plain
    kernel is `outer(per_neuron(axis=0), per_neuron())`; with a row of its own for each head it is
    `outer(per_head(12, stacked=0), per_neuron())`, whose first grid cuts the inputs at each index
    and the outputs into heads.

    `optax.adafactor` keeps the same two averages (Shazeer and Stern, [Adafactor: Adaptive Learning
    Rates with Sublinear Memory Cost](https://arxiv.org/abs/1804.04235), section 3) of the two
    longest axes of every large enough parameter, whatever these are. Here the axes are said, the
    blocks may be smaller than the parameter, and everything else is Adam's: `mu`, the bias
    corrections, a constant `b2`, `eps` beside the root; no clipping of the update, and no step size
    in proportion to the parameter.

    Args:
        a: the first grid.
        b: the second.
        stacked: axes along which layers are stacked: a block at each of its indices, in both.

    Returns:
        A spec, as [`per_neuron`][] and the others give; `fused` takes no such part: say
        `outer(fused(...), per_neuron())`.

    Raises:
        TypeError: if `a` or `b` is no `BlockSpec`.
        ValueError: if a stacked axis is cut by `a` or `b` already.

    Examples:
        >>> kernel = outer(per_neuron(axis=0), per_neuron())
        >>> kernel.grid((4096, 11008))
        OuterMoments(a=(4096, 1), b=(1, 11008))
        >>> outer(per_head(12, stacked=0), per_neuron()).grid((768, 768))
        OuterMoments(a=(768, 12), b=(1, 768))
        >>> params = {"kernel": jnp.ones((4, 6))}
        >>> state = adam_mini(1e-3, block_specs=kernel).init(params)
        >>> jax.tree.map(jnp.shape, state[0].nu)
        OuterMoments(a={'kernel': (4, 1)}, b={'kernel': (1, 6)})
    """
    spec = Outer(a, b)
    return dataclasses.replace(spec, a=stacked_along(a, stacked), b=stacked_along(b, stacked))


@functools.cache
def _common(a: Runs, b: Runs) -> Runs:
    """The cuts of one axis that are in both."""
    ends = np.intersect1d(_ends(a), _ends(b))
    return _as_runs(np.diff(ends, prepend=0))


@functools.cache
def _along(fine: Runs, coarse: Runs) -> Runs:
    """The same cuts as `coarse`, counted in blocks of `fine`."""
    last = np.searchsorted(_ends(fine), _ends(coarse))
    return _as_runs(np.diff(last + 1, prepend=0))


def _counts(fine: Sequence[Runs], coarse: Sequence[Runs]) -> tuple[Runs, ...]:
    return tuple(_along(*runs) for runs in zip(fine, coarse, strict=True))


def _grid(axes: Sequence[Runs]) -> tuple[int, ...]:
    return tuple(sum(n for n, _ in runs) for runs in axes)


def _ends(runs: Runs) -> np.ndarray:
    return np.cumsum(np.repeat([size for _, size in runs], [n for n, _ in runs]), dtype=np.int64)


def _as_runs(sizes: np.ndarray) -> Runs:
    return tuple((len(list(run)), size) for size, run in itertools.groupby(sizes.tolist()))


def _coarser_mean(nu: Array, fine: Sequence[Runs], coarse: Sequence[Runs]) -> Array:
    """The mean over the blocks of a coarser grid, from the means over a finer one's."""
    sizes, counts = sums.block_sizes(fine), _counts(fine, coarse)
    if isinstance(sizes, float):
        return sums.block_mean(nu, counts)
    return sums.block_mean(nu * sizes, counts) / sums.block_mean(jnp.asarray(sizes), counts)


def of_parameters(nu: Any) -> list[Any]:
    """What the `nu` of a state holds of each parameter: one array, or two.

    Args:
        nu: a tree like the parameters, or two of them.
    """
    if not isinstance(nu, OuterMoments):
        return jax.tree.leaves(nu)
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    pairs = zip(leaves(nu.a), leaves(nu.b), strict=True)
    return [x if y is None else OuterMoments(x, y) for x, y in pairs if x is not None]


def in_trees(moments: Sequence[Any], params: Any) -> Any:
    """The `nu` of a state.

    Each of an `outer`'s arrays is in a tree of its own, since what holds an optimizer's state may
    take one array for each parameter: a variable of NNX does.
    """
    treedef = jax.tree.structure(params)
    is_pair = lambda x: isinstance(x, OuterMoments)
    in_tree = lambda leaves: with_kept_names(jax.tree.unflatten(treedef, leaves), params)
    if not any(map(is_pair, moments)):
        return in_tree(moments)
    return OuterMoments(
        a=in_tree([x.a if is_pair(x) else x for x in moments]),
        b=in_tree([x.b if is_pair(x) else None for x in moments]),
    )


def like_state(nu: Any, moments: Sequence[Any]) -> Any:
    """New moments in the trees, and boxes, of a state's `nu`."""
    is_pair = lambda x: isinstance(x, OuterMoments)
    if not isinstance(nu, OuterMoments):
        return jax.tree.unflatten(jax.tree.structure(nu), moments)
    a = [x.a if is_pair(x) else x for x in moments]
    b = [x.b for x in moments if is_pair(x)]
    return OuterMoments(*(jax.tree.unflatten(jax.tree.structure(t), x) for t, x in zip(nu, (a, b))))
