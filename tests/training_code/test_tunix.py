"""Tunix' own trainer, with its Llama 3, fully and by LoRA."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_adam_mini import opt_state_shardings
from tests.training_code.conftest import bytes_on_a_device, optimizers, recipe

pytest.importorskip("tunix", reason="Tunix is not installed: pip install google-tunix")
pytestmark = [
    pytest.mark.slow,
    # Of Tunix and what it imports.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def tunix():
    return recipe("Tunix")


@pytest.fixture(scope="module", params=["full", "LoRA"])
def code(request, tunix):
    """Models to train, and which of their parameters."""
    wrap, wrt = (tunix.with_lora, nnx.LoRAParam) if request.param == "LoRA" else (None, nnx.Param)

    def make(mesh):
        model = tunix.new_model()
        return tunix.on(mesh, wrap(model) if wrap else model)

    specs = tunix.block_specs(make(None), wrt)
    return SimpleNamespace(make=make, wrt=wrt, specs=specs, mesh=tunix.mesh, train=tunix.train)


@pytest.fixture(scope="module", params=[None, jnp.int8], ids=["float32", "int8"])
def mu_dtype(request):
    return request.param


@pytest.fixture(scope="module")
def on_mesh(mu_dtype):
    """One way with each dtype: the other two are no other code, and take minutes."""
    return mu_dtype is not None


@pytest.fixture(scope="module")
def on_one_device(code, mu_dtype):
    losses, _ = code.train(code.make(None), optimizers(code.specs, mu_dtype)[1], 8, None)
    return losses


def test_tunix_learns_about_as_well_as_with_adamw(code, on_one_device):
    adamw, _ = code.train(code.make(code.mesh), optimizers(code.specs)[0], 8, code.mesh)
    assert len(adamw) == 8
    assert on_one_device[0] == pytest.approx(adamw[0], rel=1e-5)
    assert adamw[-1] < adamw[0]
    assert on_one_device[-1] < min(1.05 * adamw[-1], on_one_device[0])


def test_training_is_the_same_on_a_mesh(code, mu_dtype, on_one_device):
    tx = optimizers(code.specs, mu_dtype)[1]
    losses, trainer = code.train(code.make(code.mesh), tx, 8, code.mesh)
    np.testing.assert_allclose(losses, on_one_device, rtol=1e-4)

    params = nnx.state(trainer.model, code.wrt)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    shapes = jax.tree.leaves(jax.eval_shape(tx.init, params))
    ours = sum(
        int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x, sharding in zip(
            shapes, jax.tree.leaves(opt_state_shardings(tx, params, shardings)), strict=True
        )
    )
    assert bytes_on_a_device(trainer.optimizer.opt_state) == pytest.approx(ours, rel=0.005)


def test_a_run_that_is_resumed_goes_on(code, mu_dtype, on_one_device, on_mesh, tmp_path):
    mesh, tx = code.mesh if on_mesh else None, optimizers(code.specs, mu_dtype)[1]
    first, _ = code.train(code.make(mesh), tx, 3, mesh, str(tmp_path))
    second, _ = code.train(code.make(mesh), tx, 8, mesh, str(tmp_path))
    assert (len(first), len(second)) == (3, 5)
    np.testing.assert_allclose([*first, *second], on_one_device, rtol=1e-4)


def test_a_job_of_adamw_switches(tunix, code, mu_dtype, on_mesh, tmp_path):
    mesh, (adamw, tx) = code.mesh if on_mesh else None, optimizers(code.specs, mu_dtype)
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    code.train(code.make(mesh), adamw, 5, mesh, old)
    step = tunix.switch(code.make(mesh), code.wrt, adamw, tx, code.specs, old, new, mu_dtype)
    second, trainer = code.train(code.make(mesh), tx, 10, mesh, new)
    carried_on, _ = code.train(code.make(mesh), adamw, 10, mesh)
    assert step == len(second) == 5
    assert second[0] == pytest.approx(carried_on[5], rel=1e-4)
    np.testing.assert_allclose(second, carried_on[5:], rtol=0.15)
    assert int(trainer.optimizer.step[...]) == 10


def test_gradients_are_accumulated(code, mu_dtype, on_mesh):
    mesh, tx = code.mesh if on_mesh else None, optimizers(code.specs, mu_dtype)[1]
    losses, trainer = code.train(code.make(mesh), tx, 4, mesh, gradient_accumulation_steps=2)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert int(trainer.optimizer.step[...]) == 8  # Tunix' count is of batches
