import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality.muon_codes import CODES, errors, noise
from optax_adam_mini.random_bits import rounding_seed


@pytest.mark.slow
@pytest.mark.parametrize("name", CODES)
def test_the_mean_of_many_codes_is_the_number(name):
    codes = CODES[name]
    m = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    kept = jax.vmap(lambda step: codes.write(m, rounding_seed(step, 0)))(jnp.arange(4000))
    assert kept[0].dtype == jnp.int8
    assert kept[1].dtype == jnp.bfloat16
    assert kept[1].shape == (4000, 4, 1)
    values = jax.vmap(codes.read)(kept)
    assert 1e-4 < jnp.std(values, 0).mean() < 0.1
    np.testing.assert_allclose(values.mean(0), m, atol=0.01)


@pytest.mark.slow
def test_errors_are_of_updates():
    found = errors(noise(np.random.default_rng(0), (16, 64)), (16, 64), 40)
    assert list(found) == list(CODES)
    assert all(0.002 < error < 0.2 for error in found.values())
