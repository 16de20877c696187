"""One function, written in several ways, has the same blocks, rows and columns in each."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from optax_adam_mini import infer_block_specs, infer_muon_dimension_numbers
from tests.partition.dataflow.models.parts import (
    DENSE,
    ROWS,
    TOKENS,
    B,
    D,
    F,
    H,
    N,
    T,
    V,
    X,
    attention,
    conv,
    heads,
    joined,
    rms_norm,
    rotary_halves,
    rotary_pairs,
    rotary_part_written,
    rotary_rotated,
    rotary_written,
    rotary_written_pairs,
    shape,
    shapes,
    stacked,
)

LAYER = shapes(g=(D,), u=(D, F), b=(F,), w=(F, D), qkv=(D, 3 * D), o=(D, D))
STACK = stacked(LAYER, 4)


def layer(p, x):
    q, k, v = map(heads, jnp.split(rms_norm(x) * p["g"] @ p["qkv"], 3, -1))
    x = x + joined(attention(q, k, v)) @ p["o"]
    return x + jax.nn.relu(x @ p["u"] + p["b"]) @ p["w"]


def in_turn(take):
    """Layers one after the other, each taken out of the stack by `take`."""

    def forward(p, x):
        for i in range(4):
            x = layer(jax.tree.map(functools.partial(take, i), p), x)
        return x

    return forward


def by_counter(p, x):
    at = lambda i: jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), p)
    return lax.fori_loop(0, 4, lambda i, x: layer(at(i), x), x)


LOOPS = {
    "scanned": lambda p, x: lax.scan(lambda x, p: (layer(p, x), None), x, p)[0],
    "by index": in_turn(lambda i, w: w[i]),
    "by take": in_turn(lambda i, w: jnp.take(w, i, axis=0)),
    "by split": in_turn(lambda i, w: jnp.squeeze(jnp.split(w, 4)[i], 0)),
    "by index_in_dim": in_turn(lambda i, w: lax.index_in_dim(w, i, keepdims=False)),
    "by dynamic_slice": in_turn(
        lambda i, w: lax.dynamic_slice_in_dim(w, jnp.int32(i), 1).reshape(w.shape[1:])
    ),
    "by a slice that is kept": in_turn(lambda i, w: w[i : i + 1].reshape(w.shape[1:])),
    "by counter": by_counter,
}

# Members of an ensemble, of one batch and of a batch each.
MLP = shapes(u=(3, D, F), v=(3, F, F), w=(3, F, 5))


def mlp(p, x):
    return jnp.tanh(jnp.tanh(x @ p["u"]) @ p["v"]) @ p["w"]


def scaled_mlp(p, x):
    x = rms_norm(p["e"][x]) * p["g"] @ p["u"]
    return jnp.tanh(rms_norm(p["n"] * x) * p["h"] + p["b"]) @ p["w"]


def members(one):
    return {
        "one by one": lambda p, x: jnp.stack(
            [one(jax.tree.map(operator.itemgetter(i), p), x) for i in range(3)]
        ),
        "vmap": lambda p, x: jax.vmap(one, (0, None))(p, x),
        "a batch for each": lambda p, x: jax.vmap(one)(p, jnp.stack([x, x, x])),
        "map": lambda p, x: lax.map(lambda p: one(p, x), p),
    }


MEMBERS = members(mlp)
SCALED = stacked(shapes(e=(V, D), g=(D,), u=(D, F), n=(), h=(F,), b=(F,), w=(F, 5)))


def by_switch(p, x):
    branches = [
        functools.partial(lambda i, x: mlp({k: p[k][i] for k in p}, x), i) for i in range(3)
    ]
    return lax.switch(jnp.argmax(x[0, :3]), branches, x)


def all_weighed(p, x):
    weights = jax.nn.one_hot(jnp.argmax(x[0, :3]), 3)
    y = jnp.tanh(jnp.einsum("bd,edf->ebf", x, p["u"]))
    y = jnp.tanh(jnp.einsum("ebf,efg->ebg", y, p["v"]))
    return jnp.einsum("ebg,ego,e->bo", y, p["w"], weights)


EXPERTS = {
    "by switch": by_switch,
    "by einsum": all_weighed,
    "by index": lambda p, x: mlp(jax.tree.map(operator.itemgetter(jnp.argmax(x[0, :3])), p), x),
}


# Experts with biases and gains, one of which an index chooses.
BIASED = stacked(shapes(u=(D, F), b=(F,), g=(F,), v=(F, 5)))


def biased(p, x):
    return jnp.tanh(x @ p["u"] + p["b"]) * p["g"] @ p["v"]


def all_of(take):
    """All experts, each taken by its index."""
    return lambda p, x: jax.vmap(lambda i: biased(take(p, i), x))(jnp.arange(3))


def one_of(take):
    """The expert that the first example chooses; `take` computes the index, for each leaf anew."""
    return lambda p, x: biased(
        jax.tree.map(functools.partial(take, lambda: jnp.argmax(x[0, :3])), p), x
    )


CHOSEN = {
    "all in a loop": lambda p, x: [biased({k: p[k][i] for k in p}, x) for i in range(3)],
    "all by vmap": lambda p, x: jax.vmap(biased, (0, None))(p, x),
    "all by index": all_of(lambda p, i: jax.tree.map(lambda w: w[i], p)),
    "all in another order": lambda p, x: lax.map(
        lambda p: biased(p, x), jax.tree.map(lambda w: w[np.array([2, 0, 1])], p)
    ),
    "one by index": one_of(lambda i, w: w[i()]),
    "one by take": one_of(lambda i, w: jnp.take(w, i(), axis=0)),
    "one by dynamic_index": one_of(lambda i, w: lax.dynamic_index_in_dim(w, i(), keepdims=False)),
    "one by a one-hot vector": one_of(lambda i, w: jnp.tensordot(jax.nn.one_hot(i(), 3), w, 1)),
    "one for each example": lambda p, x: jax.vmap(
        lambda x: biased(jax.tree.map(lambda w: w[jnp.argmax(x[:3])], p), x)
    )(x),
}

# Several tables, each with an index of its own. There are more indices than the inference folds.
MANY = jax.ShapeDtypeStruct((1500, 3), jnp.int32)


def looked_up(rows):
    return lambda p, i: jnp.tanh(rows(p["e"], i).sum(1)) @ p["w"]


TABLES = {
    "a loop": looked_up(lambda e, i: jnp.stack([e[k][i[:, k]] for k in range(3)], 1)),
    "vmap": looked_up(lambda e, i: jax.vmap(lambda e, i: e[i], (0, 1), 1)(e, i)),
    "one-hot vectors": looked_up(
        lambda e, i: jnp.einsum("nev,evd->ned", jax.nn.one_hot(i, e.shape[1]), e)
    ),
    "two indices": looked_up(lambda e, i: e[jnp.arange(3), i]),
    "one index is a number": looked_up(
        lambda e, i: jnp.stack([e[k, i[:, k]] for k in range(3)], 1)
    ),
    "one index is a counter": looked_up(
        lambda e, i: lax.map(lambda k: e[k, i[:, k]], jnp.arange(3)).swapaxes(0, 1)
    ),
    "all tables, then one": looked_up(
        lambda e, i: jnp.stack([e[:, i[:, k]][k] for k in range(3)], 1)
    ),
    "two indices, turned": looked_up(
        lambda e, i: jnp.moveaxis(e[jnp.arange(3)[:, None], i.T], 0, 1)
    ),
    "two indices, the tables last": looked_up(lambda e, i: jnp.moveaxis(e, 0, 1)[i, jnp.arange(3)]),
    "take_along_axis": looked_up(
        lambda e, i: jnp.take_along_axis(e[None], i[:, :, None, None], 2)[:, :, 0]
    ),
}

# Products and their sums.
PRODUCTS = {
    "einsum": lambda q, k: jnp.einsum("bthn,bshn->bhts", q, k),
    "sum of a product": lambda q, k: (
        q.swapaxes(1, 2)[:, :, :, None] * k.swapaxes(1, 2)[:, :, None]
    ).sum(-1),
    "sum of a scaled product": lambda q, k: jnp.sum(
        q.transpose(0, 2, 1, 3)[:, :, :, None] / 3 * k.transpose(0, 2, 1, 3)[:, :, None], axis=-1
    ),
}


def with_sum(dot):
    return lambda p, x: dot(jax.nn.silu(x @ p["u"]) * (x @ p["v"]), p["w"])


SUMS = {
    "matmul": operator.matmul,
    "sum of a product": lambda h, w: (h[..., None] * w).sum(-2),
    "sum of a product, scaled": lambda h, w: (h[..., None] * w * 3).sum(-2),
}
WEIGHTED = {
    "einsum": lambda q, u, k: jnp.einsum("bthn,hn,bthn->bth", q, u, k),
    "sum of a product": lambda q, u, k: (q * k * u).sum(-1),
    "the parameter first": lambda q, u, k: (u * q * k).sum(-1),
    "a dot": lambda q, u, k: jnp.einsum("bthn,bthn->bth", q * u, k),
}


def with_weighted(score):
    """A score of each position with itself, weighted by a parameter."""
    return lambda p, x: score(heads(x @ p["q"]), p["u"], heads(x @ p["k"]))


# A state space model that runs over positions; the states of each channel are summed.
STATES = 3
READ = {
    "einsum": lambda h, c: jnp.einsum("bdn,dn->bd", h, c),
    "sum of a product": lambda h, c: (h * c).sum(-1),
    "one by one": jax.vmap(jax.vmap(jnp.dot), (0, None)),
}


def over_positions(read):
    def forward(p, x):
        def step(h, x):
            h = jnp.exp(-jnp.exp(p["a"])) * h + x[..., None]
            return h, read(h, p["c"])

        y = lax.scan(step, jnp.zeros((B, F, STATES)), (x @ p["in"]).swapaxes(0, 1))[1]
        return jax.nn.gelu(y) @ p["out"]

    return forward


def with_scores(scores):
    def forward(p, x):
        q, k, v = map(heads, jnp.split(x @ p["qkv"], 3, -1))
        return joined(jnp.einsum("bhts,bshn->bthn", jax.nn.softmax(scores(q, k)), v)) @ p["o"]

    return forward


# Query, key and value, put side by side and taken apart again.
TRIPLES = {
    "apart": lambda *qkv: qkv,
    "stacked": lambda *qkv: jnp.stack(qkv),
    "concatenated": lambda *qkv: jnp.moveaxis(
        jnp.concatenate(qkv, -1).reshape(B, T, H, 3, N), 3, 0
    ),
}


def attending(triple):
    return lambda p, x: joined(attention(*triple(*(heads(x @ p[name]) for name in "qkv")))) @ p["o"]


ROTATIONS = {
    "none": lambda y: y,
    "halves": rotary_halves,
    "rotated": rotary_rotated,
    "pairs": rotary_pairs,
    "written": rotary_written,
    "a part is written": rotary_part_written,
    "written pairs": rotary_written_pairs,
    "complex": lambda y: jnp.stack(
        [
            (z := lax.complex(y[..., ::2], y[..., 1::2]) * jnp.exp(1j * jnp.arange(T))[:, None, None])
            .real,
            z.imag,
        ],
        -1,
    ).reshape(y.shape),
}  # fmt: skip


def turned(rotate):
    def forward(p, x):
        q, k, v = map(heads, jnp.split(x @ p["qkv"], 3, -1))
        return joined(attention(rotate(q), rotate(k), v)) @ p["o"]

    return forward


# Convolutions of each channel.
TAPS = 4


def shifted(x, i):
    return jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :T]


def rolled(x, i):
    """By one place at a time."""
    for _ in range(i):
        x = jnp.roll(x, 1, 1)
    return x


def summed_in_a_loop(x, w):
    padded = jnp.pad(x, ((0, 0), (TAPS - 1, 0), (0, 0)))
    step = lambda i, y: y + lax.dynamic_slice_in_dim(padded, TAPS - 1 - i, T, 1) * w[i]
    return lax.fori_loop(0, TAPS, step, jnp.zeros_like(x))


def summed_in_a_scan(x, w):
    step = lambda carry, w: ((shifted(carry[0], 1), carry[1] + carry[0] * w), None)
    return lax.scan(step, (x, jnp.zeros_like(x)), w)[0][1]


def added_in_place(x, w):
    y = jnp.zeros_like(x)
    for i in range(TAPS):
        y = y.at[:, i:].add(x[:, : T - i] * w[i])
    return y


def summed_after_a_map(x, w):
    padded = jnp.pad(x, ((0, 0), (TAPS - 1, 0), (0, 0)))
    tap = lambda i, w: lax.dynamic_slice_in_dim(padded, TAPS - 1 - i, T, 1) * w
    return lax.map(lambda tapped: tap(*tapped), (jnp.arange(TAPS), w)).sum(0)


FILTERS = {
    "convolution": lambda x, w: conv(
        x, w[::-1, None], padding=[(TAPS - 1, 0)], feature_group_count=F
    ),
    "einsum": lambda x, w: jnp.einsum(
        "kbtd,kd->btd", jnp.stack([shifted(x, i) for i in range(TAPS)]), w
    ),
    "shifts": lambda x, w: sum(shifted(x, i) * w[i] for i in range(TAPS)),
    "rolls": lambda x, w: sum(jnp.roll(x, i, 1) * w[i] for i in range(TAPS)),
    "rolls of rolls": lambda x, w: sum(rolled(x, i) * w[i] for i in range(TAPS)),
    "a loop": summed_in_a_loop,
    "added in place": added_in_place,
    "a map": summed_after_a_map,
    "reshaped for each tap": lambda x, w: sum(
        shifted(x, i) * w.reshape(2, 2, F).reshape(TAPS, F)[i] for i in range(TAPS)
    ),
}
FINER_FILTERS = {"a scan": summed_in_a_scan}
# Convolutions from all channels to all.
CONVOLUTIONS = {
    "convolution": lambda x, w: conv(x, w[::-1], padding=[(TAPS - 1, 0)]),
    "einsum": lambda x, w: jnp.einsum(
        "kbtd,kdf->btf", jnp.stack([shifted(x, i) for i in range(TAPS)]), w
    ),
    "one kernel": lambda x, w: (
        jnp.concatenate([shifted(x, i) for i in range(TAPS)], -1) @ w.reshape(-1, w.shape[-1])
    ),
    "shifts": lambda x, w: sum(shifted(x, i) @ w[i] for i in range(TAPS)),
    "rolls": lambda x, w: sum(jnp.roll(x, i, 1) @ w[i] for i in range(TAPS)),
}


# A filter of each channel in each layer of a stack.
def filtered_in_turn(take):
    def forward(p, x):
        for i in range(3):
            w = functools.partial(take, p["w"], i)
            x = jnp.tanh(sum(shifted(x, j) * w(j) for j in range(TAPS)) @ p["u"][i])
        return x

    return forward


def filtered_by_counter(p, x):
    filtered = lambda i, x: sum(shifted(x, j) * p["w"][i, j] for j in range(TAPS))
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(filtered(i, x) @ p["u"][i]), x)


STACKED_FILTERS = {
    "one index after the other": filtered_in_turn(lambda w, i, j: w[i][j]),
    "two indices": filtered_in_turn(lambda w, i, j: w[i, j]),
    "a tap of all layers": filtered_in_turn(lambda w, i, j: w[:, j][i]),
    "a counter": filtered_by_counter,
}
# A kernel whose inputs are in another order.
ORDER = np.random.default_rng(0).permutation(D)
ORDERS = {
    "of the inputs": lambda p, x: jnp.tanh(x[..., np.argsort(ORDER)] @ p["w"]) @ p["o"],
    "by an index": lambda p, x: jnp.tanh(x @ p["w"][ORDER]) @ p["o"],
    "by take": lambda p, x: jnp.tanh(x @ jnp.take(p["w"], ORDER, axis=0)) @ p["o"],
    "by a reversed counter": lambda p, x: jnp.tanh(x @ p["w"][jnp.arange(D)[::-1]]) @ p["o"],
    "by a product": lambda p, x: jnp.tanh(x @ (np.eye(D)[ORDER] @ p["w"])) @ p["o"],
}
# A kernel that has each row twice, heads of keys that have each head twice, and a table whose halves
# go different ways.
REPEATS = {
    "repeat": lambda p, x: jnp.tanh(x @ jnp.repeat(p["w"], 2, 0)) @ p["o"],
    "a sum of the inputs": lambda p, x: jnp.tanh(x.reshape(B, T, -1, 2).sum(-1) @ p["w"]) @ p["o"],
    "an index": lambda p, x: jnp.tanh(x @ p["w"][np.arange(D) // 2]) @ p["o"],
    "an index of two axes": lambda p, x: (
        jnp.tanh(
            jnp.einsum(
                "btij,ijf->btf",
                x.reshape(B, T, -1, 2),
                p["w"][jnp.arange(D).reshape(-1, 2) // 2],
            )
        )
        @ p["o"]
    ),
    "a product and a sum": lambda p, x: (
        jnp.tanh((x[..., None] * p["w"][np.arange(D) // 2]).sum(-2)) @ p["o"]
    ),
}
TWICE = np.arange(H) // 2


def with_shared_keys(keys):
    def forward(p, x):
        q, v = (jnp.einsum("btd,dhn->bthn", x, p[name]) for name in "qv")
        return attention(q, keys(p["k"], x), v)

    return forward


SHARED_KEYS = {
    "repeat": lambda k, x: jnp.repeat(jnp.einsum("btd,dhn->bthn", x, k), 2, 2),
    "an index of the keys": lambda k, x: jnp.einsum("btd,dhn->bthn", x, k)[:, :, TWICE],
    "take": lambda k, x: jnp.take(jnp.einsum("btd,dhn->bthn", x, k), TWICE, axis=2),
}


def two_ways(rows):
    def forward(p, i):
        left, right = rows(p["e"], i)
        return jnp.tanh(left @ p["u"]) + jnp.tanh(right @ p["w"])

    return forward


HALVES = {
    "halves, then rows": lambda e, i: (e[:, : D // 2][i], e[:, D // 2 :][i]),
    "rows, then halves": lambda e, i: (e[i][..., : D // 2], e[i][..., D // 2 :]),
    "rows, then a split": lambda e, i: jnp.split(e[i], 2, -1),
}
# A small kernel whose numbers are taken one by one.
MIXED = {
    "einsum": lambda y, w: jnp.einsum("bthn,hk->btkn", y, w),
    "rows": lambda y, w: sum(y[:, :, i, None] * w[i, :, None] for i in range(H)),
    "columns": lambda y, w: jnp.stack([jnp.einsum("bthn,h->btn", y, w[:, k]) for k in range(H)], 2),
    "numbers": lambda y, w: jnp.stack(
        [sum(y[:, :, i] * w[i, k] for i in range(H)) for k in range(H)], 2
    ),
}


# Layers of the two halves of a vector, whose outputs are added in pairs.
PAIRS = {
    "einsum": lambda y, w: jnp.einsum("bin,ink->ibk", y, w),
    "vmap": lambda y, w: jax.vmap(operator.matmul, (1, 0))(y, w),
    "a loop": lambda y, w: [y[:, i] @ w[i] for i in range(2)],
}


def in_pairs(layers):
    def forward(p, x):
        a, b = layers((x @ p["u"]).reshape(B, 2, -1), p["w"])
        return jnp.tanh(a[:, :, None] + b[:, None]) @ p["o"]

    return forward


def filtered(by):
    return lambda p, x: jax.nn.gelu(by(x @ p["in"], p["w"])) @ p["out"]


# A kernel for each head of the outputs of a dense layer.
HEADS = shapes(u=(D, D), w=(H, N, N), o=(D, 5))
EACH_HEAD = {
    "einsum": lambda y, w: joined(jnp.einsum("bthn,hnm->bthm", heads(y), w)),
    "vmap": lambda y, w: joined(jax.vmap(operator.matmul, (2, 0), 2)(heads(y), w)),
    "slices": lambda y, w: jnp.concatenate(
        [y[..., i * N : (i + 1) * N] @ w[i] for i in range(H)], -1
    ),
}


def of_each_head(layers):
    return lambda p, x: jnp.tanh(layers(x @ p["u"], p["w"])) @ p["o"]


def turned_by_head(rotate):
    def forward(p, x):
        q, k, v = (jnp.einsum("btd,dhn->bthn", x, p[name]) for name in "qkv")
        return attention(rotate(q), rotate(k), v)

    return forward


QKV = dict.fromkeys("qkv", shape(D, H, N))
KERNELS = {"in": shape(D, F), "w": shape(TAPS, F), "out": shape(F, 5)}
ATTENTION = shapes(qkv=(D, 3 * D), o=(D, D))
FORMS = {
    "layers": (LOOPS, STACK, X),
    "members": (MEMBERS, MLP, ROWS),
    "members with gains": (members(scaled_mlp), SCALED, TOKENS),
    "kernels of each head": ({k: of_each_head(f) for k, f in EACH_HEAD.items()}, HEADS, X),
    "experts": (EXPERTS, MLP, ROWS),
    "chosen experts": (CHOSEN, BIASED, ROWS),
    "orders": (ORDERS, shapes(w=(D, F), o=(F, 5)), X),
    "repeats": (REPEATS, shapes(w=(D // 2, F), o=(F, 5)), X),
    "shared keys": (
        {k: with_shared_keys(f) for k, f in SHARED_KEYS.items()}, QKV | {"k": shape(D, H // 2, N)}, X,
    ),
    "halves of a table": (
        {k: two_ways(f) for k, f in HALVES.items()},
        shapes(e=(V, D), u=(D // 2, 5), w=(D // 2, 5)), jax.ShapeDtypeStruct((3,), jnp.int32),
    ),
    "tables": (TABLES, shapes(e=(3, 11, D), w=(D, 5)), MANY),
    "scores": ({k: with_scores(f) for k, f in PRODUCTS.items()}, ATTENTION, X),
    "sums": ({k: with_sum(f) for k, f in SUMS.items()}, shapes(u=(D, F), v=(D, F), w=(F, 5)), X),
    "weighted scores": (
        {k: with_weighted(f) for k, f in WEIGHTED.items()}, shapes(q=(D, D), u=(H, N), k=(D, D)), X,
    ),
    "states": (
        {k: over_positions(f) for k, f in READ.items()},
        shapes(**{"in": (D, F), "a": (F, STATES), "c": (F, STATES), "out": (F, 5)}), X,
    ),
    "triples": ({k: attending(f) for k, f in TRIPLES.items()}, DENSE, X),
    "rotations": ({k: turned(f) for k, f in ROTATIONS.items()}, ATTENTION, X),
    "rotations of heads": ({k: turned_by_head(f) for k, f in ROTATIONS.items()}, QKV, X),
    "filters": ({k: filtered(f) for k, f in FILTERS.items()}, KERNELS, X),
    "stacked filters": (STACKED_FILTERS, shapes(w=(3, TAPS, D), u=(3, D, D)), X),
    "pairs": (
        {k: in_pairs(f) for k, f in PAIRS.items()}, shapes(u=(D, D), w=(2, D // 2, 7), o=(7, 5)),
        ROWS,
    ),
    "convolutions": (
        {k: filtered(f) for k, f in CONVOLUTIONS.items()}, KERNELS | {"w": shape(TAPS, F, F)}, X,
    ),
}  # fmt: skip


# A gate and its value, and layers, of which the kernel is taken apart, or its outputs; heads and
# layers along the axis that is contracted.
def gated(take):
    return lambda p, x: jnp.tanh(operator.mul(*take(p, x)) @ p["o"])


GATES = {
    "outputs": gated(lambda p, x: jnp.split(x @ p["w"], 2, -1)),
    "kernels": gated(lambda p, x: [x @ w for w in jnp.split(p["w"], 2, 1)]),
    "slices of the kernel": gated(lambda p, x: (x @ p["w"][:, :F], x @ p["w"][:, F:])),
    "a flat kernel": gated(
        lambda p, x: [x @ w for w in jnp.split(p["w"].reshape(D, 2, F).reshape(D, -1), 2, 1)]
    ),
    "indices of the kernel": gated(
        lambda p, x: [x @ p["w"].reshape(D, 2, F)[:, i] for i in range(2)]
    ),
    "taken from the kernel": gated(
        lambda p, x: [x @ jnp.take(p["w"].reshape(D, 2, F), i, 1) for i in range(2)]
    ),
}


def layers_along_inputs(take):
    def forward(p, x):
        for i in range(3):
            x = jnp.tanh(x @ take(p["w"], i))
        return x @ p["o"]

    return forward


FLAT_LAYERS = {
    "reshaped": layers_along_inputs(lambda w, i: w.reshape(3, D, D)[i]),
    "split": layers_along_inputs(lambda w, i: jnp.split(w, 3, 0)[i]),
    "slices": layers_along_inputs(lambda w, i: w[i * D : (i + 1) * D]),
    "dynamic slices": layers_along_inputs(lambda w, i: lax.dynamic_slice_in_dim(w, i * D, D)),
}


# A filter of frequencies, of each channel, whatever comes after it.
def of_frequencies(act):
    def filtered_by(p, x):
        y = jnp.fft.rfft(x @ p["in"], axis=1) * p["w"]
        return act(jnp.fft.irfft(y, x.shape[1], axis=1)) @ p["out"]

    return filtered_by


ACTIVATIONS = {name: of_frequencies(getattr(jax.nn, name)) for name in ("gelu", "relu", "tanh")}
ACTIVATIONS["square"] = of_frequencies(jnp.square)
N_FREQUENCIES = X.shape[1] // 2 + 1
FORMS |= {
    "filters of frequencies": (
        ACTIVATIONS,
        {"in": shape(D, F), "w": shape(N_FREQUENCIES, F), "out": shape(F, 5)},
        X,
    ),
    "gates": (GATES, shapes(w=(D, 2 * F), o=(F, D)), X),
    "layers along the inputs": (FLAT_LAYERS, shapes(w=(3 * D, D), o=(D, 5)), X),
}


def test_layers_side_by_side_in_one_kernel_have_blocks_of_their_own():
    """Layers side by side along the inputs, and along the outputs."""
    params = shapes(w=(3 * D, D), o=(D, 5))
    for form in FLAT_LAYERS.values():
        assert found(form, params, X, "mean")["w"] == (3, D)
        assert found(form, params, X, "outer")["w"] == ((3 * D, 1), (3, D))
    side_by_side = layers_along_inputs(lambda w, i: jnp.split(w, 3, 1)[i])
    params = shapes(w=(D, 3 * D), o=(D, 5))
    assert found(side_by_side, params, X, "outer")["w"] == ((D, 3), (1, 3 * D))


def test_each_of_several_tables_has_columns_of_its_own():
    _, params, i = FORMS["tables"]
    assert found(TABLES["two indices"], params, i, "outer")["e"] == ((3, 11, 1), (3, 1, D))
    # An index that no loop counts chooses from all tables: they are one.
    shuffled = looked_up(lambda e, i: e[i[:, :1], i])
    assert found(shuffled, params, i, "outer")["e"] == ((3, 11, 1), (1, 1, D))


def test_a_filter_of_frequencies_has_a_block_for_each_channel():
    _, params, x = FORMS["filters of frequencies"]
    cut = found(ACTIVATIONS["tanh"], params, x, "mean")
    assert cut["w"] == (1, F)
    assert cut["in"] == (1, F)


def test_interleaved_outputs_are_not_parts_of_a_kernel():
    def strided(p, x):
        y = x @ p["w"]
        return jnp.tanh(y[..., ::2] * y[..., 1::2] @ p["o"])

    cut = found(strided, shapes(w=(D, 2 * F), o=(F, D)), X, "outer")["w"]
    assert cut == ((D, 1), (1, 2 * F))


def test_a_reshaped_kernel_has_a_row_for_each_index_that_is_taken():
    def forward(p, x, take):
        q, k, v = (jnp.einsum("btd,dhn->bthn", x, w) for w in take(p["w"].reshape(D, 3, H, N)))
        return joined(attention(q, k, v)) @ p["o"]

    params = shapes(w=(D, 3 * D), o=(D, 5))
    for take in (
        lambda w: [w[:, i] for i in range(3)],
        lambda w: [jnp.take(w, i, 1) for i in range(3)],
        lambda w: jnp.moveaxis(w, 1, 0),
    ):
        fn = functools.partial(forward, take=take)
        assert found(fn, params, X, "outer")["w"] == ((D, 3), (1, 3 * D))


def test_a_kernel_that_is_flattened_and_split_has_a_row_for_each_part():
    def gate(p, x):
        a, b = (x @ w for w in jnp.split(p["w"].reshape(D, -1), 2, 1))
        return jnp.tanh(a * b @ p["o"])

    params = shapes(w=(D, 2, F), o=(F, D))
    assert found(gate, params, X, "outer")["w"] == ((D, 2, 1), (1, 2, F))


@pytest.mark.parametrize("size", [8, 16])
def test_query_key_and_value_have_rows_where_python_loops_over_heads(size):
    """Each of them has at least one, however many heads there are."""

    def forward(p, x):
        q, k, v = (y.reshape(B, T, 3, size) for y in jnp.split(x @ p["qkv"], 3, -1))
        each = [attention(*(y[:, :, h : h + 1] for y in (q, k, v))) for h in range(3)]
        return joined(jnp.concatenate(each, 2)) @ p["o"]

    params = shapes(qkv=(D, 9 * size), o=(3 * size, 5))
    rows = infer_block_specs(forward, params, X)["qkv"].a.runs((D, 9 * size))[1]
    ends = np.cumsum([n for count, n in rows for _ in range(count)])
    assert {3 * size, 6 * size} <= {*ends.tolist()}


@pytest.mark.parametrize("form", MIXED)
def test_a_kernel_whose_numbers_are_taken_one_by_one_is_cut_by_neuron(form):
    """With `outer` such a kernel keeps `v` per coordinate."""
    params = {"in": shape(D, D), "w": shape(H, H), "out": shape(D, 5)}
    forward = lambda p, x: jnp.tanh(joined(MIXED[form](heads(x @ p["in"]), p["w"]))) @ p["out"]
    assert found(forward, params, X, "mean")["w"] == (1, H)


def test_gains_of_heads_have_no_rows():
    def with_norms(p, x):
        q, k, v = (jnp.einsum("...d,dhk->...hk", x, p[name]) for name in "qkv")
        q, k = rms_norm(q) * p["gq"], rms_norm(k) * p["gk"]
        return joined(attention(q, k, v)) @ p["o"]

    n = D // H
    params = shapes(**dict.fromkeys("qkv", (D, H, n)), gq=(H, n), gk=(H, n), o=(D, 5))
    cut = found(with_norms, params, X, "outer")
    assert cut["gq"] == cut["gk"] == (H, n)


def found(fn, params, x, v):
    specs = infer_block_specs(fn, params, x, v=v)
    return {name: specs[name].grid(params[name].shape) for name in params}


@pytest.mark.parametrize("v", ["mean", "outer"])
@pytest.mark.parametrize(
    ("function", "form"), [(name, form) for name, (forms, *_) in FORMS.items() for form in forms]
)
def test_a_function_has_the_same_blocks_in_every_form(function, form, v):
    forms, params, x = FORMS[function]
    first = next(iter(forms.values()))
    assert found(forms[form], params, x, v) == found(first, params, x, v)


@pytest.mark.parametrize("form", EXPERTS)
def test_muon_has_the_experts_however_they_are_chosen(form):
    numbers = infer_muon_dimension_numbers(EXPERTS[form], MLP, ROWS)
    assert numbers["u"] == numbers["v"] == ((1,), (2,))
    assert numbers["w"] is None


def test_a_table_with_the_index_of_an_expert_is_a_table():
    """A row that goes into a kernel is data, and no bias."""

    def forward(p, x, i):
        gate = jnp.tanh(p["t"][i] @ p["w"])
        return x @ p["u"][i] * gate @ p["v"]

    params = shapes(t=(3, D), w=(D, F), u=(3, D, F), v=(F, 5))
    specs = infer_block_specs(forward, params, ROWS, jax.ShapeDtypeStruct((), jnp.int32), v="mean")
    grids = {name: specs[name].grid(params[name].shape) for name in params}
    assert grids == {"t": (3, 1), "w": (1, F), "u": (3, 1, F), "v": (1, 5)}


def test_tables_of_members_may_be_read_at_indices_that_the_program_fixes():
    """The index of a table under vmap has no column for the members."""

    def forward(p, x):
        order = np.array([2, 0, 1])
        rows = jax.vmap(lambda e, i: e[i])(p["e"], order)
        return jnp.tanh(jnp.einsum("bd,edf->bef", x, p["u"][order]) + rows) @ p["v"]

    cut = found(forward, shapes(e=(3, V, F), u=(3, D, F), v=(F, 5)), ROWS, "mean")
    assert cut["u"] == (3, 1, F)
    assert cut["e"][:2] == (3, V)


@pytest.mark.parametrize("of_kernel", [False, True])
def test_an_output_in_two_heads_is_a_block_of_its_own(of_kernel):
    twice = np.array([0, 1, 2, 2, 3, 4])

    def forward(p, x):
        q = x @ p["q"][:, twice] if of_kernel else (x @ p["q"])[..., twice]
        q, k = (y.reshape(B, T, 2, 3) for y in (q, x @ p["k"]))
        return attention(q, k, x.reshape(B, T, 2, -1))

    grid = found(forward, shapes(q=(D, 5), k=(D, 6)), X, "mean")["q"]
    assert grid == (1, 5 if of_kernel else 3)


@pytest.mark.parametrize("size", [6, 80])  # more indices than are evaluated
@pytest.mark.parametrize("get", [np, jnp])
def test_the_channels_of_a_toeplitz_matrix_are_never_joined(size, get):
    def forward(p, x):
        distance = get.arange(size)[:, None] - get.arange(size) + size - 1
        return jnp.tanh(jnp.einsum("btd,std->bsd", x, p["w"][distance]))

    params = shapes(w=(2 * size - 1, D))
    assert found(forward, params, shape(B, size, D), "mean")["w"][1] == D


@pytest.mark.parametrize("form", FINER_FILTERS)
def test_filters_are_never_joined(form):
    grid = found(filtered(FINER_FILTERS[form]), KERNELS, X, "mean")["w"]
    assert grid[1] == F


def test_a_sum_of_gated_outputs_is_a_layer_and_joins_no_neurons():
    forms, params, x = FORMS["sums"]
    expected = {"u": (1, F), "v": (1, F), "w": (1, 5)}
    assert found(forms["sum of a product"], params, x, "mean") == expected


MIXTURES = {
    "a dot": lambda w, h: jnp.einsum("ek,ekf->ef", w, h),
    "a product and its sum": lambda w, h: (w[:, :, None] * h).sum(1),
    "normalized": lambda w, h: jnp.einsum("ek,ekf->ef", w / w.sum(-1, keepdims=True), h),
    "a loop": lambda w, h: sum(w[:, k, None] * h[:, k] for k in range(H)),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_gaussians_that_mix_kernels_are_not_joined(mixture):
    """MoNet (Monti et al., arXiv 1611.08402): data and a parameter are mixed before they are a
    mixture's weights."""

    def forward(p, x, u):
        far = jnp.square((u[:, None, :] - p["mu"]) / (1e-6 + p["sigma"])).sum(-1)
        return jnp.tanh(mixture(jnp.exp(-far), (x @ p["w"]).reshape(-1, H, F))) @ p["o"]

    params = shapes(w=(D, H * F), mu=(H, 2), sigma=(H, 2), o=(F, 5))
    batch = tuple(shapes(x=(9, D), u=(9, 2)).values())
    grids = found(lambda p, batch: forward(p, *batch), params, batch, "mean")
    assert grids == {"w": (1, H * F), "mu": (H, 2), "sigma": (H, 1), "o": (1, 5)}


