"""The comparison seed by seed: what is trained, what is remembered, and the intervals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from benchmarks.quality import intervals, paired
from benchmarks.quality.variants import VARIANTS
from benchmarks.quality.workloads import WORKLOADS
from examples.common.language import abstract_model, block_specs
from examples.common.optimizers import OPTIMIZERS, OptimizerConfig
from examples.gpt2.train import Config as GPT2Config
from examples.llama.train import Config as LlamaConfig
from optax_adam_mini import outer, per_neuron

BEST = {"adamw": 3e-3, "adam_mini": 4.5e-3}


def loss_of(optimizer, rate, seed):
    """Convex in the logarithm of the rate, and the same for a seed."""
    return 2 + abs(np.log(rate / BEST.get(optimizer, 3e-3))) + 0.01 * seed


@pytest.fixture
def trained(monkeypatch):
    """Stands for training; what was asked for."""
    asked = []

    def train(config, load_task, optimizer, seeds):
        for seed in seeds:
            asked.append((optimizer, config.v, config.hyper.learning_rate, seed))
            value = loss_of(optimizer, config.hyper.learning_rate, seed)
            yield {"held_out_loss": value, "parameters": 10, "optimizer_bytes": 80, "seconds": 0.0}

    monkeypatch.setattr(paired, "train_seeds", train)
    return asked


def options(folder, **more):
    return paired.Options(
        **{"workloads": ("gpt2",), "contenders": ("adamw", "mean", "outer"), "seeds": 3,
           "output": str(folder), **more}
    )  # fmt: skip


def test_rates_are_walked_and_all_seeds_trained_at_adamws_best(trained, tmp_path, capsys):
    paired.main(options(tmp_path))
    content = json.loads((tmp_path / "gpt2_500.json").read_text())
    assert [row["learning_rate"] for row in content["rows"]] == [3e-3] * 3
    assert [row["contender"] for row in content["rows"]] == ["adamw", "mean", "outer"]
    assert all(len(row["values"]) == 3 for row in content["rows"])
    assert {one[:2] for one in trained} == {
        ("adamw", "mean"), ("adam_mini", "mean"), ("adam_mini", "outer"),
    }  # fmt: skip
    # The curve: the others at the rates of AdamW's walk, with the seeds that chose among them.
    rates = {rate for name, _, rate, _ in trained if name == "adamw"}
    assert rates == {2e-3, 3e-3, 4.5e-3}
    for rate in rates:
        assert ("adam_mini", "outer", rate, 2) in trained
    assert ("adam_mini", "outer", 2e-3, 3) not in trained
    page = (tmp_path / "gpt2_500.md").read_text()
    assert "gpt2_500.png" in page
    assert page in capsys.readouterr().out
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_each_optimizer_may_have_its_own_rate(trained, tmp_path):
    paired.main(options(tmp_path, own_rates=True))
    rows = json.loads((tmp_path / "gpt2_500.json").read_text())["rows"]
    assert [(row["contender"], row["learning_rate"]) for row in rows] == [
        ("adamw", 3e-3), ("mean", 3e-3), ("outer", 3e-3), ("mean", 4.5e-3), ("outer", 4.5e-3),
    ]  # fmt: skip


def test_muons_rate_is_walked_before_that_of_the_rest(monkeypatch, tmp_path):
    best = {"adamw": 3e-3, "muon_mini": 6.75e-3}
    seen = []

    def train(config, load_task, optimizer, seeds):
        rate, muons = config.hyper.learning_rate, config.hyper.muon_learning_rate
        for _ in seeds:
            seen.append((optimizer, rate, muons))
            value = 1 + abs(np.log(rate / best[optimizer]))
            value += abs(np.log(muons / 3e-2)) if optimizer == "muon_mini" else 0
            yield {"held_out_loss": value, "parameters": 10, "optimizer_bytes": 80, "seconds": 0.0}

    monkeypatch.setattr(paired, "train_seeds", train)
    paired.main(options(tmp_path, contenders=("adamw", "muon_mini"), own_rates=True))
    content = json.loads((tmp_path / "gpt2_500.json").read_text())
    assert [(row["contender"], row["learning_rate"]) for row in content["rows"]] == [
        ("adamw", 3e-3), ("muon_mini", 3e-3), ("muon_mini", 6.75e-3),
    ]  # fmt: skip
    assert content["rows"][-1]["title"].endswith("(matrices 0.03)")
    assert content["rows"][-1]["values"] == [1.0] * 3
    muons = [one for one in seen if one[0] == "muon_mini"]
    assert {one[1] for one in muons[:8]} == {3e-3}  # four rates of two seeds
    assert content["runs"][-1]["asked"]["muon_learning_rate"] == 3e-2
    assert "muon_learning_rate" not in content["settings"]["hyper"]


def test_a_walk_may_look_further_than_one_neighbour():
    """Two seeds are noisy: a rate that looks worse must not end the walk before the best one."""
    values = {3e-3: 2.0, 4.5e-3: 2.1, 6.75e-3: 1.5, 1.01e-2: 1.6}
    score = lambda rate: values.get(rate, 3.0)
    assert paired._walk(3e-3, score) == 3e-3
    assert paired._walk(3e-3, score, reach=2) == 6.75e-3


def test_all_with_muon_may_be_trained_at_one_pair_of_rates(trained, tmp_path):
    names = ("adamw", "outer", "muon_mini", "muon")
    paired.main(options(tmp_path, contenders=names, rate=3e-3, also=(1e-2, 3e-2)))
    rows = json.loads((tmp_path / "gpt2_500.json").read_text())["rows"]
    assert [(row["contender"], row["learning_rate"]) for row in rows[4:]] == [
        ("muon_mini", 1e-2), ("muon", 1e-2),
    ]  # fmt: skip
    assert all(row["title"].endswith("(matrices 0.03)") for row in rows[4:])
    page = (tmp_path / "gpt2_500.md").read_text()
    assert "The rows against the columns, at one pair of rates for all, seed by seed:" in page


def test_finished_trainings_are_not_repeated(trained, tmp_path):
    paired.main(options(tmp_path))
    count = len(trained)
    paired.main(options(tmp_path))
    assert len(trained) == count
    paired.main(options(tmp_path, seeds=4))
    assert {one[3] for one in trained[count:]} == {4}


def test_a_known_rate_is_not_walked(trained, tmp_path):
    comparison = paired.Comparison("gpt2", options(tmp_path, rate=1e-3), Console(quiet=True))
    paired.compare(comparison)
    assert {one[2] for one in trained} == {1e-3}


def test_intervals_equal_scipys_t_intervals():
    differences = [0.3, -0.1, 0.4, 0.2, 0.05]
    found = intervals.paired(differences)
    expected = scipy.stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(found, (np.mean(differences), *expected))
    assert intervals.paired([0.5]) == (0.5, -np.inf, np.inf)


def test_differences_are_paired_and_have_the_sign_of_the_value():
    loss, accuracy = WORKLOADS["gpt2"], WORKLOADS["gcn"]
    adamw = [1.0, 2.0, 4.0]
    # The same difference on every seed leaves no doubt, however far the seeds are apart.
    assert intervals.behind(loss, [1.01, 2.02, 4.04], adamw) == pytest.approx((0.01, 0.01, 0.01))
    text = intervals.interval_text(loss, intervals.Interval(0.012, -0.001, 0.025))
    assert text == "+1.20% [-0.10%, +2.50%]"
    behind = intervals.behind(accuracy, [0.97, 0.96], [0.98, 0.98])
    text = intervals.interval_text(accuracy, behind)
    assert text.startswith("-1.50 points [-7.85, +4.85]")


@pytest.mark.parametrize("config", [GPT2Config(), LlamaConfig()], ids=["gpt2", "llama"])
def test_the_specs_of_each_variant_are_those_of_its_name(config):
    _, params = abstract_model(config)
    specs = block_specs(config)
    size = {}
    for name in VARIANTS:
        tx = OPTIMIZERS[name](lambda _: 1e-3, OptimizerConfig(), specs)
        nu = jax.eval_shape(tx.init, params)[0].nu
        size[name] = sum(leaf.size for leaf in jax.tree.leaves(nu))
    own = OPTIMIZERS["adam_mini"](lambda _: 1e-3, OptimizerConfig(), specs)
    size["outer"] = sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(own.init, params)[0].nu)
    )
    assert size["rows for matrices"] <= size["outer"] < size["rows for heads"]
    assert size["all per coordinate"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size["embedding per coordinate"] > size["outer"] > size["embedding by token"]
    assert size["gains in one block"] < size["outer"]


def test_the_updates_of_other_orders_are_those_of_their_names():
    specs = {"kernel": outer(per_neuron(axis=0), per_neuron())}
    config = OptimizerConfig(weight_decay=0.0)
    grads = [{"kernel": jax.random.normal(jax.random.key(i), (4, 6)) ** 3} for i in range(3)]

    def updates(name, config=config):
        tx = OPTIMIZERS[name](lambda _: -1.0, config, specs)
        state, found = tx.init(grads[0]), []
        for g in grads:
            update, state = tx.update(g, state, grads[0])
            found.append(np.asarray(update["kernel"]))
        return found

    def clipped(x):
        return x / max(1.0, float(np.sqrt(np.mean(x**2))))

    own = updates("outer, not bounded")
    assert max(float(np.sqrt(np.mean(x**2))) for x in own) > 1  # there is something to clip
    for found, update in zip(updates("update clipped at 1"), own, strict=True):
        np.testing.assert_allclose(found, clipped(update), rtol=1e-5)
    divided = updates("outer, not bounded", dataclasses.replace(config, b1=0.0))
    m = np.zeros((4, 6))
    for t, found in enumerate(updates("divided, clipped at 1, then averaged"), 1):
        m = 0.9 * m + 0.1 * clipped(divided[t - 1])
        np.testing.assert_allclose(found, m / (1 - 0.9**t), rtol=1e-5)


def test_the_quick_form_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    paired.main(dataclasses.replace(options(tmp_path), quick=True))
    assert {one[3] for one in trained} == {1, 2}
    assert (tmp_path / "runs" / "paired_quick" / "gpt2_8.json").exists()
