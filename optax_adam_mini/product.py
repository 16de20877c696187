"""`outer`: a spec of two grids, with a row and a column in each block.

A `BlockSpec` stores one number per block. `outer` stores the means over two grids, and `v` is their
product over a common mean. This suits a matrix whose `v` also differs along its inputs, and costs
one more number per input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini import sums
from optax_adam_mini.blocks import BlockSpec, stacked_along
from optax_adam_mini.boxes import with_kept_names
from optax_adam_mini.sums import Factor, Runs

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact


class OuterMoments(NamedTuple):
    """`nu` of a state in which an `outer` cuts some parameter.

    Attributes:
        a: a tree like the parameters, with one number per block of the first
            (or only) grid.
        b: a tree like the parameters, with one number per block of the second
            grid. A parameter with only one grid has an unused array of one
            number here.
    """

    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Outer:
    """A spec of two grids, made by `outer`.

    Like a `BlockSpec`, it is static, hashable, comparable, and a leaf of a
    pytree of specs.

    Attributes:
        a: the first grid.
        b: the second grid.
        note: a remark for tables; comparisons ignore it.
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
        """The cuts that both grids share: each block of these has a row and a column.

        Args:
            shape: the parameter's shape.

        Returns:
            For every axis, its runs of equal blocks, as `BlockSpec.runs` gives
            them.

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
            ValueError: as `Outer.runs`.

        Examples:
            >>> outer(per_neuron(axis=0), per_neuron()).grid((4096, 11008))
            OuterMoments(a=(4096, 1), b=(1, 11008))
        """
        return OuterMoments(self.a.grid(shape), self.b.grid(shape))

    def check(self, shape: Sequence[int]) -> None:
        """Refuses a shape that the grids do not fit, or for which one grid is useless.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as `Outer.runs`; also if all blocks of one grid lie
                inside those of the other, except for vectors, where they
                always do, and except along axes of size 1.

        Examples:
            >>> outer(per_head(4, stacked=0), per_neuron()).check((64, 64))
        """
        (a, b), both = self.grid(shape), _grid(self.runs(shape))
        longer = [any(size > 1 for _, size in runs) for runs in self.runs(shape)]
        is_vector = (sum(longer) == 1 and a != b) or sum(size > 1 for size in shape) < 2
        if is_vector or both not in (a, b):  # blocks with less than two axes are vectors
            return
        # A kernel with one output has one column; the same spec makes sense for more outputs.
        longer_shape = tuple(max(size, 2) for size in shape)
        if longer_shape != tuple(shape):
            with contextlib.suppress(ValueError):
                return self.check(longer_shape)
        inner, other = ("b", "a") if both == a else ("a", "b")
        raise ValueError(
            f"{self}: the blocks of {inner} lie inside those of {other} on the shape "
            f"{tuple(shape)}, so that v would be the mean over those of {inner} alone: let {other} "
            "cut other axes too, as in outer(per_head(4, stacked=0), per_neuron()), or give "
            f"{inner} without outer"
        )

    def size(self, shape: Sequence[int]) -> int:
        """The number of entries in `nu`.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as `Outer.runs`.

        Examples:
            >>> outer(per_neuron(axis=0), per_neuron()).size((4096, 11008))
            15104
        """
        return self.a.size(shape) + self.b.size(shape)

    def block_mean(
        self, x: Inexact[Array, "*shape"], of: Callable[[Array], Array] | None = None
    ) -> tuple[Array, Array]:
        """The means over the blocks of both grids, of `x` or of a function of it.

        Args:
            x: an array of the parameter's shape, of any inexact dtype.
            of: an elementwise function of `x` to average; its values are not
                stored.

        Returns:
            Two arrays of the shapes in `self.grid(x.shape)`, float32 or wider.

        Raises:
            ValueError: as `Outer.runs`.

        Examples:
            >>> outer(per_neuron(axis=0), per_neuron()).block_mean(jnp.array([[1.0, 3.0]]))
            (Array([[2.]], dtype=float32), Array([[1., 3.]], dtype=float32))
        """
        a, b = self.a.runs(x.shape), self.b.runs(x.shape)

        def means(x: Array, again: Array) -> tuple[Array, Array]:
            return sums.block_mean(x, a, of), sums.block_mean(again, b, of)

        # A TPU computes both sums in one reading. XLA's CPU compiler needs a loop per result, and
        # would store what both sums share, an array of x's size: the barrier prevents that.
        return jax.lax.platform_dependent(
            x,
            cpu=lambda x: means(x, jax.lax.optimization_barrier(x)),
            default=lambda x: means(x, x),
        )

    def spread(
        self,
        nu: tuple[Array, Array],
        shape: Sequence[int],
        of: Callable[[Array], Array] | None = None,
    ) -> Inexact[Array, "*shape"]:
        """The product `v = v_a v_b / v_ab` at every coordinate, or a function of it.

        Args:
            nu: two arrays of the shapes in `self.grid(shape)`, without
                negative numbers.
            shape: the parameter's shape.
            of: an elementwise function to apply to the product.

        Returns:
            An array of `shape` and of `nu`'s dtype. It is an expression of
            small arrays, which fuses with its consumer.

        Raises:
            ValueError: if `nu` does not have the shapes of the grids, and as
                `Outer.runs`.

        Examples:
            >>> spec = outer(per_neuron(axis=0), per_neuron())
            >>> spec.spread(spec.block_mean(jnp.array([[1.0, 2.0], [3.0, 6.0]])), (2, 2))
            Array([[1., 2.],
                   [3., 6.]], dtype=float32)
        """
        if (shapes := jax.tree.map(jnp.shape, nu)) != self.grid(shape):
            raise ValueError(
                f"{self} cuts the shape {tuple(shape)} into the grids {self.grid(shape)}, "
                f"but got {shapes}"
            )
        return sums.spread_product(self.factors(nu, shape), shape, of)

    def factors(self, nu: tuple[Array, Array], shape: Sequence[int]) -> list[Factor]:
        """The factors of `v`: `v_a` and `v_b / v_ab`.

        This ratio is between 0 and the number of columns; the product `v_a *
        v_b` of small numbers would underflow.

        Args:
            nu: two arrays of the shapes in `self.grid(shape)`.
            shape: the parameter's shape.
        """
        a, b, both = self.a.runs(shape), self.b.runs(shape), self.runs(shape)
        tiny = float(jnp.finfo(nu[0].dtype).tiny)
        # The mean ignores rows that have overflowed or are NaN, so that only such a row and its
        # column are lost. Every factor is above 0: infinity times it is infinity, so that after an
        # overflow the step is 0, and not NaN.
        v_ab = jnp.maximum(_mean_of_finite(nu[0], a, both), tiny)
        # Without the barrier, XLA would multiply by the inverse instead of dividing, and numbers
        # near float32's largest have the inverse 0.
        v_ab = jax.lax.optimization_barrier(sums.spread(v_ab, _counts(b, both), nu[1].shape))
        ratio = _ratio(nu[1], v_ab)
        return [Factor(jnp.maximum(nu[0], tiny), a), Factor(jnp.maximum(ratio, tiny), b)]

    def __repr__(self) -> str:
        """The call that makes an equal spec."""
        return f"outer({self.a!r}, {self.b!r})"

    def __str__(self) -> str:
        return f"outer({self.a}, {self.b})"


