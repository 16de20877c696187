"""Kernels: how they are made before their use, and the gains beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
    layer_norm,
    shape,
    shapes,
    stop,
)

# --- a kernel that is changed before it is used ---------------------------------------------------


def changed(change):
    """A hidden layer whose kernel is changed by its parameters and a number for each element."""
    return lambda p, x, *data: jax.nn.relu(x @ change(p, p["w"], x, *data)) @ p["o"]


def straight(w, rounded):
    return w + stop(rounded - w)


def to_own_steps(p, w, x):
    scale = jnp.abs(w).max(0, keepdims=True) / 127
    return straight(w, jnp.round(w / scale) * scale)


def to_learned_steps(p, w, x):
    w = jnp.clip(w / p["s"], -8, 7)
    return straight(w, jnp.round(w)) * p["s"]


def to_signs(p, w, x):
    return straight(jnp.clip(w, -1, 1), jnp.sign(w)) * jnp.abs(w).mean(0)


def to_three(p, w, x):
    scale = 1 / jnp.clip(jnp.abs(w).mean(), 1e-5)
    return straight(w, jnp.clip(jnp.round(w * scale), -1, 1) / scale)


def in_eight_bits(p, x):
    """Both are rounded, and scaled after the product."""

    def rounded(y, axis):
        scale = jnp.abs(y).max(axis, keepdims=True) / 127
        return jnp.round(y / scale).astype("int8"), scale

    (a, s), (w, t) = rounded(x, -1), rounded(p["w"], 0)
    y = lax.dot_general(a, w, (((1,), (0,)), ((), ())), preferred_element_type="int32")
    return jax.nn.relu(y.astype("float32") * s * t) @ p["o"]


def spectral(p, w, x, u):
    u = stop(u / jnp.linalg.norm(u))
    return w / (stop(x[0]) @ w @ u)


def dropped(p, w, x):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.8, w.shape), w / 0.8, 0)


def sampled(p, w, x, noise):
    return w + jax.nn.softplus(p["rho"]) * noise


MASK = np.arange(D)[:, None] % 3 < np.arange(F) % 4

CHANGES = {
    "scaled by a number of data": (lambda p, w, x, s: w * s, [shape()]),
    "scaled by a mean of data": (lambda p, w, x: w * x.mean(), []),
    "masked by data": (lambda p, w, x, m: w * m, [shape(D, F)]),
    "masked by a choice": (lambda p, w, x, m: jnp.where(m > 0, w, 0), [shape(D, F)]),
    "masked by what is closed over": (lambda p, w, x: w * MASK, []),
    "masked by parts": (
        lambda p, w, x: w * jnp.concatenate([jnp.ones(F - 4), jnp.zeros(4)]), [],
    ),
    "rounded by data": (lambda p, w, x, s: jnp.round(w / s) * s, [shape()]),
    "with noise": (lambda p, w, x, m: w + m, [shape(D, F)]),
    "added to data": (lambda p, w, x, m: m + 0.1 * w, [shape(D, F)]),
    "dropped": (dropped, []),
    "pruned by a product": (lambda p, w, x: w * (jnp.abs(w) > 0.1), []),
    "pruned by its largest": (
        lambda p, w, x: jnp.where(jnp.abs(w) > 0.1 * jnp.abs(w).max(), w, 0), [],
    ),
    "in few bits": (lambda p, w, x: w.astype("float8_e4m3fn").astype("float32"), []),
    "in steps of each output": (to_own_steps, []),
    "in signs": (to_signs, []),
    "in three values": (to_three, []),
    "spectral norm": (spectral, [shape(F)]),
    "centred": (lambda p, w, x: (w - w.mean(0)) / jnp.maximum(jnp.abs(w).max(), 1), []),
    "norm at most": (
        lambda p, w, x: w * jnp.minimum(1, 2 / jnp.sqrt((w**2).sum(0))), [],
    ),
    "upper triangle": (lambda p, w, x: jnp.triu(w), []),
}  # fmt: skip

CHANGED = shapes(w=(D, F), o=(F, 3))
CHANGED_GRIDS = {"w": (1, F), "o": (1, 3)}


def weight_norm(p, x):
    return x @ (p["v"] / jnp.sqrt((p["v"] ** 2).sum(0)) * p["g"])


def weight_norm_after(p, x):
    return x @ p["v"] / jnp.sqrt((p["v"] ** 2).sum(0)) * p["g"]


def weight_norm_of_all(p, x):
    return x @ (p["v"] / jnp.sqrt(jnp.vdot(p["v"], p["v"])) * p["s"])


def cosine_classes(p, x, label):
    cosine = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    cosine = cosine @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))
    own = jax.nn.one_hot(label, 5) > 0
    return jax.nn.log_softmax(64 * jnp.where(own, jnp.cos(jnp.arccos(cosine) + 0.5), cosine))


def standardised_conv(p, image):
    w = p["w"]
    w = w - w.mean((0, 1, 2), keepdims=True)
    return conv(image, w * lax.rsqrt(w.var((0, 1, 2), keepdims=True) + 1e-4) * p["g"])


RESIZE = np.kron(np.eye(2), np.full((1, 2), 0.5)).astype("float32")  # 4 rows to 2


def resized_conv(p, image):
    return conv(image, jnp.einsum("ij,kl,jlco->ikco", RESIZE, RESIZE, p["w"]), 2, "VALID")


# --- beside a kernel that is data -----------------------------------------------------------------


def beside(change):
    return lambda p, x, w: jax.nn.relu(change(p, w, x)) @ p["o"]


def by_magnitude(p, w, x):
    w = w + p["a"] @ p["b"]
    return x @ (p["m"] * w / stop(jnp.linalg.norm(w, axis=0, keepdims=True)))


def apart(p, w, x):
    kept = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.9, x.shape), x / 0.9, 0)
    return x @ w + jnp.einsum("br,rf->bf", jnp.einsum("bd,dr->br", kept, p["a"]), p["b"]) * 4


def low_rank_scanned(p, x, base):
    def layer(x, now):
        a, b, w = now
        return x + jnp.tanh(x @ (stop(w) + a @ b)), None

    return lax.scan(layer, x, (p["a"], p["b"], base))[0]


LOW = {"a": shape(D, 2), "b": shape(2, F)}
LOW_GRIDS = {"a": (1, 2), "b": (1, F)}


# --- kernels that are made, or mixed --------------------------------------------------------------


def made_for_each(p, x, z):
    w = (jax.nn.relu(z @ p["u"]) @ p["w"]).reshape(B, D, F)
    return jnp.einsum("bd,bdf->bf", x, w) @ p["o"]


def made_once(p, x, z):
    return jnp.tanh(x @ (jax.nn.relu(z[0] @ p["u"]) @ p["w"]).reshape(D, F)) @ p["o"]


def outputs_mixed(p, x, z):
    y = jnp.einsum("bd,kdf->bkf", x, p["w"])
    return jnp.einsum("bk,bkf->bf", jax.nn.softmax(z @ p["r"]), y) @ p["o"]


def kernels_mixed(p, x, z):
    w = jnp.einsum("bk,kdf->bdf", jax.nn.softmax(z @ p["r"]), p["w"])
    return jnp.einsum("bd,bdf->bf", x, w) @ p["o"]


def convs_mixed(p, image, z):
    w = jnp.einsum("bk,khwio->bhwio", jax.nn.sigmoid(z @ p["r"]), p["w"])
    y = jax.vmap(lambda x, w: conv(x[None], w)[0])(image, w)
    return y.mean((1, 2)) @ p["o"]


def modulated_grouped(x, w, style):
    """All examples in one convolution, a group each."""
    w = w[None] * style[:, None, None, :, None]
    w = w * lax.rsqrt(jnp.square(w).sum((1, 2, 3), keepdims=True) + 1e-8)
    x = x.transpose(1, 2, 0, 3).reshape(1, 4, 4, B * 5)
    w = w.transpose(1, 2, 3, 0, 4).reshape(3, 3, 5, B * 7)
    return conv(x, w, feature_group_count=B).reshape(4, 4, B, 7).transpose(2, 0, 1, 3)


def modulated_mapped(x, w, style):
    def one(x, style):
        own = w * style[:, None]
        return conv(x[None], own * lax.rsqrt((own**2).sum((0, 1, 2)) + 1e-8))[0]

    return jax.vmap(one)(x, style)


def modulated_scaled(x, w, style):
    """The inputs are scaled, and the outputs, by what the norms would be."""
    norm = lax.rsqrt(jnp.einsum("hwio,bi->bo", w**2, style**2) + 1e-8)
    return conv(x * style[:, None, None], w) * norm[:, None, None]


def modulated(way):
    def forward(p, x, z, noise):
        y = way(x, p["w"] / np.sqrt(45), z @ p["u"] + p["b"])
        y = jax.nn.leaky_relu(y + noise * p["s"] + p["c"])
        blur = np.outer([1, 2, 1], [1, 2, 1])[..., None, None] * np.ones((1, 1, 1, 7)) / 16
        y = conv(y, blur.astype("float32"), feature_group_count=7)
        return conv(y, p["o"])

    return forward


MODULATED = shapes(w=(3, 3, 5, 7), u=(6, 5), b=(5,), s=(), c=(7,), o=(1, 1, 7, 3))
MODULATED_GRIDS = {"w": (1, 1, 1, 7), "u": (1, 5), "b": (5,), "s": (), "c": (7,), "o": (1, 1, 1, 3)}
STYLED = [shape(B, 4, 4, 5), shape(B, 6), shape(B, 4, 4, 1)]


# --- gains, and norms -----------------------------------------------------------------------------


def gated_norm(norm):
    """A norm of the product of two activations, each coordinate of which goes on."""

    def forward(p, x):
        return norm(jax.nn.silu(x @ p["u"]) * (x @ p["v"])) * p["g"] @ p["o"]

    return forward


GATED = shapes(u=(D, F), v=(D, F), g=(F,), o=(F, 3))
GATED_GRIDS = {"u": (1, F), "v": (1, F), "g": (1,), "o": (1, 3)}


def one_pass(y):
    mean, square = y.mean(-1, keepdims=True), (y**2).mean(-1, keepdims=True)
    return (y - mean) * lax.rsqrt(square - mean**2 + 1e-6)


def gated_residual(p, x):
    a, gate = jnp.split(jax.nn.elu(x @ p["u"]) @ p["w"], 2, -1)
    return layer_norm(x + a * jax.nn.sigmoid(gate)) * p["g"]


def squeezed_twice(p, image):
    """Gates of channels, then of places."""
    x = conv(image, p["w"])
    hidden = lambda y: jax.nn.relu(y @ p["u"]) @ p["v"]
    x = x * jax.nn.sigmoid(hidden(x.mean((1, 2))) + hidden(x.max((1, 2))))[:, None, None]
    both = jnp.stack([x.mean(-1), x.max(-1)], -1)
    return (x * jax.nn.sigmoid(conv(both, p["place"]))).max((1, 2)) @ p["o"]


def undone(p, x):
    """What was scaled and shifted is scaled and shifted back."""
    y = (x - x.mean(1, keepdims=True)) * p["g"] + p["b"]
    y = (y.swapaxes(1, 2) @ p["w"]).swapaxes(1, 2)
    return (y - p["b"]) / (p["g"] + 1e-6)


def token_shift(p, x):
    """Each position beside the one before, mixed by gains, in a state of exponents."""
    past = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    k, v, r = ((x * p["m" + n] + past * (1 - p["m" + n])) @ p[n] for n in "kvr")

    def step(carry, now):
        a, b, largest = carry
        k, v = now
        top = jnp.maximum(largest, p["u"] + k)
        old, new = jnp.exp(largest - top), jnp.exp(p["u"] + k - top)
        out = (old * a + new * v) / (old * b + new)
        moved = largest - jnp.exp(p["w"])
        top = jnp.maximum(moved, k)
        old, new = jnp.exp(moved - top), jnp.exp(k - top)
        return (old * a + new * v, old * b + new, top), out

    zero = jnp.zeros((B, F))
    y = lax.scan(step, (zero, zero, zero - 1e38), (k.swapaxes(0, 1), v.swapaxes(0, 1)))[1]
    return (jax.nn.sigmoid(r) * y.swapaxes(0, 1)) @ p["o"]


def spatial_gate(p, x):
    u, v = jnp.split(jax.nn.gelu(x @ p["u"]), 2, -1)
    return (u * (jnp.einsum("btd,ts->bsd", layer_norm(v), p["s"]) + p["b"][:, None])) @ p["w"]


def mixer(p, x):
    y = jnp.einsum("bsd,st->btd", jax.nn.gelu(jnp.einsum("btd,ts->bsd", x, p["t"])), p["s"])
    return jax.nn.gelu((x + y) @ p["u"]) @ p["w"]


MODELS = {
    **{
        name: (changed(change), CHANGED, [ROWS, *data], CHANGED_GRIDS)
        for name, (change, data) in CHANGES.items()
    },
    "in learned steps": (
        changed(to_learned_steps), {**CHANGED, "s": shape()}, [ROWS], {**CHANGED_GRIDS, "s": ()},
    ),
    "in eight bits": (in_eight_bits, CHANGED, [ROWS], CHANGED_GRIDS),
    "sampled": (
        changed(sampled), {**CHANGED, "rho": shape(D, F)}, [ROWS, shape(D, F)],
        {**CHANGED_GRIDS, "rho": (1, F)},
    ),
    "weight norm": (
        weight_norm, shapes(v=(D, 7), g=(7,)), [X], {"v": (1, 7), "g": (7,)},
    ),
    "weight norm, after": (weight_norm_after, shapes(v=(D, 7), g=(7,)), [X], {"v": (1, 7)}),
    "weight norm of all": (
        weight_norm_of_all, shapes(v=(D, 7), s=()), [X], {"v": (1, 7), "s": ()},
    ),
    "cosine of classes": (cosine_classes, shapes(w=(D, 5)), [ROWS, INDEX], {"w": (1, 5)}),
    "standardised convolution": (
        standardised_conv, shapes(w=(3, 3, 3, 8), g=(8,)), [IMAGE], {"w": (1, 1, 1, 8), "g": (8,)},
    ),
    "resized convolution": (
        resized_conv, shapes(w=(4, 4, 3, 8)), [IMAGE], {"w": (1, 1, 1, 8)},
    ),
    "low rank, apart": (
        beside(apart), {**LOW, "o": shape(F, 3)}, [ROWS, shape(D, F)], {**LOW_GRIDS, "o": (1, 3)},
    ),
    "low rank, by magnitude": (
        beside(by_magnitude), {**LOW, **shapes(m=(F,), o=(F, 3))}, [ROWS, shape(D, F)],
        {**LOW_GRIDS, "m": (F,), "o": (1, 3)},
    ),
    "low rank, scanned": (
        low_rank_scanned, shapes(a=(3, D, 2), b=(3, 2, D)), [ROWS, shape(3, D, D)],
        {"a": (3, 1, 2), "b": (3, 1, D)},
    ),
    "gain beside a kernel": (
        beside(lambda p, w, x: x @ w * p["g"]), shapes(g=(F,), o=(F, 3)), [ROWS, shape(D, F)],
        {"g": (1,), "o": (1, 3)},
    ),
    "made for each": (
        made_for_each, shapes(u=(4, 9), w=(9, D * F), o=(F, 3)), [ROWS, shape(B, 4)],
        {"u": (1, 9), "w": (1, D * F), "o": (1, 3)},
    ),
    "made once": (
        made_once, shapes(u=(4, 9), w=(9, D * F), o=(F, 3)), [ROWS, shape(B, 4)],
        {"u": (1, 9), "w": (1, D * F), "o": (1, 3)},
    ),
    "outputs mixed": (
        outputs_mixed, shapes(r=(4, 3), w=(3, D, F), o=(F, 2)), [ROWS, shape(B, 4)],
        {"r": (1, 3), "w": (3, 1, F), "o": (1, 2)},
    ),
    "convolution modulated, grouped": (
        modulated(modulated_grouped), MODULATED, STYLED, MODULATED_GRIDS,
    ),
    "convolution modulated, mapped": (
        modulated(modulated_mapped), MODULATED, STYLED, MODULATED_GRIDS,
    ),
    "convolution modulated, scaled": (
        modulated(modulated_scaled), MODULATED, STYLED, MODULATED_GRIDS,
    ),
    "gated, layer norm": (gated_norm(layer_norm), GATED, [X], GATED_GRIDS),
    "gated, norm in one pass": (gated_norm(one_pass), GATED, [X], GATED_GRIDS),
    "gated, squeezed": (
        gated_norm(lambda y: y * jax.nn.sigmoid(y.mean(-1, keepdims=True))), GATED, [X],
        GATED_GRIDS,
    ),
    "gated, over its sum": (
        gated_norm(lambda y: y / y.sum(-1, keepdims=True)), GATED, [X], GATED_GRIDS,
    ),
    "gated residual": (
        gated_residual, shapes(u=(D, F), w=(F, 2 * D), g=(D,)), [X],
        {"u": (1, F), "w": (1, 2 * D), "g": (1,)},
    ),
    "squeezed twice": (
        squeezed_twice, shapes(w=(3, 3, 3, 8), u=(8, 2), v=(2, 8), place=(3, 3, 2, 1), o=(8, 5)),
        [IMAGE],
        {"w": (1, 1, 1, 8), "u": (1, 2), "v": (1, 8), "place": (1, 1, 1, 1), "o": (1, 5)},
    ),
    "gain by einsum": (
        lambda p, x: jnp.tanh(jnp.einsum("tk,k->tk", x, p["g"]) @ p["w"]),
        shapes(g=(D,), w=(D, 5)), [ROWS], {"g": (1,), "w": (1, 5)},
    ),
    "decay by einsum": (
        lambda p, x: jnp.exp(jnp.einsum("ld,dn->ldn", x, p["a"])), shapes(a=(D, 3)), [ROWS],
        {"a": (1, 1)},
    ),
    "decay by product": (
        lambda p, x: jnp.exp(x[..., None] * p["a"]), shapes(a=(D, 3)), [ROWS], {"a": (1, 1)},
    ),
    "scaled and back": (
        undone, shapes(g=(D,), b=(D,), w=(T, 5)), [X], {"g": (1,), "b": (D,), "w": (1, 5)},
    ),
    "token shift": (
        token_shift,
        shapes(**dict.fromkeys("kvr", (D, F)), mk=(D,), mv=(D,), mr=(D,), u=(F,), w=(F,), o=(F, 3)),
        [X],
        {**dict.fromkeys("kvr", (1, F)), "mk": (1,), "mv": (1,), "mr": (1,), "u": (F,), "w": (F,),
         "o": (1, 3)},
    ),
    "spatial gate": (
        spatial_gate, shapes(u=(D, F), s=(T, T), b=(T,), w=(F // 2, 3)), [X],
        {"u": (1, F), "s": (1, T), "b": (T,), "w": (1, 3)},
    ),
    "mixer": (
        mixer, shapes(t=(T, 9), s=(9, T), u=(D, 7), w=(7, D)), [X],
        {"t": (1, 9), "s": (1, T), "u": (1, 7), "w": (1, D)},
    ),
    "one by one out of a stack": (
        lambda p, x: x @ p["w"][0] @ p["w"][1] @ p["w"][2], shapes(w=(3, D, D)), [X],
        {"w": (3, 1, D)},
    ),
    "iterated over": (
        lambda p, x: functools.reduce(jnp.matmul, p["w"], x), shapes(w=(3, D, D)), [X],
        {"w": (3, 1, D)},
    ),
    "rows masked by parts": (
        lambda p, i: jnp.tanh(p["e"][i] * jnp.concatenate([jnp.ones(4), jnp.zeros(4)])),
        shapes(e=(V, 8)), [TOKENS], {"e": (V, 1)},
    ),
    "rows plus parts": (
        lambda p, i: jnp.tanh(p["e"][i] + jnp.pad(jnp.ones(6), (1, 1))), shapes(e=(V, 8)),
        [TOKENS], {"e": (V, 1)},
    ),
    "rows plus a slice": (
        lambda p, i: (p["e"][i] + p["pos"][None, :T]) @ p["w"],
        shapes(e=(V, D), pos=(9, D), w=(D, 7)), [TOKENS],
        {"e": (V, 1), "pos": (9, D), "w": (1, 7)},
    ),
    "embedding into a scan": (
        lambda p, tokens: lax.scan(lambda x, w: (x @ w, None), p["e"][tokens], p["w"])[0],
        shapes(e=(V, D), w=(3, D, D)), [TOKENS], {"e": (V, 1), "w": (3, 1, D)},
    ),
    "gain of rank one": (
        beside(lambda p, w, x: x @ w[:, :3] * p["d"] @ w[:3] * p["g"]),
        shapes(d=(3,), g=(F,), o=(F, 2)), [ROWS, shape(D, F)],
        {"d": (1,), "g": (1,), "o": (1, 2)},
    ),
}  # fmt: skip

# A kernel of each example: its inputs are axes of what data makes, as outputs are.
FINER = {
    "kernels mixed": (
        kernels_mixed, shapes(r=(4, 3), w=(3, D, F), o=(F, 2)), [ROWS, shape(B, 4)],
        {"r": (1, 3), "w": (1, 1, F), "o": (1, 2)}, {"w": (1, D, F)},
    ),
    "convolutions mixed": (
        convs_mixed, shapes(r=(4, 3), w=(3, 3, 3, 3, 7), o=(7, 2)), [IMAGE, shape(B, 4)],
        {"r": (1, 3), "w": (1, 1, 1, 1, 7), "o": (1, 2)}, {"w": (1, 3, 3, 3, 7)},
    ),
}  # fmt: skip
