"""The blocks inferred for models and for one function written in many ways, and refusals."""

import importlib
import operator
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
from tests.partition.dataflow.models import FINER, TABLE_OF_MODELS, attentions, parts
from tests.partition.dataflow.models.parts import (
    DENSE,
    DENSE_GRIDS,
    INDEX,
    ROWS,
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
    grids,
    heads,
    joined,
    mixing,
    rms_norm,
    rotary_halves,
    rotary_pairs,
    rotary_rotated,
    shape,
    shapes,
    unit,
)
from tests.partition.dataflow.models.projections import FUSED, fused

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
def test_grouped_query_attention_is_cut_by_head(rotary, mix):
    assert grids(lambda p, x: grouped(p, x, rotary, mix), GROUPED, X) == GROUPED_GRIDS


@pytest.mark.parametrize("name", TABLE_OF_MODELS)
def test_a_model_has_the_blocks_derived_by_hand(name):
    fn, params, args, expected = TABLE_OF_MODELS[name]
    found = grids(fn, params, *args)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("name", TABLE_OF_MODELS)
def test_casts_jit_and_checkpoint_do_not_change_the_blocks(name):
    fn, params, args, expected = TABLE_OF_MODELS[name]

    def wrapped(p, *args):
        cast = jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), p)
        return jax.jit(jax.checkpoint(fn))(cast, *args)

    found = grids(wrapped, params, *args)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("name", FINER)
def test_known_models_are_cut_no_coarser_than_by_hand(name):
    fn, params, args, expected, now = FINER[name]
    found = grids(fn, params, *args)
    assert {name: found[name] for name in expected} == {**expected, **now}
    for path, grid in now.items():
        assert all(map(operator.ge, grid, expected[path]))


# --- one function, written in several ways --------------------------------------------------------


def of_each(fn):
    """By a function of one example, which takes the place of a batch of one."""
    return lambda p, x: jax.vmap(lambda x: fn(p, x[None])[0])(x)


def scores(mix):
    return lambda p, x, y: jax.nn.softmax(mix(x @ p["a"], y @ p["b"]))


def two_heads(mix):
    return lambda p, x, y: jax.nn.softmax(mix(heads(x @ p["a"], 2), heads(y @ p["b"], 2)))


def of_heads(make):
    return lambda p, x: jnp.einsum("bthn,bshn->bhts", make(p["a"], x), make(p["b"], x))


def updated(layer):
    """A hidden layer, whose neurons go into a kernel of their own in each head."""

    def forward(p, x):
        y = jax.nn.relu(x @ p["u"]).reshape(-1, H, 1, N)
        return jax.vmap(lambda y, p: layer(y, p), (1, 0), 1)(y, {k: p[k] for k in "wab"})

    return forward


def gated_update(layer):
    return lambda p, x: updated(layer)(p, x) * jax.nn.sigmoid(x @ p["g"])[:, None, None]


