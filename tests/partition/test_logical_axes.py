import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from optax_adam_mini import (
    BlockSpec,
    adam_mini,
    by_logical_axes,
    by_path,
    flax_layers,
    muon_mini,
    outer,
    per_element,
    per_neuron,
)
from optax_adam_mini.labels import resolve_block_specs

RULES = [
    (("embed", "heads", "head_dim"), ("heads",)),
    (("heads", "head_dim", "embed"), ("embed",)),
    (("embed", "mlp"), ("mlp",)),
    (("vocab", "embed"), ("vocab",)),
    (("norm",), ()),
]
SHAPES = {
    "query": (("embed", "heads", "head_dim"), (8, 4, 2), (1, 4, 1)),
    "value": (("embed", "heads", "head_dim"), (8, 4, 2), (1, 4, 2)),
    "out": (("heads", "head_dim", "embed"), (4, 2, 8), (1, 1, 8)),
    "up": (("layers", "embed", "mlp"), (3, 8, 16), (3, 1, 16)),
    "embed": (("vocab", "embed"), (11, 8), (11, 1)),
    "norm": (("layers", "norm"), (3, 8), (3, 1)),
}
VALUE = ("value", per_neuron((1, 2)))


def boxed(box):
    return {name: box(jnp.ones(shape), names) for name, (names, shape, _) in SHAPES.items()}


PARAMS = {
    "Linen, partitioned": boxed(lambda x, names: nn.Partitioned(x, names=names)),
    "Linen, logical": boxed(lambda x, names: nn.LogicallyPartitioned(x, names=names)),
    "NNX": nnx.State(
        boxed(lambda x, names: nnx.Param(x, out_sharding=names, eager_sharding=False))
    ),
}


def grids(label, params):
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    found = resolve_block_specs(label, params)
    return {path: spec.grid(s) for (path, spec), s in zip(found, shapes, strict=True)}


@pytest.mark.parametrize("kind", PARAMS)
def test_axes_are_cut_by_their_names(kind):
    label = by_path([VALUE], default=by_logical_axes(RULES))
    assert grids(label, PARAMS[kind]) == {name: grid for name, (_, _, grid) in SHAPES.items()}


@pytest.mark.parametrize("kind", PARAMS)
def test_an_optimizer_with_logical_axes_updates_boxed_parameters(kind):
    tx = adam_mini(1e-3, block_specs=by_path([VALUE], default=by_logical_axes(RULES)))
    params = PARAMS[kind]
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    optax.apply_updates(params, updates)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state[0].nu)]
    assert shapes == [SHAPES[name][2] for name in sorted(SHAPES)]


def test_parameters_without_names_have_the_default():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    x = jnp.ones((2, 8))
    params = jax.eval_shape(nn.Dense(16, kernel_init=init).init, jax.random.key(0), x)["params"]
    for default in (flax_layers(), per_element()):
        label = by_logical_axes([(("embed", "mlp"), ("mlp",))], default=default)
        assert grids(label, params) == {"kernel": (1, 16), "bias": (16,)}
    with pytest.raises(ValueError, match=r"^by_logical_axes: no rule matches bias \(\)"):
        by_logical_axes([(("embed", "mlp"), ("mlp",))])(params)


def test_a_part_of_a_tree_need_not_have_every_name():
    tx = optax.masked(adam_mini(1e-3, block_specs=by_logical_axes(RULES)),
                      {name: name == "up" for name in SHAPES})  # fmt: skip
    state = tx.init(PARAMS["Linen, partitioned"])
    assert [jnp.shape(leaf) for leaf in jax.tree.leaves(state.inner_state[0].nu)] == [(3, 1, 16)]


def test_a_rule_that_matches_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"no parameter has the axes \('a', 'b'\); the parameters"):
        by_logical_axes([(("a", "b"), ("b",))], per_element())(PARAMS["Linen, logical"])
    with pytest.raises(ValueError, match=r"the parameters have none"):
        by_logical_axes([(("a", "b"), ("b",))], per_element())({"w": jnp.ones((2, 3))})


def test_names_must_be_as_many_as_axes():
    params = {"w": nn.Partitioned(jnp.ones((2, 3)), names=("embed",))}
    with pytest.raises(ValueError, match=r"^w \(2, 3\): has 2 axes, but its metadata names"):
        by_logical_axes([], per_element())(params)


