"""Models whose names mean nothing, and the grid of each parameter, written out by hand."""

import functools
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_adam_mini import block_table, per_element, per_neuron, per_tensor
from optax_adam_mini.partition.dataflow import explain, infer_block_specs

B, T, D, H, K, V, N = 2, 6, 32, 4, 2, 11, 8  # batch, time, width, heads, kv heads, tokens, head_dim


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, TOKENS = shape(B, T, D), shape(B, T, dtype="int32")


def grids(fn, params, *args, **options):
    specs = infer_block_specs(fn, params, *args, **options)
    return {name: specs[name].grid(params[name].shape) for name in params}


def attention(q, k, v):
    scores = jnp.einsum("bthn,bshn->bhts", q, k) / np.sqrt(N)
    return jnp.einsum("bhts,bshn->bthn", jax.nn.softmax(scores), v)


def heads(x, count=H):
    return x.reshape(*x.shape[:-1], count, -1)


def joined(x):
    return x.reshape(*x.shape[:-2], -1)


def dense_attention(p, x):
    return joined(attention(*(heads(x @ p[name]) for name in "qkv"))) @ p["o"]


DENSE = {"q": shape(D, D), "k": shape(D, D), "v": shape(D, D), "o": shape(D, D)}
DENSE_GRIDS = {"q": (1, H), "k": (1, H), "v": (1, D), "o": (1, D)}


def angles():
    positions = jnp.arange(T)[:, None, None] / 10
    return jnp.cos(positions), jnp.sin(positions)


def rotary_halves(x):
    (a, b), (c, s) = jnp.split(x, 2, -1), angles()
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def rotary_rotated(x):
    (a, b), (c, s) = jnp.split(x, 2, -1), angles()
    return x * c + jnp.concatenate([-b, a], -1) * s


def rotary_pairs(x):
    a, b, (c, s) = x[..., ::2], x[..., 1::2], angles()
    return jnp.stack([a * c - b * s, b * c + a * s], -1).reshape(x.shape)


def rms_norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


GROUPED = {"q": shape(D, D), "k": shape(D, K * N), "v": shape(D, K * N), "o": shape(D, D),
           "g": shape(N), "h": shape(N)}  # fmt: skip
GROUPED_GRIDS = {"q": (1, H), "k": (1, K), "v": (1, K * N), "o": (1, D), "g": (1,), "h": (1,)}


def grouped(p, x, rotary, mix):
    q = rotary(rms_norm(heads(x @ p["q"])) * p["g"])
    k = rotary(rms_norm(heads(x @ p["k"], K)) * p["h"])
    return joined(mix(q, k, heads(x @ p["v"], K))) @ p["o"]


