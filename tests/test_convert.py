import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adam_mini import (
    ScaleByAdamMiniState,
    adam_mini,
    by_path,
    flax_layers,
    from_adam_state,
    per_head,
    per_neuron,
    per_tensor,
    scale_by_adam_mini,
    stochastic_rounding,
    to_adam_state,
)
from tests.by_hand import BLOCK_SPECS, OUTER_SPECS, gradients, params
from tests.params import slow_but

each_in_turn = pytest.mark.parametrize(
    "specs",
    [
        pytest.param(BLOCK_SPECS, id="mean", marks=pytest.mark.slow),
        pytest.param(OUTER_SPECS, id="outer"),
    ],
)
each_spec = pytest.mark.parametrize("specs", [BLOCK_SPECS, OUTER_SPECS], ids=["mean", "outer"])


def train(tx, p, state, steps):
    for step in steps:
        updates, state = jax.jit(tx.update)(gradients(p, step), state, p)
        p = optax.apply_updates(p, updates)
    return p, state


WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}
    ),
    "two": lambda tx: optax.multi_transform({"a": tx, "b": tx}, {"kernel": "a", "bias": "b"}),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.mark.parametrize("name", slow_but("multi_steps", of=WRAPPERS))
@pytest.mark.parametrize(
    "specs",
    [
        pytest.param(BLOCK_SPECS, id="mean"),
        pytest.param(OUTER_SPECS, id="outer", marks=pytest.mark.slow),
    ],
)
def test_adamws_state_converts_to_8_bits_in_any_wrapper(name, specs):
    adam = WRAPPERS[name](optax.adamw(0.1))
    mini = WRAPPERS[name](adam_mini(0.1, block_specs=specs, mu_dtype=jnp.int8))
    p, state = train(adam, params(), adam.init(params()), range(4))
    converted = from_adam_state(state, p, specs, mu_dtype=jnp.int8)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, mini.init(p))
    back = to_adam_state(converted, p, specs)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    mu, found = ([m for _, m in optax.tree.get_all_with_path(s, "mu")] for s in (state, back))
    chex.assert_trees_all_close(found, mu, rtol=1 / 4, atol=1e-2)
    train(mini, p, converted, range(4, 6))


@pytest.mark.parametrize("name", slow_but("masked", "two", "multi_steps", of=WRAPPERS))
@each_in_turn
def test_adamws_state_converts_in_any_wrapper(name, specs):
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    adam = WRAPPERS[name](optax.adamw(schedule))
    mini = WRAPPERS[name](adam_mini(schedule, block_specs=specs))
    p, state = train(adam, params(), adam.init(params()), range(4))
    converted = from_adam_state(state, p, specs)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, mini.init(p))
    back = to_adam_state(converted, p, specs)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    again = from_adam_state(back, p, specs)  # a round trip keeps the block means
    chex.assert_trees_all_close(again, converted, rtol=1e-6)
    train(mini, p, converted, range(4, 6))


def test_conversion_is_exact_where_nu_is_constant_on_blocks():
    p = params()
    grads = {"kernel": jnp.ones((3, 4)) * jnp.array([1.0, 2.0, 3.0, 4.0]), "bias": p["bias"]}
    adam, mini = optax.adamw(0.1), adam_mini(0.1, block_specs=BLOCK_SPECS)
    state = adam.init(p)
    for _ in range(3):
        _, state = adam.update(grads, state, p)
    expected, _ = adam.update(grads, state, p)
    updates, _ = mini.update(grads, from_adam_state(state, p, BLOCK_SPECS), p)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    chex.assert_trees_all_equal(
        to_adam_state(from_adam_state(state, p, BLOCK_SPECS), p, BLOCK_SPECS), state
    )


@each_spec
def test_converted_nu_is_what_adam_mini_would_have(specs):
    p = params()
    adam, mini = optax.adamw(0.0), adam_mini(0.0, block_specs=specs)
    _, adam_state = train(adam, p, adam.init(p), range(5))
    _, mini_state = train(mini, p, mini.init(p), range(5))
    chex.assert_trees_all_close(
        from_adam_state(adam_state, p, specs), mini_state, rtol=1e-5, atol=1e-7
    )


def test_conversion_is_exact_where_nu_is_a_row_times_a_column():
    """And back, because the product of the row and the column is nu itself there."""
    row, column = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[4.0, 0.0, 1.0, 2.0]])
    p = params()
    adam, mini = optax.adamw(0.1), adam_mini(0.1, block_specs=OUTER_SPECS)
    state = adam.init(p)
    grads = {"kernel": row * column, "bias": p["bias"]}
    for _ in range(3):
        _, state = adam.update(grads, state, p)
    expected, _ = adam.update(grads, state, p)
    converted = from_adam_state(state, p, OUTER_SPECS)
    updates, _ = mini.update(grads, converted, p)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    chex.assert_trees_all_close(to_adam_state(converted, p, OUTER_SPECS), state, rtol=1e-5)


