"""MaxText's way to place and to restore a state, in Linen and in NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adam_mini import opt_state_shardings
from tests.training_code.conftest import bytes_on_a_device, optimizers, recipe

pytestmark = pytest.mark.slow
MESHES = [(4, 2)]


@pytest.fixture(scope="module", params=["Linen", "NNX"])
def code(request):
    return recipe(request.param)


@pytest.fixture(scope="module")
def specs(code):
    return code.block_specs()


@pytest.fixture(scope="module", params=[None, jnp.int8], ids=["float32", "int8"])
def mu_dtype(request):
    return request.param


@pytest.fixture(scope="module")
def on_one_device(code, specs, mu_dtype):
    return code.train(optimizers(specs, mu_dtype)[1], 8, code.make_mesh(1, 1))


def test_every_layer_has_rows_and_columns_of_its_own(code, specs):
    found = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): spec
        for keys, spec in jax.tree_util.tree_leaves_with_path(
            specs, is_leaf=lambda x: hasattr(x, "grid")
        )
    }
    grids = lambda name, shape: next(
        tuple(spec.grid(shape)) for path, spec in found.items() if f"layers/{name}/kernel" in path
    )
    assert grids("query", (32, 3, 4, 8)) == ((32, 3, 1, 1), (1, 3, 4, 8))
    assert grids("wo", (64, 3, 32)) == ((64, 3, 1), (1, 3, 32))


def test_maxtext_learns_about_as_well_as_with_adamw(code, specs, on_one_device):
    adamw, _ = code.train(optimizers(specs)[0], 8, code.make_mesh(4, 2))
    mini, _ = on_one_device
    assert mini[0] == pytest.approx(adamw[0], rel=1e-5)
    # Eight steps: where gradients of a coordinate are louder than its row and column say, held.
    assert mini[-1] < 1.3 * adamw[-1] < 0.3 * adamw[0]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_training_is_the_same_on_a_mesh(code, specs, mu_dtype, on_one_device, shape):
    losses, _ = code.train(optimizers(specs, mu_dtype)[1], 8, code.make_mesh(*shape))
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-4)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_state_on_a_device_is_what_our_own_shardings_give(code, specs, mu_dtype, shape):
    mesh, (_, tx) = code.make_mesh(*shape), optimizers(specs, mu_dtype)
    _, state = code.train(tx, 1, mesh)
    if hasattr(state, "params"):
        params, opt_state = state.params, state.opt_state
    else:
        params, opt_state = state.model, state.optimizer.opt_state
        params = jax.tree.map(lambda x: x, params)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    of_state = jax.tree.leaves(opt_state_shardings(tx, params, shardings))
    shapes = jax.tree.leaves(jax.eval_shape(tx.init, params))
    ours = sum(
        int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x, sharding in zip(shapes, of_state, strict=True)
    )
    assert bytes_on_a_device(opt_state) == pytest.approx(ours, rel=0.005)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_run_that_is_resumed_goes_on(code, specs, mu_dtype, on_one_device, shape, tmp_path):
    mesh, (_, tx) = code.make_mesh(*shape), optimizers(specs, mu_dtype)
    first, _ = code.train(tx, 3, mesh, tmp_path)
    second, _ = code.train(tx, 8, mesh, tmp_path)
    assert (len(first), len(second)) == (3, 5)
    np.testing.assert_allclose(first + second, on_one_device[0], rtol=1e-4)


def test_a_run_goes_on_on_another_mesh(code, specs, on_one_device, mu_dtype, tmp_path):
    _, tx = optimizers(specs, mu_dtype)
    first, _ = code.train(tx, 3, code.make_mesh(4, 2), tmp_path)
    second, _ = code.train(tx, 8, code.make_mesh(2, 1), tmp_path)
    np.testing.assert_allclose(first + second, on_one_device[0], rtol=1e-4)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_job_of_adamw_switches(code, specs, mu_dtype, shape, tmp_path):
    mesh, (adamw, tx) = code.make_mesh(*shape), optimizers(specs, mu_dtype)
    old, new = tmp_path / "old", tmp_path / "new"
    code.train(adamw, 5, mesh, old)
    code.switch(adamw, tx, specs, mesh, old, new, mu_dtype)
    second, state = code.train(tx, 10, mesh, new)
    carried_on, _ = code.train(adamw, 10, mesh)
    assert len(second) == 5
    assert second[0] == pytest.approx(carried_on[5], rel=1e-4)
    np.testing.assert_allclose(second, carried_on[5:], rtol=0.15)
    opt_state = state.opt_state if hasattr(state, "params") else state.optimizer.opt_state
    counts = [int(x) for x in jax.tree.leaves(opt_state) if x.ndim == 0]
    assert counts == [10] * 2  # of the moments and of the schedule
