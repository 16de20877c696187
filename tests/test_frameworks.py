"""Every framework that trains with Optax: small models on real images, and the blocks by hand."""

import dataclasses
import io
import pathlib
import re
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets
from flax import nnx
from flax.training import train_state

from optax_adam_mini import (
    adam_mini,
    by_path,
    flax_layers,
    from_adam_state,
    per_element,
    per_neuron,
    per_tensor,
    stochastic_rounding,
)
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import path_str
from tests.params import slow_but

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "frameworks.md"


@pytest.fixture(scope="module")
def digits():
    """128 handwritten digits of 8 x 8 pixels in [0, 1], and their labels."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return jnp.float32(images[:128].reshape(-1, 8, 8) / 16), jnp.int32(labels[:128])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(step, state, batch, *, jit=jax.jit, steps=40):
    """Trains by `step(state, batch) -> (state, loss)`, held to what every training loop needs.

    The step is traced once; the state keeps its structure, shapes and dtypes; half way it goes to a
    file of plain arrays and back, and the next step does not see the difference.
    """
    chex.clear_trace_counter()
    step = jit(chex.assert_max_traces(step, n=1))
    losses = []
    for i in range(steps):
        new, loss = step(state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        losses.append(float(loss))
        if i == steps // 2:
            again, loss_again = step(saved_and_restored(state), batch)
            chex.assert_trees_all_equal(again, new)
            assert loss_again == loss
        state = new
    assert losses[-1] < 0.3 * losses[0], losses
    return state, losses


def saved_and_restored(state):
    leaves, treedef = jax.tree.flatten(state)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        return jax.tree.unflatten(treedef, [jnp.asarray(saved[name]) for name in saved.files])


def nu_shapes(opt_state):
    """The shapes of nu by path; nu is float32, and there is one of each in the state."""
    nu = optax.tree.get(opt_state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(nu)} == {jnp.dtype(jnp.float32)}
    return {path_str(keys): leaf.shape for keys, leaf in leaves_with_path(nu)}


def refusal(params, block_specs=None):
    """The text with which `init` refuses the parameters."""
    with pytest.raises(ValueError, match=r".") as raised:
        adam_mini(1e-2, block_specs=block_specs).init(params)
    return str(raised.value)


# Flax Linen: TrainState and mutable batch statistics


def test_linen_trains_with_batch_statistics(digits):
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            x = nn.Conv(8, (3, 3))(images[..., None])
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            return nn.Dense(10)(x.reshape(len(x), -1))

    class TrainState(train_state.TrainState):
        batch_stats: Any

    def step(state, batch):
        images, labels = batch

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels), new["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss

    model = Classifier()
    variables = jax.jit(model.init, static_argnames="train")(
        jax.random.key(0), digits[0], train=True
    )
    state = TrainState.create(apply_fn=model.apply, tx=adam_mini(1e-2), **variables)
    state = state.replace(step=jnp.int32(0))  # Flax's 0 is weakly typed, and a file forgets that
    first = state.batch_stats
    state, _ = train(step, state, digits)
    assert nu_shapes(state.opt_state) == {
        "BatchNorm_0/bias": (8,),
        "BatchNorm_0/scale": (1,),
        "Conv_0/bias": (8,),
        "Conv_0/kernel": (1, 1, 1, 8),
        "Dense_0/bias": (10,),
        "Dense_0/kernel": (1, 10),
    }
    assert state.step == 40
    assert jnp.any(state.batch_stats["BatchNorm_0"]["mean"] != first["BatchNorm_0"]["mean"])


def test_plain_query_kernels_of_linen_need_num_heads():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.Dense(8, name=name)(x) for name in ("query", "key", "value"))
            return nn.softmax(q @ k.mT) @ v

    params = jax.eval_shape(Attention().init, jax.random.key(0), jnp.ones((4, 6)))["params"]
    text = refusal(params)
    assert (
        "  key/kernel (6, 8), query/kernel (6, 8): the number of heads is not in a plain kernel: pass "
        "num_heads to flax_layers" in text
    )
    assert "value" not in text
    state = adam_mini(1e-2, block_specs=flax_layers(num_heads=2)).init(params)
    assert nu_shapes(state)["query/kernel"] == (1, 2)


# Flax NNX: nnx.Optimizer and the functional API


class Reader(nnx.Module):
    """Reads a digit as a sequence of its 64 pixels, which are the tokens 0 to 16."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(17, 16, rngs=rngs)
        self.position = nnx.Embed(64, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(64 * 16, 10, rngs=rngs)])

    def __call__(self, images):
        x = self.embed(jnp.int32(16 * images.reshape(-1, 64))) + self.position(jnp.arange(64))
        x = x + self.attention(self.norm(x))
        return self.layers[0](x.reshape(len(x), -1))


