"""`flax_layers`: block specs of Flax's layers, by the parameters' names and ranks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from optax_adam_mini.blocks import (
    BlockSpec,
    Cut,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import (
    LabelFn,
    check_is_params,
    check_only_params,
    check_used,
    first_few,
    has_masked,
    label,
    path_of,
)
from optax_adam_mini.product import Outer, Spec

# Names in Flax and in Haiku, whose kernels have the same layout.
_BIASES = {"bias", "b", "offset", "bias_n"}
_GAINS = {"scale", "negative_slope"}
_EMBEDDINGS = {"embedding", "embeddings"}
_KERNELS = {"kernel", "w", "w_i", "w_h", "lora_a", "lora_b"}
# Names in Equinox, whose kernels have their outputs first.
_TRANSPOSED_KERNELS = {"weight", "weight_ih", "weight_hh"}
_QUERIES, _KEYS, _VALUES = {"query", "query_proj"}, {"key", "key_proj"}, {"value", "value_proj"}
# Other common names, of plain kernels: `num_heads` says how many heads they have.
_OTHER_QUERIES = {"q", "wq", "q_proj", "q_lin", "to_q", "proj_q", "attn_q", "w_q", "q_dense"}
_OTHER_KEYS = {"k", "wk", "k_proj", "k_lin", "to_k", "proj_k", "attn_k", "w_k", "k_dense"}
# Fused kernels of query, key and value, and factors of such kernels: the name does not say where
# each part is.
_UNTOLD = (
    "its name is that of query, key and value in one kernel, or of a factor of them, and does not "
    "say where each part is"
)
_SHOWN = 8  # reasons in one error
_FUSED = re.compile(
    r"(w|to_|in_|attn_|c_)?(qkv|qk|kv|wqkv|query_key_value|query_key|key_value)(_proj|_dense|_lin)?"
    r"|c_attn|[qk](v?)_?(a|b|up|down)(_proj)?|in_proj"
)


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
    """The default label function: the paper's cut, by the names of Flax's layers.

    It uses names and ranks, in Linen and NNX. Kernels of Dense,
    DenseGeneral, Einsum and convolutions are cut by output neuron or channel.
    In attention layers (modules `query`, `key`, `value`, `out`), query and key
    are cut by head, value and output by neuron. Embeddings are cut by token.
    Gains of norms are one block. Biases are cut per coordinate. Haiku's and
    Equinox's names are supported too.

    A parameter without a name (a bare array, an item of a list) is taken for a
    kernel `(inputs, outputs)`, or for a bias if it has one axis. So the single
    vector that `optax.flatten` makes of all parameters is cut per coordinate,
    which is Adam and saves nothing.

    Args:
        num_heads: number of attention heads, for models whose query and key
            are plain Dense kernels, under Flax's names or other common ones
            (`q_proj`, `wq`, `to_q`, `q`).
        num_kv_heads: number of key heads if they are fewer (grouped-query
            attention); None for `num_heads`.
        query_key: cut query and key by head, as in the paper, or by output
            neuron, which worked better for small Llamas (with rotary
            positions).
        value: cut value kernels by output neuron, or as one block (the paper's
            advice for short runs).
        conv: cut convolutions by output channel, or as one block.
        bias: cut biases per coordinate, as the reference implementation does,
            or as one block, as the paper's Algorithm 3 does.
        stacked: for each module whose layers are stacked for `scan`, its name
            and the axis (or axes) along which they are stacked, such as
            `{"layers": 0}`. Each layer has its own blocks.
        default: spec of parameters with two or more axes and names that are
            not Flax's; None makes such a parameter an error.

    Returns:
        A label function `params -> pytree of BlockSpec`, for params that are
        arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: here for options that do not exist. From the label
            function, naming every parameter concerned, for an unknown name, a
            query or key without a number of heads, a kernel that query and key
            share with others (`qkv`, `c_attn`), a kernel with output axes that
            names and ranks do not reveal, an NNX variable that is not a
            parameter, and an option that no parameter needs.

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
    if default is not None and not isinstance(default, Spec):
        raise TypeError(f"flax_layers: default must be a BlockSpec or an outer, got {default!r}")
    if stacked is not None and not isinstance(stacked, Mapping):
        raise TypeError(
            f'flax_layers: stacked must be a dict such as {{"layers": 0}}, got {stacked!r}'
        )
    stacks: dict[str, tuple[int, ...]] = {}
    for name, axes in (stacked or {}).items():
        try:
            given = axes if isinstance(axes, Iterable) else [axes]
            stacks[name] = tuple(map(operator.index, given))
        except TypeError:
            raise TypeError(
                f"flax_layers: stacked must give an axis, or several, for {name!r}, got {axes!r}"
            ) from None
    options = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "query_key": query_key,
        "value": value, "conv": conv, "bias": bias,
    }  # fmt: skip
    usual = inspect.signature(flax_layers).parameters
    given = {name for name, option in options.items() if option != usual[name].default}
    made = functools.partial(_label, options, given, stacks, default)
    said = {name: option for name, option in options.items() if name in given}
    return label("flax_layers", [], {**said, "stacked": stacked, "default": default}, made)


