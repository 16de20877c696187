"""The first moment in 8 bits: against its code in NumPy, closed forms, and a moment in float32."""

import functools
import inspect
import pathlib
import re

import chex
import equinox as eqx
import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adam_mini import (
    BlockSpec,
    adam_mini,
    block_table,
    by_path,
    flax_layers,
    from_adam_state,
    fused,
    opt_state_shardings,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
    scale_by_adam_mini,
    to_adam_state,
)
from optax_adam_mini.product import Outer
from optax_adam_mini.quantized import Codes, allowed_b2, read, write
from optax_adam_mini.random_bits import rounding_seed, salt_of
from tests import numpy_adam_mini
from tests.params import slow_but
from tests.strategies import given, shapes_and_specs
from tests.test_product import MATRIX, product, rows_by_head

int8 = functools.partial(adam_mini, mu_dtype=jnp.int8)
INT8 = np.dtype("int8")
ALL_CODES = np.arange(-127, 128, dtype=np.int8)

# The table in the docstring of quantized.py: the codes in each binade, from 2**-6 on.
DENSITY = [4, 8] + [16] * 5 + [8] + [4] * 4 + [1] * 11
NUMBERS = [2.0 ** (i - 6) * (1 + k / n) for i, n in enumerate(DENSITY) for k in range(n)]
POSITIVE = np.array([*NUMBERS, 2.0**17]) - 2.0**-6
TABLE = np.concatenate([-POSITIVE[:0:-1], POSITIVE])


def decoded(codes, root):
    """What codes stand for."""
    return TABLE[np.asarray(codes, int) + 127] * root


def edges_of(spec, shape):
    return [numpy_adam_mini.edges_of(runs) for runs in spec.runs(shape)]


def means(spec, v, shape):
    """The means of `v` over blocks, at every coordinate; and the size of its block."""
    found, sizes = np.zeros(shape), np.ones(shape)
    for _, block in numpy_adam_mini.blocks_of(edges_of(spec, shape)):
        found[block], sizes[block] = v[block].mean(), v[block].size
    return found, sizes


def roots(spec, v, shape):
    """What codes are relative to, at every coordinate, for Adam's own `v`."""
    if isinstance(spec, Outer):
        a, sizes = means(spec.a, v, shape)
        ratio = product(v, edges_of(spec.a, shape), edges_of(spec.b, shape)) / a
        return np.sqrt(a) * np.maximum(1.25 * np.sqrt(ratio), np.sqrt(sizes.max()) / 2**12)
    mean, sizes = means(spec, v, shape)
    return np.sqrt(mean) * np.maximum(1.25, np.sqrt(sizes) / 2**12)


def neighbours(m, root):
    """The codes that stand for the nearest numbers below and above, and these numbers."""
    ratio = np.divide(m, root, out=np.zeros(np.shape(m)), where=np.asarray(root) > 0)
    above = np.clip(np.searchsorted(TABLE, ratio), 1, 254)
    return above - 128, above - 127, root * TABLE[above - 1], root * TABLE[above]


@functools.partial(jax.jit, static_argnums=0)
def decode(spec, codes, nu):
    """The moments that codes stand for."""
    return read(codes, spec.factors(nu, codes.shape))


def encode(spec, m, nu, seed):
    """The codes of a moment."""
    return write(m, spec.factors(nu, m.shape), INT8, seed)


@functools.partial(jax.jit, static_argnums=(0, 3))
def round_often(spec, m, nu, times):
    """The codes of the moment at each of many steps."""
    of_step = lambda step: encode(spec, m, nu, rounding_seed(step, 0))
    return jax.vmap(of_step)(jnp.arange(1, times + 1))


# --- The code ------------------------------------------------------------------------------------


def test_every_code_is_read_and_written_as_itself():
    assert (len(TABLE), TABLE[127], (np.diff(TABLE) > 0).all()) == (255, 0, True)
    nu = jnp.array([1 / 1.25**2])
    values = decode(per_tensor(), jnp.asarray(ALL_CODES), nu)
    np.testing.assert_allclose(values, TABLE, rtol=1e-6)
    # They are what they stand for, whatever the random numbers, but where float32's rounding of
    # the root and a random number in a million meet.
    for v in (nu, jnp.array([np.pi])):
        values = decode(per_tensor(), jnp.asarray(ALL_CODES), v)
        differ = np.abs(np.asarray(round_often(per_tensor(), values, v, 500), int) - ALL_CODES)
        assert differ.max() <= 1
        assert differ.mean() < 1e-4


@pytest.mark.parametrize(
    ("spec", "shape", "size"),
    [
        (per_element(), (4,), 1),
        (per_tensor(), (2**24,), 2**24),
        (per_tensor(), (2**24, 3), 3 * 2**24),
        (per_tensor(), (2**16, 2**15), 2**31),
        (per_neuron(), (2**27, 4), 2**27),
        (MATRIX, (2**16, 2**15), 2**15),  # of a row; a column's bound is larger
        (fused(-1, [(2**13, per_tensor()), (4, per_neuron())]), (2**13, 2**13 + 4), 2**26),
    ],
    ids=str,
)
def test_the_last_code_is_beyond_the_bound(spec, shape, size):
    """The bound is 32 sqrt(n v). XLA computes the one number that is read, and no large array."""
    nu = jax.tree.map(jnp.ones, spec.grid(shape), is_leaf=lambda x: x and isinstance(x[0], int))
    first = (slice(0, 1),) * len(shape)
    last = jax.jit(lambda nu: decode(spec, jnp.full(shape, 127, jnp.int8), nu)[first])(nu)
    scale = max(1.25, np.sqrt(size) / 2**12)  # of the root, by the module's docstring
    assert last.item() >= 32 * np.sqrt(size) * (1 - 1e-6)
    np.testing.assert_allclose(last.item(), TABLE[-1] * scale, rtol=1e-6)


@pytest.mark.slow
def test_the_last_code_is_beyond_the_bound_where_row_and_column_are_quiet():
    """All gradients were in the coordinate where they meet, so v is far more than their product."""
    v = np.ones((64, 64))
    v[3], v[:, 5], v[3, 5] = 0, 0, 64e-8
    nu = MATRIX.block_mean(jnp.asarray(v, jnp.float32))
    last = decode(MATRIX, jnp.full((64, 64), 127, jnp.int8), nu)[3, 5]
    assert last >= 32 * np.sqrt(v[3, 5]) * (1 - 1e-6)


