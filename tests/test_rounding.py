"""Stochastic rounding of parameters, against neighbours found in NumPy and what chance allows."""

import functools
import subprocess
import sys
import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adam_mini import (
    ScaleByAdamMiniState,
    StochasticRoundingState,
    adam_mini,
    from_adam_state,
    opt_state_shardings,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    stochastic_rounding,
    to_adam_state,
)
from optax_adam_mini.quantized import write
from optax_adam_mini.random_bits import round_to_bfloat16, rounding_seed, salt_of
from tests import test_optax_contract as contract
from tests.params import slow_but

BF16, F32 = jnp.bfloat16, jnp.float32
LARGEST, TINY = float(jnp.finfo(BF16).max), float(np.finfo(np.float32).tiny)
ROUNDED = stochastic_rounding(optax.identity())
MATRIX = outer(per_neuron(axis=0), per_neuron())


def flushed(x):
    """XLA takes numbers below the normal ones for zero, Optax's own addition too."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def neighbours(x):
    """The nearest numbers of bfloat16 toward zero and away from it; twice `x` if it is one."""
    x = np.asarray(x, np.float32)
    cut = x.view(np.uint32) & np.uint32(0xFFFF0000)
    away = np.where(cut == x.view(np.uint32), cut, cut + np.uint32(0x10000))
    return cut.view(np.float32), away.astype(np.uint32).view(np.float32)


def check_is_neighbour(new, x, slack=0.0):
    """`slack` of the size of `x`, where another program has computed it."""
    new = np.asarray(new, np.float64)
    low, high = (np.asarray(edge, np.float64) for edge in neighbours(x))
    toward, away = np.abs(low) - slack * np.abs(low), np.abs(high) + slack * np.abs(high)
    between = (np.abs(new) >= toward) & (np.abs(new) <= away) & (np.sign(new) * x >= 0)
    wrong = ~between | ((new != low) & (new != high)) if slack == 0 else ~between
    assert not wrong.any(), (np.asarray(x)[wrong][:5], new[wrong][:5])


def of_step(tx, step, params):
    return tx.init(params)._replace(count=jnp.int32(step))


@functools.partial(jax.jit, static_argnums=0)
def step_at(tx, count, p, u):
    """The parameter after one step, the numbers of which are those of step `count`."""
    d, _ = tx.update(u, of_step(tx, count, p), p)
    return optax.apply_updates(p, d)


often = jax.jit(jax.vmap(lambda count, p, u: step_at(ROUNDED, count, p, u), (0, None, None)))


# --- One rounding ---------------------------------------------------------------------------------

SIZES = np.array([0.0, -0.0, 1e-39, 1e-30, 1e-5, 0.7, 1.0, 3.0, 1e6, 1e30, 3e38])
TIMES = np.array([0.0, 1e-30, 1e-8, 1e-3, 0.004, 0.3, 1.0, 1.00001, 2.0, 1e2, 1e6, 1e30])


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_parameter_is_rounded_to_a_neighbour_of_the_sum(jit, dtype):
    """For parameters and updates of any size and sign."""
    rng = np.random.default_rng(0)
    p = np.float64(SIZES)[:, None] * rng.choice([1, -1], (80, 11, 12))
    u = np.where(p == 0, 1e-3, p) * TIMES * rng.choice([1, -1], p.shape)
    with np.errstate(over="ignore"):
        p = jnp.asarray(np.float32(p * rng.uniform(0.9, 1.1, p.shape))).astype(BF16)
        u = np.clip(u * rng.uniform(0.9, 1.1, p.shape), -LARGEST, LARGEST)
        u = jnp.asarray(np.float32(u)).astype(dtype)
        x = flushed(flushed(np.asarray(p, np.float32)) + flushed(np.asarray(u, np.float32)))
    seen = np.isfinite(x) & (np.abs(x) <= LARGEST)
    assert seen.mean() > 0.8
    assert (np.sign(x) * np.sign(np.asarray(p, np.float32)) < 0).sum() > 100  # the sign changes
    with jax.disable_jit(not jit):
        new = np.asarray(step_at(ROUNDED, 0, p, u), np.float32)
    check_is_neighbour(new[seen], x[seen])
    np.testing.assert_array_equal(
        new[~seen], np.asarray(jnp.asarray(x).astype(BF16), np.float32)[~seen]
    )


def test_a_parameter_is_rounded_up_and_down_on_either_side_of_zero():
    p, u = jnp.ones(4096, BF16), jnp.resize(jnp.array([0.002, -0.001, -2.002]), 4096)
    new = np.asarray(step_at(ROUNDED, 0, p, u), np.float32)
    for i, pair in enumerate([(1, 1 + 2**-7), (1 - 2**-8, 1), (-1 - 2**-7, -1)]):
        assert set(new[i::3]) == set(np.float32(pair))


def test_the_mean_of_many_roundings_is_the_sum():
    """By the z-score of each coordinate, and by the sum of their squares."""
    steps = 20_000
    rng = np.random.default_rng(1)
    sizes = np.geomspace(1e-30, 1e30, 61)
    p = jnp.asarray(sizes * rng.choice([1, -1], 61), BF16)
    u = jnp.asarray(
        rng.normal(size=61) * np.abs(np.asarray(p, F32)) * np.resize([1, 1e-2, 1e-3], 61), F32
    )
    x = np.asarray(p, np.float32) + np.asarray(u)
    new = np.asarray(often(jnp.arange(steps), p, u), np.float64)
    low, high = (np.asarray(edge, np.float64) for edge in neighbours(x))
    deviation = np.sqrt(np.abs((x - low) * (high - x)) / steps)
    assert (deviation > 0).all()
    z = (new.mean(0) - x) / deviation
    assert np.abs(z).max() < 4.5
    assert abs((z**2).sum() - 61) < 5 * np.sqrt(2 * 61)


def test_the_mean_over_coordinates_is_the_sum():
    size, seeds = 1 << 20, range(8)
    for share in (0.5, 0.01, 2.0**-14):
        x = np.float32(1 + share * 2**-7)
        means = [
            np.mean(
                np.asarray(
                    jax.jit(round_to_bfloat16)(jnp.full(size, x), rounding_seed(s, 7)), np.float64
                )
            )
            for s in seeds
        ]
        deviation = 2**-7 * np.sqrt(share * (1 - share) / size)
        assert np.abs((np.array(means) - x) / deviation).max() < 4.5


def test_rounded_parameters_have_no_derivative():
    """It would be 0, and who learns a learning rate through an update would learn nothing."""
    params = {"w": jnp.ones((2, 3), BF16)}
    state = ROUNDED.init(params)

    def moved(rate):
        u = jax.tree.map(lambda p: rate * p.astype(jnp.float32), params)
        return ROUNDED.update(u, state, params)[0]["w"].sum()

    with pytest.raises(TypeError, match="have no derivative: update parameters in float32"):
        jax.grad(moved)(0.1)


def test_infinity_and_nan_pass_and_rounding_makes_no_others():
    inf, nan = np.inf, np.nan
    p = jnp.array([inf, -inf, nan, 1.0, inf, inf, LARGEST, -LARGEST, LARGEST, LARGEST, 1.0], BF16)
    ulp = 2.0**120
    u = jnp.array(
        [1.0, 0.0, 1.0, nan, nan, -inf, 0.4 * ulp, -0.4 * ulp, 0.6 * ulp, -0.5 * ulp, inf], F32
    )
    for step in range(50):
        new = np.asarray(step_at(ROUNDED, step, p, u), np.float32)
        np.testing.assert_array_equal(
            new[:9], np.float32([inf, -inf, nan, nan, nan, nan, LARGEST, -LARGEST, inf])
        )
        assert new[9] in (np.float32(LARGEST), np.float32(LARGEST - ulp))
        assert new[10] == inf
    edge = round_to_bfloat16(jnp.full(99, LARGEST + 0.3 * ulp), rounding_seed(1, 2))
    assert set(np.asarray(edge).tolist()) == {LARGEST}


def test_a_parameter_that_does_not_change_keeps_its_bits():
    p = jnp.array([0.0, -0.0, 1.5, -1e30, jnp.inf, -jnp.inf], BF16)
    for u in (jnp.zeros(6), -jnp.zeros(6)):
        new = step_at(ROUNDED, 0, p, u)
        assert np.asarray(new).view(np.uint16).tolist() == np.asarray(p).view(np.uint16).tolist()


def test_random_numbers_of_roundings_are_uncorrelated():
    """Between coordinates, parameters and steps, and with those of the parameters' 8-bit moments."""
    steps, leaves, size = 400, 4, 256
    paths = [(f"layer{i}", "kernel") for i in range(leaves)]
    tree = {path[0]: {"kernel": jnp.ones(size, BF16)} for path in paths}
    u = jax.tree.map(lambda p: jnp.full(size, 2.0**-8), tree)
    new = jax.jit(jax.vmap(lambda step: ROUNDED.update(u, of_step(ROUNDED, step, tree), tree)[0]))
    coins = [2.0 * (leaf > 0) - 1 for leaf in jax.tree.leaves(new(jnp.arange(steps)))]
    # Half way between two codes.
    v = per_tensor().factors(jnp.ones(1), (size,))
    moments = jax.jit(
        jax.vmap(lambda seed: write(jnp.full(size, 0.07080078125), v, np.dtype("int8"), seed))
    )
    for of_leaf in (salt_of, paths.index):
        seeds = [
            jax.vmap(rounding_seed, (0, None))(jnp.arange(1, steps + 1), of_leaf(path))
            for path in paths
        ]
        codes = [np.asarray(moments(seed), int) for seed in seeds]
        coins += [2.0 * (code == code.max()) - 1 for code in codes]
    coins = np.stack([np.asarray(coin, float) for coin in coins], axis=1)
    assert coins.shape == (steps, 3 * leaves, size)
    for axis in range(3):
        rows = np.moveaxis(coins, axis, 0).reshape(coins.shape[axis], -1)
        samples = rows.shape[1]
        assert abs(rows.mean()) < 5 / np.sqrt(rows.size)
        correlation = rows @ rows.T / samples - np.eye(len(rows))
        assert np.abs(correlation).max() < 5.5 / np.sqrt(samples)
        lagged = (rows[1:] * rows[:-1]).mean()  # all neighbours together: a sharper test
        assert abs(lagged) < 5 / np.sqrt(rows.size)


