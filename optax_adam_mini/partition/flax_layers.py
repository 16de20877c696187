"""Block specs of Flax's own layers, read off the parameters' names and ranks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from optax_adam_mini.blocks import (
    BlockSpec,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)
from optax_adam_mini.labels import LabelFn, check_is_params, check_used, path_of, some
from optax_adam_mini.outer import Outer, Spec

# Flax's names, and Haiku's, whose kernels are laid out alike.
_BIASES = {"bias", "b", "offset", "bias_n"}
_GAINS = {"scale", "negative_slope"}
_EMBEDDINGS = {"embedding", "embeddings"}
_KERNELS = {"kernel", "w", "w_i", "w_h", "lora_a", "lora_b"}
# Equinox's, whose kernels have their outputs first.
_TRANSPOSED_KERNELS = {"weight", "weight_ih", "weight_hh"}
_QUERIES, _KEYS, _VALUES = {"query", "query_proj"}, {"key", "key_proj"}, {"value", "value_proj"}


def flax_layers(
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    query_key: Literal["head", "neuron"] = "head",
    value: Literal["neuron", "tensor"] = "neuron",
    conv: Literal["channel", "tensor"] = "channel",
    bias: Literal["element", "tensor"] = "element",
    stacked: Mapping[str, int | Sequence[int]] | None = None,
    default: Spec | None = None,
) -> LabelFn:
    """The default label function: knows the parameters of Flax's own layers, Linen and NNX alike.

    It reads names and ranks: kernels of Dense, DenseGeneral, Einsum and convolutions are cut by
    output neuron or channel; in an attention layer (modules `query`, `key`, `value`, `out`) query
    and key by head, value and output by neuron; embeddings by token; gains of norms are one block;
    biases are cut per coordinate. Parameters that have no name (a bare array, an item of a list)
    are read as kernels `(inputs, outputs)`, or as biases if they have one axis: so the one vector
    that `optax.flatten` makes of all parameters is cut per coordinate, which is Adam and saves
    nothing. Haiku's and Equinox's names are known too.

    Args:
        num_heads: attention heads, for models whose query and key are plain Dense kernels.
        num_kv_heads: heads of the key where they are fewer (grouped-query attention); None for
            `num_heads`.
        query_key: cut of query and key kernels: by head, the paper's, or by output neuron, which
            served small Llamas (with rotary positions) better.
        value: cut of value kernels: by output neuron, or one block (the paper's advice for short
            runs).
        conv: cut of convolution kernels: by output channel, or one block.
        bias: cut of biases: per coordinate, as the reference implementation does, or one block, as
            the paper's Algorithm 3 does.
        stacked: for each module whose layers are stacked for `scan`, its name and the axis (or
            axes) they are stacked along, such as `{"layers": 0}`; a block at each of its indices.
        default: spec of named parameters of two axes or more that are none of Flax's own; None to
            make such a parameter an error.

    Returns:
        A label function `params -> pytree of BlockSpec`, for params that are arrays or
        `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: here for options that do not exist; from the label function, naming every
            parameter concerned, if a parameter cannot be read: of unknown name, a query or key
            without a number of heads, a kernel whose output axes names and ranks do not tell.

    Examples:
        >>> kernels = {"query": jnp.ones((8, 2, 4)), "mlp": jnp.ones((8, 32))}
        >>> specs = flax_layers()({name: {"kernel": kernel} for name, kernel in kernels.items()})
        >>> specs["query"]["kernel"].grid((8, 2, 4)), specs["mlp"]["kernel"].grid((8, 32))
        ((1, 2, 1), (1, 32))
    """
    for name, given, allowed in [
        ("query_key", query_key, ("head", "neuron")),
        ("value", value, ("neuron", "tensor")),
        ("conv", conv, ("channel", "tensor")),
        ("bias", bias, ("element", "tensor")),
    ]:
        if given not in allowed:
            raise ValueError(f"flax_layers: {name} must be one of {allowed}, got {given!r}")
    stacks = {name: (a,) if isinstance(a, int) else tuple(a) for name, a in (stacked or {}).items()}

    def heads(module: str, axis: int) -> BlockSpec | str:
        """The spec of a query or key with all heads on one axis."""
        if query_key == "neuron":
            return per_neuron(axis)
        count = num_heads if module in _QUERIES or num_kv_heads is None else num_kv_heads
        if count is None:
            return "the number of heads is not in a plain kernel: pass num_heads to flax_layers"
        return per_head(count, axis)

    def transposed_kernel(
        module: str, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None
    ) -> BlockSpec | str:
        """The spec of a kernel `(outputs, inputs, ...)`, or of a gain, which has the same name."""
        rank = len(shape)
        if rank < 2 or bias_shape == shape:
            return per_tensor()
        # A convolution's bias has an axis, of size 1, for each of the image's.
        if bias_shape not in (None, shape[:1] + (1,) * (rank - 2)):
            return (
                f"its bias has shape {bias_shape}, which is not that of its first axis, the "
                "outputs; for layers stacked by vmap, pass stacked to flax_layers"
            )
        if module in _VALUES and value == "tensor":
            return per_tensor()
        if module in _QUERIES | _KEYS:
            return heads(module, axis=0)
        return per_tensor() if rank > 2 and conv == "tensor" else per_neuron(axis=0)

    def kernel(
        module: str, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None, is_haiku: bool
    ) -> BlockSpec | str:
        """The spec of a kernel of `shape`, stacked axes left out, or why it cannot be told."""
        rank = len(shape)
        if rank < 2:
            return per_element()
        # (inputs, heads, head_dim) or (inputs, outputs); the output layer's has its inputs first.
        is_attention = module in _QUERIES | _KEYS | _VALUES | {"out"}
        outputs = 1 if rank == 2 or module == "out" else 2
        if is_attention and (rank > 3 or bias_shape not in (None, shape[-outputs:])):
            with_bias = "" if bias_shape is None else f" and its bias {bias_shape}"
            return (
                f"{rank} axes{with_bias} are not those of Flax's attention; for stacked layers, "
                "pass stacked to flax_layers"
            )
        if module in _QUERIES | _KEYS:
            if rank == 2:
                return heads(module, axis=-1)
            both = per_neuron(axis=(-2, -1))
            return both if query_key == "neuron" else per_head(shape[-2], axis=-2)
        if module in _VALUES:
            if value == "tensor":
                return per_tensor()
            return per_neuron() if rank == 2 else per_neuron(axis=(-2, -1))
        if rank == 2 or module == "out":
            return per_neuron()
        if conv == "tensor" and (rank > 3 or "conv" in module):
            return per_tensor()
        if is_haiku and "transpose" in module:
            return per_neuron(axis=-2)
        # Which of three axes or more are outputs? The bias has one entry for each output.
        if bias_shape is not None:
            outputs = len(bias_shape)
            if bias_shape == shape[-outputs:]:
                return per_neuron() if outputs == 1 else per_neuron(axis=tuple(range(-outputs, 0)))
            if bias_shape == shape[-2:-1]:
                return per_neuron(axis=-2)  # ConvTranspose(transpose_kernel=True)
            return f"its bias has shape {bias_shape}, which is not that of its last axes"
        if "conv" in module or (rank > 3 and not re.search("dense|einsum|linear", module)):
            return per_neuron()
        return "it may be a convolution or a DenseGeneral with several output axes"

    def label(
        names: tuple[str, ...],
        is_attribute: bool,
        shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None,
    ) -> Spec | str:
        # "Conv_0" and "w1" are Conv and w; an item of a list has no name at all.
        module, name = (re.sub(r"_?\d+$", "", n.lower()) for n in ("", "", *names)[-2:])
        if name in _BIASES:
            return per_tensor() if bias == "tensor" else per_element()
        if name in _GAINS:
            return per_tensor()
        if name in _EMBEDDINGS:
            if len(shape) != 2:
                return "an embedding has two axes; for stacked layers, pass stacked to flax_layers"
            return per_token()
        if name in _KERNELS:
            return kernel(module, shape, bias_shape, is_haiku=name == "w")
        if name in _TRANSPOSED_KERNELS and is_attribute:
            return transposed_kernel(module, shape, bias_shape)
        if len(shape) < 2:
            return per_element()
        if name == "":
            return per_neuron()
        return default or "its name is none of Flax's own: pass default to flax_layers"

    def label_fn(params: Any) -> Any:
        check_is_params("flax_layers", params)
        for module in stacks:
            check_used(
                f"flax_layers: stacked={{{module!r}: ...}}",
                lambda path, module=module: module in path.split("/"),
                module,
                params,
            )
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        shapes = {path_of(keys): jnp.shape(leaf) for keys, leaf in leaves}
        attributes = {path_of(k) for k, _ in leaves if k and isinstance(k[-1], GetAttrKey)}
        specs: list[Spec] = []
        unread: list[str] = []
        for path, shape in shapes.items():
            names = tuple("/".join(path).split("/"))  # Haiku's modules are "a/b/c" in one key
            axes = tuple(axis for module in stacks if module in names for axis in stacks[module])
            bias_shape = shapes.get((*path[:-1], "b" if names[-1] == "w" else "bias"))
            try:
                spec = label(
                    names,
                    path in attributes,
                    _without(axes, shape),
                    None if bias_shape is None else _without(axes, bias_shape),
                )
                spec = spec if isinstance(spec, str) else _stack(spec, axes, len(shape))
            except ValueError as error:
                spec = str(error)
            if isinstance(spec, str):
                unread.append(f"{'/'.join(path)} {shape}: {spec}")
            else:
                specs.append(spec)
        if unread:
            raise ValueError(
                "flax_layers cannot tell the blocks of "
                + some(unread)
                + "; or say it yourself, by_path([(pattern, spec)], default=flax_layers())"
            )
        return jax.tree.unflatten(treedef, specs)

    return label_fn


def _without(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"there is no axis {axis} to be stacked along")
    stacked = {axis % len(shape) for axis in axes}
    return tuple(size for axis, size in enumerate(shape) if axis not in stacked)


def _stack(spec: Spec, axes: tuple[int, ...], rank: int) -> Any:
    """`spec`, of a parameter without its stacked axes, for the parameter with them."""
    if isinstance(spec, Outer):
        a, b = (_stack(grid, axes, rank) for grid in (spec.a, spec.b))
        return dataclasses.replace(spec, a=a, b=b)
    if not axes or spec.rest is None:
        return spec
    kept = [axis for axis in range(rank) if axis not in {a % rank for a in axes}]
    cuts = tuple((kept[a] if a >= 0 else kept[a] - rank, cut) for a, cut in spec.cuts)
    return BlockSpec((*cuts, *((axis, None) for axis in axes)), unit=spec.unit)