def _label(
    options: dict[str, Any],
    given: set[str],
    stacks: dict[str, tuple[int, ...]],
    default: Spec | None,
    params: Any,
    needed: Sequence[bool] | None = None,
) -> Any:
    """The specs of `params`; a module-level function, so that it can be pickled."""
    used: set[str] = set()  # the options that some parameter has needed

    def use(name: str) -> Any:
        used.add(name)
        return options[name]

    def heads(module: str, axis: int) -> BlockSpec | str:
        """The spec of a query or key with all heads on one axis."""
        if use("query_key") == "neuron":
            return per_neuron(axis)
        of_keys = None if module in _QUERIES | _OTHER_QUERIES else use("num_kv_heads")
        count = use("num_heads") if of_keys is None else of_keys
        if count is None:
            return (
                "the number of heads is not in a plain kernel: pass num_heads to flax_layers, or "
                "have infer_block_specs read it off the model"
            )
        return per_head(count, axis)

    def transposed_kernel(
        module: str, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None
    ) -> BlockSpec | str:
        """The spec of a kernel `(outputs, inputs, ...)` or of a gain, which has the same name."""
        rank = len(shape)
        if rank < 2 or bias_shape == shape:
            return per_tensor()
        # A convolution's bias has an axis of size 1 for each axis of the image.
        if bias_shape not in (None, shape[:1] + (1,) * (rank - 2)):
            return (
                f"its bias has shape {bias_shape}, which is not that of its first axis, the "
                "outputs; for layers stacked by vmap, pass stacked to flax_layers"
            )
        if module in _VALUES and use("value") == "tensor":
            return per_tensor()
        if module in _QUERIES | _KEYS or (rank == 2 and module in _OTHER_QUERIES | _OTHER_KEYS):
            return heads(module, axis=0)
        if _FUSED.fullmatch(module):
            return _UNTOLD
        return per_tensor() if rank > 2 and use("conv") == "tensor" else per_neuron(axis=0)

    def kernel(
        module: str, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None, is_haiku: bool
    ) -> BlockSpec | str:
        """The spec of a kernel of `shape`, without stacked axes, or why it is unknown."""
        rank = len(shape)
        if rank < 2:
            return per_element()
        if is_haiku and bias_shape is not None and set(bias_shape[1:]) == {1}:
            bias_shape = bias_shape[:1]  # a convolution with channels first
        # (inputs, heads, head_dim) or (inputs, outputs), but `out` is (heads, head_dim, outputs).
        is_conv = rank > 3 and module in _VALUES | {"out"} and bias_shape == shape[-1:]
        is_attention = module in _QUERIES | _KEYS | _VALUES | {"out"} and not is_conv
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
            return both if use("query_key") == "neuron" else per_head(shape[-2], axis=-2)
        if module in _OTHER_QUERIES | _OTHER_KEYS and rank == 2:
            return heads(module, axis=-1)
        if module in _OTHER_QUERIES | _OTHER_KEYS or _FUSED.fullmatch(module):
            return _UNTOLD
        if module in _VALUES and not is_conv:
            if use("value") == "tensor":
                return per_tensor()
            return per_neuron() if rank == 2 else per_neuron(axis=(-2, -1))
        if rank == 2 or (module == "out" and not is_conv):
            return per_neuron()
        if (rank > 3 or "conv" in module) and use("conv") == "tensor":
            return per_tensor()
        if is_haiku and "transpose" in module:
            return per_neuron(axis=-2)
        # The bias has one entry per output, which shows which of three or more axes are outputs.
        if bias_shape is not None:
            outputs = len(bias_shape)
            if bias_shape == shape[-outputs:]:
                return per_neuron() if outputs == 1 else per_neuron(axis=tuple(range(-outputs, 0)))
            if bias_shape == shape[-2:-1]:
                return per_neuron(axis=-2)  # ConvTranspose(transpose_kernel=True)
            if bias_shape == shape[:-2] + shape[-1:]:
                return per_neuron()  # ConvLocal: a bias for each position
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
        # "Conv_0" and "w1" count as Conv and w; an item of a list has no name.
        module, name = (re.sub(r"_?\d+$", "", n.lower()) for n in ("", "", *names)[-2:])
        if name in _BIASES:
            return per_tensor() if use("bias") == "tensor" else per_element()
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

    check_is_params("flax_layers", params)
    if needed is None:  # otherwise the function that asks has checked
        check_only_params("flax_layers", params)
    for module in stacks:
        check_used(
            f"flax_layers: stacked={{{module!r}: ...}}",
            lambda path, module=module: module in path.split("/"),
            module,
            params,
        )
    leaves, treedef = leaves_with_path(params), jax.tree.structure(params)
    shapes = {path_of(keys): jnp.shape(leaf) for keys, leaf in leaves}
    joined = {"/".join(path): shape for path, shape in shapes.items()}
    attributes = {path_of(k) for k, _ in leaves if k and isinstance(k[-1], GetAttrKey)}
    specs: list[Spec | None] = []
    unread: dict[str, list[str]] = {}
    for index, (path, shape) in enumerate(shapes.items()):
        names = tuple("/".join(path).split("/"))  # Haiku's modules are "a/b/c" in one key
        axes = tuple(axis for module in stacks if module in names for axis in stacks[module])
        bias_shape = joined.get("/".join((*names[:-1], "b" if names[-1] == "w" else "bias")))
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
        if needed is not None and not needed[index]:
            specs.append(None)
        elif isinstance(spec, str):
            unread.setdefault(spec, []).append(f"{'/'.join(path)} {shape}")
        else:
            specs.append(spec)
    if unread:
        reasons, more = list(unread.items()), len(unread) > _SHOWN
        raise ValueError(
            "flax_layers does not know how to cut\n"
            + "".join(f"  {first_few(paths)}: {why}\n" for why, paths in reasons[:_SHOWN])
            + f"  {sum(len(paths) for _, paths in reasons[_SHOWN:])} more\n" * more
            + "Use infer_block_specs(loss_fn, params, ...), or give their specs, "
            "by_path([(pattern, spec)], default=flax_layers())"
        )
    unused = given - used
    if unused and specs and not has_masked(params):
        said = ", ".join(f"{name}={options[name]!r}" for name in sorted(unused))
        raise ValueError(
            f"flax_layers: no parameter needs {said}: leave it out, or use infer_block_specs"
        )
    return jax.tree.unflatten(treedef, specs)


