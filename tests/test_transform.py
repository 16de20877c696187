import functools
import re
from typing import NamedTuple

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from optax_adam_mini import (
    ScaleByAdamMiniState,
    adam_mini,
    by_path,
    flax_layers,
    from_adam_state,
    muon_mini,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    scale_by_adam_mini,
    stochastic_rounding,
    to_adam_state,
)
from tests import numpy_adam_mini
from tests.strategies import given, shapes_and_specs

PARAMS = {
    "kernel": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32),
    "bias": np.arange(6, dtype=np.float32),
}


def gradients(step):
    rng = np.random.default_rng(step)
    return {
        "kernel": rng.normal(size=(4, 6)).astype(np.float32),
        "bias": rng.normal(size=6).astype(np.float32),
    }


def run(tx, params=PARAMS, steps=10, grads=gradients):
    """All parameters on the way, and the last state."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    trajectory = [params]
    for t in range(steps):
        params, state = step(params, state, grads(t))
        trajectory.append(params)
    return trajectory, state


# --- Same numbers as optax.adamw, and as the paper's formulas ------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"b1": 0.0, "b2": 0.0},
        {"b1": 0.8, "b2": 0.95, "eps": 1e-3},
        {"eps_root": 1e-4},
        {"weight_decay": 0.0},
        {"weight_decay": 0.3},
        {"weight_decay": optax.linear_schedule(0.0, 0.5, 10)},
        {"weight_decay": 0.3, "mask": {"kernel": True, "bias": False}},
        {"weight_decay": 0.3, "mask": {"kernel": np.True_, "bias": np.False_}},
        {"weight_decay": 0.3, "mask": lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)},
        {"nesterov": True},
        {"nesterov": True, "mu_dtype": jnp.bfloat16},
        {"mu_dtype": jnp.bfloat16},
        {"mu_dtype": "float16"},
        {"learning_rate": optax.warmup_cosine_decay_schedule(0.0, 1e-1, 3, 10)},
    ],
    ids=lambda value: re.sub(" at 0x.*?>", "", str(value)),
)
def test_per_element_is_adamw(kwargs):
    kwargs = {"learning_rate": 1e-1, **kwargs}
    ours, state = run(adam_mini(**kwargs, block_specs=per_element()))
    theirs, adam_state = run(optax.adamw(**kwargs))
    # optax multiplies mu by b1 in the narrow dtype, we in float32; and its 1 - b2**t in float32 is
    # off by 1e-5, which is 6e-6 of each of the first of these 10 steps of 0.1.
    atol = 1e-2 if "mu_dtype" in kwargs else 6e-6 * 10 * 1e-1
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=atol)
    chex.assert_trees_all_equal_shapes_and_dtypes(state[0].mu, adam_state[0].mu)
    chex.assert_trees_all_close(state[0].nu, adam_state[0].nu, rtol=1e-5)
    assert state[0].count == 10


@given(
    shapes_and_specs(max_rank=3, min_side=1),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.95)]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**32 - 1),
)
def test_updates_on_any_grid_equal_the_papers_formulas(case, dtype, betas, weight_decay, seed):
    shape, spec, edges = case
    rng = np.random.default_rng(seed)
    p = jnp.asarray(rng.normal(size=shape), dtype)
    grads = jnp.asarray(rng.normal(size=(4, *shape)), dtype)
    tx = adam_mini(1e-2, *betas, weight_decay=weight_decay, bounded=False, block_specs=spec)
    trajectory, state = run(tx, p, steps=4, grads=lambda t: grads[t])
    expected, v = numpy_adam_mini.run(p, grads, edges, 1e-2, *betas, 1e-8, weight_decay)
    np.testing.assert_allclose(state[0].nu, v, rtol=1e-5)
    assert trajectory[-1].dtype == p.dtype
    tolerance = {"float32": 1e-6, "float16": 1e-2, "bfloat16": 8e-2}[dtype]
    np.testing.assert_allclose(
        np.asarray(trajectory[-1], np.float64), expected, rtol=tolerance, atol=tolerance
    )


def test_the_second_step_equals_one_computed_by_hand():
    # b1 = 1/2, b2 = 1/2, two gradients (2, 4) and (6, 2): mean squares 10 and 20.
    tx = adam_mini(
        1.0, b1=0.5, b2=0.5, eps=0.0, weight_decay=0.0, bounded=False, block_specs=per_tensor()
    )
    grads = [jnp.array([2.0, 4.0]), jnp.array([6.0, 2.0])]
    _, state = run(tx, jnp.zeros(2), steps=2, grads=lambda t: grads[t])
    updates, _ = tx.update(grads[1], tx.init(jnp.zeros(2)))
    np.testing.assert_allclose(updates, -np.array([6.0, 2.0]) / np.sqrt(20.0), rtol=1e-6)
    np.testing.assert_allclose(state[0].nu, [0.5 * 0.5 * 10 + 0.5 * 20])
    np.testing.assert_allclose(state[0].mu, [0.5 * 0.5 * 2 + 0.5 * 6, 0.5 * 0.5 * 4 + 0.5 * 2])


# --- Mixed precision -----------------------------------------------------------------------------


def test_bias_corrections_have_all_digits():
    """The first step is one learning rate long, though 1 - b2 has only four digits in float32."""
    tx = scale_by_adam_mini(0.999, 0.9999, eps=0.0, bounded=False, block_specs=per_element())
    g = jnp.array([3.0, -2.0])
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, [1.0, -1.0], rtol=1e-6)


def test_the_step_count_does_not_overflow():
    tx = scale_by_adam_mini(block_specs=per_element())
    g, last = jnp.ones(3), jnp.iinfo(jnp.int32).max
    updates, state = tx.update(g, tx.init(g)._replace(count=jnp.int32(last)))
    assert state.count == last
    assert jnp.isfinite(updates).all()


@pytest.mark.parametrize(
    "spec", [per_tensor(), per_neuron(), outer(per_neuron(axis=0), per_neuron())], ids=str
)
def test_scaled_gradients_and_eps_make_the_same_steps(spec):
    """The FAQ advises it for gradients whose squares sum to more than float32 can hold."""
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    grads = rng.normal(size=(3, 64, 32)).astype(np.float32)
    plain = adam_mini(0.1, eps=1e-2, block_specs=spec)

    def updates_of(tx, grads):
        state = tx.init(p)
        for g in grads:
            updates, state = tx.update(jnp.asarray(g), state, p)
        return updates

    scaled = optax.chain(optax.scale(1e-5), adam_mini(0.1, eps=1e12, block_specs=spec))
    expected = updates_of(plain, grads)
    chex.assert_trees_all_close(updates_of(scaled, 1e19 * grads), expected, rtol=1e-5, atol=1e-7)


def test_float16_gradients_do_not_overflow():
    params = jnp.zeros(8, jnp.float16)
    grads = jnp.full(8, 1e3, jnp.float16)
    for spec in (per_tensor(), per_element(), per_head(2)):
        tx = adam_mini(1e-2, weight_decay=0.0, block_specs=spec)
        updates, state = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(state[0].nu, 1e-3 * 1e6, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(updates, np.float32), -1e-2, rtol=1e-3)


@pytest.mark.parametrize("shape", [(1 << 20,), (1 << 10, 1 << 10), (1 << 20, 1)])
def test_the_mean_of_a_large_bfloat16_block_loses_no_terms(shape):
    grads = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, size=shape), jnp.bfloat16)
    tx = scale_by_adam_mini(b2=0.0, block_specs=per_tensor())
    _, state = tx.update(grads, tx.init(grads))
    expected = np.square(np.asarray(grads, np.float64)).mean()
    np.testing.assert_allclose(state.nu.squeeze(), expected, rtol=1e-3)


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_and_state_keep_their_dtypes(dtype, grad_dtype, mu_dtype):
    params = {"kernel": jnp.ones((4, 4), dtype), "bias": jnp.ones(4, dtype)}
    grads = jax.tree.map(lambda x: x.astype(grad_dtype), params)
    tx = adam_mini(1e-2, mu_dtype=mu_dtype)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state[0].mu)} == {jnp.dtype(mu_dtype or dtype)}
    updates, new_state = tx.update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)


def test_float64_parameters_have_float64_moments():
    with jax.enable_x64(True):
        params = {"wide": jnp.ones((2, 2), jnp.float64), "narrow": jnp.ones((2, 2), jnp.float32)}
        tx = adam_mini(1e-2, block_specs=per_tensor())
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        assert state[0].nu["wide"].dtype == jnp.float64
        assert state[0].nu["narrow"].dtype == jnp.float32
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
        np.testing.assert_allclose(updates["wide"], -1e-2 * (1 + 1e-4), rtol=1e-7)


# --- Compiled ------------------------------------------------------------------------------------


def test_extra_args_of_other_transformations_are_accepted():
    tx = adam_mini(1e-3)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0, obj_fn=lambda x: x)


# --- Structure -----------------------------------------------------------------------------------


def test_state_has_only_count_mu_and_nu_of_the_right_sizes():
    tx = adam_mini(1e-3)
    (state, *rest) = tx.init(PARAMS)
    assert isinstance(state, ScaleByAdamMiniState)
    assert jax.tree.leaves(rest) == []
    assert jax.tree.map(jnp.shape, state.nu) == {"kernel": (1, 6), "bias": (6,)}
    assert optax.tree.get(tx.init(PARAMS), "count") == 0


def test_init_works_on_shapes():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    abstract = jax.eval_shape(adam_mini(1e-3).init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, adam_mini(1e-3).init(PARAMS))


def test_map_params_reaches_mu_and_nu():
    tx = adam_mini(1e-3, block_specs={"kernel": per_neuron(), "bias": per_element()})
    state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(PARAMS))
    assert all((x == 1).all() for x in jax.tree.leaves((state[0].mu, state[0].nu)))
    assert state[0].count == 0


def test_a_missing_gradient_leaves_its_moments():
    tx = adam_mini(1e-1, block_specs={"kernel": per_neuron(), "bias": per_element()})
    params = {"kernel": jnp.ones((4, 6)), "bias": None}
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    assert updates["bias"] is None
    state = tx.init(PARAMS)
    updates, new_state = tx.update({**gradients(0), "bias": None}, state, PARAMS)
    assert updates["bias"] is None
    chex.assert_trees_all_equal(new_state[0].mu["bias"], state[0].mu["bias"])
    assert new_state[0].nu["kernel"].min() > 0


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_specs", "error", "text"),
    [
        (per_head(4), ValueError, "bias: 4 blocks do not divide axis -1 of the shape (6,), of size 6"),
        ({"kernel": per_neuron()}, ValueError, "no spec for bias"),
        ({"kernel": per_neuron(axis=2), "bias": per_element()}, ValueError,
         "kernel: BlockSpec(axis 2: each) cuts axis 2, but the shape (4, 6) has rank 2"),
        (lambda params: jax.tree.map(lambda p: "block", params), TypeError, "bias: expected a Block"),
        (by_path([("kernel", per_neuron())]), ValueError, "no rule matches bias (6,)"),
        (by_path([("kernl", per_neuron())], per_element()), ValueError, "'kernl' matches no param"),
    ],
)  # fmt: skip
def test_init_refuses_specs_that_do_not_fit(block_specs, error, text):
    tx = adam_mini(1e-3, block_specs=block_specs)
    with pytest.raises(error) as raised:
        tx.init(PARAMS)
    assert text in str(raised.value)


def test_weight_decay_needs_params():
    tx = adam_mini(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay=0.1\) needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
    tx = adam_mini(1e-3, weight_decay=0.0)
    tx.update(PARAMS, tx.init(PARAMS))


def test_random_keys_among_the_parameters_are_refused():
    params = {"w": jnp.ones(2), "dropout": {"key": jax.random.key(0)}}
    with pytest.raises(TypeError, match=r"dropout/key: expected numbers, got dtype key<fry>"):
        adam_mini(1e-3, block_specs=per_element()).init(params)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("updates", "said"),
    [
        ((1.0, PARAMS), "got a tuple, expected a dict; jax.value_and_grad returns the pair (loss, gradients)"),
        ({"kernel": PARAMS["kernel"]}, "got nothing for bias"),
        ({**PARAMS, "extra": {"b": PARAMS["bias"]}},
         "got extra/b, which the parameters do not have"),
        ({"kernel": PARAMS["kernel"], "offset": PARAMS["bias"]}, "got nothing for bias; got offset,"),
        ({**PARAMS, "bias": (PARAMS["bias"],)}, "got nothing for bias; got bias/0, which"),
    ],
)  # fmt: skip
def test_updates_of_another_structure_are_refused(updates, said, jit):
    tx = adam_mini(1e-3)
    state = tx.init(PARAMS)
    for what, args in (
        ("gradients", (updates, state, PARAMS)),
        ("params", (PARAMS, state, updates)),
    ):
        with pytest.raises(ValueError, match=r".") as raised:
            jit(tx.update)(*args)
        assert str(raised.value).startswith(
            f"update: the {what} must have the structure of the parameters given to init: {said}"
        )


def test_adamws_state_is_refused_with_the_way_to_convert_it():
    specs = {"kernel": per_neuron(), "bias": per_tensor()}
    tx = adam_mini(1e-3, block_specs=specs)
    adams = optax.adamw(1e-3).init(PARAMS)
    text = (
        r"optax.adam or optax.adamw[:,] convert it, from_adam_state\(state, params, block_specs\)"
    )
    for tx_of in (tx, adam_mini(1e-3, block_specs=per_element())):  # of the same shapes too
        with pytest.raises(ValueError, match=rf"update: got the state of {text}"):
            jax.jit(tx_of.update)(PARAMS, adams, PARAMS)
    restored = (ScaleByAdamMiniState(*adams[0]), *adams[1:])  # as some checkpoints give it back
    with pytest.raises(ValueError, match=rf"bias: the state's nu has shape \(6,\).*{text}"):
        tx.update(PARAMS, restored, PARAMS)
    tx.update(PARAMS, from_adam_state(adams, PARAMS, specs), PARAMS)  # what is advised
    made = adam_mini(1e-3, block_specs=per_element()).init(PARAMS)
    made = from_adam_state(to_adam_state(made, PARAMS, per_element()), PARAMS, specs)
    tx.update(PARAMS, made, PARAMS)


def test_a_state_of_other_parameters_is_refused():
    tx = adam_mini(1e-3)
    other = {**PARAMS, "bias": jnp.ones(9)}
    with pytest.raises(
        ValueError,
        match=r"bias: got a gradient of shape \(6,\), but the state was made for a parameter of "
        r"shape \(9,\): call update with the parameters given to init, and with their gradients",
    ):
        tx.update(PARAMS, tx.init(other), PARAMS)
    with pytest.raises(ValueError, match=r"bias: got a parameter of shape \(9,\), but the state"):
        tx.update(PARAMS, tx.init(PARAMS), other)


class StudentT(NamedTuple):
    mu: jax.Array
    sigma: jax.Array
    nu: jax.Array


def test_parameters_may_be_called_mu_and_nu():
    """They are no state in the place of the gradients."""
    params = StudentT(*[jnp.ones(3)] * 3)
    wide = adam_mini(1e-3, block_specs=per_tensor()), muon_mini(1e-3, block_specs=per_tensor())
    for tx in wide:
        updates, _ = tx.update(params, tx.init(params), params)
        assert (updates.nu < 0).all()
    tx, params = stochastic_rounding(wide[0]), StudentT(*[jnp.ones(3, jnp.bfloat16)] * 3)
    tx.update(params, tx.init(params), params)


def test_a_state_that_was_cast_to_bfloat16_does_not_stand_still():
    """In bfloat16, a count stops at 256, and a mean that decays by a thousandth does not change."""
    tx = adam_mini(1e-3)
    of_kind = lambda kind: jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, kind) else x, tx.init(PARAMS)
    )
    with pytest.raises(ValueError, match="the state's count was cast to bfloat16"):
        tx.update(PARAMS, of_kind(jnp.integer), PARAMS)
    _, state = tx.update(PARAMS, of_kind(jnp.floating), PARAMS)
    assert {x.dtype for x in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}


def test_none_instead_of_a_state_is_refused():
    with pytest.raises(ValueError, match=r"expected the state that init made, .* got a NoneType"):
        adam_mini(1e-3).update(PARAMS, None, PARAMS)


def test_a_state_of_other_block_specs_is_refused():
    state = adam_mini(1e-3, block_specs=per_tensor()).init(PARAMS)
    tx = adam_mini(1e-3, block_specs={"kernel": per_neuron(), "bias": per_tensor()})
    with pytest.raises(ValueError, match=r"kernel: the state's nu has shape \(1, 1\)"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("mu_dtype", [None, jnp.int8])
def test_two_models_of_the_same_shapes_keep_their_specs_apart(mu_dtype):
    """JAX's hash of a tree's structure ignores names, so it must not be what specs are cached by."""
    models = [{"head": {"kernel": jnp.ones((8, 8))}}, {"embed": {"embedding": jnp.ones((8, 8))}}]
    make = lambda: adam_mini(1e-3, block_specs=flax_layers(), weight_decay=0.0, mu_dtype=mu_dtype)
    shared = make()  # it sees the states of others, as after a restart
    for params in models:
        grads = jax.tree.map(lambda p: jnp.arange(64.0).reshape(p.shape), params)
        state = make().init(params)
        found, expected = (tx.update(grads, state) for tx in (shared, make()))
        chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_a_gradient_of_other_numbers_is_refused(dtype):
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    tx = adam_mini(1e-3)
    grads = {"a": {"kernel": jnp.ones((2, 3), dtype)}}
    with pytest.raises(TypeError, match=rf"a/kernel: got a gradient of {dtype} for a parameter"):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("mu_dtype", [jnp.float32, jnp.bfloat16])
def test_complex_parameters_need_a_moment_of_their_own_dtype(mu_dtype):
    with pytest.raises(TypeError, match=r"w: mu_dtype=.* keeps real numbers"):
        adam_mini(1e-3, mu_dtype=mu_dtype).init({"w": jnp.ones(3, jnp.complex64)})


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (lambda p: "bias", TypeError, "mask: expected True or False"),
        (lambda p: {"k": "no", "b": True}, TypeError, "mask at k: expected True or False"),
        ({"k": lambda: True, "b": True}, TypeError, "mask at k: expected True or False"),
        ({"k": np.array([True, False]), "b": True}, TypeError, "mask at k: expected True or False"),
        (lambda p: {"other": True}, ValueError, "mask must have the structure"),
        (lambda p: None, ValueError, "mask: the function returned None"),
    ],
)
def test_what_a_mask_function_returns_is_checked(mask, error, match):
    init = lambda: adam_mini(1e-3, mask=mask, block_specs=per_tensor()).init(
        {"k": jnp.ones((2, 3)), "b": jnp.ones(3)}
    )
    with pytest.raises(error, match=match):
        init()


@pytest.mark.parametrize("grad", [None, "bfloat16"])
def test_a_label_function_is_not_asked_again_for_other_dtypes(grad):
    """Of a gradient that is None, or without `params`, the parameter's dtype is unknown."""
    of_floats = lambda x: per_neuron() if x.dtype == jnp.float32 else per_element()
    tx = adam_mini(
        1e-2, weight_decay=0.0, mu_dtype="int8", block_specs=lambda p: jax.tree.map(of_floats, p)
    )
    state = tx.init(PARAMS)
    grads = {**PARAMS, "kernel": grad and PARAMS["kernel"].astype(grad)}
    _, new = tx.update(grads, state, None if grad else PARAMS)
    chex.assert_trees_all_equal_shapes(new, state)