def test_conversion_of_bfloat16_parameters_keeps_momenta_and_widens_second_moments():
    """In bfloat16 AdamW's second moment would no longer change."""
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    state = optax.adamw(0.1).init(p)
    converted = from_adam_state(state, p, per_tensor())
    assert isinstance(converted[0], ScaleByAdamMiniState)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        converted, adam_mini(0.1, block_specs=per_tensor()).init(p)
    )
    back = to_adam_state(converted, p, per_tensor())
    wide = state[0]._replace(nu=jax.tree.map(lambda x: x.astype(jnp.float32), state[0].nu))
    chex.assert_trees_all_equal_shapes_and_dtypes(back[0], wide)
    converted = adam_mini(0.1, mu_dtype="int8", block_specs=per_tensor()).init(p)
    assert to_adam_state(converted, p, per_tensor())[0].mu["kernel"].dtype == jnp.float32


GROUPS = {"m": "kernel", "v": "bias"}
RULES = by_path([("kernel", OUTER_SPECS["kernel"]), ("bias", OUTER_SPECS["bias"])])


by_name = lambda p: {name: OUTER_SPECS[name] for name, x in p.items() if jax.tree.leaves(x)}


@pytest.mark.parametrize("specs", [RULES, OUTER_SPECS, by_name], ids=["rules", "specs", "function"])
def test_groups_with_and_without_rows_are_converted_into_states_that_init_makes(specs):
    """Otherwise a checkpoint of the converted run cannot be restored."""
    p = params()
    labels = {name: label for label, name in GROUPS.items()}
    groups = lambda make: optax.multi_transform(dict.fromkeys(GROUPS, make), labels)
    tx = groups(adam_mini(0.1, block_specs=specs))
    converted = from_adam_state(groups(optax.adamw(0.1)).init(p), p, specs)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, tx.init(p))
    back = to_adam_state(tx.init(p), p, specs)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, groups(optax.adamw(0.1)).init(p))


def test_an_nnx_state_with_rows_is_converted_into_one_that_init_makes():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    adam, mini = (
        nnx.Optimizer(model, tx, wrt=nnx.Param)
        for tx in (optax.adamw(0.1), adam_mini(0.1, block_specs=RULES))
    )
    converted = from_adam_state(adam.opt_state, nnx.state(model, nnx.Param), RULES)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, mini.opt_state)


def test_a_state_under_random_rounding_is_converted_to_what_adamw_has_there():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    mini = stochastic_rounding(adam_mini(0.1, mu_dtype="int8", block_specs=OUTER_SPECS))
    found = to_adam_state(mini.init(p), p, OUTER_SPECS)
    expected = stochastic_rounding(optax.adamw(0.1)).init(p)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def test_second_moments_of_float16_parameters_survive_another_cut():
    p = {"kernel": jnp.ones((3, 4), jnp.float16)}
    grads = {"kernel": jnp.full((3, 4), 1e-4, jnp.float16)}
    tx = adam_mini(0.1, block_specs=per_tensor())
    _, state = tx.update(grads, tx.init(p), p)
    again = from_adam_state(to_adam_state(state, p, per_tensor()), p, per_tensor())
    chex.assert_trees_all_close(again[0].nu, state[0].nu, rtol=1e-6)
    assert state[0].nu["kernel"].item() > 0


def test_conversion_works_on_shapes():
    shapes = jax.eval_shape(params)
    state = jax.eval_shape(optax.adamw(0.1).init, shapes)
    converted = jax.eval_shape(lambda s: from_adam_state(s, shapes, flax_layers()), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        converted, jax.eval_shape(adam_mini(0.1).init, shapes)
    )


def test_an_nnx_optimizer_trains_on_after_conversion():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    loss_fn = lambda model: jnp.mean((model(x) - 1.0) ** 2)
    adam = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    for _ in range(5):
        adam.update(model, nnx.grad(loss_fn)(model))
    before = loss_fn(model)
    mini = nnx.Optimizer(model, adam_mini(1e-2), wrt=nnx.Param)
    mini.opt_state = from_adam_state(adam.opt_state, nnx.state(model, nnx.Param), flax_layers())
    assert mini.opt_state[0].count == 5
    assert mini.opt_state[0].nu["kernel"].shape == (1, 4)
    for _ in range(5):
        mini.update(model, nnx.grad(loss_fn)(model))
    assert mini.opt_state[0].count == 10
    assert loss_fn(model) < before