READER = {
    "attention/key/bias": (4, 4),
    "attention/key/kernel": (1, 4, 1),
    "attention/out/bias": (16,),
    "attention/out/kernel": (1, 1, 16),
    "attention/query/bias": (4, 4),
    "attention/query/kernel": (1, 4, 1),
    "attention/value/bias": (4, 4),
    "attention/value/kernel": (1, 4, 4),
    "embed/embedding": (17, 1),
    "layers/0/bias": (10,),
    "layers/0/kernel": (1, 10),
    "norm/bias": (16,),
    "norm/scale": (1,),
    "position/embedding": (64, 1),
}


def test_an_nnx_optimizer_trains(digits):
    model = Reader(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adam_mini(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def nnx_step(model, optimizer, images, labels):
        traces.append(1)
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(images), labels))(model)
        optimizer.update(model, grads)
        return loss

    copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))  # one program, not one a leaf

    def step(state, batch):  # of the same two objects, their state given and taken as a pytree
        nnx.update((model, optimizer), state)
        loss = nnx_step(model, optimizer, *batch)
        return copied(nnx.state((model, optimizer))), loss

    train(step, copied(nnx.state((model, optimizer))), digits, jit=lambda step: step)
    assert len(traces) == 1
    assert optimizer.step[...] == 40
    assert nu_shapes(nnx.as_pure(optimizer.opt_state)) == READER


@pytest.mark.slow
def test_nnx_trains_with_the_functional_api(digits):
    graph, params = nnx.split(Reader(nnx.Rngs(0)), nnx.Param)
    tx = adam_mini(1e-2)

    def step(state, batch):
        params, opt_state = state
        images, labels = batch
        loss, grads = jax.value_and_grad(
            lambda params: cross_entropy(nnx.merge(graph, params)(images), labels)
        )(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (_, opt_state), _ = train(step, (params, tx.init(params)), digits)
    assert nu_shapes(opt_state) == READER


def test_an_nnx_parameter_of_unknown_name_is_refused():
    class Prompted(nnx.Module):
        def __init__(self, rngs):
            self.prompt = nnx.Param(jnp.ones((3, 16)))
            self.reader = Reader(rngs)

    params = nnx.state(Prompted(nnx.Rngs(0)), nnx.Param)
    assert refusal(params) == (
        "flax_layers does not know how to cut\n  prompt (3, 16): its name is none of Flax's own: "
        "pass default to flax_layers\nUse infer_block_specs(loss_fn, params, ...), or give their specs, by_path([(pattern, spec)], "
        "default=flax_layers())"
    )
    specs = by_path([("prompt", per_neuron(axis=0))], default=flax_layers())
    assert nu_shapes(adam_mini(1e-2, block_specs=specs).init(params)) == {
        "prompt": (3, 1),
        **{f"reader/{path}": shape for path, shape in READER.items()},
    }


# Haiku


def haiku_train(forward, digits, block_specs=None):
    """The shapes of nu of a Haiku model, after it has been trained."""
    model = hk.without_apply_rng(hk.transform_with_state(forward))
    params, model_state = jax.jit(model.init)(jax.random.key(0), digits[0])
    tx = adam_mini(1e-2, block_specs=block_specs)

    def step(state, batch):
        params, model_state, opt_state = state
        images, labels = batch

        def loss_fn(params):
            logits, new = model.apply(params, model_state, images)
            return cross_entropy(logits, labels), new

        (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), model_state, opt_state), loss

    (_, _, opt_state), _ = train(step, (params, model_state, tx.init(params)), digits)
    return nu_shapes(opt_state)