@pytest.mark.parametrize("act", [jnp.tanh, jnp.negative])
def test_outputs_of_members_that_are_summed_with_weights_are_not_joined(act):
    def forward(p, x):
        y = act(jnp.einsum("btd,edf->ebtf", x, p["w"]))
        gate = jax.nn.sigmoid(x @ p["u"])
        return (gate * jnp.einsum("ebtf,ef->btf", y, p["g"])) @ p["o"]

    params = shapes(w=(3, D, F), g=(3, F), u=(D, F), o=(F, 5))
    assert found(forward, params, X, "mean")["w"] == (3, 1, F)


def test_gains_of_several_layers_are_not_read_as_a_filter():
    """Each gain scales the outputs of another kernel, so they are not one filter."""

    def forward(p, x):
        for i in range(3):
            x = x + p["g"][i] * jnp.tanh(x @ p["w"][i])
        return x

    params = {"g": shape(3, D), "w": shape(3, D, D)}
    assert found(forward, params, ROWS, "mean") == {"g": (3, 1), "w": (3, 1, D)}


@pytest.mark.parametrize("form", ["a loop", "a scan", "a map"])
def test_gains_of_branches_that_are_added_are_not_read_as_a_filter(form):
    branch = lambda x, w, g: jnp.tanh(x @ w) * g
    forms = {
        "a loop": lambda p, x: sum(branch(x, p["w"][i], p["g"][i]) for i in range(3)),
        "a scan": lambda p, x: lax.scan(
            lambda y, p: (y + branch(x, *p), None), jnp.zeros((B, F)), (p["w"], p["g"])
        )[0],
        "a map": lambda p, x: lax.map(lambda p: branch(x, *p), (p["w"], p["g"])).sum(0),
    }
    params = {"w": shape(3, D, F), "g": shape(3, F), "o": shape(F, 5)}
    forward = lambda p, x: forms[form](p, x) @ p["o"]
    assert found(forward, params, ROWS, "mean") == {"w": (3, 1, F), "g": (3, 1), "o": (1, 5)}


