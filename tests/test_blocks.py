import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adam_mini import (
    BlockSpec,
    fused,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)
from optax_adam_mini.blocks import resolve_block_specs
from tests import numpy_adam_mini
from tests.strategies import given, shapes_and_specs

QKV = [(768, per_head(12)), (768, per_head(12)), (768, per_neuron())]
GROUPED_QKV = [(2048, per_head(32)), (256, per_head(4)), (256, per_neuron())]
BY_HEAD_QKV = [(64, per_tensor()), (64, per_tensor()), (64, per_neuron())] * 12


@pytest.mark.parametrize(
    ("shape", "spec", "grid"),
    [
        # The design's table, line by line.
        ((768,), per_tensor(), (1,)),
        ((768,), per_element(), (768,)),
        ((768, 3072), per_neuron(), (1, 3072)),
        ((50257, 768), per_token(), (50257, 1)),
        ((768, 768), per_head(12), (1, 12)),
        ((768, 12, 64), per_head(12, axis=-2), (1, 12, 1)),
        ((768, 12, 64), per_neuron(axis=(1, 2)), (1, 12, 64)),
        ((768, 2304), fused(-1, QKV), (1, 792)),
        ((32, 768, 12, 64), per_head(12, axis=-2, stacked=0), (32, 1, 12, 1)),
        ((8, 768, 3072), per_neuron(stacked=0), (8, 1, 3072)),
        # And what it leaves open.
        (
            (2048, 2560),
            fused(1, [(n, BlockSpec(((1, c),))) for n, c in [(2048, 32), (512, None)]]),
            (1, 544),
        ),
        ((2048, 2560), fused(-1, GROUPED_QKV), (1, 292)),
        ((768, 2304), fused(-1, BY_HEAD_QKV), (1, 792)),
        ((12, 768, 2304), fused(-1, QKV, stacked=0), (12, 1, 792)),
        ((4, 6), BlockSpec(((0, 2), (1, 3))), (2, 3)),
        ((), per_tensor(), ()),
        ((), per_element(), ()),
        ((0, 5), per_neuron(), (0, 5)),
        ((5, 0), per_neuron(), (1, 0)),
        ((5, 0), per_head(3), (1, 0)),
        ((1, 1), per_head(1), (1, 1)),
    ],
)
def test_grid(shape, spec, grid):
    assert spec.grid(shape) == grid
    mean = spec.block_mean(jnp.ones(shape))
    chex.assert_shape(mean, grid)
    chex.assert_trees_all_equal(mean, jnp.ones(grid))
    chex.assert_trees_all_equal(spec.spread(mean, shape), jnp.ones(shape))


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