def test_codes_of_version_0_3_are_read():
    """Its checkpoints go on with the same moments and random numbers (tests/golden/codes.py)."""
    with np.load(pathlib.Path(__file__).parent / "golden" / "codes.npz") as file:
        for name, spec in GOLDEN.items():
            nu = tuple(file[f"{name}/nu{i}"] for i in range(2 if isinstance(spec, Outer) else 1))
            nu = nu if isinstance(spec, Outer) else nu[0]
            found = decode(spec, jnp.asarray(file[f"{name}/codes"]), nu)
            np.testing.assert_allclose(found, file[f"{name}/m"], rtol=1e-6, atol=1e-12)
            again = encode(spec, found, nu, rounding_seed(1, 2))
            assert (np.abs(np.asarray(again, int) - file[f"{name}/codes"]) <= 1).all()
        assert int(salt_of(("layer", "kernel"))) == 841920579
        # The random numbers of a step, a parameter and a coordinate are those of version 0.3.
        m = jnp.full((4, 4), 0.5 * (POSITIVE[50] + POSITIVE[51]))
        coins = encode(per_tensor(), m, jnp.ones((1, 1)) / 1.25**2, rounding_seed(7, 841920579))
        np.testing.assert_array_equal(coins, file["coins"])


GOLDEN = {"neurons": per_neuron(), "one": per_tensor(), "matrix": MATRIX, "heads": rows_by_head(2)}