def test_gains_of_a_query_and_a_key_are_not_read_as_a_filter():
    """One value is scaled by two gains, but the results are not added as a filter's are."""

    def forward(p, x):
        z = jax.nn.silu(x @ p["z"])
        scores = jnp.einsum("btn,bsn->bts", z * p["g"][0], z * p["g"][1])
        return jax.nn.relu(scores) @ (x @ p["v"])

    params = shapes(z=(D, N), g=(2, N), v=(D, D))
    assert found(forward, params, X, "mean") == {"z": (1, 1), "g": (2, 1), "v": (1, D)}


def of_one_input(act):
    """Layers that each read something of one input."""

    def forward(p, x):
        y = x[:, 0]
        for i in range(3):
            y = act(y, y + x[:, i + 1] @ p["w"][i])
        return y

    return forward


@pytest.mark.parametrize(
    "act",
    [
        lambda before, y: jnp.tanh(y),
        lambda before, y: before + jnp.tanh(y),
        lambda before, y: y + jnp.tanh(y),
        lambda before, y: y + jnp.tanh(before),
    ],
)
def test_layers_that_read_one_input_are_no_convolution(act):
    assert found(of_one_input(act), {"w": shape(3, D, D)}, X, "mean") == {"w": (3, 1, D)}


def test_stacked_layers_have_rows_of_their_own():
    grids = found(LOOPS["by index"], STACK, X, "outer")
    assert grids["u"] == ((4, D, 1), (4, 1, F))
    assert grids["qkv"] == ((4, D, 3), (4, 1, 3 * D))


