import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_adam_mini
from optax_adam_mini import (
    BlockSpec,
    fused,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)

QKV = [(768, per_head(12)), (768, per_head(12)), (768, per_neuron())]
GROUPED_QKV = [(2048, per_head(32)), (256, per_head(4)), (256, per_neuron())]
BY_HEAD_QKV = [(64, per_tensor()), (64, per_tensor()), (64, per_neuron())] * 12


@pytest.mark.parametrize(
    ("shape", "spec", "grid"),
    [
        # Each kind of spec, on the shape it is meant for.
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
        # Unequal parts, scalars, empty arrays and axes of one.
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
def test_a_spec_cuts_a_shape_into_its_grid(shape, spec, grid):
    assert spec.grid(shape) == grid
    mean = jax.eval_shape(spec.block_mean, jax.ShapeDtypeStruct(shape, jnp.float32))
    chex.assert_shape(mean, grid)
    if math.prod(shape) < 1e6:  # the numbers of larger ones are in test_sums.py
        mean = spec.block_mean(jnp.ones(shape))
        chex.assert_trees_all_equal(mean, jnp.ones(grid))
        chex.assert_trees_all_equal(spec.spread(mean, shape), jnp.ones(shape))


def test_specs_are_hashable_and_comparable():
    assert per_neuron() == BlockSpec(((-1, None),)) != per_neuron(axis=0)
    assert per_neuron(np.int64(-1), stacked=np.int64(0)) == per_neuron(stacked=0)
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
def test_specs_that_do_not_fit_are_refused(make, error, text):
    with pytest.raises(error) as raised:
        make()
    assert text in str(raised.value)


def test_repr_of_a_spec_evaluates_to_the_spec():
    """So that a spec or label function in an error or a log can be copied into code."""
    names = {name: getattr(optax_adam_mini, name) for name in optax_adam_mini.__all__}
    for text in [
        "per_tensor()", "per_tensor(stacked=0)", "per_element()", "per_neuron(axis=-1)",
        "per_neuron(axis=(-2, -1))", "per_token(axis=0)", "per_head(12)",
        "per_head(12, axis=-2, stacked=(0, 1))",
        "fused(-1, [(8, per_head(2)), (8, per_neuron(axis=-1))], stacked=0)",
        "fused(-1, [(8, per_neuron(axis=(0, -1))), (8, per_neuron(axis=(0, -1)))])",
        "outer(per_head(4, stacked=0), per_neuron(axis=-1))",
        "BlockSpec(cuts=((0, 3), (1, 4)), rest=1, unit='block')",
        "BlockSpec(cuts=((0, 1),), rest=None, unit='block')",
    ]:  # fmt: skip
        spec = eval(text, names)
        assert eval(repr(spec), names) == spec
        if "per_neuron(axis=(0" not in text:
            assert repr(spec) == text
    for text in [
        "flax_layers()", "flax_layers(num_heads=4, stacked={'layers': 0}, default=per_element())",
        "by_path([('mlp', per_neuron(axis=-1))])",
        "by_path([('mlp', per_neuron(axis=-1))], default=flax_layers())",
        "by_logical_axes([(('embed', 'mlp'), ('mlp',))], stacked=('layers', 'stages'))",
    ]:  # fmt: skip
        assert repr(eval(text, names)) == text
        assert repr(pickle.loads(pickle.dumps(eval(text, names)))) == text