def _without(axes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"there is no axis {axis} to be stacked along")
    stacked = {axis % len(shape) for axis in axes}
    return tuple(size for axis, size in enumerate(shape) if axis not in stacked)


def _stack(spec: Spec, axes: tuple[int, ...], rank: int) -> Any:
    """The spec of a stacked parameter, from the `spec` of one layer."""
    if isinstance(spec, Outer):
        a, b = (_stack(grid, axes, rank) for grid in (spec.a, spec.b))
        return dataclasses.replace(spec, a=a, b=b)
    if not axes or spec.rest is None:
        return spec
    kept = [axis for axis in range(rank) if axis not in {a % rank for a in axes}]

    def moved(axis: int) -> int:
        if not -len(kept) <= axis < len(kept):
            raise ValueError(f"its spec {spec} cuts axis {axis}, which one layer does not have")
        return kept[axis] if axis >= 0 else kept[axis] - rank

    def renamed(spec: BlockSpec) -> tuple[tuple[int, Cut], ...]:
        """The cuts, and those of parts, with the axes renumbered."""
        return tuple(
            (
                moved(axis),
                tuple((n, dataclasses.replace(p, cuts=renamed(p))) for n, p in cut)
                if isinstance(cut, tuple)
                else cut,
            )
            for axis, cut in spec.cuts
        )

    return BlockSpec((*renamed(spec), *((axis, None) for axis in axes)), unit=spec.unit)
