import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_adam_mini import infer_block_specs, per_element, per_head, per_neuron, per_tensor
from optax_adam_mini.hessian import block_shares, hessian


def quadratic(matrix):
    return lambda params: params["w"].ravel() @ matrix @ params["w"].ravel() / 2


def test_hessian_is_jaxs_own():
    x = jax.random.normal(jax.random.key(0), (3, 5))
    fn = lambda x: jnp.sum(jnp.tanh(x @ x.T) ** 3)
    for batch_size in (1, 4, 64):
        np.testing.assert_allclose(
            hessian(fn, x, batch_size), jax.hessian(fn)(x).reshape(15, 15), rtol=1e-4, atol=1e-4
        )


def test_all_inside_where_the_hessian_has_these_blocks():
    matrix = np.kron(np.eye(4), np.ones((3, 3)))  # rows of w
    (share,) = block_shares(quadratic(matrix), {"w": jnp.ones((4, 3))}, per_neuron(0)).values()
    assert share.inside == 1
    assert share.chance == pytest.approx(4 * 3 * 2 / (12 * 11))
    assert share.ratio == 1 / share.chance
    (columns,) = block_shares(quadratic(matrix), {"w": jnp.ones((4, 3))}, per_neuron(1)).values()
    assert columns.inside == 0


def test_as_by_chance_where_all_is_coupled_alike():
    fn = quadratic(np.ones((24, 24)))
    for spec in (per_neuron(0), per_neuron(1), per_head(2)):
        share = block_shares(fn, {"w": jnp.ones((4, 6))}, spec)["w"]
        assert share.inside == pytest.approx(share.chance)


def test_signs_and_the_diagonal_do_not_count():
    matrix = np.array([[9.0, -1, 2, 0], [-1, 9, 0, 1], [2, 0, 9, -3], [0, 1, -3, 9]])
    share = block_shares(quadratic(matrix), {"w": jnp.ones((2, 2))}, per_neuron(0))["w"]
    assert share.inside == pytest.approx((2 * 1 + 2 * 3) / (2 * (1 + 2 + 1 + 3)))


def test_blocks_that_hold_nothing_or_all_are_left_out():
    params = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones((2, 3))}
    specs = {"a": per_element(), "b": per_tensor(), "c": per_neuron()}
    loss = lambda p: jnp.sum(p["c"] @ (p["a"] * p["b"])) ** 2
    assert list(block_shares(loss, params, specs)) == ["c"]


def test_too_large_is_an_error():
    params = {"w": jnp.ones((129, 128))}
    with pytest.raises(ValueError, match=r"^w \(129, 128\): has 16,512 coordinates"):
        block_shares(lambda p: jnp.sum(p["w"] ** 2), params, per_neuron())


def test_too_large_is_an_error_before_anything_is_measured():
    params = {"a": jnp.ones((3, 2)), "w": jnp.ones((129, 128))}

    def loss(params):
        raise AssertionError("measured")

    with pytest.raises(ValueError, match=r"^w "):
        block_shares(loss, params, per_neuron())


def test_integers_are_left_out_and_complex_parameters_refused():
    params = {"n": jnp.arange(6).reshape(2, 3), "w": jnp.ones((2, 3))}
    assert list(block_shares(lambda p: jnp.sum(p["w"]) ** 2, params, per_neuron())) == ["w"]
    params = {"w": jnp.ones((2, 3), jnp.complex64)}
    with pytest.raises(TypeError, match=r"^w \(2, 3\): is complex64"):
        block_shares(lambda p: jnp.abs(p["w"]).sum(), params, per_neuron())


def test_nothing_off_the_diagonal_is_nan():
    share = block_shares(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.ones((2, 3))}, per_neuron())
    assert np.isnan(share["w"].inside)
    assert share["w"].chance == pytest.approx(3 * 2 / (6 * 5))


def test_inferred_blocks_of_attention_hold_more_than_chance():
    width, heads = 16, 4
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        n: jax.random.normal(k, (width, width)) / 4 for n, k in zip("qkvo", keys[:4], strict=True)
    }
    x, y = (jax.random.normal(key, (8, 8, width)) for key in keys[4:])

    def loss(p, x, y):
        q, k, v = ((x @ p[name]).reshape(8, 8, heads, -1) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthn,bshn->bhts", q, k) / 2)
        mixed = jnp.einsum("bhts,bshn->bthn", weights, v).reshape(x.shape)
        return jnp.mean((mixed @ p["o"] - y) ** 2)

    shares = block_shares(loss, params, infer_block_specs(loss, params, x, y), x, y)
    assert shares["o"].inside == pytest.approx(1)  # the neurons of a squared error do not meet
    for name in "qk":
        assert shares[name].ratio > 2
    assert shares["v"].ratio > 1.5
