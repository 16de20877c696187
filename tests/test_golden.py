"""The same numbers as the reference implementation, the PyTorch package adam-mini 1.1.1."""

import chex
import jax
import numpy as np
import optax
import pytest

from optax_adam_mini import (
    adam_mini,
    by_path,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)
from tests.golden import generate as golden

BLOCK_SPECS = by_path(
    [
        ("bias", per_element()),
        ("norm", per_tensor()),
        ("q_proj", per_head(golden.NUM_HEADS)),
        ("k_proj", per_head(golden.NUM_KV_HEADS)),
        ("embed", per_token()),
        ("output", per_token(axis=-1)),  # a Dense kernel (inputs, tokens)
        ("v_proj|o_proj|mlp", per_neuron()),
    ]
)


def to_jax(name: str, value: np.ndarray) -> np.ndarray:
    """PyTorch's (..., out, in) as Flax's (..., in, out); an embedding is laid out alike in both."""
    is_kernel = len(golden.SHAPES[name]) == 2 and not name.startswith("embed")
    return np.swapaxes(value, -1, -2) if is_kernel else value


def trajectory(params, grads, b1, b2, weight_decay):
    """The parameters after each of the recorded steps of ours."""
    tx = adam_mini(
        golden.LEARNING_RATE,
        b1,
        b2,
        weight_decay=weight_decay,
        mask=lambda tree: {name: "norm" not in name and "bias" not in name for name in tree},
        bounded=False,  # the reference makes steps longer than Adam's
        block_specs=BLOCK_SPECS,
    )
    params = {name: to_jax(name, value) for name, value in params.items()}
    grads = {name: to_jax(name, value) for name, value in grads.items()}

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    recorded = []
    for t in range(golden.STEPS):
        params, state = step(params, state, {name: value[t] for name, value in grads.items()})
        if t + 1 in golden.RECORDED:
            recorded.append(params)
    return jax.tree.map(lambda *values: np.stack(values), *recorded)


def assert_same(ours, reference):
    assert set(ours) == set(golden.SHAPES)
    for name, value in ours.items():
        expected = to_jax(name, reference[name])
        assert value.dtype == expected.dtype == np.float32
        chex.assert_trees_all_close(value, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize("setting", golden.SETTINGS)
def test_parameters_equal_the_recorded_reference(setting):
    with np.load(golden.FILE) as file:
        params, grads, reference = (
            {name: file[f"{part}/{name}"] for name in golden.SHAPES}
            for part in ("params", "grads", setting)
        )
    assert_same(trajectory(params, grads, *golden.SETTINGS[setting]), reference)


@pytest.mark.parametrize("setting", golden.SETTINGS)
def test_parameters_equal_the_installed_reference(setting):
    pytest.importorskip("torch")
    pytest.importorskip("adam_mini")
    params, grads = golden.inputs()
    hyperparams = golden.SETTINGS[setting]
    reference = golden.reference(params, grads, *hyperparams)
    assert_same(trajectory(params, grads, *hyperparams), reference)
