"""The optimizers that we compare with are Optax's own, on the examples' schedule and decay."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.quality import others
from examples.common.optimizers import OptimizerConfig, decayed, make_optimizer

RATE = 1e-2
CONFIG = OptimizerConfig(
    learning_rate=RATE, warmup_steps=0, final_learning_rate=1.0, weight_decay=0.1, clip_norm=0.0
)


def optaxs(name):
    """Optax's optimizer of this name, at a constant rate."""
    decay = {"weight_decay": CONFIG.weight_decay, "mask": decayed}
    undecayed = {
        "adafactor": lambda: optax.adafactor(
            RATE, min_dim_size_to_factor=2, multiply_by_parameter_scale=False, momentum=CONFIG.b1
        ),
        "sm3": lambda: optax.sm3(RATE, CONFIG.b1),
        "sgd": lambda: optax.sgd(RATE, CONFIG.b1),
    }
    if name == "lion":
        return optax.lion(RATE, CONFIG.b1, **decay)
    # These have no decoupled decay of their own: it is a step of its own.
    return optax.chain(undecayed[name](), optax.masked(_decay(RATE * CONFIG.weight_decay), decayed))


def _decay(rate):
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, p: u - rate * p, updates, params)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(others.SCALES) - {"came"}))
def test_a_compared_optimizer_equals_optaxs_own(name):
    key = jax.random.key(0)
    params = {"dense": {"kernel": jax.random.normal(key, (6, 4)), "bias": jnp.ones(4)}}
    ours = make_optimizer(name, CONFIG, steps=10)
    theirs = optaxs(name)
    mine, other = params, params
    states = [ours.init(params), theirs.init(params)]
    for step in range(4):
        own = jax.random.fold_in(key, step)
        grads = jax.tree.map(lambda p, own=own: jax.random.normal(own, p.shape), params)
        updates, states[0] = ours.update(grads, states[0], mine)
        mine = optax.apply_updates(mine, updates)
        updates, states[1] = theirs.update(grads, states[1], other)
        other = optax.apply_updates(other, updates)
    chex.assert_trees_all_close(mine, other, rtol=1e-5)


def test_all_are_clipped_by_the_global_norm():
    params = {"kernel": jnp.ones((3, 2))}
    config = OptimizerConfig(warmup_steps=0, clip_norm=1.0, weight_decay=0.0, learning_rate=1.0)
    tx = make_optimizer("sgd", config, steps=10)
    updates, _ = tx.update({"kernel": jnp.full((3, 2), 100.0)}, tx.init(params), params)
    assert optax.tree.norm(updates) == pytest.approx(1.0)