@pytest.mark.slow
def test_a_haiku_convolution_trains(digits):
    def forward(images):
        x = hk.Conv2D(8, 3, with_bias=False)(images[..., None])
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training=True))
        return hk.nets.MLP([32, 10])(hk.Flatten()(x))

    assert haiku_train(forward, digits) == {
        "batch_norm/offset": (1, 1, 1, 8),
        "batch_norm/scale": (1, 1, 1, 1),
        "conv2_d/w": (1, 1, 1, 8),
        "mlp/~/linear_0/b": (32,),
        "mlp/~/linear_0/w": (1, 32),
        "mlp/~/linear_1/b": (10,),
        "mlp/~/linear_1/w": (1, 10),
    }


@pytest.mark.slow
def test_a_haiku_lstm_trains(digits):
    def forward(images):
        lstm = hk.LSTM(32)
        rows, _ = hk.dynamic_unroll(lstm, images, lstm.initial_state(len(images)), time_major=False)
        return hk.Linear(10)(hk.Flatten()(rows))

    assert haiku_train(forward, digits) == {
        "linear/b": (10,),
        "linear/w": (1, 10),
        "lstm/linear/b": (128,),
        "lstm/linear/w": (1, 128),
    }


def haiku_attention(images):
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Linear(16)(images))
    w_init = hk.initializers.VarianceScaling()
    x = x + hk.MultiHeadAttention(4, key_size=4, w_init=w_init)(x, x, x)
    return hk.Linear(10)(hk.Flatten()(x))


@pytest.mark.slow
def test_haiku_attention_trains(digits):
    assert haiku_train(haiku_attention, digits, flax_layers(num_heads=4)) == {
        "layer_norm/offset": (16,),
        "layer_norm/scale": (1,),
        "linear/b": (16,),
        "linear/w": (1, 16),
        "linear_1/b": (10,),
        "linear_1/w": (1, 10),
        "multi_head_attention/key/b": (16,),
        "multi_head_attention/key/w": (1, 4),
        "multi_head_attention/linear/b": (16,),
        "multi_head_attention/linear/w": (1, 16),
        "multi_head_attention/query/b": (16,),
        "multi_head_attention/query/w": (1, 4),
        "multi_head_attention/value/b": (16,),
        "multi_head_attention/value/w": (1, 16),
    }


def test_haiku_attention_needs_num_heads(digits):
    init = hk.transform(haiku_attention).init
    params = jax.eval_shape(init, jax.random.key(0), digits[0])
    why = "the number of heads is not in a plain kernel: pass num_heads to flax_layers, or have infer_block_specs read it off the model"
    assert refusal(params) == (
        f"flax_layers does not know how to cut\n  multi_head_attention/key/w (16, 16), "
        f"multi_head_attention/query/w (16, 16): {why}\nUse infer_block_specs(loss_fn, params, ...), "
        "or give their specs, "
        "by_path([(pattern, spec)], default=flax_layers())"
    )


def test_haiku_layers_have_the_right_blocks():
    def forward(tokens, images):
        gru = hk.GRU(4)
        gru(hk.Embed(9, 6)(tokens), gru.initial_state(len(tokens)))
        for layer in (
            hk.Bias(),
            hk.Conv2D(4, 3, with_bias=False),
            hk.Conv2DTranspose(4, 3),
            hk.DepthwiseConv2D(2, 3),
            hk.InstanceNorm(create_scale=True, create_offset=True),
            hk.RMSNorm(-1),
        ):
            layer(images)

    init = hk.transform(forward).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.arange(2), jnp.ones((2, 8, 8, 6)))
    assert nu_shapes(adam_mini(1e-2).init(params)) == {
        "bias/b": (8, 8, 6),
        "conv2_d/w": (1, 1, 1, 4),
        "conv2_d_transpose/b": (4,),
        "conv2_d_transpose/w": (1, 1, 4, 1),  # (height, width, outputs, inputs)
        "depthwise_conv2_d/b": (12,),
        "depthwise_conv2_d/w": (1, 1, 1, 12),
        "embed/embeddings": (9, 1),
        "gru/b": (12,),
        "gru/w_h": (1, 12),
        "gru/w_i": (1, 12),
        "instance_norm/offset": (6,),
        "instance_norm/scale": (1,),
        "rms_norm/scale": (1,),
    }


