"""What all examples do alike: refusals, broken runs, interrupts, the choice of an optimizer."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time

import jax
import optax
import optax.contrib
import pytest

from examples.common import cli, runs, text
from examples.common.cli import ConfigError
from examples.common.optimizers import OptimizerConfig, state_bytes
from examples.common.text import TextConfig
from examples.common.training import METRICS_FILE, load_config
from examples.diffusion import train as diffusion
from examples.gnn import train as gnn
from examples.gpt2 import train as gpt2
from examples.llama import train as llama
from examples.resnet import train as resnet
from optax_adam_mini import ScaleByAdamMiniState
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import path_str
from tests.examples.language import TINY_RUN, write_corpus
from tests.examples.running import REPOSITORY, command, only_run, run_command

# Orbax's event loops, of checkpoints that could not be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run_of_gpt2(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    data = TextConfig(text=str(corpus))
    gpt2.main(gpt2.Config(**{**TINY_RUN, "data": data, "runs": str(root), "optimizer": "adamw"}))
    return only_run(root)


def contents(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_another_examples_run_is_refused_and_not_written_to(run_of_gpt2):
    before = contents(run_of_gpt2)
    with pytest.raises(ConfigError, match=r"is no run of this example: its options are others"):
        llama.main(llama.Config(resume=str(run_of_gpt2)))
    assert contents(run_of_gpt2) == before


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "config.json cannot be read"),
        pytest.param("[1, 2]", "config.json cannot be read", marks=pytest.mark.slow),
        pytest.param('{"steps": 3}', "is no run of this example", marks=pytest.mark.slow),
    ],
)
def test_a_broken_run_is_refused_in_one_line(written, message, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / runs.CONFIG_FILE).write_text(written)
    done = run_command("gpt2", f"--resume={folder}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == [runs.CONFIG_FILE]


def test_options_that_make_no_sense_are_refused_on_resume(run_of_gpt2, tmp_path):
    stored = json.loads((run_of_gpt2 / runs.CONFIG_FILE).read_text())
    for changed in ({"steps": -1}, {"hyper": {"no_such": 1}}, {"model": "gpt9"}):
        folder = tmp_path / next(iter(changed))
        folder.mkdir()
        runs.write_json(folder / runs.CONFIG_FILE, {**stored, **changed})
        with pytest.raises(ConfigError, match=r"cannot be read .*start a new run"):
            gpt2.main(gpt2.Config(resume=str(folder)))


def test_a_broken_checkpoint_is_refused(run_of_gpt2, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_of_gpt2, folder)
    config = json.loads((folder / runs.CONFIG_FILE).read_text())
    runs.write_json(folder / runs.CONFIG_FILE, {**config, "steps": 100})
    checkpoints = folder / "adamw" / "checkpoints"
    newest = checkpoints / str(runs.newest_checkpoint(checkpoints))
    for path in sorted(newest.rglob("*")):
        if (path.is_file() and "ocdbt" in str(path)) or path.parent.name == "d":
            path.write_bytes(b"broken")
    with pytest.raises(ConfigError, match=rf"checkpoint .*{newest.name} cannot be read .*move it"):
        gpt2.main(gpt2.Config(resume=str(folder)))


def test_a_run_of_before_rows_and_columns_keeps_the_papers_blocks(run_of_gpt2, tmp_path):
    stored = json.loads((run_of_gpt2 / runs.CONFIG_FILE).read_text())
    assert stored.pop("v") == "outer"
    assert stored.pop("parameters")["param_dtype"] == "float32"
    runs.write_json(tmp_path / runs.CONFIG_FILE, stored)
    assert load_config(gpt2.Config, tmp_path).v == "mean"
    assert load_config(gpt2.Config, run_of_gpt2).v == "outer"


@pytest.mark.parametrize(
    ("steps", "config", "expected"),
    [
        (500, OptimizerConfig(), 100),
        (4000, OptimizerConfig(), 100),
        (20, OptimizerConfig(), 4),
        (1, OptimizerConfig(), 0),
        (300, OptimizerConfig(warmup_share=0.1), 30),
        (20, OptimizerConfig(warmup_steps=7), 7),
    ],
)
def test_warmup_is_a_share_of_the_steps(steps, config, expected):
    config.check(steps)
    assert config.warmup(steps) == expected


def test_wrong_warmups_are_refused():
    with pytest.raises(ConfigError, match=r"--warmup-share is 1.0, but must be from 0 to less"):
        OptimizerConfig(warmup_share=1.0).check(10)
    with pytest.raises(ConfigError, match=r"--warmup-steps is 10, but must be from 0 to --steps"):
        OptimizerConfig(warmup_steps=10).check(10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00", r"picture.png is no text in UTF-8 \(byte 0 is 0x89\)"),
        (b"text with a \x00 in it", r"picture.png is no text \(byte 12 is 0\)"),
        ("fa\u00e7ade".encode("latin-1"), r"is no text in UTF-8 \(byte 2 is 0xe7\)"),
    ],
)
def test_what_is_no_text_is_refused_alone_and_passed_over_in_a_folder(
    content, message, tmp_path, capsys
):
    picture = tmp_path / "picture.png"
    picture.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        text.documents(TextConfig(text=str(picture)))
    with pytest.raises(ConfigError, match="there is no text"):
        text.documents(TextConfig(text=str(tmp_path)))
    (tmp_path / "good.txt").write_text("good")
    capsys.readouterr()
    assert text.documents(TextConfig(text=str(tmp_path))) == [text.Document("good.txt", b"good")]
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("9276679 requested and 2092928 written"),  # NumPy's
        ValueError("RESOURCE_EXHAUSTED: ... No space left on device [type.googleapis.com]"),
    ],
)
def test_a_full_disk_ends_the_run_with_one_line(error, capsys):
    def main():
        try:
            raise error
        except Exception as found:
            raise RuntimeError("in a thread") from found

    assert cli.exit_status(main) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full: ")
    with pytest.raises(KeyError):
        cli.exit_status(lambda: {}["no such"])


MODULES = {"gpt2": gpt2, "llama": llama, "resnet": resnet, "diffusion": diffusion, "gnn": gnn}
# Tied or not, tables and output heads are Adam-mini's, and so are gains and biases.
ADAM_MINIS = {
    "gpt2": {"wte", "wpe"},
    "llama": {"embed", "head"},
    "resnet": {"fc"},
    "diffusion": {"conv_out"},
    "gnn": set(),
}


@pytest.mark.parametrize("name", MODULES)
def test_muon_has_the_matrices_and_adam_mini_the_rest(name):
    config = MODULES[name].Config()
    program = MODULES[name].make_program(config, "muon_mini_int8")
    state = program.abstract_state().opt_state
    (muon,) = (s for s in jax.tree.leaves(state, is_leaf=_is_muon) if _is_muon(s))
    paths = lambda tree: {path_str(keys) for keys, _ in leaves_with_path(tree)}
    (adam,) = (s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s))
    of_muon, of_adam = paths(muon.mu.codes), paths(adam.mu.codes)
    assert of_muon.isdisjoint(of_adam)
    assert all(path.endswith("kernel") for path in of_muon)
    assert of_muon or name == "gnn"
    kernels = {
        path.rsplit("/", 2)[-2] for path in of_adam if path.endswith(("kernel", "embedding"))
    }
    assert kernels >= ADAM_MINIS[name], kernels
    # In small models a row is short, and its largest entry adds up.
    assert state_bytes(state) < (0.2 if name == "gnn" else 0.14) * 8 * sum(
        x.size for x in jax.tree.leaves((muon.mu.codes, adam.mu.codes))
    )


def _is_muon(x):
    return isinstance(x, optax.contrib.MuonState)


def _is_adam(x):
    return isinstance(x, ScaleByAdamMiniState)


@pytest.mark.slow
def test_muon_trains(corpus, tmp_path):
    losses = {}
    for rate in (2e-2, 1e-9):
        hyper = OptimizerConfig(warmup_steps=2, muon_learning_rate=rate)
        data = TextConfig(text=str(corpus))
        options = {**TINY_RUN, "data": data, "hyper": hyper, "optimizer": "muon_mini_int8"}
        root = tmp_path / str(rate)
        gpt2.main(gpt2.Config(**{**options, "runs": str(root)}))
        file = only_run(root) / "muon_mini_int8" / METRICS_FILE
        losses[rate] = [r["held_out_loss"] for r in runs.read_metrics(file) if "held_out_loss" in r]
    assert losses[2e-2][-1] < losses[1e-9][-1] < losses[1e-9][0]


@pytest.mark.slow
def test_the_optimizers_are_listed():
    shown = " ".join(run_command("gpt2", "--help").stdout.split())
    assert "{None,adamw,adam_mini,adam_mini_int8,muon_mini,muon_mini_int8}" in shown
    refused = run_command("gpt2", "--optimizer=adem")
    assert refused.returncode == 2
    assert "adam_mini" in refused.stderr


# Ctrl-C


def _has_come_to(moment, root):
    folders = list(root.glob("*/adamw/checkpoints"))
    return bool(folders) and (moment == "compiling" or bool(runs.newest_checkpoint(folders[0])))


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.3, 1.5, 4.0, "compiling", "training"])
def test_an_interrupt_at_any_moment_ends_in_one_line_and_can_be_resumed(after, corpus, tmp_path):
    options = ["--layers=2", "--heads=2", "--width=16", "--context=16", "--batch-size=4"]
    options += ["--steps=100000", "--eval-windows=8", "--checkpoint-every=20", f"--text={corpus}"]
    log, environment = tmp_path / "log", {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command("gpt2", *options, f"--runs={tmp_path / 'runs'}"),
            cwd=REPOSITORY, stdout=file, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
    if isinstance(after, float):
        time.sleep(after)
    else:
        deadline = time.monotonic() + 120
        while not _has_come_to(after, tmp_path / "runs") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _has_come_to(after, tmp_path / "runs")
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == 1, said
    assert lines[0].startswith("interrupted: ")
    if after == "training":
        folder = only_run(tmp_path / "runs")
        step = runs.newest_checkpoint(folder / "adamw" / "checkpoints")
        assert lines[0] == f"interrupted: --resume {folder} goes on with adamw after step {step}."
        config = json.loads((folder / runs.CONFIG_FILE).read_text())
        runs.write_json(
            folder / runs.CONFIG_FILE, {**config, "steps": step + 1, "optimizer": "adamw"}
        )
        resumed = run_command("gpt2", f"--resume={folder}", environment=environment)
        assert resumed.returncode == 0, resumed.stderr
        assert f"goes on after step {step}" in resumed.stdout


def test_fields_of_the_configuration_are_all_stored(run_of_gpt2):
    stored = json.loads((run_of_gpt2 / runs.CONFIG_FILE).read_text())
    assert stored.keys() == {field.name for field in dataclasses.fields(gpt2.Config)}
