import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adam_mini import adam_mini, per_tensor


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"b1": 1.0}, ValueError, "b1 must be in [0, 1), got 1.0"),
        ({"b1": -0.1}, ValueError, "b1 must be in [0, 1), got -0.1"),
        ({"b2": np.array(1.5)}, ValueError, "b2 must be in [0, 1), got 1.5"),
        ({"b2": 1.5}, ValueError, "b2 must be in [0, 1), got 1.5"),
        ({"b2": float("nan")}, ValueError, "b2 must be in [0, 1), got nan"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0, got -1e-08"),
        ({"eps_root": -1.0}, ValueError, "eps_root must be at least 0, got -1.0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0, got -0.1"),
        ({"b1": "0.9"}, TypeError, "b1 must be a number, got '0.9' of type str"),
        ({"eps": None}, TypeError, "eps must be a number, got None of type NoneType"),
        ({"b1": jnp.ones(2)}, ValueError, "b1 must be a number, got an array of shape (2,)"),
        (
            {"b1": optax.constant_schedule(0.9)},
            TypeError,
            "for a schedule, wrap the optimizer in optax.inject_hyperparams",
        ),
        (
            {"learning_rate": None},
            TypeError,
            "learning_rate must be a number or a schedule, got None of type NoneType",
        ),
        ({"eps": jnp.array(1j)}, TypeError, "eps must be a number, got an array of complex64"),
        ({"learning_rate": np.True_}, TypeError, "must be a number or a schedule, got np.True_"),
        (
            {"learning_rate": lambda count: -1e-3},
            ValueError,
            "learning_rate: what the schedule returns for step 0 must be at least 0, got -0.001",
        ),
        ({"learning_rate": lambda count: "fast"}, TypeError, "must be a number, got 'fast'"),
        ({"mask": jnp.float32}, TypeError, "mask: expected a pytree of booleans or a function"),
        (
            {"block_specs": jnp.uint8},
            TypeError,
            "expected a pytree or a function of the parameters",
        ),
        ({"mu_dtype": False}, TypeError, "mu_dtype must be a dtype, got the value False"),
        ({"mu_dtype": np.float16(0)}, TypeError, "mu_dtype must be a dtype, got the value"),
        ({"mask": True}, TypeError, "got True: if it was a function, optax.inject_hyperparams"),
        ({"mask": False}, TypeError, "got False: if it was a function, optax.inject_hyperparams"),
        ({"block_specs": 3}, TypeError, "block_specs: expected a BlockSpec"),
        (
            {"block_specs": {"kernel": "neuron"}},
            TypeError,
            "kernel: expected a BlockSpec such as per_neuron(), got 'neuron' of type str",
        ),
        (
            {"mu_dtype": "floaty"},
            TypeError,
            "mu_dtype must be a floating-point dtype or jnp.int8, got 'floaty'",
        ),
        *(
            (
                {"mu_dtype": dtype},
                TypeError,
                f"mu_dtype must be a floating-point dtype or jnp.int8, got '{dtype}'",
            )
            for dtype in ("int32", "int16", "int4", "uint8", "bool")
        ),
    ],
    ids=lambda value: re.sub(" at 0x.*?>", "", str(value)),
)
def test_wrong_hyperparameters_are_refused_when_the_optimizer_is_built(kwargs, error, text):
    with pytest.raises(error) as raised:
        adam_mini(**{"learning_rate": 1e-3, **kwargs})
    assert text in str(raised.value)


def test_a_schedule_that_begins_out_of_range_is_refused_by_init():
    """Not before: JAX may compute nothing when an optimizer is built."""
    tx = adam_mini(1e-3, weight_decay=lambda count: jnp.nan * count, block_specs=per_tensor())
    with pytest.raises(
        ValueError, match=r"weight_decay: what the schedule returns for step 0 must"
    ):
        tx.init({"w": jnp.ones(3)})


@pytest.mark.parametrize(
    "param_dtype",
    [
        "bfloat16",  # and float32, which the other parameter has
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float32", "float16")),
    ],
)
@pytest.mark.parametrize(
    "rate",
    [
        1e-2,
        pytest.param(np.float32(1e-2), marks=pytest.mark.slow),
        pytest.param(np.float64(1e-2), marks=pytest.mark.slow),
        jnp.float32(1e-2),
        lambda count: jnp.float32(1e-2) * jnp.cos(count),
        pytest.param(lambda count: np.float32(1e-2), marks=pytest.mark.slow),
    ],
    ids=["float", "np32", "np64", "jnp32", "schedule", "np schedule"],
)
def test_updates_have_the_parameters_dtypes(rate, param_dtype):
    p = {"w": jnp.ones((4, 6), param_dtype), "b": jnp.ones(6, "float32")}
    for decay in (0.1, jnp.float32(0.1), np.float32(0.1), rate if callable(rate) else 0.0):
        tx = adam_mini(rate, weight_decay=decay)
        for update in (tx.update, jax.jit(tx.update)):
            updates, _ = update(p, tx.init(p), p)
            assert jax.tree.map(lambda u: u.dtype.name, updates) == {
                "w": param_dtype,
                "b": "float32",
            }


