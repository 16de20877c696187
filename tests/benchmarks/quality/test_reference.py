"""The training in PyTorch is the example's: from the same weights all optimizers reach the same
losses as in JAX, with the reference package and without it."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.quality import intervals
from benchmarks.quality.workloads import WORKLOADS
from examples.common.optimizers import OptimizerConfig
from examples.common.training import measure_held_out
from examples.gpt2.model import CONFIGS, GPT2
from examples.gpt2.train import Config, load_task
from optax_adam_mini import per_element

torch = pytest.importorskip("torch")
pytest.importorskip("adam_mini")
from benchmarks.quality import reference  # noqa: E402

STEPS, SEED, RATE = 10, 3, 4.5e-3


class PackagesBlocks(Config):
    """The paper's cut, but for biases, which the package leaves to Adam."""

    overrides = (("bias$", per_element()),)


def to_torch(params):
    """The example's parameters under the names and in the layout of the PyTorch model."""
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        *modules, last = [str(key.key) for key in path if hasattr(key, "key")]
        name = "bias" if last == "bias" else "weight"
        module = ".".join(modules)
        array = torch.tensor(np.asarray(value).T if last == "kernel" else np.asarray(value))
        if module.endswith("c_attn"):
            for part, rows in zip("qkv", array.chunk(3), strict=True):
                found[f"{module.removesuffix('c_attn')}w{part}.{name}"] = rows.clone()
        else:
            found[f"{module.replace('attn.c_proj', 'attn.wo')}.{name}"] = array
    return found


@pytest.mark.parametrize(
    ("contender", "optimizer", "v"),
    [
        ("adamw", "adamw", "mean"),
        ("adam_mini", "adam_mini", "mean"),
        ("outer", "adam_mini", "outer"),
    ],
)
def test_training_in_pytorch_equals_the_examples(contender, optimizer, v, tmp_path):
    hyper = OptimizerConfig(learning_rate=RATE)
    config = PackagesBlocks(steps=STEPS, seed=SEED, eval_windows=32, v=v, hyper=hyper)
    task = load_task(config, tmp_path)
    program = task.make_program(optimizer)
    state = jax.jit(program.init)()
    evaluate = jax.jit(program.evaluate)
    first = measure_held_out(task, evaluate, state)["held_out_loss"]

    model = reference.GPT2()
    model.load_state_dict(to_torch(state.params))
    batches = np.stack([task.batch(number) for number in range(1, 1 + STEPS)])
    held_out = np.concatenate(list(task.held_out()))
    found = reference.train(
        model, contender, RATE, *(torch.tensor(x, dtype=torch.int64) for x in (batches, held_out))
    )

    step = jax.jit(program.step)
    for number in range(1, 1 + STEPS):
        state, _ = step(state, task.batch(number))
    last = measure_held_out(task, evaluate, state)["held_out_loss"]
    assert found["first_held_out_loss"] == pytest.approx(first, rel=1e-5)
    assert last < first - 0.5
    assert found["held_out_loss"] == pytest.approx(last, rel=2e-5)
    nu = state.opt_state[1][0].nu
    assert found["numbers_in_v"] == sum(leaf.size for leaf in jax.tree.leaves(nu))


def test_first_weights_are_spread_as_the_examples():
    state = to_torch(nnx.state(GPT2(CONFIGS["nano"], rngs=nnx.Rngs(1))))
    own = dict(reference.GPT2().initialize(1).named_parameters())
    assert state.keys() == own.keys()
    for name, value in own.items():
        value = value.detach()
        assert value.shape == state[name].shape
        torch.testing.assert_close(value.std(), state[name].std(), rtol=0.05, atol=1e-8)
        torch.testing.assert_close(value.mean(), state[name].mean(), rtol=0, atol=2e-3)
    again = reference.GPT2().initialize(1)
    assert all(torch.equal(p, own[name]) for name, p in again.named_parameters())


def test_the_table_says_which_losses_agree_with_the_findings(tmp_path, monkeypatch, capsys):
    """Of losses that are as the findings say, and of one that is not."""

    def trained(missing, options):
        for one in missing:
            of_mini = 0.025 if one.learning_rate > 2e-3 else 0.01
            behind = {"adamw": 0.0, "outer": 0.001}.get(one.contender, of_mini)
            noise = 1e-3 * np.random.default_rng(missing.index(one)).normal()
            loss = (2.2 - 80 * one.learning_rate + 0.01 * one.seed) * (1 + behind + noise)
            yield one, {"held_out_loss": loss, "numbers_in_v": 1}

    monkeypatch.setattr(reference, "train_all", trained)
    path = tmp_path / "reference.json"
    options = reference.Options(seeds=4, device="cpu", output=str(path))
    reference.main(options)
    page = path.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    assert "AdamW's best of these rates is 0.0045" in page
    assert page.count("not refuted") == 7
    assert page.count("refuted") == 7

    content = json.loads(path.read_text())
    assert len(content["runs"]) == 4 * 2 * 4
    for row in content["rows"]:
        if row["contender"] == "outer" and row["learning_rate"] == 4.5e-3:
            row["values"] = [value * 1.02 for value in row["values"]]
    assert "keeps AdamW's loss at 0.0045: refuted" in reference.page(content)

    # The same command does nothing anew; the pages of the paired comparison leave its file alone.
    monkeypatch.setattr(reference, "train_all", None)
    reference.main(options)
    assert intervals.draw_memory(tmp_path) is None
    assert WORKLOADS["gpt2"].config.steps == options.steps