# Equinox: filtered trees, whose other leaves are None


def equinox_train(model, digits, block_specs=None, is_param=eqx.is_inexact_array):
    """The shapes of nu of an Equinox model, after it has been trained."""
    params, static = eqx.partition(model, is_param)
    assert None in jax.tree.leaves(params, is_leaf=lambda x: x is None)
    tx = adam_mini(1e-2, block_specs=block_specs)

    @eqx.filter_value_and_grad
    def loss_and_grads(model, images, labels):
        return cross_entropy(jax.vmap(model)(images), labels)

    def step(state, batch):
        params, opt_state = state
        loss, grads = loss_and_grads(eqx.combine(params, static), *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (eqx.apply_updates(params, updates), opt_state), loss

    (new, opt_state), _ = train(step, (params, tx.init(params)), digits)
    is_integer = lambda x: eqx.is_array(x) and not eqx.is_inexact_array(x)
    chex.assert_trees_all_equal(eqx.filter(new, is_integer), eqx.filter(params, is_integer))
    file = io.BytesIO()  # and Equinox's own way to a file
    eqx.tree_serialise_leaves(file, opt_state)
    file.seek(0)
    chex.assert_trees_all_equal(eqx.tree_deserialise_leaves(file, tx.init(params)), opt_state)
    return nu_shapes(opt_state)


class EquinoxConvolution(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    pixels: jax.Array  # integers, whose gradient is None

    def __init__(self, key):
        conv_key, mlp_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 4, 3, key=conv_key)
        self.norm = eqx.nn.LayerNorm(144)
        self.mlp = eqx.nn.MLP(144, 10, width_size=32, depth=1, key=mlp_key)
        self.pixels = jnp.arange(144)

    def __call__(self, image):
        return self.mlp(self.norm(self.conv(image[None]).reshape(-1)[self.pixels]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "is_param", [eqx.is_inexact_array, pytest.param(eqx.is_array, marks=pytest.mark.slow)]
)
def test_an_equinox_convolution_trains(is_param, digits):
    pixels = {"pixels": (144,)} if is_param is eqx.is_array else {}
    model = eqx.filter_jit(EquinoxConvolution)(jax.random.key(0))
    assert equinox_train(model, digits, is_param=is_param) == {
        "conv/weight": (4, 1, 1, 1),
        "conv/bias": (4, 1, 1),
        "norm/weight": (1,),
        "norm/bias": (144,),
        "mlp/layers/0/weight": (32, 1),
        "mlp/layers/0/bias": (32,),
        "mlp/layers/1/weight": (10, 1),
        "mlp/layers/1/bias": (10,),
        **pixels,
    }


class EquinoxAttention(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    linear: eqx.nn.Linear

    def __init__(self, key):
        embed_key, attention_key, linear_key = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(17, 8, key=embed_key)
        self.attention = eqx.nn.MultiheadAttention(
            2, 8, use_query_bias=True, key=attention_key, inference=True
        )
        self.linear = eqx.nn.Linear(64 * 8, 10, use_bias=False, key=linear_key)

    def __call__(self, image):
        x = jax.vmap(self.embed)(jnp.int32(16 * image.reshape(-1)))
        return self.linear((x + self.attention(x, x, x)).reshape(-1))


@pytest.mark.slow
def test_equinox_attention_trains(digits):
    model = eqx.filter_jit(EquinoxAttention)(jax.random.key(0))
    assert equinox_train(model, digits, flax_layers(num_heads=2)) == {
        "embed/weight": (17, 1),
        "attention/query_proj/weight": (2, 1),
        "attention/query_proj/bias": (8,),
        "attention/key_proj/weight": (2, 1),
        "attention/value_proj/weight": (8, 1),
        "attention/output_proj/weight": (8, 1),
        "linear/weight": (10, 1),
    }
    why = "the number of heads is not in a plain kernel: pass num_heads to flax_layers, or have infer_block_specs read it off the model"
    assert refusal(eqx.filter(model, eqx.is_inexact_array)) == (
        f"flax_layers does not know how to cut\n  attention/query_proj/weight (8, 8), "
        f"attention/key_proj/weight (8, 8): {why}\nUse infer_block_specs(loss_fn, params, ...), "
        "or give their specs, "
        "by_path([(pattern, spec)], default=flax_layers())"
    )


@pytest.mark.slow
def test_equinox_takes_the_whole_model_as_params(digits):
    """With its functions, floats and integers, which have no gradient, as `optax.adamw` does."""

    class Model(eqx.Module):
        conv: EquinoxConvolution
        dropout: eqx.nn.Dropout  # its rate is a leaf, a float
        activation: Any

        def __call__(self, image):
            return self.activation(self.dropout(self.conv(image), inference=True))

    model = Model(EquinoxConvolution(jax.random.key(0)), eqx.nn.Dropout(0.1), jax.nn.softplus)
    loss = lambda model, images, labels: cross_entropy(jax.vmap(model)(images), labels)

    def trained(tx):
        new, state = model, tx.init(eqx.filter(model, eqx.is_inexact_array))
        step = lambda m, s: tx.update(eqx.filter_grad(loss)(m, *digits), s, m)
        for jit in (lambda f: f, eqx.filter_jit, eqx.filter_jit):
            updates, state = jit(step)(new, state)
            new = eqx.apply_updates(new, updates)
        return new

    specs = per_element()
    ours = trained(adam_mini(1e-2, weight_decay=0.1, block_specs=specs))
    theirs = trained(optax.adamw(1e-2, weight_decay=0.1))
    assert loss(ours, *digits) < loss(model, *digits)
    chex.assert_trees_all_close(*(eqx.filter(m, eqx.is_array) for m in (ours, theirs)), atol=1e-4)
    # A parameter whose gradient is None has the update None.
    grads = eqx.filter_grad(loss)(model, *digits)
    grads = eqx.tree_at(lambda m: m.conv.norm.weight, grads, None)
    tx = adam_mini(1e-2, block_specs=per_neuron(axis=0))
    updates, _ = tx.update(grads, tx.init(eqx.filter(model, eqx.is_inexact_array)), model)
    assert updates.conv.norm.weight is None


def equinox_shapes(make, *args):
    """What `make` makes of the keys, its parameters as shapes, all else left out."""
    return eqx.filter(
        eqx.filter_eval_shape(make, *args), lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )


def test_equinox_layers_have_the_right_blocks():
    def make(key):
        return {
            "conv": eqx.nn.Conv1d(3, 4, 2, use_bias=False, key=key),
            "conv_transpose": eqx.nn.ConvTranspose2d(3, 4, 2, key=key),
            "group_norm": eqx.nn.GroupNorm(2, 4),
            "gru": eqx.nn.GRUCell(3, 4, key=key),
            "lstm": eqx.nn.LSTMCell(3, 4, key=key),
            "rms_norm": eqx.nn.RMSNorm(4, use_bias=False),
        }

    params = equinox_shapes(make, jax.random.key(0))
    assert nu_shapes(adam_mini(1e-2).init(params)) == {
        "conv/weight": (4, 1, 1),
        "conv_transpose/bias": (4, 1, 1),
        "conv_transpose/weight": (4, 1, 1, 1),
        "group_norm/bias": (4,),
        "group_norm/weight": (1,),
        "gru/bias": (12,),
        "gru/bias_n": (4,),
        "gru/weight_hh": (12, 1),
        "gru/weight_ih": (12, 1),
        "lstm/bias": (16,),
        "lstm/weight_hh": (16, 1),
        "lstm/weight_ih": (16, 1),
        "rms_norm/weight": (1,),
    }


def test_stacked_equinox_layers_have_blocks_of_their_own():
    class Stack(eqx.Module):
        blocks: eqx.nn.MLP

    make = eqx.filter_vmap(lambda key: Stack(eqx.nn.MLP(3, 4, width_size=6, depth=1, key=key)))
    params = equinox_shapes(make, jax.random.split(jax.random.key(0), 5))
    tx = adam_mini(1e-2, block_specs=flax_layers(stacked={"blocks": 0}))
    assert nu_shapes(tx.init(params)) == {
        "blocks/layers/0/weight": (5, 6, 1),
        "blocks/layers/0/bias": (5, 6),
        "blocks/layers/1/weight": (5, 4, 1),
        "blocks/layers/1/bias": (5, 4),
    }


# Plain containers


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Network:
    hidden: Layer
    output: Layer


CONTAINERS = {
    "dict": (lambda a, b, c, d: {"w1": a, "b1": b, "w2": c, "b2": d}, ("w1", "b1", "w2", "b2")),
    "list": (lambda a, b, c, d: [a, b, c, d], "0123"),
    "list_of_tuples": (lambda a, b, c, d: [(a, b), (c, d)], ("0/0", "0/1", "1/0", "1/1")),
    "dict_of_dicts": (
        lambda a, b, c, d: {"x": {"kernel": a, "bias": b}, "y": {"kernel": c, "bias": d}},
        ("x/kernel", "x/bias", "y/kernel", "y/bias"),
    ),
    "dataclass_of_namedtuples": (
        lambda a, b, c, d: Network(Layer(a, b), Layer(c, d)),
        ("hidden/kernel", "hidden/bias", "output/kernel", "output/bias"),
    ),
}


def container_losses(pack, digits):
    """The losses of an MLP whose parameters are in a container, and the shapes of nu."""
    keys = jax.random.split(jax.random.key(0))
    leaves = (
        jax.random.normal(keys[0], (64, 32)) / 8,
        jnp.zeros(32),
        jax.random.normal(keys[1], (32, 10)) / 6,
        jnp.zeros(10),
    )
    params = pack(*leaves)
    places = jax.tree.leaves(pack(*range(4)))  # a dict's leaves are in the order of its keys
    tx = adam_mini(1e-2)

    def loss_fn(params, batch):
        images, labels = batch
        w1, b1, w2, b2 = (
            leaf for _, leaf in sorted(zip(places, jax.tree.leaves(params), strict=True))
        )
        hidden = jax.nn.relu(images.reshape(-1, 64) @ w1 + b1)
        return cross_entropy(hidden @ w2 + b2, labels)

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), losses = train(step, (params, tx.init(params)), digits)
    assert type(params) is type(pack(*leaves))
    return losses, nu_shapes(opt_state)


@pytest.fixture(scope="module")
def losses_in_a_dict(digits):
    return container_losses(CONTAINERS["dict"][0], digits)[0]


@pytest.mark.parametrize(
    "container", slow_but("list_of_tuples", "dataclass_of_namedtuples", of=CONTAINERS)
)
def test_parameters_in_any_container_train_alike(container, digits, losses_in_a_dict):
    pack, paths = CONTAINERS[container]
    losses, shapes = container_losses(pack, digits)
    assert shapes == dict(zip(paths, [(1, 32), (32,), (1, 10), (10,)], strict=True))
    np.testing.assert_allclose(losses, losses_in_a_dict, rtol=1e-5)


def test_a_bare_array_is_cut_by_neuron():
    state = adam_mini(1e-2).init(jnp.ones((3, 4)))
    assert nu_shapes(state) == {"": (1, 4)}


def test_unknown_field_names_are_refused_with_advice():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Factors:
        left: Any
        right: Any
        temperature: Any

    params = Factors(jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.ones(()))
    why = "its name is none of Flax's own: pass default to flax_layers"
    assert refusal(params) == (
        f"flax_layers does not know how to cut\n  left (3, 4), right (4, 5): {why}\nUse "
        "infer_block_specs(loss_fn, params, ...), or give their "
        "specs, by_path([(pattern, spec)], default=flax_layers())"
    )
    rules = [("left", per_neuron(axis=0)), ("right", per_tensor())]
    specs = by_path(rules, default=flax_layers())
    assert nu_shapes(adam_mini(1e-2, block_specs=specs).init(params)) == {
        "left": (3, 1),
        "right": (1, 1),
        "temperature": (),
    }


def test_a_field_called_weight_has_its_outputs_first():
    class Linear(NamedTuple):
        weight: Any
        bias: Any

    params = Linear(jnp.ones((3, 4)), jnp.ones(3))  # a field is read as Equinox's: outputs first
    assert nu_shapes(adam_mini(1e-2).init(params)) == {"weight": (3, 1), "bias": (3,)}
    assert "weight (3, 4): its name is none of Flax's own" in refusal(params._asdict())


# The code of docs/frameworks.md, which tests/test_docs.py runs with Adam-mini


OLD_LINE = re.compile(r"^# (?P<old>tx = optax\.adamw\(.*\))\ntx = adam_mini\(.*\)$", re.M)
SECTIONS = dict(
    re.findall(r"^## (.+)\n(?:.*\n)*?```python\n((?:.*\n)*?)```", PAGE.read_text(), re.M)
)


@pytest.mark.slow
@pytest.mark.parametrize("section", sorted(SECTIONS.keys() - {"What to check"}))
def test_code_of_the_page_trains_with_adamw_too(section):
    """The page says that the optimizer's line is all there is to change: its old line runs too."""
    assert "infer_block_specs(" in SECTIONS[section]
    assert "checkpointer.restore(" in SECTIONS[section]
    old, count = OLD_LINE.subn(r"\g<old>", SECTIONS[section])
    assert count == 1
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(old, PAGE, "exec"), names)
    assert jnp.isfinite(names["loss"])


@pytest.mark.slow
def test_code_of_the_page_restores_batch_statistics_and_counters():
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(SECTIONS["Flax NNX with the functional API"], PAGE, "exec"), names)
    assert names["rest"]["dropout"]["rngs"]["count"][...] == 4  # three steps, and one after
    assert jnp.any(names["rest"]["norm"]["mean"][...] != 0)
    assert names["opt_state"][0].count == 4