def test_weight_decay_of_bfloat16_parameters_is_rounded_once():
    params = {"w": jnp.linspace(0.1, 1, 97, dtype=jnp.bfloat16)}
    tx = adam_mini(0.1, weight_decay=0.3, block_specs=per_element())
    updates, _ = tx.update({"w": jnp.zeros(97, jnp.bfloat16)}, tx.init(params), params)
    expected = (-0.1 * (np.float32(0.3) * np.float32(params["w"]))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(updates["w"], expected)


def test_a_stack_of_no_layers_is_updated():
    params = {"layers": jnp.zeros((0, 256, 4096)), "head": jnp.ones((2, 3))}
    tx = adam_mini(1e-2, block_specs={"layers": per_neuron(stacked=0), "head": per_neuron()})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["layers"].shape == (0, 256, 4096)


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_derivatives_by_decay_rates_are_optaxs(name):
    """At 0 too, where the logarithm of a rate has no derivative."""
    g = jnp.array([1.0, 2.0, 3.0])

    def moved(make, value):
        tx = make(eps_root=1e-8, **{name: value})
        state, total = tx.init(g), 0.0
        for scale in (1.0, 0.5):
            updates, state = tx.update(scale * g, state, g)
            total += jnp.sum(updates)
        return total

    ours = functools.partial(scale_by_adam_mini, block_specs=per_element())
    for value in (0.0, 0.3):
        expected = jax.grad(functools.partial(moved, optax.scale_by_adam))(value)
        np.testing.assert_allclose(
            jax.grad(functools.partial(moved, ours))(value), expected, rtol=1e-3
        )


def test_complex_updates_have_derivatives_where_steps_have_no_bound():
    p = jnp.array([1 + 1j, 2.0])

    def moved(make, scale, **more):
        tx = make(0.1, b2=0.0, eps_root=1e-2, **more)
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(p * scale, state, p)
        return jnp.sum(jnp.abs(updates) ** 2)

    found = jax.grad(lambda s: moved(adam_mini, s, block_specs=per_element()))(1.0)
    np.testing.assert_allclose(found, jax.grad(lambda s: moved(optax.adamw, s))(1.0), rtol=1e-4)


@pytest.mark.parametrize("decays", [{"b1": 0.0}, {"b2": 0.0}])
def test_no_infinity_is_computed(decays):
    params = {"w": jnp.ones(3)}
    tx = adam_mini(1e-3, block_specs=per_element(), **decays)
    state = tx.init(params)
    with jax.debug_infs(True):
        tx.update(params, state, params)


@pytest.mark.parametrize("mu_dtype", [None, jnp.int8])
def test_checkify_finds_no_error(mu_dtype):
    params = {"w": jnp.ones((4, 6))}
    grads = {"w": jnp.zeros((4, 6)).at[0].set(1.0)}  # blocks without a gradient
    tx = adam_mini(1e-3, mu_dtype=mu_dtype, block_specs=per_neuron(axis=0))
    update = checkify.checkify(jax.jit(tx.update), errors=checkify.float_checks)
    error, _ = update(grads, tx.init(params), params)
    assert error.get() is None


def test_functions_get_parameters_whose_gradient_is_missing():
    params = {name: jnp.ones((3, 4), jnp.bfloat16) for name in "ab"}
    grads = {"a": params["a"], "b": None}

    def make():  # as after a restart, which calls no init
        label = lambda p: jax.tree.map(
            lambda x: per_neuron() if x.dtype == jnp.bfloat16 else per_element(), p
        )
        mask = lambda p: {name: x.ndim > 1 for name, x in p.items()}
        return adam_mini(1e-3, mu_dtype=jnp.float32, mask=mask, block_specs=label)

    updates, state = make().update(grads, make().init(params), params)
    assert updates["b"] is None
    assert state[0].nu["b"].shape == (1, 4)
