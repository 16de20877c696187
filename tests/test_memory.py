"""What the optimizer holds and what its step needs, on the real GPT-2s, without allocating them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from examples.common.language import abstract_model, block_specs
from examples.common.text import TextConfig
from examples.gpt2.train import Config
from optax_adam_mini import adam_mini


@functools.cache
def gpt2(name, v):
    """Shapes of the parameters, and their blocks."""
    config = Config(model=name, data=TextConfig(tokenizer="bpe", vocab_size=50257), v=v)
    _, params = abstract_model(config)
    return params, block_specs(config)


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        *(
            pytest.param(f"gpt2-{size}", marks=pytest.mark.slow)
            for size in ("medium", "large", "xl")
        ),
    ],
)
@pytest.mark.parametrize(
    ("v", "mu_dtype", "numbers", "share"),
    [
        pytest.param("mean", None, 1e-3, 0.501, marks=pytest.mark.slow),
        ("outer", None, 3e-3, 0.503),
        pytest.param("mean", "int8", 1e-3, 0.126, marks=pytest.mark.slow),
        ("outer", "int8", 3e-3, 0.128),
    ],
)
def test_state_is_half_of_adamws_or_an_eighth(name, v, mu_dtype, numbers, share):
    params, specs = gpt2(name, v)
    tx = adam_mini(1e-3, block_specs=specs, mu_dtype=mu_dtype)
    state = jax.eval_shape(tx.init, params)
    adamw_state = jax.eval_shape(optax.adamw(1e-3).init, params)
    assert size(state[0].nu) < numbers * size(params)
    assert nbytes(state) <= share * nbytes(adamw_state)


@pytest.mark.parametrize("mu_dtype", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("v", [pytest.param("mean", marks=pytest.mark.slow), "outer"])
def test_donated_step_needs_no_temporaries(v, mu_dtype):
    params, specs = gpt2("gpt2", v)
    tx = adam_mini(1e-3, block_specs=specs, mu_dtype=mu_dtype)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes((params, state)) - 64 * len(jax.tree.leaves(state))
    assert memory.temp_size_in_bytes <= 0.01 * nbytes(params)


def test_init_allocates_no_second_moment():
    params = {"kernel": jax.ShapeDtypeStruct((1 << 14, 1 << 14), jnp.float32)}
    memory = jax.jit(adam_mini(1e-3).init).lower(params).compile().memory_analysis()
    assert memory.output_size_in_bytes <= 1.001 * nbytes(params)
    assert memory.temp_size_in_bytes <= 1 << 20