@pytest.mark.parametrize(
    ("state", "specs", "text"),
    [
        (lambda p: optax.sgd(0.1).init(p), BLOCK_SPECS,
         "expected an optimizer state with a ScaleByAdamState in it, got a tuple of EmptyState"),
        (lambda p: adam_mini(0.1, block_specs=OUTER_SPECS).init(p), OUTER_SPECS,
         "with a ScaleByAdamState in it, got a tuple of ScaleByAdamMiniState, EmptyState: it is "
         "Adam-mini's already"),
        (lambda p: p, BLOCK_SPECS, "ScaleByAdamState in it, got a dict"),
        (lambda p: optax.adamw(0.1).init({"kernel": p["kernel"], "b": p["bias"]}), BLOCK_SPECS,
         "b: the state has moments for this parameter, but params do not contain it"),
        (lambda p: optax.adamw(0.1).init({**p, "bias": jnp.ones(3)}), BLOCK_SPECS,
         "bias: the state is not of these params: nu has shape (3,), the parameter (4,)"),
        (lambda p: optax.adamw(0.1).init(p), {"kernel": per_tensor()}, "no spec for bias"),
    ],
)  # fmt: skip
def test_from_adam_state_refuses_what_does_not_fit(state, specs, text):
    with pytest.raises(ValueError, match=r".") as raised:
        from_adam_state(state(params()), params(), specs)
    assert text in str(raised.value)


def test_to_adam_state_refuses_adamws_own_state():
    state = optax.MultiSteps(optax.adamw(0.1), 2).init(params())
    with pytest.raises(ValueError, match=r"got a MultiStepsState of .*: it is AdamW's already"):
        to_adam_state(state, params(), BLOCK_SPECS)


def test_to_adam_state_refuses_other_block_specs():
    state = adam_mini(0.1, block_specs=per_tensor()).init(params())
    with pytest.raises(ValueError, match=r"bias: the state is not of these params: .* grid"):
        to_adam_state(state, params(), BLOCK_SPECS)


def test_conversion_of_complex_parameters_keeps_the_dtypes_of_both_optimizers():
    params = {"w": jnp.ones((3, 4), complex)}
    adamw, mini = optax.adamw(0.1), adam_mini(0.1, block_specs=per_neuron())
    dtypes = lambda state: jax.tree.map(lambda x: x.dtype, (state[0].mu, state[0].nu))
    found = from_adam_state(adamw.init(params), params, per_neuron())
    assert dtypes(found) == dtypes(mini.init(params))
    assert dtypes(to_adam_state(mini.init(params), params, per_neuron())) == dtypes(
        adamw.init(params)
    )


def test_to_adam_state_in_8_bits_refuses_other_heads():
    p = {"layer": {"kernel": jnp.ones((4, 6))}}
    state = adam_mini(0.1, block_specs=per_head(3), mu_dtype=jnp.int8).init(p)
    with pytest.raises(
        ValueError, match=r"layer/kernel: the state is not of these params: .* grid"
    ):
        to_adam_state(state, p, per_head(2))


def test_the_state_of_adam_continues_without_weight_decay():
    p = params()
    state = from_adam_state(optax.adam(0.1).init(p), p, BLOCK_SPECS)
    tx = optax.chain(scale_by_adam_mini(block_specs=BLOCK_SPECS), optax.scale_by_learning_rate(0.1))
    chex.assert_trees_all_equal_structs(tx.update(p, state, p)[1], state)
    with pytest.raises(
        ValueError, match=r"its state continues in optax\.chain\(scale_by_adam_mini"
    ):
        adam_mini(0.1, block_specs=BLOCK_SPECS).update(p, state, p)


def test_integers_beside_codes_are_not_read_as_codes():
    p = {"w": jnp.ones((4, 6)), "frozen": jnp.ones((4, 6), jnp.int8)}
    state = adam_mini(0.1, mu_dtype="int8", block_specs=per_tensor()).init(p)
    back = to_adam_state(state, p, per_tensor())
    assert back[0].mu["frozen"].dtype == jnp.int8


def test_parameters_without_moments_need_no_specs():
    params = {"qkv": {"kernel": jnp.ones((4, 12))}, "head": {"kernel": jnp.ones((4, 3))}}
    group = lambda tx: optax.multi_transform(
        {"train": tx, "freeze": optax.set_to_zero()}, {"qkv": "freeze", "head": "train"}
    )
    adamw, mini = group(optax.adamw(1e-3)), group(adam_mini(1e-3))
    for specs in (flax_layers(), None):  # None is adam_mini's default
        state = from_adam_state(adamw.init(params), params, specs)
        chex.assert_trees_all_equal(state, mini.init(params))
        chex.assert_trees_all_equal_structs(to_adam_state(state, params, specs), adamw.init(params))


def test_a_conversion_under_jit_keeps_explicit_shardings():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    params = {"w": jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, P("a", "b")))}
    with jax.set_mesh(mesh):
        state = adam_mini(1e-3, block_specs=per_neuron()).init(params)
        found = jax.jit(lambda s: to_adam_state(s, params, per_neuron()))(state)
    assert found[0].nu["w"].sharding.spec == P("a", "b")