def test_ensemble_members_have_rows_of_their_own():
    assert found(MEMBERS["vmap"], MLP, ROWS, "outer")["u"] == ((3, D, 1), (3, 1, F))


def grouped(p, x):
    y = (x @ p["w"]).reshape(B, T, 2, 4, N)
    q, k, v = y[:, :, :, :2], y[:, :, :, 2], y[:, :, :, 3]
    weights = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k))
    return jnp.einsum("bgrts,bsgd->btgrd", weights, v).reshape(B, T, -1) @ p["o"]


def grouped_in_a_loop(p, x):
    y = (x @ p["w"]).reshape(B, T, 2, 4, N)
    q, k, v = y[:, :, :, :2], y[:, :, :, 2], y[:, :, :, 3]
    out = []
    for i in range(2):
        weights = jax.nn.softmax(jnp.einsum("btrd,bsd->brts", q[:, :, i], k[:, :, i]))
        out.append(jnp.einsum("brts,bsd->btrd", weights, v[:, :, i]))
    return jnp.stack(out, 2).reshape(B, T, -1) @ p["o"]


@pytest.mark.parametrize("fn", [grouped, grouped_in_a_loop])
def test_a_middle_axis_is_cut_into_heads_and_parts(fn):
    params = shapes(w=(D, 2 * 4 * N), o=(2 * 2 * N, D))
    assert found(fn, params, X, "mean")["w"] == (1, 2 * (2 + 1 + N))
    assert found(fn, params, X, "outer")["w"] == ((D, 4), (1, 8 * N))


