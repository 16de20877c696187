"""A row times a column inside each block: against NumPy, Optax's factored moment and closed forms."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adam_mini import (
    adam_mini,
    block_table,
    by_path,
    fused,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    scale_by_adam_mini,
)
from optax_adam_mini.blocks import BlockSpec
from optax_adam_mini.hessian import block_numbers
from optax_adam_mini.product import OuterMoments
from tests import numpy_adam_mini
from tests.strategies import given, shapes_and_specs

MATRIX = outer(per_neuron(axis=0), per_neuron())
SEEDS = st.integers(0, 2**32 - 1)


def rows_by_head(heads):
    """A row for each head: inputs at each index, outputs in heads."""
    return outer(BlockSpec(((0, None), (1, heads))), per_neuron())


def product(x, edges_a, edges_b):
    """v_a v_b / v_ab in float64, coordinate by coordinate; 0 where the whole block is 0."""
    spread = lambda edges: np.array(_numbers(x.shape, edges))
    both = [np.intersect1d(a, b) for a, b in zip(edges_a, edges_b, strict=True)]
    means = []
    for edges in (edges_a, edges_b, both):
        numbers = spread(edges)
        sums = np.bincount(numbers.ravel(), x.ravel().astype(np.float64))
        means.append((sums / np.maximum(np.bincount(numbers.ravel()), 1))[numbers])
    a, b, ab = means
    return np.divide(a * b, ab, out=np.zeros_like(ab), where=ab > 0)


def _numbers(shape, edges):
    """The number of the block that each coordinate is in."""
    numbers = np.zeros(shape, int)
    for axis, ends in enumerate(edges):
        along = np.searchsorted(ends[1:], np.arange(shape[axis]), side="right")
        numbers = numbers * len(ends) + along.reshape(
            [-1 if a == axis else 1 for a in range(len(shape))]
        )
    return np.unique(numbers, return_inverse=True)[1].reshape(shape)


@st.composite
def pairs(draw):
    """A shape, two specs that fit it, and the borders of their blocks."""
    shape, a, edges_a = draw(shapes_and_specs(max_rank=3, min_side=1))
    for _ in range(20):
        other, b, edges_b = draw(shapes_and_specs(max_rank=3, min_side=1))
        if other == shape:
            break
    else:
        b, edges_b = per_element(), [np.arange(n + 1) for n in shape]
        if draw(st.booleans()):
            b, edges_b = per_tensor(), [np.array([0, n]) for n in shape]
        elif shape:
            axis = draw(st.integers(0, len(shape) - 1))
            b = per_neuron(axis)
            edges_b = [
                np.arange(n + 1) if i == axis else np.array([0, n]) for i, n in enumerate(shape)
            ]
    return (
        (shape, a, edges_a, b, edges_b) if draw(st.booleans()) else (shape, b, edges_b, a, edges_a)
    )


@hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 2)
@given(pairs(), SEEDS)
def test_v_is_the_product_of_a_row_and_a_column(case, seed):
    shape, a, edges_a, b, edges_b = case
    spec = outer(a, b)
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) ** 2 * 10.0 ** rng.integers(-6, 6, size=shape)).astype(np.float32)
    x = np.where(rng.random(shape) < 0.3, np.float32(0), x)
    nu = spec.block_mean(jnp.asarray(x))
    assert jax.tree.map(jnp.shape, nu) == spec.grid(shape)
    assert sum(v.size for v in nu) == spec.size(shape)
    found = spec.spread(nu, shape)
    np.testing.assert_allclose(found, product(x, edges_a, edges_b), rtol=1e-4, atol=1e-30)


def test_rows_of_unequal_sizes_weigh_by_their_size():
    """One number for two rows and one for six: the mean over rows is that of all eight."""
    spec = outer(fused(0, [(2, per_tensor()), (6, per_tensor())]), per_neuron())
    x = np.outer(np.repeat([1.0, 5.0], [2, 6]), [1.0, 2.0, 4.0]).astype(np.float32)
    np.testing.assert_allclose(spec.spread(spec.block_mean(x), x.shape), x, rtol=1e-6)


@given(shapes_and_specs(max_rank=3, min_side=1), SEEDS)
@pytest.mark.slow
def test_v_is_that_of_the_finer_grid_where_one_contains_the_other(case, seed):
    shape, spec, _ = case
    x = jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)
    for pair in (outer(spec, per_tensor()), outer(per_tensor(), spec), outer(spec, spec)):
        found = pair.spread(pair.block_mean(x), shape)
        chex.assert_trees_all_close(found, spec.spread(spec.block_mean(x), shape), rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (MATRIX, (6, 8)),
        (rows_by_head(4), (6, 8)),
        (outer(per_neuron(axis=0), per_neuron(), stacked=()), (6, 8)),
        (outer(per_neuron(axis=1), per_neuron(), stacked=0), (3, 6, 8)),
        (outer(BlockSpec(((0, None), *fused(1, [(4, per_head(2, axis=1)), (4, per_tensor())]).cuts)),
               per_neuron(axis=1)), (6, 8)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_equal_the_formulas_in_numpy(spec, shape, nesterov):
    """The whole update against NumPy in float64."""
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=shape), rng.normal(size=(5, *shape)) * rng.lognormal(size=shape)
    edges = [
        [numpy_adam_mini.edges_of(runs) for runs in grid.runs(shape)] for grid in (spec.a, spec.b)
    ]
    b1, b2, eps, lr, decay = 0.9, 0.95, 1e-6, 0.1, 0.3
    tx = adam_mini(
        lr, b1, b2, eps, weight_decay=decay, nesterov=nesterov, bounded=False, block_specs=spec
    )
    found = jnp.asarray(p, jnp.float32)
    state = tx.init(found)
    m, v, expected = np.zeros(shape), np.zeros(shape), p
    for t, g in enumerate(grads, start=1):
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, found)
        found = optax.apply_updates(found, updates)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        v_hat = product(v, *edges) / (1 - b2**t)
        expected = expected - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * expected)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_v_equals_optax_factored_rms():
    """Adafactor keeps the averages of rows and columns too, so its updates must be ours."""
    rng = np.random.default_rng(1)
    grads = jnp.asarray(rng.normal(size=(4, 130, 140)) * rng.lognormal(size=(130, 140)))
    grads = grads.astype(jnp.float32)
    theirs = optax.scale_by_factored_rms(epsilon=0.0)
    state = theirs.init(grads[0])
    nu = MATRIX.block_mean(jnp.zeros((130, 140)))
    for step, g in enumerate(grads):
        expected, state = theirs.update(g, state, g)
        decay = 1 - (step + 1) ** -0.8  # Optax's schedule, section 7.2 of Adafactor's paper
        mean = MATRIX.block_mean(g, jnp.square)
        nu = jax.tree.map(lambda v, mean, d=decay: d * v + (1 - d) * mean, nu, mean)
        root = MATRIX.spread(nu, g.shape, jnp.sqrt)
        np.testing.assert_allclose(g / root, expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-22, 1e-15, 1.0, 1e15])
def test_v_is_right_where_the_product_is_out_of_float32s_range(scale):
    """The product of a row and a column may overflow or underflow where v does not."""
    row, column = np.array([[1.0], [1e-3], [0.0]]), np.array([[1.0, 1e-2, 0.0, 1e-3]])
    g = jnp.asarray(scale * row * column, jnp.float32)
    nu = MATRIX.block_mean(g, jnp.square)
    found = np.asarray(MATRIX.spread(nu, g.shape, jnp.sqrt), np.float64)
    chex.assert_tree_all_finite(found)
    visible = np.asarray(g, np.float64) ** 2 > 1e-37  # below, Adam's own v is lost as well
    np.testing.assert_allclose(found[visible], np.asarray(g, np.float64)[visible], rtol=1e-3)


LARGEST, SMALLEST = float(jnp.finfo(jnp.float32).max), float(jnp.finfo(jnp.float32).tiny)


@pytest.mark.parametrize("spec", [MATRIX, rows_by_head(2)], ids=str)
@pytest.mark.parametrize("v", [LARGEST, LARGEST / 4, 1e19, 1.0, 1e-19, 32 * SMALLEST])
def test_v_is_right_near_the_ends_of_float32s_range(spec, v):
    """The inverse of a number near the largest is flushed to 0, so v must not be made with it."""
    expected = v * np.arange(1, 17)[None] / 16
    edges = [[numpy_adam_mini.edges_of(r) for r in g.runs((1, 16))] for g in (spec.a, spec.b)]
    means = [jnp.asarray(numpy_adam_mini.block_mean(expected, e), jnp.float32) for e in edges]
    found = jax.jit(lambda nu: spec.spread(nu, (1, 16)))(tuple(means))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_zero_rows_and_zero_blocks_do_not_move(dtype):
    g = jnp.asarray([[0, 0, 0, 0], [1, 2, 0, 0], [3, 1, 0, 0]], dtype)
    spec = rows_by_head(2)  # the second head is zero, and so is the first row
    tx = adam_mini(0.1, weight_decay=0.0, block_specs=spec)
    p = jnp.ones((3, 4), dtype)
    state = tx.init(p)
    for grads in (g, jnp.zeros_like(g), g):
        updates, state = tx.update(grads, state, p)
        chex.assert_tree_all_finite(updates)
        assert not np.asarray(updates, np.float32)[0].any()
        assert not np.asarray(updates, np.float32)[:, 2:].any()
        assert np.asarray(updates, np.float32)[1:, :2].all()


def test_empty_parameters_are_updated():
    for shape in ((0, 4), (3, 0), (0,)):
        p = jnp.zeros(shape)
        tx = adam_mini(0.1, block_specs=MATRIX)
        updates, _ = tx.update(p, tx.init(p), p)
        assert updates.shape == shape


@pytest.mark.parametrize("bad", [1e20, 1e30, jnp.inf, jnp.nan])
@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_overflow_and_nan_stop_only_their_row_and_column(bad, mu_dtype):
    """They stop for good; every other coordinate moves as before."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    tx = scale_by_adam_mini(block_specs=rows_by_head(2), mu_dtype=mu_dtype)
    state = tx.init(g)
    for t in range(3):
        updates, state = tx.update(g.at[1, 1].set(bad) if t == 1 else g, state)
    lost = np.zeros((3, 4), bool)
    lost[1, :2], lost[:, 1] = True, True  # the rows are those of two heads
    moved = np.nan_to_num(updates) != 0
    assert not moved[lost].any()
    assert moved[~lost].all()
    assert np.isnan(updates[lost]).all() == np.isnan(bad)


