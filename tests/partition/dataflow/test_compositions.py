"""Random models made of layers, whose blocks follow from those of each layer.

Each part is a layer of known cut, which reads the stream and writes into it or beside it. What its
outputs are coupled by, inside the part, is what every use of them couples: as soon as something
else reads them too, they are neurons.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from optax_adam_mini import infer_block_specs
from tests.partition.dataflow.models.parts import B, T, attention, rms_norm, rotary_halves, shape

H, N = 2, 4  # heads, and features of each
W = H * N

split = lambda y: y.reshape(*y.shape[:-1], H, N)
merge = lambda y: y.reshape(*y.shape[:-2], -1)


@dataclasses.dataclass
class Part:
    """A layer: its parameters, the grid of each, and what it makes of its parameters and a stream.

    `read` has the grids of the parameters whose outputs are finer where something else reads what
    the layer hands out beside its result.
    """

    params: dict[str, Any]
    grids: dict[str, tuple[int, ...]]
    apply: Callable[[Any, Any], tuple[Any, Any]]
    read: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def mlp():
    def apply(p, x):
        h = jax.nn.gelu(rms_norm(x) * p["g"] @ p["u"] + p["b"])
        return h @ p["w"], h

    return Part(
        {"g": shape(W), "u": shape(W, 6), "b": shape(6), "w": shape(6, W)},
        {"g": (1,), "u": (1, 6), "b": (6,), "w": (1, W)},
        apply,
    )


def gated():
    def apply(p, x):
        gate, up = jnp.split(x @ p["u"], 2, -1)
        return (jax.nn.silu(gate) * up) @ p["w"], up

    return Part({"u": shape(W, 10), "w": shape(5, W)}, {"u": (1, 10), "w": (1, W)}, apply)


def attends(rotate, norm):
    """Attention; the query is handed out."""

    def apply(p, x):
        q, k, v = (split(x @ p[name]) for name in "qkv")
        turned = [rotate(rms_norm(y)) if norm else rotate(y) for y in (q, k)]
        return merge(attention(*turned, v)) @ p["o"], q

    return Part(
        {name: shape(W, W) for name in "qkvo"},
        {"q": (1, H), "k": (1, H), "v": (1, W), "o": (1, W)},
        apply,
        {"q": (1, W)},
    )


def shares_key_and_value():
    def apply(p, x):
        q, kv = split(x @ p["q"]), split(x @ p["kv"])
        return merge(attention(q, kv, kv)) @ p["o"], q

    return Part(
        {name: shape(W, W) for name in ("q", "kv", "o")},
        {"q": (1, H), "kv": (1, W), "o": (1, W)},
        apply,
        {"q": (1, W)},
    )


def filters():
    def apply(p, x):
        moved = [jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :T] for i in range(3)]
        y = sum(m * p["f"][i] for i, m in enumerate(moved))
        return jax.nn.silu(y) @ p["w"], y

    return Part({"f": shape(3, W), "w": shape(W, W)}, {"f": (1, W), "w": (1, W)}, apply)


def convolves():
    def apply(p, x):
        numbers = ("NWC", "WIO", "NWC")
        y = lax.conv_general_dilated(x, p["c"], (1,), "SAME", dimension_numbers=numbers)
        return jnp.tanh(y), y

    return Part({"c": shape(3, W, W)}, {"c": (1, 1, W)}, apply)


PARTS = {
    "mlp": mlp,
    "gated": gated,
    "attention": lambda: attends(lambda y: y, norm=False),
    "normed attention": lambda: attends(lambda y: y, norm=True),
    "turned attention": lambda: attends(rotary_halves, norm=True),
    "one key and value": shares_key_and_value,
    "filters": filters,
    "convolution": convolves,
}
WIRES = ["sequence", "residual", "beside"]
ENDS = ["outputs", "loss", "similarity"]
STACKS = ["none", "scan", "pairs", "halves", "counter", "index", "split"]
LAYERS = 4  # of a stack


@st.composite
def models(draw):
    """Parameters, the grid of each, and the forward pass."""
    names = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=2, max_size=3))
    params, grids, steps, extra = {}, {}, [], []
    for number, name in enumerate(names):
        part, wire = PARTS[name](), draw(st.sampled_from(WIRES))
        stack = draw(st.sampled_from(STACKS))
        is_read = draw(st.booleans()) and stack == "none"
        own = part.grids | (part.read if is_read else {})
        lead = (LAYERS,) if stack != "none" else ()
        key = f"{number} {name} "
        for path, leaf in part.params.items():
            params[key + path] = shape(*lead, *leaf.shape)
            grids[key + path] = (*lead, *own[path])
        steps.append((key, part, wire, stack, is_read))
        extra.append(is_read)
    if draw(st.booleans()):  # the same layer once more, of the same parameters
        steps.append((*steps[0][:4], False))
    end = draw(st.sampled_from(ENDS))
    params["head"], grids["head"] = shape(W, 5), (1, 5)
    if end == "similarity":  # an auxiliary loss on what the head makes, which is read as well
        params["to"], grids["to"] = shape(W, 5), (1, 1)

    def forward(p, x, y):
        handed = []
        for key, part, wire, stack, is_read in steps:
            own = {path: p[key + path] for path in part.params}
            x = wired(part, wire, stack, own, x)
            if is_read:
                handed.append(part.apply(own, x)[1])
        out = x @ p["head"]
        if end == "outputs":
            return (out, *handed)
        loss = jnp.square(out).mean() + sum(jnp.tanh(h).mean() for h in handed)
        if end == "similarity":
            a, b = out.mean(1), y @ p["to"]
            loss += jax.nn.log_softmax(a @ b.T).trace()
        return loss, out

    return params, grids, forward


def wired(part, wire, stack, params, x):
    once = {
        "sequence": lambda p, x: part.apply(p, x)[0],
        "residual": lambda p, x: x + part.apply(p, x)[0],
        "beside": lambda p, x: jnp.tanh(x) + part.apply(p, rms_norm(x))[0],
    }[wire]
    if stack == "none":
        return once(params, x)
    scanned = lambda x, p: lax.scan(lambda x, p: (once(p, x), None), x, p)[0]
    if stack == "scan":
        return scanned(x, params)
    if stack == "pairs":
        pairs = jax.tree.map(lambda w: w.reshape(-1, 2, *w.shape[1:]), params)
        return lax.scan(jax.checkpoint(lambda x, p: (scanned(x, p), None)), x, pairs)[0]
    if stack == "halves":
        for half in (slice(2), slice(2, None)):
            x = scanned(x, jax.tree.map(lambda w: w[half], params))  # noqa: B023
        return x
    if stack == "counter":
        at = lambda i, w: lax.dynamic_index_in_dim(w, i, keepdims=False)
        layer = lambda i, x: once(jax.tree.map(functools.partial(at, i), params), x)
        return lax.fori_loop(0, LAYERS, layer, x)
    for i in range(LAYERS):
        take = (lambda w: w[i]) if stack == "index" else (lambda w: jnp.split(w, LAYERS)[i][0])  # noqa: B023
        x = once(jax.tree.map(take, params), x)
    return x


def check(model):
    params, expected, forward = model
    specs = infer_block_specs(forward, params, shape(B, T, W), shape(B, W), v="mean")
    grids = {name: specs[name].grid(params[name].shape) for name in params}
    coarser = {
        name: (grids[name], expected[name])
        for name in params
        if not all(map(operator.ge, grids[name], expected[name]))
    }
    assert not coarser, f"coarser than the parts: {coarser}"
    assert grids == expected


@given(models())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_composed_models_have_the_blocks_of_their_layers(model):
    check(model)


@pytest.mark.slow
@given(models())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_composed_models_have_the_blocks_of_their_layers(model):
    check(model)


def towers(depth, is_read):
    """Layers of a stream that ends in an inner product, without a head."""
    params = {f"{kind}{i}": shape(W, W) for i in range(depth) for kind in "uw"} | {"t": shape(3, W)}

    def forward(p, x, y):
        layers = []
        for i in range(depth):
            x = x + jax.nn.gelu(rms_norm(x) @ p[f"u{i}"]) @ p[f"w{i}"]
            layers.append(x)
        loss = jax.nn.log_softmax(rms_norm(x).mean(1) @ (y @ p["t"]).T).trace()
        return loss + sum(jnp.tanh(x).mean() for x in layers[-1:] if is_read)

    return params, forward


@pytest.mark.parametrize(("depth", "is_read"), list(itertools.product([1, 2, 3], [False, True])))
def test_a_kernel_whose_outputs_end_in_an_inner_product_is_one_block(depth, is_read):
    params, forward = towers(depth, is_read)
    specs = infer_block_specs(forward, params, shape(B, T, W), shape(B, 3), v="mean")
    grids = {name: specs[name].grid(params[name].shape) for name in params}
    expected = dict.fromkeys(params, (1, W)) | {"t": (1, 1)}
    if not is_read:
        expected[f"w{depth - 1}"] = (1, 1)
    assert grids == expected