@pytest.mark.slow
def test_random_numbers_are_the_same_in_every_process():
    code = (
        "import jax.numpy as jnp; from optax_adam_mini.random_bits import *;"
        "print(float(round_to_bfloat16(jnp.full(999, 1.004), rounding_seed(3, salt_of(('a', 'b')))).sum()))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in (1, 2)
    }
    here = round_to_bfloat16(jnp.full(999, 1.004), rounding_seed(3, salt_of(("a", "b")))).sum()
    assert found == {f"{float(here)}\n"}
    assert (
        len(
            {
                int(salt_of(path))
                for path in [("a", "b"), ("ab",), ("a/b",), ("a", "b", ""), ("b", "a")]
            }
        )
        == 5
    )


def test_other_parameters_do_not_change_a_parameters_random_numbers():
    """A run stays the same bit for bit when another parameter is added or frozen."""
    p = jnp.ones(512, BF16)
    u = jnp.full(512, 0.004)
    alone = step_at(ROUNDED, 5, {"b": p}, {"b": u})
    beside = step_at(ROUNDED, 5, {"a": p, "b": p}, {"a": u, "b": u})
    chex.assert_trees_all_equal(alone["b"], beside["b"])
    assert (alone["b"] != beside["a"]).any()


# --- Many small steps -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 3))
def steps_of(tx, p, u, steps):
    def step(carry, _):
        p, state = carry
        d, state = tx.update(u, state, p)
        return (optax.apply_updates(p, d), state), None

    return jax.lax.scan(step, (p, tx.init(p)), None, steps)[0][0]