def test_updates_have_the_parameters_dtypes_under_x64():
    with jax.enable_x64(True):
        p = {"w": jnp.ones((4, 6), "float32"), "kernel": jnp.ones((4, 6), "float64")}
        for rate in (np.float64(1e-2), jnp.float64(1e-2), lambda count: jnp.float64(1e-2)):
            tx = adam_mini(rate, weight_decay=np.float64(0.1))
            updates, _ = tx.update(p, tx.init(p), p)
            assert jax.tree.map(lambda u: u.dtype.name, updates) == {
                "w": "float32",
                "kernel": "float64",
            }


def test_injected_hyperparameters_that_round_to_one_are_refused():
    p = {"w": jnp.ones((4, 6), jnp.bfloat16)}
    inject = lambda **more: optax.inject_hyperparams(adam_mini, **more)(1e-3)
    with pytest.raises(
        ValueError, match=r"b2 must be in \[0, 1\), got 1.0 in bfloat16: .*hyperparam"
    ):
        inject().init(p)
    tx = inject(hyperparam_dtype=jnp.float32)
    updates, _ = tx.update(p, tx.init(p), p)
    assert np.isfinite(np.asarray(updates["w"], np.float32)).all()
    with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\), got 1.5 in float32$"):
        adam_mini(1e-3, b1=jnp.float32(1.5)).init({"w": jnp.ones(3)})


@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_eps_in_float16_is_refused_only_if_it_is_0(eps):
    inject = optax.inject_hyperparams(adam_mini, hyperparam_dtype=jnp.float16)
    tx = inject(1e-3, b2=0.99, eps=eps, block_specs=per_tensor())
    params = {"w": jnp.ones((4, 6), jnp.float16)}
    if eps == 1e-8:
        with pytest.raises(ValueError, match=r"eps is 0 in float16, .* hyperparam_dtype"):
            tx.init(params)
    else:
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert jnp.isfinite(updates["w"]).all()


def test_decay_rates_in_16_bits_are_computed_with_in_float32():
    """`optax.inject_hyperparams` makes them: 1 - b2**t would have two digits, and t stop at 2048."""
    params, dtype = {"w": jnp.arange(1.0, 9)}, jnp.float16
    tx = optax.inject_hyperparams(adam_mini, hyperparam_dtype=dtype)(1e-3, eps=1e-4,
                                                                     block_specs=per_tensor())  # fmt: skip
    state = tx.init(params)
    b1, b2, eps = (float(state.hyperparams[name]) for name in ("b1", "b2", "eps"))
    plain = adam_mini(float(dtype(1e-3)), b1, b2, eps, weight_decay=float(dtype(1e-4)),
                      block_specs=per_tensor())  # fmt: skip
    other = plain.init(params)
    update = jax.jit(tx.update)
    for _ in range(30):
        found, state = update(params, state, params)
        expected, other = plain.update(params, other, params)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5)


def test_a_mask_function_that_inject_hyperparams_calls_with_the_step_is_refused():
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    p = {"w": jnp.ones((4, 6))}
    with pytest.raises(TypeError, match=r"mask: .* name the argument in static_args"):
        optax.inject_hyperparams(adam_mini)(1e-3, mask=mask).init(p)
    optax.inject_hyperparams(adam_mini, static_args="mask")(1e-3, mask=mask).init(p)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_eight_bits_are_refused(dtype):
    with pytest.raises(TypeError, match=f"w: expected float32, bfloat16 or float16, got {dtype}"):
        adam_mini(1e-3).init({"w": jnp.ones((4, 6), dtype)})


def test_gradients_of_another_shape_name_the_parameter():
    p = {"w": jnp.ones((4, 6))}
    tx = adam_mini(1e-3)
    with pytest.raises(
        ValueError, match=r"w: got a gradient of shape \(6, 4\), but the state was made for a "
    ):
        tx.update({"w": jnp.ones((6, 4))}, tx.init(p), p)


def test_a_moment_that_overflows_in_float16_recovers():
    tx = adam_mini(1e-2, b2=0.95, mu_dtype=jnp.float16, block_specs=per_tensor())
    p = {"w": jnp.ones(4)}
    update = jax.jit(tx.update)
    _, state = update({"w": jnp.ones(4).at[0].set(-1e6)}, tx.init(p), p)
    for _ in range(200):
        updates, state = update({"w": jnp.ones(4)}, state, p)
    assert (updates["w"] < 0).all()


def test_derivatives_by_decay_rates_are_finite():
    p, g = {"w": jnp.ones(4)}, {"w": jnp.array([1.0, 2.0, -1.0, 0.5])}

    def moved(b1, b2):
        tx = adam_mini(1e-2, b1, b2, block_specs=per_tensor())
        state = tx.init(p)
        state = (state[0]._replace(count=jnp.int32(300), mu=g, nu={"w": jnp.ones(1)}), *state[1:])
        return tx.update(g, state, p)[0]["w"].sum()

    found = jax.jit(jax.grad(moved, (0, 1)))(0.9, 0.5)
    assert np.isfinite(found).all()


def test_eps_in_float16_is_refused_under_jit():
    tx = optax.inject_hyperparams(adam_mini, static_args=("block_specs",))
    tx = tx(1e-3, block_specs=per_tensor())
    with pytest.raises(ValueError, match=r"the usual 1e-8 is 0; .*hyperparam_dtype=jnp.float32"):
        jax.jit(tx.init)({"w": jnp.ones(3, jnp.float16)})