def check_step(spec, shape, dtype=np.float32, *, nesterov=False, seed=0, b1=0.9, b2=0.99):
    """A second step, its codes, nu and updates, against NumPy in float64."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(2, *shape)) * rng.lognormal(sigma=2, size=shape)
    grads = jnp.asarray(grads.astype(np.float32)).astype(dtype)
    tx = scale_by_adam_mini(
        b1, b2, mu_dtype=jnp.int8, nesterov=nesterov, bounded=False, block_specs=spec
    )
    _, state = tx.update(grads[0], tx.init(grads[0]))
    updates, new = tx.update(grads[1], state)
    assert new.mu.codes.dtype == jnp.int8
    grads = np.asarray(grads, np.float64)

    first = (1 - b2) * grads[0] ** 2
    v = b2 * first + (1 - b2) * grads[1] ** 2
    m = b1 * decoded(state.mu.codes, roots(spec, first, shape)) + (1 - b1) * grads[1]
    root = roots(spec, v, shape)
    lower, upper, low, high = neighbours(m, root)
    codes = np.asarray(new.mu.codes, int)
    slack = 1e-5 * (np.abs(m) + root)  # of m in float32, where it is a code almost exactly
    assert ((codes == lower) & (low <= m + slack) | (codes == upper) & (high >= m - slack)).all()

    if isinstance(spec, Outer):
        v = product(v, edges_of(spec.a, shape), edges_of(spec.b, shape))
    else:
        v, _ = means(spec, v, shape)
    mu = decoded(codes, root) / (1 - b1**2)
    if nesterov:
        mu = b1 * decoded(codes, root) / (1 - b1**3) + (1 - b1) * grads[1] / (1 - b1**2)
    expected = mu / (np.sqrt(v / (1 - b2**2)) + 1e-8)
    rtol = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}[np.dtype(dtype).name]
    np.testing.assert_allclose(np.asarray(updates, np.float64), expected, rtol=rtol, atol=rtol / 10)


@hypothesis.settings(max_examples=max(3, hypothesis.settings.default.max_examples // 5))
@given(
    shapes_and_specs(max_rank=3, min_side=1),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_step_on_any_grid_equals_the_formulas_in_numpy(case, dtype, nesterov, seed):
    shape, spec, _ = case
    check_step(spec, shape, jnp.dtype(dtype), nesterov=nesterov, seed=seed)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (MATRIX, (6, 8)),
        (rows_by_head(4), (6, 8)),
        (outer(per_neuron(axis=0), fused(-1, [(4, per_head(2)), (4, per_neuron())])), (6, 8)),
        (outer(per_neuron(axis=1), per_neuron(), stacked=0), (3, 6, 8)),
    ],
)
def test_a_step_of_rows_and_columns_equals_the_formulas_in_numpy(spec, shape, nesterov):
    check_step(spec, shape, nesterov=nesterov)


# --- Rounding ------------------------------------------------------------------------------------


def test_the_mean_of_many_roundings_is_the_moment():
    """For moments from the largest code to a hundredth of the smallest, within what chance allows."""
    n, seeds = 64, 20_000
    m = jnp.asarray(TABLE[-1] * np.geomspace(1, 1e-9, n) * np.resize([1, -1], n), jnp.float32)
    m = jnp.concatenate([m, jnp.asarray([0.7 * TABLE[-1], 1e-5, 1e-4])])
    nu = jnp.array([1 / 1.25**2])
    codes = round_often(per_tensor(), m, nu, seeds)
    m = np.asarray(m, np.float64)
    error = decoded(codes, 1.0).mean(0) - m
    _, _, low, high = neighbours(m, 1.0)
    deviation = np.sqrt(np.maximum((m - low) * (high - m), 0) / seeds)
    assert (np.abs(error) <= 5 * deviation + 1e-6 * np.abs(m)).all()


def test_rounding_errors_are_uncorrelated():
    """Between coordinates, parameters and steps. Half way between two codes each rounding is a coin."""
    steps, size = 400, 256
    paths = [("a",), ("b",), ("a", "b"), ("a/b",), ("b", "a")]
    m, nu = jnp.full(size, 0.5 * (POSITIVE[50] + POSITIVE[51])), jnp.array([1 / 1.25**2])
    seeds = jax.vmap(lambda step: jnp.stack([rounding_seed(step, salt_of(p)) for p in paths]))(
        jnp.arange(1, steps + 1)
    )
    of_seed = lambda seed: encode(per_tensor(), m, nu, seed)
    codes = np.asarray(jax.jit(jax.vmap(jax.vmap(of_seed)))(seeds), int)
    assert len(np.unique(codes)) == 2
    coins = 2.0 * (codes == codes.max()) - 1
    for axis, samples in ((0, len(paths) * size), (1, steps * size), (2, steps * len(paths))):
        rows = np.moveaxis(coins, axis, 0).reshape(coins.shape[axis], -1)
        assert rows.shape[1] == samples
        correlation = rows @ rows.T / samples - np.eye(len(rows))
        assert np.abs(correlation).max() < 5.5 / np.sqrt(samples)


def test_a_name_with_a_slash_has_random_numbers_of_its_own():
    g = jax.random.normal(jax.random.key(0), (64, 64))
    grads = {"a": {"b": g}, "a/b": g}
    tx = scale_by_adam_mini(0.0, mu_dtype=jnp.int8, block_specs=per_tensor())
    _, state = tx.update(grads, tx.init(grads))
    a, b = jax.tree.leaves(state.mu)
    assert np.any(a != b)


APART = {
    "one tree": lambda tx: tx,
    "multi_transform": lambda tx: optax.multi_transform({0: tx, 1: tx}, {"a": 0, "b": 1}),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, {"a": True, "b": False}), optax.masked(tx, {"a": False, "b": True})
    ),
}


@pytest.mark.parametrize("name", APART)
def test_two_parameters_never_share_random_numbers(name):
    """With the same gradient, codes would all be equal; rounded independently, a third differ."""
    tx = APART[name](scale_by_adam_mini(0.0, mu_dtype=jnp.int8, block_specs=per_tensor()))
    grads = dict.fromkeys("ab", jax.random.normal(jax.random.key(0), (64, 64)))
    state = tx.init(grads)
    for _ in range(2):
        _, state = tx.update(grads, state)
    a, b = (np.asarray(x, int) for x in jax.tree.leaves(state) if x.dtype == jnp.int8)
    assert 0.25 < (a != b).mean() < 0.4
    assert np.abs(a - b).max() == 1


@pytest.mark.parametrize("shape", [(1 << 12, 1 << 12), (1 << 24,), (3, 1 << 20, 2)])
def test_every_step_has_random_numbers_of_its_own(shape):
    """Also for sizes that are powers of two, where a generator may repeat itself."""
    m, nu = jnp.full(shape, 1.01), jnp.full(shape, 1.0)  # between two codes
    first = jax.jit(lambda seed: encode(per_element(), m, nu, seed).ravel()[:64])
    found = {np.asarray(first(rounding_seed(step, 0))).tobytes() for step in range(1, 65)}
    assert len(found) == 64


def noise(shape, b1, b2, *, steps=400, last=200, sigma=0.0, spec=None, bounded=True):
    """The error of updates, of them, both in the root of the mean square, in the last steps."""
    txs = [scale_by_adam_mini(b1, b2, mu_dtype=mu, bounded=bounded, block_specs=spec or per_tensor())
           for mu in (jnp.int8, jnp.float32)]  # fmt: skip
    scales = np.exp(sigma * np.random.default_rng(0).normal(size=shape)).astype(np.float32)

    def step(states, t):
        g = scales * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), shape)
        (a, s), (b, r) = (tx.update(g, state) for tx, state in zip(txs, states, strict=True))
        return [s, r], jnp.stack([jnp.mean((a - b) ** 2), jnp.mean(b**2)])

    start = [tx.init(jnp.zeros(shape)) for tx in txs]
    _, squares = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps)))()
    return float(np.sqrt(np.divide(*np.asarray(squares)[-last:].mean(0))))


LONG = {"steps": 6000, "last": 1000}


@pytest.mark.parametrize(
    ("n", "decays", "options", "limit"),
    [
        (4096, (0.9, 0.999), {}, 0.05),
        # After many steps v has its full size: m is a fifteenth of the root, near the first codes.
        (4096, (0.99, 0.9995), LONG, 0.215),
        (4096, (0.9, 0.999), {"sigma": 1.5}, 0.12),
        # Not bounded, as in the paper: the largest moments are in the coarse codes.
        (4096, (0.9, 0.999), {"sigma": 1.5, "bounded": False}, 0.15),
        *(
            pytest.param(4096, decays, options, limit, marks=pytest.mark.slow)
            for decays, options, limit in (
                ((0.9, 0.95), {}, 0.05),
                ((0.99, 0.9995), {}, 0.15),
                ((0.9, 0.999), LONG, 0.05),
                ((0.9, 0.95), {"sigma": 1.5}, 0.12),
            )
        ),
        *(
            pytest.param(n, decays, options, limit, marks=pytest.mark.slow)
            for n in (2**16, 2**16 + 1)
            for decays, options, limit in (
                ((0.9, 0.999), {}, 0.05),
                ((0.99, 0.9995), {}, 0.15),
                ((0.9, 0.999), {"sigma": 1.5}, 0.12),
                ((0.9, 0.95), {"sigma": 1.5}, 0.12),
            )
        ),
    ],
)
def test_updates_are_close_to_those_with_float32(n, decays, options, limit):
    assert noise((n,), *decays, **options) < limit


@pytest.mark.parametrize(
    ("decays", "options", "limit"),
    [
        ((0.9, 0.999), {"sigma": 1.5}, 0.12),
        *(
            pytest.param(decays, options, limit, marks=pytest.mark.slow)
            for decays, options, limit in (
                ((0.9, 0.999), {}, 0.05),
                ((0.99, 0.9995), {}, 0.15),
                ((0.99, 0.9995), LONG, 0.215),
                ((0.9, 0.95), {"sigma": 1.5}, 0.12),
            )
        ),
    ],
)
def test_updates_of_rows_and_columns_are_close_to_those_with_float32(decays, options, limit):
    assert noise((64, 64), *decays, spec=MATRIX, **options) < limit


def test_small_coordinates_of_a_large_block_move():
    """Moments of 1e-4 of the block's root round to zero mostly, but are right on average."""
    tx = scale_by_adam_mini(mu_dtype=jnp.int8, block_specs=per_tensor())
    g = np.random.default_rng(0).normal(size=(8, 2**16)).astype(np.float32)
    g[:, ::64] = 1e-4
    g, steps = jnp.asarray(g), 3000

    def step(carry, t):
        updates, state = tx.update(g[t % 8], carry[0])
        return (state, carry[1] + updates), None

    init = tx.init(g[0]), jnp.zeros(2**16)
    (_, moved), _ = jax.jit(lambda: jax.lax.scan(step, init, jnp.arange(steps)))()
    ratio = np.asarray(moved)[::64] / (1e-4 * steps)
    assert (ratio != 0).all()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(ratio.size)
    assert ratio.std() < 0.7


