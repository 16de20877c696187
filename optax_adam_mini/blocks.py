"""Block specs: how a parameter is cut into blocks, and sums over and broadcasts back from them.

A [`BlockSpec`][] cuts an array into a rectilinear grid: along every axis it says where the cuts
are. `nu` (the `v` of the paper) of that parameter has the parameter's rank, and its shape is the
number of blocks along each axis. This is the only module that knows about grids.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

if TYPE_CHECKING:
    from jaxtyping import Array, Inexact, Real

Cut = Any  # int | None | tuple[tuple[int, BlockSpec], ...]; a recursive alias pyright cannot see
"""How one axis is cut: `n` equal blocks (1: not cut), `None` (a block at each index), or parts
`((size, spec), ...)` side by side, each cut by its own spec."""

Runs = tuple[tuple[int, int], ...]
"""The cuts of one axis of a known size, in order: `(number of blocks, indices in each)`."""

T = TypeVar("T")

LabelFn = Callable[[Any], Any]
"""A label function: params (arrays or `jax.ShapeDtypeStruct`s) -> pytree of `BlockSpec`."""


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Cuts an array into a rectilinear grid of blocks.

    A spec is static, hashable, comparable, and a leaf of a pytree of specs. Build one with
    [`per_tensor`][], [`per_element`][], [`per_neuron`][], [`per_head`][], [`per_token`][] or
    [`fused`][].

    Attributes:
        cuts: pairs `(axis, cut)`; a negative axis counts from the last one. A cut is the number of
            equal blocks, `None` for a block at each index, or parts `((size, spec), ...)`.
        rest: the cut of every axis that `cuts` does not name: 1 (not cut) or `None` (each index).
        unit: what one block is called in tables; it takes no part in comparisons.
        note: a remark in tables, such as where the spec is from; nor does it.

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
        for axis, cut in self.cuts:
            _check_int("axis", axis)
            if isinstance(cut, tuple):
                for size, _ in cut:
                    _check_int("the size of a part", size, minimum=0)
            elif cut is not None:
                _check_int("the number of blocks", cut, minimum=1)
        axes = [axis for axis, _ in self.cuts]
        if len(set(axes)) < len(axes):
            raise ValueError(f"a block spec names each axis once, got axes {axes}")

    def runs(self, shape: Sequence[int]) -> tuple[Runs, ...]:
        """The cuts along every axis of an array of `shape`.

        Args:
            shape: the parameter's shape.

        Returns:
            For every axis, its runs of equal blocks `((number of blocks, size of each), ...)`. An
            axis of size 0 has no blocks.

        Raises:
            ValueError: if an axis is out of range or named twice, if blocks do not divide an axis,
                or if the sizes of parts do not add up to it.

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
            ValueError: as [`BlockSpec.runs`][].

        Examples:
            >>> fused(-1, [(768, per_head(12)), (768, per_head(12)), (768, per_neuron())]).grid(
            ...     (768, 2304)
            ... )
            (1, 792)
        """
        return tuple(sum(n for n, _ in runs) for runs in self.runs(shape))

    def cut_along(self, axis: int) -> Cut:
        """The cut of `axis`, spelt as in `cuts`."""
        return dict(self.cuts).get(axis, self.rest)

    def block_mean(
        self, x: Inexact[Array, "*shape"], of: Callable[[Array], Array] | None = None
    ) -> Inexact[Array, "*grid"]:
        """The mean of `x`, or of a function of each number, over each block, in float32 or wider.

        Uncut axes are summed first, so that what is grouped into blocks is small.

        Args:
            x: an array of the parameter's shape, of any inexact dtype; narrow floats are widened
                to float32 before anything else.
            of: an elementwise function whose values are averaged; they are not kept.

        Returns:
            An array of shape `self.grid(x.shape)`.

        Raises:
            ValueError: as [`BlockSpec.runs`][].

        Examples:
            >>> per_neuron().block_mean(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
            Array([[2., 4.]], dtype=float32)
        """
        axes = self.runs(x.shape)
        total = _sum_whole_axes(x, of or (lambda x: x), axes)
        for axis, runs in enumerate(axes):
            if not (_is_whole(runs) or _is_each(runs)):
                total = _sum_runs(total, axis, runs)
        return total / _block_sizes(axes)

    def spread(self, nu: Inexact[Array, "*grid"], shape: Sequence[int]) -> Inexact[Array, "*shape"]:
        """The array of `shape` that holds, at every coordinate, its block's entry of `nu`.

        Args:
            nu: one number per block, of shape `self.grid(shape)`.
            shape: the parameter's shape.

        Returns:
            An array of `shape` and of `nu`'s dtype. Only as much of it as has a block of its own is
            built; the rest is a broadcast, which fuses with what reads it.

        Raises:
            ValueError: if `nu` has not the grid's shape, and as [`BlockSpec.runs`][].

        Examples:
            >>> per_head(2).spread(jnp.array([[1.0, 2.0]]), (1, 4))
            Array([[1., 1., 2., 2.]], dtype=float32)
        """
        if nu.shape != self.grid(shape):
            raise ValueError(
                f"{self} cuts the shape {tuple(shape)} into the grid {self.grid(shape)}, but got "
                f"an array of shape {nu.shape}"
            )
        for axis, runs in enumerate(self.runs(shape)):
            if not (_is_whole(runs) or _is_each(runs)):
                nu = _repeat_runs(nu, axis, runs)
        # Otherwise XLA would move what made `nu` (a square root and a division for each block) past
        # the broadcast, and compute it once per coordinate.
        nu = jax.lax.optimization_barrier(nu)
        return jnp.broadcast_to(nu, tuple(shape))

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
        stacked: axes along which layers are stacked (for `scan`): a block at each of its indices.

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
        axis: the output axis, or axes; every index of it is a block. JAX's kernels are
            `(inputs, outputs)`, hence the last one.
        stacked: axes along which layers are stacked: a block at each of its indices.

    Examples:
        >>> per_neuron().grid((768, 3072)), per_neuron(axis=(-2, -1)).grid((768, 12, 64))
        ((1, 3072), (1, 12, 64))
    """
    return BlockSpec(_each(axis, stacked), unit="neuron")


def per_token(axis: int | Sequence[int] = 0, *, stacked: int | Sequence[int] = ()) -> BlockSpec:
    """One block for each token (embeddings and output heads).

    Args:
        axis: the axis of the vocabulary: 0 in Flax's `Embed`; -1 in an output `Dense`.
        stacked: axes along which layers are stacked: a block at each of its indices.

    Examples:
        >>> per_token().grid((50257, 768))
        (50257, 1)
    """
    return BlockSpec(_each(axis, stacked), unit="token")


def per_head(num_heads: int, axis: int = -1, *, stacked: int | Sequence[int] = ()) -> BlockSpec:
    """One block for each attention head (query and key kernels).

    Args:
        num_heads: the number of heads along `axis`, side by side and of equal size.
        axis: the axis the heads lie along: -1 in a kernel `(inputs, num_heads * head_dim)`, -2 in
            `(inputs, num_heads, head_dim)`.
        stacked: axes along which layers are stacked: a block at each of its indices.

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
        parts: `(size, spec)` of each part, in order. The specs cut `axis`, spelt as it is here;
            what they say of other axes must be the same for all, or the blocks are no grid.
        stacked: axes along which layers are stacked: a block at each of its indices.

    Raises:
        TypeError, ValueError: if a part is not a size and a spec, or the parts cut another axis
            differently.

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
    parts = tuple(tuple(part) for part in parts)  # pyright: ignore[reportAssignmentType]
    if not parts:
        raise ValueError("fused() needs at least one part: a sequence of (size, spec)")
    for part in parts:
        if len(part) != 2 or not isinstance(part[1], BlockSpec):
            raise TypeError(f"each part of fused() is a pair (size, spec), got {part!r}")
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


def resolve_block_specs(block_specs: Any, params: Any) -> list[tuple[str, BlockSpec]]:
    """The path and the spec of every leaf of `params`, checked against the leaf's shape.

    Args:
        block_specs: a pytree of specs with the structure of `params` or a prefix of it (so one spec
            may stand for all), or a label function that returns one.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s. Where it is empty (`None`,
            `optax.MaskedNode`), specs are not needed and not looked at.

    Returns:
        `(path, spec)` in the order of `jax.tree.leaves(params)`; a path reads `"a/b/c"`.

    Raises:
        TypeError: if a label is not a `BlockSpec`.
        ValueError: if a parameter has no spec, a spec no parameter, or a spec does not fit its
            parameter's shape. The message names every parameter concerned.

    Examples:
        >>> resolve_block_specs(per_tensor(), {"scale": jnp.ones(3)})
        [('scale', BlockSpec(cuts=(), rest=1, unit='tensor'))]
    """
    specs = spec_leaves(block_specs(params) if callable(block_specs) else block_specs)

    leaves: dict[tuple[str, ...], Any] = {}
    empty: list[tuple[str, ...]] = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_empty):
        if is_empty(leaf):
            empty.append(path_of(keys))
        else:
            leaves[path_of(keys)] = leaf

    found: list[tuple[str, BlockSpec]] = []
    used: set[tuple[str, ...]] = set()
    missing: list[str] = []
    wrong: list[str] = []
    for path, leaf in leaves.items():
        prefix = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in specs), None)
        if prefix is None:
            missing.append("/".join(path))
            continue
        used.add(prefix)
        try:
            specs[prefix].grid(jnp.shape(leaf))
        except ValueError as error:
            wrong.append(f"{'/'.join(path) or 'params'}: {error}")
        found.append(("/".join(path), specs[prefix]))
    unused = [
        "/".join(path)
        for path in specs
        if path not in used and not any(_overlap(path, other) for other in empty)
    ]
    if missing or unused:
        lacking = [f"no spec for {some(missing)}"] if missing else []
        surplus = [f"no parameter for the spec at {some(unused)}"] if unused else []
        raise ValueError(
            "block_specs must have the structure of the parameters, or be a prefix of it: "
            + "; ".join(lacking + surplus)
        )
    if wrong:
        raise ValueError(
            "\n".join(
                wrong[:_SHOWN] + [f"... and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
            )
        )
    return found


def spec_leaves(labels: Any) -> dict[tuple[str, ...], BlockSpec]:
    """The specs of a pytree of specs by their paths.

    Raises:
        TypeError: if a leaf is not a `BlockSpec`.
    """
    is_spec = lambda x: isinstance(x, BlockSpec)
    specs: dict[tuple[str, ...], BlockSpec] = {}
    for keys, spec in jax.tree_util.tree_leaves_with_path(labels, is_leaf=is_spec):
        if not is_spec(spec):
            raise TypeError(
                f"{path_str(keys) or 'block_specs'}: expected a BlockSpec such as per_neuron(), "
                f"got {spec!r} of type {type(spec).__name__}"
            )
        specs[path_of(keys)] = spec
    return specs


def is_empty(tree: Any) -> bool:
    """Whether a subtree holds no leaves: `None`, `optax.MaskedNode`, an empty container."""
    return not jax.tree.leaves(tree)


def path_of(keys: Sequence[Any]) -> tuple[str, ...]:
    """The names along a key path, without the `.value` of the box a Flax parameter may sit in."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    boxed = keys and keys[-1] == jax.tree_util.GetAttrKey("value")
    return names[:-1] if boxed else names


def path_str(keys: Sequence[Any]) -> str:
    """A key path as `"a/b/c"`."""
    return "/".join(path_of(keys))


def check_is_params(what: str, params: Any) -> None:
    """Refuses to label the count that `optax.inject_hyperparams` calls functions with.

    Raises:
        TypeError: if `params` is one integer.
    """
    if jax.tree_util.all_leaves([params]) and jnp.issubdtype(jnp.result_type(params), jnp.integer):
        raise TypeError(
            f"{what}: expected a pytree of parameters, got one integer. optax.inject_hyperparams "
            "takes a label function for a schedule: tell it not to, "
            'optax.inject_hyperparams(adam_mini, static_args=("block_specs",))'
        )


def check_used(what: str, matches: Callable[[str], Any], given: str, params: Any) -> None:
    """Refuses what the user named if it names no parameter.

    A part of a tree (`optax.masked` and `optax.multi_transform` give such) need not hold it.

    Args:
        what: what was given, to begin the message with.
        matches: whether a path `"a/b/c"` is meant.
        given: what paths are compared with, to list the closest.
        params: pytree of parameters.

    Raises:
        ValueError: if no path matches.
    """
    paths = [path_str(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not paths or has_masked(params) or any(map(matches, paths)):
        return
    closest = difflib.get_close_matches(given, paths, n=3, cutoff=0.0)
    raise ValueError(f"{what} matches no parameter; the closest paths are {', '.join(closest)}")


def has_masked(params: Any) -> bool:
    """Whether it is a part of a tree that `optax.masked` or `optax.multi_transform` took."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    return any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked)))


def check_default(what: str, default: Any) -> None:
    """Refuses a default of a label function that is neither a spec nor a label function.

    Raises:
        TypeError: if it is not, nor None.
    """
    if default is not None and not isinstance(default, BlockSpec) and not callable(default):
        raise TypeError(f"{what}: default must be a BlockSpec or a label function, got {default!r}")


def completed(
    what: str,
    params: Any,
    specs: Sequence[BlockSpec | None],
    default: BlockSpec | LabelFn | None,
    seen: Callable[[Any, Any], Any],
) -> Any:
    """A pytree of the specs of `params`, with the default's where they are None.

    Raises:
        ValueError: if there is no default where one is needed; the message has `seen(keys, leaf)`,
            what the rules of the label function `what` look at.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    unmatched = [pair for spec, pair in zip(specs, leaves, strict=True) if spec is None]
    if unmatched and default is None:
        shown = some([f"{path_str(keys)} {seen(keys, leaf)}" for keys, leaf in unmatched])
        raise ValueError(
            f"{what}: no rule matches {shown}: add a rule for it, or a default such as "
            "flax_layers() or per_element()"
        )
    rest = [
        leaf if spec is None else optax.MaskedNode()
        for spec, (_, leaf) in zip(specs, leaves, strict=True)
    ]
    defaults = iter(
        resolve_block_specs(default, jax.tree.unflatten(treedef, rest)) if unmatched else ()
    )
    return jax.tree.unflatten(
        treedef, [next(defaults)[1] if spec is None else spec for spec in specs]
    )


def compiled_rules(
    what: str, rules: Sequence[tuple[str, T]], types: tuple[type, ...] = (BlockSpec,)
) -> list[tuple[re.Pattern[str], T]]:
    """Rules over paths, their regular expressions compiled; they give a value of one of `types`.

    Raises:
        TypeError, ValueError: if a rule is not a valid regular expression and such a value.
    """
    compiled: list[tuple[re.Pattern[str], T]] = []
    for rule in rules:
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(f"each rule of {what} is a pair (pattern, spec), got {rule!r}")
        pattern, spec = rule
        if not isinstance(spec, types):
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
            example = " such as per_neuron()" if BlockSpec in types else ""
            raise TypeError(
                f"{what}: the rule {pattern!r} must give a {wanted}{example}, got "
                f"{spec!r} of type {type(spec).__name__}"
            )
        try:
            compiled.append((re.compile(pattern), spec))
        except re.error as error:
            raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}") from error
    return compiled


def widen(dtype: Any) -> np.dtype:
    """The dtype to compute in: float32, or `dtype` itself where it is wider or complex."""
    return jnp.promote_types(dtype, jnp.float32)


_SHOWN = 8  # paths named in one error


def some(paths: Sequence[str]) -> str:
    """The first few of `paths`, for an error message."""
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    n = min(len(a), len(b))
    return a[:n] == b[:n]


def _each(axis: int | Sequence[int], stacked: int | Sequence[int]) -> tuple[tuple[int, None], ...]:
    axes = [(a,) if isinstance(a, int) else tuple(a) for a in (axis, stacked)]
    return tuple((a, None) for a in itertools.chain(*axes))


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


def _is_whole(runs: Runs) -> bool:
    return len(runs) == 1 and runs[0][0] == 1


def _is_each(runs: Runs) -> bool:
    return all(block == 1 for _, block in runs)


def _sum_whole_axes(
    x: Inexact[Array, "*shape"], of: Callable[[Array], Array], axes: Sequence[Runs]
) -> Inexact[Array, "*grouped"]:
    """Sums `of(x)` over every axis that is not cut.

    One reduction, which two traits of XLA's CPU backend make slow (2 cores, reading at 30 GB/s):

    - Over an axis before long rows it sums at a fraction of the memory's bandwidth: 28 GB/s for
      rows of 3072, 4.6 for 11008, 0.7 for 50257; in two stages, as a dot or unrolled it is no
      faster, or keeps a copy. Long rows are added in a loop, eight at a time: 22 to 33 GB/s.
    - What is read twice, by this sum and by what follows, it widens once for both, into memory:
      the update in bfloat16 takes 1.1 times AdamW's time with such a copy, and 0.4 to 0.5 without.
      Barriers keep this sum's reading apart.
    """
    whole = tuple(a for a, runs in enumerate(axes) if _is_whole(runs))

    def plain(x: Array) -> Array:
        return jnp.sum(of(x.astype(widen(x.dtype))), axis=whole, keepdims=True)

    def apart(x: Array) -> Array:
        return plain(jax.lax.optimization_barrier(x))

    def looped(x: Array) -> Array:
        # Over the inner of the two axes that the axis becomes: GSPMD may have sharded the outer.
        rows = x.reshape(*x.shape[:axis], -1, steps, *x.shape[axis + 1 :])

        def at(i: Any) -> Array:
            here, i = jax.lax.optimization_barrier((rows, i))  # or it is widened before the loop
            row = jax.lax.dynamic_index_in_dim(here, i, axis + 1, keepdims=False)
            return of(row.astype(widen(row.dtype)))

        add = lambda i, total: total + at(i)
        total = jax.lax.fori_loop(0, steps, add, jnp.zeros_like(at(0)), unroll=8)
        return jnp.sum(total, axis=whole, keepdims=True)

    axis = max(whole, default=-1)
    few = 512 // x.dtype.itemsize  # that many times smaller than x the running sums are below 1%
    if (
        axis >= 0
        and math.prod(x.shape[axis + 1 :]) >= 4096
        and not jax.typeof(x).sharding.spec[axis]
    ):
        steps = next((n for n in range(few, x.shape[axis] + 1) if x.shape[axis] % n == 0), 0)
        if steps and x.shape[axis] // steps % jax.device_count() == 0:
            return jax.lax.platform_dependent(x, cpu=looped, default=plain)
    if widen(x.dtype) != x.dtype:
        return jax.lax.platform_dependent(x, cpu=apart, default=plain)
    return plain(x)


def period(items: Sequence[T]) -> tuple[int, Sequence[T]]:
    """How often the shortest unit of a sequence stands side by side in it, and that unit.

    Examples:
        >>> period("qkvqkv")
        (2, 'qkv')
    """
    for length in range(1, len(items) + 1):
        if len(items) % length == 0 and items[length:] == items[:-length]:
            return len(items) // length, items[:length]
    return 1, items


def _not_sharded_along(x: Array, axis: int) -> Array:
    """Under explicit sharding an axis that is sharded cannot be split by a reshape.

    What comes here is small: sums of whole axes, or one number for each block.
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


def _block_sizes(axes: Sequence[Runs]) -> float | np.ndarray:
    """The coordinates in each block: one number, or an array that broadcasts to the grid."""
    if all(len(runs) == 1 for runs in axes):
        return float(math.prod(runs[0][1] for runs in axes))
    sizes = np.ones([1] * len(axes), np.float32)
    for axis, runs in enumerate(axes):
        along = np.repeat([s for _, s in runs], [n for n, _ in runs]).astype(np.float32)
        sizes = sizes * along.reshape([-1 if a == axis else 1 for a in range(len(axes))])
    return sizes
