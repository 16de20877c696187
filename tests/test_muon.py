"""`muon_mini`: against `optax.contrib.muon`, and whatever is wrapped around it."""

import functools
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from examples.common.language import abstract_model, block_specs
from examples.gpt2.train import Config
from optax_adam_mini import (
    from_adam_state,
    infer_block_specs,
    infer_muon_dimension_numbers,
    muon_mini,
    opt_state_shardings,
    outer,
    per_element,
    per_neuron,
    per_tensor,
)
from optax_adam_mini.blocks import BlockSpec
from optax_adam_mini.quantized import RowCodes, read_row, write_row
from optax_adam_mini.random_bits import rounding_seed
from tests import sharded_training as training
from tests.params import slow_but

SHAPES = {"kernel": (8, 12), "heads": (3, 12, 2, 4), "conv": (3, 3, 2, 5), "table": (20, 8),
          "bias": (12,)}  # fmt: skip
NUMBERS = {
    "kernel": MuonDimensionNumbers(),
    "heads": MuonDimensionNumbers(1, (2, 3)),
    "conv": MuonDimensionNumbers((0, 1, -2), -1),
    "table": None,
    "bias": None,
}
MATRIX = outer(per_neuron(axis=0), per_neuron())
SPECS = {name: MATRIX if len(shape) == 2 else per_element() for name, shape in SHAPES.items()}
ours = functools.partial(muon_mini, muon_weight_dimension_numbers=NUMBERS)
theirs = functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=NUMBERS)
# A state in 8 bits has all that one in floats has, and codes: it is the one to test quickly.
IN_8_BITS_FIRST = [pytest.param(None, marks=pytest.mark.slow), "int8"]
mini = functools.partial(ours, 0.02, adam_learning_rate=4e-3, block_specs=SPECS)


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def gradients(params, step):
    """Of a quadratic, with noise."""
    rng = np.random.default_rng(1 + step)
    return jax.tree.map(lambda p: (p + rng.normal(size=p.shape)).astype(p.dtype), params)


def train(tx, params, steps, jit=True, state=None):
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update) if jit else tx.update
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def parts(state):
    """The state of Muon's part, and Adam-mini's."""
    return (state.inner_states[name].inner_state[0] for name in ("muon", "adam"))


# --- Against optax.contrib.muon ------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "heavy ball": {"nesterov": False, "beta": 0.9},
    "Moonlight's scale, decay, two rates": {
        "consistent_rms": 0.2, "weight_decay": 0.1, "adam_weight_decay": 0.2,
        "adam_learning_rate": 4e-3,
    },
    "a preset": {"ns_coeffs": "dion"},
    "adaptive": {"adaptive": True, "preconditioning": "aol", "ns_steps": 3},
    "mask": {"weight_decay": 0.1, "weight_decay_mask": lambda p: {k: k != "conv" for k in p}},
    "schedule": {"adam_b2": 0.95, "adam_eps_root": 1e-6, "eps": 1e-7},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", slow_but("Moonlight's scale, decay, two rates", "schedule", of=OPTIONS)
)
def test_muon_mini_per_element_equals_optax_contrib_muon(name):
    rate = optax.linear_schedule(0.05, 0.0, 40) if name == "schedule" else 0.02
    # At Adam's 0.999 Optax's 1 - b2**t has five digits fewer than ours.
    options = {"adam_b2": 0.95, "adam_learning_rate": 4e-3, **OPTIONS[name]}
    found, expected = (
        train(make(rate, **options, **more), make_params(), 50)[0]
        for make, more in ((ours, {"block_specs": per_element()}), (theirs, {}))
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not np.allclose(found["heads"], make_params()["heads"], atol=1e-2)


@pytest.mark.parametrize("given", ["none", "prefix", "function"])
def test_dimension_numbers_may_be_none_a_prefix_or_a_function(given):
    some = ("heads", "bias")
    params = {"a": {name: make_params()[name] for name in some}, "b": jnp.ones((4, 6))}
    numbers = {"a": {name: NUMBERS[name] for name in some}, "b": MuonDimensionNumbers()}
    if given == "none":
        numbers, params = None, {"a": jnp.ones((4, 6)), "b": jnp.ones((3, 4, 5))}
    elif given == "prefix":
        numbers, params = {"a": None, "b": MuonDimensionNumbers()}, params
    make = {"function": lambda p: numbers}.get(given, numbers)
    found, expected = (
        train(f(0.02, muon_weight_dimension_numbers=make, **more), params, 3)[0]
        for f, more in (
            (muon_mini, {"block_specs": per_element()}),
            (optax.contrib.muon, {}),
        )
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_muon_run_switches_to_muon_mini():
    """Adam's second moment becomes Adam-mini's, and nothing else in the state changes."""
    params, state = train(theirs(0.02), make_params(), 5)
    tx = mini()
    switched = from_adam_state(state, params, SPECS)
    assert jax.tree.structure(switched) == jax.tree.structure(tx.init(params))
    muon, adam = parts(switched)
    chex.assert_trees_all_equal(muon, next(parts(state)))
    np.testing.assert_allclose(
        adam.nu.b["table"], list(parts(state))[1].nu["table"].mean(0, keepdims=True), rtol=1e-5
    )
    found, expected = (
        jax.jit(t.update)(gradients(params, 5), s, params)[0]
        for t, s in ((ours(0.02, block_specs=SPECS), switched), (theirs(0.02), state))
    )
    chex.assert_trees_all_close(found["heads"], expected["heads"], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(found["bias"], expected["bias"], rtol=1e-3)


# --- Adam-mini's part ----------------------------------------------------------------------------


def test_muon_mini_takes_specs_and_a_decay_mask_of_the_whole_tree():
    mask = {name: name == "table" for name in SHAPES}
    tx = mini(adam_weight_decay=0.5, weight_decay=0.5, weight_decay_mask=mask)
    params = make_params()
    muon, adam = parts(tx.init(params))
    assert adam.nu.a["table"].shape == (20, 1)
    assert {name for name in SHAPES if jax.tree.leaves(muon.mu[name])} == {
        "kernel", "heads", "conv",
    }  # fmt: skip
    plain, _ = train(mini(), params, 1)
    decayed, _ = train(tx, params, 1)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), plain, decayed)
    assert moved == {name: name == "table" for name in SHAPES}


@pytest.mark.slow
@pytest.mark.parametrize("mu_dtype", [None, jnp.int8, jnp.float32])
def test_updates_of_bfloat16_parameters_are_close_to_float32(mu_dtype):
    params = make_params(jnp.bfloat16)
    tx = mini(mu_dtype=mu_dtype, weight_decay=0.1)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(gradients(params, 0), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), (params, gradients(params, 0)))
    expected, _ = jax.jit(tx.update)(wide[1], tx.init(wide[0]), wide[0])
    chex.assert_trees_all_close(
        jax.tree.map(lambda u: u.astype(jnp.float32), updates), expected, rtol=1e-2, atol=2e-4
    )