def test_8_bits_need_no_random_key_in_the_state():
    assert "seed" not in inspect.signature(adam_mini).parameters
    assert "key" not in inspect.signature(adam_mini).parameters
    state = int8(0.1, block_specs=per_neuron()).init({"w": jnp.ones((4, 6))})
    shapes = {leaf.shape: leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert shapes == {(): "int32", (4, 6): "int8", (1, 6): "float32"}


SHARDED = {
    "kernel": (P("fsdp", "tensor"), (16, 32), per_neuron()),
    "query": (P("fsdp", "tensor"), (16, 32), per_head(4)),
    "matrix": (P("tensor", "fsdp"), (16, 32), MATRIX),
    "bias": (P(("fsdp", "tensor")), (32,), per_element()),
    "gain": (P(), (16,), per_tensor()),
}
OF_SHARDED = {name: spec for name, (_, _, spec) in SHARDED.items()}


def sums_of_powers_of_two(step):
    """Gradients whose squares have exact means, in any order."""
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)
            for name, (_, shape, _) in SHARDED.items()}  # fmt: skip


def some_steps(tx, params, state, steps, update=None):
    for step in steps:
        grads = jax.tree.map(
            lambda g, p: jax.device_put(g, p.sharding), sums_of_powers_of_two(step), params
        )
        updates, state = (update or tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def place(mesh, params):
    return {name: jax.device_put(params[name], NamedSharding(mesh, SHARDED[name][0]))
            for name in SHARDED}  # fmt: skip


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices // 2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2,
                         devices=jax.devices()[:devices])  # fmt: skip


EXACT = int8(0.125, b1=0.5, b2=0.75, weight_decay=0.0, block_specs=OF_SHARDED)


@pytest.fixture(scope="module")
def expected():
    """Parameters and state after six steps on one device."""
    params = sums_of_powers_of_two(99)
    return jax.device_get(some_steps(EXACT, params, jax.jit(EXACT.init)(params), range(6)))


def check_same(found, expected):
    """To the last bit, with decays that lose none: so are the random numbers the same."""
    (params, state), (expected_params, expected_state) = jax.device_get(found), expected
    chex.assert_trees_all_equal(state, expected_state)
    chex.assert_trees_all_close(params, expected_params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_training_is_the_same_on_other_meshes_and_after_a_checkpoint(expected, tmp_path):
    """Three steps on eight devices, and three on four."""
    params = sums_of_powers_of_two(99)

    def on(devices):
        mesh = mesh_of(devices)
        of_params = {name: NamedSharding(mesh, spec) for name, (spec, _, _) in SHARDED.items()}
        of_state = opt_state_shardings(EXACT, params, of_params)
        for name, sharding in of_params.items():
            assert of_state[0].mu.codes[name].is_equivalent_to(sharding, params[name].ndim)
        both = of_params, of_state
        return mesh, both, jax.jit(EXACT.update, out_shardings=both)

    mesh, (_, of_state), update = on(8)
    placed = place(mesh, params)
    state = jax.jit(EXACT.init, out_shardings=of_state)(placed)
    saved = some_steps(EXACT, placed, state, range(3), update)
    assert saved[1][0].mu.codes["kernel"].addressable_shards[0].data.shape == (4, 16)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "saved", saved)
    checkpointer.wait_until_finished()
    _, shardings, update = on(4)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        saved, shardings,
    )  # fmt: skip
    restored = checkpointer.restore(tmp_path / "saved", abstract)
    assert restored[1][0].mu.codes["kernel"].addressable_shards[0].data.shape == (8, 16)
    check_same(some_steps(EXACT, *restored, range(3, 6), update), expected)


def test_training_is_the_same_inside_jit(expected):
    params = sums_of_powers_of_two(99)
    update = jax.jit(lambda *args: EXACT.update(*args))
    check_same(some_steps(EXACT, params, EXACT.init(params), range(6), update), expected)


@pytest.mark.slow
def test_training_is_the_same_with_explicit_shardings(expected):
    mesh = mesh_of(8, AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = place(mesh, sums_of_powers_of_two(99))
        found = some_steps(EXACT, placed, EXACT.init(placed), range(6), jax.jit(EXACT.update))
    assert jax.typeof(found[1][0].mu.codes["kernel"]).sharding.spec == P("fsdp", "tensor")
    check_same(found, expected)


# --- The bound -----------------------------------------------------------------------------------

DECAYS = [
    (0.9, 0.95),
    (0.9, 0.999),
    (0.0, 0.9),
    (0.95, 0.98),
    (0.9, 0.9999),
    (0.0, 0.999),
    (0.0, 0.0),
]


def largest_ratio(b1, b2):
    return (1 - b1) / np.sqrt((1 - b2) * (1 - (b1**2 / b2 if b1 else 0)))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(per_tensor(), id="mean", marks=pytest.mark.slow),
        pytest.param(MATRIX, id="outer"),
    ],
)
@pytest.mark.parametrize(
    ("b1", "b2"),
    [*DECAYS[:4], *(pytest.param(*decays, marks=pytest.mark.slow) for decays in DECAYS[4:])],
)
def test_the_largest_moments_fit_into_the_codes(b1, b2, spec):
    """Gradients of one coordinate that grow by b2 / b1 bring the moment closest to its bound."""
    shape, steps = (4, 4), 60
    sizes = 1e-3 * (b2 / b1) ** np.arange(steps) if b1 else np.eye(steps)[-1]
    grads = np.zeros((steps, *shape), np.float32)
    grads[:, 1, 2] = sizes
    tx = scale_by_adam_mini(b1, b2, mu_dtype=jnp.int8, block_specs=spec)
    step = lambda state, g: (tx.update(g, state)[1], None)
    state, _ = jax.jit(lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads))(grads)
    m = v = 0.0
    for g in sizes:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    assert 0.97 * largest_ratio(b1, b2) < m / np.sqrt(v) < largest_ratio(b1, b2) + 1e-9
    assert largest_ratio(b1, b2) <= 32
    nu = (state.nu.a, state.nu.b) if spec == MATRIX else state.nu
    np.testing.assert_allclose(decode(spec, state.mu.codes, nu)[1, 2], m, rtol=0.7)
    assert not np.delete(np.ravel(state.mu.codes), 6).any()