# The parameters, the data, the grids, and the ways.
ALIKE = {
    "neurons": (shapes(w=(D, 7)), [ROWS], {"w": (1, 7)}, [
        lambda p, x: jnp.tanh(x @ p["w"]),
        lambda p, x: jnp.tanh(jnp.einsum("bd,df->bf", x, p["w"])),
        lambda p, x: jnp.tanh(jnp.tensordot(x, p["w"], 1)),
        lambda p, x: jnp.tanh((p["w"].T @ x.T).T),
        lambda p, x: jnp.tanh((x[:, :, None] * p["w"]).sum(1)),
        lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p["w"]))(x),
        lambda p, x: jax.vmap(lambda w: jnp.tanh(x @ w), 1, 1)(p["w"]),
        lambda p, x: jax.vmap(lambda x: jax.vmap(jnp.dot, (None, 1))(x, p["w"]))(x),
        lambda p, x: lax.map(lambda x: jnp.tanh(p["w"].T @ x), x),
        of_each(lambda p, x: jnp.tanh(x @ p["w"])),
        lambda p, x: conv(x[:, None, None], p["w"][None, None])[:, 0, 0],
    ]),
    "an inner product": (shapes(a=(D, 7), b=(D, 7)), [ROWS, ROWS], {"a": (1, 1), "b": (1, 1)}, [
        scores(lambda a, b: a @ b.T),
        scores(lambda a, b: jnp.einsum("if,jf->ij", a, b)),
        scores(lambda a, b: jnp.tensordot(a, b, [[1], [1]])),
        scores(lambda a, b: (a[:, None] * b[None]).sum(-1)),
        scores(lambda a, b: jnp.inner(a, b)),
        scores(lambda a, b: jax.vmap(lambda a: jax.vmap(lambda b: jnp.vdot(a, b))(b))(a)),
        scores(lambda a, b: lax.map(lambda a: b @ a, a)),
        lambda p, x, y: jax.nn.softmax(jnp.einsum("id,df,ef,je->ij", x, p["a"], p["b"], y)),
    ]),
    "an inner product of each example": (
        shapes(a=(D, 7), b=(D, 7)), [ROWS, ROWS], {"a": (1, 1), "b": (1, 1)}, [
            lambda p, x, y: ((x @ p["a"]) * (y @ p["b"])).sum(-1),
            lambda p, x, y: jnp.einsum("if,if->i", x @ p["a"], y @ p["b"]),
            lambda p, x, y: jax.vmap(jnp.dot)(x @ p["a"], y @ p["b"]),
            lambda p, x, y: ((x @ p["a"])[:, None] @ (y @ p["b"])[..., None])[:, 0, 0],
            lambda p, x, y: jax.vmap(lambda x, y: jnp.vdot(x @ p["a"], y @ p["b"]))(x, y),
            lambda p, x, y: ((x @ p["a"]) * (y @ p["b"])).mean(-1, keepdims=True) * 7,
        ],
    ),
    "inner products of heads": (
        shapes(a=(D, 8), b=(D, 8)), [ROWS, ROWS], {"a": (1, 2), "b": (1, 2)}, [
            two_heads(lambda a, b: jnp.einsum("ihn,jhn->hij", a, b)),
            two_heads(lambda a, b: a.swapaxes(0, 1) @ b.transpose(1, 2, 0)),
            two_heads(lambda a, b: (a[:, None] * b[None]).sum(-1)),
            two_heads(lambda a, b: jax.vmap(lambda a, b: a @ b.T, 1)(a, b)),
            two_heads(lambda a, b: jax.vmap(lambda a, b: jnp.tensordot(a, b, [[1], [1]]), 1, 2)(a, b)),
            two_heads(lambda a, b: jnp.stack([a[:, i] @ b[:, i].T for i in range(2)])),
        ],
    ),
    "heads": (shapes(a=(D, H, N), b=(D, H, N)), [X], {"a": (1, H, 1), "b": (1, H, 1)}, [
        of_heads(lambda w, x: jnp.einsum("btd,dhn->bthn", x, w)),
        of_heads(lambda w, x: jnp.tensordot(x, w, 1)),
        of_heads(lambda w, x: heads(x @ w.reshape(D, H * N))),
        of_heads(lambda w, x: jax.vmap(lambda w: x @ w, 1, 2)(w)),
        of_heads(lambda w, x: jax.vmap(lambda x: jnp.einsum("td,dhn->thn", x, w))(x)),
        of_heads(lambda w, x: jnp.stack([x @ w[:, h] for h in range(H)], 2)),
        of_heads(lambda w, x: (x[..., None, None] * w).sum(2)),
    ]),
    "a gain": (shapes(g=(D,), w=(D, 7)), [ROWS], {"g": (1,), "w": (1, 7)}, [
        lambda p, x: x * p["g"] @ p["w"],
        lambda p, x: jnp.einsum("bd,d->bd", x, p["g"]) @ p["w"],
        lambda p, x: jnp.einsum("d,bd->bd", p["g"], x) @ p["w"],
        lambda p, x: jax.vmap(lambda x: p["g"] * x @ p["w"])(x),
        lambda p, x: jax.vmap(lambda x, g: x * g, (1, 0), 1)(x, p["g"]) @ p["w"],
        lambda p, x: x * (1 + p["g"])[None] @ p["w"],
    ]),
    "positions": (shapes(w=(T, 5)), [X], {"w": (1, 5)}, [
        lambda p, x: jnp.einsum("btd,tn->bnd", x, p["w"]),
        lambda p, x: (x.swapaxes(1, 2) @ p["w"]).swapaxes(1, 2),
        lambda p, x: p["w"].T @ x,
        lambda p, x: jax.vmap(lambda x: jnp.tensordot(p["w"], x, [[0], [0]]))(x),
        lambda p, x: (x[:, :, None] * p["w"][None, :, :, None]).sum(1),
    ]),
    "low rank": (shapes(a=(D, 2), b=(2, 7)), [ROWS], {"a": (1, 2), "b": (1, 7)}, [
        lambda p, x: jnp.tanh(x @ p["a"] @ p["b"]),
        lambda p, x: jnp.tanh(x @ (p["a"] @ p["b"])),
        lambda p, x: jnp.tanh(jnp.einsum("bd,dr,rf->bf", x, p["a"], p["b"])),
        lambda p, x: jnp.tanh(x @ jnp.tensordot(p["a"], p["b"], 1)),
        lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p["a"] @ p["b"]))(x),
    ]),
    "rows": (shapes(e=(V, D), w=(D, 7)), [INDEX], {"e": (V, 1), "w": (1, 7)}, [
        lambda p, i: p["e"][i] @ p["w"],
        lambda p, i: jnp.take(p["e"], i, axis=0) @ p["w"],
        lambda p, i: jax.nn.one_hot(i, V) @ p["e"] @ p["w"],
        lambda p, i: jnp.einsum("bv,vd,df->bf", jax.nn.one_hot(i, V), p["e"], p["w"]),
        lambda p, i: jax.vmap(lambda i: p["e"][i] @ p["w"])(i),
        lambda p, i: jnp.take_along_axis(p["e"], i[:, None], 0) @ p["w"],
        lambda p, i: lax.map(lambda i: lax.dynamic_index_in_dim(p["e"], i, 0, False), i) @ p["w"],
    ]),
    "experts": (shapes(w=(3, D, 7)), [ROWS], {"w": (3, 1, 7)}, [
        lambda p, x: jnp.tanh(jnp.einsum("bd,edf->ebf", x, p["w"])),
        lambda p, x: jnp.tanh(x @ p["w"]),
        lambda p, x: jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"]),
        lambda p, x: jnp.stack([jnp.tanh(x @ w) for w in p["w"]]),
        lambda p, x: lax.scan(lambda c, w: (c, jnp.tanh(x @ w)), 0, p["w"])[1],
        lambda p, x: lax.map(lambda w: jnp.tanh(x @ w), p["w"]),
        lambda p, x: jnp.tanh((x[None, :, :, None] * p["w"][:, None]).sum(2)),
    ]),
    "a number of each head": (
        shapes(w=(D, H, N), a=(H, N)), [ROWS], {"w": (1, H, 1), "a": (H, 1)}, [
            lambda p, x: jnp.einsum("bhn,hn->bh", jnp.einsum("bd,dhn->bhn", x, p["w"]), p["a"]),
            lambda p, x: (jnp.tensordot(x, p["w"], 1) * p["a"]).sum(-1),
            lambda p, x: jax.vmap(lambda w, a: x @ w @ a, (1, 0), 1)(p["w"], p["a"]),
        ],
    ),
    "critics of one hidden layer": (
        shapes(w=(3, D, 7), a=(3, 7)), [ROWS], {"w": (3, 1, 7), "a": (3, 1)}, [
            lambda p, x: jnp.stack([jax.nn.relu(x @ p["w"][e]) @ p["a"][e] for e in range(3)]),
            lambda p, x: jax.vmap(lambda w, a: jax.nn.relu(x @ w) @ a)(p["w"], p["a"]),
            lambda p, x: jax.vmap(lambda w, a: jax.nn.silu(x @ w) @ a)(p["w"], p["a"]),
            lambda p, x: jnp.einsum(
                "ben,en->be", jax.nn.leaky_relu(jnp.einsum("bd,edn->ben", x, p["w"])), p["a"]
            ),
        ],
    ),
    "four kernels": (
        shapes(a=(D, 7), b=(7, 2), c=(2, 5), d=(5, 6)), [ROWS],
        {"a": (1, 7), "b": (1, 2), "c": (1, 5), "d": (1, 6)}, [
            lambda p, x: x @ p["a"] @ p["b"] @ p["c"] @ p["d"],
            lambda p, x: x @ (p["a"] @ p["b"] @ p["c"] @ p["d"]),
            lambda p, x: x @ ((p["a"] @ p["b"]) @ (p["c"] @ p["d"])),
            lambda p, x: x @ jnp.linalg.multi_dot([p[name] for name in "abcd"]),
        ],
    ),
    "a low-rank update of a kernel of heads": (
        shapes(u=(D, H * N), w=(H, N, 5), a=(H, N, 2), b=(H, 2, 5)), [ROWS],
        {"u": (1, H * N), "w": (H, 1, 5), "a": (H, 1, 2), "b": (H, 1, 5)}, [
            updated(lambda y, p: y @ p["w"] + y @ p["a"] @ p["b"]),
            updated(lambda y, p: y @ (p["w"] + p["a"] @ p["b"])),
            updated(lambda y, p: y @ (2.0 * (p["a"] @ p["b"]) + p["w"])),
        ],
    ),
    "a gated low-rank update of a kernel of heads": (  # its outputs weight others, as scores do
        shapes(u=(D, H * N), w=(H, N, 5), a=(H, N, 2), b=(H, 2, 5), g=(D, 5)), [ROWS],
        {"u": (1, H * N), "w": (H, 1, 5), "a": (H, 1, 2), "b": (H, 1, 5), "g": (1, 5)}, [
            gated_update(lambda y, p: y @ p["w"] + y @ p["a"] @ p["b"]),
            gated_update(lambda y, p: y @ (p["w"] + p["a"] @ p["b"])),
        ],
    ),
    "kernels of groups, summed": (
        shapes(w=(D, 6), c=(6, 5)), [ROWS], {"w": (1, 6), "c": (2, 5)}, [
            lambda p, x: jnp.einsum(
                "bgv,gvn->bgn", jax.nn.softmax(x @ p["w"]).reshape(-1, 2, 3), p["c"].reshape(2, 3, 5)
            ),
            lambda p, x: (jax.nn.softmax(x @ p["w"])[..., None] * p["c"])
            .reshape(-1, 2, 3, 5)
            .sum(2),
        ],
    ),
    "a kernel of each example": (
        shapes(u=(D, 6), z=(D, 30), o=(5, 3)), [ROWS, ROWS],
        {"u": (1, 6), "z": (1, 30), "o": (1, 3)}, [
            lambda p, x, y: jnp.einsum(
                "bi,bio->bo", jax.nn.relu(x @ p["u"]), (y @ p["z"]).reshape(-1, 6, 5)
            ) @ p["o"],
            lambda p, x, y: jnp.einsum(
                "boi,bi->bo", (y @ p["z"]).reshape(-1, 5, 6), jax.nn.relu(x @ p["u"])
            ) @ p["o"],
        ],
    ),
    "experts weighted by a router": (
        shapes(w=(D, 15), r=(D, 3)), [ROWS], {"w": (1, 15), "r": (1, 3)}, [
            lambda p, x: jnp.einsum(
                "bef,be->bf", (x @ p["w"]).reshape(-1, 3, 5), jax.nn.softmax(x @ p["r"])
            ),
            lambda p, x: jnp.einsum(
                "bfe,be->bf", (x @ p["w"]).reshape(-1, 5, 3), jax.nn.softmax(x @ p["r"])
            ),
        ],
    ),
    "heads that are split after the product": (
        shapes(a=(D, 8), b=(D, 8)), [ROWS, ROWS], {"a": (1, 2), "b": (1, 2)}, [
            lambda p, x, y: ((x @ p["a"]) * (y @ p["b"])).reshape(-1, 2, 4).sum(-1),
            lambda p, x, y: jnp.einsum(
                "bhn,bhn->bh", (x @ p["a"]).reshape(-1, 2, 4), (y @ p["b"]).reshape(-1, 2, 4)
            ),
        ],
    ),
    "attention": (DENSE, [X], DENSE_GRIDS, [
        dense_attention,
        of_each(dense_attention),
        lambda p, x: dense_attention(p, x[:1]),
        *map(mixing, (attentions.by_products, attentions.by_tensordot, attentions.folded,
                      attentions.head_by_head, attentions.scanned_heads, attentions.flash)),
    ]),
    "a mixture of values": (
        DENSE, [X], dict.fromkeys(DENSE, (1, D)),
        list(map(mixing, (attentions.linear, attentions.linear_causal))),
    ),
    "a norm": (shapes(w=(D, 7), o=(7, 3)), [ROWS], {"w": (1, 7), "o": (1, 3)}, [
        lambda p, x: rms_norm(x @ p["w"]) @ p["o"],
        lambda p, x: unit(x @ p["w"]) @ p["o"],
        lambda p, x: jax.nn.standardize(x @ p["w"]) @ p["o"],
        lambda p, x: (lambda y: y / jnp.sqrt(jnp.einsum("bf,bf->b", y, y))[:, None])(x @ p["w"]) @ p["o"],
        lambda p, x: jax.vmap(lambda x: unit(x @ p["w"]) @ p["o"])(x),
        lambda p, x: jax.vmap(lambda y: y / jnp.sqrt(jnp.vdot(y, y)))(x @ p["w"]) @ p["o"],
    ]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, row in ALIKE.items() for i in range(len(row[3]))]
)
def test_one_function_is_cut_alike_however_it_is_written(name, number):
    params, args, expected, ways = ALIKE[name]
    assert grids(ways[number], params, *args) == expected


