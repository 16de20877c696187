"""No coordinate moves further in a step than Adam could move it, whatever the gradients are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adam_mini import (
    adam_mini,
    fused,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    scale_by_adam_mini,
)

MATRIX = outer(per_neuron(axis=0), per_neuron())
SHAPE = (32, 64)
SPECS = {
    "outer": MATRIX,
    "outer, heads": outer(per_head(4, stacked=0), per_neuron()),
    "neurons": per_neuron(),
    "one block": per_tensor(),
    "fused": fused(-1, [(32, per_head(2)), (32, per_neuron())]),
}


def longest(b1, b2, t, nesterov=False):
    """Adam's longest step: the largest |m_hat| / sqrt(v_hat) of `t` gradients, in closed form."""
    i = np.arange(t)
    a, b = (1 - b1) * b1**i, (1 - b2) * b2**i
    if nesterov:
        weights = b1 * a / (1 - b1 ** (t + 1))
        weights[0] += (1 - b1) / (1 - b1**t)
    else:
        weights = a / (1 - b1**t)
    return np.sqrt((weights**2 / b).sum() * (1 - b2**t))


def noise(t):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), t), SHAPE)


def in_blocks(t):
    """Two tasks, whose losses weigh 1 and 0.01, each with rows and columns of its own."""
    first = jnp.arange(SHAPE[0])[:, None] < 16
    own = first == (jnp.arange(SHAPE[1])[None] < 32)
    return noise(t) * own * jnp.where(first, 1.0, 0.01)


GRADIENTS = {
    "spike": lambda t: noise(t).at[3, 5].set(1e5) if t == 20 else noise(t),
    "glitch": lambda t: noise(t).at[:, 5].mul(10.0 ** (4 + t % 3)) if t == 20 else noise(t),
    "blocks": in_blocks,
    "louder": lambda t: noise(t) * (1e4 if t > 20 else 1.0),
    "quieter": lambda t: noise(t) * (1e-4 if t > 20 else 1.0),
}


@functools.cache
def program(nesterov, mu_dtype):
    """The states of each spec, with the bound and without, and what updates all of them."""
    txs = {
        (name, bounded): scale_by_adam_mini(
            0.9, 0.95, mu_dtype=mu_dtype, nesterov=nesterov, bounded=bounded, block_specs=spec
        )
        for name, spec in SPECS.items()
        for bounded in (True, False)
    }
    states = {key: tx.init(jnp.zeros(SHAPE)) for key, tx in txs.items()}
    return states, jax.jit(lambda g, states: {k: txs[k].update(g, s) for k, s in states.items()})


@pytest.mark.parametrize(
    ("nesterov", "mu_dtype"),
    [
        (False, None),
        (True, jnp.int8),
        pytest.param(True, None, marks=pytest.mark.slow),
        pytest.param(False, jnp.int8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("gradients", GRADIENTS.values(), ids=GRADIENTS)
def test_no_step_is_longer_than_adams(gradients, nesterov, mu_dtype):
    states, update = program(nesterov, mu_dtype)
    held = dict.fromkeys(SPECS, False)
    for t in range(1, 30):
        new = update(gradients(t), states)
        states = {key: state for key, (_, state) in new.items()}
        for name in SPECS:
            free, found = new[name, False][0], new[name, True][0]
            bound = longest(0.9, 0.95, t, nesterov)
            assert jnp.abs(found).max() <= bound * 1.0001, (name, t)
            # Only what is beyond the bound is changed.
            np.testing.assert_allclose(found, jnp.clip(free, -bound, bound), rtol=1e-4, atol=1e-6)
            held[name] |= bool(jnp.abs(free).max() > 1.01 * bound)
    assert all(held.values())  # without the bound, a step was longer


@pytest.mark.parametrize(
    "betas", [(0.9, 0.999), (0.0, 0.9), (0.9, 0.81), (0.95, 0.8), (0.0, 0.0), (0.9, 0.0)]
)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_that_adam_makes_is_not_shortened(betas, nesterov):
    """Not even for the gradients with which Adam makes its longest possible step."""
    b1, b2 = betas
    adam = optax.scale_by_adam(b1, b2, nesterov=nesterov, eps=1e-30)
    mini = scale_by_adam_mini(b1, b2, eps=1e-30, nesterov=nesterov, block_specs=per_element())
    states = adam.init(jnp.zeros(4)), mini.init(jnp.zeros(4))
    for t in range(1, 30):
        growing = (max(b2, 0.1) / max(b1, 0.1)) ** t
        g = jnp.array([1.0, -growing, 1e-3 * t, (-1.0) ** t])
        expected, first = adam.update(g, states[0])
        found, second = mini.update(g, states[1])
        states = first, second
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_complex_updates_keep_their_direction():
    g = jnp.array([3 + 4j, 0.01j, 0.0])
    tx, free = (scale_by_adam_mini(bounded=b, block_specs=per_tensor()) for b in (True, False))
    (found, _), (expected, _) = (t.update(g, t.init(g)) for t in (tx, free))
    np.testing.assert_allclose(found[0], (3 + 4j) / 5, rtol=1e-4)
    np.testing.assert_allclose(found[1:], expected[1:])


def test_without_memory_of_squares_the_first_step_is_adams():
    """With b2 = 0 the later steps have no bound."""
    tx, params = scale_by_adam_mini(b2=0.0, block_specs=per_tensor()), {"w": jnp.zeros((1, 4))}
    with jax.debug_nans(True):
        updates, _ = tx.update({"w": jnp.array([[1.0, 0, 0, 0]])}, tx.init(params))
    np.testing.assert_allclose(updates["w"], [[1, 0, 0, 0]], rtol=1e-4)


def test_a_complex_gradient_of_zero_has_a_derivative():
    tx = adam_mini(1e-3, eps_root=1e-8, block_specs=per_element())
    params = {"w": jnp.ones(2, complex)}

    def moved(tx, scale):
        updates, _ = tx.update({"w": scale * jnp.array([1 + 1j, 0])}, tx.init(params), params)
        return jnp.sum(jnp.abs(updates["w"] + 1) ** 2)

    expected = jax.grad(functools.partial(moved, optax.adamw(1e-3, eps_root=1e-8)))(1.0)
    np.testing.assert_allclose(jax.grad(functools.partial(moved, tx))(1.0), expected, atol=1e-8)