def test_specs_are_hashable_and_comparable():
    assert per_neuron() == BlockSpec(((-1, None),)) != per_neuron(axis=0)
    assert len({per_head(12), per_head(12), per_head(6), fused(-1, QKV), fused(-1, QKV)}) == 3
    assert jax.tree.leaves({"a": per_head(2)}) == [per_head(2)]
    assert str(fused(-1, [(2, per_head(2)), (2, per_neuron())])) == (
        "BlockSpec(axis -1: [2: BlockSpec(axis -1: 2) | 2: BlockSpec(axis -1: each)])"
    )
    assert str(per_tensor()) == "BlockSpec(not cut)"
    assert str(per_element()) == "BlockSpec(other axes: each)"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: per_head(12).grid((768, 100)),
            ValueError,
            "12 blocks do not divide axis -1 of the shape (768, 100), of size 100; the nearest numbers "
            "that do are 4, 5, 10, 20, 25, 50",
        ),
        (
            lambda: per_neuron(axis=2).grid((3, 4)),
            ValueError,
            "BlockSpec(axis 2: each) cuts axis 2, but the shape (3, 4) has rank 2: expected an axis "
            "from -2 to 1",
        ),
        (lambda: per_neuron().grid(()), ValueError, "a scalar has no axes: use per_tensor()"),
        (
            lambda: BlockSpec(((0, 2), (-2, 2))).grid((2, 2)),
            ValueError,
            "names axis 0 of the shape (2, 2) twice, as 0 and -2",
        ),
        (lambda: BlockSpec(((0, 2), (0, 2))), ValueError, "names each axis once, got axes [0, 0]"),
        (lambda: per_neuron(stacked=-1), ValueError, "names each axis once, got axes [-1, -1]"),
        (
            lambda: fused(-1, QKV).grid((768, 2000)),
            ValueError,
            "the parts along axis -1 of the shape (768, 2000) must add up to 2000, got 768 + 768 + 768 "
            "= 2304",
        ),
        (
            lambda: fused(-1, [(10, per_head(4)), (6, per_neuron())]).grid((2, 16)),
            ValueError,
            "4 blocks do not divide axis -1 of the shape (2, 10)",
        ),
        (lambda: fused(-1, []), ValueError, "needs at least one part"),
        (
            lambda: fused(-1, [(3, "neuron")]),
            TypeError,
            "is a pair (size, spec), got (3, 'neuron')",
        ),
        (
            lambda: fused(-1, [(3, per_neuron(axis=0)), (3, per_tensor())]),
            ValueError,
            "must cut every other axis alike, got BlockSpec(axis 0: each) and BlockSpec(not cut)",
        ),
        (
            lambda: fused(-1, [(-3, per_neuron())]),
            ValueError,
            "the size of a part must be at least 0, got -3",
        ),
        (lambda: per_head(0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: per_head(1.5), TypeError, "num_heads must be an integer, got 1.5 of type float"),
        (lambda: per_neuron(axis="out"), TypeError, "axis must be an integer, got 'o' of type str"),
        (
            lambda: per_head(2).spread(jnp.ones((1, 3)), (4, 4)),
            ValueError,
            "into the grid (1, 2), but got an array of shape (1, 3)",
        ),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error) as raised:
        make()
    assert text in str(raised.value)


def test_resolve_block_specs():
    params = {"a": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}, "b": jnp.ones(3)}
    specs = {"a": {"kernel": per_neuron(), "bias": per_element()}, "b": per_tensor()}
    expected = [("a/bias", per_element()), ("a/kernel", per_neuron()), ("b", per_tensor())]
    assert resolve_block_specs(specs, params) == expected
    assert resolve_block_specs(lambda p: specs, params) == expected
    assert resolve_block_specs(per_tensor(), params) == [
        (path, per_tensor()) for path in ("a/bias", "a/kernel", "b")
    ]
    # A prefix, and nothing asked for where the parameters are empty.
    assert resolve_block_specs({"a": per_element(), "b": per_tensor()}, params)[1] == (
        "a/kernel",
        per_element(),
    )
    for empty in (None, optax.MaskedNode(), {}):
        partial = {"a": empty, "b": jnp.ones(3)}
        assert resolve_block_specs(specs, partial) == [("b", per_tensor())]
    assert resolve_block_specs(specs, optax.MaskedNode()) == []


@pytest.mark.parametrize(
    ("specs", "error", "text"),
    [
        ({"a": per_tensor()}, ValueError, "prefix of it: no spec for c"),
        (
            {"a": per_tensor(), "b": per_tensor()},
            ValueError,
            "no spec for c; no parameter for the spec at b",
        ),
        (
            {"a": per_tensor(), "c": per_tensor(), "d": {"e": per_tensor()}},
            ValueError,
            "no parameter for the spec at d/e",
        ),
        (
            {"a": "neuron", "c": per_tensor()},
            TypeError,
            "a: expected a BlockSpec such as per_neuron(), got 'neuron' of type str",
        ),
        ({"a": None, "c": per_tensor()}, ValueError, "no spec for a"),
        ({"a": per_head(3), "c": per_tensor()}, ValueError, "a: 3 blocks do not divide axis -1"),
        (lambda params: {"a": 1, "c": 2}, TypeError, "a: expected a BlockSpec"),
        (3, TypeError, "block_specs: expected a BlockSpec such as per_neuron(), got 3 of type int"),
    ],
)
def test_resolve_block_specs_errors(specs, error, text):
    with pytest.raises(error) as raised:
        resolve_block_specs(specs, {"a": jnp.ones((2, 4)), "c": jnp.ones(2)})
    assert text in str(raised.value)
