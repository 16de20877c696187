"""Attention: ways to mix, positions, and what is done to queries, keys and scores."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.partition.dataflow.models.parts import (
    DENSE,
    DENSE_GRIDS,
    GENERAL,
    GENERAL_GRIDS,
    B,
    D,
    H,
    N,
    T,
    X,
    attention,
    dense_attention,
    general_attention,
    heads,
    joined,
    layer_norm,
    mixing,
    rms_norm,
    shape,
    shapes,
    unit,
)

# --- ways to mix ----------------------------------------------------------------------------------


def scores_of(q, k):
    return jnp.einsum("bthn,bshn->bhts", q, k)


def mixed(weights, v):
    return jnp.einsum("bhts,bshn->bthn", weights, v)


def by_products(q, k, v):
    scores = (q[:, :, None] * k[:, None] * 0.3).sum(-1)
    return (jax.nn.softmax(scores, 2)[..., None] * v[:, None]).sum(2)


def by_tensordot(q, k, v):
    one = lambda q, k, v: jax.nn.softmax(jnp.tensordot(q, k, [[1], [1]])) @ v
    return jax.vmap(jax.vmap(one, 1, 1))(q, k, v)


def folded(q, k, v):
    """Heads are examples."""
    q, k, v = (y.swapaxes(1, 2).reshape(B * H, -1, N) for y in (q, k, v))
    y = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    return y.reshape(B, H, -1, N).swapaxes(1, 2)


def head_by_head(q, k, v):
    one = lambda h: jax.nn.softmax(q[:, :, h] @ k[:, :, h].swapaxes(1, 2)) @ v[:, :, h]
    return jnp.stack([one(h) for h in range(H)], 2)


def scanned_heads(q, k, v):
    step = lambda _, n: (None, jax.nn.softmax(jnp.einsum("btn,bsn->bts", n[0], n[1])) @ n[2])
    parts = [jnp.moveaxis(y, 2, 0) for y in (q, k, v)]
    return jnp.moveaxis(lax.scan(step, None, parts)[1], 0, 2)


def flash(q, k, v):
    """A few keys at a time, with the largest score so far."""

    def step(carry, part):
        largest, total, out = carry
        scores = scores_of(q, part[0])
        top = jnp.maximum(largest, lax.stop_gradient(scores.max(-1)))
        weights, scale = jnp.exp(scores - top[..., None]), jnp.exp(largest - top)
        out = out * scale[..., None] + mixed(weights, part[1]).swapaxes(1, 2)
        return (top, total * scale + weights.sum(-1), out), None

    parts = [jnp.moveaxis(y.reshape(B, 3, T // 3, H, N), 1, 0) for y in (k, v)]
    first = jnp.full((B, H, T), -jnp.inf), jnp.zeros((B, H, T)), jnp.zeros((B, H, T, N))
    (_, total, out), _ = lax.scan(jax.checkpoint(step, prevent_cse=False), first, parts)
    return (out / total[..., None]).swapaxes(1, 2)


def in_chunks(around):
    """Each query meets the keys of its chunk and of the one before."""

    def mix(q, k, v):
        q = q.reshape(B, 3, 2, H, N)
        scores = jnp.einsum("bcthn,bcshn->bchts", q, around(k))
        mask = jnp.arange(2)[:, None] + 2 >= jnp.arange(4)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        return jnp.einsum("bchts,bcshn->bcthn", weights, around(v)).reshape(B, T, H, N)

    return mix


def by_padding(x):
    x = jnp.pad(x.reshape(B, 3, 2, H, N), ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([x[:, :-1], x[:, 1:]], 2)


def by_rolling(x):
    x = x.reshape(B, 3, 2, H, N)
    return jnp.concatenate([jnp.roll(x, 1, 1), x], 2)


def by_windows(x):
    x = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0)))
    return x[:, jnp.arange(3)[:, None] * 2 + jnp.arange(4)]


def landmarks(q, k, v):
    few = lambda x: x.reshape(B, 2, T // 2, H, N).mean(2)
    left, right = jax.nn.softmax(scores_of(q, few(k))), jax.nn.softmax(scores_of(few(q), k))
    between = jax.nn.softmax(scores_of(few(q), few(k)))
    return jnp.einsum("bhtl,bhlm,bhms,bshn->bthn", left, between, right, v)


def decayed(q, k, v):
    """The scores are scaled by the distance, and not made positive."""
    t = jnp.arange(T)
    decay = jnp.where(t[:, None] >= t, (1 - 2.0 ** -jnp.arange(5.0, 9))[:, None, None], 0)
    scores = scores_of(q, k) * decay ** (t[:, None] - t)
    total = jnp.abs(lax.stop_gradient(scores)).sum(-1, keepdims=True)
    return mixed(scores / jnp.maximum(total, 1), v)


# --- mixtures in a state --------------------------------------------------------------------------


def linear(q, k, v):
    state = jnp.einsum("bthn,bthm->bhnm", jax.nn.elu(k) + 1, v)
    return jnp.einsum("bthn,bhnm->bthm", jax.nn.elu(q) + 1, state)


def linear_causal(q, k, v):
    state = jnp.cumsum(k[..., None] * v[..., None, :], axis=1)
    return (q[..., None] * state).sum(-2)


def delta_rule(q, k, v):
    def step(state, now):
        q, k, v = now
        error = v - jnp.einsum("bhkv,bhk->bhv", state, k)
        state = 0.9 * state + jnp.einsum("bhk,bhv->bhkv", k, error)
        return state, jnp.einsum("bhkv,bhk->bhv", state, q)

    parts = [jnp.moveaxis(y, 1, 0) for y in (q, rms_norm(k), v)]
    return jnp.moveaxis(lax.scan(step, jnp.zeros((B, H, N, N)), parts)[1], 0, 1)


MIXTURES = dict.fromkeys(DENSE, (1, D))


def performer(p, x, w):
    """Queries and keys are turned into features by data."""

    def features(y):
        y, size = jnp.einsum("bthn,rn->bthr", y, w), (y * y).sum(-1, keepdims=True)
        return jnp.exp(y - size / 2 - lax.stop_gradient(y.max(-1, keepdims=True))) + 1e-4

    def mix(q, k, v):
        q, k = features(q), features(k)
        y = jnp.einsum("bthr,bhrm->bthm", q, jnp.einsum("bthr,bthm->bhrm", k, v))
        return y / jnp.einsum("bthr,bhr->bth", q, k.sum(1))[..., None]

    return general_attention(p, x, mix=mix)


# --- positions ------------------------------------------------------------------------------------


def times(table):
    """Queries and keys times a table of positions."""

    def forward(p, x):
        scale = jnp.cos(table())[:, None, :]
        return general_attention(p, x, mix=lambda q, k, v: attention(q * scale, k * scale, v))

    return forward


def half_a_table():
    return jnp.arange(T)[:, None] * jnp.ones(N // 2)


def turned_by_angles(p, x, places=None):
    """The angles stand in both halves."""

    def turned(y):
        half = jnp.concatenate([-y[..., N // 2 :], y[..., : N // 2]], -1)
        at = jnp.arange(T) * 1.0 if places is None else places
        angles = at[:, None] * 10.0 ** -jnp.arange(N // 2)
        angles = jnp.concatenate([angles, angles], -1)[None, :, None, :]
        return y * jnp.cos(angles) + half * jnp.sin(angles)

    return dense_attention(p, x, lambda q, k, v: attention(turned(q), turned(k), v))


def turned_whole(p, x):
    """What is not turned is empty."""
    turned = lambda y: jnp.concatenate([y[..., :N] * 0.5, y[..., N:]], -1)
    return general_attention(p, x, mix=lambda q, k, v: attention(turned(q), turned(k), v))


def with_bias(bias):
    """What is added to the scores."""

    def forward(p, x):
        def mix(q, k, v):
            return mixed(jax.nn.softmax(scores_of(q, k) + bias(p)), v)

        return dense_attention(p, x, mix)

    return forward


DISTANCE = np.abs(np.arange(T)[:, None] - np.arange(T))
NEAR = np.minimum(DISTANCE, 4)


def slopes(p):
    return p["r"][:, None, None] * -DISTANCE


def chosen_by_dot(p):
    return lax.dot_general(p["r"], jax.nn.one_hot(NEAR, 5), (((1,), (2,)), ((), ())))


def chosen_by_iota(p):
    chosen = (lax.broadcasted_iota("int32", (5, 1, 1), 0) == NEAR[None]).astype("float32")
    return lax.dot_general(p["r"], chosen, (((1,), (0,)), ((), ())))


def of_a_net(p):
    coordinates = np.sign(DISTANCE)[..., None] * np.log1p(DISTANCE)[..., None].astype("float32")
    return 16 * jax.nn.sigmoid((jax.nn.relu(coordinates @ p["u"]) @ p["w"]).transpose(2, 0, 1))


def relative_positions(p, x):
    """Kernels of positions, whose scores are shifted, and what is added to queries."""

    def shifted(y):
        b, h, t, r = y.shape
        y = jnp.pad(y, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(b, h, r + 1, t)
        return y[:, :, 1:].reshape(b, h, t, r)[..., : r // 2 + 1]

    angles = jnp.arange(T - 1, -T, -1.0)[:, None] * 10.0 ** -jnp.arange(0, 2, 2 / (D // 2))
    places = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    r = jnp.einsum("rd,dhn->rhn", places, p["r"])

    def mix(q, k, v):
        near = shifted(jnp.einsum("bthn,rhn->bhtr", q + p["c"], r))
        return mixed(jax.nn.softmax(scores_of(q + p["b"], k) + near), v)

    return general_attention(p, x, mix=mix)


def cross_attention(p, x, y):
    q, k, v = heads(x @ p["q"]), heads(y @ p["k"]), heads(y @ p["v"])
    scores = scores_of(q, k) + p["r"][TABLE].transpose(2, 0, 1)
    return joined(mixed(jax.nn.softmax(scores), v)) @ p["o"]


TABLE = np.abs(np.arange(T)[:, None] - np.arange(T)) % 5


# --- what is done to queries, keys, scores and outputs --------------------------------------------


def normed(norm):
    def forward(p, x):
        q, k = norm(x @ p["q"], p["g"]), norm(x @ p["k"], p["h"])
        return joined(attention(q, k, heads(x @ p["v"]))) @ p["o"]

    return forward


def cosine(y, gain):
    y = heads(y)
    return y / (jnp.linalg.norm(y, axis=-1, keepdims=True) + 1e-6) * jnp.exp(jnp.minimum(gain, 4.6))


def gain_by_einsum(p, x):
    mix = lambda q, k, v: attention(jnp.einsum("bthn,n->bthn", q, p["g"]), k, v)
    return general_attention(p, x, mix=mix)


def talking(p, x):
    def mix(q, k, v):
        scores = jnp.einsum("bhts,hg->bgts", scores_of(q, k), p["u"])
        return mixed(jnp.einsum("bhts,hg->bgts", jax.nn.softmax(scores), p["w"]), v)

    return dense_attention(p, x, mix)


def sink(p, x):
    def mix(q, k, v):
        none = jnp.broadcast_to(p["s"][None, :, None, None], (B, H, T, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores_of(q, k), none], -1))
        return mixed(weights[..., :-1], v)

    return dense_attention(p, x, mix)


def gated(p, x):
    mix = lambda q, k, v: attention(q, k, v) * jax.nn.sigmoid(x @ p["gate"])[..., None]
    return dense_attention(p, x, mix)


def temperature(p, x):
    return dense_attention(p, x, lambda q, k, v: attention(q * jnp.exp(p["s"])[:, None], k, v))


def shared_key(p, x):
    """The query, normalised, is the key."""
    q, v = heads(x @ p["q"]), heads(x @ p["v"])
    return joined(attention(q, unit(q), v)) @ p["o"]


def masked(p, x, left, right):
    mask = jnp.concatenate([left, right], 1)[:, :, None, None]
    return general_attention(p, x, mix=lambda q, k, v: attention(q * mask, k, v))


def by_distance(p, x):
    """Queries and keys of points in space, which data turns."""
    q, k = (heads(x @ p[name]).reshape(B, T, H, -1, 2) for name in "qk")
    angles = x[..., :4].reshape(B, T, 2, 2)
    q, k = (jnp.einsum("btij,bthpj->bthpi", angles, y) for y in (q, k))
    distance = ((q[:, :, None] - k[:, None]) ** 2).sum((-1, -2))
    weights = jax.nn.softmax(-distance * jax.nn.softplus(p["s"]), 2)
    return joined(jnp.einsum("btsh,bshn->bthn", weights, heads(x @ p["v"]))) @ p["o"]


MODELS = {
    "dense": (dense_attention, DENSE, [X], DENSE_GRIDS),
    "general": (general_attention, GENERAL, [X], GENERAL_GRIDS),
    "jit and vmap": (
        lambda p, x: jax.vmap(lambda x: jax.jit(dense_attention)(p, x[None])[0])(x),
        DENSE, [X], DENSE_GRIDS,
    ),
    "one position of one example": (dense_attention, DENSE, [shape(1, 1, D)], DENSE_GRIDS),
    "summed by hand": (mixing(by_products), DENSE, [X], DENSE_GRIDS),
    "tensordot": (mixing(by_tensordot), DENSE, [X], DENSE_GRIDS),
    "heads among examples": (mixing(folded), DENSE, [X], DENSE_GRIDS),
    "head by head": (mixing(head_by_head), DENSE, [X], DENSE_GRIDS),
    "heads in a scan": (mixing(scanned_heads), DENSE, [X], DENSE_GRIDS),
    "keys in a scan": (mixing(flash), DENSE, [X], DENSE_GRIDS),
    "chunks, padded": (mixing(in_chunks(by_padding)), DENSE, [X], DENSE_GRIDS),
    "chunks, rolled": (mixing(in_chunks(by_rolling)), DENSE, [X], DENSE_GRIDS),
    "chunks, gathered": (mixing(in_chunks(by_windows)), DENSE, [X], DENSE_GRIDS),
    "landmarks": (mixing(landmarks), DENSE, [X], DENSE_GRIDS),
    "decay": (mixing(decayed), DENSE, [X], DENSE_GRIDS),
    "outputs iterated over": (
        lambda p, x: joined(attention(*jnp.moveaxis((x @ p["w"]).reshape(B, T, H, 3, N), 3, 0))),
        shapes(w=(D, 3 * D)), [X], {"w": (1, 2 * H + D)},
    ),
    "positions, padded": (
        times(lambda: jnp.pad(half_a_table(), ((0, 0), (0, N // 2)))), GENERAL, [X], GENERAL_GRIDS,
    ),
    "positions, concatenated": (
        times(lambda: jnp.concatenate([half_a_table()] * 2, -1)), GENERAL, [X], GENERAL_GRIDS,
    ),
    "positions, written": (
        times(lambda: jnp.zeros((T, N)).at[:, : N // 2].set(half_a_table())), GENERAL, [X],
        GENERAL_GRIDS,
    ),
    "angles in both halves": (turned_by_angles, DENSE, [X], DENSE_GRIDS),
    "angles of data": (turned_by_angles, DENSE, [X, shape(T)], DENSE_GRIDS),
    "turned whole": (turned_whole, GENERAL, [X], GENERAL_GRIDS),
    "slopes": (with_bias(slopes), {**DENSE, "r": shape(H)}, [X], {**DENSE_GRIDS, "r": (H,)}),
    "bias by gather": (
        with_bias(lambda p: p["r"][NEAR].transpose(2, 0, 1)), {**DENSE, "r": shape(5, H)}, [X],
        {**DENSE_GRIDS, "r": (5, 1)},
    ),
    "bias by take": (
        with_bias(lambda p: jnp.take(p["r"], NEAR, axis=1)), {**DENSE, "r": shape(H, 5)}, [X],
        {**DENSE_GRIDS, "r": (1, 5)},
    ),
    "bias by one-hot": (
        with_bias(chosen_by_dot), {**DENSE, "r": shape(H, 5)}, [X], {**DENSE_GRIDS, "r": (1, 5)},
    ),
    "bias by iota": (
        with_bias(chosen_by_iota), {**DENSE, "r": shape(H, 5)}, [X], {**DENSE_GRIDS, "r": (1, 5)},
    ),
    "bias of a net": (
        with_bias(of_a_net), {**DENSE, **shapes(u=(1, 7), w=(7, H))}, [X],
        {**DENSE_GRIDS, "u": (1, 7), "w": (1, H)},
    ),
    "cross-attention": (
        cross_attention, {**DENSE, "r": shape(5, H)}, [X, X], {**DENSE_GRIDS, "r": (5, 1)},
    ),
    "norm of the width": (
        normed(lambda y, g: heads(rms_norm(y) * g)), {**DENSE, **shapes(g=(D,), h=(D,))}, [X],
        {**DENSE_GRIDS, "g": (1,), "h": (1,)},
    ),
    "gain of each head": (
        normed(lambda y, g: layer_norm(heads(y)) * g), {**DENSE, **shapes(g=(H, N), h=(H, N))},
        [X], {**DENSE_GRIDS, "g": (1, 1), "h": (1, 1)},
    ),
    "cosine": (
        normed(cosine), {**DENSE, **shapes(g=(H, 1), h=(H, 1))}, [X],
        {**DENSE_GRIDS, "g": (1, 1), "h": (1, 1)},
    ),
    "gain by einsum, of queries": (
        gain_by_einsum, {**GENERAL, "g": shape(N)}, [X], {**GENERAL_GRIDS, "g": (1,)},
    ),
    "talking heads": (
        talking, {**DENSE, **shapes(u=(H, H), w=(H, H))}, [X],
        {**DENSE_GRIDS, "u": (1, H), "w": (1, H)},
    ),
    "sink": (sink, {**DENSE, "s": shape(H)}, [X], {**DENSE_GRIDS, "s": (H,)}),
    "gated": (gated, {**DENSE, "gate": shape(D, H)}, [X], {**DENSE_GRIDS, "gate": (1, H)}),
    "temperature": (temperature, {**DENSE, "s": shape(H)}, [X], {**DENSE_GRIDS, "s": (1,)}),
    "query and key in one": (
        shared_key, shapes(q=(D, D), v=(D, D), o=(D, D)), [X],
        {"q": (1, H), "v": (1, D), "o": (1, D)},
    ),
    "mask of two arrays": (masked, GENERAL, [X, shape(B, 2), shape(B, 4)], GENERAL_GRIDS),
    "linear attention": (mixing(linear), DENSE, [X], MIXTURES),
    "linear attention, causal": (mixing(linear_causal), DENSE, [X], MIXTURES),
    "delta rule": (mixing(delta_rule), DENSE, [X], MIXTURES),
    "random features": (
        performer, GENERAL, [X, shape(5, N)], {"v": (1, H, N), "o": (1, 1, D)},
    ),
}  # fmt: skip

FINER = {
    # The positions are known numbers, which are different for each input.
    "relative positions": (
        relative_positions, {**GENERAL, **shapes(r=(D, H, N), b=(H, N), c=(H, N))}, [X],
        {**GENERAL_GRIDS, "r": (1, H, 1), "b": (H, N), "c": (H, N)}, {"r": (D, H, 1)},
    ),
    # A distance is a sum of squares, of one coordinate each, and no inner product.
    "points in space": (
        by_distance, {**DENSE, "s": shape(H)}, [X], {**DENSE_GRIDS, "s": (1,)},
        {"q": (1, D), "k": (1, D)},
    ),
}  # fmt: skip
