"""The default label function on Flax's own layers, Linen and NNX: the expected cuts by hand."""

import re

import equinox as eqx
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from optax_adam_mini import (
    adam_mini,
    by_path,
    flax_layers,
    fused,
    infer_block_specs,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)
from optax_adam_mini.labels import resolve_block_specs

X = jnp.ones((2, 8, 8, 6))
SEQUENCE = jnp.ones((2, 5, 6))
TOKENS = jnp.ones((2, 5), jnp.int32)
NEURON, ELEMENT, TENSOR = per_neuron(), per_element(), per_tensor()
BY_HEAD, BY_HEAD_AND_DIM = per_head(3, axis=-2), per_neuron(axis=(-2, -1))
ATTENTION = {
    "query/kernel": BY_HEAD,
    "query/bias": ELEMENT,
    "key/kernel": BY_HEAD,
    "key/bias": ELEMENT,
    "value/kernel": BY_HEAD_AND_DIM,
    "value/bias": ELEMENT,
    "out/kernel": NEURON,
    "out/bias": ELEMENT,
}
GATES = {f"h{gate}/{leaf}": NEURON if leaf == "kernel" else ELEMENT
         for gate in "ifgo" for leaf in ("kernel", "bias")}  # fmt: skip

LINEN = {
    "dense": (nn.Dense(4), SEQUENCE, {"kernel": NEURON, "bias": ELEMENT}),
    "dense_general": (
        nn.DenseGeneral((3, 2)),
        SEQUENCE,
        {"kernel": BY_HEAD_AND_DIM, "bias": ELEMENT},
    ),
    "dense_general_two_inputs": (
        nn.DenseGeneral(5, axis=(-2, -1)),
        SEQUENCE,
        {"kernel": NEURON, "bias": ELEMENT},
    ),
    "einsum": (nn.Einsum((6, 3, 2), "bsd,dhk->bshk"), SEQUENCE,
               {"kernel": BY_HEAD_AND_DIM, "bias": ELEMENT}),
    "conv": (nn.Conv(4, (3, 3)), X, {"kernel": NEURON, "bias": ELEMENT}),
    "conv_no_bias": (nn.Conv(4, (3, 3), use_bias=False), X, {"kernel": NEURON}),
    "conv_1d": (nn.Conv(4, 3), SEQUENCE, {"kernel": NEURON, "bias": ELEMENT}),
    "conv_transpose": (nn.ConvTranspose(4, (3, 3)), X, {"kernel": NEURON, "bias": ELEMENT}),
    "conv_transpose_transposed": (nn.ConvTranspose(4, (3, 3), transpose_kernel=True), X,
                                  {"kernel": per_neuron(axis=-2), "bias": ELEMENT}),
    "conv_local": (nn.ConvLocal(4, (3, 3), use_bias=False), X, {"kernel": NEURON}),
    "embed": (nn.Embed(9, 6), TOKENS, {"embedding": per_token()}),
    "layer_norm": (nn.LayerNorm(), SEQUENCE, {"scale": TENSOR, "bias": ELEMENT}),
    "rms_norm": (nn.RMSNorm(), SEQUENCE, {"scale": TENSOR}),
    "group_norm": (nn.GroupNorm(2), X, {"scale": TENSOR, "bias": ELEMENT}),
    "batch_norm": (nn.BatchNorm(use_running_average=False), X, {"scale": TENSOR, "bias": ELEMENT}),
    "prelu": (nn.PReLU(), X, {"negative_slope": TENSOR}),
    "attention": (nn.MultiHeadDotProductAttention(3), SEQUENCE, ATTENTION),
    "attention_no_bias": (nn.MultiHeadDotProductAttention(3, use_bias=False), SEQUENCE,
                          {k: v for k, v in ATTENTION.items() if "kernel" in k}),
    "attention_qk_norm": (nn.MultiHeadDotProductAttention(3, normalize_qk=True), SEQUENCE,
                          {**ATTENTION, "query_ln/scale": TENSOR, "key_ln/scale": TENSOR}),
    "lstm": (nn.RNN(nn.OptimizedLSTMCell(4)), SEQUENCE,
             {f"cell/{k}": v for k, v in GATES.items()}
             | {f"cell/i{gate}/kernel": NEURON for gate in "ifgo"}),
    "gru": (nn.RNN(nn.GRUCell(4)), SEQUENCE,
            {"cell/ir/kernel": NEURON, "cell/ir/bias": ELEMENT, "cell/iz/kernel": NEURON,
             "cell/iz/bias": ELEMENT, "cell/in/kernel": NEURON, "cell/in/bias": ELEMENT,
             "cell/hr/kernel": NEURON, "cell/hz/kernel": NEURON, "cell/hn/kernel": NEURON,
             "cell/hn/bias": ELEMENT}),
}  # fmt: skip