# --- what is no model -----------------------------------------------------------------------------


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def test_functions_with_custom_derivatives_are_read():
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


def test_all_unreadable_parameters_are_named_in_one_error():
    with pytest.raises(ValueError, match="cannot tell how") as error:
        infer_block_specs(opaque, OPAQUE, X, v="mean")
    message = str(error.value)
    where = r"pure_callback at \S*test_infer.py:\d+"
    assert re.search(rf"lost \(32, 7\): goes into {where}", message)
    assert re.search(rf"direct \(5,\): goes into {where}", message)
    assert "found" not in message
    assert "overrides=[(pattern, spec)]" in message


def test_unreadable_parameters_may_be_given_specs():
    settled = {"overrides": [("lost", per_neuron())], "unreadable": per_element()}
    assert grids(opaque, OPAQUE, X, **settled) == {"lost": (1, 7), "found": (1, 5), "direct": (5,)}
    specs = infer_block_specs(opaque, OPAQUE, X, **settled, v="mean")
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
def test_a_parameter_that_meets_no_data_is_refused(fn):
    params = {"w": shape(D, 5), "lost": shape(D, 5), "scalar": shape()}
    with pytest.raises(
        ValueError,
        match=r"cannot tell how .*\nlost \(32, 5\): meets no data in fn that an output depends on\b",
    ):
        infer_block_specs(fn, params, X, v="mean")
    settled = grids(fn, params, X, overrides=[("lost", per_neuron())])
    assert settled == {"w": (1, 5), "lost": (1, 5), "scalar": ()}


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="override 'nothing'"):
        infer_block_specs(opaque, OPAQUE, X, overrides=[("nothing", per_tensor())], v="mean")


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
def test_blocks_that_cannot_be_read_are_refused_and_not_guessed(name):
    fn, params, primitive = UNREAD[name]
    with pytest.raises(ValueError, match=rf"w \(.*goes into {primitive} at"):
        infer_block_specs(fn, params, X, v="mean")


