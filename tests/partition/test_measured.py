import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_adam_mini import (
    adam_mini,
    block_table,
    from_adam_state,
    measure_block_specs,
    outer,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
)
from optax_adam_mini.product import Outer

ROW, COLUMN = jnp.array([[1.0], [3.0], [2.0], [9.0]]), jnp.array([[1.0, 5.0, 2.0, 2.0, 7.0, 1.0]])
ONES = jnp.ones((4, 6))
NOISE = jnp.asarray(np.random.default_rng(0).lognormal(sigma=2, size=(4, 6)), jnp.float32)
MATRIX = outer(per_neuron(axis=0), per_neuron())


def state_of(grads, tx=None):
    tx = tx or optax.adamw(1e-3)
    params = jax.tree.map(jnp.zeros_like, grads)
    return tx.update(grads, tx.init(params), params)[1], params


@pytest.mark.parametrize(
    ("g", "expected"),
    [
        (ONES, per_tensor()),
        (ONES * ROW, per_neuron(axis=0)),
        (ONES * COLUMN, per_neuron()),
        (ROW * COLUMN, MATRIX),
        (NOISE, per_element()),
        (jnp.zeros((4, 6)), per_tensor()),
        (1e-14 * ROW * COLUMN, MATRIX),
        (ROW * COLUMN * (1 + 0.01 * NOISE), MATRIX),
    ],
)
def test_the_cheapest_spec_that_explains_nu_is_chosen(g, expected):
    """Among the candidates for the shape, when none are given."""
    specs = measure_block_specs(*state_of({"w": g}))
    assert specs["w"].grid((4, 6)) == expected.grid((4, 6))


def test_candidates_are_chosen_by_tolerance():
    state, params = state_of({"w": ROW * COLUMN})
    candidates = {"heads": per_head(3), "neurons": {"w": per_neuron()}, "outer": lambda p: MATRIX}
    measure = lambda **more: measure_block_specs(state, params, candidates, **more)["w"]
    assert measure() == MATRIX
    # sqrt(v / v_b) of each, by hand
    root = np.asarray(ROW * COLUMN)
    by_neuron = root / np.sqrt((root**2).mean(0))
    by_head = root / np.sqrt(np.repeat((root**2).reshape(4, 3, 2).mean((0, 2)), 2))
    spreads = [np.sqrt(((x - 1) ** 2).mean()) for x in (by_neuron, by_head)]
    assert measure().note == f"outer 0.00; heads {spreads[1]:.2f}, neurons {spreads[0]:.2f}"
    assert measure(tolerance=float(spreads[0]) + 1e-3) == per_neuron()
    assert measure(tolerance=float(spreads[0]) - 1e-3) == MATRIX
    assert measure_block_specs(state, params, {"neurons": per_neuron()})["w"] == per_element()


def test_the_chosen_specs_stay_within_the_budget():
    grads = {"a": ROW * COLUMN, "b": NOISE, "c": ONES}
    state, params = state_of(grads)
    size = lambda specs: sum(spec.size((4, 6)) for spec in specs.values())
    everything = measure_block_specs(state, params)
    assert size(everything) == 10 + 24 + 1
    for entries in (3, 12, 14, 30, 35, 72):
        specs = measure_block_specs(state, params, budget=entries / 72)
        assert size(specs) <= entries
    assert size(specs) == size(everything)  # no more than explains it, whatever is allowed
    assert isinstance(measure_block_specs(state, params, budget=35 / 72)["a"], Outer)
    with pytest.raises(ValueError, match=r"cheapest candidates have 3 entries, 4.17% of Adam's"):
        measure_block_specs(state, params, budget=2 / 72)
    with pytest.raises(ValueError, match=r"budget must be more than 0"):
        measure_block_specs(state, params, budget=0.0)


@pytest.mark.slow
def test_a_run_goes_on_with_measured_specs_after_conversion():
    """Inside a chain and MultiSteps, as a running job has it; the loss goes on falling."""
    target = ROW * COLUMN / 10
    loss = lambda p: jnp.mean((p["w"] + p["b"] - target) ** 2)
    make = lambda tx: optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(tx, 1))
    adamw = make(optax.adamw(1e-2))
    p = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(6)}
    state = adamw.init(p)
    for _ in range(50):
        updates, state = adamw.update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
    specs = measure_block_specs(state, p)
    state = from_adam_state(state, p, specs)
    mini = make(adam_mini(1e-2, block_specs=specs))
    before = float(loss(p))
    for _ in range(50):
        updates, state = mini.update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
    assert loss(p) < 0.8 * before


@pytest.mark.slow
def test_specs_are_measured_in_partitioned_bfloat16_states():
    grads = {"w": ROW * COLUMN, "conv": jnp.ones((3, 3, 2, 4)), "s": jnp.ones(()), "b": jnp.ones(5)}
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
    tx = optax.multi_transform(
        {"a": optax.adamw(1e-3), "b": optax.adam(1e-3)},
        {"w": "a", "conv": "b", "s": "a", "b": "b"},
    )
    state, params = state_of(grads, tx)
    specs = measure_block_specs(state, params)
    assert specs["w"] == MATRIX
    assert {name: specs[name].size(g.shape) for name, g in grads.items()} == {
        "w": 10, "conv": 1, "s": 1, "b": 1,
    }  # fmt: skip
    assert len(block_table(params, specs).rows) == 5


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda p: optax.sgd(1.0).init(p), "expected an optimizer state with a ScaleByAdamState"),
        (
            lambda p: adam_mini(1.0, block_specs=MATRIX).init(p),
            "got a tuple of ScaleByAdamMiniState, EmptyState: Adam-mini's nu has means over blocks",
        ),
        (lambda p: optax.adamw(1.0).init(p), "adam_state has count 0: train"),
        (lambda p: state_of({"v": ONES})[0], "has no nu for w"),
        (
            lambda p: state_of({"w": ONES.T})[0],
            r"w: the state is not of these params: nu has shape",
        ),
    ],
)
def test_states_and_candidates_that_do_not_fit_are_refused(state, message):
    params = {"w": ONES}
    with pytest.raises(ValueError, match=message):
        measure_block_specs(state(params), params)
    with pytest.raises(ValueError, match=r"w: .*5 blocks do not divide"):
        measure_block_specs(state_of(params)[0], params, {"heads": per_head(5)})
    for candidates, got in (
        ([MATRIX], "a list"),
        ({"w": MATRIX}, "a tree of specs like the parameters"),
        (MATRIX, "an Outer"),
        (lambda params: MATRIX, "a function"),
    ):
        with pytest.raises(TypeError, match=rf'got {got}: pass candidates={{"outer": specs}}'):
            measure_block_specs(state_of(params)[0], params, candidates)  # pyright: ignore[reportArgumentType]


def trained(params):
    adamw = optax.adamw(1e-3)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape, p.dtype), params)
    return adamw.update(grads, adamw.init(params), params)[1]


def test_a_convolution_with_one_output_is_measured():
    params = {"last": jnp.ones((3, 3, 8, 1))}
    spec = measure_block_specs(trained(params), params)["last"]
    adam_mini(1e-3, block_specs={"last": spec}).init(params)


def test_complex_parameters_are_measured():
    params = {"w": jnp.ones((4, 6), jnp.complex64)}
    spec = measure_block_specs(trained(params), params)["w"]
    adam_mini(1e-3, block_specs={"w": spec}).init(params)