def resized(order, square):
    def forward(p, x):
        table = jax.image.resize(p["pos"].reshape(4, 4, D), (6, 6, D), "linear")
        table = table.transpose(order).reshape(36, D)
        x = x @ p["e"] + table
        x = x - x.mean(-1, keepdims=True)
        return jnp.tanh(x * lax.rsqrt(square(x).mean(-1, keepdims=True) + 1e-6) @ p["w"])

    return forward


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
@pytest.mark.parametrize("square", [jnp.square, lambda x: x * x])
def test_a_table_that_is_resized_is_a_bias(order, square):
    params = shapes(e=(5, D), pos=(16, D), w=(D, 6))
    grids = found(resized(order, square), params, shape(B, 36, 5), "mean")
    assert grids == {"e": (1, D), "pos": (16, D), "w": (1, 6)}


def of_state_space(make):
    def forward(p, x):
        decay = jnp.exp(-jnp.exp(p["a"])[..., None] * jnp.arange(T))
        spectrum = jnp.fft.rfft(x @ p["in"], 2 * T, axis=1)
        spectrum = spectrum * jnp.fft.rfft(make(p["c"], decay).T, 2 * T, axis=0)
        return jax.nn.gelu(jnp.fft.irfft(spectrum, 2 * T, axis=1)[:, :T]) @ p["out"]

    return forward


