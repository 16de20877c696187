"""Layers: stacked, chosen, in time, of images and of rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.ode import odeint

from tests.partition.dataflow.models.parts import (
    IMAGE,
    INDEX,
    ROWS,
    TOKENS,
    B,
    D,
    F,
    T,
    V,
    X,
    conv,
    each,
    rms_norm,
    shape,
    shapes,
    stacked,
)

# --- stacks ---------------------------------------------------------------------------------------


LAYER = shapes(g=(D,), u=(D, F), b=(F,), w=(F, D))
LAYER_GRIDS = {"g": (1,), "u": (1, F), "b": (F,), "w": (1, D)}
STACK, STACK_GRIDS = stacked(LAYER, 4), each(LAYER_GRIDS, 4)


def layer(p, x):
    return x + jax.nn.relu(rms_norm(x) * p["g"] @ p["u"] + p["b"]) @ p["w"]


def without(grids, *names):
    return {name: grid for name, grid in grids.items() if name not in names}


def chosen_for_each(p, x):
    index = (x[:, 0] > 0).astype("int32")
    return jax.vmap(lambda i, x: layer(jax.tree.map(lambda w: w[i], p), x))(index, x)


def members(p, x):
    return jax.vmap(jax.vmap(layer, (None, 0)), (0, None))(p, x).mean(0)


def members_last(p, x):
    return jax.vmap(layer, (-1, None), -1)(p, x)


def stages(p, x):
    """Two stages of two layers, at work on parts of the examples."""
    inputs, state = x.reshape(2, 1, D), jnp.zeros((2, 1, D))
    stage = lambda p, x: lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]

    def step(state, t):
        now = jnp.where(t < 2, inputs[jnp.minimum(t, 1)], 0)
        state = jnp.where((jnp.arange(2) == 0)[:, None, None], now[None], state)
        out = jax.vmap(stage)(p, state)
        return jnp.roll(out, 1, 0), out[-1]

    return lax.scan(step, state, jnp.arange(3))[1]


def until_sure(p, x):
    """The same layer, as often as a neuron says."""

    def body(carry):
        x, sure, count = carry
        x = layer(p, x)
        return x, sure + jax.nn.sigmoid(x @ p["h"])[:, 0], count + 1

    more = lambda carry: (carry[1] < 0.99).any() & (carry[2] < 5)
    x, sure, _ = lax.while_loop(more, body, (x, jnp.zeros(B), 0))
    return x * sure[:, None]


def gates_in_a_scan(p, x):
    return lax.scan(lambda x, p: (x + p["s"] * jnp.tanh(x @ p["w"]), None), x, p)[0]


def gates_by_index(p, x):
    for i in range(3):
        x = x + p["s"][i] * jnp.tanh(x @ p["w"][i])
    return x


def gates_iterated_over(p, x):
    for s, w in zip(jnp.split(p["s"], 3), p["w"], strict=True):
        x = x + s * jnp.tanh(x @ w)
    return x


def layers_weighed(p, x):
    _, ys = lax.scan(lambda x, w: (jnp.tanh(x @ w),) * 2, x, p["w"])
    return jnp.einsum("l,lbd->bd", jax.nn.softmax(p["s"]), ys)


GATES = shapes(s=(3,), w=(3, D, D))


# --- mixtures of experts --------------------------------------------------------------------------


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


def mixture_in_a_scan(p, x):
    gates, index = lax.top_k(jax.nn.sigmoid(x @ p["router"]) + p["b"], 2)
    gates = (jax.nn.one_hot(index, 3) * gates[..., None]).sum(2)

    def one(total, now):
        u, w, gate = now
        return total + gate[..., None] * (jax.nn.relu(x @ u) @ w), None

    return lax.scan(one, jnp.zeros_like(x), (p["u"], p["w"], jnp.moveaxis(gates, -1, 0)))[0]


def mixture_of_slots(p, x):
    logits = jnp.einsum("btd,des->btes", x, p["router"])
    y = jnp.einsum("btes,btd->ebsd", jax.nn.softmax(logits, 1), x)
    y = jnp.einsum("ebsf,efd->ebsd", jax.nn.relu(jnp.einsum("ebsd,edf->ebsf", y, p["u"])), p["w"])
    back = jax.nn.softmax(logits.reshape(B, T, -1)).reshape(logits.shape)
    return jnp.einsum("btes,ebsd->btd", back, y)


MIXTURE = {"router": shape(D, 3), "u": shape(3, D, 16), "w": shape(3, 16, D)}
MIXTURE_GRIDS = {"router": (1, 3), "u": (3, 1, 16), "w": (3, 1, D)}


# --- in time --------------------------------------------------------------------------------------


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


def state_space(p, x):
    z = lax.conv_general_dilated(x @ p["in"], p["conv"], (1,), [(3, 0)], feature_group_count=16,
                                 dimension_numbers=("NWC", "WIO", "NWC"))  # fmt: skip
    dt = jax.nn.softplus(z @ p["dt"] + p["bias"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["a"]))
    inputs = dt[..., None] * (z @ p["b"])[:, :, None] * z[..., None]
    combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    _, h = lax.associative_scan(combine, (decay, inputs), axis=1)
    return (jnp.einsum("btdn,btn->btd", h, z @ p["c"]) + p["d"] * z) @ p["out"]


def state_space_dual(p, x):
    """As attention: what reads the state and what writes it are queries and keys."""
    z, u, dt = jnp.split(x @ p["in"], [10, 10 + 10 + 12], -1)
    u = jax.nn.silu(conv(u, p["conv"], padding=[(3, 0)], feature_group_count=22))
    u, b, c = jnp.split(u, [10, 16], -1)
    dt = jax.nn.softplus(dt + p["bias"])
    total = jnp.cumsum(dt * -jnp.exp(p["a"]), 1).swapaxes(1, 2)
    decay = jnp.exp(
        jnp.where(np.tril(np.ones((T, T), bool)), total[..., None] - total[..., None, :], -jnp.inf)
    )
    scores = jnp.einsum("bln,bsn->bls", c, b)[:, None] * decay
    u = u.reshape(B, T, 2, 5)
    y = jnp.einsum("bhls,bsh,bshp->blhp", scores, dt, u) + u * p["d"][:, None]
    y = y.reshape(B, T, 10) * jax.nn.silu(z)
    return rms_norm(y) * p["g"] @ p["out"]


def padded_depthwise(p, x):
    y = jnp.pad(x @ p["w"], ((0, 0), (3, 0), (0, 0)))
    y = conv(y, p["conv"], padding="VALID", feature_group_count=20)
    k, q, v = y[..., :8], y[..., 8:16], y[..., 16:]
    return jnp.einsum("zts,zsp->ztp", jnp.einsum("ztn,zsn->zts", q, k), v)


def long_filter(p, x):
    """A convolution as long as the signal, of a filter that a net of places makes."""
    t = jnp.linspace(0, 1, T)[:, None]
    places = jnp.concatenate([t, jnp.cos(t * jnp.arange(1, 4))], -1)
    h = jnp.sin(places @ p["u"]) @ p["w"] * jnp.exp(-t * jnp.linspace(1, 5, F))
    y = x @ p["in"]
    spectrum = jnp.fft.rfft(y, n=2 * T, axis=1) * jnp.fft.rfft(h, n=2 * T, axis=0)
    return (jnp.fft.irfft(spectrum, n=2 * T, axis=1)[:, :T] + y * p["d"]) @ p["o"]


def filtered(p, x):
    spectrum = jnp.fft.rfft(x @ p["w"], n=12, axis=0) * jnp.fft.rfft(p["filter"], n=12, axis=0)
    return jnp.fft.irfft(spectrum, n=12, axis=0)[:9]


def dilated(step):
    """Gated convolutions of two taps, and what each adds to the outputs."""

    def forward(p, x, speaker):
        y, out = x @ p["in"], 0.0
        for i in range(2):
            c = p["speakers"][speaker] @ p["c"][i]
            a, b = jnp.split(step(y, p["w"][i], 2**i) + c[:, None], 2, -1)
            z = jnp.tanh(a) * jax.nn.sigmoid(b)
            out, y = out + z @ p["skip"][i], y + z @ p["res"][i]
        return out

    return forward


def past(x, d):
    return jnp.pad(x, ((0, 0), (d, 0), (0, 0)))[:, :T]


DILATED = shapes(speakers=(4, 3), w=(2, 2, 5, 10), c=(2, 3, 10), skip=(2, 5, 7), res=(2, 5, 5))
DILATED["in"] = shape(D, 5)
DILATED_GRIDS = {"speakers": (4, 1), "w": (2, 1, 1, 10), "c": (2, 1, 10), "skip": (2, 1, 7),
                 "res": (2, 1, 5), "in": (1, 5)}  # fmt: skip


def flow(p, x):
    """Coupled halves, turned around in between, and what the volume changes by."""
    log = 0.0
    for _ in range(2):
        a, b = jnp.split(x, 2, -1)
        s, t = jnp.split(jnp.tanh(a @ p["u"] + p["b"]) @ p["w"], 2, -1)
        s = jax.nn.log_sigmoid(s + 2)
        x, log = jnp.concatenate([a, b * jnp.exp(s) + t], -1)[:, ::-1], log + s.sum(-1)
    return -(x**2).sum(-1) / 2 + log


def masked_autoregressive(p, x):
    degrees = np.arange(F) % (D - 1)
    first = (np.arange(D)[:, None] <= degrees).astype("float32")
    second = np.tile(degrees[:, None] < np.arange(D), (1, 2)).astype("float32")
    y = jnp.tanh(x @ (p["u"] * first)) @ (second * p["w"])
    mean, log = jnp.split(y, 2, -1)
    return (-(((x - mean) * jnp.exp(-log)) ** 2) / 2 - log).sum(-1)


def solved_in_time(p, x):
    field = lambda y, t, p: jnp.tanh(y @ p["u"] + p["b"]) @ p["w"]
    return odeint(field, jnp.tanh(x @ p["in"]), jnp.array([0.0, 1.0]), p)[-1] @ p["o"]


# --- solved, and multiplied out -------------------------------------------------------------------


def solved_triangle(p, x, low):
    """Whitened over the examples, by numbers that are data."""
    return (
        lax.linalg.triangular_solve(low, jnp.tanh(x @ p["w"]), left_side=True, lower=True) @ p["o"]
    )


def solved_positive(p, x, gram):
    factor = jnp.linalg.cholesky(gram + jnp.eye(B))
    return jax.scipy.linalg.cho_solve((factor, True), x @ p["w"])


def bilinear(p, x):
    a, b = jnp.tanh(x[:, 0] @ p["a"]), jnp.tanh(x[:, 1] @ p["b"])
    return jnp.einsum("bi,oij,bj->bo", a, p["w"], b)


def multiplied(p, x):
    return (jnp.tanh(x @ p["a"]) * jnp.tanh(x @ p["b"])) @ p["o"]


def factorisation(p, x):
    y = x @ p["v"]
    return x @ p["w"] + (y**2 - x**2 @ p["v"] ** 2).sum(-1, keepdims=True)


def crossed(p, x):
    y = x
    for i in range(2):
        y = x * (y @ p["w"][i])[:, None] + p["b"][i] + y
    return y @ p["o"]


def additive_scores(p, x, y):
    """The scores of a sequence are one neuron's."""
    scores = jnp.tanh((x @ p["q"])[:, None] + y @ p["k"] + p["b"]) @ p["v"]
    weights = jax.nn.softmax(scores)
    copied = jnp.zeros((B, V)).at[jnp.arange(B)[:, None], jnp.arange(T)].add(weights)
    return jnp.einsum("bt,btd->bd", weights, y) @ p["o"] + copied