@pytest.mark.parametrize("sign", [1, -1])
def test_updates_of_a_hundredth_of_a_unit_add_up(sign):
    """10,000 of them are 100 units; rounded to nearest, the parameter would never move."""
    unit, steps, size = 2.0**-7, 10_000, 512
    p = jnp.full(size, sign * 1.03125, BF16)
    u = jnp.full(size, sign * unit / 100)
    moved = (
        sign
        * (np.asarray(steps_of(ROUNDED, p, u, steps), np.float64) - np.asarray(p, float))
        / unit
    )
    deviation = np.sqrt(steps * 0.01 * 0.99)
    assert abs(moved.mean() - 100) < 4.5 * deviation / np.sqrt(size)
    assert abs(moved.std() / deviation - 1) < 4.5 / np.sqrt(2 * size)
    chex.assert_trees_all_equal(steps_of(optax.identity(), p, u, steps), p)


@pytest.mark.parametrize("of", [optax.adamw, adam_mini])
def test_weight_decay_of_a_thousandth_of_a_unit_adds_up(of):
    unit, steps, size = 2.0**-7, 4000, 1024
    p, decay = jnp.full(size, 1.5, BF16), 1e-3 * unit / 1.5
    zeros = jnp.zeros(size)
    last = steps_of(stochastic_rounding(of(1.0, weight_decay=decay)), p, zeros, steps)
    fallen = (1.5 - np.asarray(last, np.float64).mean()) / unit
    expected = 1.5 * (1 - (1 - decay) ** steps) / unit
    assert 3.9 < expected < 4.0
    assert abs(fallen - expected) < 4.5 * np.sqrt(steps * 1e-3 / size)
    nearest = optax.chain(optax.add_decayed_weights(decay), optax.scale(-1.0))
    chex.assert_trees_all_equal(steps_of(nearest, p, zeros, steps), p)


