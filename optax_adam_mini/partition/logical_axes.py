"""`by_logical_axes`: block specs by the axis names in Flax's metadata."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from optax_adam_mini.blocks import per_neuron
from optax_adam_mini.boxes import axis_names, has_names, leaves_with_path
from optax_adam_mini.labels import (
    LabelFn,
    check_default,
    check_is_params,
    completed,
    first_few,
    has_masked,
    label,
    path_of,
    path_str,
)
from optax_adam_mini.product import Spec

Names = tuple[str | None, ...]


def by_logical_axes(
    rules: Sequence[tuple[Names, Sequence[str]]],
    default: Spec | LabelFn | None = None,
    *,
    stacked: str | Sequence[str] = ("layers",),
) -> LabelFn:
    """Makes a label function from the logical names of the parameters' axes.

    The names are those in Flax's metadata, set by `nn.with_partitioning` and
    `nn.with_logical_partitioning` in Linen, and by `nnx.with_partitioning` and
    `sharding_names` in NNX. Parameters with the same names get the same cut.
    If query, key and value have the same names, separate them by path:
    `by_path([("value", per_neuron((1, 2)))], default=by_logical_axes(...))`.

    Args:
        rules: pairs `(names, cut)`: the names of all axes of a parameter, in
            order, and the names of the axes with a block at each index (none
            for one block).
        default: spec, or label function, for parameters without names and
            parameters that no rule matches; None makes such a parameter an
            error.
        stacked: names of axes along which layers are stacked for `scan`. They
            have a block at each index, and rules do not name them.

    Returns:
        A label function `params -> pytree of BlockSpec`, for params that are
        arrays or `jax.ShapeDtypeStruct`s in boxes with metadata.

    Raises:
        TypeError, ValueError: here if a rule is not names and a cut of these
            names, or if two rules have the same names; from the label function
            if a parameter has more or fewer names than axes, if no parameter
            has a rule's names, or if no rule matches a parameter and there is
            no default.

    Examples:
        >>> from flax import linen as nn
        >>> params = {"kernel": nn.Partitioned(jnp.ones((2, 8, 4, 16)),
        ...                                    names=("layers", "embed", "heads", "head_dim"))}
        >>> label = by_logical_axes([(("embed", "heads", "head_dim"), ("heads",))])
        >>> label(params)["kernel"].value.grid((2, 8, 4, 16))
        (2, 1, 4, 1)
    """
    for name, given in (("rules", rules), ("stacked", stacked)):
        if not isinstance(given, Iterable):
            raise TypeError(f"by_logical_axes: {name} must be a sequence, got {given!r}")
    stacked = (stacked,) if isinstance(stacked, str) else tuple(stacked)
    table = _checked(rules, stacked)
    check_default("by_logical_axes", default)

    made = functools.partial(_label, table, stacked, default)
    options = {"default": default, "stacked": stacked if stacked != ("layers",) else None}
    return label("by_logical_axes", [list(table.items())], options, made)


def _label(
    table: dict[Names, tuple[str, ...]],
    stacked: tuple[str, ...],
    default: Spec | LabelFn | None,
    params: Any,
    needed: Sequence[bool] | None = None,
) -> Any:
    """The specs of `params`; a module-level function, so that it can be pickled."""
    check_is_params("by_logical_axes", params)
    named = logical_axes(params)
    specs: list[Spec | None] = []
    unused = set(table)
    for keys, leaf in leaves_with_path(params):
        names = named.get(path_of(keys), ())
        if names and len(names) != jnp.ndim(leaf):
            raise ValueError(
                f"{path_str(keys)} {jnp.shape(leaf)}: has {jnp.ndim(leaf)} axes, but its "
                f"metadata names {names}: give every axis a name, or None"
            )
        own = tuple(name for name in names if name not in stacked)
        cut = table.get(own) if names else None
        if cut is None:
            specs.append(None)
            continue
        unused.discard(own)
        specs.append(per_neuron([i for i, name in enumerate(names) if name in (*stacked, *cut)]))
    if unused and not has_masked(params):
        have = first_few(sorted({str(names) for names in named.values()}))
        raise ValueError(
            "by_logical_axes: no parameter has the axes "
            f"{first_few(sorted(map(str, unused)))}; the parameters have {have or 'none'}"
        )

    seen = lambda keys, _: named.get(path_of(keys), ())
    return completed("by_logical_axes", params, specs, default, seen, needed)


def _checked(rules: Any, stacked: tuple[str, ...]) -> dict[Names, tuple[str, ...]]:
    table: dict[Names, tuple[str, ...]] = {}
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2
                and all(isinstance(part, tuple | list) for part in rule)):  # fmt: skip
            raise TypeError(
                "each rule of by_logical_axes is a pair (names of all axes, names of those with a "
                f'block at each index), such as (("embed", "mlp"), ("mlp",)), got {rule!r}'
            )
        names, cut = map(tuple, rule)
        if unknown := [name for name in cut if name not in names]:
            raise ValueError(
                f"by_logical_axes: the rule for {names} cuts {first_few(unknown)}, which it does "
                "not name: name axes of the rule"
            )
        if both := [str(name) for name in names if name in stacked]:
            raise ValueError(
                f"by_logical_axes: the rule for {names} names {first_few(both)}, which is in "
                "stacked and has a block at each index already: remove it from the rule"
            )
        if names in table:
            raise ValueError(f"by_logical_axes: two rules for {names}: keep one")
        table[names] = cut
    return table


def logical_axes(params: Any) -> dict[tuple[str, ...], Names]:
    """By path, the axis names of the parameters that have any."""
    boxes = leaves_with_path(params, is_leaf=has_names)
    named = {path_of(keys): axis_names(box) for keys, box in boxes}
    return {path: names for path, names in named.items() if names is not None}