def test_the_state_has_one_number_for_each_row_and_column():
    p = {"kernel": jnp.ones((768, 3072), jnp.bfloat16), "bias": jnp.zeros(3072, jnp.bfloat16)}
    specs = by_path([("kernel", MATRIX)], default=per_element())
    nu = adam_mini(1e-3, block_specs=specs).init(p)[0].nu
    assert isinstance(nu, OuterMoments)
    chex.assert_shape([nu.a["kernel"], nu.b["kernel"]], [(768, 1), (1, 3072)])
    assert nu.a["bias"].shape == (3072,)
    assert nu.b["bias"].shape == (1,)  # which nothing reads
    assert {x.dtype for x in jax.tree.leaves(nu)} == {jnp.dtype("float32")}
    table = block_table(p, specs)
    cells = [list(column.cells) for column in table.columns]
    assert cells[2][1] == "768 rows + 3,072 columns"
    assert (cells[3][1], cells[4][1]) == ("3,840", "15,360")


def test_v_ab_is_the_mean_over_the_blocks_that_both_grids_share():
    assert rows_by_head(4).runs((6, 8)) == (((1, 6),), ((4, 2),))
    numbers = block_numbers(rows_by_head(2), (2, 4))
    assert numbers.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    uneven = outer(fused(0, [(2, per_tensor()), (4, per_head(2, axis=0))]), per_head(3, axis=0))
    assert uneven.runs((6,)) == (((3, 2),),)
    uneven = outer(fused(0, [(3, per_tensor()), (3, per_neuron(0))]), per_head(2, axis=0))
    assert uneven.runs((6,)) == (((2, 3),),)


