"""Adam-mini written out leaf by leaf for one small tree, as a plain, uncompiled transformation.

It shares no code with the package: what wraps it must give what wraps adam_mini.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adam_mini import outer, per_element, per_neuron

BLOCK_SPECS = {"kernel": per_neuron(), "bias": per_element()}
OUTER_SPECS = {"kernel": outer(per_neuron(axis=0), per_neuron()), "bias": per_element()}


class State(NamedTuple):
    step: jax.Array
    m: dict
    v: dict


def params():
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
    }


def gradients(params, step):
    """Of a quadratic with noise."""
    rng = np.random.default_rng(1 + step)
    return jax.tree.map(lambda p: p + rng.normal(size=p.shape).astype(np.float32), params)


def mean_square(name, g):
    return jnp.mean(g * g, axis=0, keepdims=True) if name == "kernel" else g * g


def row_and_column(name, g):
    if name != "kernel":
        return g * g
    return jnp.concatenate([jnp.mean(g * g, axis=1), jnp.mean(g * g, axis=0)])


def product(name, v):
    """Of the three rows and four columns of the kernel; its mean is that of the rows."""
    return v[:3, None] * v[3:] / jnp.mean(v[:3]) if name == "kernel" else v


def outer_by_hand(learning_rate, **kwargs):
    return adam_mini_by_hand(
        learning_rate, **kwargs, mean_square=row_and_column, second_moment=product
    )


def adam_mini_by_hand(
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=1e-4,
    mean_square=mean_square,
    second_moment=lambda name, v: v,
):
    def init(params):
        zeros = {name: jnp.zeros_like(mean_square(name, p)) for name, p in present(params)}
        m = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.zeros([], jnp.int32), m, {**params, **zeros})

    def present(tree):
        return [(k, x) for k, x in tree.items() if not isinstance(x, optax.MaskedNode)]

    def update(grads, state, params=None):
        step = state.step + 1
        m, v, updates = dict(state.m), dict(state.v), dict(grads)
        for name, g in present(grads):
            m[name] = b1 * state.m[name] + (1 - b1) * g
            v[name] = b2 * state.v[name] + (1 - b2) * mean_square(name, g)
            m_hat = m[name] / (1 - b1**step)
            v_hat = second_moment(name, v[name]) / (1 - b2**step)
            direction = m_hat / (jnp.sqrt(v_hat) + eps)
            updates[name] = -learning_rate * (direction + weight_decay * params[name])
        return updates, State(step, m, v)

    return optax.GradientTransformation(init, update)
