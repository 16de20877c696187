import contextlib
import math
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.common.language import abstract_model, block_specs
from examples.llama.train import Config
from optax_adam_mini import (
    BlockSpec,
    adam_mini,
    by_path,
    fused,
    muon_mini,
    opt_state_shardings,
    outer,
    per_element,
    per_head,
    per_neuron,
    to_adam_state,
)
from tests import sharded_training as training
from tests.params import slow_but

MESH = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
SHAPES = {"query": {"kernel": (16, 24)}, "mlp": {"kernel": (16, 64), "bias": (64,)}, "norm": (16,)}
PARAMS = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
PARAM_SPECS = {
    "query": {"kernel": P("fsdp", "tensor")},
    "mlp": {"kernel": P("fsdp", "tensor"), "bias": P(("tensor", "fsdp"))},
    "norm": P(),
}
BLOCKS = by_path([("query/kernel", per_head(6)), ("bias", per_neuron(0))], default=per_neuron(-1))
NU_SPECS = {
    "query": {"kernel": P(None, None)},  # six heads, an axis that the parameter does not have
    "mlp": {"kernel": P(None, "tensor"), "bias": P(("tensor", "fsdp"))},
    "norm": P(None),
}


def same(found, spec):
    return found.is_equivalent_to(NamedSharding(MESH, spec), len(found.spec) or len(spec))


def check(found, specs):
    """Every sharding is as these specs say, `MaskedNode`s left out."""
    flat = jax.tree_util.tree_leaves_with_path(found)
    assert flat
    for keys, sharding in flat:
        spec = specs
        for key in keys:
            if key != jax.tree_util.GetAttrKey("codes"):
                spec = spec[key.key]
        assert same(sharding, spec), (keys, sharding.spec, spec)


def test_mu_is_like_the_parameter_and_nu_axis_by_axis():
    tx = adam_mini(1e-3, block_specs=BLOCKS)
    found = opt_state_shardings(tx, PARAMS, PARAM_SPECS, mesh=MESH)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(PARAMS))
    check(found[0].mu, PARAM_SPECS)
    check(found[0].nu, NU_SPECS)
    assert found[0].count.spec == P()


def test_an_axis_of_another_size_than_the_parameters_is_replicated():
    for spec, expected in (
        (per_head(8), P(None, None)),
        (per_head(24), P(None, "tensor")),
        (per_neuron(), P(None, "tensor")),
        (per_neuron(0), P("fsdp", None)),
    ):
        tx = adam_mini(1e-3, block_specs=spec)
        found = opt_state_shardings(tx, jnp.ones((16, 24)), P("fsdp", "tensor"), mesh=MESH)
        assert same(found[0].nu, expected)
        assert same(found[0].mu, P("fsdp", "tensor"))


@pytest.mark.parametrize("name", ["a", "b", "mu", "nu", "0", "trace", "acc_grads"])
def test_a_module_may_be_called_like_a_part_of_the_state(name):
    params = {name: {"kernel": jnp.ones((8, 4))}, "kernel": jnp.ones((8, 4))}
    specs = {name: {"kernel": P()}, "kernel": P("fsdp", None)}
    kernel = outer(per_neuron(axis=0), per_neuron())
    for tx in (adam_mini(1e-3, block_specs=kernel), optax.adamw(1e-3), optax.sgd(1.0, 0.9)):
        state = opt_state_shardings(optax.MultiSteps(tx, 2), params, specs, mesh=MESH)
        trees = [state.acc_grads, *(tree for part in state.inner_opt_state for tree in part)]
        kernels = [tree for tree in trees if isinstance(tree, dict)]
        kernels += [tree.a for tree in trees if hasattr(tree, "a")]
        assert len(kernels) >= 2
        for tree in kernels:
            assert same(tree["kernel"], P("fsdp", None))
            assert same(tree[name]["kernel"], P(None, None))