def test_wrong_pairs_of_specs_are_refused():
    with pytest.raises(TypeError, match=r"outer: b must be a BlockSpec .* of type Outer"):
        outer(per_neuron(), MATRIX)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"outer: a must be a BlockSpec .* got 0 of type int"):
        outer(0, per_neuron())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="names each axis once"):
        outer(per_neuron(0), per_neuron(), stacked=0)
    with pytest.raises(TypeError, match=r"each part of fused\(\) is a pair"):
        fused(-1, [(4, MATRIX)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"w: .*5 blocks do not divide axis 1 of the shape \(6, 8\)"
    ):
        adam_mini(0.1, block_specs=rows_by_head(5)).init({"w": jnp.ones((6, 8))})
    with pytest.raises(ValueError, match=r"into the grids .*, but got \(6, 8\)"):
        MATRIX.spread(jnp.ones((6, 8)), (6, 8))  # pyright: ignore[reportArgumentType]


def test_rows_that_are_coarser_columns_are_refused():
    p = {"w": jnp.ones((6, 8))}
    for pair, inner in (
        (outer(per_head(4), per_neuron()), "b"),
        (outer(per_neuron(), per_head(4)), "a"),
        (outer(per_tensor(), per_neuron()), "b"),
    ):
        for use in (lambda s: adam_mini(0.1, block_specs=s).init(p), lambda s: block_table(p, s)):
            with pytest.raises(ValueError, match=rf"w: outer.* alone: .* give {inner} without"):
                use(pair)
        # Of what has no two axes, one grid always lies in the other.
        for shape in ((8,), (1, 8), (8, 1), (1, 8, 1)):
            tx = adam_mini(0.1, block_specs=outer(per_tensor(), per_neuron()))
            tx.init(jnp.ones(shape))
        stacked = outer(per_tensor(), per_neuron(), stacked=0)
        adam_mini(0.1, block_specs=stacked).init(jnp.ones((3, 1, 8)))
    found = adam_mini(0.1, block_specs=outer(per_head(4, stacked=0), per_neuron())).init(p)[0].nu
    assert (found.a["w"].shape, found.b["w"].shape) == ((6, 4), (1, 8))  # what the message advises


def test_a_state_of_other_specs_is_refused():
    p = {"w": jnp.ones((6, 8))}
    for made, used in ((per_neuron(), MATRIX), (MATRIX, per_neuron()), (MATRIX, rows_by_head(2))):
        state = adam_mini(0.1, block_specs=made).init(p)
        with pytest.raises(ValueError, match=r"w: the state's nu has shape .* other block specs"):
            adam_mini(0.1, block_specs=used).update(p, state, p)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0])
