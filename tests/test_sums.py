import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adam_mini import adam_mini, fused, outer, per_head, per_neuron, per_tensor, per_token
from tests import numpy_adam_mini
from tests.strategies import given, shapes_and_specs


@given(shapes_and_specs(), st.integers(0, 2**32 - 1))
def test_block_mean_and_spread_against_numpy(case, seed):
    shape, spec, edges = case
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    grid = tuple(len(e) - 1 for e in edges)
    assert spec.grid(shape) == grid
    mean = spec.block_mean(jnp.asarray(x))
    expected = numpy_adam_mini.block_mean(x, edges)
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    back = np.zeros(shape, np.float32)
    for index, block in numpy_adam_mini.blocks_of(edges):
        back[block] = mean[index]
    np.testing.assert_array_equal(spec.spread(mean, shape), back)


def test_sums_of_bfloat16_are_wide():
    x = jnp.full((1 << 20,), 1.1, jnp.bfloat16)
    for spec, shape in [
        (per_tensor(), (1 << 20,)),
        (per_neuron(), (1 << 20, 1)),
        (per_token(), (1, 1 << 20)),
        (per_head(1), (1, 1 << 20)),
        (per_head(2), (1 << 10, 1 << 10)),
    ]:
        mean = jax.jit(spec.block_mean)(x.reshape(shape))
        assert mean.dtype == jnp.float32
        chex.assert_trees_all_close(mean, jnp.full_like(mean, float(x[0])), rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2048, 4097), per_neuron()),
        ((2056, 4096), per_neuron()),  # 8 times a prime number of rows
        ((2400, 4096), per_head(2)),
        ((2, 2048, 4096), per_neuron(stacked=0)),
        ((2, 2048, 4096), per_neuron()),
        ((2048, 4096), fused(-1, [(2048, per_head(4)), (2048, per_neuron())])),
    ],
)
def test_sums_before_long_rows_against_numpy(shape, spec, dtype):
    """Which are added in a loop on CPU."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    square = lambda x: x * x  # in the dtype that it is given
    edges = [numpy_adam_mini.edges_of(runs) for runs in spec.runs(shape)]
    expected = numpy_adam_mini.block_mean(np.asarray(x, np.float64) ** 2, edges)
    mean = lambda x: spec.block_mean(x, square)
    assert " scan[" in str(jax.make_jaxpr(mean)(x))
    found = jax.jit(mean)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    several = jax.vmap(mean)(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(several, np.stack([expected, 4 * expected]), rtol=1e-5)
    if dtype == "float32":
        gradient = jax.grad(lambda x: jnp.sum(mean(x)))(x)
        sizes = x.size / np.prod(spec.grid(shape))
        if not any(isinstance(cut, tuple) for _, cut in spec.cuts):  # blocks of one size
            np.testing.assert_allclose(gradient, 2 * x / sizes, rtol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [per_tensor(), per_neuron(), per_head(2), outer(per_neuron(axis=0), per_neuron())],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_do_not_overflow_where_the_mean_does_not(spec, dtype):
    """As with Adam: a gradient's square is what must be in float32's range."""
    g = jnp.full((64, 32), 1e19, dtype)
    expected = np.square(np.asarray(g, np.float64)[0, 0])
    for mean in jax.tree.leaves(spec.block_mean(g, jnp.square)):
        np.testing.assert_allclose(mean, np.full(mean.shape, expected), rtol=1e-5)
    tx = adam_mini(1e-3, weight_decay=0.0, block_specs=spec)
    updates, state = tx.update(g, tx.init(g), g)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0].nu))
    np.testing.assert_allclose(np.asarray(updates, np.float64), -1e-3, rtol=1e-2)
