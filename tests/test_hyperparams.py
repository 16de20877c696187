import re

import jax.numpy as jnp
import optax
import pytest

from optax_adam_mini import adam_mini


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"b1": 1.0}, ValueError, "b1 must be in [0, 1), got 1.0"),
        ({"b1": -0.1}, ValueError, "b1 must be in [0, 1), got -0.1"),
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
        ({"block_specs": 3}, TypeError, "block_specs: expected a BlockSpec"),
        (
            {"block_specs": {"kernel": "neuron"}},
            TypeError,
            "kernel: expected a BlockSpec such as per_neuron(), got 'neuron' of type str",
        ),
        (
            {"mu_dtype": "floaty"},
            TypeError,
            "mu_dtype must be a floating-point dtype, got 'floaty'",
        ),
        ({"mu_dtype": "int32"}, TypeError, "mu_dtype must be a floating-point dtype, got 'int32'"),
    ],
    ids=lambda value: re.sub(" at 0x.*?>", "", str(value)),
)
def test_refused_when_built(kwargs, error, text):
    with pytest.raises(error) as raised:
        adam_mini(**{"learning_rate": 1e-3, **kwargs})
    assert text in str(raised.value)