def test_blocks_are_named_by_their_kind():
    fn, params, args, _ = TABLE_OF_MODELS["tied language model"]
    specs = infer_block_specs(fn, params, *args, v="mean")
    assert {name: spec.unit for name, spec in specs.items()} == {
        "q": "head", "k": "head", "v": "neuron", "o": "neuron", "e": "token", "pos": "token",
        "g": "tensor", "b": "element",
    }  # fmt: skip
    stacked = {"g": shape(3, D), "w": shape(3, D, D)}
    body = lambda x, p: (x * p["g"] @ p["w"], None)
    specs = infer_block_specs(lambda p, x: lax.scan(body, x, p)[0], stacked, X, v="mean")
    assert (specs["g"].unit, specs["w"].unit) == ("tensor", "neuron")
    specs = infer_block_specs(fused, FUSED, X, v="mean")
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
def test_shard_map_over_heads_and_neurons_does_not_change_the_blocks(count, check_vma):
    fn = on_devices(sharded_attention, SHARDED_SPECS, count=count, check_vma=check_vma)
    assert grids(fn, SHARDED, X) == SHARDED_GRIDS


def test_shard_map_over_data_does_not_change_the_blocks():
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
def test_shard_map_over_positions_does_not_change_the_blocks(body):
    fn = on_devices(body, P(), P(None, "i"))
    assert grids(fn, DENSE, X) == DENSE_GRIDS


