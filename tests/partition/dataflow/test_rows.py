"""`infer_block_specs(..., v="outer")`: rows and columns derived by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as S

from optax_adam_mini import explain, infer_block_specs, outer, per_element, per_neuron
from optax_adam_mini.product import Outer

T, D, H, K, V, F = 5, 24, 3, 8, 40, 64
X, TOKENS = S((T, D), "float32"), S((T,), "int32")


def shapes(fn, params, *args):
    """Of the arrays in nu: a pair for a row and a column, else one."""
    params = jax.tree.map(lambda s: S(s, "float32"), params, is_leaf=lambda s: isinstance(s, tuple))
    specs = infer_block_specs(fn, params, *args, v="outer")
    return {name: spec.grid(params[name].shape) for name, spec in specs.items()}


def attend(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
    return jnp.einsum("hts,shk->thk", weights, v)


def fused_by_split(p, x):
    q, k, v = (y.reshape(T, H, K) for y in jnp.split(x @ p["w"], 3, axis=-1))
    return attend(q, k, v)


def fused_by_reshape(p, x):
    qkv = (x @ p["w"]).reshape(T, 3, H, K)
    return attend(qkv[:, 0], qkv[:, 1], qkv[:, 2])


def fused_within_heads(p, x):
    return attend(*jnp.split(jnp.einsum("td,dhk->thk", x, p["w"]), 3, axis=-1))


def separate(p, x):
    return attend(*((x @ p[name]).reshape(T, H, K) for name in "qkv"))


def general(p, x):
    return attend(*(jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv"))


def glu(p, x):
    gate, up = jnp.split(x @ p["w"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["out"]


def glu_by_axis(p, x):
    y = jnp.einsum("td,dgf->tgf", x, p["w"])
    return (jax.nn.silu(y[:, 0]) * y[:, 1]) @ p["out"]


def filtered_glu(p, x):
    """The parts are taken after a depthwise convolution, as in Mamba-2."""
    y = jax.lax.conv_general_dilated(
        (x @ p["w"])[None], p["filters"], (1,), [(3, 0)],
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2 * F,
    )[0]  # fmt: skip
    gate, up = jnp.split(y, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["out"]


def rotary(p, x):
    q, k = ((x @ p[name]).reshape(T, H, K) for name in "qk")
    turned = [jnp.concatenate([-y[..., K // 2 :], y[..., : K // 2]], -1) for y in (q, k)]
    return jnp.einsum("thk,shk->hts", *turned)


def lstm(p, x):
    i, f, g, o = jnp.split(x @ p["w"] + p["b"], 4, axis=-1)
    return jax.nn.sigmoid(o) * jnp.tanh(jax.nn.sigmoid(f + i) * g)


def stacked(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w * 1.0), None), x, p["w"])[0]


def experts(p, x):
    return jnp.einsum("ed,edf->ef", x.mean(0)[None] * jnp.ones((4, 1)), p["w"])


def conv(p, x, groups=1):
    return jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # fmt: skip


def tied(p, tokens):
    return jnp.tanh(p["w"][tokens]) @ p["w"].T


def stacked_tables(p, tokens):
    return jax.lax.scan(lambda x, w: (x + w[tokens], None), jnp.zeros((T, D)), p["w"])[0]


def qkv_rows(parts, inputs=D):
    return ((inputs, parts), (1, 3 * H * K))


IMAGE = S((2, 6, 6, 8), "float32")
MODELS = {
    "dense": (lambda p, x: x @ p["w"] + p["b"], {"w": (D, F), "b": (F,)}, (X,),
              {"w": ((D, 1), (1, F)), "b": (F,)}),
    "transposed dense": (lambda p, x: x @ p["w"].T, {"w": (F, D)}, (X,), {"w": ((1, D), (F, 1))}),
    "heads": (separate, dict.fromkeys("qkv", (D, D)), (X,),
              dict.fromkeys("qkv", ((D, 1), (1, D)))),
    "heads as an axis": (general, dict.fromkeys("qkv", (D, H, K)), (X,),
                         dict.fromkeys("qkv", ((D, 1, 1), (1, H, K)))),
    "fused": (fused_by_split, {"w": (D, 3 * D)}, (X,), {"w": qkv_rows(3)}),
    "fused, reshaped": (fused_by_reshape, {"w": (D, 3 * D)}, (X,), {"w": qkv_rows(3)}),
    "gate and up": (glu, {"w": (D, 2 * F), "out": (F, D)}, (X,),
                    {"w": ((D, 2), (1, 2 * F)), "out": ((F, 1), (1, D))}),
    "gate and up as an axis": (glu_by_axis, {"w": (D, 2, F), "out": (F, D)}, (X,),
                               {"w": ((D, 2, 1), (1, 2, F)), "out": ((F, 1), (1, D))}),
    "gate and up after filters": (
        filtered_glu, {"w": (D, 2 * F), "filters": (4, 1, 2 * F), "out": (F, D)}, (X,),
        {"w": ((D, 2), (1, 2 * F)), "filters": (4, 1, 2 * F), "out": ((F, 1), (1, D))}),
    "fused, within heads": (fused_within_heads, {"w": (D, H, 3 * K)}, (X,),
                            {"w": ((D, 1, 3), (1, H, 3 * K))}),
    "halves of heads": (rotary, dict.fromkeys("qk", (D, D)), (X,),
                        dict.fromkeys("qk", ((D, 1), (1, D)))),
    "gates": (lstm, {"w": (D, 4 * F), "b": (4 * F,)}, (X,),
              {"w": ((D, 4), (1, 4 * F)), "b": (4 * F,)}),
    "layers": (stacked, {"w": (4, D, D)}, (X,), {"w": ((4, D, 1), (4, 1, D))}),
    "experts": (experts, {"w": (4, D, F)}, (X,), {"w": ((4, D, 1), (4, 1, F))}),
    "gain and number": (lambda p, x: x * p["g"] * p["s"], {"g": (D,), "s": ()}, (X,),
                        {"g": (D,), "s": ()}),
    "table": (lambda p, t: p["w"][t], {"w": (V, D)}, (TOKENS,), {"w": ((V, 1), (1, D))}),
    "tied": (tied, {"w": (V, D)}, (TOKENS,), {"w": ((1, D), (V, 1))}),
    "tables of layers": (stacked_tables, {"w": (4, V, D)}, (TOKENS,),
                         {"w": ((4, V, 1), (4, 1, D))}),
    "added positions": (lambda p, x: jnp.tanh(x + p["w"]), {"w": (T, D)}, (X,), {"w": (T, D)}),
    "convolution": (conv, {"w": (3, 3, 8, 16)}, (IMAGE,), {"w": ((3, 3, 8, 1), (1, 1, 1, 16))}),
    "grouped": (lambda p, x: conv(p, x, 2), {"w": (3, 3, 4, 16)}, (IMAGE,),
                {"w": ((3, 3, 4, 2), (1, 1, 1, 16))}),
    "depthwise": (lambda p, x: conv(p, x, 8), {"w": (3, 3, 1, 8)}, (IMAGE,),
                  {"w": (3, 3, 1, 8)}),
    "vector": (lambda p, x: x @ p["w"], {"w": (D,)}, (X,), {"w": (D,)}),
    "one output": (lambda p, x: x @ p["w"], {"w": (D, 1)}, (X,), {"w": (D, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_rows_and_columns_derived_by_hand(name):
    fn, params, args, expected = MODELS[name]
    assert shapes(fn, params, *args) == expected


def test_specs_given_as_overrides_or_for_unreadable_parameters_are_kept():
    params = {"w": S((D, F), "float32"), "u": S((D, F), "float32")}
    fn = lambda p, x: x @ p["w"] + jnp.sort(p["u"], axis=0).sum()
    matrix = outer(per_neuron(axis=0), per_neuron())
    specs = infer_block_specs(fn, params, X, v="outer", unreadable=matrix,
                              overrides=[("w", per_element())])  # fmt: skip
    assert specs == {"w": per_element(), "u": matrix}
    assert (specs["u"].note, specs["w"].note) == ("unreadable", "override")


def test_explain_names_rows_and_columns():
    params = {"q": S((D, D), "float32"), "k": S((D, D), "float32"), "v": S((D, D), "float32")}
    text = explain(separate, params, X, parameter="q", v="outer")
    assert text.splitlines()[:2] == [
        f"q ({D}, {D}): kept: {D} rows and {D} columns; v is their product",
        f"  the paper's cut: 1 x {H} blocks",
    ]
    bias = explain(lambda p, x: x + p["b"], {"b": S((D,), "float32")}, X, parameter="b", v="outer")
    assert bias.splitlines()[0] == f"b ({D},): kept: one number for each coordinate"


def test_outer_is_the_default():
    """With `v="mean"` as the default, language models would end 2 to 3% worse unnoticed."""
    params = {name: S((D, D), "float32") for name in "qkv"}
    default = infer_block_specs(separate, params, X)
    assert default == infer_block_specs(separate, params, X, v="outer")
    assert default["q"] == outer(per_neuron(axis=0), per_neuron(axis=1))
    text = explain(separate, params, X, parameter="q")
    assert text == explain(separate, params, X, parameter="q", v="outer")


def test_another_value_of_v_is_refused():
    with pytest.raises(ValueError, match="v must be 'mean' or 'outer', got 'row'"):
        infer_block_specs(lambda p, x: x @ p, S((D, F), "float32"), X, v="row")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="v must be 'mean' or 'outer', got 'row'"):
        explain(lambda p, x: x @ p, S((D, F), "float32"), X, v="row", parameter="")  # pyright: ignore[reportArgumentType]


def test_the_blocks_of_a_fused_kernel_are_its_parts():
    specs = infer_block_specs(fused_by_split, {"w": S((D, 3 * D), "float32")}, X, v="outer")
    assert isinstance(specs["w"], Outer)
    assert specs["w"].runs((D, 3 * D)) == (((1, D),), ((3, D),))