Spec = BlockSpec | Outer
"""How `v` of a parameter is stored: one number per block, or a row and a column in each."""


def outer(a: BlockSpec, b: BlockSpec, *, stacked: int | Sequence[int] = ()) -> Outer:
    """A row and a column: `v` is the product of the means over two grids.

    For a kernel use `outer(per_neuron(axis=0), per_neuron())`: one number for
    each input and one for each output, 15,104 numbers for a kernel of 4096 x
    11008. For a separate row in each head use `outer(per_head(12, stacked=0),
    per_neuron())`. At every coordinate

        v = v_a * v_b / v_ab

    where `v_a` and `v_b` are the means of Adam's `v` over the blocks of the
    two grids, and `v_ab` is the mean over the blocks that both grids have in
    common (the matrix, a head, a layer of a stack). This is exact if Adam's
    `v` is a row times a column inside each of those. If every block of one
    grid lies inside a block of the other, `v` is just the finer mean, so
    `init` refuses `outer(per_head(12), per_neuron())` for a kernel.

    The state's `nu` is then an `OuterMoments` of two trees like the
    parameters.

    `optax.adafactor` stores the same two means (Shazeer and Stern, [Adafactor:
    Adaptive Learning Rates with Sublinear Memory
    Cost](https://arxiv.org/abs/1804.04235), section 3), always for the two
    longest axes of a parameter. Here you choose the axes, and the blocks may
    be smaller than the parameter. Everything else is Adam's: `mu`, the bias
    corrections, a constant `b2`, `eps` beside the root, no clipping of the
    update, and no step size in proportion to the parameter.

    Args:
        a: the first grid.
        b: the second grid.
        stacked: axes along which layers are stacked; each layer has its own
            blocks in both grids.

    Returns:
        A spec. It cannot be a part of `fused`; use `outer(fused(...),
        per_neuron())` instead.

    Raises:
        TypeError: if `a` or `b` is not a `BlockSpec`.
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


@jax.custom_jvp
def _ratio(x: Array, y: Array) -> Array:
    """`x / y`, with a derivative that does not overflow if `y**-2` does."""
    return x / y


@_ratio.defjvp
def _ratio_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    ratio = _ratio(x, y)
    return ratio, (dx - ratio * dy) / y


@functools.cache
def _common(a: Runs, b: Runs) -> Runs:
    """The cuts of one axis that both share."""
    if a == b or _is_whole(a) or _is_each(b):
        return a
    if _is_whole(b) or _is_each(a):
        return b
    ends = np.intersect1d(_ends(a), _ends(b))
    return _as_runs(np.diff(ends, prepend=0))


@functools.cache
def _along(fine: Runs, coarse: Runs) -> Runs:
    """The cuts of `coarse`, counted in blocks of `fine`."""
    blocks = sum(n for n, _ in fine)
    if _is_each(fine):
        return coarse
    if fine == coarse or _is_whole(coarse):
        return ((1, blocks),) if _is_whole(coarse) else ((blocks, 1),)
    last = np.searchsorted(_ends(fine), _ends(coarse))
    return _as_runs(np.diff(last + 1, prepend=0))


def _is_whole(runs: Runs) -> bool:
    return len(runs) == 1 and runs[0][0] == 1


def _is_each(runs: Runs) -> bool:
    return all(size == 1 for _, size in runs)


def _counts(fine: Sequence[Runs], coarse: Sequence[Runs]) -> tuple[Runs, ...]:
    return tuple(_along(*runs) for runs in zip(fine, coarse, strict=True))


def _grid(axes: Sequence[Runs]) -> tuple[int, ...]:
    return tuple(sum(n for n, _ in runs) for runs in axes)


def _ends(runs: Runs) -> np.ndarray:
    return np.cumsum(np.repeat([size for _, size in runs], [n for n, _ in runs]), dtype=np.int64)


def _as_runs(sizes: np.ndarray) -> Runs:
    return tuple((len(list(run)), size) for size, run in itertools.groupby(sizes.tolist()))


def _mean_of_finite(nu: Array, fine: Sequence[Runs], coarse: Sequence[Runs]) -> Array:
    """The mean over the blocks of a coarse grid, from the finite means over a finer grid."""
    sizes, counts = sums.block_sizes(fine), _counts(fine, coarse)
    weights: Any = 1.0 if isinstance(sizes, float) else sizes / np.max(sizes, initial=1)
    finite = jnp.isfinite(nu)
    total = lambda x: sums.block_mean(jnp.where(finite, x, 0.0), counts)
    weight = total(jnp.asarray(weights, nu.dtype))
    return total(nu * np.asarray(weights, nu.dtype)) / jnp.maximum(weight, jnp.finfo(nu.dtype).tiny)


def unpack_nu(nu: Any, specs: Sequence[Spec]) -> list[Any]:
    """The arrays of each parameter in the `nu` of a state: one array, or two.

    Args:
        nu: a tree like the parameters, or an `OuterMoments` of two.
        specs: the parameters' specs.
    """
    if not isinstance(nu, OuterMoments):
        return jax.tree.leaves(nu)
    pairs = zip(jax.tree.leaves(nu.a), jax.tree.leaves(nu.b), specs, strict=True)
    # A second array that is used says that the state was made with an `outer` there.
    is_used = lambda b, spec: isinstance(spec, Outer) or jnp.size(b) != 1
    return [(a, b) if is_used(b, spec) else a for a, b, spec in pairs]


def pack_nu(moments: Sequence[Any], params: Any, is_outer: bool) -> Any:
    """The `nu` of a state, in the parameters' boxes.

    The two arrays of an `outer` are in separate trees, because some containers of an optimizer
    state, such as NNX's variables, take only one array per parameter.

    Args:
        moments: one array, or two, for each parameter.
        params: the parameters.
        is_outer: whether to make two trees, even if no parameter here needs them.
    """
    in_tree = lambda leaves: with_kept_names(
        jax.tree.unflatten(jax.tree.structure(params), leaves), params
    )
    if not is_outer:
        return in_tree(moments)
    one = lambda x: jnp.zeros_like(x, shape=(1,) * x.ndim)
    pairs = [x if isinstance(x, tuple) else (x, one(x)) for x in moments]
    return OuterMoments(in_tree([a for a, _ in pairs]), in_tree([b for _, b in pairs]))


def repack_nu(nu: Any, moments: Sequence[Any]) -> Any:
    """New moments in the trees and boxes of a state's `nu`."""
    if not isinstance(nu, OuterMoments):
        return jax.tree.unflatten(jax.tree.structure(nu), moments)
    old = jax.tree.leaves(nu.b)
    pairs = [x if isinstance(x, tuple) else (x, b) for x, b in zip(moments, old, strict=True)]
    in_tree = lambda tree, leaves: jax.tree.unflatten(jax.tree.structure(tree), leaves)
    return OuterMoments(in_tree(nu.a, [a for a, _ in pairs]), in_tree(nu.b, [b for _, b in pairs]))