def test_derivatives_of_an_outer_are_finite_where_gradients_are_tiny(size):
    """A factor of LoRA that begins at 0 has such gradients: `v_ab**-2` would overflow."""
    params, grads = {"w": jnp.ones((3, 4))}, {"w": size * jnp.arange(12.0).reshape(3, 4)}
    tx = adam_mini(1e-3, eps_root=1e-8, block_specs=outer(per_neuron(axis=0), per_neuron()))
    moved = lambda grads: jnp.sum(tx.update(grads, tx.init(params), params)[0]["w"])
    derivative = jax.grad(moved)(grads)["w"]
    assert jnp.isfinite(derivative).all()
    if size == 1.0:
        step = 1e-2 * jnp.ones((3, 4)) / 4
        by_difference = (moved({"w": grads["w"] + step}) - moved({"w": grads["w"] - step})) / 2
        np.testing.assert_allclose((derivative * step).sum(), by_difference, rtol=0.05, atol=1e-7)


def test_a_state_of_rows_and_columns_is_refused_for_rows_alone():
    p = {"kernel": jnp.ones((4, 6))}
    state = adam_mini(1e-2, block_specs=outer(per_neuron(axis=0), per_neuron())).init(p)
    with pytest.raises(ValueError, match="kernel: the state's nu has shape"):
        adam_mini(1e-2, block_specs=per_neuron(axis=0)).update(p, state, p)


def test_a_convolution_with_one_output_takes_the_spec_of_others():
    spec = outer(per_neuron(axis=(0, 1, 2)), per_neuron())
    params = {"first": jnp.ones((3, 3, 4, 8)), "last": jnp.ones((3, 3, 8, 1))}
    nu = adam_mini(1e-3, block_specs=spec).init(params)[0].nu
    assert (nu.a["last"].shape, nu.b["last"].shape) == ((3, 3, 8, 1), (1, 1, 1, 1))
    with pytest.raises(ValueError, match="lie inside those of b"):
        outer(per_neuron(axis=(0, 1, 2)), per_tensor()).check((3, 3, 8, 1))
