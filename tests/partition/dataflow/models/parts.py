"""What the models are made of."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_adam_mini.partition.dataflow import infer_block_specs

B, T, D, H, K, V, N = 2, 6, 32, 4, 2, 11, 8  # batch, time, width, heads, kv heads, tokens, head_dim
F = 12  # hidden neurons
IMAGES = ("NHWC", "HWIO", "NHWC")
SIGNALS = ("NWC", "WIO", "NWC")


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(**sizes):
    return {name: shape(*size) for name, size in sizes.items()}


def stacked(params, count=3):
    return {name: shape(count, *p.shape) for name, p in params.items()}


def each(grids, count=3):
    """The grids of a stack."""
    return {name: (count, *grid) for name, grid in grids.items()}


X, TOKENS, INDEX = shape(B, T, D), shape(B, T, dtype="int32"), shape(B, dtype="int32")
ROWS, IMAGE = shape(B, D), shape(B, 8, 8, 3)
stop = lax.stop_gradient


def grids(fn, params, *args, **options):
    specs = infer_block_specs(fn, params, *args, **{"v": "mean", **options})
    return {name: specs[name].grid(params[name].shape) for name in params}


def attention(q, k, v):
    scores = jnp.einsum("bthn,bshn->bhts", q, k) / np.sqrt(N)
    return jnp.einsum("bhts,bshn->bthn", jax.nn.softmax(scores), v)


def heads(x, count=H):
    return x.reshape(*x.shape[:-1], count, -1)


def joined(x):
    return x.reshape(*x.shape[:-2], -1)


def dense_attention(p, x, mix=attention):
    return joined(mix(*(heads(x @ p[name]) for name in "qkv"))) @ p["o"]


def mixing(mix):
    return lambda p, x: dense_attention(p, x, mix)


DENSE = shapes(q=(D, D), k=(D, D), v=(D, D), o=(D, D))
DENSE_GRIDS = {"q": (1, H), "k": (1, H), "v": (1, D), "o": (1, D)}


def general_attention(p, x, y=None, mix=attention):
    """Of `x`, to `y`."""
    inputs = {"q": x, "k": x if y is None else y, "v": x if y is None else y}
    q, k, v = (jnp.einsum("btd,dhn->bthn", inputs[name], p[name]) for name in "qkv")
    return jnp.einsum("bthn,hnd->btd", mix(q, k, v), p["o"])


GENERAL = shapes(q=(D, H, N), k=(D, H, N), v=(D, H, N), o=(H, N, D))
GENERAL_GRIDS = {"q": (1, H, 1), "k": (1, H, 1), "v": (1, H, N), "o": (1, 1, D)}


def named(prefix, params):
    return {prefix + name: p for name, p in params.items()}


def under(prefix, params):
    """The parameters of one of several layers."""
    return {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}


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


def rotary_written(x):
    """The rotated halves are written over the old ones."""
    (a, b), (c, s) = jnp.split(x, 2, -1), angles()
    n = a.shape[-1]
    return x.at[..., :n].set(a * c - b * s).at[..., n:].set(b * c + a * s)


def rotary_written_pairs(x):
    a, b, (c, s) = x[..., ::2], x[..., 1::2], angles()
    return jnp.zeros_like(x).at[..., ::2].set(a * c - b * s).at[..., 1::2].set(b * c + a * s)


def rotary_part_written(x):
    return x.at[..., : N // 2].set(rotary_halves(x[..., : N // 2]))


def rms_norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def conv(x, w, strides=1, padding="SAME", **options):
    layout = SIGNALS if x.ndim == 3 else IMAGES
    window = (strides,) * (x.ndim - 2)
    return lax.conv_general_dilated(x, w, window, padding, dimension_numbers=layout, **options)