def attention_of_own_heads(p, x):
    q, k, v = (jnp.einsum("btd,dhn->bthn", x, p[name]) for name in "qkv")
    return lax.psum(jnp.einsum("bthn,hnd->btd", attention(q, k, v), p["o"]), "i")


@pytest.mark.parametrize("count", [2, 4])
def test_shard_map_with_one_head_on_each_device_does_not_change_the_blocks(count):
    heads_over = {"q": P(None, "i"), "k": P(None, "i"), "v": P(None, "i"), "o": P("i")}
    params = {**dict.fromkeys("qkv", shape(D, H, N)), "o": shape(H, N, D)}
    assert grids(on_devices(attention_of_own_heads, heads_over, count=count), params, X) == {
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
def test_blocks_that_shard_map_hides_are_refused(name):
    body, cut, out, primitive = UNREAD_ON_DEVICES[name]
    sizes = (D, 2, 4) if "axis dropped" in name else (D, 8)
    fn = on_devices(lambda p, x: body(p["w"], x), {"w": cut}, out=out)
    with pytest.raises(ValueError, match=rf"w \(32, .*\): goes into {primitive} at"):
        infer_block_specs(fn, {"w": shape(*sizes)}, X, v="mean")


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
def test_attention_of_cudnn_is_cut_by_head():
    fn = lambda p, x: grouped(p, x, rotary_halves, by_cudnn)
    assert "dot_product_attention_fwd" in str(jax.make_jaxpr(fn)(GROUPED, X))
    assert grids(fn, GROUPED, X) == GROUPED_GRIDS
    source = pathlib.Path(__file__).read_text().splitlines()
    why = explain(fn, GROUPED, X, parameter="q", v="mean")
    line = int(re.search(r"inner product in \S+ at \S*test_infer.py:(\d+)", why)[1])
    assert "dot_product_attention" in source[line - 1]


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("layout", ["BTNH", "BNTH"])
def test_attention_of_cudnn_with_a_bias_is_cut_by_head(layout):
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
    text = explain(dense_attention, DENSE, X, parameter="q", v="mean")
    assert text.startswith("q (32, 32): 1 x 4 blocks\n")
    assert re.search(r"used in dot_general at \S*parts.py:\d+", text)
    source = pathlib.Path(parts.__file__).read_text().splitlines()
    line = int(re.search(r"inner product in \S+ at \S*parts.py:(\d+)", text)[1])
    assert "bthn,bshn->bhts" in source[line - 1]
    assert "inner product" not in explain(dense_attention, DENSE, X, parameter="v", v="mean")
    with pytest.raises(ValueError, match="explain: parameter"):
        explain(dense_attention, DENSE, X, parameter="z", v="mean")