# --- Whatever is inside ---------------------------------------------------------------------------

SPECS = {
    "kernel": per_neuron(),
    "query": per_head(2),
    "matrix": MATRIX,
    "bias": per_element(),
    "wide": per_neuron(),
}


def tree(seed=0, dtype=BF16):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 8), "query": (6, 8), "matrix": (6, 8), "bias": (8,), "wide": (4, 3)}
    made = {name: jnp.asarray(rng.normal(size=shape), F32) for name, shape in shapes.items()}
    return {name: x if name == "wide" else x.astype(dtype) for name, x in made.items()}


def widened(tree):
    return jax.tree.map(lambda x: x.astype(F32), tree)


def muon(rate):
    return optax.contrib.muon(rate, weight_decay=0.1)


MINI = functools.partial(adam_mini, block_specs=SPECS, weight_decay=0.1)
INNER = {
    "sgd": optax.sgd(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lion": optax.lion(0.003, weight_decay=0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=4),
    "muon": muon(0.01),
    "adam_mini": adam_mini(0.01, block_specs=per_neuron()),
    "adam_mini specs": MINI(0.01),
    "adam_mini int8": MINI(0.01, mu_dtype=jnp.int8),
    "adam_mini nesterov": MINI(0.01, nesterov=True),
    "adam_mini schedule": MINI(optax.linear_schedule(0.01, 0.0, 10)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), MINI(0.01, mu_dtype=jnp.int8)),
    "multi_steps": optax.MultiSteps(MINI(0.01), 2),
    "masked": optax.masked(MINI(0.01), {name: name != "bias" for name in SPECS}),
    "multi_transform": optax.multi_transform(
        {"a": MINI(0.01), "b": optax.sgd(0.01), "c": optax.set_to_zero()},
        {"kernel": "a", "query": "a", "matrix": "b", "bias": "c", "wide": "a"},
    ),
    "apply_if_finite": optax.apply_if_finite(MINI(0.01), 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.001, b2=0.999),
    "inject_hyperparams mini": optax.inject_hyperparams(adam_mini, static_args=("block_specs",))(
        learning_rate=0.001, b2=0.999, block_specs=SPECS
    ),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.01), 0.01),
    "zero_nans": optax.chain(optax.zero_nans(), optax.adam(0.01)),
}  # fmt: skip


OFTEN = ["adamw", "adam_mini int8", "inject_hyperparams"]


