import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from optax.contrib import MuonDimensionNumbers

from optax_adam_mini import (
    BlockSpec,
    adam_mini,
    block_table,
    by_logical_axes,
    by_path,
    explain,
    flax_layers,
    from_adam_state,
    fused,
    infer_block_specs,
    infer_muon_dimension_numbers,
    measure_block_specs,
    muon_mini,
    opt_state_shardings,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    scale_by_adam_mini,
    to_adam_state,
)
from optax_adam_mini.labels import resolve_block_specs


def test_block_specs_may_be_one_spec_a_tree_a_prefix_or_a_function():
    params = {"a": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}, "b": jnp.ones(3)}
    specs = {"a": {"kernel": per_neuron(), "bias": per_element()}, "b": per_tensor()}
    expected = [("a/bias", per_element()), ("a/kernel", per_neuron()), ("b", per_tensor())]
    assert resolve_block_specs(specs, params) == expected
    assert resolve_block_specs(lambda p: specs, params) == expected
    assert resolve_block_specs(per_tensor(), params) == [
        (path, per_tensor()) for path in ("a/bias", "a/kernel", "b")
    ]
    # A prefix; and where a part of the parameters is empty, no spec is asked for.
    assert resolve_block_specs({"a": per_element(), "b": per_tensor()}, params)[1] == (
        "a/kernel",
        per_element(),
    )
    for empty in (None, optax.MaskedNode(), {}):
        partial = {"a": empty, "b": jnp.ones(3)}
        assert resolve_block_specs(specs, partial) == [("b", per_tensor())]
    assert resolve_block_specs(specs, optax.MaskedNode()) == []
    assert resolve_block_specs(lambda p: p, optax.MaskedNode()) == []


@pytest.mark.parametrize(
    ("specs", "error", "text"),
    [
        ({"a": per_tensor()}, ValueError, "prefix of it: no spec for c"),
        (
            {"a": per_tensor(), "b": per_tensor()},
            ValueError,
            "no spec for c; no parameter for the spec at b",
        ),
        (
            {"a": per_tensor(), "c": per_tensor(), "d": {"e": per_tensor()}},
            ValueError,
            "no parameter for the spec at d/e",
        ),
        (
            {"a": "neuron", "c": per_tensor()},
            TypeError,
            "a: expected a BlockSpec such as per_neuron(), got 'neuron' of type str",
        ),
        ({"a": None, "c": per_tensor()}, ValueError, "no spec for a"),
        ({"a": per_head(3), "c": per_tensor()}, ValueError, "a: 3 blocks do not divide axis -1"),
        (lambda params: {"a": 1, "c": 2}, TypeError, "a: expected a BlockSpec"),
        (
            lambda params: per_neuron,
            TypeError,
            "block_specs: the label function returned the function per_neuron, expected a BlockSpec "
            "or a pytree of them: call it",
        ),
        (
            lambda params: flax_layers(),
            TypeError,
            "the label function returned the function _label",
        ),
        (lambda params: None, TypeError, "the label function returned None, expected a BlockSpec"),
        (
            "outer",
            TypeError,
            "got 'outer' of type str: v='outer' is an argument of infer_block_specs",
        ),
        (3, TypeError, "block_specs: expected a BlockSpec such as per_neuron(), got 3 of type int"),
    ],
)
def test_block_specs_that_do_not_fit_are_refused(specs, error, text):
    with pytest.raises(error) as raised:
        resolve_block_specs(specs, {"a": jnp.ones((2, 4)), "c": jnp.ones(2)})
    assert text in str(raised.value)


@pytest.mark.parametrize("function", [per_neuron, per_head, fused, flax_layers, by_path, outer])
def test_functions_that_were_not_called_are_refused(function):
    name = function.__name__
    with pytest.raises(TypeError, match=rf"got the function {name} itself, expected .*{name}\("):
        adam_mini(1e-3, block_specs=function)
    with pytest.raises(TypeError, match=f"got the function {name} itself"):
        block_table({"w": jnp.ones((3, 4))}, function)
    with pytest.raises(TypeError, match="the function infer_muon_dimension_numbers itself"):
        muon_mini(1e-3, muon_weight_dimension_numbers=infer_muon_dimension_numbers)


