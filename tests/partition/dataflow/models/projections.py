"""What makes queries, keys and values, and the layers around attention."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.partition.dataflow.models.attentions import mixed, scores_of
from tests.partition.dataflow.models.parts import (
    DENSE,
    DENSE_GRIDS,
    GENERAL,
    GENERAL_GRIDS,
    TOKENS,
    B,
    D,
    H,
    K,
    N,
    T,
    V,
    X,
    attention,
    conv,
    dense_attention,
    each,
    general_attention,
    heads,
    joined,
    layer_norm,
    named,
    rms_norm,
    rotary_halves,
    rotary_pairs,
    shape,
    shapes,
    stacked,
    under,
)

# --- several in one kernel ------------------------------------------------------------------------


def multi_query(p, x):
    q, k, v = heads(x @ p["q"]), x @ p["k"], x @ p["v"]
    scores = jax.nn.softmax(jnp.einsum("bthn,bsn->bhts", q, k))
    return joined(jnp.einsum("bhts,bsn->bthn", scores, v)) @ p["o"]


def fused(p, x):
    return joined(attention(*map(heads, jnp.split(x @ p["qkv"] + p["b"], 3, -1)))) @ p["o"]


def fused_interleaved(p, x):
    qkv = (x @ p["qkv"] + p["b"]).reshape(B, T, H, 3, N)
    return joined(attention(*(qkv[..., i, :] for i in range(3)))) @ p["o"]


def fused_interleaved_split(p, x):
    return joined(attention(*jnp.split(heads(x @ p["qkv"] + p["b"]), 3, -1))) @ p["o"]


def fused_taken(p, x):
    qkv = (x @ p["qkv"] + p["b"]).reshape(B, T, 3, H, N)
    return joined(attention(*(jnp.take(qkv, i, axis=2) for i in range(3)))) @ p["o"]


def fused_sliced(p, x):
    qkv = jnp.einsum("btd,dhn->bthn", x, p["qkv"])
    q, k, v = (lax.dynamic_slice_in_dim(qkv, i * N, N, axis=-1) for i in range(3))
    return jnp.einsum("bthn,hnd->btd", attention(q, k, v), p["o"])


FUSED = {"qkv": shape(D, 3 * D), "b": shape(3 * D), "o": shape(D, D)}
FUSED_GRIDS = {"qkv": (1, 2 * H + D), "b": (3 * D,), "o": (1, D)}
INTERLEAVED_GRIDS = {**FUSED_GRIDS, "qkv": (1, H * (2 + N))}


def keys_and_values(p, x):
    """Both in one kernel, whose first axis says which."""
    q = jnp.einsum("btd,hdn->bthn", x, p["q"])
    k, v = jnp.einsum("btd,ckdn->cbtkn", x, p["kv"])
    scores = jnp.einsum("btkgn,bskn->bkgts", q.reshape(B, T, K, H // K, N), k)
    weights = jax.nn.softmax(jnp.tanh(scores / 50) * 50)
    y = jnp.einsum("bkgts,bskn->btkgn", weights, v).reshape(B, T, H, N)
    return jnp.einsum("bthn,hnd->btd", y, p["o"])


def parallel(p, x):
    """One kernel for queries, the only key, the only value, and both halves of the hidden layer."""
    y = rms_norm(x) * p["g"]
    q, k, v, u, gate = jnp.split(y @ p["w"], [D, D + N, D + 2 * N, D + 2 * N + 12], -1)
    scores = jnp.einsum(
        "bthn,bsn->bhts", rotary_pairs(heads(q)), rotary_pairs(k[:, :, None])[:, :, 0]
    )
    y = jnp.einsum("bhts,bsn->bthn", jax.nn.softmax(scores), v)
    return x + jnp.concatenate([joined(y), u * jax.nn.silu(gate)], -1) @ p["o"]


def fused_partly_turned(p, x):
    """Head by head, with positions in a part of each head, beside a hidden layer."""

    def turned(y):
        turn, rest = y[..., : N // 2], y[..., N // 2 :]
        return jnp.concatenate([rotary_halves(turn), rest], -1)

    q, k, v = jnp.split(heads(layer_norm(x) @ p["qkv"] + p["b"]), 3, -1)
    y = joined(attention(turned(q), turned(k), v)) @ p["o"]
    return x + y + jax.nn.gelu(layer_norm(x) @ p["u"]) @ p["w"]


def scanned_layers(p, x):
    """Saved by name, with gains by einsum, and two kernels in one."""

    def norm(x, gain):
        return jnp.einsum("...d,d->...d", rms_norm(x), gain)

    def layer(x, p):
        q, k, v = (
            checkpoint_name(jnp.einsum("btd,dhn->bthn", norm(x, p["g"]), p[name]), name)
            for name in "qkv"
        )
        x = x + checkpoint_name(jnp.einsum("bthn,hnd->btd", attention(q, k, v), p["o"]), "o")
        y = jnp.einsum("btd,dif->btif", norm(x, p["h"]), p["u"])
        a, b = (jnp.squeeze(part, -2) for part in jnp.split(y, 2, -2))
        return x + checkpoint_name((jax.nn.silu(a) * b) @ p["w"], "w"), None

    policy = jax.checkpoint_policies.save_only_these_names("q", "o")
    return lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, p)[0]


LAYER = {**GENERAL, **shapes(g=(D,), h=(D,), u=(D, 2, 12), w=(12, D))}
LAYER_GRIDS = {**GENERAL_GRIDS, "g": (1,), "h": (1,), "u": (1, 2, 12), "w": (1, D)}


# --- keys and values that are made otherwise ------------------------------------------------------


def latent_attention(p, x):
    c = layer_norm(x @ p["down"])
    q, k, v = (
        jnp.einsum("btd,dhn->bthn", a, p[name]) for a, name in ((x, "q"), (c, "k"), (c, "v"))
    )
    return jnp.einsum("bthn,hnd->btd", attention(q, k, v), p["o"])


def latent_attention_turned(p, x):
    """Keys and values of fewer numbers, and a part of the keys that all heads share."""
    q = (rms_norm(x @ p["q"]) * p["g"] @ p["q2"]).reshape(B, T, H, 12)
    c, shared = jnp.split(x @ p["c"], [9], -1)
    k, v = jnp.split((rms_norm(c) * p["h"] @ p["kv"]).reshape(B, T, H, 13), [8], -1)
    shared = jnp.broadcast_to(rotary_halves(shared[:, :, None]), (B, T, H, 4))
    q = jnp.concatenate([q[..., :8], rotary_halves(q[..., 8:])], -1)
    return joined(attention(q, jnp.concatenate([k, shared], -1), v)) @ p["o"]


def latent_attention_absorbed(p, x):
    """Scores are made of the latent numbers."""
    c = jnp.tanh(x @ p["c"])
    q = jnp.einsum("btd,dhn,rhn->bthr", x, p["q"], p["k"])
    weights = jax.nn.softmax(jnp.einsum("bthr,bsr->bhts", q, c))
    y = jnp.einsum("bhts,bsr->bthr", weights, c)
    return jnp.einsum("bthr,rhn,hnd->btd", y, p["v"], p["o"])


def shared_part(p, x):
    q, k, v = (jnp.einsum("btd,dhn->bthn", x, p[name]) for name in "qkv")
    shared = jnp.broadcast_to((x @ p["shared"])[:, :, None, :], (B, T, H, 2))
    weights = jax.nn.softmax(scores_of(q, jnp.concatenate([k, shared], -1)))
    return jnp.einsum("bhts,bshn,hnd->btd", weights, v, p["o"])


def fewer_positions(low):
    """Keys and values of mixtures of positions."""

    def forward(p, x):
        mix = lambda q, k, v: attention(q, low(k, p["k2"]), low(v, p["v2"]))
        return general_attention(p, x, mix=mix)

    return forward


def fewer_positions_shared(p, x):
    low = lambda y: jnp.einsum("bthn,tr->brhn", y, p["low"])
    return general_attention(p, x, mix=lambda q, k, v: attention(q, low(k), low(v)))


def mixed_positions(p, x):
    return general_attention(p, jnp.einsum("btd,tn->bnd", x, p["mix"]))


def heads_as_examples(p, x):
    """Heads are folded into the examples, and then positions."""
    y = heads(x @ p["first"]).transpose(0, 2, 1, 3).reshape(B * H, T, N)
    y = joined(jnp.tanh(y).reshape(B, H, T, N).transpose(0, 2, 1, 3))
    y = (y.reshape(B * T, D) * 2).reshape(B, T, D)
    return dense_attention(p, y)


# --- queries that are parameters ------------------------------------------------------------------


READ = {**named("cross_", GENERAL), **named("self_", GENERAL)}
READ_GRIDS = {**named("cross_", GENERAL_GRIDS), **named("self_", GENERAL_GRIDS)}


def learned_queries(p, x):
    y = jnp.broadcast_to(p["y"], (B, *p["y"].shape))
    y = y + general_attention(under("cross_", p), y, x)
    return y + general_attention(under("self_", p), y, y)


def learned_queries_normed(p, x):
    """They attend to one another before they meet data."""
    y = layer_norm(jnp.repeat(p["y"][None], B, 0)) * p["g"] + p["b"]
    for _ in range(2):
        y = y + general_attention(under("self_", p), y, y)
        y = y + general_attention(under("cross_", p), y, x)
        y = y + jax.nn.gelu(y @ p["u"]) @ p["w"]
    return y


def inducing_points(p, x):
    for _ in range(2):
        y = jnp.broadcast_to(p["y"], (B, *p["y"].shape)) * p["g"] + p["b"]
        y = general_attention(under("cross_", p), y, x)
        x = x + general_attention(under("self_", p), x, y)
    return x


def queries_of_zeros(p, x):
    y = jnp.zeros((B, 5, D)) + p["b"]
    q, k = (jnp.einsum("bnd,dhk->bnhk", y + p["y"], p[name]) for name in "qk")
    y = attention(q, k, jnp.einsum("bnd,dhk->bnhk", y, p["v"]))
    return jnp.einsum("bnhk,hkd,btd->bnt", y, p["o"], x @ p["w"])


def pooled(p, x):
    """A few queries read everything."""
    y = jnp.broadcast_to(p["y"], (B, *p["y"].shape))
    q = jnp.einsum("bnd,dhk->bnhk", y, p["q"]) + p["b"]
    k, v = (jnp.einsum("bmd,dhk->bmhk", x, p[name]) for name in "kv")
    return jnp.einsum("bthn,hnd->btd", attention(q, k, v), p["o"])


def resampled(p, x):
    """What is read is written into a stream, times a number that starts at nothing."""
    y = jnp.broadcast_to(p["y"], (B, *p["y"].shape))
    y = y + general_attention(under("cross_", p), y, jnp.concatenate([x, y], 1))
    x = x + jnp.tanh(p["s"]) * general_attention(under("self_", p), x, y)
    return x + jnp.tanh(p["t"]) * (jax.nn.relu(x @ p["u"]) @ p["w"])


# --- windows of images ----------------------------------------------------------------------------


def windows(p, image):
    """Shifted, with a table by place in the window, and one of four places merged."""
    x = jnp.roll(image, (-1, -1), (1, 2))
    x = x.reshape(B, 2, 2, 2, 2, D).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, D)
    q, k, v = (x @ p["qkv"] + p["b"]).reshape(-1, 4, 3, H, N).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-2, -1) + p["r"][(np.arange(4)[:, None] - np.arange(4)) % 7].transpose(
        2, 0, 1
    )
    mask = np.where(np.arange(16).reshape(4, 1, 4, 1) % 3 == 0, -100.0, 0.0).astype("float32")
    scores = (scores.reshape(B, 4, H, 4, 4) + mask[None]).reshape(-1, H, 4, 4)
    x = joined((jax.nn.softmax(scores) @ v).swapaxes(1, 2)) @ p["o"]
    x = x.reshape(B, 2, 2, 2, 2, D).transpose(0, 1, 3, 2, 4, 5).reshape(B, 4, 4, D)
    x = image + jnp.roll(x, (1, 1), (1, 2))
    parts = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
    return jnp.concatenate(parts, -1) @ p["w"]


def vision_transformer(p, image):
    x = conv(image, p["patch"], 4, "VALID").reshape(B, -1, D)
    x = jnp.concatenate([jnp.broadcast_to(p["cls"], (B, 1, D)), x], 1)
    return (x + dense_attention(p, x))[:, 0] @ p["head"]


def modulated(p, x, c):
    """Gains, biases and gates are made of data."""
    shift, gain, gate = jnp.split(jax.nn.silu(c) @ p["m"], 3, -1)
    y = layer_norm(x) * (1 + gain[:, None]) + shift[:, None]
    return x + gate[:, None] * dense_attention(p, y)


# --- of graphs, of pairs --------------------------------------------------------------------------


def graph_attention(p, x):
    h = jnp.einsum("if,fhn->ihn", x, p["w"])
    scores = jnp.einsum("ihn,hn->ih", h, p["a"])[:, None] + (h * p["b"]).sum(-1)[None]
    return jnp.einsum("ijh,jhn->ihn", jax.nn.softmax(jax.nn.leaky_relu(scores), 1), h)


def graph_attention_flat(p, x):
    h = heads(x @ p["w"])
    scores = (h * p["a"]).sum(-1)[:, None] + (h * p["b"]).sum(-1)[None]
    return jnp.einsum("ijh,jhn->ihn", jax.nn.softmax(jax.nn.leaky_relu(scores), 1), h)


def graph_attention_of_sums(p, x, sources, targets):
    left, right = (jnp.einsum("vd,dhn->vhn", x, p[name]) for name in ("left", "right"))
    scores = jnp.einsum("mhn,hn->mh", jax.nn.leaky_relu(left[sources] + right[targets]), p["a"])
    weights = jnp.exp(scores)
    weights = weights / jax.ops.segment_sum(weights, targets, 9)[targets]
    return joined(jax.ops.segment_sum(weights[..., None] * left[sources], targets, 9)) @ p["o"]


def triangle(p, x):
    """Pairs by way of a third, and pairs of an outer product."""
    y = layer_norm(x)
    pairs = jnp.einsum("bsi,bsj->bsij", y @ p["a"], y @ p["b"])
    z = layer_norm(pairs.mean(0).reshape(T, -1) @ p["c"])[:, None] + y[0]
    left = jax.nn.sigmoid(z @ p["u"]) * (z @ p["v"])
    right = jax.nn.sigmoid(z @ p["w"]) * (z @ p["y"])
    return jax.nn.sigmoid(z @ p["g"]) * (
        layer_norm(jnp.einsum("ikc,jkc->ijc", left, right)) @ p["o"]
    )


# --- a whole layer --------------------------------------------------------------------------------


def scanned(p, x):
    return lax.scan(jax.checkpoint(lambda x, p: (x + dense_attention(p, x), None)), x, p)[0]


def branches(p, x, flag):
    return lax.cond(flag, lambda x: dense_attention(p, x), lambda x: x @ p["q"], x)


def language_model(p, tokens, targets):
    h = p["e"][tokens] * np.sqrt(D) + p["pos"][jnp.arange(T)]
    h = h + dense_attention(p, layer_norm(h) * p["g"] + p["b"])
    return -(jax.nn.log_softmax(h @ p["e"].T) * jax.nn.one_hot(targets, V)).sum(-1).mean()


def one_hot_embedding(p, tokens):
    return dense_attention(p, jax.nn.one_hot(tokens, V) @ p["e"])


def registers(p, tokens):
    """Vectors of no position stand before the tokens."""
    x = jnp.concatenate([jnp.broadcast_to(p["r"], (B, 2, D)), p["e"][tokens]], 1)
    return dense_attention(p, x)[:, 2:]


def cached(p, x, keys, values, at):
    """The new ones are written among the old ones."""

    def mix(q, k, v):
        k = lax.dynamic_update_slice(keys, k, (0, at, 0, 0))
        v = lax.dynamic_update_slice_in_dim(values, v, at, axis=1)
        scores = jnp.where(jnp.arange(9) <= at + jnp.arange(T)[:, None], scores_of(q, k), -1e9)
        return mixed(jax.nn.softmax(scores), v)

    return general_attention(p, x, mix=mix)


def lora(p, x):
    q = x @ p["q"] + (x @ p["a"]) @ p["b"]
    return joined(attention(*map(heads, (q, x @ p["k"], x @ p["v"])))) @ p["o"]


def lora_merged(p, x):
    return dense_attention({**p, "q": p["q"] + 0.5 * p["a"] @ p["b"]}, x)


LORA = {**DENSE, "a": shape(D, 2), "b": shape(2, D)}
LORA_GRIDS = {**DENSE_GRIDS, "a": (1, 2), "b": (1, H)}


def kernel_used_in_parts(p, x, y):
    """The query of one stream, key and value of the other, each of the whole product."""
    q, k, v = (x @ p["qkv"])[..., :D], (y @ p["qkv"])[..., D : 2 * D], (y @ p["qkv"])[..., 2 * D :]
    return joined(attention(*map(heads, (q, k, v)))) @ p["o"]


MODELS = {
    "multi-query": (
        multi_query, shapes(q=(D, D), k=(D, N), v=(D, N), o=(D, D)), [X],
        {"q": (1, H), "k": (1, 1), "v": (1, N), "o": (1, D)},
    ),
    "fused": (fused, FUSED, [X], FUSED_GRIDS),
    "fused, interleaved": (fused_interleaved, FUSED, [X], FUSED_GRIDS),
    "fused, interleaved, split": (fused_interleaved_split, FUSED, [X], FUSED_GRIDS),
    "fused, taken": (fused_taken, FUSED, [X], FUSED_GRIDS),
    "fused, sliced": (
        fused_sliced, shapes(qkv=(D, H, 3 * N), o=(H, N, D)), [X],
        {"qkv": (1, H, 2 + N), "o": (1, 1, D)},
    ),
    "keys and values in one": (
        keys_and_values, shapes(q=(H, D, N), kv=(2, K, D, N), o=(H, N, D)), [X],
        {"q": (H, 1, 1), "kv": (2, K, 1, N), "o": (1, 1, D)},
    ),
    "parallel, multi-query": (
        parallel, shapes(g=(D,), w=(D, D + 2 * N + 24), o=(D + 12, D)), [X],
        {"g": (1,), "w": (1, H + 1 + N + 24), "o": (1, D)},
    ),
    "parallel, turned in part": (
        fused_partly_turned, {**FUSED, **shapes(u=(D, 12), w=(12, D))}, [X],
        {**FUSED_GRIDS, "qkv": (1, H * (2 + N)), "u": (1, 12), "w": (1, D)},
    ),
    "layers saved by name": (scanned_layers, stacked(LAYER), [X], each(LAYER_GRIDS)),
    "latent attention": (
        latent_attention, shapes(down=(D, 5), q=(D, H, N), k=(5, H, N), v=(5, H, N), o=(H, N, D)),
        [X], {"down": (1, 5), "q": (1, H, 1), "k": (1, H, 1), "v": (1, H, N), "o": (1, 1, D)},
    ),
    "latent attention, turned": (
        latent_attention_turned,
        shapes(q=(D, 7), g=(7,), q2=(7, H * 12), c=(D, 13), h=(9,), kv=(9, H * 13), o=(H * 5, D)),
        [X], {"q": (1, 7), "g": (1,), "q2": (1, H), "c": (1, 9 + 1), "h": (1,),
              "kv": (1, H * (1 + 5)), "o": (1, D)},
    ),
    "latent attention, absorbed": (
        latent_attention_absorbed,
        shapes(c=(D, 9), q=(D, H, N), k=(9, H, N), v=(9, H, 5), o=(H, 5, D)), [X],
        {"v": (1, H, 5), "o": (1, 1, D)},
    ),
    "keys that share a part": (
        shared_part, {**GENERAL, "q": shape(D, H, N + 2), "shared": shape(D, 2)}, [X],
        {**GENERAL_GRIDS, "shared": (1, 1)},
    ),
    "fewer positions": (
        fewer_positions(lambda y, w: jnp.einsum("bthn,tr->brhn", y, w)),
        {**GENERAL, **shapes(k2=(T, 3), v2=(T, 3))}, [X],
        {**GENERAL_GRIDS, "k2": (1, 3), "v2": (1, 3)},
    ),
    "fewer positions, by head": (
        fewer_positions(lambda y, w: jnp.einsum("bthn,htr->brhn", y, w)),
        {**GENERAL, **shapes(k2=(H, T, 3), v2=(H, T, 3))}, [X],
        {**GENERAL_GRIDS, "k2": (H, 1, 3), "v2": (H, 1, 3)},
    ),
    "fewer positions, shared": (
        fewer_positions_shared, {**GENERAL, "low": shape(T, 3)}, [X],
        {**GENERAL_GRIDS, "low": (1, 3)},
    ),
    "mixed positions": (
        mixed_positions, {**GENERAL, "mix": shape(T, 5)}, [X], {**GENERAL_GRIDS, "mix": (1, 5)},
    ),
    "heads and positions among examples": (
        heads_as_examples, {**DENSE, "first": shape(D, D)}, [X], {**DENSE_GRIDS, "first": (1, D)},
    ),
    "learned queries": (learned_queries, {"y": shape(5, D), **READ}, [X], READ_GRIDS),
    "learned queries, normed": (
        learned_queries_normed, {**READ, **shapes(y=(5, D), g=(D,), b=(D,), u=(D, 12), w=(12, D))},
        [X], {**READ_GRIDS, "u": (1, 12), "w": (1, D)},
    ),
    "queries of zeros": (
        queries_of_zeros, {**GENERAL, **shapes(b=(D,), y=(5, D), w=(D, D))}, [X],
        {"q": (1, H, 1), "k": (1, H, 1), "v": (1, H, N)},
    ),
    **{
        f"pooled by {count}": (
            pooled, {**GENERAL, **shapes(y=(count, D), b=(H, N))}, [X], GENERAL_GRIDS,
        )
        for count in (1, 3)
    },
    "resampled": (
        resampled, {**READ, **shapes(y=(3, D), s=(), t=(1,), u=(D, 12), w=(12, D))}, [X],
        {**READ_GRIDS, "s": (), "t": (1,), "u": (1, 12), "w": (1, D)},
    ),
    "windows": (
        windows, {**FUSED, **shapes(r=(7, H), w=(4 * D, 2 * D))}, [shape(B, 4, 4, D)],
        {**FUSED_GRIDS, "r": (7, 1), "w": (1, 2 * D)},
    ),
    "vision transformer": (
        vision_transformer, {**DENSE, **shapes(patch=(4, 4, 3, D), cls=(1, 1, D), head=(D, 5))},
        [shape(B, 8, 8, 3)],
        {**DENSE_GRIDS, "patch": (1, 1, 1, D), "cls": (1, 1, D), "head": (1, 5)},
    ),
    "modulated": (
        modulated, {**DENSE, "m": shape(7, 3 * D)}, [X, shape(B, 7)],
        {**DENSE_GRIDS, "m": (1, 3 * D)},
    ),
    "graph attention": (
        graph_attention, shapes(w=(D, H, N), a=(H, N), b=(H, N)), [shape(9, D)],
        {"w": (1, H, N), "a": (H, 1), "b": (H, 1)},
    ),
    "graph attention, flat": (
        graph_attention_flat, shapes(w=(D, D), a=(1, H, N), b=(H, N)), [shape(9, D)],
        {"w": (1, D), "a": (1, H, 1), "b": (H, 1)},
    ),
    "graph attention of sums": (
        graph_attention_of_sums, shapes(left=(D, H, N), right=(D, H, N), a=(H, N), o=(D, 5)),
        [shape(9, D), shape(15, dtype="int32"), shape(15, dtype="int32")],
        {"left": (1, H, N), "right": (1, H, N), "a": (H, 1), "o": (1, 5)},
    ),
    "triangle": (
        triangle,
        shapes(a=(D, 3), b=(D, 3), c=(9, D), **dict.fromkeys("uvwyg", (D, 5)), o=(5, 5)), [X],
        {"a": (1, 3), "b": (1, 3), "c": (1, D), **dict.fromkeys("uvwygo", (1, 5))},
    ),
    "LoRA": (lora, LORA, [X], LORA_GRIDS),
    "LoRA, merged": (lora_merged, LORA, [X], LORA_GRIDS),
    "tied language model": (
        language_model, {**DENSE, **shapes(e=(V, D), pos=(T, D), g=(D,), b=(D,))},
        [TOKENS, TOKENS], {**DENSE_GRIDS, "e": (V, 1), "pos": (T, 1), "g": (1,), "b": (D,)},
    ),
    "one-hot embedding": (
        one_hot_embedding, {**DENSE, "e": shape(V, D)}, [TOKENS], {**DENSE_GRIDS, "e": (V, 1)},
    ),
    "registers": (
        registers, {**DENSE, **shapes(e=(V, D), r=(2, D))}, [TOKENS],
        {**DENSE_GRIDS, "e": (V, 1), "r": (2, D)},
    ),
    "cached": (
        cached, GENERAL, [X, shape(B, 9, H, N), shape(B, 9, H, N), shape(dtype="int32")],
        GENERAL_GRIDS,
    ),
    "scan and remat": (scanned, stacked(DENSE), [X], each(DENSE_GRIDS)),
    "branches": (branches, DENSE, [X, shape(dtype="bool")], {**DENSE_GRIDS, "q": (1, D)}),
    "inducing points": (
        inducing_points, {**READ, **shapes(y=(5, D), g=(D,), b=(D,))}, [X], READ_GRIDS,
    ),
    "product made for each part": (
        kernel_used_in_parts, {k: FUSED[k] for k in ("qkv", "o")}, [X, X],
        {"qkv": (1, 2 * H + D), "o": (1, D)},
    ),
}  # fmt: skip
