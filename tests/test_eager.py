"""Updates outside of `jax.jit`, and what is left of a transformation when it is gone."""

import copy
import dataclasses
import gc
import weakref

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adam_mini import (
    adam_mini,
    by_logical_axes,
    by_path,
    flax_layers,
    per_neuron,
    per_tensor,
    transform,
)
from tests.test_transform import PARAMS, gradients


def test_an_eager_update_of_new_numbers_compiles_nothing():
    params = jax.tree.map(jnp.asarray, PARAMS)
    make = lambda rate, b1: adam_mini(rate, b1=b1, weight_decay=rate, block_specs=per_tensor())
    state = make(1e-3, 0.9).init(params)
    make(1e-3, 0.9).update(gradients(0), state, params)
    size = transform._update_parameter._cache_size()
    make(4e-3, 0.6).update(gradients(0), state, params)
    assert transform._update_parameter._cache_size() == size


def test_new_values_of_injected_hyperparameters_do_not_compile_again():
    traced = []

    def label_fn(params):
        traced.append(None)
        return per_tensor()

    tx = optax.inject_hyperparams(adam_mini, static_args=("block_specs", "mu_dtype", "nesterov"))(
        learning_rate=1e-3, block_specs=label_fn
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    for t in range(4):
        state.hyperparams["learning_rate"] = jnp.asarray(1e-3 * t)
        updates, state = tx.update(gradients(t), state, params)
        assert (np.abs(updates["kernel"]).max() > 0) == (t > 0)
    assert len(traced) == 1  # in init


def test_nothing_outlives_the_transformation():
    class Batch:
        pass

    def use():
        batch, p = Batch(), jnp.ones((3, 4))
        tx = adam_mini(1e-3, block_specs=lambda params, batch=batch: per_neuron())
        tx.update(p, tx.init(p), p)
        return weakref.ref(batch)

    refs = [use() for _ in range(3)]
    gc.collect()
    assert not any(ref() for ref in refs)


@dataclasses.dataclass
class Inverse:
    peak: float

    def __call__(self, count):
        return self.peak / (1 + count)


@pytest.mark.parametrize(
    "specs",
    [None, per_neuron(), by_path([("kernel", per_neuron())], default=flax_layers()),
     by_logical_axes([], default=flax_layers())],
    ids=["default", "spec", "by_path", "by_logical_axes"],
)  # fmt: skip
def test_a_transformation_can_be_copied_and_pickled(specs):
    """With a schedule that has no hash, as optax.adamw is."""
    tx = adam_mini(Inverse(0.1), block_specs=specs)
    params = {"kernel": jnp.ones((8, 12)), "bias": jnp.zeros(12)}
    if isinstance(specs, type(per_neuron())):
        params = {"kernel": params["kernel"]}
    expected, _ = tx.update(params, tx.init(params), params)
    for again in (copy.deepcopy(tx), cloudpickle.loads(cloudpickle.dumps(tx))):
        found, _ = again.update(params, again.init(params), params)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, expected))