def test_a_label_function_that_fails_on_a_part_of_the_tree_says_why():
    by_rank = lambda p: {name: per_neuron() if p[name].ndim > 1 else per_element() for name in p}
    tx = optax.masked(adam_mini(1e-3, block_specs=by_rank), {"w": True, "b": False})
    with pytest.raises(AttributeError) as raised:
        tx.init({"w": jnp.ones((3, 4)), "b": jnp.ones(4)})
    assert "called with a part of the parameters" in raised.value.__notes__[0]


def eighths(p):
    return jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn), p)


def boxed(p):
    return jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), p)


def complex_with_integers():
    params, tx = {"w": jnp.ones(2, complex)}, adam_mini(0.1, block_specs=per_tensor())
    return tx.update({"w": jnp.ones(2, int)}, tx.init(params), params)


def nan_state(params):
    adamw = optax.adamw(0.1)
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    return adamw.update(grads, adamw.init(params), params)[1]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda p: by_path({"w": per_neuron()}), r"expected a sequence of pairs \[\(pattern, spec\)"),
        (lambda p: by_path(("w", per_neuron())), "expected a sequence of pairs"),
        (lambda p: by_path([("w", per_neuron)]), "the function per_neuron itself"),
        (lambda p: infer_block_specs(jnp.sum, p, overrides={"w": per_neuron()}), "overrides: expected a seq"),
        (lambda p: infer_block_specs(jnp.sum, jnp.arange(3)), "expected the parameters after the function, got int32"),
        (lambda p: block_table(per_neuron(), p), "params: expected a parameter, got the spec"),
        (lambda p: adam_mini(0.1).init({"w": jax.nn.relu}), "w: expected an array, got .*eqx.filter"),
        (lambda p: block_table({"w": jax.nn.relu}, per_neuron()), "w: expected an array"),
        (lambda p: adam_mini(0.1).update(adam_mini(0.1).init(p), p, p), "in this order"),
        (lambda p: adam_mini(0.1, mask="bias"), "mask: expected True or False, got 'bias'"),
        (lambda p: adam_mini(0.1, mask={"w": True, "c": False}).init(p), "mask must have the structure"),
        (lambda p: adam_mini(0.1, nesterov="yes"), "nesterov must be True or False, got 'yes'"),
        (lambda p: adam_mini(0.1, block_specs=functools.partial(per_head, 2)), "the function per_head itself"),
        (lambda p: adam_mini(flax_layers()), r"learning_rate: expected a number or a schedule, got the label function flax_layers\(\)"),
        (lambda p: by_logical_axes(None), "by_logical_axes: rules must be a sequence, got None"),
        (lambda p: by_logical_axes([], stacked=None), "by_logical_axes: stacked must be a sequence, got None"),
        (lambda p: flax_layers(stacked={"layers": None}), "stacked must give an axis, or several, for 'layers', got None"),
        (lambda p: flax_layers(stacked={"layers": "0"}), "stacked must give an axis, or several, for 'layers', got '0'"),
        (lambda p: flax_layers(num_heads=4, num_kv_heads=0)({"key": {"kernel": jnp.ones((8, 8))}}), "num_heads must be at least 1, got 0"),
        (lambda p: from_adam_state(p, optax.adamw(0.1).init(p), per_tensor()), "expected an optimizer state with a ScaleByAdamState"),
        (lambda p: to_adam_state(jax.eval_shape(adam_mini(0.1).init, p), p, flax_layers()), "a state of shapes without numbers"),
        (lambda p: scale_by_adam_mini().update(jax.tree.map(lambda x: x * 1j, p), scale_by_adam_mini().init(p)), "b: got a gradient of complex64 for a parameter of float32"),
        (lambda p: scale_by_adam_mini().update(jax.tree.map(lambda x: x.astype(int), p), scale_by_adam_mini().init(p)), "b: got a gradient of int32 for a parameter of float32"),
        (lambda p: complex_with_integers(), "w: got a gradient of int32 for a parameter of complex64"),
        (lambda p: adam_mini(0.1).update(boxed(p), adam_mini(0.1).init(p), p), "the gradients must have the structure of the parameters"),
        (lambda p: adam_mini(0.1).update(p, adam_mini(0.1).init(p), boxed(p)), "the params must have the structure of the parameters"),
        (lambda p: adam_mini(0.1).update(p, adam_mini(0.1).init(p | {"b": None}), p | {"b": None}), "got b, which the parameters do not have"),
        (lambda p: muon_mini(0.1, weight_decay_mask=True), "weight_decay_mask: expected a pytree of booleans"),
        (lambda p: muon_mini(0.1, weight_decay_mask={"w": "yes", "b": True}), "weight_decay_mask at w: expected True or False"),
        (lambda p: muon_mini(0.1, weight_decay_mask={"v": True}).init(p), "weight_decay_mask must have the structure"),
        (lambda p: muon_mini(0.1, weight_decay=0.1, weight_decay_mask=lambda p: None).init(p), "weight_decay_mask: the function returned None"),
        (lambda p: muon_mini(0.1, adam_learning_rate=lambda t: jnp.nan * t).init(p), "adam_learning_rate: what the schedule returns"),
        (lambda p: muon_mini(0.1, adam_weight_decay=lambda t: jnp.nan * t).init(p), "adam_weight_decay: what the schedule returns"),
        (lambda p: muon_mini(0.1, adam_b1=jnp.float32(1.5)).init(p), r"adam_b1 must be in \[0, 1\), got 1.5"),
        (lambda p: muon_mini(0.1, adam_eps_root=jnp.float32(-1)).init(p), "adam_eps_root must be at least 0, got -1.0"),
        (lambda p: muon_mini(0.1, block_specs=by_path([("bais", per_tensor())], per_element())).init(p), "the rule 'bais' matches no parameter"),
        (lambda p: adam_mini(-0.1), "learning_rate must be at least 0, got -0.1"),
        (lambda p: adam_mini(float("inf")), "learning_rate must be at least 0, and finite, got inf"),
        (lambda p: adam_mini(float("nan")), "learning_rate must be at least 0, got nan"),
        (lambda p: adam_mini(lambda _: None), "learning_rate: the schedule returned None"),
        (lambda p: adam_mini(lambda _: jnp.ones(3)), "learning_rate: the schedule returned"),
        (lambda p: adam_mini(optax.cosine_decay_schedule), r"got cosine_decay_schedule\(init_value, decay_steps, .*call it"),
        (lambda p: adam_mini(lambda _: optax.constant_schedule(1.0)), "one that returns the function .*call it"),
        (lambda p: adam_mini(jnp.array(-0.1)).init(p), "learning_rate must be at least 0, got -0.1"),
        (lambda p: optax.inject_hyperparams(adam_mini)(float("nan")).init(p), "learning_rate must be at least 0, got nan"),
        (lambda p: adam_mini(0.1, weight_decay=jnp.array(-1.0)).init(p), "weight_decay must be at least 0"),
        (lambda p: muon_mini(jnp.array(-0.1)).init(p), "learning_rate must be at least 0"),
        (lambda p: muon_mini(0.1, beta=jnp.array(1.5)).init(p), r"beta must be in \[0, 1\), got 1.5"),
        (lambda p: muon_mini(0.1, muon_weight_dimension_numbers=MuonDimensionNumbers(0.0, 1)).init(p["w"]), "does not fit: expected axes"),
        (lambda p: adam_mini(0.1).update(p, p, adam_mini(0.1).init(p)), "a tuple of 3, got a dict: .* in this order"),
        (lambda p: adam_mini(0.1).update(p, optax.sgd(0.1).init(p), p), "a tuple of 3, got a tuple of 2"),
        (lambda p: adam_mini(0.1).update(p, muon_mini(0.1).init(p), p), "a tuple of 3, got a PartitionState"),
        (lambda p: optax.flatten(adam_mini(0.1, block_specs={"w": per_neuron(), "b": per_element()})).init(p), "no spec for params; .* as inside optax.flatten"),
        (lambda p: adam_mini(0.1, mu_dtype="float8_e4m3fn"), "mu_dtype must be .*: pass jnp.int8 for 8 bits"),
        (lambda p: adam_mini(0.1, mu_dtype="complex64"), "mu_dtype must be a floating-point dtype"),
        (lambda p: BlockSpec([(-1, 2)]), r"cuts must be a tuple of pairs \(axis, cut\), got \[\(-1, 2\)\]"),
        (lambda p: flax_layers(default="x"), "flax_layers: default must be a BlockSpec or an outer, got 'x'"),
        (lambda p: explain(jnp.sum, p["w"], parameter=None), "parameter=None matches no parameter"),
        (lambda p: explain(lambda p: p["w"].sum(), {**p, "b": optax.MaskedNode()}, parameter="b"), "no parameter at 'b'"),
        (lambda p: adam_mini(0.1, block_specs={"w": per_neuron, "b": per_element}), "b: expected a BlockSpec such as .*, got <function per_element"),
        (lambda p: measure_block_specs(nan_state(p), p), "^b: nu of adam_state is not finite"),
        (lambda p: BlockSpec(rest="x"), "rest must be an integer, got 'x'"),
        (lambda p: BlockSpec(rest=0), "rest must be at least 1, got 0"),
        (lambda p: flax_layers(stacked=["layers"]), r"flax_layers: stacked must be a dict .*, got \['layers'\]"),
        (lambda p: by_path(None), r"by_path: expected a sequence of pairs \[\(pattern, spec\), ...\], got None"),
        (lambda p: adam_mini(0.1, mask=np.bool_(True)), "mask: expected a pytree of booleans or a function"),
        (lambda p: adam_mini(0.1, mu_dtype=jnp.int8, block_specs=per_tensor()).init(jnp.ones(3, complex)), "^params: mu_dtype=int8 keeps real numbers"),
        (lambda p: to_adam_state(adam_mini(0.1, block_specs=per_tensor()).init(p["b"]), p, per_tensor()), "^params: the state has moments for this parameter"),
        (lambda p: infer_block_specs(lambda b: jnp.sort(b).sum(), p["b"]), r"params \(4,\): goes into sort .* without a rule"),
        (lambda p: infer_muon_dimension_numbers(lambda b: b.sum(), jnp.arange(3)), "expected the parameters after the function, got int"),
        (lambda p: infer_muon_dimension_numbers(lambda p: jnp.sort(p["w"]).sum(), p, unreadable=MuonDimensionNumbers(0, 3)), r"\): .* does not fit"),
        (lambda p: fused(-1, [per_neuron()]), r"each part of fused\(\) is a pair \(size, spec\), got per_neuron"),
        (lambda p: BlockSpec(((0, (1, 2)),)), r"each part of a cut is a pair \(size, spec\), got 1"),
        (lambda p: opt_state_shardings(adam_mini(0.1), {}, {}), "param_shardings has 0 meshes: .* give mesh="),
        (lambda p: measure_block_specs(optax.adamw(0.1).init(p), p, tolerance=float("nan")), "tolerance must be at least 0, got nan"),
        (lambda p: adam_mini(0.1).update(p, jax.eval_shape(adam_mini(0.1).init, p), p), "a state of shapes without numbers"),
        (lambda p: adam_mini(0.1).update(eighths(p), adam_mini(0.1).init(p), p), "b: got a gradient of float8_e4m3fn for a parameter of float32: cast it"),
        (lambda p: muon_mini(0.1).update(eighths(p), muon_mini(0.1).init(p), p), "b: got a gradient of float8_e4m3fn"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_clear_error(use, message):
    with pytest.raises((TypeError, ValueError), match=message):
        use({"w": jnp.ones((3, 4)), "b": jnp.ones(4)})


@jax.tree_util.register_pytree_node_class
class WithoutLeaves:
    """A label function that is a pytree, as an Equinox module is."""

    def __call__(self, params):
        return flax_layers()(params)

    def tree_flatten(self):
        return (), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@pytest.mark.parametrize(
    "function",
    [
        jax.tree_util.Partial(flax_layers()),
        jax.tree_util.Partial(lambda _, params: flax_layers()(params), jnp.ones(3)),
        WithoutLeaves(),
    ],
    ids=["partial", "partial with an array", "tree without leaves"],
)
def test_a_label_function_may_be_a_pytree(function):
    state = adam_mini(0.1, block_specs=function).init({"kernel": jnp.ones((3, 4))})
    assert state[0].nu["kernel"].shape == (1, 4)


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


def test_a_field_called_value_keeps_its_name():
    params = {"attention": Attention(*(jnp.ones((3, 4)) for _ in range(3)))}
    paths = ["attention/query", "attention/key", "attention/value"]
    assert [path for path, _ in resolve_block_specs(per_neuron(), params)] == paths
    with pytest.raises(ValueError, match=r"no spec for attention/query, attention/key$"):
        adam_mini(0.1, block_specs={"attention": Attention(None, None, per_neuron())}).init(params)
    boxed = {"kernel": nn.Partitioned(jnp.ones((3, 4)), ("in", "out"))}
    assert [path for path, _ in resolve_block_specs(per_neuron(), boxed)] == ["kernel"]


def test_a_default_sees_all_parameters():
    """Also those that rules match: the shape of a bias may say which axis has the outputs."""
    params = {"up": {"kernel": jnp.ones((3, 3, 4, 6)), "bias": jnp.ones(4)}}
    alone = flax_layers()(params)["up"]["kernel"].grid((3, 3, 4, 6))
    rule = by_path([("bias$", per_tensor())], default=flax_layers())
    for label in (rule, by_path([("other", per_tensor())], default=rule)):
        if label is not rule:
            params = {**params, "other": jnp.ones(3)}
        found = label(params)["up"]
        assert found["kernel"].grid((3, 3, 4, 6)) == alone == (1, 1, 4, 1)
        assert found["bias"] == per_tensor()


def test_a_users_function_as_a_default_gets_parameters():
    by_rank = lambda p: {
        name: per_neuron() if x.ndim > 1 else per_element() for name, x in p.items()
    }
    params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    label = by_path([("embed", per_tensor())], default=by_rank)
    assert label(params) == {"embed": per_tensor(), "w": per_neuron(), "b": per_element()}


def test_a_misspelt_option_of_a_default_is_refused():
    params = {"embed": jnp.ones((9, 4)), "layers": {"scale": jnp.ones((3, 4))}}
    label = by_path([("embed", per_tensor())], default=flax_layers(stacked={"layer": 0}))
    with pytest.raises(ValueError, match=r"stacked=\{'layer': ...\} matches no parameter"):
        label(params)


def test_rules_from_an_iterator_are_in_the_repr():
    label = by_path(zip(["w"], [per_tensor()], strict=True))
    assert repr(label) == "by_path([('w', per_tensor())])"
    axes = by_logical_axes(rule for rule in [(("embed", "mlp"), ("mlp",))])
    assert repr(axes) == "by_logical_axes([(('embed', 'mlp'), ('mlp',))])"


def test_a_functions_own_error_says_what_it_was_called_with():
    with pytest.raises(AttributeError) as raised:
        adam_mini(0.1, block_specs=lambda leaf: per_tensor() if leaf.ndim else None).init(
            {"w": 1.0}
        )
    assert "block_specs: the function was called with the pytree" in raised.value.__notes__[0]