def test_a_row_and_a_column_are_sharded_axis_by_axis():
    params = {
        "kernel": jnp.ones((16, 24)),
        "a": [jnp.ones((16, 24)), jnp.ones(3)],
        "b": jnp.ones(3),
    }
    specs = {"kernel": P("fsdp", "tensor"), "a": [P("tensor", "fsdp"), P()], "b": P()}
    matrix = outer(INPUTS_AND_HEADS, per_neuron())
    blocks = by_path([("kernel|a/0", matrix)], default=per_neuron())
    tx = optax.chain(optax.clip(1.0), adam_mini(1e-3, block_specs=blocks))
    found = opt_state_shardings(tx, params, specs, mesh=MESH)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(params))
    nu = found[1][0].nu
    assert same(nu.a["kernel"], P("fsdp", None))  # six heads
    assert same(nu.b["kernel"], P(None, "tensor"))
    assert same(nu.a["a"][0], P("tensor", None))
    assert same(nu.b["a"][0], P(None, "fsdp"))
    assert same(nu.a["b"], P(None))
    jax.jit(tx.init, out_shardings=found)(params)


def test_the_longest_path_says_which_parameter_it_is():
    params = {"kernel": jnp.ones((8, 4)), "dense": {"kernel": jnp.ones((8, 4))}}
    specs = {"kernel": P("fsdp"), "dense": {"kernel": P(None, "tensor")}}
    tx = adam_mini(1e-3, block_specs=per_neuron())
    check(opt_state_shardings(tx, params, specs, mesh=MESH)[0].mu, specs)