@pytest.mark.parametrize(
    ("rules", "options", "error", "message"),
    [
        (["embed"], {}, TypeError, "is a pair"),
        ([(("embed", "mlp"), "mlp")], {}, TypeError, "is a pair"),
        ([(("embed", "mlp"), ("heads",))], {}, ValueError, "cuts heads, which it does not name"),
        ([(("layers", "mlp"), ("mlp",))], {}, ValueError, "names layers, which is in stacked"),
        ([(("mlp",), ("mlp",)), (("mlp",), ())], {}, ValueError, "two rules for"),
        ([], {"default": 3}, TypeError, "by_logical_axes: default must be"),
    ],
)
def test_wrong_rules_are_refused(rules, options, error, message):
    with pytest.raises(error, match=message):
        by_logical_axes(rules, **options)


def test_an_nnx_optimizer_trains_with_the_names_of_axes():
    """It passes variables to `init`, and arrays without metadata to `update`."""
    kernel_init = nnx.with_partitioning(
        nnx.initializers.lecun_normal(), ("embed", "mlp"), eager_sharding=False
    )
    model = nnx.Linear(8, 12, kernel_init=kernel_init, rngs=nnx.Rngs(0))
    specs = by_logical_axes([(("embed", "mlp"), ("mlp",))], default=per_element())
    optimizer = nnx.Optimizer(model, adam_mini(1e-2, block_specs=specs), wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(jnp.ones((4, 8))) - 1) ** 2)
    before = loss(model)
    for _ in range(3):
        optimizer.update(model, nnx.grad(loss)(model))
    assert optimizer.opt_state[0].nu["kernel"].shape == (1, 12)
    assert loss(model) < before


@dataclasses.dataclass
class ByNames:
    """A label function without a hash. It returns `one` for a kernel of (embed, mlp)."""

    one: Any
    other: Any
    calls: int = 0

    def __call__(self, params):
        self.calls += 1
        is_variable = lambda x: isinstance(x, nnx.Variable)
        named = lambda v: (
            is_variable(v) and v.get_metadata().get("out_sharding") == ("embed", "mlp")
        )
        pick = lambda v: self.one if named(v) else self.other
        return jax.tree.map(pick, params, is_leaf=is_variable)


@pytest.mark.parametrize("name", ["adam_mini", "muon_mini", "parts"])
def test_an_nnx_optimizer_calls_functions_of_names_once(name):
    kernel_init = nnx.with_partitioning(
        nnx.initializers.lecun_normal(), ("embed", "mlp"), eager_sharding=False
    )
    model = nnx.Linear(8, 12, kernel_init=kernel_init, rngs=nnx.Rngs(0))
    specs, numbers = ByNames(per_neuron(), per_element()), ByNames(MuonDimensionNumbers(), None)
    tx = adam_mini(1e-2, block_specs=specs)
    if name == "muon_mini":
        tx = muon_mini(1e-2, muon_weight_dimension_numbers=numbers, block_specs=specs)
    if name == "parts":
        halves = outer(BlockSpec(((0, None), (-1, 2))), per_neuron())
        given = by_logical_axes([(("embed", "mlp"), ("mlp",))], default=per_element())
        given = by_path([("kernel", halves)], default=given)
        tx = muon_mini(1e-2, parts=True, muon_weight_dimension_numbers=numbers, block_specs=given)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(jnp.ones((4, 8))) - 1) ** 2)
    before = loss(model)
    for _ in range(3):
        optimizer.update(model, nnx.grad(loss)(model))
    assert loss(model) < before
    assert specs.calls == (name != "parts")
    assert numbers.calls == (name != "adam_mini")


def test_two_models_with_the_same_paths_keep_their_own_specs():
    specs = by_logical_axes([(("in", "out"), ("out",)), (("out", "in"), ("out",))])
    tx = adam_mini(1e-2, block_specs=specs)

    def model(*names):
        box = lambda names: nn.Partitioned(jnp.ones((4, 4)), names)
        return {"w": box(names), "u": box(names[::-1])}

    models = [model("in", "out"), model("out", "in")]
    pairs = [(params, tx.init(params)) for params in models]
    found = [tx.update(params, state, params)[1][0].nu["w"].value.shape for params, state in pairs]
    assert found == [(1, 4), (4, 1)]
