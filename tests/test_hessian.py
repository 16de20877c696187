import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets
from flax import linen as nn
from flax import nnx

from examples.gpt2.model import GPT2, GPT2Config
from optax_adam_mini import infer_block_specs, per_element, per_head, per_neuron, per_tensor
from optax_adam_mini.hessian import block_share, block_shares, hessians


def quadratic(matrix):
    return lambda params: params["w"].ravel() @ matrix @ params["w"].ravel() / 2


def test_hessians_equal_those_of_jax():
    x = jax.random.normal(jax.random.key(0), (3, 5))
    fn = lambda x: jnp.sum(jnp.tanh(x @ x.T) ** 3)
    expected = jax.jit(jax.hessian(fn))(x).reshape(15, 15)
    for batch_size in (1, 4, 64):
        np.testing.assert_allclose(hessians(fn, x, batch_size), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_hessians_of_several_arrays_are_those_of_each():
    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (3, 5)), "b": jax.random.normal(keys[1], (5, 2))}
    fn = lambda p: jnp.sum(jnp.tanh(p["a"] @ p["b"]) ** 3)
    found = hessians(fn, params, batch_size=4)
    for name in params:
        alone = jax.hessian(lambda x, name=name: fn({**params, name: x}))(params[name])
        size = params[name].size
        np.testing.assert_allclose(found[name], alone.reshape(size, size), rtol=1e-4, atol=1e-4)


def test_the_share_is_one_where_the_hessian_has_these_blocks():
    matrix = np.kron(np.eye(4), np.ones((3, 3)))  # rows of w
    (share,) = block_shares(quadratic(matrix), {"w": jnp.ones((4, 3))}, per_neuron(0)).values()
    assert share.inside == 1
    assert share.chance == pytest.approx(4 * 3 * 2 / (12 * 11))
    assert share.ratio == 1 / share.chance
    (columns,) = block_shares(quadratic(matrix), {"w": jnp.ones((4, 3))}, per_neuron(1)).values()
    assert columns.inside == 0


def test_the_share_is_that_of_chance_where_all_coordinates_couple_alike():
    fn = quadratic(np.ones((24, 24)))
    for spec in (per_neuron(0), per_neuron(1), per_head(2)):
        share = block_shares(fn, {"w": jnp.ones((4, 6))}, spec)["w"]
        assert share.inside == pytest.approx(share.chance)


def test_the_share_ignores_signs_and_the_diagonal():
    matrix = np.array([[9.0, -1, 2, 0], [-1, 9, 0, 1], [2, 0, 9, -3], [0, 1, -3, 9]])
    share = block_shares(quadratic(matrix), {"w": jnp.ones((2, 2))}, per_neuron(0))["w"]
    assert share.inside == pytest.approx((2 * 1 + 2 * 3) / (2 * (1 + 2 + 1 + 3)))


def test_parameters_of_one_block_or_one_per_element_are_left_out():
    params = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones((2, 3))}
    specs = {"a": per_element(), "b": per_tensor(), "c": per_neuron()}
    loss = lambda p: jnp.sum(p["c"] @ (p["a"] * p["b"])) ** 2
    assert list(block_shares(loss, params, specs)) == ["c"]


def test_a_parameter_that_is_too_large_is_refused():
    params = {"w": jnp.ones((129, 128))}
    with pytest.raises(ValueError, match=r"^w \(129, 128\): has 16,512 coordinates"):
        block_shares(lambda p: jnp.sum(p["w"] ** 2), params, per_neuron())


def test_a_parameter_that_is_too_large_is_refused_before_any_is_measured():
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


def test_the_share_of_a_diagonal_hessian_is_nan():
    share = block_shares(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.ones((2, 3))}, per_neuron())
    assert np.isnan(share["w"].inside)
    assert share["w"].chance == pytest.approx(3 * 2 / (6 * 5))


@pytest.mark.slow
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

    shares = block_shares(loss, params, infer_block_specs(loss, params, x, y, v="mean"), x, y)
    assert shares["o"].inside == pytest.approx(1)  # the neurons of a squared error do not meet
    for name in "qk":
        assert shares[name].ratio > 2
    assert shares["v"].ratio > 1.5


def test_a_hessian_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has the shape \(6, 6\), got \(5, 5\)"):
        block_share(np.ones((5, 5)), per_neuron(), (2, 3))


# Small models, before and after training.


def trained(loss, params, args, learning_rate):
    tx = optax.adam(learning_rate)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, *args), state)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=200)[0])
    return train(params)[0]


def cross_entropy(forward):
    return lambda params, x, y: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y)
    )


def digits(count):
    found = sklearn.datasets.load_digits()
    images = jnp.asarray(found.images[:count, ..., None] / 16, jnp.float32)
    return images, jnp.asarray(found.target[:count])


def mlp():
    def forward(p, x):
        return jnp.tanh(x.reshape(len(x), -1) @ p["a"]) @ p["b"]

    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (64, 8)) / 8,
              "b": jax.random.normal(keys[1], (8, 10)) / 3}  # fmt: skip
    return cross_entropy(forward), params, digits(200)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="first")(x))
        x = nn.relu(nn.Conv(12, (3, 3), strides=2, name="second")(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def cnn():
    data = digits(100)
    params = CNN().init(jax.random.key(0), data[0])["params"]
    return cross_entropy(lambda params, x: CNN().apply({"params": params}, x)), params, data


def gpt2():
    """Two layers; every token is given by the two before it."""
    config = GPT2Config(vocab_size=16, context=8, layers=2, heads=4, width=16)
    graph, params = nnx.split(GPT2(config, rngs=nnx.Rngs(0)), nnx.Param)
    random = np.random.default_rng(0)
    following = random.integers(16, size=(16, 16))
    tokens = random.integers(16, size=(32, 9))
    for t in range(2, 9):
        tokens[:, t] = following[tokens[:, t - 1], tokens[:, t - 2]]
    loss = cross_entropy(lambda params, x: nnx.merge(graph, params)(x))
    return loss, params, (jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, cnn, gpt2])
def test_inferred_blocks_hold_more_than_random_ones(make):
    loss, params, args = make()
    specs = infer_block_specs(loss, params, *args, v="mean")
    after = trained(loss, params, args, 3e-3)
    assert loss(after, *args) < loss(params, *args) / 2
    for at in (params, after):
        shares = block_shares(loss, at, specs, *args)
        assert len(shares) >= 2
        for path, share in shares.items():
            assert share.ratio > 1.5, (path, share)


def test_paths_that_read_alike_are_refused():
    params = {"a/b": jnp.ones((3, 3)), "a": {"b": jnp.ones((3, 3))}}
    loss = lambda p: jnp.sum(jnp.tanh(p["a/b"] @ p["a"]["b"])) ** 2
    with pytest.raises(ValueError, match="paths that read alike, a/b: rename one"):
        block_shares(loss, params, per_neuron())