@pytest.mark.parametrize(
    ("name", "grad_dtype"),
    [
        (name, "bfloat16")
        if name in OFTEN
        else pytest.param(name, "bfloat16", marks=pytest.mark.slow)
        for name in INNER
    ]
    + [("adam_mini specs", "float32")],
)
def test_a_step_is_the_float32_step_of_the_inner_optimizer_rounded(name, grad_dtype):
    """State and update are what the inner optimizer gives for parameters in float32."""
    inner = INNER[name]
    tx = stochastic_rounding(inner)
    p = tree()
    state, expected = tx.init(p), inner.init(widened(p))
    update, by_hand = jax.jit(tx.update), jax.jit(inner.update)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.inner_state, expected)
    moved = []
    for step in range(5):
        grads = jax.tree.map(lambda x: x.astype(grad_dtype), tree(step + 1, F32))
        u, expected = by_hand(widened(grads), expected, widened(p))
        old_state = state
        d, state = update(grads, state, p)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, old_state)
        if "int8" not in name and name != "chain":
            chex.assert_trees_all_close(state.inner_state, expected, rtol=1e-4, atol=1e-6)
        # The next step starts from the same state: codes of 8 bits may be rounded differently.
        expected = state.inner_state
        new = optax.apply_updates(p, d)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, p)
        for leaf in p:
            x = np.asarray(p[leaf], np.float32) + np.asarray(u[leaf], np.float32)
            if leaf == "wide":
                np.testing.assert_allclose(new[leaf], x, rtol=1e-5, atol=1e-6)
            elif "int8" not in name and name != "chain":
                check_is_neighbour(new[leaf], x, slack=1e-4)
            else:
                np.testing.assert_allclose(np.asarray(new[leaf], F32), x, rtol=2e-2, atol=2e-2)
        moved.append(any(bool((new[leaf] != p[leaf]).any()) for leaf in p))
        p = new
    assert int(state.count) == 5
    assert moved == ([False, True, False, True, False] if name == "multi_steps" else [True] * 5)


OUTSIDE = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx),
    "masked": lambda tx: optax.masked(tx, {name: name != "wide" for name in SPECS}),
    "multi_transform": lambda tx: optax.multi_transform(
        {"narrow": tx, "wide": optax.sgd(0.1)}, {name: "wide" if name == "wide" else "narrow" for name in SPECS}
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: stochastic_rounding(optax.sgd(learning_rate)), hyperparam_dtype=F32
    )(learning_rate=0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", slow_but("masked", "inject_hyperparams", "multi_steps", of=OUTSIDE)
)
def test_a_wrapper_outside_leaves_the_rounded_update_as_it_is(name):
    """The update is in float32 where the parameters are in bfloat16, and must stay so."""
    tx = stochastic_rounding(optax.sgd(0.1))
    p, grads = tree(), tree(1, F32)
    expected = optax.apply_updates(p, tx.update(grads, tx.init(p), p)[0])
    wrapped = OUTSIDE[name](tx)
    found = optax.apply_updates(p, jax.jit(wrapped.update)(grads, wrapped.init(p), p)[0])
    narrow = {leaf for leaf in p if leaf != "wide"}
    chex.assert_trees_all_equal({k: found[k] for k in narrow}, {k: expected[k] for k in narrow})
    assert any((found[k] != p[k]).any() for k in narrow)


def test_gradients_are_accumulated_in_float32():
    """One gradient of 1 and three of 2**-9: a sum in bfloat16 would lose the small ones."""
    tx = stochastic_rounding(optax.MultiSteps(optax.sgd(1.0), 4, use_grad_mean=False))
    p = jnp.zeros(3, BF16)
    state = tx.init(p)
    assert state.inner_state.acc_grads.dtype == F32
    for g in (1.0, 2.0**-9, 2.0**-9, 2.0**-9):
        d, state = tx.update(jnp.full(3, g, BF16), state, p)
        last, p = p, optax.apply_updates(p, d)
    assert not last.any()
    check_is_neighbour(p, np.full(3, -1 - 3 * 2.0**-9, np.float32))


def test_leaves_that_are_not_bfloat16_and_missing_gradients_are_passed_on():
    params = {"w": jnp.linspace(0.1, 1, 7), "z": jnp.ones(2, jnp.complex64), "n": jnp.arange(3), "b": jnp.ones(7, BF16),
              "none": None}  # fmt: skip
    grads = {
        "w": jnp.linspace(1, 2, 7),
        "z": 1j * jnp.ones(2),
        "n": jnp.zeros(3, jax.dtypes.float0),
        "b": None,
        "none": None,
    }
    inner = adam_mini(1e-3, block_specs=per_tensor(), weight_decay=0.0)
    tx = stochastic_rounding(inner)
    u, _ = inner.update(grads, inner.init(params), params)
    d, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(d, u)
    assert d["b"] is None


def test_gradients_in_float16_do_not_overflow():
    tx = stochastic_rounding(optax.sgd(1e3))
    p = {"w": jnp.zeros(3, BF16)}
    d, _ = tx.update({"w": jnp.full(3, 300, jnp.float16)}, tx.init(p), p)
    check_is_neighbour(optax.apply_updates(p, d)["w"], np.full(3, -3e5, np.float32))


