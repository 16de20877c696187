"""What must hold for any tree, shape, dtype, spec and gradient, hostile ones included."""

import itertools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adam_mini import adam_mini, per_element, per_tensor, scale_by_adam_mini
from tests import numpy_adam_mini
from tests.strategies import given, shapes_and_specs

HOSTILE = [0.0, -0.0, 1e-45, 1e-39, 1e-20, 1.0, -3.0, 1e18, 1e30, np.inf, -np.inf, np.nan]
BENIGN = [0.0, -0.0, 1e-10, 1e-3, 0.5, 1.0, -3.0, 1e3, 1e10]
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
SEEDS = st.integers(0, 2**32 - 1)


def draw_array(shape, values, seed):
    """Entries of `values` among ordinary ones, in float32."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(values, size=shape)
    return np.where(rng.random(shape) < 0.5, chosen, rng.normal(size=shape)).astype(np.float32)


def one_step(spec, p, g, **kwargs):
    tx = adam_mini(**{"learning_rate": 0.1, "weight_decay": 0.0, **kwargs}, block_specs=spec)
    return tx.update(g, tx.init(p), p)


@given(st.lists(shapes_and_specs(max_rank=3), max_size=3), DTYPES, SEEDS)
def test_nan_and_overflow_stay_in_their_block(cases, dtype, seed):
    p = [jnp.zeros(shape, dtype) for shape, _, _ in cases]
    g = [
        jnp.asarray(draw_array(shape, HOSTILE, seed + i)).astype(dtype)
        for i, (shape, _, _) in enumerate(cases)
    ]
    specs = [spec for _, spec, _ in cases]
    tx = adam_mini(0.1, block_specs=specs)
    state = tx.init(p)
    updates, new_state = tx.update(g, state, p)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, p)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    for update, gradient, (_, _, edges) in zip(updates, g, cases, strict=True):
        update, gradient = (np.asarray(x, np.float32) for x in (update, gradient))
        for _, block in numpy_adam_mini.blocks_of(edges):
            if np.isfinite(gradient[block]).all():
                assert np.isfinite(update[block]).all()
            if np.isnan(gradient[block]).any():
                assert np.isnan(update[block]).all()  # never a silent step


@given(shapes_and_specs(max_rank=3, min_side=1), DTYPES, SEEDS)
def test_zero_blocks_do_not_move(case, dtype, seed):
    shape, spec, edges = case
    g = draw_array(shape, BENIGN, seed)
    zero = [block for i, (_, block) in enumerate(numpy_adam_mini.blocks_of(edges)) if i % 2 == 0]
    for block in zero:
        g[block] = 0.0
    tx = adam_mini(0.1, weight_decay=0.0, block_specs=spec)
    p = jnp.ones(shape, dtype)
    state = tx.init(p)
    for _ in range(3):
        updates, state = tx.update(jnp.asarray(g).astype(dtype), state, p)
        for block in zero:
            assert (np.asarray(updates, np.float32)[block] == 0).all()


@given(shapes_and_specs(max_rank=3, min_side=1), SEEDS)
def test_updates_follow_a_permutation_inside_blocks(case, seed):
    shape, spec, edges = case
    rng = np.random.default_rng(seed)
    order = [np.concatenate([rng.permutation(np.arange(a, b)) for a, b in itertools.pairwise(e)])
             for e in edges]  # fmt: skip
    index = np.ix_(*order) if shape else ()
    p, g = (draw_array(shape, BENIGN, seed + i) for i in range(2))
    updates, state = one_step(spec, jnp.asarray(p), jnp.asarray(g))
    permuted, permuted_state = one_step(spec, jnp.asarray(p[index]), jnp.asarray(g[index]))
    np.testing.assert_allclose(permuted, np.asarray(updates)[index], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(permuted_state[0].nu, state[0].nu, rtol=1e-5)


@given(shapes_and_specs(max_rank=3, min_side=1), st.floats(1e-3, 1e3), SEEDS)
def test_updates_do_not_depend_on_the_scale_of_gradients(case, scale, seed):
    shape, spec, _ = case
    p = jnp.zeros(shape)
    g = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    updates, _ = one_step(spec, p, jnp.asarray(g), eps=0.0)
    scaled, _ = one_step(spec, p, jnp.asarray(np.float32(scale) * g), eps=0.0)
    np.testing.assert_allclose(scaled, updates, rtol=1e-4)


@given(shapes_and_specs(max_rank=3, min_side=1), SEEDS)
def test_coarse_nu_is_the_weighted_mean_of_fine_nu(case, seed):
    shape, spec, edges = case
    grads = [jnp.asarray(draw_array(shape, BENIGN, seed + i)) for i in range(3)]
    nus = {}
    for name, s in {"fine": spec, "finest": per_element(), "coarse": per_tensor()}.items():
        tx = scale_by_adam_mini(block_specs=s)
        state = tx.init(grads[0])
        for g in grads:
            _, state = tx.update(g, state)
        nus[name] = np.asarray(state.nu, np.float64)
    sizes = np.zeros(nus["fine"].shape)
    for index, block in numpy_adam_mini.blocks_of(edges):
        sizes[index] = np.zeros(shape)[block].size
    mean = (sizes * nus["fine"]).sum() / sizes.sum()
    np.testing.assert_allclose(nus["coarse"].sum(), mean, rtol=1e-5)
    expected = numpy_adam_mini.block_mean(nus["finest"], edges)
    np.testing.assert_allclose(nus["fine"], expected, rtol=1e-5, atol=1e-12)


@given(shapes_and_specs(max_rank=2, min_side=1), DTYPES, SEEDS)
@pytest.mark.slow
def test_jit_and_eager_updates_agree(case, dtype, seed):
    shape, spec, _ = case
    tx = adam_mini(optax.linear_schedule(0.1, 0.0, 5), block_specs=spec)
    p, g = (jnp.asarray(draw_array(shape, BENIGN, seed + i)).astype(dtype) for i in range(2))
    state = tx.init(p)
    eager, jitted = tx.update(g, state, p), jax.jit(tx.update)(g, state, p)
    # But for rounding: an eager update is a program for each parameter and a few steps after it.
    rtol = max(1e-6, float(jnp.finfo(dtype).eps))
    chex.assert_trees_all_close(eager, jitted, rtol=rtol, atol=1e-7)