def graph_convolution(p, x, adjacency):
    return adjacency @ jax.nn.relu(adjacency @ x @ p["w"] + p["b"]) @ p["u"]


def graph_of_relations(p, x, sources, targets, kind):
    y = jnp.einsum("md,mdf->mf", x[sources], p["r"][kind])
    y = jax.ops.segment_sum(y, targets, 9) + (1 + p["s"]) * (x @ p["w"])
    return jax.nn.relu(y) @ p["o"]


# --- images, and what is written beside -----------------------------------------------------------


def convolutions(p, image):
    x = conv(image, p["first"])
    x = conv(x, p["depthwise"], feature_group_count=8)
    x = conv(x, p["grouped"], feature_group_count=2)
    x = lax.conv_transpose(x, p["up"], (2, 2), "SAME")
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME") * p["gain"]


def down_and_up(p, image, time):
    def norm(x):
        y = x.reshape(*x.shape[:3], 2, -1)
        y = y - y.mean((1, 2, 4), keepdims=True)
        return (y / jnp.sqrt((y**2).mean((1, 2, 4), keepdims=True) + 1e-5)).reshape(x.shape)

    x = conv(image, p["first"])
    angle = time[:, None] * jnp.exp(-jnp.arange(3.0))
    t = jnp.pad(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], 1), ((0, 0), (0, 1)))
    y = conv(jax.nn.silu(norm(x) * p["g"]), p["down"], 2) + (t @ p["t"])[:, None, None]
    y = jax.image.resize(norm(y) * p["h"], (B, 8, 8, 8), "bilinear")
    return conv(jnp.concatenate([y, x], -1), p["up"])