@pytest.mark.parametrize(
    "make",
    [
        lambda c, decay: jnp.einsum("dn,dnl->dl", c, decay),
        lambda c, decay: (c[..., None] * decay).sum(1),
        lambda c, decay: jnp.sum(jnp.broadcast_to(c[..., None], decay.shape) * decay, axis=1),
    ],
)
def test_channels_of_a_state_space_have_blocks_of_their_own(make):
    params = {"in": shape(D, F), "a": shape(F, 3), "c": shape(F, 3), "out": shape(F, 5)}
    grids = found(of_state_space(make), params, X, "mean")
    assert (grids["a"][0], grids["c"][0]) == (F, F)


# What is coupled at a value is what every use of it couples.

QK = shapes(q=(D, D), k=(D, D), v=(D, D))
BY_HEAD, BY_NEURON = (1, H), (1, D)


def scores(q, k):
    return jnp.einsum("bthn,bshn->bhts", q, k)


def uses(forward):
    return lambda p, x: forward(*(heads(x @ p[name]) for name in "qkv"), p)


USES = {
    "read by the loss too": (
        uses(lambda q, k, v, p: (attention(q, k, v), q)), {"q": BY_NEURON, "k": BY_HEAD},
    ),
    "a value too": (uses(lambda q, k, v, p: (attention(q, k, k), v)), {"q": BY_HEAD, "k": BY_NEURON}),
    "read before its score": (
        uses(lambda q, k, v, p: (jnp.tanh(k), attention(q, k, v))), {"q": BY_HEAD, "k": BY_NEURON},
    ),
    "one copy of it is read": (
        uses(lambda q, k, v, p: (scores(q, y := k.sum(2, keepdims=True) * v), y[:, :, 1])),
        {"q": BY_HEAD, "k": BY_NEURON, "v": (1, H - 1 + N)},
    ),
    "in two scores": (
        uses(lambda q, k, v, p: (scores(q, k), scores(q, v))), dict.fromkeys("qkv", BY_HEAD),
    ),
    "with its norm": (
        uses(lambda q, k, v, p: attention(rms_norm(q), q.sum(-1, keepdims=True) * k, v)),
        {"q": BY_HEAD, "k": BY_HEAD},
    ),
    "with the norm of all heads": (
        uses(lambda q, k, v, p: attention(*(heads(rms_norm(joined(y))) for y in (q, k)), v)),
        {"q": BY_HEAD, "k": BY_HEAD},
    ),
    "a gate of the same head": (
        uses(lambda q, k, v, p: scores(q * jax.nn.sigmoid(v), k)), dict.fromkeys("qkv", BY_HEAD),
    ),
    "a factor of both": (
        uses(lambda q, k, v, p: scores(q * jnp.exp(v), k * jnp.exp(-v))),
        dict.fromkeys("qkv", BY_HEAD),
    ),
    "a penalty on its values": (
        uses(lambda q, k, v, p: (scores(q, k), jnp.square(q).sum(), v)),
        {"q": BY_NEURON, "k": BY_HEAD},
    ),
    "half of it is read": (
        uses(lambda q, k, v, p: (scores(q, k), q[:, :, :2], v)), {"q": (1, 2 * N + 2), "k": BY_HEAD},
    ),
    "mixed by a constant": (
        uses(lambda q, k, v, p: attention(q @ np.tri(N, dtype="float32"), k, v)),
        {"q": BY_HEAD, "k": BY_HEAD},
    ),
    "compared": (
        uses(lambda q, k, v, p: attention(jnp.where(q > k, q, 0), k, v)), {"q": BY_HEAD, "k": BY_HEAD},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_a_value_with_several_uses_is_cut_for_all_of_them(name):
    fn, expected = USES[name]
    grids = found(fn, QK, X, "mean")
    assert {name: grids[name] for name in expected} == expected


def test_auxiliary_outputs_beside_a_loss_do_not_change_the_blocks():
    def outputs(p, x):
        q, k, v = (heads(x @ p[name]) for name in "qkv")
        return jnp.square(attention(q, k, v)), q

    loss = lambda p, x: (outputs(p, x)[0].mean(), outputs(p, x)[1])
    assert found(outputs, QK, X, "mean")["q"] == BY_NEURON
    assert found(loss, QK, X, "mean")["q"] == BY_HEAD