def test_gradients_that_do_not_fit_are_refused_whatever_is_inside():
    """Optax's own would be broadcast."""
    tx = stochastic_rounding(optax.sgd(0.1))
    p = {"w": jnp.ones((4, 3), BF16), "b": jnp.ones(3, BF16)}
    state = tx.init(p)
    with pytest.raises(ValueError, match=r"w: got a gradient of shape \(1, 3\)"):
        tx.update({**p, "w": jnp.ones((1, 3))}, state, p)
    with pytest.raises(ValueError, match=r"the pair \(loss, gradients\)"):
        tx.update((1.0, p), state, p)
    with pytest.raises(ValueError, match="got nothing for b"):
        tx.update({"w": p["w"]}, state, p)
    with pytest.raises(ValueError, match="the state's count was cast to float32"):
        tx.update(p, state._replace(count=jnp.float32(0)), p)


def test_parameters_of_other_dtypes_are_refused():
    tx = stochastic_rounding(optax.sgd(0.1))
    with pytest.raises(
        ValueError,
        match=r"expected parameters in bfloat16, and found none \(a/b is float32\).*astype",
    ):
        tx.init({"a": {"b": jnp.ones(3)}, "n": jnp.arange(2)})
    with pytest.raises(
        TypeError, match=r"a/b: expected bfloat16.*got float16, .*keep the parameters in bfloat16"
    ):
        tx.init({"a": {"b": jnp.ones(3, jnp.float16)}, "c": jnp.ones(2, BF16)})
    with pytest.raises(TypeError, match=r"w: .*float8_e4m3fn"):
        tx.init({"w": jnp.ones(3, jnp.float8_e4m3fn)})
    p = jnp.ones(3, BF16)
    with pytest.raises(
        ValueError, match=r"update got none: call tx.update\(grads, state, params\)"
    ):
        tx.update(p, tx.init(p))


def test_init_works_on_shapes_and_map_params_finds_the_moments():
    tx = stochastic_rounding(MINI(0.01, mu_dtype=jnp.int8))
    p = tree()
    state = tx.init(p)
    abstract = jax.eval_shape(tx.init, jax.eval_shape(tree))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    assert isinstance(state, StochasticRoundingState)
    named = optax.tree.map_params(
        tx, lambda x: "like a parameter", state, transform_non_params=lambda x: "other"
    )
    assert named.inner_state[0].mu.codes == dict.fromkeys(p, "like a parameter")
    assert named.count == "other"


# --- Optax's own tests ----------------------------------------------------------------------------


def in_bfloat16(*args):
    """Adam-mini for tests that make parameters in float32: they are cast to bfloat16 on the way in.

    Not for those that wrap it in mechanize and the like, which scale what has been rounded, and not
    for parameters in bfloat16, where the tests expect updates in bfloat16.
    """

    @functools.wraps(adam_mini)
    def build(*hyper, **kwargs):
        if args[-1] not in ("adam_mini", "adam", "adamw"):
            raise unittest.SkipTest("something is wrapped around it")
        tx = stochastic_rounding(contract.factory(*args)(*hyper, **kwargs))

        def cast(params):
            if {leaf.dtype for leaf in jax.tree.leaves(params)} - {jnp.dtype(F32)}:
                raise unittest.SkipTest("other dtypes have tests of their own")
            return jax.tree.map(lambda p: p.astype(BF16), params)

        return optax.GradientTransformationExtraArgs(
            lambda params: tx.init(cast(params)),
            lambda updates, state, params, **extra: tx.update(
                updates, state, cast(params), **extra
            ),
        )

    return build


ContribTest = contract.installed(
    "contrib/_common_test.py",
    "ContribTest",
    {"_MAIN_OPTIMIZERS_UNDER_TEST": "cases(1e-2)", "_BASE_OPTIMIZERS": "[]"},
    _get_opt_factory=in_bfloat16,
)
AliasTest = pytest.mark.slow(
    contract.installed(
        "_src/alias_test.py",
        "AliasTest",
        {"_OPTIMIZERS_UNDER_TEST": "cases(1e-1)"},
        _get_opt=in_bfloat16,
    )
)


# --- Training frameworks, meshes, checkpoints -----------------------------------------------------


