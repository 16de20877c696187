"""The blocks of layers that others have written, of one model in several layouts, and of generated
models however they are wrapped."""

import math

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from optax_adam_mini import explain, infer_block_specs, infer_muon_dimension_numbers, per_head
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import path_str

B, T, D, H, N, V = 2, 6, 32, 4, 8, 11  # batch, time, width, heads, head_dim, tokens


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, TOKENS, IMAGE = shape(B, T, D), shape(B, T, dtype="int32"), shape(B, 8, 8, 3)


def grids(fn, params, *args):
    """The grid of every parameter, by its path."""
    specs = jax.tree.leaves(infer_block_specs(fn, params, *args, v="mean"))
    leaves = leaves_with_path(params)
    return {
        path_str(keys): spec.grid(leaf.shape)
        for (keys, leaf), spec in zip(leaves, specs, strict=True)
    }


def linen(module, *args):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    rest = dict(jax.eval_shape(module.init, keys, *args))
    params = rest.pop("params")

    def forward(params, rest, *args):
        variables = {"params": params, **rest}
        return module.apply(variables, *args, mutable=list(rest), rngs={"dropout": keys["dropout"]})

    return grids(forward, params, rest, *args)


def of_nnx(make, *args):
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    forward = lambda params, rest, *args: nnx.merge(graph, params, rest)(*args)
    return grids(forward, params, rest, *args)


def haiku(forward, *args):
    transformed = hk.transform(forward)
    key = jax.random.key(0)
    params = jax.eval_shape(transformed.init, key, *args)
    return grids(lambda params, *args: transformed.apply(params, key, *args), params, *args)


def equinox(make, forward, *args):
    params, static = eqx.partition(
        eqx.filter_eval_shape(make), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )
    return grids(lambda params, *args: forward(eqx.combine(params, static), *args), params, *args)


HEADS = {"query/kernel": (1, H, 1), "key/kernel": (1, H, 1), "value/kernel": (1, H, N),
         "out/kernel": (1, 1, D), "query/bias": (H, N), "key/bias": (H, N), "value/bias": (H, N),
         "out/bias": (D,)}  # fmt: skip


def under(name, found, *lead):
    return {f"{name}/{path}": (*lead, *grid) for path, grid in found.items()}


