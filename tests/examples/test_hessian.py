import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.common.cli import ConfigError
from examples.hessian.measure import Config, digits, hessians_of, make_loss, measure, table, trained
from examples.hessian.model import Transformer
from examples.hessian.picture import Panel, draw
from optax_adam_mini import infer_block_specs, per_head
from optax_adam_mini.hessian import block_numbers
from tests.examples.running import only_run, quick_environment, run_command


@pytest.fixture(scope="module")
def mlp():
    lines = []
    rows, panels = measure(Config(steps=200), digits()._replace(measured=200), lines.append)
    return rows, panels, lines


@pytest.mark.slow
def test_neurons_of_the_mlp_hold_more_than_chance(mlp):
    rows, _, _ = mlp
    assert [(row.layer, row.blocks) for row in rows] == [
        ("hidden", "by neuron"),
        ("output", "by neuron"),
    ]
    for row in rows:
        assert row.before.ratio > 2
        assert row.after.ratio > 2
        assert row.before.chance == row.after.chance


def test_the_report_has_each_layer_and_its_shares(mlp):
    rows, _, (line,) = mlp
    before, after = (float(word) for word in line.split() if word[:1].isdigit() and "." in word)
    assert after < before / 3
    cells = [list(column.cells) for column in table("title", rows).columns]
    assert cells[0] == ["hidden", "output"]
    assert cells[3][0] == f"{rows[0].before.inside:.1%}"
    assert cells[6][1] == f"{rows[1].after.ratio:.1f}"


@pytest.mark.slow
def test_hessians_are_those_of_finite_differences():
    problem = digits()._replace(measured=20)
    loss = make_loss(problem.model)
    inputs, targets = jnp.asarray(problem.inputs[:20]), jnp.asarray(problem.targets[:20])
    params = problem.model.init(jax.random.key(0), inputs)["params"]
    flat = {f"{layer}/{name}": x for layer, own in params.items() for name, x in own.items()}
    found = hessians_of(loss, flat, ["output/kernel"], inputs, targets)["output/kernel"]
    gradient = jax.grad(
        lambda kernel: loss(
            {**params, "output": {**params["output"], "kernel": kernel}}, inputs, targets
        )
    )
    kernel, step = params["output"]["kernel"], 1e-2
    for column in (0, 37, 79):
        unit = jnp.zeros(kernel.size).at[column].set(step).reshape(kernel.shape)
        expected = (gradient(kernel + unit) - gradient(kernel - unit)).ravel() / (2 * step)
        np.testing.assert_allclose(found[column], expected, atol=2e-4)


@pytest.mark.slow
def test_training_starts_from_the_seed_alone():
    problem = digits()
    params = problem.model.init(jax.random.key(0), problem.inputs[:1])["params"]
    first, again = (trained(Config(steps=5), problem, params) for _ in range(2))
    other = trained(Config(steps=5, seed=1), problem, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, other))


def test_blocks_of_the_transformer():
    model, tokens = Transformer(vocab_size=11), jax.ShapeDtypeStruct((2, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    specs = infer_block_specs(make_loss(model), params, tokens, tokens, v="mean")
    grids = jax.tree.map(lambda spec, x: spec.grid(x.shape), specs, params)
    assert {name: grids["attention"][name]["kernel"] for name in grids["attention"]} == {
        "query": (1, 4, 1), "key": (1, 4, 1), "value": (1, 4, 4), "out": (1, 1, 16),
    }  # fmt: skip
    assert grids["embed"]["embedding"] == (11, 1)
    assert grids["up"]["kernel"] == (1, 64)


def test_the_picture_orders_coordinates_by_block(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown, outlined = [], []
    imshow, add_patch = Axes.imshow, Axes.add_patch
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, x, **more: shown.append(x) or imshow(axes, x, **more)
    )
    monkeypatch.setattr(
        Axes, "add_patch", lambda axes, patch: outlined.append(patch) or add_patch(axes, patch)
    )
    spec, shape = per_head(2), (3, 4)
    blocks = block_numbers(spec, shape)
    matrix = (blocks[:, None] == blocks[None, :]).astype(float)  # strided: not in order yet
    draw(tmp_path / "picture.png", [Panel("title", spec, shape, matrix, -matrix)])
    for found in shown:
        np.testing.assert_array_equal(found, np.kron(np.eye(2), np.ones((6, 6))))
    corners = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in outlined[-2:]]
    assert corners == [((-0.5, -0.5), 6, 6), ((5.5, 5.5), 6, 6)]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"windows": 0}, "--windows is 0"),
        ({"windows": 4097}, "--windows is 4097, but there are 4,096"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0"),
    ],
)
def test_wrong_options_are_one_clear_error(options, message):
    with pytest.raises(ConfigError, match=message):
        Config(**options).check()


@pytest.mark.slow
def test_the_command_draws_both_pictures(tmp_path):
    runs, environment = tmp_path / "runs", quick_environment()
    options = ["--steps=20", "--windows=2", f"--runs={runs}"]
    result = run_command("hessian", *options, environment=environment)
    assert result.returncode == 0, result.stderr
    folder = only_run(runs)
    assert {"mlp.png", "transformer.png", "results.json"} <= {p.name for p in folder.iterdir()}
    assert "attention/query" in result.stdout