def by_repeat(q, k, v):
    return attention(q, jnp.repeat(k, H // K, 2), jnp.repeat(v, H // K, 2))


def by_einsum(q, k, v):
    q = q.reshape(B, T, K, H // K, N)
    scores = jax.nn.softmax(jnp.einsum("btkgn,bskn->bkgts", q, k))
    return jnp.einsum("bkgts,bskn->btkgn", scores, v).reshape(B, T, H, N)


def by_matmul(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, jnp.repeat(k, H // K, 2), jnp.repeat(v, H // K, 2)))
    return (jax.nn.softmax(q @ k.swapaxes(2, 3)) @ v).swapaxes(1, 2)


@pytest.mark.parametrize("mix", [by_repeat, by_einsum, by_matmul, jax.nn.dot_product_attention])
@pytest.mark.parametrize("rotary", [rotary_halves, rotary_rotated, rotary_pairs])
def test_grouped_query_attention(rotary, mix):
    assert grids(lambda p, x: grouped(p, x, rotary, mix), GROUPED, X) == GROUPED_GRIDS


def multi_query(p, x):
    q, k, v = heads(x @ p["q"]), x @ p["k"], x @ p["v"]
    scores = jax.nn.softmax(jnp.einsum("bthn,bsn->bhts", q, k))
    return joined(jnp.einsum("bhts,bsn->bthn", scores, v)) @ p["o"]


def summed_by_hand(p, x):
    q, k, v = (heads(x @ p[name]) for name in "qkv")
    scores = (q[:, :, None] * k[:, None] * 0.3).sum(-1)
    return joined((jax.nn.softmax(scores, 2)[..., None] * v[:, None]).sum(2)) @ p["o"]


def fused(p, x):
    return joined(attention(*map(heads, jnp.split(x @ p["qkv"] + p["b"], 3, -1)))) @ p["o"]


def fused_interleaved(p, x):
    qkv = (x @ p["qkv"] + p["b"]).reshape(B, T, H, 3, N)
    return joined(attention(*(qkv[..., i, :] for i in range(3)))) @ p["o"]


def fused_interleaved_split(p, x):
    return joined(attention(*jnp.split(heads(x @ p["qkv"] + p["b"]), 3, -1))) @ p["o"]


FUSED = {"qkv": shape(D, 3 * D), "b": shape(3 * D), "o": shape(D, D)}
FUSED_GRIDS = {"qkv": (1, 2 * H + D), "b": (3 * D,), "o": (1, D)}


def cross_attention(p, x, y):
    q, k, v = heads(x @ p["q"]), heads(y @ p["k"]), heads(y @ p["v"])
    scores = jnp.einsum("bthn,bshn->bhts", q, k) + p["r"][TABLE].transpose(2, 0, 1)
    return joined(jnp.einsum("bhts,bshn->bthn", jax.nn.softmax(scores), v)) @ p["o"]


TABLE = np.abs(np.arange(T)[:, None] - np.arange(T)) % 5


def latent_attention(p, x):
    c = layer_norm(x @ p["down"])
    q, k, v = (
        jnp.einsum("btd,dhn->bthn", a, p[name]) for a, name in ((x, "q"), (c, "k"), (c, "v"))
    )
    return jnp.einsum("bthn,hnd->btd", attention(q, k, v), p["o"])


def linear_attention(p, x):
    q, k, v = (heads(x @ p[name]) for name in "qkv")
    state = jnp.einsum("bthn,bthm->bhnm", jax.nn.elu(k) + 1, v)
    return joined(jnp.einsum("bthn,bhnm->bthm", jax.nn.elu(q) + 1, state)) @ p["o"]


def graph_attention(p, x):
    h = jnp.einsum("if,fhn->ihn", x, p["w"])
    scores = jnp.einsum("ihn,hn->ih", h, p["a"])[:, None] + (h * p["b"]).sum(-1)[None]
    return jnp.einsum("ijh,jhn->ihn", jax.nn.softmax(jax.nn.leaky_relu(scores), 1), h)


def graph_attention_flat(p, x):
    h = heads(x @ p["w"])
    scores = (h * p["a"]).sum(-1)[:, None] + (h * p["b"]).sum(-1)[None]
    return jnp.einsum("ijh,jhn->ihn", jax.nn.softmax(jax.nn.leaky_relu(scores), 1), h)


def graph_convolution(p, x, adjacency):
    return adjacency @ jax.nn.relu(adjacency @ x @ p["w"] + p["b"]) @ p["u"]


def mixture_dense(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    y = jnp.einsum("btef,efd->bted", jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["u"])), p["w"])
    return jnp.einsum("bted,bte->btd", y, gates)


def mixture_gathered(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    chosen = gates.argmax(-1)
    y = jax.nn.relu(jnp.einsum("btd,btdf->btf", x, p["u"][chosen]))
    return jnp.einsum("btf,btfd->btd", y, p["w"][chosen]) * gates.max(-1)[..., None]


def mixture_dispatched(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    dispatch = jax.nn.one_hot(gates.argmax(-1), 3)
    inside = jnp.einsum("bte,btd->ebtd", dispatch, x)
    y = jax.nn.relu(jnp.einsum("ebtd,edf->ebtf", inside, p["u"]))
    y = jnp.einsum("ebtf,efd->ebtd", y, p["w"])
    return jnp.einsum("ebtd,bte->btd", y, dispatch * gates.max(-1)[..., None])


def mixture_scattered(p, x):
    flat = x.reshape(-1, D)
    gates = jax.nn.softmax(flat @ p["router"])
    expert = gates.argmax(-1)
    slots = jnp.zeros((3, B * T, D)).at[expert, jnp.arange(B * T)].set(flat)
    y = jax.vmap(lambda u, w, x: jax.nn.relu(x @ u) @ w)(p["u"], p["w"], slots)
    return y[expert, jnp.arange(B * T)] * gates.max(-1)[:, None]


def mixture_ragged(p, x):
    flat = x.reshape(-1, D)
    gates = jax.nn.softmax(flat @ p["router"])
    order = jnp.argsort(gates.argmax(-1))
    sizes = jnp.bincount(gates.argmax(-1), length=3)
    y = lax.ragged_dot(jax.nn.relu(lax.ragged_dot(flat[order], p["u"], sizes)), p["w"], sizes)
    return jnp.zeros_like(flat).at[order].set(y) * gates.max(-1)[:, None]


MIXTURE = {"router": shape(D, 3), "u": shape(3, D, 16), "w": shape(3, 16, D)}
MIXTURE_GRIDS = {"router": (1, 3), "u": (3, 1, 16), "w": (3, 1, D)}


def language_model(p, tokens, targets):
    h = p["e"][tokens] * np.sqrt(D) + p["pos"][jnp.arange(T)]
    h = h + dense_attention(p, layer_norm(h) * p["g"] + p["b"])
    return -(jax.nn.log_softmax(h @ p["e"].T) * jax.nn.one_hot(targets, V)).sum(-1).mean()


def one_hot_embedding(p, tokens):
    return dense_attention(p, jax.nn.one_hot(tokens, V) @ p["e"])


def lora(p, x):
    q = x @ p["q"] + (x @ p["a"]) @ p["b"]
    return joined(attention(*map(heads, (q, x @ p["k"], x @ p["v"])))) @ p["o"]


def lora_merged(p, x):
    return dense_attention({**p, "q": p["q"] + 0.5 * p["a"] @ p["b"]}, x)


LORA = {**DENSE, "a": shape(D, 2), "b": shape(2, D)}
LORA_GRIDS = {**DENSE_GRIDS, "a": (1, 2), "b": (1, H)}


def lstm(p, x):
    def cell(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((B, 5))
    return lax.scan(cell, (zero, zero), x.swapaxes(0, 1))[1]


def gru_while(p, x):
    def cell(carry):
        t, h = carry
        z, r = jnp.split(jax.nn.sigmoid(x[:, t] @ p["w"] + h @ p["u"]), 2, -1)
        return t + 1, (1 - z) * h + z * jnp.tanh(x[:, t] @ p["v"] + r * (h @ p["y"]))

    return lax.while_loop(lambda carry: carry[0] < T, cell, (0, jnp.zeros((B, 5))))[1]


def mixer(p, x):
    y = jnp.einsum("bsd,st->btd", jax.nn.gelu(jnp.einsum("btd,ts->bsd", x, p["t"])), p["s"])
    return jax.nn.gelu((x + y) @ p["u"]) @ p["w"]


def contrastive(p, x, y):
    a, b = x.mean(1) @ p["a"], y.mean(1) @ p["b"]
    a, b = a / jnp.linalg.norm(a, axis=-1, keepdims=True), b / jnp.sqrt((b * b).sum(-1)[:, None])
    return jax.nn.log_softmax(a @ b.T * jnp.exp(p["t"])).trace()


def state_space(p, x):
    z = lax.conv_general_dilated(x @ p["in"], p["conv"], (1,), [(3, 0)], feature_group_count=16,
                                 dimension_numbers=("NWC", "WIO", "NWC"))  # fmt: skip
    dt = jax.nn.softplus(z @ p["dt"] + p["bias"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["a"]))
    inputs = dt[..., None] * (z @ p["b"])[:, :, None] * z[..., None]
    combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    _, h = lax.associative_scan(combine, (decay, inputs), axis=1)
    return (jnp.einsum("btdn,btn->btd", h, z @ p["c"]) + p["d"] * z) @ p["out"]


def vision_transformer(p, image):
    patches = lax.conv_general_dilated(image, p["patch"], (4, 4), "VALID",
                                       dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
    x = patches.reshape(B, -1, D)
    x = jnp.concatenate([jnp.broadcast_to(p["cls"], (B, 1, D)), x], 1)
    return (x + dense_attention(p, x))[:, 0] @ p["head"]


def convolutions(p, image):
    conv = lambda x, w, **options: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )
    x = conv(image, p["first"])
    x = conv(x, p["depthwise"], feature_group_count=8)
    x = conv(x, p["grouped"], feature_group_count=2)
    x = lax.conv_transpose(x, p["up"], (2, 2), "SAME")
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") * p["gain"]


def scanned(p, x):
    return lax.scan(jax.checkpoint(lambda x, p: (x + dense_attention(p, x), None)), x, p)[0]


def branches(p, x, flag):
    return lax.cond(flag, lambda x: dense_attention(p, x), lambda x: x @ p["q"], x)


def weight_norm(p, x):
    return x @ (p["v"] / jnp.sqrt((p["v"] ** 2).sum(0)) * p["g"])


TABLE_OF_MODELS = {
    "dense": (dense_attention, DENSE, [X], DENSE_GRIDS),
    "jit and vmap": (
        lambda p, x: jax.vmap(lambda x: jax.jit(dense_attention)(p, x[None])[0])(x),
        DENSE, [X], DENSE_GRIDS,
    ),
    "summed by hand": (summed_by_hand, DENSE, [X], DENSE_GRIDS),
    "multi-query": (
        multi_query,
        {"q": shape(D, D), "k": shape(D, N), "v": shape(D, N), "o": shape(D, D)}, [X],
        {"q": (1, H), "k": (1, 1), "v": (1, N), "o": (1, D)},
    ),
    "fused": (fused, FUSED, [X], FUSED_GRIDS),
    "fused, interleaved": (fused_interleaved, FUSED, [X], FUSED_GRIDS),
    "fused, interleaved, split": (fused_interleaved_split, FUSED, [X], FUSED_GRIDS),
    "cross-attention": (
        cross_attention, {**DENSE, "r": shape(5, H)}, [X, X], {**DENSE_GRIDS, "r": (5, 1)},
    ),
    "latent attention": (
        latent_attention,
        {"down": shape(D, 5), "q": shape(D, H, N), "k": shape(5, H, N), "v": shape(5, H, N),
         "o": shape(H, N, D)}, [X],
        {"down": (1, 5), "q": (1, H, 1), "k": (1, H, 1), "v": (1, H, N), "o": (1, 1, D)},
    ),
    "linear attention": (linear_attention, DENSE, [X], dict.fromkeys(DENSE, (1, D))),
    "graph attention": (
        graph_attention, {"w": shape(D, H, N), "a": shape(H, N), "b": shape(H, N)}, [shape(9, D)],
        {"w": (1, H, 1), "a": (H, 1), "b": (H, 1)},
    ),
    "graph attention, flat": (
        graph_attention_flat, {"w": shape(D, D), "a": shape(1, H, N), "b": shape(H, N)},
        [shape(9, D)], {"w": (1, H), "a": (1, H, 1), "b": (H, 1)},
    ),
    "graph convolution": (
        graph_convolution, {"w": shape(D, 7), "b": shape(7), "u": shape(7, 3)},
        [shape(9, D), shape(9, 9)], {"w": (1, 7), "b": (7,), "u": (1, 3)},
    ),
    "mixture, dense": (mixture_dense, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, gathered": (mixture_gathered, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, dispatched": (mixture_dispatched, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, scattered": (mixture_scattered, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, ragged": (mixture_ragged, MIXTURE, [X], MIXTURE_GRIDS),
    "tied language model": (
        language_model,
        {**DENSE, "e": shape(V, D), "pos": shape(T, D), "g": shape(D), "b": shape(D)},
        [TOKENS, TOKENS], {**DENSE_GRIDS, "e": (V, 1), "pos": (T, 1), "g": (1,), "b": (D,)},
    ),
    "one-hot embedding": (
        one_hot_embedding, {**DENSE, "e": shape(V, D)}, [TOKENS], {**DENSE_GRIDS, "e": (V, 1)},
    ),
    "tied autoencoder": (
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T, {"w": shape(D, 7)}, [X], {"w": (D, 7)},
    ),
    "LoRA": (lora, LORA, [X], LORA_GRIDS),
    "LoRA, merged": (lora_merged, LORA, [X], LORA_GRIDS),
    "LSTM": (
        lstm, {"w": shape(D, 20), "u": shape(5, 20), "b": shape(20)}, [X],
        {"w": (1, 20), "u": (1, 20), "b": (20,)},
    ),
    "GRU, while": (
        gru_while,
        {"w": shape(D, 10), "u": shape(5, 10), "v": shape(D, 5), "y": shape(5, 5)}, [X],
        {"w": (1, 10), "u": (1, 10), "v": (1, 5), "y": (1, 5)},
    ),
    "mixer": (
        mixer, {"t": shape(T, 9), "s": shape(9, T), "u": shape(D, 7), "w": shape(7, D)}, [X],
        {"t": (1, 9), "s": (1, T), "u": (1, 7), "w": (1, D)},
    ),
    "contrastive": (
        contrastive, {"a": shape(D, 7), "b": shape(D, 7), "t": shape()}, [X, X],
        {"a": (1, 1), "b": (1, 1), "t": ()},
    ),
    "state space": (
        state_space,
        {"in": shape(D, 16), "conv": shape(4, 1, 16), "dt": shape(16, 16), "bias": shape(16),
         "b": shape(16, 3), "c": shape(16, 3), "a": shape(16, 3), "d": shape(16),
         "out": shape(16, D)}, [X],
        {"in": (1, 16), "conv": (1, 1, 16), "dt": (1, 16), "bias": (16,), "b": (1, 3), "c": (1, 3),
         "a": (1, 1), "d": (1,), "out": (1, D)},
    ),
    "vision transformer": (
        vision_transformer,
        {**DENSE, "patch": shape(4, 4, 3, D), "cls": shape(1, 1, D), "head": shape(D, 5)},
        [shape(B, 8, 8, 3)],
        {**DENSE_GRIDS, "patch": (1, 1, 1, D), "cls": (1, 1, D), "head": (1, 5)},
    ),
    "convolutions": (
        convolutions,
        {"first": shape(3, 3, 3, 8), "depthwise": shape(3, 3, 1, 8), "grouped": shape(3, 3, 4, 6),
         "up": shape(2, 2, 6, 5), "gain": shape(5)}, [shape(B, 8, 8, 3)],
        {"first": (1, 1, 1, 8), "depthwise": (1, 1, 1, 8), "grouped": (1, 1, 1, 6),
         "up": (1, 1, 1, 5), "gain": (1,)},
    ),
    "scan and remat": (
        scanned, {name: shape(3, *p.shape) for name, p in DENSE.items()}, [X],
        {name: (3, *grid) for name, grid in DENSE_GRIDS.items()},
    ),
    "embedding into a scan": (
        lambda p, tokens: lax.scan(lambda x, w: (x @ w, None), p["e"][tokens], p["w"])[0],
        {"e": shape(V, D), "w": shape(3, D, D)}, [TOKENS], {"e": (V, 1), "w": (3, 1, D)},
    ),
    "one by one out of a stack": (
        lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2], {"w": shape(3, D, D)}, [X],
        {"w": (3, 1, D)},
    ),
    "iterated over": (
        lambda p, x: functools.reduce(jnp.matmul, p["w"], x), {"w": shape(3, D, D)}, [X],
        {"w": (3, 1, D)},
    ),
    "outputs iterated over": (
        lambda p, x: joined(attention(*jnp.moveaxis((x @ p["w"]).reshape(B, T, H, 3, N), 3, 0))),
        {"w": shape(D, 3 * D)}, [X], {"w": (1, 2 * H + D)},
    ),
    "branches": (
        branches, DENSE, [X, shape(dtype="bool")], {**DENSE_GRIDS, "q": (1, D)},
    ),
    "weight norm": (
        weight_norm, {"v": shape(D, 7), "g": shape(7)}, [X], {"v": (1, 7), "g": (7,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_OF_MODELS)
def test_model(name):
    fn, params, args, expected = TABLE_OF_MODELS[name]
    assert grids(fn, params, *args) == expected


@pytest.mark.parametrize("name", TABLE_OF_MODELS)
def test_gradient_free_wrappers_change_nothing(name):
    fn, params, args, expected = TABLE_OF_MODELS[name]

    def wrapped(p, *args):
        cast = jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), p)
        return jax.jit(jax.checkpoint(fn))(cast, *args)

    assert grids(wrapped, params, *args) == expected


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def test_custom_derivatives():
    fn = lambda p, x: straight_through(jax.nn.silu(x @ p["u"])) @ p["w"]
    params = {"u": shape(D, 7), "w": shape(7, 3)}
    assert grids(fn, params, X) == {"u": (1, 7), "w": (1, 3)}


def test_static_arguments_are_passed_as_they_are():
    def fn(p, x, *, train, activation):
        assert train is True
        return activation(x @ p["w"])

    assert grids(fn, {"w": shape(D, 7)}, X, train=True, activation=jax.nn.relu) == {"w": (1, 7)}


def test_data_may_be_closed_over():
    x = np.ones((3, D), np.float32)
    assert grids(lambda p: jnp.asarray(x) @ p["w"], {"w": shape(D, 7)}) == {"w": (1, 7)}


def call_back(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def opaque(p, x):
    return call_back(x @ p["lost"]) @ p["found"] + call_back(p["direct"])


OPAQUE = {"lost": shape(D, 7), "found": shape(7, 5), "direct": shape(5)}


def test_what_cannot_be_read_is_an_error_for_all_at_once():
    with pytest.raises(ValueError, match="cannot read") as error:
        infer_block_specs(opaque, OPAQUE, X)
    message = str(error.value)
    where = r"pure_callback at \S*test_dataflow.py:\d+"
    assert re.search(rf"lost \(32, 7\): goes into {where}", message)
    assert re.search(rf"direct \(5,\): goes into {where}", message)
    assert "found" not in message
    assert "overrides=[(pattern, spec)]" in message


def test_what_cannot_be_read_can_be_settled():
    settled = {"overrides": [("lost", per_neuron())], "unreadable": per_element()}
    assert grids(opaque, OPAQUE, X, **settled) == {"lost": (1, 7), "found": (1, 5), "direct": (5,)}
    specs = infer_block_specs(opaque, OPAQUE, X, **settled)
    assert (specs["lost"].unit, specs["lost"].note) == ("neuron", "override")
    cells = list(block_table(OPAQUE, specs).columns[2].cells)
    assert cells[:3] == [
        "5 elements x (1,) (unreadable)", "5 neurons x (7, 1)", "7 neurons x (32, 1) (override)",
    ]  # fmt: skip
    # An override stands above what was read, too.
    assert grids(opaque, OPAQUE, X, **settled | {"overrides": [("found", per_tensor())]})[
        "found"
    ] == (1, 1)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ p["w"],
        lambda p, x: x @ p["w"] + jnp.sum(p["lost"] ** 2) * 0,
        lambda p, x: x @ p["w"] + x @ np.ones((D, 5), "float32"),  # a model that was closed over
    ],
)
def test_a_parameter_that_meets_no_data_is_an_error(fn):
    params = {"w": shape(D, 5), "lost": shape(D, 5), "scalar": shape()}
    with pytest.raises(ValueError, match=r"cannot read .*\nlost \(32, 5\): meets no data in fn\n"):
        infer_block_specs(fn, params, X)
    settled = grids(fn, params, X, overrides=[("lost", per_neuron())])
    assert settled == {"w": (1, 5), "lost": (1, 5), "scalar": ()}


def test_override_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="override 'nothing'"):
        infer_block_specs(opaque, OPAQUE, X, overrides=[("nothing", per_tensor())])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"overrides": [("(", per_tensor())]}, ValueError, "is no regular expression"),
        ({"overrides": [("lost", 3)]}, TypeError, "'lost' must give a BlockSpec"),
        ({"overrides": ["lost"]}, TypeError, "is a pair"),
        ({"unreadable": "element"}, TypeError, "unreadable must be a BlockSpec"),
        ({"overrides": [("lost", per_neuron(axis=5))]}, ValueError, "^lost: .*axis 5"),
        ({"unreadable": per_neuron(axis=1)}, ValueError, "^direct: .*axis 1"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        infer_block_specs(opaque, OPAQUE, X, **options)


UNREAD = {
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), {"w": shape(D, 7)}, "sort"),
    "as the image": (
        lambda p, x: lax.conv_general_dilated(p["w"], x[:, :, :3], (1,), "SAME"),
        {"w": shape(1, T, 9)}, "conv_general_dilated",
    ),
    "pooled": (
        lambda p, x: x @ lax.reduce_window(p["w"], 0.0, lax.add, (1, 2), (1, 2), "SAME"),
        {"w": shape(D, 8)}, "reduce_window_sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_never_guessed(name):
    fn, params, primitive = UNREAD[name]
    with pytest.raises(ValueError, match=rf"w \(.*goes into {primitive} at"):
        infer_block_specs(fn, params, X)


def test_blocks_are_called_what_they_are():
    fn, params, args, _ = TABLE_OF_MODELS["tied language model"]
    specs = infer_block_specs(fn, params, *args)
    assert {name: spec.unit for name, spec in specs.items()} == {
        "q": "head", "k": "head", "v": "neuron", "o": "neuron", "e": "token", "pos": "token",
        "g": "tensor", "b": "element",
    }  # fmt: skip
    stacked = {"g": shape(3, D), "w": shape(3, D, D)}
    body = lambda x, p: (x * p["g"] @ p["w"], None)
    specs = infer_block_specs(lambda p, x: lax.scan(body, x, p)[0], stacked, X)
    assert (specs["g"].unit, specs["w"].unit) == ("tensor", "neuron")
    specs = infer_block_specs(fused, FUSED, X)
    assert [part.unit for _, part in specs["qkv"].cuts[0][1]] == ["head", "neuron"]


REPLICATED = P()


def on_devices(body, params, data=REPLICATED, out=REPLICATED, count=2, **options):
    mesh = jax.make_mesh((count,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(body, mesh=mesh, in_specs=(params, data), out_specs=out, **options)


def sharded_attention(p, x):
    """Its heads, and the hidden neurons, over the devices of axis i."""
    x += lax.psum(dense_attention_of(p, x), "i")
    return x + lax.psum(jax.nn.gelu(x @ p["up"]) @ p["down"], "i")


def dense_attention_of(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    q, k, v = (y.reshape(*y.shape[:-1], -1, N) for y in (q, k, v))
    return joined(attention(q, k, v)) @ p["o"]


SHARDED = {**DENSE, "up": shape(D, 16), "down": shape(16, D)}
SHARDED_GRIDS = {**DENSE_GRIDS, "up": (1, 16), "down": (1, D)}
SHARDED_SPECS = {"q": P(None, "i"), "k": P(None, "i"), "v": P(None, "i"), "o": P("i"),
                 "up": P(None, "i"), "down": P("i")}  # fmt: skip


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shard_map_over_heads_and_neurons(count, check_vma):
    fn = on_devices(sharded_attention, SHARDED_SPECS, count=count, check_vma=check_vma)
    assert grids(fn, SHARDED, X) == SHARDED_GRIDS


def test_shard_map_of_data_is_followed():
    fn = on_devices(lambda p, x: lax.pmean(jnp.mean(x @ p["w"]), "i"), P(), P("i"))
    assert grids(fn, {"w": shape(D, 8)}, X) == {"w": (1, 8)}


def gathered_positions(p, x):
    """Each device has a part of the sequence, and fetches the keys and values of all."""
    q, k, v = (heads(x @ p[name]) for name in "qkv")
    k, v = (lax.all_gather(y, "i", axis=1, tiled=True) for y in (k, v))
    return lax.pmean(joined(attention(q, k, v)) @ p["o"], "i")


def stacked_positions(p, x):
    q, k, v = (heads(x @ p[name]) for name in "qkv")
    k, v = (lax.all_gather(y, "i", axis=1).reshape(B, -1, H, N) for y in (k, v))
    return lax.pmean(joined(attention(q, k, v)) @ p["o"], "i")


@pytest.mark.parametrize("body", [gathered_positions, stacked_positions])
def test_shard_map_over_positions(body):
    fn = on_devices(body, P(), P(None, "i"))
    assert grids(fn, DENSE, X) == DENSE_GRIDS


def general_attention(p, x):
    q, k, v = (jnp.einsum("btd,dhn->bthn", x, p[name]) for name in "qkv")
    return lax.psum(jnp.einsum("bthn,hnd->btd", attention(q, k, v), p["o"]), "i")


@pytest.mark.parametrize("count", [2, 4])
def test_shard_map_of_one_head_for_each_device(count):
    heads_over = {"q": P(None, "i"), "k": P(None, "i"), "v": P(None, "i"), "o": P("i")}
    params = {**dict.fromkeys("qkv", shape(D, H, N)), "o": shape(H, N, D)}
    assert grids(on_devices(general_attention, heads_over, count=count), params, X) == {
        "q": (1, H, 1), "k": (1, H, 1), "v": (1, H, N), "o": (1, 1, D),
    }  # fmt: skip


UNREAD_ON_DEVICES = {
    "outputs that leave": (lambda w, x: x @ w, P(None, "i"), P(None, None, "i"), "unshard"),
    "gathered": (
        lambda w, x: lax.pmean(x @ lax.all_gather(w, "i", axis=1, tiled=True), "i"),
        P(None, "i"), P(), "all_gather",
    ),
    "outputs gathered": (
        lambda w, x: lax.pmean(lax.all_gather(x @ w, "i", axis=2, tiled=True), "i"),
        P(None, "i"), P(), "all_gather",
    ),
    "one of each, its axis dropped": (
        lambda w, x: lax.psum(jnp.tanh(x @ w.reshape(D, -1)), "i"), P(None, "i"), P(), "shard",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD_ON_DEVICES)
def test_what_shard_map_hides_is_an_error(name):
    body, cut, out, primitive = UNREAD_ON_DEVICES[name]
    sizes = (D, 2, 4) if "axis dropped" in name else (D, 8)
    fn = on_devices(lambda p, x: body(p["w"], x), {"w": cut}, out=out)
    with pytest.raises(ValueError, match=rf"w \(32, .*\): goes into {primitive} at"):
        infer_block_specs(fn, {"w": shape(*sizes)}, X)


CUDNN = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.fixture
def cudnn(monkeypatch):
    """To trace cuDNN's attention where it is not installed."""
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91300)


def by_cudnn(q, k, v):
    return jax.nn.dot_product_attention(
        *(x.astype("bfloat16") for x in (q, k, v)), is_causal=True, implementation="cudnn"
    )


@pytest.mark.usefixtures("cudnn")
def test_attention_of_cudnn():
    fn = lambda p, x: grouped(p, x, rotary_halves, by_cudnn)
    assert "dot_product_attention_fwd" in str(jax.make_jaxpr(fn)(GROUPED, X))
    assert grids(fn, GROUPED, X) == GROUPED_GRIDS
    source = pathlib.Path(__file__).read_text().splitlines()
    why = explain(fn, GROUPED, X, parameter="q")
    line = int(re.search(r"inner product at \S*test_dataflow.py:(\d+)", why)[1])
    assert "dot_product_attention" in source[line - 1]


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_attention_of_cudnn_with_a_bias_of_positions(layout):
    kernel = importlib.import_module(CUDNN).dot_product_attention

    def fn(p, x):
        q, k, v = (heads(x @ p[name]).astype("bfloat16") for name in "qkv")
        bias = p["r"].astype("bfloat16")
        if layout == "BNTH":
            q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
        out, _ = kernel(q, k, v, bias, qkv_layout=layout, return_residual=True)
        return joined(out if layout == "BTNH" else out.swapaxes(1, 2)) @ p["o"]

    expected = {**DENSE_GRIDS, "r": (1, H, T, T)}
    assert grids(fn, {**DENSE, "r": shape(1, H, T, T)}, X) == expected


def test_explain_names_uses_and_couplings():
    text = explain(dense_attention, DENSE, X, parameter="q")
    assert text.startswith("q (32, 32): 1 x 4 blocks\n")
    assert re.search(r"used in dot_general at \S*test_dataflow.py:\d+", text)
    source = pathlib.Path(__file__).read_text().splitlines()
    line = int(re.search(r"inner product at \S*test_dataflow.py:(\d+)", text)[1])
    assert "bthn,bshn->bhts" in source[line - 1]
    assert "inner product" not in explain(dense_attention, DENSE, X, parameter="v")
    with pytest.raises(ValueError, match="explain: parameter"):
        explain(dense_attention, DENSE, X, parameter="z")