def linen_params(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_layer_has_the_right_blocks(name):
    module, x, expected = LINEN[name]

    class Model(nn.Module):
        layer: nn.Module

        def __call__(self, x):
            return self.layer(x)

    # As it stands, and under Flax's automatic name, "Conv_0" and the like.
    automatic = type(
        "Model", (nn.Module,), {"__call__": nn.compact(lambda self, x: module.copy()(x))}
    )
    for model in (Model(module.clone(name=None)), automatic()):
        params = linen_params(model, x)
        found = dict(resolve_block_specs(flax_layers(), params))
        assert {path.split("/", 1)[1]: spec for path, spec in found.items()} == expected
    adam_mini(1e-3).init(params)


NNX = {
    "linear": (lambda r: nnx.Linear(6, 4, rngs=r), {"kernel": NEURON, "bias": ELEMENT}),
    "linear_general": (lambda r: nnx.LinearGeneral(6, (3, 2), rngs=r),
                       {"kernel": BY_HEAD_AND_DIM, "bias": ELEMENT}),
    "einsum": (lambda r: nnx.Einsum("bsd,dhk->bshk", (6, 3, 2), (3, 2), rngs=r),
               {"kernel": BY_HEAD_AND_DIM, "bias": ELEMENT}),
    "conv": (lambda r: nnx.Conv(6, 4, (3, 3), rngs=r), {"kernel": NEURON, "bias": ELEMENT}),
    "conv_transpose": (lambda r: nnx.ConvTranspose(6, 4, (3, 3), rngs=r),
                       {"kernel": NEURON, "bias": ELEMENT}),
    "embed": (lambda r: nnx.Embed(9, 6, rngs=r), {"embedding": per_token()}),
    "layer_norm": (lambda r: nnx.LayerNorm(6, rngs=r), {"scale": TENSOR, "bias": ELEMENT}),
    "rms_norm": (lambda r: nnx.RMSNorm(6, rngs=r), {"scale": TENSOR}),
    "group_norm": (lambda r: nnx.GroupNorm(6, num_groups=2, rngs=r),
                   {"scale": TENSOR, "bias": ELEMENT}),
    "batch_norm": (lambda r: nnx.BatchNorm(6, rngs=r), {"scale": TENSOR, "bias": ELEMENT}),
    "attention": (lambda r: nnx.MultiHeadAttention(3, 6, decode=False, rngs=r), ATTENTION),
    "attention_no_bias": (
        lambda r: nnx.MultiHeadAttention(3, 6, use_bias=False, decode=False, rngs=r),
        {k: v for k, v in ATTENTION.items() if "kernel" in k}),
    "lora": (lambda r: nnx.LoRALinear(6, 4, lora_rank=2, rngs=r),
             {"kernel": NEURON, "bias": ELEMENT, "lora/lora_a": NEURON, "lora/lora_b": NEURON}),
    "lstm": (lambda r: nnx.LSTMCell(6, 4, rngs=r),
             GATES | {f"i{gate}/kernel": NEURON for gate in ("i", "f_", "g", "o")}),
    "gru": (lambda r: nnx.GRUCell(6, 4, rngs=r),
            {"dense_h/kernel": NEURON, "dense_i/kernel": NEURON, "dense_i/bias": ELEMENT}),
}  # fmt: skip


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_layer_has_the_right_blocks(name):
    make, expected = NNX[name]
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.LoRAParam))
    for params in (state, nnx.to_pure_dict(state)):
        assert dict(resolve_block_specs(flax_layers(), params)) == expected


