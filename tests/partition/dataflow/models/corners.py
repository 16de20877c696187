"""Corners: sizes of one, single examples, loops of constants, vectors that are one-hot no more."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.partition.dataflow.models.parts import INDEX, ROWS, B, D, F, H, N, T, V, X, shape, shapes

# --- loops that carry what they do not use, and that mix what they carry --------------------------


def with_numbers(loop):
    return lambda p, x: jnp.tanh(x @ p["w"]) * loop(jnp.arange(5.0))


def turned_in_a_loop(p, x):
    """Each head is mixed with another, again and again, in a loop inside a loop."""
    q, k = (jnp.moveaxis((x @ p[name]).reshape(B * T, H, N), 1, 0) for name in "qk")
    mix = lambda pair: jax.nn.softmax(pair[0] @ pair[1].T) @ pair[0]
    return lax.fori_loop(0, 3, lambda _, q: lax.map(mix, (q, k)), q)


def counted(p, x):
    """Layers that are chosen by the counter of a loop."""
    layer = lambda i, x: jnp.tanh(x @ p["w"][i] + p["b"][i])
    return lax.fori_loop(0, 3, layer, x)


def from_zeros(p, x):
    """A linear recurrence, unrolled, whose first state is zero."""
    h = jnp.zeros((B, F))
    for t in range(T):
        h = h @ p["u"] + x[:, t] @ p["w"]
    return jnp.tanh(h) @ p["o"]


# --- vectors that were one-hot --------------------------------------------------------------------

NO_CHOICE = {
    "beside an input": lambda h, x, flag: h + x,
    "or an input": lambda h, x, flag: jnp.where(flag, h, x),
    "by a branch": lambda h, x, flag: lax.cond(flag, lambda: h, lambda: x),
    "all but it": lambda h, x, flag: 1 - h,
    "its exponential": lambda h, x, flag: jnp.exp(h),
    "softened": lambda h, x, flag: jax.nn.softmax(h),
    "summed up to it": lambda h, x, flag: jnp.cumsum(h, -1),
}


def after_choice(change):
    return lambda p, index, x, flag: jnp.tanh(change(jax.nn.one_hot(index, V), x, flag) @ p["w"])


def expert_of_each(p, index, x):
    """Inputs times a one-hot choice of the expert, in one contraction."""
    return jax.nn.relu(jnp.einsum("be,bd,edf->bf", jax.nn.one_hot(index, 3), x, p["w"])) @ p["o"]


# --- one example ----------------------------------------------------------------------------------


def tokens_of_one(p, x):
    return jax.nn.relu((x + p["pos"]) @ p["w"]) @ p["o"]


def features_of_one(p, x):
    return jax.nn.relu((x * p["g"] + p["b"]) @ p["w"]) @ p["o"]


def regression(p, x, y):
    return ((x @ p["w"] + p["b"] - y) ** 2).mean()


def times(p, t):
    """A layer of one input, written as a product."""
    return jnp.tanh(jnp.sin(t[:, None] * p["w"] + p["b"]) @ p["o"])


# --- layouts and members --------------------------------------------------------------------------


def turned(p, x):
    """A reshape that takes the axes in another order."""
    return jnp.tanh(x @ lax.reshape(p["w"], (D, H * N), (1, 0, 2)))


def critics(p, x):
    """Two at a time, whose last layer is a vector each."""
    one = lambda p: jnp.tanh(jnp.tanh(jnp.tanh(x @ p["u"]) @ p["v"])) @ p["w"]
    return jax.vmap(one)(p).min(0)


def ensemble(p, x):
    one = lambda p: jnp.tanh(jnp.tanh(x @ p["u"]) @ p["v"] * p["g"]) @ p["w"]
    return jax.vmap(one)(p)


def averaged(p, x):
    """The mean over an axis that vmap has named."""
    one = lambda x: jnp.tanh(x @ p["w"] - lax.pmean(x @ p["w"], "batch")) @ p["o"]
    return jax.vmap(one, axis_name="batch")(x)


def ridge(p, x):
    h = jnp.tanh(x @ p["w"])
    return jnp.linalg.solve(h.T @ h + jnp.eye(F), h.T @ x)


LAYER, LAYER_GRIDS = shapes(w=(D, 5)), {"w": (1, 5)}
CHOICE = [INDEX, shape(B, V), shape(dtype="bool")]
MODELS = {
    "numbers in a loop": (
        with_numbers(lambda c: lax.fori_loop(0, 3, lambda _, c: jnp.exp(c), c)),
        LAYER, [ROWS], LAYER_GRIDS,
    ),
    "numbers in a scan": (
        with_numbers(lambda c: lax.scan(lambda c, _: (jnp.cos(c), None), c, None, length=3)[0]),
        LAYER, [ROWS], LAYER_GRIDS,
    ),
    "turned in a loop": (turned_in_a_loop, shapes(q=(D, D), k=(D, D)), [X], {}),
    "counted": (
        counted, shapes(w=(3, D, D), b=(3, D)), [ROWS], {"w": (3, 1, D), "b": (3, D)},
    ),
    "from zeros": (
        from_zeros, shapes(u=(F, F), w=(D, F), o=(F, 3)), [X],
        {"u": (1, F), "w": (1, F), "o": (1, 3)},
    ),
    **{
        f"one-hot, {name}": (after_choice(change), shapes(w=(V, 7)), CHOICE, {"w": (1, 7)})
        for name, change in NO_CHOICE.items()
    },
    "expert of each": (
        expert_of_each, shapes(w=(3, D, F), o=(F, 2)), [INDEX, ROWS],
        {"w": (3, 1, F), "o": (1, 2)},
    ),
    "tokens of one": (
        tokens_of_one, shapes(pos=(T, D), w=(D, F), o=(F, 3)), [shape(T, D)],
        {"pos": (T, D), "w": (1, F), "o": (1, 3)},
    ),
    "features of one": (
        features_of_one, shapes(g=(D,), b=(D,), w=(D, F), o=(F, 3)), [shape(D)],
        {"g": (1,), "b": (D,), "w": (1, F), "o": (1, 3)},
    ),
    "regression": (
        regression, shapes(w=(D, 5), b=(5,)), [ROWS, shape(B, 5)], {"w": (1, 5), "b": (5,)},
    ),
    "regression of one": (
        regression, shapes(w=(D, 5), b=(5,)), [shape(1, D), shape(1, 5)],
        {"w": (1, 5), "b": (5,)},
    ),
    "times": (
        times, shapes(w=(F,), b=(F,), o=(F, 3)), [shape(B)], {"w": (F,), "b": (F,), "o": (1, 3)},
    ),
    "turned": (turned, shapes(w=(H, D, N)), [ROWS], {"w": (H, 1, N)}),
    "critics": (
        critics, shapes(u=(2, D, F), v=(2, F, F), w=(2, F)), [ROWS],
        {"u": (2, 1, F), "v": (2, 1, F)},
    ),
    "ensemble": (
        ensemble, shapes(u=(2, D, F), v=(2, F, F), g=(2, F), w=(2, F, 3)), [ROWS],
        {"u": (2, 1, F), "v": (2, 1, F), "g": (2, 1), "w": (2, 1, 3)},
    ),
    "averaged over a named axis": (
        averaged, shapes(w=(D, F), o=(F, 3)), [ROWS], {"w": (1, F), "o": (1, 3)},
    ),
    "ridge": (ridge, shapes(w=(D, F)), [ROWS], {"w": (1, F)}),
}  # fmt: skip
