import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adam_mini import adam_mini, per_tensor
from tests.test_transform import PARAMS, gradients


def test_eager_update_is_one_program_compiled_once():
    traced = []

    def label_fn(params):
        traced.append(jax.tree.leaves(params)[0].shape)
        return per_tensor()

    tx = adam_mini(optax.constant_schedule(1e-3), block_specs=label_fn)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    assert len(traced) == 1
    _, state = tx.update(gradients(0), state, params)
    with jax.no_tracing():
        for t in range(3):
            _, state = tx.update(gradients(t), state, params)
    assert len(traced) == 2  # by init, and when update was traced: never per step


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
    assert len(traced) == 2


def test_inside_jit_it_adds_no_call():
    tx = adam_mini(1e-3)
    state = tx.init(PARAMS)
    text = jax.jit(tx.update).lower(PARAMS, state, PARAMS).as_text()
    assert "call @_update" not in text