def stacked_linen(x, axis):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(3)(nn.LayerNorm()(x))
            return nn.Dense(6)(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(9, 6)(tokens)
            layers = nn.scan(Layer, {"params": axis}, length=4, split_rngs={"params": True})
            return layers(name="layers")(x, None)[0]

    return linen_params(Model(), x)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers_have_blocks_of_their_own(axis):
    params = stacked_linen(TOKENS, axis)
    found = dict(resolve_block_specs(flax_layers(stacked={"layers": axis}), params))
    grids = {path: spec.grid(shape_of(params, path)) for path, spec in found.items()}

    def stack(*grid):
        return (*grid[:axis], 4, *grid[axis:])

    layer = "layers/MultiHeadDotProductAttention_0"
    assert grids == {
        "Embed_0/embedding": (9, 1),
        "layers/LayerNorm_0/scale": stack(1),
        "layers/LayerNorm_0/bias": stack(6),
        "layers/Dense_0/kernel": stack(1, 6),
        "layers/Dense_0/bias": stack(6),
        f"{layer}/query/kernel": stack(1, 3, 1),
        f"{layer}/query/bias": stack(3, 2),
        f"{layer}/key/kernel": stack(1, 3, 1),
        f"{layer}/key/bias": stack(3, 2),
        f"{layer}/value/kernel": stack(1, 3, 2),
        f"{layer}/value/bias": stack(3, 2),
        f"{layer}/out/kernel": stack(1, 1, 6),
        f"{layer}/out/bias": stack(6),
    }


def shape_of(params, path):
    for key in path.split("/"):
        params = params[key]
    return params.shape


def test_stacked_tensor_cuts_keep_the_layers_apart():
    params = stacked_linen(TOKENS, 0)
    specs = flax_layers(stacked={"layers": 0}, value="tensor", bias="tensor")(params)
    attention = specs["layers"]["MultiHeadDotProductAttention_0"]
    assert attention["value"]["kernel"].grid((4, 6, 3, 2)) == (4, 1, 1, 1)
    assert attention["value"]["bias"].grid((4, 3, 2)) == (4, 1, 1)


def test_options_change_the_blocks_they_name():
    attention = {
        name: {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
        for name in ("query", "key", "value")
    }
    attention["key"] = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    specs = flax_layers(num_heads=4, num_kv_heads=2, value="tensor", bias="tensor")(attention)
    assert specs["query"] == {"kernel": per_head(4), "bias": TENSOR}
    assert specs["key"]["kernel"] == per_head(2)
    assert specs["value"]["kernel"] == TENSOR
    # By neuron no number of heads is needed.
    specs = flax_layers(query_key="neuron")(attention)
    assert {name: specs[name]["kernel"] for name in specs} == dict.fromkeys(attention, NEURON)
    general = {"query": {"kernel": jnp.ones((6, 3, 2))}, "key": {"kernel": jnp.ones((6, 3, 2))}}
    specs = flax_layers(query_key="neuron")(general)
    assert {specs[name]["kernel"] for name in specs} == {BY_HEAD_AND_DIM}
    conv = {"Conv_0": {"kernel": jnp.ones((3, 3, 2, 4))}, "Conv_1": {"kernel": jnp.ones((3, 2, 4))},
            "Dense_0": {"kernel": jnp.ones((2, 4))}}  # fmt: skip
    specs = flax_layers(conv="tensor")(conv)
    assert specs == {
        "Conv_0": {"kernel": TENSOR},
        "Conv_1": {"kernel": TENSOR},
        "Dense_0": {"kernel": NEURON},
    }
    assert flax_layers(default=NEURON)({"mystery": jnp.ones((2, 2))}) == {"mystery": NEURON}


def grids(params, **options):
    return [
        spec.grid(leaf.shape)
        for spec, leaf in zip(
            jax.tree.leaves(flax_layers(**options)(params)), jax.tree.leaves(params), strict=True
        )
    ]


def test_haiku_modules_are_stacked_by_a_part_of_their_key():
    params = {
        "layers/linear": {"b": jnp.ones((5, 4)), "w": jnp.ones((5, 3, 4))},
        "layers/norm": {"scale": jnp.ones((5, 4))},
    }
    assert grids(params, stacked={"layers": 0}) == [(5, 4), (5, 1, 4), (5, 1)]


def test_a_stacked_name_that_occurs_twice_in_a_path_is_one_stack():
    params = {"layers": {"layers": {"bias": jnp.ones((5, 4)), "kernel": jnp.ones((5, 3, 4))}}}
    assert grids(params, stacked={"layers": 0}) == [(5, 4), (5, 1, 4)]


@pytest.mark.parametrize("bias", [{}, {"b": jnp.ones(6)}])
def test_haiku_transposed_convolutions_have_their_outputs_last_but_one(bias):
    params = {"conv2_d_transpose": {**bias, "w": jnp.ones((3, 3, 6, 6))}}
    assert grids(params)[-1] == (1, 1, 6, 1)


def test_equinox_gains_of_several_axes_are_one_block():
    assert grids(eqx.nn.LayerNorm((3, 4))) == [(1, 1), (3, 4)]


@pytest.mark.parametrize("with_bias", [False, True])
def test_stacked_attention_is_refused_unless_it_is_named(with_bias):
    make = nnx.vmap(
        lambda rngs: nnx.MultiHeadAttention(4, 32, decode=False, use_bias=with_bias, rngs=rngs)
    )
    params = {"attn": nnx.to_pure_dict(nnx.state(make(nnx.Rngs(0).split(6)), nnx.Param))}
    with pytest.raises(
        ValueError, match=r"attn/key/kernel \(6, 32, 4, 8\), attn.*: 4 axes.*pass stacked"
    ):
        flax_layers()(params)
    specs = flax_layers(stacked={"attn": 0})(params)["attn"]
    assert specs["query"]["kernel"].grid((6, 32, 4, 8)) == (6, 1, 4, 1)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))(jax.random.split(jax.random.key(0), 5)),
         "weight (5, 4, 3): its bias has shape (5, 4), which is not that of its first axis"),
        ({"embedding": jnp.ones((2, 3, 4))}, "embedding (2, 3, 4): an embedding has two axes"),
    ],
)  # fmt: skip
def test_other_stacked_layers_are_refused_where_shapes_show_them(params, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        flax_layers()(params)


def test_unnamed_parameters_are_read_by_rank():
    assert flax_layers()(jnp.ones((2, 3))) == NEURON
    assert flax_layers()([jnp.ones((2, 3)), jnp.ones(3), jnp.ones(())]) == [
        NEURON,
        ELEMENT,
        ELEMENT,
    ]
    assert flax_layers()({"w1": jnp.ones((2, 3)), "b1": jnp.ones(3)}) == {
        "w1": NEURON,
        "b1": ELEMENT,
    }


@pytest.mark.parametrize(
    ("kwargs", "params", "text"),
    [
        ({"query_key": "tensor"}, {}, "query_key must be one of ('head', 'neuron'), got 'tensor'"),
        ({"conv": "filter"}, {}, "conv must be one of ('channel', 'tensor'), got 'filter'"),
        ({}, {"query": {"kernel": jnp.ones((8, 8))}},
         "query/kernel (8, 8): the number of heads is not in a plain kernel: pass num_heads"),
        ({}, {"a": {"table": jnp.ones((8, 8))}},
         "a/table (8, 8): its name is none of Flax's own: pass default to flax_layers\n"
         "Use infer_block_specs(loss_fn, params, ...), or give their specs, by_path([(pattern, spec)]"),
        ({}, {"a": {"kernel": jnp.ones((8, 2, 4))}},
         "a/kernel (8, 2, 4): it may be a convolution or a DenseGeneral with several output axes"),
        ({}, {"a": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones(8)}},
         "a/kernel (8, 2, 4): its bias has shape (8,), which is not that of its last axes"),
        ({"stacked": {"layer": 0}}, {"layers": {"kernel": jnp.ones((4, 8, 8))}},
         "stacked={'layer': ...} matches no parameter; the closest paths are layers/kernel"),
        ({"stacked": {"layers": 3}}, {"layers": {"kernel": jnp.ones((4, 8, 8))}},
         "layers/kernel (4, 8, 8): there is no axis 3 to be stacked along"),
    ],
)  # fmt: skip
def test_wrong_options_and_unknown_parameters_are_refused(kwargs, params, text):
    with pytest.raises(ValueError, match=r".") as raised:
        flax_layers(**kwargs)(params)
    assert text in str(raised.value)


