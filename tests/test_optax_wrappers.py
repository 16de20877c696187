"""Optax's wrappers around adam_mini, against the same wrappers around one written by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from optax_adam_mini import (
    adam_mini,
    by_path,
    flax_layers,
    muon_mini,
    outer,
    per_element,
    per_neuron,
    per_tensor,
)
from tests.by_hand import (
    BLOCK_SPECS,
    OUTER_SPECS,
    adam_mini_by_hand,
    gradients,
    outer_by_hand,
    params,
)
from tests.params import slow_but

OURS = functools.partial(adam_mini, bounded=False, block_specs=BLOCK_SPECS)
each_spec = pytest.mark.parametrize("specs", [BLOCK_SPECS, OUTER_SPECS], ids=["mean", "outer"])


def mask(tree):
    return {name: name == "kernel" for name in tree}


def labels(tree):
    return {"kernel": "train", "bias": "freeze"}


WRAPPERS = {
    "chain_clip": lambda opt: optax.chain(optax.clip_by_global_norm(0.5), opt(0.1)),
    "named_chain": lambda opt: optax.named_chain(("clip", optax.clip(0.3)), ("opt", opt(0.1))),
    "masked": lambda opt: optax.masked(opt(0.1), {"kernel": True, "bias": False}),
    "masked_by_function": lambda opt: optax.masked(opt(0.1), mask),
    "multi_transform": lambda opt: optax.multi_transform(
        {"train": opt(0.1), "freeze": optax.set_to_zero()}, labels
    ),
    "partition_two_rates": lambda opt: optax.partition(
        {"train": opt(0.1), "freeze": opt(0.01, b1=0.5)}, labels({})
    ),
    "freeze": lambda opt: optax.chain(opt(0.1), optax.freeze({"kernel": False, "bias": True})),
    "selective_transform": lambda opt: optax.selective_transform(
        opt(0.1), freeze_mask={"kernel": False, "bias": True}
    ),
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt(0.1), 3),
    "multi_steps": lambda opt: optax.MultiSteps(opt(0.1), 3).gradient_transformation(),
    "skip_not_finite": lambda opt: optax.MultiSteps(
        opt(0.1), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "apply_every": lambda opt: optax.chain(opt(0.1), optax.apply_every(2)),
    "ema": lambda opt: optax.chain(opt(0.1), optax.ema(0.8)),
    "schedule_free": lambda opt: optax.contrib.schedule_free(opt(0.1, b1=0.0), 0.1, b1=0.9),
    "mechanize": lambda opt: optax.contrib.mechanize(opt(1.0)),
    "sam": lambda opt: optax.contrib.sam(
        opt(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), sync_period=2
    ),
    "reduce_on_plateau": lambda opt: optax.chain(opt(0.1), optax.contrib.reduce_on_plateau()),
    "trust_ratio": lambda opt: optax.chain(opt(0.1), optax.scale_by_trust_ratio()),
    "conditionally_mask": lambda opt: optax.conditionally_mask(
        opt(0.1), lambda step: step % 2 == 0
    ),
    "zero_nans": lambda opt: optax.chain(optax.zero_nans(), opt(0.1)),
}


# Those that read the inner state, call the inner update more or less than once a step, or give it
# a part of the tree; the others change gradients or updates on the way.
QUICK = ("chain_clip", "masked", "multi_transform", "partition_two_rates", "apply_if_finite",
         "multi_steps", "schedule_free", "mechanize", "sam", "reduce_on_plateau",
         "conditionally_mask")  # fmt: skip


@pytest.mark.parametrize("name", slow_but(*QUICK, of=WRAPPERS))
@pytest.mark.parametrize(
    ("jit", "specs"),
    [
        pytest.param(True, BLOCK_SPECS, id="jit-mean"),
        pytest.param(False, BLOCK_SPECS, id="eager-mean", marks=pytest.mark.slow),
        pytest.param(True, OUTER_SPECS, id="jit-outer", marks=pytest.mark.slow),
        pytest.param(False, OUTER_SPECS, id="eager-outer", marks=pytest.mark.slow),
    ],
)
def test_wrapped_adam_mini_equals_one_written_by_hand(name, jit, specs):
    trajectories = []
    ours = functools.partial(adam_mini, bounded=False, block_specs=specs)
    by_hand = outer_by_hand if specs is OUTER_SPECS else adam_mini_by_hand
    for optimizer in (ours, by_hand):
        tx = optax.with_extra_args_support(WRAPPERS[name](optimizer))
        p, trajectory = params(), []
        state = tx.init(p)
        update = jax.jit(tx.update) if jit else tx.update
        for step in range(7):
            grads = gradients(p, step)
            if "finite" in name and step == 3:
                grads["kernel"] = grads["kernel"].at[1, 1].set(jnp.nan)
            value = {"value": jnp.float32(1.0)} if name == "reduce_on_plateau" else {}
            updates, state = update(grads, state, p, **value)
            p = optax.apply_updates(p, updates)
            trajectory.append(p)
        trajectories.append(trajectory)
    chex.assert_tree_all_finite(trajectories)
    chex.assert_trees_all_close(*trajectories, rtol=2e-5, atol=1e-5)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), trajectories[0][-1], params())
    frozen = name in ("multi_transform", "freeze", "selective_transform")
    assert moved == {"kernel": True, "bias": not frozen}


def test_lookahead_equals_one_written_by_hand():
    results = []
    for optimizer in (OURS, adam_mini_by_hand):
        tx = optax.lookahead(optimizer(0.1), sync_period=3, slow_step_size=0.5)
        p = optax.LookaheadParams.init_synced(params())
        state = tx.init(p)
        for step in range(7):
            updates, state = jax.jit(tx.update)(gradients(p.fast, step), state, p)
            p = optax.apply_updates(p, updates)
        results.append(p)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", slow_but("partition_two_rates", "multi_steps", "schedule_free", of=WRAPPERS)
)
@pytest.mark.parametrize(
    "specs",
    [
        pytest.param(BLOCK_SPECS, id="mean"),
        pytest.param(OUTER_SPECS, id="outer", marks=pytest.mark.slow),
    ],
)
def test_wrapped_adam_mini_in_8_bits_is_close_to_one_written_by_hand(name, specs):
    """A code is within an eighth of the moment, so a parameter is within an eighth of its way."""
    by_hand = outer_by_hand if specs is OUTER_SPECS else adam_mini_by_hand
    ours = functools.partial(adam_mini, bounded=False, block_specs=specs, mu_dtype=jnp.int8)
    results = []
    for optimizer in (ours, by_hand):
        tx = WRAPPERS[name](functools.partial(optimizer, b2=0.95))
        tx, p = optax.with_extra_args_support(tx), params()
        state = tx.init(p)
        update = jax.jit(tx.update)
        for step in range(7):
            grads = gradients(params(), step)  # the same, wherever the parameters are
            if "finite" in name and step == 3:
                grads["kernel"] = grads["kernel"].at[1, 1].set(jnp.nan)
            value = {"value": jnp.float32(1.0)} if name == "reduce_on_plateau" else {}
            updates, new = update(grads, state, p, **value)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            p, state = optax.apply_updates(p, updates), new
        results.append(p)
    chex.assert_tree_all_finite(results)
    moved = [jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), p, params()) for p in results]
    for key, limit in moved[1].items():
        assert (moved[0][key] > 0) == (limit > 0)
        assert np.abs(results[0][key] - results[1][key]).max() <= limit / 8


def test_apply_if_finite_skips_a_step_with_a_nan_gradient():
    tx = optax.apply_if_finite(OURS(0.1), 5)
    p = params()
    _, state = tx.update(gradients(p, 0), tx.init(p), p)
    bad = {**gradients(p, 1), "bias": jnp.array([0.0, jnp.nan, 0.0, 0.0])}
    updates, after = jax.jit(tx.update)(bad, state, p)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, p))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert after.notfinite_count == 1


def test_lora_trains_only_the_adapters():
    p = {
        "kernel": jnp.ones((3, 4)),
        "lora_a": jnp.ones((3, 2)),
        "lora_b": jnp.zeros((2, 4)),
    }
    roles = {"kernel": "frozen", "lora_a": "adapter", "lora_b": "adapter"}
    tx = optax.multi_transform({"frozen": optax.set_to_zero(), "adapter": adam_mini(0.1)}, roles)
    state = tx.init(p)
    nu = optax.tree.get(state, "nu")
    assert jax.tree.map(jnp.shape, nu) == {
        "kernel": optax.MaskedNode(),
        "lora_a": (1, 2),
        "lora_b": (1, 4),
    }
    x, y = jnp.ones((5, 3)), jnp.zeros((5, 4))
    loss = lambda p: jnp.mean((x @ p["kernel"] + x @ p["lora_a"] @ p["lora_b"] - y) ** 2)
    start = loss(p)
    for _ in range(30):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
    chex.assert_trees_all_equal(p["kernel"], jnp.ones((3, 4)))
    assert loss(p) < 0.1 * start


def test_microbatching_gives_the_gradients_of_the_whole_batch():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    def loss(p, x):
        return jnp.sum((x @ p["kernel"] + p["bias"]) ** 2)

    micro = optax.microbatching.microbatch(
        jax.grad(loss), argnums=1, microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.SUM,
    )  # fmt: skip
    tx, p = OURS(0.1), params()
    state = tx.init(p)
    whole = tx.update(jax.grad(loss)(p, x), state, p)
    parts = tx.update(micro(p, x), state, p)
    chex.assert_trees_all_close(whole, parts, rtol=1e-5, atol=1e-7)


def test_flattened_parameters_are_updated_as_by_adamw():
    """`optax.flatten` makes one vector of them, which flax_layers cuts per element, as Adam does."""
    adam = optax.flatten(optax.adamw(0.1, weight_decay=1e-4))
    flat = optax.flatten(adam_mini(0.1))
    p, states = params(), [adam.init(params()), flat.init(params())]
    assert states[1][0].nu.shape == states[1][0].mu.shape
    for step in range(3):
        grads = gradients(p, step)
        expected, states[0] = adam.update(grads, states[0], p)
        updates, states[1] = flat.update(grads, states[1], p)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4)


def test_injected_hyperparameters_follow_their_schedules():
    inject = optax.inject_hyperparams(adam_mini, static_args=("block_specs", "mu_dtype"))
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    for specs in (BLOCK_SPECS, OUTER_SPECS, lambda tree: BLOCK_SPECS):
        tx = inject(schedule, b1=optax.linear_schedule(0.5, 0.9, 5), block_specs=specs)
        p = params()
        state = tx.init(p)
        for step in range(5):
            grads = gradients(p, step)
            expected, _ = adam_mini(
                float(schedule(step)), 0.5 + 0.4 * step / 5, block_specs=specs
            ).update(grads, state.inner_state, p)
            updates, state = jax.jit(tx.update)(grads, state, p)
            chex.assert_trees_all_close(updates, expected, rtol=1e-4)
            assert state.hyperparams.keys() >= {"learning_rate", "b1", "b2"}


def test_injected_label_functions_must_be_static():
    with pytest.raises(TypeError, match=r'static_args=\("block_specs",\)'):
        optax.inject_hyperparams(adam_mini)(0.1, block_specs=flax_layers()).init(params())


def test_empty_trees_and_missing_gradients_are_passed_on():
    tx = adam_mini(0.1)
    for empty in ({}, [], (), {"a": None, "b": {}}):
        state = tx.init(empty)
        updates, state = tx.update(empty, state, empty)
        assert jax.tree.leaves(updates) == []
        assert state[0].count == 1
    p = {**params(), "extra": None}
    updates, _ = tx.update({**gradients(params(), 0), "extra": None}, tx.init(p), p)
    assert updates["extra"] is None


def test_complex_parameters_have_the_right_rows_and_columns():
    g = jnp.array([[3 + 4j, 1.0], [2j, 1 + 1j]], jnp.complex64)
    tx = adam_mini(1.0, weight_decay=0.0, bounded=False, block_specs=OUTER_SPECS["kernel"])
    updates, state = tx.update(g, tx.init(g), g)
    square = np.abs(g) ** 2
    v = square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / square.mean()
    assert {x.dtype for x in state[0].nu} == {jnp.dtype("float32")}
    np.testing.assert_allclose(updates, -g / np.sqrt(v), rtol=1e-5)


def test_complex_parameters_have_a_real_second_moment():
    g = jnp.array([[3 + 4j, 0.0], [0.0, 1 + 1j]], jnp.complex64)
    tx = adam_mini(1.0, weight_decay=0.0, bounded=False, block_specs=per_neuron())
    updates, state = tx.update(g, tx.init(g), g)
    assert state[0].nu.dtype == jnp.float32
    np.testing.assert_allclose(state[0].nu, 1e-3 * np.array([[25 / 2, 2 / 2]]), rtol=1e-6)
    np.testing.assert_allclose(updates, -g / np.sqrt([[25 / 2, 2 / 2]]), rtol=1e-5)


@pytest.mark.parametrize(
    "specs",
    [None, per_tensor(), per_element(), by_path([("b$", per_element())], outer(per_neuron(0), per_neuron()))],
    ids=["default", "per_tensor", "per_element", "outer"],
)  # fmt: skip
def test_integer_leaves_are_left_alone(specs):
    p = {
        "kernel": jnp.ones((2, 3)),
        "w": 1000 * jnp.arange(6).reshape(2, 3),
        "b": jnp.array([True]),
        "embedding": jnp.ones((2, 3), jnp.int4),
    }
    loss = lambda p: jnp.sum(p["kernel"] ** 2)
    grads = jax.grad(loss, allow_int=True)(p)  # of float0 where the parameter is an integer
    tx = adam_mini(0.1, weight_decay=0.1, block_specs=specs)
    state = tx.init(p)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new_state = update(grads, state, p)
        new = optax.apply_updates(p, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, p)
        chex.assert_trees_all_equal((new["w"], new["b"]), (p["w"], p["b"]))
        assert (new["kernel"] < 1).all()
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)


@each_spec
def test_updates_under_vmap_equal_single_updates(specs):
    tx = adam_mini(0.1, block_specs=specs)
    ensemble = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), params())
    states = jax.vmap(tx.init)(ensemble)
    grads = jax.tree.map(lambda x: x + 1, ensemble)
    updates, states = jax.jit(jax.vmap(tx.update))(grads, states, ensemble)
    for i in range(3):
        p, g = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (ensemble, grads))
        expected, state = tx.update(g, tx.init(p), p)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], (updates, states)), (expected, state), rtol=1e-6
        )


@each_spec
def test_updates_under_pmap_equal_those_on_one_device(specs):
    tx = adam_mini(0.1, block_specs=specs)
    n = jax.local_device_count()
    p = params()
    replicated = jax.tree.map(lambda x: jnp.stack([x] * n), p)
    states = jax.pmap(tx.init)(replicated)
    grads = jax.tree.map(lambda x: jnp.stack([x + i for i in range(n)]), p)

    @functools.partial(jax.pmap, axis_name="batch")
    def step(p, state, g):
        updates, state = tx.update(jax.lax.pmean(g, "batch"), state, p)
        return optax.apply_updates(p, updates), state

    new, _ = step(replicated, states, grads)
    mean = jax.tree.map(lambda x: x.mean(0), grads)
    updates, _ = tx.update(mean, tx.init(p), p)
    expected = optax.apply_updates(p, updates)
    for i in range(n):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], new), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "specs",
    [
        pytest.param(BLOCK_SPECS, id="mean"),
        pytest.param(OUTER_SPECS, id="outer", marks=pytest.mark.slow),
    ],
)
def test_gradients_through_unrolled_updates_are_right(specs):
    tx = functools.partial(adam_mini, eps_root=1e-6, block_specs=specs)

    def final_loss(learning_rate, p):
        optimizer = tx(learning_rate)
        state = optimizer.init(p)
        for _ in range(4):
            grads = jax.tree.map(lambda x: x.at[..., 0].set(0.0), p)  # zero blocks
            updates, state = optimizer.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return optax.tree.norm(p, squared=True)

    p, h = params(), 1e-3
    value, gradient = jax.jit(final_loss), jax.jit(jax.grad(final_loss, (0, 1)))
    grads = gradient(0.05, p)
    chex.assert_tree_all_finite(grads)
    numeric = (value(0.05 + h, p) - value(0.05 - h, p)) / (2 * h)
    np.testing.assert_allclose(grads[0], numeric, rtol=1e-2)


def test_the_state_keeps_its_type_in_scan_and_cond():
    tx = adam_mini(optax.linear_schedule(0.1, 0.0, 10))
    p = {"kernel": jnp.ones((2, 3)), "scale": jnp.asarray(1.0)}  # a weakly typed scalar, too
    p["scale"] = jnp.multiply(p["scale"], 1)

    def step(carry, _):
        p, state = carry
        updates, new = tx.update(p, state, p)
        updates, new = jax.lax.cond(state[0].count > 2, lambda: (updates, new), lambda: (p, state))
        return (optax.apply_updates(p, updates), new), None

    (p, _state), _ = jax.lax.scan(step, (p, tx.init(p)), length=5)
    chex.assert_tree_all_finite(p)


def test_the_state_keeps_its_type_for_weakly_typed_parameters():
    p = {"a": jax.numpy.asarray(2.0, dtype=None) * 1, "b": 3.0}
    tx = adam_mini(0.1)
    state = tx.init(p)
    _, new = tx.update(jax.tree.map(lambda x: 1.0, p), state, p)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)


def test_the_state_keeps_its_type_in_micro_steps_in_bfloat16():
    """Micro-steps sum gradients in float32, which must not change the dtypes of the state."""
    p = {"kernel": jnp.ones((3, 4), jnp.bfloat16), "bias": jnp.zeros(4, jnp.bfloat16)}
    for specs in (BLOCK_SPECS, OUTER_SPECS):
        steps = optax.MultiSteps(adam_mini(0.1, block_specs=specs), 2).gradient_transformation()
        tx = optax.apply_if_finite(steps, 3)
        state = tx.init(p)
        update = jax.jit(tx.update)
        for grads in (p, jax.tree.map(lambda x: x * jnp.nan, p), p, p):
            updates, new = update(grads, state, p)
            chex.assert_trees_all_equal_shapes_and_dtypes((updates, new), (p, state))
            state = new
        assert state.total_notfinite == 1


@pytest.mark.parametrize("given", [{"kernel": True, "bias": False}, mask])
@pytest.mark.parametrize(
    "make",
    [
        lambda given: OURS(0.1, weight_decay=0.1, mask=given),
        lambda given: muon_mini(
            0.1,
            weight_decay=0.1,
            weight_decay_mask=given,
            muon_weight_dimension_numbers=lambda p: {
                name: optax.contrib.MuonDimensionNumbers() if x.ndim > 1 else None
                for name, x in p.items()
            },
        ),
    ],
)
def test_map_params_works_with_a_mask(make, given):
    """It calls `init` with a placeholder for the parameters."""
    tx = make(given)
    state = tx.init(params())
    seen = []
    mapped = optax.tree.map_params(tx, lambda x: seen.append(x.shape) or x, state)
    chex.assert_trees_all_equal(mapped, state)
    assert params()["kernel"].shape in seen


def test_a_run_without_weight_decay_continues_with_it():
    p = params()
    old, new = (OURS(0.1, weight_decay=decay, mask=mask) for decay in (0.0, 0.1))
    _, state = old.update(p, old.init(p))
    chex.assert_trees_all_equal_structs(state, new.init(p))
    updates, _ = new.update(p, state, p)
    without, _ = old.update(p, state, p)
    assert (updates["kernel"] != without["kernel"]).any()
    chex.assert_trees_all_equal(updates["bias"], without["bias"])


def test_a_mask_function_sees_the_dtypes_of_parameters():
    p = {"kernel": jnp.full((4, 6), 8.0, jnp.bfloat16), "bias": jnp.full(6, 8.0)}
    narrow = lambda tree: jax.tree.map(lambda x: x.dtype == jnp.bfloat16, tree)
    tx = OURS(0.1, weight_decay=0.5, mask=narrow)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    np.testing.assert_allclose(updates["kernel"].astype(float), -0.4, rtol=1e-2)
    assert not updates["bias"].any()