@pytest.mark.parametrize("normalize_qk", [False, True])
def test_attention_of_flax_is_cut_by_head(normalize_qk):
    gains = {"query_ln/scale": (1,), "key_ln/scale": (1,)} if normalize_qk else {}
    layer = nn.MultiHeadDotProductAttention(
        num_heads=H, normalize_qk=normalize_qk, dropout_rate=0.1, deterministic=False
    )
    assert linen(layer, X) == HEADS | gains
    assert linen(layer, X, shape(B, 5, D)) == HEADS | gains
    assert of_nnx(
        lambda: nnx.MultiHeadAttention(
            num_heads=H, in_features=D, normalize_qk=normalize_qk, decode=False, rngs=nnx.Rngs(0)
        ),
        X,
    ) == HEADS | gains  # fmt: skip


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=H, name="a")(nn.LayerNorm(name="n")(x))
        return x + nn.Dense(D, name="w")(nn.relu(nn.Dense(48, name="u")(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Layer), length=3, **stacked)(name="layers")(x, None)[0]


LAYER = {**under("a", HEADS), "n/scale": (1,), "n/bias": (D,), "u/kernel": (1, 48),
         "u/bias": (48,), "w/kernel": (1, D), "w/bias": (D,)}  # fmt: skip


def test_scanned_layers_are_a_separate_axis():
    assert linen(Layer(), X) == LAYER
    assert linen(Scanned(), X) == under("layers", LAYER, 3)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(V, D, name="e")
        return embed.attend(Layer(name="l")(embed(tokens))[0])


def test_a_tied_embedding_of_linen_is_cut_by_token():
    assert linen(Tied(), TOKENS) == {"e/embedding": (V, 1), **under("l", LAYER)}


class Images(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, name="b")(nn.Conv(8, (3, 3), name="c")(x))
        x = nn.ConvTranspose(5, (2, 2), (2, 2), name="t")(nn.max_pool(nn.relu(x), (2, 2), (2, 2)))
        return nn.Dense(3, name="d")(nn.GroupNorm(5, name="g")(x).mean((1, 2)))


def test_convolutions_and_norms_of_linen_have_the_right_blocks():
    assert linen(Images(), IMAGE) == {
        "b/scale": (1,), "b/bias": (8,), "c/kernel": (1, 1, 1, 8), "c/bias": (8,),
        "t/kernel": (1, 1, 1, 5), "t/bias": (5,), "g/scale": (1,), "g/bias": (5,),
        "d/kernel": (1, 3), "d/bias": (3,),
    }  # fmt: skip


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell]
)
def test_recurrent_cells_of_linen_are_cut_by_neuron(cell):
    found = linen(nn.RNN(cell(7)), X)
    assert len(found) >= 3
    for path, grid in found.items():
        assert grid == ((7,) if path.endswith("bias") else (1, 7)), path


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Conv(D, (4, 4), (4, 4), padding="VALID", name="patches")(image).reshape(B, -1, D)
        first = self.param("first", nn.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.broadcast_to(first, (B, 1, D)), x], axis=1)
        x = x + self.param("positions", nn.initializers.zeros, (1, 5, D))
        x = Layer(name="layer")(x)[0]
        return nn.Dense(7, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def test_a_vision_transformer_of_linen_has_the_right_blocks():
    assert linen(VisionTransformer(), IMAGE) == {
        "patches/kernel": (1, 1, 1, D), "patches/bias": (D,), "first": (1, 1, D),
        "positions": (1, 5, D), **under("layer", LAYER), "norm/scale": (1,), "norm/bias": (D,),
        "head/kernel": (1, 7), "head/bias": (7,),
    }  # fmt: skip


def relative_bias(embed, queries, keys):
    """A number for each head and each distance, clipped to 4 either way, as T5 adds to scores."""
    distance = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
    return embed(jnp.clip(distance, -4, 4) + 4).transpose(2, 0, 1)[None]


class RelativeAttention(nnx.Module):
    def __init__(self, rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.query, self.key, self.value = (
            nnx.LinearGeneral(D, (H, N), **options) for _ in range(3)
        )
        self.out = nnx.LinearGeneral((H, N), D, axis=(-2, -1), **options)

    def __call__(self, x, y, relative):
        bias = relative_bias(relative, x.shape[1], y.shape[1])
        return self.out(nnx.dot_product_attention(self.query(x), self.key(y), self.value(y), bias))


class EncoderDecoder(nnx.Module):
    def __init__(self, rngs):
        self.tokens, self.relative = nnx.Embed(V, D, rngs=rngs), nnx.Embed(9, H, rngs=rngs)
        self.encode, self.decode, self.cross = (RelativeAttention(rngs) for _ in range(3))
        self.norm = nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, source, target):
        source, target = self.tokens(source), self.tokens(target)
        x = self.norm(source)
        source += self.encode(x, x, self.relative)
        x = self.norm(target)
        target += self.decode(x, x, self.relative)
        target += self.cross(self.norm(target), self.norm(source), self.relative)
        return self.tokens.attend(target)


def test_an_encoder_and_decoder_of_nnx_have_the_right_blocks():
    heads = {path: grid for path, grid in HEADS.items() if "kernel" in path}
    make = lambda: EncoderDecoder(nnx.Rngs(0))
    assert of_nnx(make, TOKENS, shape(B, 5, dtype="int32")) == {
        "relative/embedding": (9, 1), "tokens/embedding": (V, 1), "norm/scale": (1,),
        **under("encode", heads), **under("decode", heads), **under("cross", heads),
    }  # fmt: skip


class StateSpace(nn.Module):
    """A selective state space: a diagonal recurrence whose steps depend on the input."""

    @nn.compact
    def __call__(self, x):
        channels, states = 16, 3
        x, gate = jnp.split(nn.Dense(2 * channels, name="in")(x), 2, axis=-1)
        x = nn.Conv(channels, (4,), feature_group_count=channels, padding="CAUSAL", name="conv")(x)
        x = nn.silu(x)
        step = nn.softplus(nn.Dense(channels, name="step")(x))
        into, out = (nn.Dense(states, use_bias=False, name=name)(x) for name in ("into", "out_of"))
        rate = -jnp.exp(self.param("rate", nn.initializers.zeros, (channels, states)))
        decay = jnp.exp(step[..., None] * rate)
        fed = step[..., None] * into[..., None, :] * x[..., None]
        join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        _, state = jax.lax.associative_scan(join, (decay, fed), axis=1)
        y = jnp.einsum("btcs,bts->btc", state, out)
        y += x * self.param("skip", nn.initializers.ones, (channels,))
        return nn.Dense(D, name="out")(y * nn.silu(gate))


def test_a_state_space_of_linen_has_the_right_blocks():
    assert linen(StateSpace(), X) == {
        "in/kernel": (1, 32), "in/bias": (32,), "conv/kernel": (1, 1, 16), "conv/bias": (16,),
        "step/kernel": (1, 16), "step/bias": (16,), "into/kernel": (1, 3), "out_of/kernel": (1, 3),
        "rate": (1, 1), "skip": (1,), "out/kernel": (1, D), "out/bias": (D,),
    }  # fmt: skip


def test_a_gru_of_nnx_is_cut_by_neuron():
    assert of_nnx(lambda: nnx.RNN(nnx.GRUCell(D, 7, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), X) == {
        "cell/dense_h/kernel": (1, 21), "cell/dense_i/kernel": (1, 21), "cell/dense_i/bias": (21,),
    }  # fmt: skip


def test_haiku_layers_have_the_right_blocks():
    attention = lambda x: hk.MultiHeadAttention(H, N, w_init=hk.initializers.Constant(0.0))(x, x, x)
    name = "multi_head_attention"
    columns = {"query": H, "key": H, "value": D, "linear": D}
    assert haiku(attention, X) == {f"{name}/{part}/w": (1, n) for part, n in columns.items()} | {
        f"{name}/{part}/b": (D,) for part in columns
    }
    depthwise = lambda x: hk.DepthwiseConv2D(2, 3)(hk.Conv2D(8, 3)(x))
    assert haiku(depthwise, IMAGE) == {
        "conv2_d/w": (1, 1, 1, 8), "conv2_d/b": (8,),
        "depthwise_conv2_d/w": (1, 1, 1, 16), "depthwise_conv2_d/b": (16,),
    }  # fmt: skip
    stacked = hk.experimental.layer_stack(3)
    assert haiku(lambda x: stacked(lambda x: x + hk.Linear(D)(jax.nn.relu(x)))(x), X) == {
        "__layer_stack_no_per_layer/linear/w": (3, 1, D),
        "__layer_stack_no_per_layer/linear/b": (3, D),
    }


def test_equinox_layers_have_the_right_blocks():
    key = jax.random.key(0)
    attention = lambda layer, x: jax.vmap(layer)(x, x, x)
    assert equinox(lambda: eqx.nn.MultiheadAttention(H, D, key=key), attention, X) == {
        "query_proj/weight": (H, 1), "key_proj/weight": (H, 1), "value_proj/weight": (D, 1),
        "output_proj/weight": (D, 1),
    }  # fmt: skip
    run = lambda cell, x: jax.vmap(
        lambda x: jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(7), x)[0]
    )(x)
    assert equinox(lambda: eqx.nn.GRUCell(D, 7, key=key), run, X) == {
        "weight_ih": (21, 1), "weight_hh": (21, 1), "bias": (21,), "bias_n": (7,),
    }  # fmt: skip
    convolve = lambda layer, x: jax.vmap(layer)(x)
    assert equinox(
        lambda: eqx.nn.ConvTranspose2d(3, 5, 2, key=key), convolve, shape(B, 3, 8, 8)
    ) == {"weight": (5, 1, 1, 1), "bias": (5, 1, 1)}


# One model in several layouts


def attend(q, k, v):
    """Of (B, T, H, N)."""
    weights = jax.nn.softmax(jnp.einsum("bthn,bshn->bhts", q, k))
    return jnp.einsum("bhts,bshn->bthn", weights, v)


def split(x):
    return x.reshape(*x.shape[:-1], H, N)


def fuse(*parts):
    """Of (D, H * N) each, head by head."""
    return np.stack([split(part) for part in parts], 2).reshape(D, -1)


# What a layout makes of four matrices (D, D), and its forward pass.
LAYOUTS = {
    "matrices": (
        lambda w: w,
        lambda p, x: attend(*(split(x @ p[name]) for name in "qkv")).reshape(x.shape) @ p["o"],
    ),
    "transposed": (
        lambda w: {name: part.T for name, part in w.items()},
        lambda p, x: attend(*(split(x @ p[name].T) for name in "qkv")).reshape(x.shape) @ p["o"].T,
    ),
    "heads": (
        lambda w: {"o": w["o"].reshape(H, N, D)} | {name: split(w[name]) for name in "qkv"},
        lambda p, x: jnp.einsum(
            "bthn,hnd->btd",
            attend(*(jnp.einsum("btd,dhn->bthn", x, p[name]) for name in "qkv")), p["o"],
        ),
    ),
    "heads first, one by one": (
        lambda w: {"o": w["o"].reshape(H, N, D)}
        | {name: split(w[name]).transpose(1, 0, 2) for name in "qkv"},
        lambda p, x: sum(
            attend(*((x @ p[name][h])[:, :, None] for name in "qkv"))[:, :, 0] @ p["o"][h]
            for h in range(H)
        ),
    ),
    "fused": (
        lambda w: {"o": w["o"], "qkv": np.concatenate([w[name] for name in "qkv"], 1)},
        lambda p, x: attend(*map(split, jnp.split(x @ p["qkv"], 3, -1))).reshape(x.shape) @ p["o"],
    ),
    "fused, interleaved": (
        lambda w: {"o": w["o"], "qkv": fuse(*(w[name] for name in "qkv"))},
        lambda p, x: attend(
            *jnp.moveaxis((x @ p["qkv"]).reshape(B, T, H, 3, N), 3, 0)
        ).reshape(x.shape) @ p["o"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_one_model_have_the_same_blocks(layout):
    """Each coordinate of the four matrices has a number, by which it is found in every layout."""
    store, forward = LAYOUTS[layout]
    numbers = np.arange(4 * D * D).reshape(4, D, D)
    stored = store(dict(zip("qkvo", numbers, strict=True)))
    specs = infer_block_specs(
        forward, {name: shape(*x.shape) for name, x in stored.items()}, X, v="mean"
    )
    found = np.empty(4 * D * D, int)  # the first number of each one's block
    for name, own in stored.items():
        grid = specs[name].grid(own.shape)
        blocks = np.arange(math.prod(grid)).reshape(grid)
        blocks = np.asarray(specs[name].spread(jnp.asarray(blocks), own.shape)).ravel()
        first = np.full(math.prod(grid), numbers.size)
        np.minimum.at(first, blocks, own.ravel())
        found[own.ravel()] = first[blocks]
    columns = np.arange(D)
    heads, neurons = columns // N * N, columns
    starts = D * D * np.arange(4)[:, None] + [heads, heads, neurons, neurons]
    if layout == "heads first, one by one":
        # Each head has its own matrix of the output here, so that its neurons are the head's.
        rows = np.arange(D) // N * N * D
        expected = np.broadcast_to(starts[:, None], numbers.shape).copy()
        expected[3] += rows[:, None]
    else:
        expected = np.broadcast_to(starts[:, None], numbers.shape)
    np.testing.assert_array_equal(found.reshape(numbers.shape), expected)


# Generated models

WIDTHS = st.sampled_from([(2, 4), (4, 4), (3, 8)])  # heads, head_dim


def dense(draw, name, width):
    hidden = draw(st.sampled_from([5, 16, width]))
    turned = draw(st.booleans())
    params = {f"{name}u": shape(*((hidden, width) if turned else (width, hidden))),
              f"{name}b": shape(hidden), f"{name}w": shape(hidden, width)}  # fmt: skip
    expected = {f"{name}u": (hidden, 1) if turned else (1, hidden), f"{name}b": (hidden,),
                f"{name}w": (1, width)}  # fmt: skip
    activation = draw(st.sampled_from([jax.nn.relu, jax.nn.gelu, jnp.sin, jax.nn.silu]))

    def forward(p, x):
        u = p[f"{name}u"].T if turned else p[f"{name}u"]
        return x + activation(x @ u + p[f"{name}b"]) @ p[f"{name}w"]

    return params, expected, forward


def gated(draw, name, width):
    params = {f"{name}{part}": shape(width, width) for part in "uv"}
    expected = {f"{name}{part}": (1, width) for part in "uv"}
    return params, expected, lambda p, x: x + jax.nn.silu(x @ p[f"{name}u"]) * (x @ p[f"{name}v"])


def norm(draw, name, width):
    def forward(p, x):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}g"]

    return {f"{name}g": shape(width)}, {f"{name}g": (1,)}, forward


def conv(draw, name, width):
    def forward(p, x):
        numbers = ("NWC", "WIO", "NWC")
        return x + jax.lax.conv_general_dilated(
            x, p[f"{name}c"], (1,), "SAME", dimension_numbers=numbers
        )

    return {f"{name}c": shape(3, width, width)}, {f"{name}c": (1, 1, width)}, forward


def attention(draw, name, width, heads):
    layout = draw(st.sampled_from(["flat", "general", "fused"]))
    sizes = {"flat": (width, width), "general": (width, heads, width // heads)}
    cuts = {"flat": [(1, heads), (1, heads), (1, width)],
            "general": [(1, heads, 1), (1, heads, 1), (1, heads, width // heads)]}  # fmt: skip
    params, expected = {f"{name}o": shape(width, width)}, {f"{name}o": (1, width)}
    if layout == "fused":
        params[f"{name}qkv"] = shape(width, 3 * width)
        expected[f"{name}qkv"] = (1, 2 * heads + width)
    else:
        params |= {f"{name}{part}": shape(*sizes[layout]) for part in "qkv"}
        expected |= {f"{name}{p}": cut for p, cut in zip("qkv", cuts[layout], strict=True)}

    def forward(p, x):
        if layout == "fused":
            parts = jnp.split(x @ p[f"{name}qkv"], 3, -1)
        else:
            parts = [jnp.tensordot(x, p[f"{name}{part}"], 1) for part in "qkv"]
        q, k, v = (part.reshape(*x.shape[:-1], heads, -1) for part in parts)
        return x + attend(q, k, v).reshape(x.shape) @ p[f"{name}o"]

    return params, expected, forward


@st.composite
def models(draw):
    """Parameters, the grid of each, and the forward pass of a random stack of layers."""
    heads, head_dim = draw(WIDTHS)
    width = heads * head_dim
    kinds = draw(st.lists(st.sampled_from([dense, gated, norm, conv, attention]), max_size=4))
    kinds.append(draw(st.sampled_from([dense, attention])))
    params, expected, layers = {}, {}, []
    for number, kind in enumerate(kinds):
        more = (heads,) if kind is attention else ()
        own, cut, forward = kind(draw, f"{number}", width, *more)
        params, expected = params | own, expected | cut
        layers.append(forward)

    def forward(p, x):
        for layer in layers:
            x = layer(p, x)
        return x

    return params, expected, forward, shape(B, T, width)


@given(models(), st.randoms())
@settings(max_examples=25, deadline=None)
def test_names_and_wrappers_do_not_change_the_blocks(model, random):
    params, expected, forward, x = model
    assert grids(forward, params, x) == expected
    assert grids(jax.jit(jax.checkpoint(forward)), params, x) == expected
    by_example = lambda p, x: jax.vmap(lambda x: forward(p, x[None])[0])(x)
    assert grids(by_example, params, x) == expected

    names = list(params)
    random.shuffle(names)
    new = {name: f"w{number}" for number, name in enumerate(names)}
    renamed = lambda p, x: forward({name: p[new[name]] for name in params}, x)
    found = grids(renamed, {new[name]: size for name, size in params.items()}, x)
    assert found == {new[name]: grid for name, grid in expected.items()}

    stacked = {name: shape(3, *size.shape) for name, size in params.items()}
    scanned = lambda p, x: jax.lax.scan(lambda x, p: (forward(p, x), None), x, p)[0]
    assert grids(scanned, stacked, x) == {name: (3, *grid) for name, grid in expected.items()}
    # The same parameters at every step are the parameters they were.
    repeated = lambda p, x: jax.lax.fori_loop(0, 3, lambda _, x: forward(p, x), x)
    assert grids(repeated, params, x) == expected


# Muon


@pytest.mark.slow
def test_dimension_numbers_of_general_and_scanned_kernels_train_with_muon():
    module = Scanned()
    x = jax.random.normal(jax.random.key(0), (8, 16, D))
    params = module.init(jax.random.key(1), x)["params"]
    loss = lambda params, x: jnp.mean((module.apply({"params": params}, x) - x[:, ::-1]) ** 2)
    numbers = infer_muon_dimension_numbers(loss, params, x)
    layers = numbers["layers"]
    for name in ("query", "key", "value"):
        assert tuple(layers["a"][name]["kernel"]) == ((1,), (2, 3))
    assert tuple(layers["a"]["out"]["kernel"]) == ((1, 2), (3,))
    assert tuple(layers["u"]["kernel"]) == tuple(layers["w"]["kernel"]) == ((1,), (2,))
    assert layers["n"]["scale"] is layers["u"]["bias"] is layers["a"]["key"]["bias"] is None

    tx = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, gradient, updates

    state, losses, first = tx.init(params), [], None
    for _ in range(20):
        params, state, value, *rest = step(params, state)
        losses.append(value)
        first = first or rest
    assert losses[-1] < 0.7 * losses[0]

    # Each layer's matrix by itself, written as inputs x outputs, is what Muon knows without help.
    def matrices(tree):
        kernels = {name: tree["layers"]["a"][name]["kernel"] for name in ("query", "value", "out")}
        return {name: list(kernel.reshape(3, D, D)) for name, kernel in kernels.items()}

    gradient, updates = map(matrices, first)
    alone = optax.contrib.muon(0.02)
    expected, _ = alone.update(gradient, alone.init(gradient), gradient)
    chex.assert_trees_all_close(updates, expected, rtol=1e-3, atol=1e-6)


def test_dimension_numbers_leave_embeddings_heads_and_vectors_to_adam():
    def fn(p, tokens, image):
        x = p["tokens"][tokens] @ p["w"] * p["gain"] + p["bias"]
        patches = jax.lax.conv_general_dilated(
            image, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        patches = jax.lax.conv_general_dilated(
            patches, p["depthwise"], (1, 1), "SAME", feature_group_count=5,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        # x (a b) is (x a) b.
        return x @ p["w"].T, patches, jnp.tanh(x @ (p["a"] @ p["b"].T)) @ p["head"]

    params = {"tokens": shape(V, D), "w": shape(D, 7), "gain": shape(7), "bias": shape(7),
              "conv": shape(2, 2, 3, 5), "depthwise": shape(3, 3, 1, 5), "head": shape(9, V), "a": shape(7, 2), "b": shape(9, 2)}  # fmt: skip
    found = infer_muon_dimension_numbers(fn, params, TOKENS, IMAGE)
    assert {name for name, numbers in found.items() if numbers is not None} == {
        "conv", "a", "b",
    }  # fmt: skip
    assert tuple(found["conv"]) == ((0, 1, 2), (3,))
    assert (tuple(found["a"]), tuple(found["b"])) == (((0,), (1,)), ((1,), (0,)))
    numbers = found["a"]
    again = infer_muon_dimension_numbers(fn, params, TOKENS, IMAGE, overrides=[("head", numbers)])
    assert again["head"] is numbers


def test_output_heads_are_kernels_whose_outputs_meet_no_further_kernel():
    """Also tied tables, and heads that are used in a loop, behind a gain, or twice."""

    def fn(p, tokens):
        x = p["tokens"][tokens]
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])
        h = (x * jax.nn.sigmoid((x @ p["router"])[..., :1])) @ p["last"]
        # A frozen copy of a head's outputs goes on, through which no gradient comes back.
        target = jax.lax.stop_gradient(x @ p["value"]) @ p["frozen"]
        chunks = jax.lax.map(lambda h: jax.nn.log_softmax(h @ p["head"] * p["gain"])[0], h)
        logits = h @ p["tokens"].T
        by_hand = (h[..., None] * p["written"]).sum(-2)
        losses = chunks.sum(), logits.sum(), (x @ p["value"]).sum(), target.sum(), by_hand.sum()
        return sum(losses)

    params = {"tokens": shape(V, D), "layers": shape(3, D, D), "router": shape(D, 4), "last": shape(D, D), "value": shape(D, 9),
              "frozen": shape(9, 2), "head": shape(D, V), "gain": shape(V), "written": shape(D, 5)}  # fmt: skip
    found = infer_muon_dimension_numbers(fn, params, TOKENS)
    assert {name for name, numbers in found.items() if numbers is not None} == {
        "layers", "router", "last",
    }  # fmt: skip
    assert tuple(found["layers"]) == ((1,), (2,))
    said = {name: explain(fn, params, TOKENS, parameter=name, muon=True) for name in params}
    for name, text in {
        "tokens": "Muon: left to Adam-mini, a table: an index chooses its rows",
        "head": "Muon: left to Adam-mini, an output head: its outputs meet no further kernel",
        "layers": "Muon: a matrix, axis 1 of inputs and axis 2 of outputs",
        "gain": "Muon: left to Adam-mini, not a kernel",
    }.items():
        assert text in said[name]
    assert "Muon" not in explain(fn, params, TOKENS, parameter="head")


def test_a_frozen_model_is_cut_like_a_trained_one():
    """Frozen tables and fused kernels would take more memory, or lose their parts."""

    def fn(p, tokens, frozen):
        x = p["tokens"][tokens] @ p["qkv"]
        q, k, v = jnp.split(x, 3, -1)
        y = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k)) @ v
        y = jax.lax.stop_gradient(y) if frozen else y
        return ((y @ p["head"]) ** 2).mean()

    params = {"tokens": shape(V, D), "qkv": shape(D, 3 * D), "head": shape(D, 7)}
    for v in ("outer", "mean"):
        trained, frozen = (infer_block_specs(fn, params, TOKENS, is_frozen, v=v)
                           for is_frozen in (False, True))  # fmt: skip
        assert frozen == trained
    assert trained["qkv"].grid((D, 3 * D)) == (1, 2 + D)
    trained, frozen = (infer_muon_dimension_numbers(fn, params, TOKENS, is_frozen)
                       for is_frozen in (False, True))  # fmt: skip
    assert frozen == trained
    assert frozen["qkv"] is not None


@pytest.mark.parametrize("function", [jnp.tanh, jax.nn.relu, jax.nn.relu6, jnp.square])
def test_a_function_of_parameters_makes_a_layer_of_them(function):
    """`relu` is `max(x, 0)`, which has two operands. Inputs made by a network have its neurons."""

    def fn(p, x):
        queries = function(p["e"] @ p["w1"]) @ p["w2"]
        weights = jax.nn.softmax(jnp.einsum("td,bsd->bts", queries, x @ p["k"]))
        return jnp.tanh(weights @ x @ p["v"]) @ p["o"]

    params = {"e": shape(3, 5), "w1": shape(5, 7), "w2": shape(7, D), "k": shape(D, D),
              "v": shape(D, 12), "o": shape(12, 3)}  # fmt: skip
    specs = infer_block_specs(fn, params, X, v="mean")
    assert specs["w1"].grid((5, 7)) == (1, 7)
    assert infer_muon_dimension_numbers(fn, params, X)["w2"] == MuonDimensionNumbers((0,), (1,))


@pytest.mark.parametrize("name", ["as it is", "masked", "chosen", "exponential"])
def test_a_toeplitz_matrix_is_cut_per_coordinate_whatever_is_done_to_it(name):
    steps = np.arange(T)
    causal = np.tril(np.ones((T, T), "float32"))[..., None]
    done = {"as it is": lambda m: m, "masked": lambda m: m * causal, "exponential": jnp.exp,
            "chosen": lambda m: jnp.where(causal > 0, m, 0)}[name]  # fmt: skip

    def fn(p, x):
        kernel = done(p["w"][steps[:, None] - steps + T - 1])
        return jnp.tanh(jnp.einsum("tsd,bsd->btd", kernel, x))

    params = {"w": shape(2 * T - 1, D)}
    assert infer_block_specs(fn, params, X, v="mean")["w"].grid((2 * T - 1, D)) == (2 * T - 1, D)


def test_a_table_whose_rows_are_dotted_with_activations_has_rows_and_columns():
    """A table of items is often the largest parameter: Adam's `v` of it would stay."""

    def fn(p, x, items):
        return (p["items"][items] * (jnp.tanh(x[:, 0] @ p["a"]) @ p["b"])).sum(-1)

    params = {"items": shape(100, 8), "a": shape(D, 12), "b": shape(12, 8)}
    found = infer_block_specs(fn, params, X, jax.ShapeDtypeStruct(X.shape[:1], "int32"))
    assert found["items"].size((100, 8)) == 108


@pytest.mark.parametrize("name", ["stopped", "compared", "chosen"])
def test_an_output_head_stays_one_if_its_logits_go_on_without_a_gradient(name):
    onward = {"stopped": lambda p, y: jax.lax.stop_gradient(y) @ p["w"],
              "compared": lambda p, y: jnp.where(y > 0, 1.0, 0.0) @ p["w"],
              "chosen": lambda p, y: p["e"][y.argmax(-1)] @ p["w"]}[name]  # fmt: skip

    def fn(p, x):
        logits = jnp.tanh(x @ p["a"]) @ p["head"]
        return -jax.nn.log_softmax(logits)[..., 0].mean() + (onward(p, logits) ** 2).mean()

    params = {"a": shape(D, 12), "head": shape(12, 11), "w": shape(11, 5), "e": shape(11, 11)}
    found = infer_muon_dimension_numbers(fn, params, X, unreadable=None)
    assert found["head"] is None
    assert found["a"] is not None


def test_a_grouped_convolution_is_no_matrix():
    """Its groups would be mixed. It is no output head either: a kernel follows."""

    def fn(p, x):
        conv = lambda x, w, groups: jnp.tanh(jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", feature_group_count=groups,
            dimension_numbers=("NWC", "WIO", "NWC")))  # fmt: skip
        return conv(conv(x, p["first"], 1), p["grouped"], 4) @ p["mixer"] @ p["head"]

    params = {"first": shape(3, D, 16), "grouped": shape(3, 4, 16), "mixer": shape(16, 16),
              "head": shape(16, 5)}  # fmt: skip
    found = infer_muon_dimension_numbers(fn, params, X)
    assert found["grouped"] is None
    assert found["first"] == MuonDimensionNumbers((0, 1), (2,))


def test_a_kernel_whose_heads_are_read_by_kernels_of_their_own_is_a_matrix():
    def fn(p, x):
        heads = (x @ p["u"]).reshape(*x.shape[:2], 4, 8)
        return (
            jnp.tanh(jnp.einsum("bthn,hnm->bthm", heads, p["w"]).reshape(*x.shape[:2], D)) @ p["o"]
        )

    params = {"u": shape(D, D), "w": shape(4, 8, 8), "o": shape(D, 5)}
    found = infer_muon_dimension_numbers(fn, params, X)
    assert found["u"] == MuonDimensionNumbers((0,), (1,))
    assert found["w"] == MuonDimensionNumbers((1,), (2,))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ([("head", per_head(2))], TypeError, "must give a MuonDimensionNumbers or None"),
        ([("tail", None)], ValueError, "override 'tail'"),
        ([("(", None)], ValueError, "is no regular expression"),
        ([("head", MuonDimensionNumbers(0, 7))], ValueError, "^head .* does not fit"),
        ([("head", MuonDimensionNumbers(True, False))], ValueError, "^head .* does not fit"),
    ],
)
def test_wrong_overrides_of_dimension_numbers_are_refused(overrides, error, message):
    with pytest.raises(error, match=message):
        infer_muon_dimension_numbers(
            lambda p, x: x @ p["head"], {"head": shape(D, 7)}, X, overrides=overrides
        )


def test_dimension_numbers_of_unreadable_kernels_are_refused():
    fn = lambda p, x: x @ jnp.sort(p["w"])
    with pytest.raises(ValueError, match=r"infer_muon.* cannot tell .*\n.*w \(32, 7\): goes into"):
        infer_muon_dimension_numbers(fn, {"w": shape(D, 7)}, X)
    assert infer_muon_dimension_numbers(
        fn, {"w": shape(D, 7)}, X, overrides=[("w", None)]
    ) == {"w": None}  # fmt: skip