def test_parameters_refused_for_one_reason_are_listed_together():
    layer = {name: {"kernel": jnp.ones((8, 8))} for name in ("key", "query", "value")}
    params = {**{f"l{i}": layer for i in range(5)}, "prompt": jnp.ones((3, 8))}
    with pytest.raises(ValueError, match=r".") as raised:
        flax_layers()(params)
    _, heads, prompt, remedy = str(raised.value).split("\n")
    assert heads.startswith("  l0/key/kernel (8, 8), l0/query/kernel (8, 8), l1/key/kernel (8, 8),")
    assert "l3/query/kernel (8, 8) and 2 more: the number of heads is not in a plain" in heads
    assert prompt.startswith("  prompt (3, 8): its name is none of Flax's own")
    assert remedy.startswith("Use infer_block_specs(loss_fn, params, ...)")
    different = {
        f"p{i}": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones(9 + i)} for i in range(11)
    }
    with pytest.raises(ValueError, match=r"p6/kernel .*\n  3 more\nUse infer_block_specs"):
        flax_layers()(different)


def test_a_number_of_heads_that_does_not_divide_the_kernel_is_refused():
    params = {"query": {"kernel": jnp.ones((8, 10))}}
    with pytest.raises(
        ValueError, match="query/kernel: 4 blocks do not divide axis -1 of the shape"
    ):
        adam_mini(1e-3, block_specs=flax_layers(num_heads=4)).init(params)


