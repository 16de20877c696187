import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adam_mini import fused, per_head, per_neuron, per_tensor, per_token
from tests import numpy_adam_mini
from tests.strategies import given, shapes_and_specs


@given(shapes_and_specs(), st.integers(0, 2**32 - 1))
def test_block_mean_and_spread_equal_numpy(case, seed):
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


@pytest.mark.parametrize(("shape", "spec"), [((0, 4), per_head(2)), ((4, 0), per_head(2, axis=0))])
def test_block_means_of_an_empty_array_have_the_shape_of_the_grid(shape, spec):
    mean = spec.block_mean(jnp.zeros(shape))
    assert mean.shape == spec.grid(shape)


def test_sums_of_bfloat16_are_in_float32():
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


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "float16")),
    ],
)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        pytest.param((2048, 4097), per_neuron(), marks=pytest.mark.slow),
        # 8 times a prime number of rows
        pytest.param((2056, 4096), per_neuron(), marks=pytest.mark.slow),
        pytest.param((2400, 4096), per_head(2), marks=pytest.mark.slow),
        pytest.param((2, 2048, 4096), per_neuron(stacked=0), marks=pytest.mark.slow),
        pytest.param((2, 2048, 4096), per_neuron(), marks=pytest.mark.slow),
        ((2048, 4096), fused(-1, [(2048, per_head(4)), (2048, per_neuron())])),
    ],
)
def test_sums_over_a_long_axis_equal_numpy(shape, spec, dtype):
    """On CPU they are a loop, with a batching rule and a gradient."""
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


def test_means_of_booleans_are_shares():
    """Also of long rows, which a CPU adds in a loop."""
    for shape in ((2048, 8), (2048, 4096)):
        chex.assert_trees_all_equal(
            per_neuron().block_mean(jnp.ones(shape), lambda x: x > 0), jnp.ones((1, shape[1]))
        )