@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_allowed_decays_are_the_same_in_float32(b1):
    """A schedule's b2 that is allowed must not be replaced by another one."""
    exact = 1 - np.array(allowed_b2(float(np.float32(b1))))
    found = 1 - np.array(jax.tree.map(float, allowed_b2(jnp.float32(b1))))
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1.2e-7)


@given(
    st.lists(st.tuples(st.floats(0, 0.99), st.floats(0, 1)), min_size=1, max_size=40),
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=40
    ),
)
def test_no_moment_exceeds_its_bound(decays, grads):
    """For any gradients and any allowed decays at each step, in NumPy."""
    m, v = np.zeros(3), 0.0
    for t, g in enumerate(np.asarray(grads, np.float64)):
        b1, share = decays[t % len(decays)]
        least, greatest = allowed_b2(b1)
        b2 = least + share * (greatest - least)
        v = b2 * v + (1 - b2) * np.mean(g * g)
        m = b1 * m + (1 - b1) * g
        assert (np.abs(m) <= 32 * np.sqrt(3 * v) * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("b1", "b2", "text"),
    [
        (0.9, 0.99999, "take b2 between 0.81005 and 0.99994"),
        (0.9, 0.8, "take b2 between 0.81005 and"),
        (0.5, 0.25, "take b2 between 0.25"),
        (0.0, 0.9999, "take b2 between 0 and 0.99902"),
    ],
)
def test_decays_that_8_bits_cannot_hold_are_refused(b1, b2, text):
    params = {"w": jnp.ones((2, 3))}
    inject = optax.inject_hyperparams(adam_mini, static_args=("mu_dtype", "block_specs"))
    for make in (
        lambda: int8(0.1, b1, b2),
        lambda: int8(0.1, np.float32(b1), np.float64(b2)),
        lambda: int8(0.1, jnp.float32(b1), jnp.float32(b2)).init(params),
        lambda: inject(0.1, b1, b2, mu_dtype=jnp.int8).init(params),
        lambda: scale_by_adam_mini(b1, b2, mu_dtype="int8"),
    ):
        with pytest.raises(ValueError, match=r"mu_dtype=int8") as raised:
            make()
        assert text in str(raised.value)
    adam_mini(0.1, b1, b2).init(params)


def test_the_decays_that_the_message_advises_are_accepted():
    for b1 in (0.0, 0.5, 0.9, 0.95):
        with pytest.raises(ValueError, match=r"mu_dtype=int8") as raised:
            int8(0.1, b1, 0.999999)
        for number in re.search(r"between (\S+) and (\S+), or", str(raised.value)).groups():
            int8(0.1, b1, float(number)).init({"w": jnp.ones(3)})


def test_scheduled_decays_are_clipped_to_what_8_bits_can_hold():
    """Traced values cannot be refused. The schedule's b2 grows beyond what 8 bits can hold."""
    inject = optax.inject_hyperparams(scale_by_adam_mini, static_args=("mu_dtype", "block_specs"))
    g = jnp.zeros((4, 4)).at[1, 2].set(1.0)
    for b2 in (lambda t: 1 - 1e-6 / (1 + t), 0.999999):
        make = lambda mu, b2=b2: inject(0.0, b2, mu_dtype=mu, block_specs=per_element())
        tx = make(jnp.int8)
        state = jax.jit(tx.init)(g)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(g, state)
        assert 0.9 < updates[1, 2] < 1.1


def test_an_injected_mu_dtype_is_refused_with_advice():
    with pytest.raises(TypeError, match="static_args"):
        optax.inject_hyperparams(adam_mini)(0.1, mu_dtype=jnp.int8).init({"w": jnp.ones(3)})


def test_codes_have_no_derivative():
    tx = int8(0.1, weight_decay=0.0, block_specs=per_neuron())
    x = jnp.ones((4, 6))
    with pytest.raises(TypeError, match=r"have no derivative: .*mu_dtype=None"):
        jax.grad(lambda s: tx.update(x * s, tx.init(x))[0].sum())(1.0)


# --- Against a moment in float32, on gradients that are hard --------------------------------------

ROWS, WIDTH = 16, 64


def noisy(key, t):
    return 1 + jax.random.normal(key, (ROWS, WIDTH))


def rarely(key, t):
    """Each row once in 200 steps."""
    return noisy(key, t) * jax.random.bernoulli(jax.random.fold_in(key, 1), 1 / 200, (ROWS, 1))


def shrinking(key, t):
    return noisy(key, t) * 10.0 ** (-6 * t / 2000)


def dropping(key, t):
    """To a millionth at once: too little for any code, until the bound has followed."""
    return noisy(key, t) * jnp.where(t < 50, 1.0, 1e-6)


def pausing(key, t):
    return noisy(key, t) * ((t < 50) | (t >= 1950))


def with_an_outlier(key, t):
    return noisy(key, t).at[:, 3].multiply(jnp.where(t == 50, 1e4, 1.0))


# (gradients, steps, the first that is looked at, b2, relative error of the mean of what parameters
# moved, and of one of them)
HARD = {
    "plain": (noisy, 1000, 0, 0.999, 2e-3, 0.02),
    "rows that are rarely touched": (rarely, 10_000, 0, 0.999, 5e-3, 0.05),
    "gradients that shrink by 1e6": (shrinking, 2000, 1000, 0.99, 5e-3, 0.05),
    "gradients that drop by 1e6": (dropping, 2000, 200, 0.999, 0.15, None),
    "a run of zeros": (pausing, 2000, 1900, 0.95, 5e-3, 0.05),
    "an outlier of 1e4": (with_an_outlier, 1000, 50, 0.999, 5e-3, 0.08),
}