@pytest.mark.parametrize(
    "name", ["q_proj", "k_proj", "wq", "wk", "to_q", "q", "attn_k", "layers_0_q"]
)
def test_other_names_of_query_and_key_need_the_number_of_heads(name):
    module = {name.removeprefix("layers_0_"): {"kernel": jnp.ones((8, 12))}}
    with pytest.raises(
        ValueError, match=r"pass num_heads .* or have infer_block_specs read it off"
    ):
        flax_layers()(module)
    (spec,) = jax.tree.leaves(flax_layers(num_heads=3)(module))
    assert spec.grid((8, 12)) == (1, 3)
    (spec,) = jax.tree.leaves(flax_layers(query_key="neuron")(module))
    assert spec.grid((8, 12)) == (1, 12)


@pytest.mark.parametrize(
    "name", ["qkv", "c_attn", "to_qkv", "qkv_proj", "query_key_value", "wqkv", "to_kv", "q_a_proj"]
)
@pytest.mark.parametrize("options", [{}, {"num_heads": 4}])
def test_a_kernel_that_fuses_query_and_key_with_others_is_refused(name, options):
    with pytest.raises(ValueError, match=rf"attn/{name}/kernel .*does not say where each part is"):
        flax_layers(**options)({"attn": {name: {"kernel": jnp.ones((8, 24))}}})