# --- What is wrapped around it -------------------------------------------------------------------

WRAPPERS = {
    "clip": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {name: name != "conv" for name in SHAPES}),
    "partition": lambda tx: optax.partition(
        {"train": tx, "freeze": optax.set_to_zero()},
        {name: "freeze" if name in ("conv", "bias") else "train" for name in SHAPES},
    ),
    "if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("name", slow_but("multi_steps", of=WRAPPERS))
def test_wrapped_muon_mini_equals_wrapped_optax_contrib_muon(name):
    found, expected = (
        train(WRAPPERS[name](make(0.02, **more)), make_params(), 5)[0]
        for make, more in ((ours, {"block_specs": per_element()}), (theirs, {}))
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


STATIC = ("ns_steps", "ns_coeffs", "muon_weight_dimension_numbers", "block_specs", "mu_dtype")


@pytest.mark.parametrize("mu_dtype", IN_8_BITS_FIRST)
def test_injected_hyperparameters_take_effect(mu_dtype):
    inject = optax.inject_hyperparams(ours, static_args=STATIC)
    rate = optax.linear_schedule(0.05, 0.0, 40)
    tx = inject(rate, adam_learning_rate=4e-3, block_specs=SPECS, mu_dtype=mu_dtype)
    params, state = train(tx, make_params(), 3)
    plain = ours(rate, adam_learning_rate=4e-3, block_specs=SPECS, mu_dtype=mu_dtype)
    chex.assert_trees_all_close(params, train(plain, make_params(), 3)[0], rtol=1e-4, atol=1e-4)
    state.hyperparams["adam_learning_rate"] = jnp.float32(0.0)
    updates, _ = jax.jit(tx.update)(gradients(params, 3), state, params)
    assert not np.any(updates["table"])
    assert np.any(updates["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_jit_and_eager_updates_agree(mu_dtype):
    # Without `jax.jit` each operation is compiled for each shape: one leaf of each kind.
    some = ("heads", "table", "bias")
    params, numbers, specs = (
        {name: tree[name] for name in some} for tree in (make_params(), NUMBERS, SPECS)
    )
    tx = mini(muon_weight_dimension_numbers=numbers, block_specs=specs, mu_dtype=mu_dtype)
    jitted, eager = (train(tx, params, 4, jit)[0] for jit in (True, False))
    chex.assert_trees_all_close(jitted, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mu_dtype", IN_8_BITS_FIRST)
def test_the_state_goes_through_map_params_and_a_checkpoint(mu_dtype, tmp_path):
    tx = mini(mu_dtype=mu_dtype)
    params, state = train(tx, make_params(), 3)
    seen = []
    mapped = optax.tree.map_params(tx, lambda x: seen.append(x.shape) or -x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert seen.count(SHAPES["conv"]) == 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(*(train(tx, params, 2, state=s)[0] for s in (restored, state)))


# --- On meshes -----------------------------------------------------------------------------------


def test_updates_in_8_bits_are_the_same_on_8_devices():
    some = {"kernel": P("fsdp", "tensor"), "table": P("tensor", "fsdp"), "bias": P("tensor")}
    params, numbers, specs = (
        {name: tree[name] for name in some} for tree in (make_params(), NUMBERS, SPECS)
    )
    tx = mini(muon_weight_dimension_numbers=numbers, block_specs=specs, mu_dtype="int8")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    of_params = {name: NamedSharding(mesh, spec) for name, spec in some.items()}
    of_state = opt_state_shardings(tx, params, of_params)
    alone = jax.jit(tx.update)
    sharded = jax.jit(
        tx.update,
        in_shardings=(of_params, of_state, of_params),
        out_shardings=(of_params, of_state),
    )
    one = many = tx.init(params)
    for step in range(2):
        grads = gradients(params, step)
        expected, one = alone(grads, one, params)
        found, many = sharded(
            *jax.device_put((grads, many, params), (of_params, of_state, of_params))
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)
    muon, sharded_muon = (next(parts(state)).mu for state in (one, many))
    assert sharded_muon.codes["kernel"].sharding.spec == P("fsdp", "tensor")
    chex.assert_trees_all_equal(jax.device_get(sharded_muon), jax.device_get(muon))


@pytest.mark.slow
@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_training_on_8_devices_equals_one_device(mu_dtype):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    of_params = {name: NamedSharding(mesh, spec) for name, spec in training.SPECS.items()}
    params, tokens = training.init_params(), jax.ShapeDtypeStruct((16, 9), "int32")
    tx = muon_mini(
        0.02,
        adam_learning_rate=4e-3,
        weight_decay=0.1,
        mu_dtype=mu_dtype,
        muon_weight_dimension_numbers=infer_muon_dimension_numbers(
            training.loss_fn, params, tokens
        ),
        block_specs=infer_block_specs(training.loss_fn, params, tokens, v="outer"),
    )
    of_state = opt_state_shardings(tx, params, of_params)
    muon = of_state.inner_states["muon"].inner_state[0].mu
    codes = muon if mu_dtype is None else muon.codes
    assert codes["qkv"].spec == P("fsdp", "tensor")
    if mu_dtype is not None:
        assert muon.largest["qkv"].spec == P("fsdp", None)
    step = functools.partial(training.train_step, tx=tx)
    sharded = jax.jit(
        step,
        in_shardings=(of_params, of_state, NamedSharding(mesh, P("fsdp"))),
        out_shardings=(of_params, of_state, NamedSharding(mesh, P())),
    )
    alone = jax.jit(step)
    one = params, tx.init(params)
    many = jax.device_put(one, (of_params, of_state))
    for tokens in list(training.batches())[:8]:
        *one, expected = alone(*one, tokens)
        *many, found = sharded(*many, tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- Parts of fused kernels ----------------------------------------------------------------------

# Shape, numbers, sizes of the parts along axes of outputs: unequal parts, parts along two axes, a
# stack of layers, outputs before inputs.
FUSED = {
    "qkv": ((8, 20), MuonDimensionNumbers(), {1: (8, 4, 8)}),
    "two axes": ((8, 4, 6), MuonDimensionNumbers(0, (1, 2)), {1: (2, 2), 2: (5, 1)}),
    "stacked": ((3, 8, 12), MuonDimensionNumbers(1, 2), {2: (6, 6)}),
    "outputs first": ((2, 8, 6), MuonDimensionNumbers(-2, (0, 2)), {0: (1, 1)}),
}


def of_parts(shape, numbers, parts):
    """A row for each input in every part."""
    inputs, outputs = (np.atleast_1d(axes).tolist() for axes in numbers)
    others = [
        a for a in range(len(shape)) if a not in {axis % len(shape) for axis in (*inputs, *outputs)}
    ]
    cuts = [(axis, tuple((n, per_tensor()) for n in sizes)) for axis, sizes in parts.items()]
    rows = BlockSpec((*((axis, None) for axis in inputs), *cuts))
    return outer(rows, per_neuron(axis=outputs), stacked=others)


def apart(x, parts):
    pieces = [x]
    for axis, sizes in parts.items():
        at = np.cumsum(sizes)[:-1].tolist()
        pieces = [part for piece in pieces for part in jnp.split(piece, at, axis)]
    return pieces


@pytest.mark.parametrize("name", slow_but("stacked", of=FUSED))
def test_each_part_of_a_fused_kernel_is_a_matrix_of_its_own(name):
    shape, numbers, parts = FUSED[name]
    make = functools.partial(muon_mini, 0.02, weight_decay=0.1,
                             muon_weight_dimension_numbers=numbers)  # fmt: skip
    specs = of_parts(shape, numbers, parts)
    tx, whole, alone = make(parts=True, block_specs=specs), make(block_specs=specs), make()
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    each = {"w": apart(params["w"], parts)}
    state, state_of_each = tx.init(params), alone.init(each)
    like = whole.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    for step in range(3):
        grads = gradients(params, step)
        updates, state = jax.jit(tx.update)(grads, state, params)
        expected, state_of_each = jax.jit(alone.update)(
            {"w": apart(grads["w"], parts)}, state_of_each, each
        )
        chex.assert_trees_all_close(apart(updates["w"], parts), expected["w"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    found, other = (t.update(grads, like, params)[0]["w"] for t in (tx, whole))
    assert not np.allclose(found, other, rtol=1e-2)


def test_query_key_and_value_in_one_kernel_are_three_matrices():
    """With dimension numbers and specs inferred from a model, and the momentum in 8 bits."""
    width = 16
    params = {"qkv": jax.random.normal(jax.random.key(0), (width, 3 * width)),
              "out": jnp.eye(width), "head": jnp.ones((width, 5))}  # fmt: skip

    def loss_fn(params, x):
        q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
        x = jax.nn.softmax(q @ k.T) @ v @ params["out"]
        return jnp.mean(jnp.square(x @ params["head"]))

    x = jax.random.normal(jax.random.key(1), (7, width))
    grads = gradients(params, 0)
    made = (infer_muon_dimension_numbers(loss_fn, params, x), infer_block_specs(loss_fn, params, x))
    make = functools.partial(muon_mini, 1.0, ns_steps=12, mu_dtype=jnp.int8,
                             muon_weight_dimension_numbers=made[0], block_specs=made[1])  # fmt: skip
    tx, whole = make(parts=True), make()
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, whole.init(params))
    updates, state = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, whole.init(params))
    for part in jnp.split(updates["qkv"], 3, axis=-1):  # about orthogonal, each by itself
        values = np.linalg.svd(part, compute_uv=False)
        assert values.min() > 0.6
        assert values.max() < 1.3
    whole_updates, _ = jax.jit(whole.update)(grads, state, params)
    values = [
        np.linalg.svd(part, compute_uv=False) for part in jnp.split(whole_updates["qkv"], 3, -1)
    ]
    assert np.min(values) < 0.5


def test_parts_need_specs_with_rows():
    tx = ours(0.02, parts=True, block_specs=per_neuron())
    with pytest.raises(ValueError, match="parts=True splits a kernel"):
        tx.init(make_params())
    with pytest.raises(ValueError, match="parts=True splits a kernel"):
        ours(0.02, parts=True).init(make_params())
    with pytest.raises(TypeError, match="parts"):
        ours(0.02, parts="heads")


# --- 8 bits --------------------------------------------------------------------------------------


def test_codes_round_to_a_neighbour_and_are_right_on_average():
    rng = np.random.default_rng(0)
    m = np.float32(rng.normal(size=(4, 50)) * np.exp(3 * rng.normal(size=(4, 50))))
    m[0] = 0.0
    m[1, 3] = 0.0
    top = np.abs(m).max(1, keepdims=True)
    codes, largest = jax.jit(jax.vmap(lambda step: write_row(m, (1,), rounding_seed(step, 7))))(
        jnp.arange(4000)
    )
    assert largest.dtype == jnp.bfloat16
    largest = np.asarray(largest, np.float32)
    assert (largest[0] >= top).all()
    assert (largest[0] <= 1.008 * top).all()
    top = largest[0]
    # The numbers that the codes stand for, in NumPy and float64.
    table = np.sign(np.arange(-127, 128)) * np.arange(-127.0, 128.0) ** 2 / 127**2
    values = table[np.asarray(codes, int) + 127] * top
    step = np.diff(table)[np.clip(np.searchsorted(table, m / np.maximum(top, 1e-30)), 1, 254) - 1]
    assert np.all(np.abs(values - m) <= (step * top) * (1 + 1e-3))
    error = np.abs(values.mean(0) - m) / np.maximum(step * top, 1e-30)
    assert error.max() < 5 * 0.5 / np.sqrt(4000)
    np.testing.assert_allclose(read_row(codes[0], largest[0]), values[0], rtol=1e-6)


@pytest.mark.slow
def test_codes_keep_nan_infinity_and_zeros():
    for bad in (np.nan, np.inf):
        m = jnp.ones((2, 5)).at[0, 2].set(bad)
        read = read_row(*write_row(m, (1,), rounding_seed(1, 0)))
        assert not np.isfinite(read[0]).all()
        np.testing.assert_allclose(read[1], 1.0, rtol=0.02)
    assert not np.any(read_row(*write_row(jnp.full((2, 5), 1e-40), (1,), rounding_seed(1, 0))))


def test_codes_of_the_momentum_have_no_derivative():
    loss = lambda m: read_row(*write_row(m, (1,), rounding_seed(1, 0))).sum()
    with pytest.raises(TypeError, match=r"have no derivative: .*mu_dtype=None"):
        jax.grad(loss)(jnp.ones((2, 5)))


def error_of_updates(scales, signal, steps=100, last=20):
    """Root of the mean square, of the updates', against momentum in float32."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros(scales.shape)}
    exact, coded = (muon_mini(1.0, mu_dtype=dtype) for dtype in (None, jnp.int8))

    @jax.jit
    def step(states, g):
        pairs = [
            tx.update({"w": g}, s, params) for tx, s in zip((exact, coded), states, strict=True)
        ]
        a, b = (u["w"] for u, _ in pairs)
        return [s for _, s in pairs], jnp.sum((a - b) ** 2) / jnp.sum(a**2)

    states, found = [tx.init(params) for tx in (exact, coded)], []
    for _ in range(steps):
        g = signal + scales * rng.normal(size=scales.shape)
        states, error = step(states, jnp.asarray(g, jnp.float32))
        found.append(error)
    return float(np.sqrt(np.mean(found[-last:])))


def test_updates_in_8_bits_are_close_to_those_in_float32():
    """After Newton-Schulz, for momenta whose entries or rows differ much in size, and of low rank."""
    rng = np.random.default_rng(1)
    shape = (64, 256)
    ones, spread = np.ones(shape), np.exp(1.5 * rng.normal(size=shape))
    assert 0.01 < error_of_updates(ones, 0.0) < 0.045
    assert error_of_updates(spread, 0.0) < 0.055
    assert error_of_updates(np.exp(1.5 * rng.normal(size=(64, 1))) * ones, 0.0) < 0.045
    assert error_of_updates(ones, rng.normal(size=(64, 4)) @ rng.normal(size=(4, 256))) < 0.35


def test_the_state_in_8_bits_is_an_eighth_of_adamws():
    config = Config(model="gpt2")
    _, params = abstract_model(config)
    numbers = jax.tree.map(lambda p: MuonDimensionNumbers() if p.ndim == 2 else None, params)
    tx = muon_mini(
        0.02, mu_dtype=jnp.int8, muon_weight_dimension_numbers=numbers,
        block_specs=block_specs(config),
    )  # fmt: skip
    size = lambda tx: sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params))
    )
    assert size(tx) <= 0.128 * size(optax.adamw(1e-3))


def test_a_state_of_another_mu_dtype_is_refused():
    params = {"kernel": jnp.ones((3, 4))}  # nothing for Adam-mini, which refuses as well
    for one, other in ((None, "int8"), ("int8", None)):
        state = muon_mini(0.02, mu_dtype=one).init(params)
        with pytest.raises(ValueError, match="pass the mu_dtype that the state was made with"):
            muon_mini(0.02, mu_dtype=other).update(params, state, params)
    assert isinstance(next(parts(muon_mini(0.02, mu_dtype="int8").init(params))).mu, RowCodes)


@pytest.mark.parametrize("ns_coeffs", ["dion", jnp.array([3.4445, -4.7750, 2.0315])])
def test_a_donated_state_leaves_others_their_coefficients(ns_coeffs):
    params = {"w": jnp.ones((4, 6)), "bias": jnp.zeros(6)}
    tx = muon_mini(0.02, ns_coeffs)
    step = jax.jit(tx.update, donate_argnums=1)
    first, second = tx.init(params), tx.init(params)
    for state in (first, second, tx.init(params)):
        updates, _ = step(params, state, params)
        chex.assert_tree_all_finite(updates)


# --- What is refused -----------------------------------------------------------------------------

WRONG = {
    "a rate that is none": ({"learning_rate": -1.0}, ValueError, "learning_rate must be"),
    "beta": ({"beta": 1.0}, ValueError, r"beta must be in \[0, 1\), got 1.0"),
    "Adam's decay": ({"adam_b2": 1.5}, ValueError, r"^adam_b2 must be in \[0, 1\), got 1.5"),
    "steps": ({"ns_steps": 0}, ValueError, "ns_steps must be at least 1, got 0"),
    "traced steps": ({"ns_steps": jnp.int32(5)}, TypeError, r'static_args=\("ns_steps"'),
    "coefficients": ({"ns_coeffs": (1.0, 2.0)}, ValueError, "ns_coeffs must be three numbers"),
    "too many coefficients": ({"ns_coeffs": "dion", "ns_steps": 3}, ValueError, "5 steps, and"),
    "a preset": ({"ns_coeffs": "newton"}, ValueError, "newton"),
    "no coefficients": ({"ns_coeffs": np.ones((0, 3))}, ValueError, "must be three numbers"),
    "words": ({"ns_coeffs": ("a", "b", "c")}, ValueError, "ns_coeffs must be three numbers"),
    "a NaN": ({"ns_coeffs": (np.nan, 1.0, 1.0)}, ValueError, "ns_coeffs must be finite"),
    "preconditioning": ({"preconditioning": "l2"}, ValueError, "must be one of .*got 'l2'"),
    "dtype": ({"mu_dtype": "int16"}, TypeError, "mu_dtype must be a floating-point dtype or"),
    "mask": ({"weight_decay_mask": {"kernel": 1}}, TypeError, "mask at kernel: expected True"),
    "scale": ({"consistent_rms": -0.2}, ValueError, "consistent_rms must be at least 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_hyperparameters_are_refused(name):
    given, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        muon_mini(**{"learning_rate": 0.02, **given})


D = MuonDimensionNumbers
WRONG_NUMBERS = {
    "missing": ({"kernel": D()}, ValueError, "must have the structure .*: no entry for bias, conv"),
    "surplus": ({**NUMBERS, "kernle": D()}, ValueError, "no parameter for the entry at kernle"),
    "no numbers": ({**NUMBERS, "kernel": (0, 1)}, TypeError, "kernel/0: expected .*got 0 of type"),
    "no such axis": ({**NUMBERS, "kernel": D(0, 2)}, ValueError, r"kernel \(8, 12\): .*not fit"),
    "an axis twice": ({**NUMBERS, "kernel": D(1, -1)}, ValueError, r"kernel \(8, 12\): .*each once"),
    "no inputs": ({**NUMBERS, "kernel": D((), 1)}, ValueError, r"kernel \(8, 12\): .*not fit"),
    "a vector": ({**NUMBERS, "bias": D()}, ValueError, r"bias \(12,\): .*give None"),
    "nothing returned": (lambda p: None, TypeError, "the function returned None"),
}  # fmt: skip


@pytest.mark.slow
def test_a_function_of_dimension_numbers_is_called_once_and_not_at_every_step():
    """It may trace the loss, as `infer_muon_dimension_numbers` does."""
    params, calls = make_params(), []

    def numbers(params):
        calls.append(params)
        return NUMBERS

    tx = muon_mini(0.02, muon_weight_dimension_numbers=numbers, block_specs=per_element())
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert len(calls) == 1


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_init_refuses_wrong_dimension_numbers(name):
    numbers, error, message = WRONG_NUMBERS[name]
    tx = muon_mini(0.02, muon_weight_dimension_numbers=numbers)
    with pytest.raises(error, match=message):
        tx.init(make_params())


def test_wrong_gradients_are_refused_with_their_path():
    params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
    tx = muon_mini(1e-2, block_specs=per_element())
    state = tx.init(params)
    with pytest.raises(ValueError, match="got a state in the place of the gradients"):
        tx.update(state, params, params)
    with pytest.raises(ValueError, match=r"kernel: got a gradient of shape \(8, 4\), .*\(4, 8\)"):
        tx.update({**params, "kernel": jnp.ones((8, 4))}, state, params)
    with pytest.raises(ValueError, match="got nothing for bias"):
        tx.update({"kernel": params["kernel"]}, state, params)
    with pytest.raises(ValueError, match="adam_learning_rate must be at least 0, got -1"):
        muon_mini(1e-2, adam_learning_rate=-1.0)


def test_a_missing_gradient_is_refused():
    tx, params = mini(), make_params()
    state = tx.init(params)
    for name in ("kernel", "bias"):  # of either part
        with pytest.raises(ValueError, match=f"the gradients at {name} are None, .*: pass zeros"):
            tx.update({**params, name: None}, state, params)
    nested = {"layer": params, "w": jnp.ones((3, 4))}
    tx = muon_mini(0.02, block_specs=per_element())
    with pytest.raises(ValueError, match="got nothing for layer/bias, layer/conv"):
        tx.update({"layer": None, "w": nested["w"]}, tx.init(nested), nested)


@pytest.mark.slow
@pytest.mark.parametrize("mu_dtype", [None, "int8"])
def test_a_parameter_that_is_none_needs_no_gradient(mu_dtype):
    params = {**make_params(), "kernel": None, "bias": None}
    tx = mini(weight_decay=0.1, mu_dtype=mu_dtype)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["kernel"] is updates["bias"] is None
    assert np.any(updates["conv"])
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_integers_do_not_move_and_complex_parameters_are_refused():
    params = {"w": jnp.ones((3, 4)), "indices": jnp.ones((3, 4), jnp.int32)}
    tx = muon_mini(0.02, block_specs=per_element())
    updates, _ = tx.update(params, tx.init(params), params)
    assert not np.any(updates["indices"])
    complex_params = {"w": jnp.ones((3, 4), jnp.complex64)}
    with pytest.raises(TypeError, match="w: mu_dtype=int8 keeps real numbers"):
        muon_mini(0.02, mu_dtype="int8").init(complex_params)


# --- Dtypes and states that do not fit -----------------------------------------------------------


@pytest.mark.parametrize("parts", [False, True])
def test_label_functions_get_the_parameters_and_not_the_gradients(parts):
    """A label function that reads dtypes would see those of bfloat16 gradients."""
    of_wide = lambda one, other: (
        lambda p: jax.tree.map(
            lambda x: one if x.ndim == 2 and x.dtype == jnp.float32 else other, p
        )
    )
    cut = outer(BlockSpec(((0, None), (-1, 2))), per_neuron())
    make = lambda: muon_mini(
        0.02,
        parts=parts,
        muon_weight_dimension_numbers=of_wide(MuonDimensionNumbers(), None),
        block_specs=of_wide(cut, per_element()),
    )
    params = {"w": jax.random.normal(jax.random.key(0), (8, 16)), "b": jnp.ones(16)}
    grads = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    as_wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    state = make().init(params)  # of another, as after a restart
    found, expected = (make().update(g, state, params)[0] for g in (grads, as_wide))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("parts", [False, True])
def test_label_functions_get_all_parameters(parts):
    """A function that traces the loss needs all; each half of the optimizer has only its own."""
    params, x = {"w": jnp.ones((8, 16)), "head": jnp.ones((16, 3)), "b": jnp.ones(3)}, jnp.ones(8)
    loss = lambda p, x: jnp.sum((jnp.tanh(x @ p["w"]) @ p["head"] + p["b"]) ** 2)
    calls = []
    specs = lambda p: calls.append(p) or infer_block_specs(loss, p, x, v="outer")
    numbers = lambda p: infer_muon_dimension_numbers(loss, p, x)
    found, expected = (
        train(
            muon_mini(0.02, parts=parts, block_specs=s, muon_weight_dimension_numbers=n),
            params,
            2,
            jit=False,
        )
        for s, n in ((specs, numbers), (specs(params), numbers(params)))
    )
    chex.assert_trees_all_equal(found, expected)
    assert len(calls) == 2  # once for the tree, and once above


def test_a_mask_function_gets_all_parameters():
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6), "scale": jnp.ones(4)}
    largest = lambda p: {name: x.size == max(map(jnp.size, p.values())) for name, x in p.items()}
    tx = muon_mini(0.1, weight_decay=0.5, adam_weight_decay=0.5, weight_decay_mask=largest,
                   block_specs=per_element())  # fmt: skip
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert jax.tree.map(np.any, updates) == {"kernel": True, "bias": False, "scale": False}


def test_injected_numbers_of_16_bits_are_widened():
    static = ("ns_steps", "ns_coeffs", "mu_dtype")
    inject = optax.inject_hyperparams(muon_mini, static, hyperparam_dtype=jnp.bfloat16)
    params, g = {"w": jnp.zeros((8, 12))}, {"w": jax.random.normal(jax.random.key(0), (8, 12))}
    tx = inject(1e-2, adam_b2=0.95, adaptive=True)
    state = tx.init(params)
    value = lambda name: float(state.hyperparams[name])
    plain = muon_mini(value("learning_rate"), beta=value("beta"), adaptive=True)
    found, expected = tx.update(g, state, params), plain.update(g, plain.init(params), params)
    np.testing.assert_allclose(found[0]["w"], expected[0]["w"], rtol=1e-3)


def test_axes_may_be_numpys_integers():
    """Optax takes Python's alone."""
    numbers = MuonDimensionNumbers(np.int64(1), (2, np.int64(3)))
    tx = muon_mini(0.1, muon_weight_dimension_numbers=numbers)
    w = jnp.ones((3, 12, 2, 4))
    assert jnp.isfinite(tx.update(w, tx.init(w))[0]).all()


def test_a_momentum_in_float16_stays_finite():
    tx, params = muon_mini(0.1, mu_dtype=jnp.float16), jnp.zeros((4, 6))
    _, state = tx.update(jnp.full((4, 6), 3e6), tx.init(params))
    updates, _ = tx.update(jnp.ones((4, 6)), state)
    assert jnp.isfinite(updates).all()


def test_codes_of_other_dimension_numbers_are_refused():
    """Of a square matrix the codes fit, and the largest entries of its rows do not."""
    make = lambda *axes: muon_mini(
        0.1, mu_dtype="int8", muon_weight_dimension_numbers=MuonDimensionNumbers(*axes)
    )
    w = jnp.ones((8, 8))
    with pytest.raises(
        ValueError, match="the state's momentum does not fit the matrices at params"
    ):
        make(1, 0).update(w, make(0, 1).init(w))


@pytest.mark.slow
def test_dimension_numbers_in_an_equinox_or_nnx_model_are_not_called():
    """Such a tree is callable, as the model is."""

    class Net(eqx.Module):
        w: Any
        b: Any

        def __call__(self, x):
            return x @ self.w + self.b

    net, x = Net(jnp.ones((4, 5)), jnp.ones(5)), jnp.ones((2, 4))
    grads = eqx.filter_grad(lambda net: jnp.mean(net(x) ** 2))(net)
    tx = muon_mini(
        0.02,
        weight_decay=0.1,
        weight_decay_mask=Net(True, False),
        muon_weight_dimension_numbers=Net(MuonDimensionNumbers(), None),
        block_specs=Net(per_element(), per_element()),
    )
    updates, _ = tx.update(grads, tx.init(net), net)
    assert np.any(updates.w)
    without = muon_mini(
        0.02, muon_weight_dimension_numbers=Net(None, None), block_specs=per_element()
    )
    assert np.any(without.update(grads, without.init(net), net)[0].w)
    with pytest.raises(TypeError, match=r"b: expected an array, got <.*eqx.filter"):
        without.init(Net(jnp.ones((4, 5)), jax.nn.relu))
    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    loss = lambda model, x: jnp.mean(jnp.tanh(model(x)) ** 2)
    tx = muon_mini(
        0.02,
        muon_weight_dimension_numbers=infer_muon_dimension_numbers(loss, model, x),
        block_specs=per_element(),
    )
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, nnx.grad(loss)(model, x))


@pytest.mark.slow
def test_a_restored_state_of_numpy_arrays_gives_the_same_bits():
    """Flax's msgpack gives such.

    Without `jax.jit`, Optax's coefficients are constants of its loop if they are NumPy arrays, and
    arguments otherwise. XLA compiles these two programs differently, so the updates differ in their last bits.
    """
    tx, params = mini(mu_dtype="int8"), make_params()
    params, state = train(tx, params, 3)
    grads, restored = gradients(params, 3), jax.tree.map(np.asarray, state)
    update = jax.jit(tx.update)
    chex.assert_trees_all_equal(update(grads, restored, params), update(grads, state, params))
    found, expected = (tx.update(grads, each, params) for each in (restored, state))
    chex.assert_trees_all_equal(found[1], expected[1])
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-3)


def test_the_momentum_is_cast_to_a_new_mu_dtype():
    params = make_params()
    state = mini(mu_dtype=jnp.bfloat16).init(params)
    _, state = mini().update(gradients(params, 0), state, params)
    for part in parts(state):
        assert {m.dtype for m in jax.tree.leaves(part.mu)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("mu_dtype", "cast_to"), [(None, "int8"), ("int8", "float32")])
def test_a_momentum_that_was_cast_is_refused(mu_dtype, cast_to):
    params = {"w": jnp.ones((3, 4))}
    tx = muon_mini(0.02, mu_dtype=mu_dtype, block_specs=per_element())
    is_momentum = lambda x: x.shape == (3, 4)
    cast = lambda x: x.astype(cast_to) if is_momentum(x) else x
    with pytest.raises(ValueError, match="w: the state's mu"):
        tx.update(params, jax.tree.map(cast, tx.init(params)), params)


def test_a_state_that_does_not_fit_is_refused_by_name():
    params = make_params()
    grads, tx = gradients(params, 0), mini()
    for state in (optax.adamw(1.0).init(params), params):
        with pytest.raises(ValueError, match="muon_mini: expected the PartitionState"):
            tx.update(grads, state, params)
    other = muon_mini(0.02, muon_weight_dimension_numbers={**NUMBERS, "conv": None},
                      block_specs=SPECS)  # fmt: skip
    with pytest.raises(ValueError, match=r"momentum does not fit the matrices at conv"):
        tx.update(grads, other.init(params), params)
    with pytest.raises(TypeError, match=r"kernel: expected a matrix of floating-point numbers"):
        tx.init({**params, "kernel": jnp.ones((8, 12), jnp.int32)})


def test_a_mask_function_may_return_a_prefix():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    for mask, expected in ((lambda _: True, -0.5), (lambda _: False, 0.0)):
        tx = muon_mini(1.0, weight_decay=0.5, adam_weight_decay=0.5, weight_decay_mask=mask,
                       block_specs=per_element())  # fmt: skip
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        for update in jax.tree.leaves(updates):
            np.testing.assert_array_equal(update, expected)


def test_mask_functions_see_parameters_after_a_restart():
    def make():
        mask = lambda p: jax.tree.map(lambda x: isinstance(x, jax.Array) and x.ndim > 1, p)
        return muon_mini(1.0, weight_decay=0.5, weight_decay_mask=mask, block_specs=per_element())

    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
    updates, _ = make().update(jax.tree.map(jnp.zeros_like, params), make().init(params), params)
    np.testing.assert_array_equal(updates["w"], -0.5)


def test_the_default_label_function_sees_biases_that_are_matrices():
    params = {"dense": {"kernel": jnp.ones((8, 4, 2)), "bias": jnp.ones((4, 2))}}
    state = muon_mini(1e-3).init(params)
    nu = state.inner_states["adam"].inner_state[0].nu
    assert nu["dense"]["kernel"].shape == (1, 4, 2)


def test_rows_in_8_bits_are_sharded_as_update_leaves_them():
    mesh = jax.make_mesh((4,), ("layers",), axis_types=(AxisType.Explicit,))
    kernel = jax.device_put(jnp.ones((4, 3, 5)), NamedSharding(mesh, P("layers")))
    tx = muon_mini(1e-3, mu_dtype=jnp.int8, muon_weight_dimension_numbers=MuonDimensionNumbers(1, 2),
                   block_specs=per_element())  # fmt: skip
    with jax.set_mesh(mesh):
        params = {"w": kernel}
        step = lambda s, _: (tx.update(params, s, params)[1], None)
        state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=2))(tx.init(params))
    largest = state.inner_states["muon"].inner_state[0].mu.largest["w"]
    assert largest.sharding.spec[0] == "layers"