LABELS = {"query": "mini", "mlp": "mini", "norm": "sgd"}
MASK = {"query": True, "mlp": {"kernel": True, "bias": False}, "norm": False}
mini = lambda **more: adam_mini(1e-3, block_specs=BLOCKS, **more)
WRAPPED = {
    "chain": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), mini()), lambda s: s[1][0],
    ),
    "masked": (lambda: optax.masked(mini(), MASK), lambda s: s.inner_state[0]),
    "multi_transform": (
        lambda: optax.multi_transform({"mini": mini(), "sgd": optax.sgd(1.0, 0.9)}, LABELS),
        lambda s: s.inner_states["mini"].inner_state[0],
    ),
    "MultiSteps": (lambda: optax.MultiSteps(mini(), 2), lambda s: s.inner_opt_state[0]),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(adam_mini, static_args=("block_specs",))(
            1e-3, block_specs=BLOCKS
        ),
        lambda s: s.inner_state[0],
    ),
    "ema": (lambda: optax.chain(mini(), optax.ema(0.9)), lambda s: s[0][0]),
    "int8": (lambda: mini(mu_dtype=jnp.int8), lambda s: s[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but("MultiSteps", "int8", of=WRAPPED))
def test_wrapped_optimizers_train_with_their_shardings(name):
    make, find = WRAPPED[name]
    tx = make()
    of_params = jax.tree.map(
        lambda spec: NamedSharding(MESH, spec), PARAM_SPECS, is_leaf=lambda x: isinstance(x, P)
    )
    found = opt_state_shardings(tx, PARAMS, of_params)
    assert jax.tree.structure(found) == jax.tree.structure(tx.init(PARAMS))
    check(find(found).mu, PARAM_SPECS)
    check(find(found).nu, NU_SPECS)
    if name == "MultiSteps":
        check(found.acc_grads, PARAM_SPECS)
    if name == "ema":
        check(found[1].ema, PARAM_SPECS)

    def update(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, in_shardings=(of_params, found), out_shardings=(of_params, found))
    params = jax.device_put(PARAMS, of_params)
    state = jax.jit(tx.init, out_shardings=found)(params)
    expected_params, expected_state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        params, state = step(params, state)
        expected_params, expected_state = jax.jit(update)(expected_params, expected_state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        (params, state), (expected_params, expected_state),
    )  # fmt: skip


def test_other_optimizers_states_are_sharded_or_replicated():
    tx = optax.chain(optax.adafactor(1e-3, min_dim_size_to_factor=8), optax.adamw(1e-3))
    found = opt_state_shardings(tx, PARAMS, PARAM_SPECS, mesh=MESH)
    check(found[1][0].mu, PARAM_SPECS)
    check(found[1][0].nu, PARAM_SPECS)
    jax.jit(tx.init, out_shardings=found)(PARAMS)


def test_a_prefix_of_shardings_and_a_sharded_state_of_replicated_parameters_work():
    tx = mini()
    whole = opt_state_shardings(tx, PARAMS, P(), mesh=MESH)
    assert all(leaf.spec == P() or not any(leaf.spec) for leaf in jax.tree.leaves(whole))
    prefix = opt_state_shardings(tx, PARAMS, {**PARAM_SPECS, "norm": None, "mlp": P("fsdp")},
                                 mesh=MESH)  # fmt: skip
    assert same(prefix[0].mu["mlp"]["kernel"], P("fsdp", None))
    # ZeRO-1: parameters are replicated, the state is not.
    found = opt_state_shardings(tx, PARAMS, PARAM_SPECS, mesh=MESH)
    params = jax.device_put(PARAMS, NamedSharding(MESH, P()))
    state = jax.jit(tx.init, out_shardings=found)(params)
    step = jax.jit(tx.update, out_shardings=(NamedSharding(MESH, P()), found))
    updates, _ = step(params, state, params)
    expected, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_a_parameter_that_is_none_has_no_sharding():
    params, specs = {"w": jnp.ones((8, 4)), "b": None}, {"w": P("fsdp"), "b": None}
    found = opt_state_shardings(adam_mini(1e-3, block_specs=per_neuron()), params, specs, mesh=MESH)
    assert found[0].mu["b"] is None
    assert same(found[0].mu["w"], P("fsdp", None))


def test_shardings_of_an_nnx_state_are_read():
    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
            self.dense = nnx.Linear(16, 64, kernel_init=init, rngs=rngs)

    with jax.set_mesh(MESH):
        params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    tx = adam_mini(1e-3)
    found = opt_state_shardings(tx, params, nnx.get_partition_spec(params), mesh=MESH)
    assert same(found[0].mu["dense"]["kernel"].get_value(), P("fsdp", "tensor"))
    assert same(found[0].nu["dense"]["kernel"].get_value(), P(None, "tensor"))
    assert same(found[0].nu["dense"]["bias"].get_value(), P(None))
    jax.jit(tx.init, out_shardings=found)(params)


def test_shardings_of_boxed_linen_parameters_are_read():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    abstract = jax.eval_shape(nn.Dense(64, kernel_init=init).init, jax.random.key(0),
                              jax.ShapeDtypeStruct((2, 16), "float32"))["params"]  # fmt: skip
    tx = adam_mini(1e-3)
    for given in (
        opt_state_shardings(tx, abstract, nn.get_sharding(abstract, MESH)),
        opt_state_shardings(tx, abstract, nn.get_partition_spec(abstract), mesh=MESH),
    ):
        kernel = given[0].nu["kernel"]
        assert same(kernel.value if isinstance(kernel, nn.Partitioned) else kernel,
                    P(None, "tensor"))  # fmt: skip
        assert same(given[0].mu["bias"], P(None))


@pytest.mark.parametrize(
    ("specs", "options", "error", "message"),
    [
        (PARAM_SPECS, {}, ValueError, r"^mlp/bias: got .* and no mesh: .* mesh="),
        ({"query": P()}, {"mesh": MESH}, ValueError, "no sharding for mlp/bias, mlp/kernel, norm"),
        ({**PARAM_SPECS, "nrm": P()}, {"mesh": MESH}, ValueError,
         "no parameter for the sharding at nrm$"),
        ({**PARAM_SPECS, "norm": "fsdp"}, {"mesh": MESH}, TypeError, r"^norm: expected a Named"),
        ({**PARAM_SPECS, "norm": P(None, "fsdp")}, {"mesh": MESH}, ValueError,
         r"^norm \(16,\): .* does not fit"),
        ({**PARAM_SPECS, "query": NamedSharding(jax.make_mesh((8,), ("i",)), P())}, {"mesh": MESH},
         ValueError, "has 2 meshes"),
        ({**PARAM_SPECS, "query": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
         {"mesh": MESH}, TypeError, "^query/kernel: expected a NamedSharding"),
        ({**PARAM_SPECS, "norm": P("model")}, {"mesh": MESH},
         ValueError, r"^norm \(16,\): .*'model'.* does not fit: .*not found in mesh"),
    ],
)  # fmt: skip
def test_wrong_shardings_are_refused(specs, options, error, message):
    with pytest.raises(error, match=message):
        opt_state_shardings(mini(), PARAMS, specs, **options)


def test_numbers_and_empty_trees_have_shardings():
    found = opt_state_shardings(adam_mini(1e-3), {"w": 1.0}, {"w": None}, mesh=MESH)
    assert same(found[0].mu["w"], P())
    assert same(opt_state_shardings(adam_mini(1e-3), {}, {}, mesh=MESH)[0].count, P())


def test_axes_that_do_not_divide_a_parameter_are_an_error():
    with pytest.raises(ValueError, match=r"^params \(16, 20\): .* does not fit"):
        opt_state_shardings(mini(), jnp.ones((16, 20)), P(None, ("fsdp", "tensor")), mesh=MESH)


# Explicit shardings.

EXPLICIT = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
INPUTS_AND_HEADS = BlockSpec(((0, None), (1, 6)))
QKV = fused(-1, [(8, per_head(2)), (8, per_head(2)), (8, per_neuron())])


EXPLICIT_SPECS = [
    per_head(6),
    per_head(3),
    per_head(4, axis=0),
    QKV,
    per_neuron(),
    outer(per_neuron(axis=0), per_neuron()),
    outer(INPUTS_AND_HEADS, per_neuron()),
    outer(per_neuron(axis=0), QKV),
]
QUICK = {None: (0, 2, 3, 5, 6), "int8": (7,)}  # by the numbers of the specs


@pytest.mark.parametrize(
    ("spec", "jitted", "mu_dtype"),
    [
        pytest.param(
            spec,
            jitted,
            mu_dtype,
            marks=[] if jitted and index in QUICK[mu_dtype] else pytest.mark.slow,
        )
        for jitted, mu_dtype in [(True, None), (True, "int8"), (False, None), (False, "int8")]
        for index, spec in enumerate(EXPLICIT_SPECS)
    ],
    ids=str,
)
def test_init_and_update_keep_explicit_shardings(spec, jitted, mu_dtype):
    x = jax.random.normal(jax.random.key(0), (16, 24))
    param = jax.device_put(x, NamedSharding(EXPLICIT, P("fsdp", "tensor")))
    tx = adam_mini(1e-3, block_specs=spec, mu_dtype=mu_dtype)
    wrap = jax.jit if jitted else lambda fn: fn
    with jax.set_mesh(EXPLICIT) if jitted else contextlib.nullcontext():
        state = wrap(tx.init)(param)
        updates, after = wrap(tx.update)(param, state, param)
    for leaf in jax.tree.leaves((state[0].mu, updates, after[0].mu)):
        assert jax.typeof(leaf).sharding.spec == P("fsdp", "tensor")
    types = lambda state: jax.tree.map(jax.typeof, state[0].nu)
    assert types(after) == types(state)
    expected, _ = tx.update(x, tx.init(x), x)
    # Sums in another order may move a moment past its random number, to the next code.
    differ = ~np.isclose(updates, expected, rtol=1e-6 if mu_dtype is None else 1e-5)
    assert differ.sum() <= (0 if mu_dtype is None else 1)


# Long sums, which are a loop on CPU, over an axis that is sharded and over one that is not.


@pytest.mark.parametrize(
    "kind", ["auto", *(pytest.param(k, marks=pytest.mark.slow) for k in ("explicit", "shard_map"))]
)
@pytest.mark.parametrize(
    "spec",
    [P("fsdp", "tensor"), pytest.param(P(None, ("tensor", "fsdp")), marks=pytest.mark.slow)],
)
def test_sums_over_a_long_axis_are_right_on_a_mesh(kind, spec):
    g = np.random.default_rng(0).standard_normal((2048, 8192), np.float32)
    mean = lambda g: per_neuron().block_mean(g, jnp.square)
    if kind == "shard_map":
        mesh, given, spec = EXPLICIT, P(), P()
        mean = jax.shard_map(mean, mesh=mesh, in_specs=P(), out_specs=P())
    else:
        mesh, given = (MESH if kind == "auto" else EXPLICIT), spec
    with jax.set_mesh(mesh):
        placed = jax.device_put(g, NamedSharding(mesh, given))
        compiled = jax.jit(mean).lower(placed).compile()
    is_looped = kind != "explicit" or spec[0] is None
    assert (" while(" in compiled.as_text()) == is_looped
    expected = np.mean(np.square(np.asarray(g, np.float64)), 0, keepdims=True)
    np.testing.assert_allclose(compiled(placed), expected, rtol=1e-5)


# Training on meshes.


@pytest.fixture(scope="module", params=["mean", pytest.param("outer", marks=pytest.mark.slow)])
def v(request):
    return request.param


@pytest.fixture(scope="module")
def on_one_device(v):
    losses, params = training.train_on_one_device(v)
    assert losses[-1] < losses[0] / 3
    return losses, params


def assert_same_training(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for name, value in expected[1].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[1][name] / scale, value / scale, atol=1e-5, err_msg=name)


MESHES = [
    {"fsdp": 4, "tensor": 2},
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize(
    ("axes", "axis_type"),
    [
        (MESHES[0], AxisType.Auto),
        *(
            pytest.param(axes, axis_type, marks=pytest.mark.slow)
            for axes in MESHES
            for axis_type in (AxisType.Auto, AxisType.Explicit)
            if (axes, axis_type) != (MESHES[0], AxisType.Auto)
        ),
    ],
    ids=str,
)
def test_training_is_the_same_on_every_mesh(axes, axis_type, on_one_device, v):
    mesh = training.make_mesh(axes, axis_type)
    assert math.prod(axes.values()) == 8
    assert_same_training(training.train_on_mesh(mesh, v), on_one_device)


@pytest.mark.slow
def test_training_is_the_same_in_shard_map(on_one_device, v):
    mesh = training.make_mesh({"data": 8})
    assert_same_training(training.train_by_shard_map(mesh, v), on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_training_is_the_same_in_several_processes(num_processes, on_one_device, v, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    output = tmp_path / "found.npz"
    command = [sys.executable, "-m", "tests.sharded_training", coordinator, str(num_processes)]
    processes = [
        subprocess.Popen([*command, str(index), "2", str(output), v], cwd=Path(__file__).parents[1],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in range(num_processes)
    ]  # fmt: skip
    for process in processes:
        log, _ = process.communicate(timeout=600)
        assert process.returncode == 0, log
    found = dict(np.load(output))
    assert_same_training((found.pop("losses"), found), on_one_device)


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes(on_one_device, v, tmp_path):
    """Five steps on each of several meshes, from a checkpoint of the one before."""
    tx, batches = training.make_tx(v), list(training.batches())
    abstract = jax.eval_shape(training.init_params)
    checkpointer = ocp.StandardCheckpointer()

    def part(size, steps, source, target):
        mesh = jax.make_mesh((size // 2 or 1, min(size, 2)), ("fsdp", "tensor"),
                             axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:size])  # fmt: skip
        of_params = {name: NamedSharding(mesh, spec) for name, spec in training.SPECS.items()}
        shardings = of_params, opt_state_shardings(tx, abstract, of_params)
        init = lambda: (params := training.init_params(), tx.init(params))
        if source is None:
            state = jax.jit(init, out_shardings=shardings)()
        else:
            placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                                  jax.eval_shape(init), shardings)  # fmt: skip
            state = checkpointer.restore(source, placed)
            assert jax.tree.map(lambda x: x.sharding, state) == shardings
        step = jax.jit(
            lambda *args: training.train_step(*args, tx=tx), out_shardings=(*shardings, None)
        )
        losses = []
        for tokens in steps:
            *state, loss = step(*state, tokens)
            losses.append(float(loss))
        checkpointer.save(target, tuple(state))
        checkpointer.wait_until_finished()
        return losses

    expected, _ = on_one_device
    found, source = [], None
    for index, devices in enumerate((8, 4, 1, 8)):
        target = tmp_path / str(index)
        steps = batches[5 * index : 5 * index + 5]
        found += part(devices, steps, source, target)
        source = target
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("v", "bound", "layers"),
    [
        pytest.param("mean", 0.502, None, marks=pytest.mark.slow),
        pytest.param("outer", 0.503, None, marks=pytest.mark.slow),
        ("outer", 0.503, 2),
    ],
)
def test_memory_on_each_device_is_half_of_adamws(v, bound, layers):
    config = Config(model="tinyllama-1b", v=v, layers=layers)
    _, params = abstract_model(config)
    mesh = training.make_mesh({"fsdp": 4, "tensor": 2})
    specs = jax.tree.map(lambda p: P(*[None] * (p.ndim - 2), "fsdp", "tensor")
                         if p.ndim > 1 else P(), params)  # fmt: skip
    bytes_of = {}
    mini = adam_mini(1e-3, block_specs=block_specs(config))
    for name, tx in (("adamw", optax.adamw(1e-3)), ("adam_mini", mini)):
        found = opt_state_shardings(tx, params, specs, mesh=mesh)
        state = jax.eval_shape(tx.init, params)
        bytes_of[name] = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
        )
    assert bytes_of["adam_mini"] < bound * bytes_of["adamw"]


@pytest.mark.skipif(
    "pinned_host" not in {m.kind for m in jax.devices()[0].addressable_memories()},
    reason="the backend has no pinned_host memory",
)
def test_the_state_may_be_in_host_memory():
    tx = mini()
    found = opt_state_shardings(tx, PARAMS, PARAM_SPECS, mesh=MESH)
    on_host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), found)
    state = jax.device_put(tx.init(PARAMS), on_host)
    assert state[0].mu["norm"].sharding.memory_kind == "pinned_host"

    def step(params, state):
        updates, state = tx.update(params, jax.device_put(state, found), params)
        return updates, jax.device_put(state, on_host)

    updates, state = jax.jit(step)(jax.device_put(PARAMS, NamedSharding(MESH, P())), state)
    assert state[0].mu["norm"].sharding.memory_kind == "pinned_host"
    expected, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_a_state_converted_to_adams_is_sharded_like_the_parameters():
    """`nu` would be whole on every device."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    of_params = {"w": NamedSharding(mesh, P("fsdp"))}
    params = jax.device_put({"w": jnp.ones((64, 16))}, of_params)
    tx = adam_mini(1e-3, block_specs=per_neuron())
    of_state = opt_state_shardings(tx, params, of_params)
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    found = to_adam_state(state, params, per_neuron())[0]
    for moment in (found.mu, found.nu):
        assert moment["w"].addressable_shards[0].data.shape == (8, 16)


def test_init_works_where_some_axes_of_the_mesh_are_manual():
    """As in pipelines: `jax.shard_map` with `axis_names`."""
    mesh = jax.make_mesh((4, 2), ("pp", "tp"), axis_types=(AxisType.Auto,) * 2)
    tx = adam_mini(1e-3, block_specs=per_element())
    update = lambda p: tx.update(p, tx.init(p), p)[0]
    params = jnp.ones((8, 4, 4))
    of_stages = jax.shard_map(
        update, mesh=mesh, in_specs=P("pp"), out_specs=P("pp"), axis_names={"pp"}
    )
    updates = jax.jit(of_stages)(params)
    np.testing.assert_allclose(updates, update(params), rtol=1e-6)


@pytest.mark.parametrize("make", [adam_mini, muon_mini])
def test_members_of_shard_map_train_in_8_bits(make):
    """Each device has a count of its own."""
    mesh = jax.make_mesh((8,), ("member",), axis_types=(AxisType.Auto,))
    params = jnp.ones((8, 4, 6)) * jnp.arange(1.0, 9)[:, None, None]
    tx = make(1e-2, mu_dtype=jnp.int8, block_specs=per_neuron())

    def train(p, state):
        def step(carry, _):
            updates, state = tx.update(carry[0], carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (p, state), length=2)[0][0]

    each = lambda *args: train(*jax.tree.map(lambda x: x[0], args))[None]
    mapped = jax.shard_map(each, mesh=mesh, in_specs=P("member"), out_specs=P("member"))
    args = params, jax.vmap(tx.init)(params)
    np.testing.assert_allclose(jax.jit(mapped)(*args), jax.jit(jax.vmap(train))(*args), rtol=1e-5)


def test_the_state_of_lookahead_is_sharded_as_the_fast_parameters():
    params = optax.LookaheadParams.init_synced({"kernel": jnp.ones((8, 4))})
    tx = optax.lookahead(adam_mini(1e-3, block_specs=per_neuron()), 3, 0.5)
    found = opt_state_shardings(tx, params, NamedSharding(MESH, P("fsdp")))
    assert optax.tree.get(found, "mu")["kernel"].spec[0] == "fsdp"


@pytest.mark.slow
def test_members_on_an_axis_of_an_explicit_mesh_are_rounded():
    mesh = jax.make_mesh((8,), ("seed",), axis_types=(AxisType.Explicit,))
    tx = adam_mini(1e-3, block_specs=per_neuron(), mu_dtype=jnp.int8)
    params = jnp.ones((8, 4, 4)) * jnp.arange(1.0, 9)[:, None, None]
    alone = jax.vmap(tx.update)(params, jax.vmap(tx.init)(params), params)[0]
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(params, P("seed"))
        state = jax.tree.map(lambda x: jax.device_put(x, P("seed")), jax.vmap(tx.init)(on_mesh))
        updates, _ = jax.jit(jax.vmap(tx.update))(on_mesh, state, on_mesh)
    np.testing.assert_allclose(updates, alone, rtol=1e-6)