@pytest.mark.parametrize(
    "name", ["v_proj", "wv", "to_v", "out_proj", "c_proj", "c_fc", "gate_proj"]
)
def test_other_kernels_are_cut_by_neuron(name):
    (spec,) = jax.tree.leaves(flax_layers()({name: {"kernel": jnp.ones((8, 12))}}))
    assert spec.grid((8, 12)) == (1, 12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 4}, "num_heads=4"),
        ({"num_heads": 4, "num_kv_heads": 2}, "num_heads=4, num_kv_heads=2"),
        ({"query_key": "neuron"}, "query_key='neuron'"),
        ({"value": "tensor"}, "value='tensor'"),
        ({"conv": "tensor"}, "conv='tensor'"),
        ({"bias": "tensor"}, "bias='tensor'"),
    ],
)
def test_options_that_no_parameter_needs_are_an_error(options, said):
    label = flax_layers(**options)
    with pytest.raises(ValueError, match=f"flax_layers: no parameter needs {said}: leave it out"):
        label({"kernel": jnp.ones((3, 4))})
    needing = {
        "query": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "key": {"kernel": jnp.ones((3, 4))},
        "value": {"kernel": jnp.ones((3, 4))},
        "conv": {"kernel": jnp.ones((3, 3, 4, 4))},
    }
    flax_layers(**{"num_heads": 2, **options})(needing) if "query_key" not in options else None
    # A part of a tree need not have them.
    label({"kernel": jnp.ones((3, 4)), "query": optax.MaskedNode()})


def test_parts_keep_their_cuts_in_stacked_layers():
    for axis in (1, -1):
        part = fused(axis, [(8, per_head(2, axis=axis)), (8, per_neuron(axis))])
        for spec, expected in (
            (part, (3, 1, 10)),
            (outer(per_neuron(axis=0), part), ((3, 4, 1), (3, 1, 10))),
        ):
            label = flax_layers(stacked={"layers": 0}, default=spec)
            found = label({"layers": {"foo": jnp.ones((3, 4, 16))}})["layers"]["foo"]
            assert found.grid((3, 4, 16)) == expected
    label = flax_layers(stacked={"layers": 0}, default=per_neuron(axis=2))
    with pytest.raises(
        ValueError, match=r"layers/foo .*cuts axis 2, which one layer does not have"
    ):
        label({"layers": {"foo": jnp.ones((3, 4, 16))}})


def test_variables_that_are_not_parameters_are_refused():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"norm/mean, a BatchStat, .* wrt=nnx.Param") as raised:
        adam_mini(1e-3).init(state)
    assert "nnx.split(model, nnx.Param, ...)" in str(raised.value)
    adam_mini(1e-3).init(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    # Specs of their own say that they are meant.
    named = by_path([("norm/(mean|var)", per_element())], default=flax_layers())
    for specs in (named, per_element()):
        adam_mini(1e-3, block_specs=specs).init(state)
    with pytest.raises(
        ValueError, match=r"infer_block_specs: norm/mean, a BatchStat, .*not parameters"
    ):
        infer_block_specs(lambda s: s, state)


def params_of(layer, *shape):
    return jax.eval_shape(layer.init, jax.random.key(0), jnp.ones(shape))["params"]


def test_local_convolutions_with_a_bias():
    params = params_of(nn.ConvLocal(4, (3, 3)), 2, 8, 8, 6)
    assert flax_layers()(params)["kernel"] == per_neuron()


@pytest.mark.parametrize("name", ["out", "value"])
def test_convolutions_with_names_of_attention(name):
    params = {name: params_of(nn.Conv(4, (3, 3)), 1, 8, 8, 4)}
    assert flax_layers()(params)[name]["kernel"] == per_neuron()
    assert flax_layers(conv="tensor")(params)[name]["kernel"] == per_tensor()


def test_haikus_convolutions_with_channels_first():
    params = {"conv2_d": {"w": jnp.ones((3, 3, 6, 4)), "b": jnp.ones((4, 1, 1))}}
    assert flax_layers()(params)["conv2_d"]["w"] == per_neuron()


def test_biases_are_found_under_joined_names():
    nested = {"up": params_of(nn.ConvTranspose(4, (3, 3), transpose_kernel=True), 1, 8, 8, 6)}
    flat = flax.traverse_util.flatten_dict(nested, sep="/")
    assert flax_layers()(flat)["up/kernel"] == flax_layers()(nested)["up"]["kernel"]
    assert flax_layers()(nested)["up"]["kernel"] == per_neuron(axis=-2)