def test_a_model_with_methods_of_the_names_of_flaxs_boxes_is_no_box():
    class Model(eqx.Module):
        w: jax.Array
        v: jax.Array

        def unbox(self):
            return self

        def get_metadata(self):
            return "v1"

    model = Model(jnp.ones((8, 6)), jnp.ones((8, 6)))
    state = adam_mini(1e-3, block_specs=Model(per_element(), per_tensor())).init(model)
    assert (state[0].nu.w.shape, state[0].nu.v.shape) == ((8, 6), (1, 1))


@pytest.mark.parametrize("wrap", [lambda tx: tx, stochastic_rounding])
def test_equinox_layers_are_frozen_by_leaving_them_out_of_init(wrap):
    """`init` gets the trained part and `update` the whole model, as with Optax's optimizers."""
    model = eqx.nn.MLP(3, 4, 5, 1, dtype=jnp.bfloat16, key=jax.random.key(0))
    is_trained = jax.tree.map(eqx.is_inexact_array, model)
    is_trained = eqx.tree_at(lambda m: m.layers[0].weight, is_trained, False)
    trained = eqx.filter(model, is_trained)
    for tx in (optax.adamw(1e-3), adam_mini(1e-3, block_specs=per_neuron(axis=0))):
        tx = wrap(tx)
        updates, _ = tx.update(trained, tx.init(trained), model)
        assert jax.tree.structure(updates) == jax.tree.structure(trained)


def test_a_converted_state_of_nnx_counts_by_itself():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    old = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    new = nnx.Optimizer(model, adam_mini(1e-3), wrt=nnx.Param)
    new.opt_state = from_adam_state(old.opt_state, nnx.state(model, nnx.Param), flax_layers())
    new.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones(3))))(model))
    assert (int(new.opt_state[0].count[...]), int(old.opt_state[0].count[...])) == (1, 0)
