"""Block specs: where a parameter is cut into blocks.

A `BlockSpec` cuts an array into a rectilinear grid: along every axis it says where the cuts
are. `nu` (the `v` of the paper) of that parameter has the parameter's rank, and its shape is the
number of blocks along each axis.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optax_adam_mini import sums
from optax_adam_mini.sums import Factor, Runs

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact

Cut = Any  # int | None | tuple[tuple[int, BlockSpec], ...]; a recursive alias pyright cannot see
"""How one axis is cut: `n` equal blocks (1: not cut), `None` (a block at each index), or parts
`((size, spec), ...)` side by side, each cut by its own spec."""


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Cuts a parameter into a rectilinear grid of blocks.

    A spec is static, hashable, comparable, and a leaf of a pytree of specs.
    Build one with `per_tensor`, `per_element`, `per_neuron`, `per_head`,
    `per_token` or `fused`.

    Attributes:
        cuts: pairs `(axis, cut)`; a negative axis counts from the last one. A
            cut is the number of equal blocks, `None` for a block at each
            index, or parts `((size, spec), ...)`.
        rest: the cut of every axis that `cuts` does not name: 1 (not cut) or
            `None` (each index).
        unit: what one block is called in tables; comparisons ignore it.
        note: a remark in tables, such as where the spec is from; comparisons
            ignore it.

    Examples:
        >>> spec = per_head(12)
        >>> spec.grid((768, 768))
        (1, 12)
        >>> spec == BlockSpec(cuts=((-1, 12),))
        True
    """

    cuts: tuple[tuple[int, Cut], ...] = ()
    rest: int | None = 1
    unit: str = dataclasses.field(default="block", compare=False)
    note: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        is_pair = lambda pair: isinstance(pair, tuple) and len(pair) == 2
        if not (isinstance(self.cuts, tuple) and all(map(is_pair, self.cuts))):
            raise TypeError(f"cuts must be a tuple of pairs (axis, cut), got {self.cuts!r}")
        for axis, cut in self.cuts:
            _check_int("axis", axis)
            if isinstance(cut, tuple):
                for part in cut:
                    if not (is_pair(part) and isinstance(part[1], BlockSpec)):
                        raise TypeError(f"each part of a cut is a pair (size, spec), got {part!r}")
                    _check_int("the size of a part", part[0], minimum=0)
            elif cut is not None:
                _check_int("the number of blocks", cut, minimum=1)
        if self.rest is not None:
            _check_int("rest", self.rest, minimum=1)
        axes = [axis for axis, _ in self.cuts]
        if len(set(axes)) < len(axes):
            raise ValueError(f"a block spec names each axis once, got axes {axes}")
        # NumPy's integers would show in `repr`.
        plain = lambda x: int(x) if isinstance(x, np.integer) else x
        object.__setattr__(self, "cuts", jax.tree.map(plain, self.cuts))

    def runs(self, shape: Sequence[int]) -> tuple[Runs, ...]:
        """The cuts along every axis of an array of `shape`.

        Args:
            shape: the parameter's shape.

        Returns:
            For every axis, its runs of equal blocks `((number of blocks, size
            of each), ...)`. An axis of size 0 has no blocks.

        Raises:
            ValueError: if an axis is out of range or named twice, if blocks do
                not divide an axis, or if the sizes of parts do not add up to
                it.

        Examples:
            >>> per_head(12).runs((768, 768))
            (((1, 768),), ((12, 64),))
        """
        shape = tuple(shape)
        cuts: list[Cut] = [self.rest] * len(shape)
        named: dict[int, int] = {}
        for axis, cut in self.cuts:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"{self} cuts axis {axis}, but the shape {shape} has rank {len(shape)}: "
                    f"expected an axis from {-len(shape)} to {len(shape) - 1}"
                    if shape
                    else f"{self} cuts axis {axis}, but a scalar has no axes: use per_tensor()"
                )
            if axis % len(shape) in named:
                raise ValueError(
                    f"{self} names axis {axis % len(shape)} of the shape {shape} twice, as "
                    f"{named[axis % len(shape)]} and {axis}: name each axis once"
                )
            named[axis % len(shape)] = axis
            cuts[axis] = cut
        return tuple(
            _axis_runs(cut, size, named.get(axis, axis), shape)
            for axis, (cut, size) in enumerate(zip(cuts, shape, strict=True))
        )

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The number of blocks along each axis of an array of `shape`: the shape of `nu`.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as `BlockSpec.runs`.

        Examples:
            >>> fused(-1, [(768, per_head(12)), (768, per_head(12)), (768, per_neuron())]).grid(
            ...     (768, 2304)
            ... )
            (1, 792)
        """
        return tuple(sum(n for n, _ in runs) for runs in self.runs(shape))

    def check(self, shape: Sequence[int]) -> None:
        """Refuses a shape that the spec does not fit.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as `BlockSpec.runs`.
        """
        self.grid(shape)

    def size(self, shape: Sequence[int]) -> int:
        """How many numbers `nu` has.

        Args:
            shape: the parameter's shape.

        Raises:
            ValueError: as `BlockSpec.runs`.

        Examples:
            >>> per_head(12).size((768, 768))
            12
        """
        return math.prod(self.grid(shape))

    def cut_along(self, axis: int) -> Cut:
        """The cut of `axis`, spelt as in `cuts`."""
        return dict(self.cuts).get(axis, self.rest)

    def factors(self, nu: Inexact[Array, "*grid"], shape: Sequence[int]) -> list[Factor]:
        """The factors of `v`, as `Outer.factors`: here `nu` alone."""
        return [Factor(nu, self.runs(shape))]

    def block_mean(
        self, x: Inexact[Array, "*shape"], of: Callable[[Array], Array] | None = None
    ) -> Inexact[Array, "*grid"]:
        """The mean of `x`, or of a function of each number, over each block, in float32 or wider.

        Uncut axes are summed first, so that what is grouped into blocks is
        small.

        Args:
            x: an array of the parameter's shape, of any inexact dtype; narrow
                floats are widened to float32 before anything else.
            of: an elementwise function whose values are averaged; they are not
                kept.

        Returns:
            An array of shape `self.grid(x.shape)`.

        Raises:
            ValueError: as `BlockSpec.runs`.

        Examples:
            >>> per_neuron().block_mean(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
            Array([[2., 4.]], dtype=float32)
        """
        return sums.block_mean(x, self.runs(x.shape), of)

    def spread(
        self,
        nu: Inexact[Array, "*grid"],
        shape: Sequence[int],
        of: Callable[[Array], Array] | None = None,
    ) -> Inexact[Array, "*shape"]:
        """The array of `shape` that holds, at every coordinate, its block's entry of `nu`.

        Args:
            nu: one number per block, of shape `self.grid(shape)`.
            shape: the parameter's shape.
            of: an elementwise function, taken of each entry, once for the
                block.

        Returns:
            An array of `shape` and of `nu`'s dtype. Only as much of it as has
            a block of its own is built; the rest is a broadcast, which fuses
            with what reads it.

        Raises:
            ValueError: if `nu` has not the grid's shape, and as
                `BlockSpec.runs`.

        Examples:
            >>> per_head(2).spread(jnp.array([[1.0, 2.0]]), (1, 4))
            Array([[1., 1., 2., 2.]], dtype=float32)
        """
        if nu.shape != self.grid(shape):
            raise ValueError(
                f"{self} cuts the shape {tuple(shape)} into the grid {self.grid(shape)}, but got "
                f"an array of shape {nu.shape}"
            )
        return sums.spread_product(self.factors(nu, shape), shape, of)

    def __repr__(self) -> str:
        """An expression that gives an equal spec; `unit` and `note` may differ."""
        numbers = [axis for axis, cut in self.cuts if cut is None]
        if self.cuts and isinstance(self.cuts[0][1], int):
            (axis, heads), *each = self.cuts
            if self.rest == 1 and heads > 1 and len(numbers) == len(each):
                where = f", axis={axis}" if axis != -1 else ""
                return f"per_head({heads}{where}{_said('stacked', numbers)})"
        if self.cuts and isinstance(self.cuts[0][1], tuple):
            (axis, parts), *each = self.cuts
            others = [pair for pair in parts[0][1].cuts if pair[0] != axis]
            stacked = each[len(others) :]
            is_fused = each[: len(others)] == others and all(cut is None for _, cut in stacked)
            if is_fused and parts[0][1].rest == self.rest:
                stacks = _said("stacked", [a for a, _ in stacked])
                return f"fused({axis}, {list(parts)!r}{stacks})"
        if not self.cuts and self.rest is None:
            return "per_element()"
        if self.rest == 1 and len(numbers) == len(self.cuts):
            name = {"token": "per_token", "tensor": "per_tensor"}.get(self.unit, "per_neuron")
            name = name if numbers else "per_tensor"
            argument = "stacked" if name == "per_tensor" else "axis"
            return f"{name}({_said(argument, numbers)[2:]})"
        return f"BlockSpec(cuts={self.cuts!r}, rest={self.rest!r}, unit={self.unit!r})"

    def __str__(self) -> str:
        def word(cut: Cut) -> str:
            if isinstance(cut, tuple):
                return "[" + " | ".join(f"{size}: {spec}" for size, spec in cut) + "]"
            return "each" if cut is None else str(cut)

        named = [f"axis {axis}: {word(cut)}" for axis, cut in self.cuts]
        rest = [f"other axes: {word(self.rest)}"] if self.rest != 1 else []
        return f"BlockSpec({', '.join(named + rest) or 'not cut'})"


def per_tensor(*, stacked: int | Sequence[int] = ()) -> BlockSpec:
    """One block for the whole tensor (norm gains; scalars).

    Args:
        stacked: axes along which layers are stacked (for `scan`); each layer
            has its own blocks.

    Examples:
        >>> per_tensor().grid((768,)), per_tensor(stacked=0).grid((32, 768))
        ((1,), (32, 1))
    """
    return BlockSpec(_each((), stacked), unit="tensor")


def per_element() -> BlockSpec:
    """One block for each coordinate: the Adam of that parameter (biases).

    Examples:
        >>> per_element().grid((768,))
        (768,)
    """
    return BlockSpec(rest=None, unit="element")


def per_neuron(axis: int | Sequence[int] = -1, *, stacked: int | Sequence[int] = ()) -> BlockSpec:
    """One block for each output neuron (dense and value kernels; channels of convolutions).

    Args:
        axis: the output axis, or axes; every index is a block. The default is
            the last axis, because JAX's kernels are `(inputs, outputs)`.
        stacked: axes along which layers are stacked; each layer has its own
            blocks.

    Examples:
        >>> per_neuron().grid((768, 3072)), per_neuron(axis=(-2, -1)).grid((768, 12, 64))
        ((1, 3072), (1, 12, 64))
    """
    return BlockSpec(_each(axis, stacked), unit="neuron")


def per_token(axis: int | Sequence[int] = 0, *, stacked: int | Sequence[int] = ()) -> BlockSpec:
    """One block for each token (embeddings and output heads).

    Args:
        axis: the axis of the vocabulary: 0 in Flax's `Embed`; -1 in an output
            `Dense`.
        stacked: axes along which layers are stacked; each layer has its own
            blocks.

    Examples:
        >>> per_token().grid((50257, 768))
        (50257, 1)
    """
    return BlockSpec(_each(axis, stacked), unit="token")


def per_head(num_heads: int, axis: int = -1, *, stacked: int | Sequence[int] = ()) -> BlockSpec:
    """One block for each attention head (query and key kernels).

    Args:
        num_heads: the number of heads along `axis`, side by side and of equal
            size.
        axis: the axis the heads lie along: -1 in a kernel `(inputs, num_heads
            * head_dim)`, -2 in `(inputs, num_heads, head_dim)`.
        stacked: axes along which layers are stacked; each layer has its own
            blocks.

    Raises:
        TypeError, ValueError: if `num_heads` is not a positive integer.

    Examples:
        >>> per_head(12).grid((768, 768)), per_head(12, axis=-2).grid((768, 12, 64))
        ((1, 12), (1, 12, 1))
    """
    _check_int("num_heads", num_heads, minimum=1)
    return BlockSpec(((axis, num_heads), *_each((), stacked)), unit="head")


def fused(
    axis: int, parts: Sequence[tuple[int, BlockSpec]], *, stacked: int | Sequence[int] = ()
) -> BlockSpec:
    """Several tensors side by side along one axis, each cut by its own spec (fused QKV).

    Args:
        axis: the axis along which the parts are joined.
        parts: `(size, spec)` of each part, in order. The specs must name the
            fused axis by the same number as `axis`, and must cut all other
            axes alike.
        stacked: axes along which layers are stacked; each layer has its own
            blocks.

    Raises:
        TypeError, ValueError: if a part is not a size and a spec, or the parts
            cut another axis differently.

    Examples:
        Query, key and value side by side, with 32 query heads and 4 key/value heads of 64:

        >>> qkv = fused(-1, [(2048, per_head(32)), (256, per_head(4)), (256, per_neuron())])
        >>> qkv.grid((2048, 2560))
        (1, 292)

        The same by head, `[q k v, q k v, ...]`, for 12 heads of 64:

        >>> fused(-1, [(64, per_tensor()), (64, per_tensor()), (64, per_neuron())] * 12).grid(
        ...     (768, 2304)
        ... )
        (1, 792)
    """
    _check_int("axis", axis)
    parts = tuple(parts)
    for part in parts:
        is_pair = isinstance(part, Sequence) and len(part) == 2
        if not (is_pair and isinstance(part[1], BlockSpec)):
            raise TypeError(f"each part of fused() is a pair (size, spec), got {part!r}")
    parts = tuple((size, spec) for size, spec in parts)
    if not parts:
        raise ValueError("fused() needs at least one part: a sequence of (size, spec)")
    others = [(tuple(c for c in spec.cuts if c[0] != axis), spec.rest) for _, spec in parts]
    for (cuts, rest), (_, spec) in zip(others, parts, strict=True):
        if (cuts, rest) != others[0]:
            raise ValueError(
                f"the parts of fused(axis={axis}) must cut every other axis alike, got "
                f"{parts[0][1]} and {spec}: name the fused axis as {axis} in each part's spec, "
                "and cut the other axes as finely as the finest part needs"
            )
    cuts, rest = others[0]
    return BlockSpec(((axis, parts), *cuts, *_each((), stacked)), rest=rest, unit="block")


def stacked_along(spec: BlockSpec, stacked: int | Sequence[int]) -> BlockSpec:
    """The same cuts in each of several layers, stacked along some axes.

    Raises:
        ValueError: if one of these axes is cut already.

    Examples:
        >>> stacked_along(per_neuron(), 0).grid((32, 768, 3072))
        (32, 1, 3072)
    """
    return dataclasses.replace(spec, cuts=(*spec.cuts, *_each((), stacked)))


def _each(axis: int | Sequence[int], stacked: int | Sequence[int]) -> tuple[tuple[int, None], ...]:
    axes = [tuple(a) if isinstance(a, Sequence) else (a,) for a in (axis, stacked)]
    return tuple((a, None) for a in itertools.chain(*axes))


def _said(name: str, axes: Sequence[int]) -> str:
    """An argument that names axes, as it is typed; nothing for none."""
    return f", {name}={axes[0] if len(axes) == 1 else tuple(axes)!r}" if axes else ""


def _check_int(name: str, value: Any, minimum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _axis_runs(cut: Cut, size: int, axis: int, shape: tuple[int, ...]) -> Runs:
    if isinstance(cut, tuple):
        sizes = [part for part, _ in cut]
        if sum(sizes) != size:
            raise ValueError(
                f"the parts along axis {axis} of the shape {shape} must add up to {size}, got "
                f"{' + '.join(map(str, sizes))} = {sum(sizes)}"
            )
        runs: list[tuple[int, int]] = []
        for part, spec in cut:
            inner = spec.cut_along(axis)
            for n, block in _axis_runs(inner, part, axis, (*shape[:axis], part, *shape[axis:][1:])):
                if runs and runs[-1][1] == block:
                    runs[-1] = (runs[-1][0] + n, block)
                else:
                    runs.append((n, block))
        return tuple(runs)
    if size == 0:
        return ()
    blocks = size if cut is None else cut
    if size % blocks:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        below = [d for d in divisors if d < blocks][-3:]
        above = [d for d in divisors if d > blocks][:3]
        raise ValueError(
            f"{blocks} blocks do not divide axis {axis} of the shape {shape}, of size {size}; "
            f"the nearest numbers that do are {', '.join(map(str, below + above))}"
        )
    return ((blocks, size // blocks),)