def check_displacements(spec, case, dtype=jnp.float32):
    """Where parameters are in the end, with moments in 8 bits and in float32."""
    gradients, steps, start, b2, of_mean, of_one = case
    txs = [
        scale_by_adam_mini(b2=b2, mu_dtype=mu_dtype, block_specs=spec)
        for mu_dtype in (jnp.int8, jnp.float32)
    ]

    def step(carry, t):
        states, sums = carry
        g = gradients(jax.random.fold_in(jax.random.key(0), t), t).astype(dtype)
        new = [tx.update(g, state) for tx, state in zip(txs, states, strict=True)]
        moves = jnp.stack([updates.astype(jnp.float32) for updates, _ in new])
        return ([state for _, state in new], sums + jnp.where(t >= start, moves, 0)), None

    init = [tx.init(jnp.zeros((ROWS, WIDTH), dtype)) for tx in txs], jnp.zeros((2, ROWS, WIDTH))
    (_, sums), _ = jax.jit(lambda: jax.lax.scan(step, init, jnp.arange(steps)))()
    found, expected = np.asarray(sums, np.float64)
    chex.assert_tree_all_finite(found)
    assert expected.mean() > 0
    assert abs(found.mean() / expected.mean() - 1) < of_mean
    if of_one:
        error = np.sqrt(np.mean((found - expected) ** 2)) / np.sqrt(np.mean(expected**2))
        assert error < of_one


@pytest.mark.parametrize("name", slow_but("rows that are rarely touched", of=HARD))
def test_parameters_move_in_8_bits_as_with_float32(name):
    check_displacements(per_token(), HARD[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("spec", [MATRIX, per_tensor(), per_element()], ids=str)
def test_parameters_move_in_8_bits_as_with_float32_in_other_blocks(name, spec):
    check_displacements(spec, HARD[name])


@pytest.mark.parametrize("dtype", slow_but("bfloat16", of=("bfloat16", "float16")))
def test_parameters_of_16_bits_move_as_with_float32(dtype):
    check_displacements(MATRIX, HARD["plain"], jnp.dtype(dtype))


# --- Shapes, dtypes, and what is no number --------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1, 1),
        (0, 4),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in ((1,), (2, 1), (0,), (3, 0), (1, 0, 2))
        ),
    ],
    ids=str,
)
def test_small_and_empty_parameters_are_updated_in_8_bits(shape):
    g = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    specs = [per_tensor(), per_element()] + [MATRIX] * (len(shape) == 2)
    for spec in specs:
        (found, state), (expected, _) = (
            tx.update(g, tx.init(g), g)
            for tx in (int8(0.1, block_specs=spec), adam_mini(0.1, block_specs=spec))
        )
        assert (state[0].mu.codes.shape, state[0].mu.codes.dtype) == (shape, jnp.int8)
        np.testing.assert_allclose(found, expected, rtol=0.13)


def test_a_bare_array_is_updated_in_8_bits():
    """Its mu is one array of integers, which must not be taken for the step count."""
    for g in (jnp.ones((4, 6)), jnp.float32(1.0)):
        for specs in (None, by_path([], default=per_tensor())):
            tx = int8(0.1, weight_decay=0.0, block_specs=specs)
            updates, _ = tx.update(g, tx.init(g))
            np.testing.assert_allclose(updates, -0.1, rtol=0.13)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("spec", [per_neuron(), per_head(2), MATRIX, rows_by_head(2)], ids=str)
def test_nan_and_infinity_spread_as_with_float32(spec, bad):
    """To their block and no further, and no update becomes zero that is not zero with float32."""
    g = jax.random.normal(jax.random.key(0), (3, 4))
    updates = []
    for mu_dtype in (jnp.int8, None):
        tx = scale_by_adam_mini(mu_dtype=mu_dtype, block_specs=spec)
        state = tx.init(g)
        for grads in (g, g.at[1, 1].set(bad), g):
            update, state = tx.update(grads, state)
            updates.append(np.asarray(update))
    for found, expected in zip(updates[:3], updates[3:], strict=True):
        assert not (np.isnan(found) & ~np.isnan(expected)).any()
        still = ~np.isnan(expected)
        np.testing.assert_array_equal((found == 0)[still], (expected == 0)[still])
    assert np.isfinite(updates[2]).any()


@pytest.mark.slow
def test_float64_parameters_are_updated_in_8_bits():
    with jax.enable_x64(True):
        params = {"wide": jnp.ones((2, 4), jnp.float64), "narrow": jnp.ones((2, 4), jnp.float32)}
        grads = jax.tree.map(lambda p: p * jnp.arange(1.0, 5.0), params)
        for spec in (per_tensor(), MATRIX):
            tx = int8(1e-2, weight_decay=0.0, block_specs=spec)
            state = tx.init(params)
            updates, new = tx.update(grads, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes((updates, new), (params, state))
            assert {x.dtype.name for x in jax.tree.leaves(new[0].mu)} == {"int8"}
            wide = adam_mini(1e-2, weight_decay=0.0, block_specs=spec)
            expected, _ = wide.update(grads, wide.init(params), params)
            chex.assert_trees_all_close(updates, expected, rtol=1 / 8)


def test_complex_parameters_are_refused_and_integers_left_alone():
    with pytest.raises(TypeError, match=r"a/z: mu_dtype=int8 keeps real numbers, .* complex64"):
        int8(0.1, block_specs=per_tensor()).init({"a": {"z": jnp.ones((2, 3), jnp.complex64)}})
    params = {"kernel": jnp.ones((2, 3)), "w": jnp.arange(6).reshape(2, 3), "b": jnp.array([True])}
    grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2), allow_int=True)(params)
    for specs in (per_tensor(), by_path([("b$", per_element())], MATRIX)):
        tx = int8(0.1, weight_decay=0.1, block_specs=specs)
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(grads, state, params)
        new = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal((new["w"], new["b"]), (params["w"], params["b"]))
        assert (new["kernel"] < 1).all()
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
        assert not any(new_state[0].mu.codes[name].any() for name in ("w", "b"))


def test_a_missing_gradient_leaves_its_moments_in_8_bits():
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6), "none": None}
    tx = int8(0.1, weight_decay=0.0)
    state = tx.init(params)
    _, state = tx.update(params, state)
    updates, new = tx.update({"kernel": params["kernel"], "bias": None, "none": None}, state)
    assert updates["bias"] is None
    assert updates["none"] is None
    chex.assert_trees_all_equal(new[0].mu.codes["bias"], state[0].mu.codes["bias"])
    chex.assert_trees_all_equal(new[0].nu["bias"], state[0].nu["bias"])
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=0.15)


@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_and_state_keep_their_dtypes(dtype, grad_dtype):
    params = {"kernel": jnp.ones((4, 4), dtype), "bias": jnp.ones(4, dtype)}
    grads = jax.tree.map(lambda x: x.astype(grad_dtype), params)
    tx = int8(1e-2)
    state = tx.init(params)
    updates, new = tx.update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)
    assert {x.dtype.name for x in jax.tree.leaves(state[0].nu)} == {"float32"}