@pytest.mark.slow
def test_flax_adds_the_update_as_optax_does():
    tx = stochastic_rounding(MINI(0.01, mu_dtype=jnp.int8))
    p, grads = tree(), tree(1)
    expected = optax.apply_updates(p, jax.jit(tx.update)(grads, tx.init(p), p)[0])
    train_state = TrainState.create(apply_fn=None, params=p, tx=tx)
    found = jax.jit(lambda s, g: s.apply_gradients(grads=g))(train_state, grads)
    chex.assert_trees_all_close(found.params["wide"], expected["wide"], rtol=1e-6)
    chex.assert_trees_all_equal({**found.params, "wide": 0}, {**expected, "wide": 0})


def test_nnx_optimizers_and_boxed_linen_parameters_are_updated():
    model = nnx.Linear(8, 6, param_dtype=BF16, rngs=nnx.Rngs(0))
    tx = stochastic_rounding(adam_mini(0.01, mu_dtype=jnp.int8))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(
        lambda p: jnp.linspace(-1, 1, p.size).reshape(p.shape).astype(BF16), params
    )
    expected = optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])
    optimizer.update(model, grads)
    chex.assert_trees_all_equal(nnx.state(model, nnx.Param), expected)
    assert model.kernel[...].dtype == BF16

    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    layer = nn.Dense(6, param_dtype=BF16, kernel_init=kernel_init)
    boxed = layer.init(jax.random.key(0), jnp.ones((1, 8)))
    found, _ = tx.update(boxed, tx.init(boxed), boxed)
    plain = nn.unbox(boxed)
    without, _ = tx.update(plain, tx.init(plain), plain)
    chex.assert_trees_all_equal(nn.unbox(found), without)


SHARDED = {
    "kernel": (P("fsdp", "tensor"), (16, 32), per_neuron()),
    "matrix": (P("tensor", "fsdp"), (16, 32), MATRIX),
    "bias": (P(("fsdp", "tensor")), (32,), per_element()),
    "gain": (P(), (16,), per_tensor()),
}
EXACT = stochastic_rounding(
    adam_mini(0.0625, b1=0.5, b2=0.75, weight_decay=0.0, mu_dtype=jnp.int8,
              block_specs={name: spec for name, (_, _, spec) in SHARDED.items()})
)  # fmt: skip


def small_integers(step):
    """Gradients whose squares have exact means, in any order."""
    rng = np.random.default_rng(step)
    return {
        name: jnp.asarray(rng.integers(-2, 3, shape), BF16)
        for name, (_, shape, _) in SHARDED.items()
    }


def train(params, state, steps, update=None):
    update = update or jax.jit(EXACT.update)
    for step in steps:
        grads = jax.tree.map(
            lambda g, p: jax.device_put(g, p.sharding), small_integers(step), params
        )
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture(scope="module")
def on_one_device():
    params = small_integers(99)
    return jax.device_get(train(params, EXACT.init(params), range(6)))


def mesh_of(devices, kind):
    return jax.make_mesh((devices // 2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2,
                         devices=jax.devices()[:devices])  # fmt: skip


def check_same_bits(found, expected):
    """But for the few whose rounding depends on the order of a sum."""
    found = jax.device_get(found)
    for name in SHARDED:
        same = np.asarray(found[0][name]) == np.asarray(expected[0][name])
        assert same.mean() > 0.99, name
    chex.assert_trees_all_equal(found[1].count, expected[1].count)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_training_gives_the_same_bits_on_eight_devices(on_one_device, kind):
    mesh = mesh_of(8, kind)
    shardings = {name: NamedSharding(mesh, spec) for name, (spec, _, _) in SHARDED.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(small_integers(99), shardings)
        found = train(params, EXACT.init(params), range(6))
        mu = found[1].inner_state[0].mu.codes["kernel"]
        assert mu.sharding.is_equivalent_to(shardings["kernel"], 2)
        assert found[0]["kernel"].sharding.is_equivalent_to(shardings["kernel"], 2)
    check_same_bits(found, on_one_device)


@pytest.mark.slow
def test_a_checkpoint_is_restored_on_other_devices(on_one_device, tmp_path):
    """Three steps on eight devices, three on four."""
    params = small_integers(99)

    def on(devices):
        mesh = mesh_of(devices, AxisType.Auto)
        of_params = {name: NamedSharding(mesh, spec) for name, (spec, _, _) in SHARDED.items()}
        return of_params, opt_state_shardings(EXACT, params, of_params)

    of_params, of_state = on(8)
    assert jax.tree.structure(of_state) == jax.tree.structure(EXACT.init(params))
    for name, sharding in of_params.items():
        assert of_state.inner_state[0].mu.codes[name].is_equivalent_to(sharding, params[name].ndim)
    placed = jax.device_put(params, of_params)
    saved = train(placed, jax.jit(EXACT.init, out_shardings=of_state)(placed), range(3))
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "saved", saved)
    checkpointer.wait_until_finished()
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved, on(4)
    )
    restored = checkpointer.restore(tmp_path / "saved", abstract)
    assert restored[0]["kernel"].dtype == BF16
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(saved))
    check_same_bits(train(*restored, range(3, 6)), on_one_device)


