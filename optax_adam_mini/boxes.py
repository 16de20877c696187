"""Flax's boxes of parameters, and the axis names in them.

Linen's `nn.Partitioned` and NNX's variables are nodes of a pytree; their metadata is part of the
tree's structure. The optimizer state is in the same boxes, so that Flax places it on a mesh like
the parameters. The package does not import Flax: it only checks whether Flax was imported.

One rule places an array of the state, here and in `opt_state_shardings`: **along an axis where the
array has the parameter's size, it has the parameter's axis name (or mesh axes); along any other
axis it has none.**
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_OF_VARIABLES = ("out_sharding", "optimizer_sharding", "sharding_names")


def kept_names(names: Iterable[Any], part: Sequence[int], whole: Sequence[int]) -> tuple[Any, ...]:
    """The rule: the axis names that an array of the state has from its parameter.

    Args:
        names: the names of the parameter's axes, or of the first ones.
        part: the array's shape, of the parameter's rank.
        whole: the parameter's shape.

    Examples:
        >>> kept_names(("fsdp", "tensor"), (1, 24), (16, 24))
        (None, 'tensor')
    """
    axes = itertools.zip_longest(names, part, whole)
    return tuple(name if size == full else None for name, size, full in axes)


def leaves_with_path(
    tree: Any, is_leaf: Callable[[Any], Any] = lambda _: False
) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves of a tree and the keys along the path to each, without keys of boxes.

    Args:
        tree: any pytree.
        is_leaf: as in `jax.tree_util.tree_leaves_with_path`.
    """
    found: list[tuple[tuple[Any, ...], Any]] = []
    stop = lambda x: is_leaf(x) or _is_box(x)
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        if is_leaf(node) or not _is_box(node):
            found.append((keys, node))
            continue
        for _, inside in jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda x, box=node: x is not box
        ):
            found += [((*keys, *more), leaf) for more, leaf in leaves_with_path(inside, is_leaf)]
    return found


def axis_names(box: Any) -> tuple[Any, ...] | None:
    """The axis names in a parameter's box; None if it is not a box, or has no names.

    Linen's boxes have them in `names`, NNX's variables, and Linen's boxes of these, in their
    metadata.
    """
    if not _is_box(box):
        return None
    names = getattr(box, "names", None) if hasattr(box, "unbox") else None
    if names is None:
        metadata = _metadata(box)
        names = next((names for key in _OF_VARIABLES if (names := metadata.get(key))), None)
    if isinstance(names, NamedSharding):
        names = names.spec
    return tuple(names) if isinstance(names, (tuple, list, PartitionSpec)) else None


def with_kept_names(parts: Any, params: Any) -> Any:
    """Puts arrays of the state into boxes, with the names that the rule keeps.

    Args:
        parts: a tree like `params`, in the same boxes, of arrays of the same ranks.
        params: the parameters, arrays or `jax.ShapeDtypeStruct`s.
    """

    def renamed(box: Any, param: Any) -> Any:
        if not has_names(box) or not (inside := jax.tree.leaves(box)):
            return box
        shapes = jnp.shape(inside[0]), jnp.shape(jax.tree.leaves(param)[0])
        if hasattr(box, "unbox") and getattr(box, "names", None) is not None:
            return box.replace(names=kept_names(box.names, *shapes))
        kept: dict[str, Any] = {}
        for key in _OF_VARIABLES:
            if names := _metadata(box).get(key):
                if isinstance(names, NamedSharding):
                    spec = PartitionSpec(*kept_names(names.spec, *shapes))
                    kept[key] = names.update(spec=spec)
                else:
                    is_spec = isinstance(names, PartitionSpec)
                    of_part = kept_names(names, *shapes)
                    kept[key] = PartitionSpec(*of_part) if is_spec else of_part
        if hasattr(box, "unbox"):  # one of Linen's boxes, around a variable of NNX
            return box.replace(metadata={**_metadata(box), **kept})
        box = jax.tree.map(lambda x: x, box)  # copies the variable
        for key, names in kept.items():
            box.set_metadata(key, names)
        return box

    return jax.tree.map(renamed, parts, params, is_leaf=has_names)


def has_names(x: Any) -> bool:
    """Whether `x` is a box with axis names."""
    return axis_names(x) is not None


def _is_box(x: Any) -> bool:
    # Where Flax was never imported, nothing can be of it. Other classes may have such methods.
    found = [("flax.core.meta", "AxisMetadata"), ("flax.nnx", "Variable")]
    types = (getattr(sys.modules.get(module), name, None) for module, name in found)
    return isinstance(x, tuple(type for type in types if type is not None))


def _metadata(box: Any) -> dict[str, Any]:
    get: Any = getattr(box, "get_metadata", None)
    return get() if get else getattr(box, "metadata", {})