# --- Training -------------------------------------------------------------------------------------


SEEDS, STEPS = 8, 300
NUMPY = np.random.default_rng(0)
TEACHER = [np.float32(NUMPY.normal(size=shape) / 4) for shape in ((16, 32), (32, 1))]
SPECS = {"up": MATRIX, "bias": per_element(), "down": per_neuron()}
RATE = optax.linear_schedule(1e-2, 0.0, 2 * STEPS)


def loss_fn(p, x, y):
    return jnp.mean((jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"] - y) ** 2)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
def train(tx, params, state, noise):
    """A small network on noisy samples of another one; the loss on each batch before its step."""

    def step(carry, noise):
        p, state = carry
        x, y = noise[:, 1:], jnp.tanh(noise[:, 1:] @ TEACHER[0]) @ TEACHER[1] + 0.1 * noise[:, :1]
        loss, grads = jax.value_and_grad(loss_fn)(p, x, y)
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), loss

    (params, state), losses = jax.lax.scan(step, (params, state), noise)
    return params, state, losses


@pytest.fixture(scope="module")
def network():
    """Parameters for each seed, and the data of two runs."""
    normal = lambda *shape: np.random.default_rng(shape).normal(size=shape).astype(np.float32)
    params = {
        "up": normal(SEEDS, 16, 64) / 4,
        "bias": np.zeros((SEEDS, 64), np.float32),
        "down": normal(SEEDS, 64, 1) / 8,
    }
    data = normal(2, SEEDS, STEPS, 32, 17)
    return jax.tree.map(jnp.asarray, params), *data


FULL = adam_mini(RATE, b2=0.99, block_specs=SPECS)
EIGHT = adam_mini(RATE, b2=0.99, block_specs=SPECS, mu_dtype=jnp.int8)


@pytest.mark.slow
def test_trains_as_well_as_with_float32(network):
    """Paired, eight seeds: within 1% in the mean of the last 100 steps, and within 4% each."""
    params, first, second = network
    last = []
    for tx in (FULL, EIGHT):
        p, state, start = train(tx, params, jax.vmap(tx.init)(params), first)
        _, _, losses = train(tx, p, state, second)
        last.append(np.asarray(losses)[:, -100:].mean(1))
    assert last[0].mean() < 0.1 * start[:, :5].mean()
    ratio = last[1] / last[0]
    assert abs(ratio.mean() - 1) < 0.01
    assert (np.abs(ratio - 1) < 0.04).all()


@pytest.mark.slow
def test_a_run_of_adamw_goes_on_in_8_bits(network):
    """The loss does not jump at the switch, and ends within 1% of going on in float32."""
    params, first, second = network
    adam = optax.adamw(RATE, b2=0.99)
    params, state, before = train(adam, params, jax.vmap(adam.init)(params), first)
    after = []
    for tx, dtype in ((EIGHT, jnp.int8), (FULL, None)):
        convert = functools.partial(from_adam_state, block_specs=SPECS, mu_dtype=dtype)
        _, _, losses = train(tx, params, jax.jit(jax.vmap(convert))(state, params), second)
        assert losses[:, :20].mean() < 1.1 * before[:, -20:].mean()
        after.append(losses[:, -100:].mean())
    assert after[0] < before[:, -100:].mean()
    assert abs(after[0] / after[1] - 1) < 0.01


# --- Conversion -----------------------------------------------------------------------------------


def test_to_8_bits_and_back_is_within_a_code():
    params = {"up": jnp.zeros((64, 64)), "matrix": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
    specs = {"up": per_neuron(), "matrix": MATRIX, "bias": per_element()}
    adam = optax.adamw(0.1)
    state = adam.init(params)
    rng = np.random.default_rng(0)
    for _ in range(3):
        grads = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
        _, state = jax.jit(adam.update)(grads, state, params)
    convert = jax.jit(lambda state: from_adam_state(state, params, specs, mu_dtype=jnp.int8))
    converted = convert(state)
    mini = int8(0.1, block_specs=specs)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, mini.init(params))
    back = jax.jit(lambda state: to_adam_state(state, params, specs))(converted)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state)
    for name, spec in specs.items():
        m, found = (np.asarray(s[0].mu[name], np.float64) for s in (state, back))
        v = np.asarray(state[0].nu[name], np.float64)
        _, _, low, high = neighbours(m, roots(spec, v, m.shape))
        slack = 1e-5 * np.abs(m).max()
        assert ((low - slack <= found) & (found <= high + slack)).all()
        deviation = np.sqrt(np.maximum((m - low) * (high - m), 0).mean() / m.size)
        assert abs((found - m).mean()) < 4 * deviation
    # What goes on from there goes on with codes, and codes go through a second conversion.
    again = convert(back)
    same = jax.tree.map(
        lambda a, b: (np.asarray(a) == b).mean(), again[0].mu.codes, converted[0].mu.codes
    )
    assert min(same[name] for name in ("up", "bias")) > 0.999
    updates, _ = mini.update(grads, converted, params)
    chex.assert_tree_all_finite(updates)


def test_conversion_to_8_bits_works_on_shapes_and_refuses_other_dtypes():
    params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    state = jax.eval_shape(optax.adamw(0.1).init, params)
    convert = functools.partial(from_adam_state, params=params, block_specs=per_neuron())
    converted = jax.eval_shape(functools.partial(convert, mu_dtype="int8"), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        converted, jax.eval_shape(int8(0.1, block_specs=per_neuron()).init, params)
    )
    with pytest.raises(TypeError, match=r"mu_dtype must be a floating-point dtype or jnp.int8"):
        convert(state, mu_dtype="uint8")
    z = {"w": jnp.ones((4, 6), jnp.complex64)}
    with pytest.raises(TypeError, match=r"w: mu_dtype=int8 keeps real numbers"):
        from_adam_state(optax.adamw(0.1).init(z), z, per_neuron(), mu_dtype=jnp.int8)


# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "nesterov"),
    [
        (per_neuron(), False),
        (MATRIX, True),
        *(
            pytest.param(spec, nesterov, marks=pytest.mark.slow)
            for spec, nesterov in (
                (per_neuron(), True),
                (per_token(), False),
                (per_token(), True),
                (MATRIX, False),
            )
        ),
    ],
    ids=str,
)
def test_a_donated_step_keeps_nothing_of_a_parameters_size(spec, nesterov):
    """Not even an array of codes, which would be a quarter of the parameter's size."""
    tx = int8(1e-3, nesterov=nesterov, block_specs=spec)
    p = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(p, jax.eval_shape(tx.init, p), p)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 5 * p.size
    assert memory.temp_size_in_bytes <= 0.02 * 4 * p.size


def test_the_table_has_the_bytes_of_the_state():
    params = {
        "kernel": jnp.ones((12, 8), jnp.bfloat16),
        "matrix": jnp.ones((3, 12, 8)),
        "bias": jnp.ones(8),
        "ids": jnp.arange(5),
    }
    rows = outer(BlockSpec(((0, None), (1, None))), per_neuron(), stacked=())
    specs = {"kernel": per_head(2), "matrix": rows, "bias": per_element(), "ids": per_tensor()}
    state = int8(0.1, block_specs=specs).init(params)[0]
    nbytes = sum(x.nbytes for x in jax.tree.leaves((state.mu, state.nu)))
    assert state.mu.codes["matrix"].nbytes == 3 * 12 * 8
    table = block_table(params, specs, mu_dtype=jnp.int8)
    assert f"optimizer state: {nbytes:,} bytes" in table.caption
    with pytest.raises(TypeError, match="mu_dtype must be"):
        block_table(params, specs, mu_dtype="int32")


# --- States of another mu_dtype ---------------------------------------------------------------------

KINDS = {"int8": jnp.int8, "float32": None, "bfloat16": jnp.bfloat16}
PARAMS = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}


def kind(name):
    return adam_mini(0.1, mu_dtype=KINDS[name], weight_decay=0.0)


def standard(saved, like, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "saved", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "saved", jax.eval_shape(lambda: like))


def manager(saved, like, path):
    with ocp.CheckpointManager(path / "runs") as runs:
        runs.save(1, args=ocp.args.StandardSave(saved))
        runs.wait_until_finished()
        return runs.restore(1, args=ocp.args.StandardRestore(jax.eval_shape(lambda: like)))


def pytree(saved, like, path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path / "saved", saved)
        args = ocp.checkpoint_utils.construct_restore_args(like)
        return checkpointer.restore(path / "saved", item=like, restore_args=args)


def msgpack(saved, like, path):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(saved))


def leaves(saved, like, path):
    eqx.tree_serialise_leaves(path / "saved.eqx", saved)
    return eqx.tree_deserialise_leaves(path / "saved.eqx", like)


each_way = pytest.mark.parametrize(
    ("made", "used"),
    [
        ("int8", "float32"),
        ("float32", "int8"),
        pytest.param("int8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("bfloat16", "int8", marks=pytest.mark.slow),
    ],
)


@pytest.mark.parametrize("restore", [standard, manager, pytree, msgpack, leaves])
@each_way
def test_a_checkpoint_of_another_mu_dtype_is_refused(restore, made, used, tmp_path):
    """Either by the restore itself or by the next update; never used as it is."""
    old, new = kind(made), kind(used)
    _, saved = old.update(PARAMS, old.init(PARAMS), PARAMS)
    with pytest.raises(Exception, match=r"mu|codes|structure|leaves|dtype|type"):
        new.update(PARAMS, restore(saved, new.init(PARAMS), tmp_path), PARAMS)
    (tmp_path / "again").mkdir()
    restored = restore(saved, old.init(PARAMS), tmp_path / "again")
    old.update(PARAMS, restored, PARAMS)


@pytest.mark.parametrize("restore", [standard, lambda saved, like, path: saved])
@each_way
def test_an_nnx_optimizer_of_another_mu_dtype_is_refused(made, used, restore, tmp_path):
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones(4))))(model)
    of = lambda name: nnx.Optimizer(model, kind(name), wrt=nnx.Param)

    def go_on(new, folder):
        nnx.update(new, restore(nnx.state(old), nnx.state(new), folder))
        new.update(model, grads)

    old = of(made)
    old.update(model, grads)
    go_on(of(made), tmp_path / "same")
    with pytest.raises(Exception, match=r"mu|codes"):
        go_on(of(used), tmp_path / "other")


def test_a_state_of_another_mu_dtype_is_refused():
    params = {"kernel": jnp.ones((4, 6)), "rows": jnp.arange(3, dtype=jnp.int8)}
    grads = {"kernel": params["kernel"], "rows": jnp.zeros(3, jax.dtypes.float0)}
    for made, used in ((None, jnp.int8), (jnp.int8, None), (jnp.int8, jnp.bfloat16)):
        state = adam_mini(0.1, mu_dtype=made).init(params)
        with pytest.raises(ValueError, match=r"the state's mu is .*from_adam_state"):
            adam_mini(0.1, mu_dtype=used).update(grads, state, params)
        # What the message says to do.
        adam = to_adam_state(state, params, flax_layers())
        state = from_adam_state(adam, params, flax_layers(), mu_dtype=used)
        adam_mini(0.1, mu_dtype=used).update(grads, state, params)


def test_codes_that_were_cast_and_codes_of_version_0_2_are_refused():
    tx = kind("int8")
    state = tx.init(PARAMS)
    cast = jax.tree.map(lambda x: x.astype(jnp.float32), state[0].mu.codes)
    with pytest.raises(ValueError, match=r"bias: .*codes that were cast to float32"):
        tx.update(PARAMS, (state[0]._replace(mu=Codes(cast)), *state[1:]), PARAMS)
    old = (state[0]._replace(mu=state[0].mu.codes), *state[1:])
    for name in KINDS:
        with pytest.raises(
            ValueError, match=r"mu is a plain int8 array, .* is of version 0\.2, convert it"
        ):
            kind(name).update(PARAMS, old, PARAMS)


@pytest.mark.parametrize(("made", "used"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_floats_are_cast_at_the_next_update(made, used):
    """optax.adamw does so too."""
    for make in (kind, lambda name: optax.adamw(0.1, mu_dtype=KINDS[name])):
        old, new = make(made), make(used)
        _, state = old.update(PARAMS, old.init(PARAMS), PARAMS)
        _, state = new.update(PARAMS, state, PARAMS)
        assert {x.dtype.name for x in jax.tree.leaves(state[0].mu)} == {used}