def tiled_token(p, x):
    x = jnp.concatenate([jnp.tile(p["c"], (x.shape[0], 1, 1)), x], 1)
    return jnp.tanh(x @ p["w"])


def tiled_mean(p, x):
    mean = jnp.tanh(x.mean(1, keepdims=True) @ p["a"])
    return jnp.concatenate([x, jnp.tile(mean, (1, T, 1))], -1) @ p["b"]


def unread_elsewhere(p, x):
    """What is sorted is nothing that an output depends on."""
    jnp.sort(p["w"].ravel())[-3:]
    return x @ p["w"]


# --- rows -----------------------------------------------------------------------------------------


def into_conv(rows, **options):
    def forward(p, tokens):
        return jax.nn.relu(conv(rows(p["e"], tokens), p["w"], **options)).max(1) @ p["o"]

    return forward


BY_ROWS = {
    "rows": lambda e, t: e[t],
    "one-hot rows": lambda e, t: jax.nn.one_hot(t, V) @ e,
    "masked rows": lambda e, t: e[t] * (t > 0)[..., None],
}


def hashed(p, x):
    index = (jnp.abs(x[:, :3]) * 10).astype("int32").sum(-1) * jnp.arange(1, 3)[:, None] % V
    y = jax.vmap(lambda table, index: table[index])(p["e"], index)
    return jax.nn.relu(jnp.moveaxis(y, 0, 1).reshape(B, -1) @ p["w"])