# --- Conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mu_dtype", [None, pytest.param(jnp.int8, marks=pytest.mark.slow)])
def test_a_float32_run_of_adamw_goes_on_in_bfloat16(mu_dtype):
    p = widened(tree())
    adam = optax.adamw(0.01)
    state = adam.init(p)
    for step in range(3):
        _, state = adam.update(tree(step + 1, F32), state, p)
    tx = stochastic_rounding(MINI(0.01, mu_dtype=mu_dtype))
    narrow = {name: x if name == "wide" else x.astype(BF16) for name, x in p.items()}
    converted = from_adam_state(state, p, SPECS, mu_dtype)
    began = tx.init(narrow)._replace(inner_state=converted)
    chex.assert_trees_all_equal_shapes_and_dtypes(began, tx.init(narrow))
    _, new = jax.jit(tx.update)(tree(4), began, narrow)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, began)
    assert int(new.inner_state[0].count) == 4


@pytest.mark.parametrize("mu_dtype", [None, pytest.param(jnp.int8, marks=pytest.mark.slow)])
def test_the_state_of_a_wrapped_adamw_is_converted_and_back(mu_dtype):
    p = tree()
    adam, mini = (
        stochastic_rounding(optax.adamw(0.01)),
        stochastic_rounding(MINI(0.01, mu_dtype=mu_dtype)),
    )
    state = adam.init(p)
    for step in range(3):
        _, state = adam.update(tree(step + 1), state, p)
    converted = from_adam_state(state, p, SPECS, mu_dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, mini.init(p))
    assert isinstance(converted.inner_state[0], ScaleByAdamMiniState)
    assert int(converted.count) == 3
    # The inner optimizer's state is that of parameters in float32.
    back = to_adam_state(converted, jax.eval_shape(lambda: widened(tree())), SPECS)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "copies"), [(optax.adamw(1e-3), 0), (adam_mini(1e-3, mu_dtype=jnp.int8, block_specs=MATRIX), 1)]
)  # fmt: skip
def test_a_donated_step_keeps_no_array_of_a_parameters_size(inner, copies):
    """On CPU, XLA keeps the gradients in float32 for the sums of squares; tests/accelerators has
    TPUs and the H100."""
    tx = stochastic_rounding(inner)
    p = {f"layer{i}": jax.ShapeDtypeStruct((512, 1024), BF16) for i in range(12)}
    size = 512 * 1024

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    state = jax.eval_shape(tx.init, p)
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(p, state, p).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= (3 if copies else 10) * 12 * size
    assert memory.temp_size_in_bytes <= 12.1 * copies * 4 * size + 0.1 * size
    init = jax.jit(tx.init).lower(p).compile().memory_analysis()
    assert init.temp_size_in_bytes <= 0.01 * size


def test_parameters_that_were_widened_are_refused():
    """`eqx.apply_updates` adds a float32 update to bfloat16 parameters, and keeps the sum."""
    tx = stochastic_rounding(adam_mini(1e-3))
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    state = tx.init(params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    with pytest.raises(ValueError, match=r"eqx.apply_updates does"):
        tx.update(wide, state, wide)
    for wrong in (state.inner_state, params):
        with pytest.raises(ValueError, match="expected the StochasticRoundingState"):
            tx.update(params, wrong, params)
    with pytest.raises(TypeError, match="expected a transformation"):
        stochastic_rounding(adam_mini)


def test_init_takes_shapes():
    shapes = {"w": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)}
    state = stochastic_rounding(adam_mini(1e-3, block_specs=per_neuron())).init(shapes)
    assert state.inner_state[0].mu["w"].dtype == jnp.float32