def planes(p, x):
    at = jnp.clip((x[:, :3] * 4).astype("int32"), 0, 4)
    y = (
        p["e"][0, at[:, 0], at[:, 1]]
        * p["e"][1, at[:, 1], at[:, 2]]
        * p["e"][2, at[:, 0], at[:, 2]]
    )
    return jax.nn.relu(y @ p["w"])


def positions(table):
    return lambda p, x: jnp.tanh((x + table(p["pos"], x)) @ p["w"])


def both_positions(p, tokens):
    """Rows of tokens plus the whole table, times gains of each."""
    return (p["e"][tokens] * p["g"] + p["pos"] * p["h"]) @ p["w"]


def bag(p, tokens):
    rows = jnp.take(p["e"], tokens.ravel(), axis=0)
    pooled = jax.ops.segment_sum(rows, jnp.repeat(jnp.arange(B), T), B) / T
    return jax.nn.relu(pooled @ p["w"])


NEURONS = {"w": shape(D, 7)}


MODELS = {
    "named": (lambda p, x: jnp.tanh(checkpoint_name(x @ p["w"], "y")), NEURONS, [X], {"w": (1, 7)}),
    "a layer for each example": (
        chosen_for_each, stacked(LAYER, 2), [ROWS], without(each(LAYER_GRIDS, 2), "b"),
    ),
    "members": (members, STACK, [ROWS], without(STACK_GRIDS, "g")),
    "members, last": (
        members_last, {name: shape(*p.shape, 4) for name, p in LAYER.items()}, [ROWS],
        {name: (*grid, 4) for name, grid in without(LAYER_GRIDS, "g").items()},
    ),
    "stages": (
        stages, stacked(stacked(LAYER, 2), 2), [ROWS],
        without(each(each(LAYER_GRIDS, 2), 2), "g"),
    ),
    "until sure": (
        until_sure, {**LAYER, "h": shape(D, 1)}, [ROWS], {**LAYER_GRIDS, "h": (1, 1)},
    ),
    "gates in a scan": (gates_in_a_scan, GATES, [ROWS], {"s": (3,), "w": (3, 1, D)}),
    "gates by index": (gates_by_index, GATES, [ROWS], {"s": (3,), "w": (3, 1, D)}),
    "gates iterated over": (gates_iterated_over, GATES, [ROWS], {"s": (3,), "w": (3, 1, D)}),
    "gains in a scan": (
        gates_in_a_scan, {**GATES, "s": shape(3, D)}, [ROWS], {"s": (3, 1), "w": (3, 1, D)},
    ),
    "layers weighed": (layers_weighed, GATES, [ROWS], {"w": (3, 1, D)}),
    "mixture, dense": (mixture_dense, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, gathered": (mixture_gathered, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, dispatched": (mixture_dispatched, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, scattered": (mixture_scattered, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture, ragged": (mixture_ragged, MIXTURE, [X], MIXTURE_GRIDS),
    "mixture in a scan": (
        mixture_in_a_scan, {**MIXTURE, "b": shape(3)}, [X], {**MIXTURE_GRIDS, "b": (3,)},
    ),
    "mixture of slots": (
        mixture_of_slots, {**MIXTURE, "router": shape(D, 3, 2)}, [X],
        {**MIXTURE_GRIDS, "router": (1, 3, 2)},
    ),
    "LSTM": (
        lstm, shapes(w=(D, 20), u=(5, 20), b=(20,)), [X],
        {"w": (1, 20), "u": (1, 20), "b": (20,)},
    ),
    "GRU, while": (
        gru_while, shapes(w=(D, 10), u=(5, 10), v=(D, 5), y=(5, 5)), [X],
        {"w": (1, 10), "u": (1, 10), "v": (1, 5), "y": (1, 5)},
    ),
    "state space": (
        state_space,
        {"in": shape(D, 16), "conv": shape(4, 1, 16), "dt": shape(16, 16), "bias": shape(16),
         "b": shape(16, 3), "c": shape(16, 3), "a": shape(16, 3), "d": shape(16),
         "out": shape(16, D)}, [X],
        {"in": (1, 16), "conv": (1, 1, 16), "dt": (1, 16), "bias": (16,), "b": (1, 3), "c": (1, 3),
         "a": (1, 1), "d": (1,), "out": (1, D)},
    ),
    "state space, dual": (
        state_space_dual,
        {"in": shape(D, 34), "conv": shape(4, 1, 22), "bias": shape(2), "a": shape(2),
         "d": shape(2), "g": shape(10), "out": shape(10, D)}, [X],
        {"in": (1, 10 + 10 + 2 + 2), "conv": (1, 1, 10 + 2), "bias": (2,), "a": (1,), "d": (1,),
         "g": (1,), "out": (1, D)},
    ),
    "depthwise, padded": (
        padded_depthwise, shapes(w=(D, 20), conv=(4, 1, 20)), [X],
        {"w": (1, 2 + 4), "conv": (1, 1, 2 + 4)},
    ),
    "long filter": (
        long_filter, {**shapes(u=(4, 9), w=(9, F), d=(F,), o=(F, 3)), "in": shape(D, F)}, [X],
        {"u": (1, 9), "w": (1, F), "d": (1,), "o": (1, 3), "in": (1, F)},
    ),
    "filtered": (filtered, shapes(w=(D, 8), filter=(9, 8)), [shape(9, D)], {"w": (1, 8)}),
    "dilated": (
        dilated(lambda x, w, d: conv(x, w, padding=[(d, 0)], rhs_dilation=(d,))), DILATED,
        [X, INDEX], DILATED_GRIDS,
    ),
    "dilated, stacked": (
        dilated(lambda x, w, d: jnp.einsum("kbtc,kco->bto", jnp.stack([past(x, d), x]), w)),
        DILATED, [X, INDEX], DILATED_GRIDS,
    ),
    "dilated, side by side": (
        dilated(lambda x, w, d: jnp.concatenate([past(x, d), x], -1) @ w.reshape(10, -1)),
        DILATED, [X, INDEX], DILATED_GRIDS,
    ),
    "flow": (
        flow, shapes(u=(D // 2, F), b=(F,), w=(F, D)), [ROWS],
        {"u": (1, F), "b": (F,), "w": (1, D)},
    ),
    "masked autoregressive": (
        masked_autoregressive, shapes(u=(D, F), w=(F, 2 * D)), [ROWS],
        {"u": (1, F), "w": (1, 2 * D)},
    ),
    "solved in time": (
        solved_in_time, {**shapes(u=(6, F), b=(F,), w=(F, 6), o=(6, 3)), "in": shape(D, 6)},
        [ROWS], {"u": (1, F), "b": (F,), "w": (1, 6), "o": (1, 3), "in": (1, 6)},
    ),
    "solved, triangle": (
        solved_triangle, shapes(w=(D, F), o=(F, 3)), [ROWS, shape(B, B)],
        {"w": (1, F), "o": (1, 3)},
    ),
    "solved, positive": (solved_positive, NEURONS, [ROWS, shape(B, B)], {"w": (1, 7)}),
    "multiplied": (
        multiplied, shapes(a=(D, F), b=(D, F), o=(F, 3)), [ROWS],
        {"a": (1, F), "b": (1, F), "o": (1, 3)},
    ),
    "factorisation": (
        factorisation, shapes(v=(D, 4), w=(D, 1)), [ROWS], {"v": (1, 4), "w": (1, 1)},
    ),
    "crossed": (
        crossed, shapes(w=(2, D), b=(2, D), o=(D, 3)), [ROWS],
        {"w": (2, 1), "b": (2, D), "o": (1, 3)},
    ),
    "additive scores": (
        additive_scores, shapes(q=(D, F), k=(D, F), b=(F,), v=(F,), o=(D, V)), [ROWS, X],
        {"q": (1, F), "k": (1, F), "b": (F,), "v": (1,), "o": (1, V)},
    ),
    "graph convolution": (
        graph_convolution, shapes(w=(D, 7), b=(7,), u=(7, 3)), [shape(9, D), shape(9, 9)],
        {"w": (1, 7), "b": (7,), "u": (1, 3)},
    ),
    "graph of relations": (
        graph_of_relations, shapes(r=(4, D, 7), s=(), w=(D, 7), o=(7, 3)),
        [shape(9, D), *[shape(15, dtype="int32")] * 3],
        {"r": (4, 1, 7), "s": (), "w": (1, 7), "o": (1, 3)},
    ),
    "convolutions": (
        convolutions,
        shapes(first=(3, 3, 3, 8), depthwise=(3, 3, 1, 8), grouped=(3, 3, 4, 6), up=(2, 2, 6, 5),
               gain=(5,)), [IMAGE],
        {"first": (1, 1, 1, 8), "depthwise": (1, 1, 1, 8), "grouped": (1, 1, 1, 6),
         "up": (1, 1, 1, 5), "gain": (1,)},
    ),
    "down and up": (
        down_and_up,
        shapes(first=(3, 3, 3, 8), g=(8,), down=(3, 3, 8, 8), t=(7, 8), h=(8,), up=(3, 3, 16, 3)),
        [IMAGE, shape(B)],
        {"first": (1, 1, 1, 8), "g": (1,), "down": (1, 1, 1, 8), "t": (1, 8), "h": (1,),
         "up": (1, 1, 1, 3)},
    ),
    "tiled": (tiled_token, shapes(c=(1, 1, D), w=(D, 6)), [X], {"c": (1, 1, D), "w": (1, 6)}),
    "tiled, of data": (tiled_mean, shapes(a=(D, 5), b=(D + 5, 6)), [X], {"a": (1, 5), "b": (1, 6)}),
    "unread elsewhere": (unread_elsewhere, NEURONS, [X], {"w": (1, 7)}),
    **{
        f"{name} into a convolution": (
            into_conv(rows), shapes(e=(V, D), w=(3, D, 5), o=(5, 2)), [TOKENS],
            {"e": (V, 1), "w": (1, 1, 5), "o": (1, 2)},
        )
        for name, rows in BY_ROWS.items()
    },
    "rows into a depthwise convolution": (
        into_conv(BY_ROWS["rows"], feature_group_count=D),
        shapes(e=(V, D), w=(3, 1, D), o=(D, 2)), [TOKENS],
        {"e": (V, 1), "w": (1, 1, D), "o": (1, 2)},
    ),
    "rows of levels": (
        hashed, shapes(e=(2, V, 5), w=(10, 7)), [ROWS], {"e": (2, V, 1), "w": (1, 7)},
    ),
    "rows of planes": (
        planes, shapes(e=(3, 5, 5, 4), w=(4, 7)), [ROWS], {"e": (3, 5, 5, 1), "w": (1, 7)},
    ),
    "rows in bags": (bag, shapes(e=(V, D), w=(D, 7)), [TOKENS], {"e": (V, 1), "w": (1, 7)}),
    "rows plus a table": (
        both_positions, shapes(e=(V, D), g=(D,), pos=(T, D), h=(D,), w=(D, 7)), [TOKENS],
        {"e": (V, 1), "pos": (T, D), "w": (1, 7)},
    ),
    **{
        f"positions, {name}": (
            positions(table), shapes(pos=(size, D), w=(D, 7)), [X],
            {"pos": (size, cut), "w": (1, 7)},
        )
        for name, size, cut, table in (
            ("whole", T, D, lambda pos, x: pos),
            ("sliced", 9, D, lambda pos, x: pos[: x.shape[1]]),
            ("by count", 9, 1, lambda pos, x: pos[jnp.arange(T)]),
            ("from a place", 9, 1, lambda pos, x: lax.dynamic_slice_in_dim(
                pos, x[0, 0, 0].astype("int32"), T)),
        )
    },
    "bilinear": (
        bilinear, shapes(a=(D, 5), b=(D, 6), w=(3, 5, 6)), [X],
        {"a": (1, 5), "b": (1, 6), "w": (3, 1, 1)},
    ),
}  # fmt: skip

FINER = {
    # A product with what is one at one row, and a sum, is no choice of rows.
    "one-hot rows, multiplied out": (
        lambda p, i: (jax.nn.one_hot(i, V)[..., None] * p["e"]).sum(1) @ p["w"],
        shapes(e=(V, D), w=(D, 7)), [INDEX], {"e": (V, 1), "w": (1, 7)}, {"e": (V, D)},
    ),
    # Two kernels are contracted before either meets data.
    "a number of each head, kernels first": (
        lambda p, x: jnp.einsum("bd,dh->bh", x, jnp.einsum("dhn,hn->dh", p["w"], p["a"])),
        shapes(w=(D, 4, 8), a=(4, 8)), [ROWS], {"w": (1, 4, 1), "a": (4, 1)}, {"w": (1, 4, 8)},
    ),
    # The second contraction, of data too, is one of the outputs of the first.
    "bilinear, of data": (
        lambda p, x, y: jnp.einsum("bi,oij,bj->bo", x, p["w"], y),
        shapes(w=(3, D, D)), [ROWS, ROWS], {"w": (3, 1, 1)}, {"w": (3, 1, D)},
    ),
}  # fmt: skip
