"""Language models on meshes: the options, the same losses everywhere, several processes."""

import dataclasses
import json
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from examples.common import runs
from examples.common.cli import ConfigError
from examples.common.mesh import MeshConfig, inside, over_batch, param_shardings, split_batch
from examples.common.text import TextConfig
from examples.gpt2 import train as gpt2_train
from examples.llama import train as llama_train
from tests.examples.language import TINY_RUN, write_corpus
from tests.examples.running import (
    REPOSITORY,
    assert_goes_on,
    command,
    complete_checkpoints,
    losses,
    only_run,
    quick_environment,
    run_command,
    run_killed_at_save,
)

pytestmark = pytest.mark.slow  # the language models' tests have what is common

ALL = MeshConfig(mesh="data=2,fsdp=2,tensor=2")
# As TINY_RUN, on the command line.
TINY = [
    "--layers=1", "--heads=2", "--width=16", "--context=16", "--batch-size=4", "--steps=8",
    "--warmup-steps=2", "--eval-every=4", "--checkpoint-every=2", "--log-every=1",
    "--eval-windows=8", "--optimizer=adam_mini",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def tiny_config(example, corpus, root, **options):
    options = {**TINY_RUN, "optimizer": "adam_mini", **options}
    return example.Config(data=TextConfig(text=str(corpus)), runs=str(root), **options)


def assert_same_losses(found: Path, expected: Path, records=10, rtol=1e-5) -> None:
    found, expected = losses(found / "adam_mini"), losses(expected / "adam_mini")
    assert len(expected) == records
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=rtol)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,fsdp=2,tensor=2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("tensor=4, data=2", {"data": 2, "fsdp": 1, "tensor": 4}),
        (None, {"data": 1, "fsdp": 1, "tensor": 1}),
    ],
)
def test_the_sizes_of_a_mesh_are_read(text, sizes):
    assert MeshConfig(mesh=text).sizes == sizes


PROCESS = {"mesh": "fsdp=8", "coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"mesh": text}, f"--mesh is {text}, but must be sizes of data, fsdp, tensor, each")
          for text in ("fsdp", "fsdp=0", "fsdp=2,fsdp=4", "model=2", "fsdp=2;tensor=2", "")),
        ({**PROCESS, "process_id": None}, "go together: give all three, or --distributed"),
        ({**PROCESS, "process_id": 2}, "--process-id is 2, but must be from 0 to --num-processes - 1 = 1"),
        ({**PROCESS, "mesh": None}, "give its axes, such as --mesh fsdp=8"),
        ({**PROCESS, "distributed": True}, "leave these out, or --distributed"),
        ({"mesh": "fsdp=3"}, "--mesh fsdp=3 is of 3 devices, but there are 8: give sizes whose product is 8"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, message, tmp_path):
    config = gpt2_train.Config(devices=MeshConfig(**options), runs=str(tmp_path / "runs"))
    with pytest.raises(ConfigError) as refusal:
        gpt2_train.main(config)
    assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_refuses_a_batch_that_the_mesh_does_not_divide(corpus, tmp_path):
    config = tiny_config(
        gpt2_train, corpus, tmp_path / "new", batch_size=8, accumulate=4, devices=ALL
    )
    with pytest.raises(
        ConfigError, match=r"in 4 micro-batches, .* would split in 4: .* multiple of 16"
    ):
        gpt2_train.main(config)
    assert not (tmp_path / "new").exists()
    # A run that goes on elsewhere is refused there, and is still a run.
    runs.new_run(tmp_path / "old", tiny_config(gpt2_train, corpus, tmp_path / "old", batch_size=2))
    with pytest.raises(ConfigError, match="choose a --batch-size that is a multiple of 4"):
        gpt2_train.main(gpt2_train.Config(
            runs=str(tmp_path / "old"), resume=only_run(tmp_path / "old").name, devices=ALL
        ))  # fmt: skip
    assert only_run(tmp_path / "old").exists()


def test_rules_are_of_the_last_axes_and_leave_whole_what_is_not_divided():
    params = {
        "kernel": jnp.zeros((4, 6)), "h": {"kernel": jnp.zeros((3, 8, 8)), "bias": jnp.zeros((3, 8))},
        "wte": jnp.zeros((5, 4)), "fused": jnp.zeros((2, 8)), "scale": jnp.zeros(8),
        "few": jnp.zeros((2, 6)),
    }  # fmt: skip
    rules = [("fused", P(None, ("data", "tensor"))), ("kernel|wte", P("fsdp", "tensor")), ("bias", P("tensor")), ("few", P(None, ("fsdp", "tensor")))]  # fmt: skip
    mesh = MeshConfig(mesh="data=1,fsdp=2,tensor=4").make_mesh()
    found = param_shardings(params, rules, mesh)
    assert jax.tree.map(lambda sharding: sharding.spec, found) == {
        "kernel": P("fsdp", None), "h": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
        "wte": P(None, "tensor"), "fused": P(None, ("data", "tensor")), "scale": P(None),
        "few": P(None, "fsdp"),
    }  # fmt: skip


def test_each_device_asks_for_its_own_rows():
    mesh, whole, asked = ALL.make_mesh(), np.arange(24).reshape(8, 3), []

    def rows(part):
        asked.append(len(whole[part]))
        return whole[part]

    batch = split_batch(mesh, whole.shape, rows)
    assert set(asked) == {2}
    np.testing.assert_array_equal(batch, whole)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    # Six rows cannot be split in four.
    odd = split_batch(mesh, (6, 3), lambda part: whole[:6][part])
    assert odd.is_fully_replicated


def test_activations_are_split_as_the_batch():
    mesh = ALL.make_mesh()

    def constrained(x):
        with inside(mesh):
            return over_batch(x)

    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    assert "sharding_constraint" in str(jax.make_jaxpr(constrained)(x))
    odd = jax.ShapeDtypeStruct((6, 3), jnp.float32)
    assert "sharding_constraint" not in str(jax.make_jaxpr(constrained)(odd))
    assert "sharding_constraint" not in str(jax.make_jaxpr(over_batch)(x))


@pytest.mark.parametrize(
    ("name", "mesh", "scan"),
    [
        ("gpt2", ALL.mesh, False),
        pytest.param("gpt2", "fsdp=4,tensor=2", True, marks=pytest.mark.slow),
        pytest.param("llama", ALL.mesh, False, marks=pytest.mark.slow),
        pytest.param("llama", "fsdp=4,tensor=2", True, marks=pytest.mark.slow),
    ],
)
def test_losses_on_a_mesh_equal_those_of_one_device(name, mesh, scan, corpus, tmp_path):
    example = {"gpt2": gpt2_train, "llama": llama_train}[name]
    options = {"batch_size": 8, "accumulate": 2, "eval_windows": 7, "heads": 4}
    options |= {"scan": scan, "remat": scan, "checkpoint_every": 8}
    if name == "llama":
        options["kv_heads"] = 2
    for root, devices in (("one", MeshConfig()), ("mesh", MeshConfig(mesh=mesh))):
        example.main(tiny_config(example, corpus, tmp_path / root, devices=devices, **options))
    assert_same_losses(only_run(tmp_path / "mesh"), only_run(tmp_path / "one"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("scan", [False, True])
def test_the_optimizer_state_is_sharded_over_the_mesh(name, scan):
    example = {"gpt2": gpt2_train, "llama": llama_train}[name]
    config = example.Config(scan=scan, devices=ALL)
    state = example.make_program(config, "adam_mini").abstract_state()
    on_each = whole = 0
    for leaf in jax.tree.leaves(state):
        on_each += np.prod(leaf.sharding.shard_shape(leaf.shape))
        whole += leaf.size
    # Over fsdp and tensor, a quarter of all but gains, biases, nu, and half of wpe.
    assert 0.25 <= on_each / whole < 0.265


@pytest.mark.slow
def test_a_run_moves_between_meshes(corpus, tmp_path, capsys):
    """Two steps on 8 devices, two on 1, the rest on another mesh of 8."""
    gpt2_train.main(tiny_config(gpt2_train, corpus, tmp_path / "whole"))
    moving = tiny_config(gpt2_train, corpus, tmp_path / "moving", devices=ALL)
    run_killed_at_save(2, lambda: gpt2_train.main(moving))
    folder = only_run(tmp_path / "moving")
    resumed = gpt2_train.Config(runs=str(tmp_path / "moving"), resume=folder.name)
    run_killed_at_save(2, lambda: gpt2_train.main(resumed))
    again = dataclasses.replace(resumed, devices=MeshConfig(mesh="fsdp=4,tensor=2"))
    gpt2_train.main(again)
    output = capsys.readouterr().out
    assert "goes on after step 2" in output
    assert "goes on after step 4" in output
    assert_same_losses(folder, only_run(tmp_path / "whole"))

    gpt2_train.main(gpt2_train.Config(runs=str(tmp_path / "moving"), sample="the", sample_tokens=3))
    assert "adam_mini, step 8" in capsys.readouterr().out


def test_runs_of_before_there_were_meshes_go_on(corpus, tmp_path):
    run_killed_at_save(2, lambda: gpt2_train.main(tiny_config(gpt2_train, corpus, tmp_path)))
    folder = only_run(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["devices"]
    runs.write_json(folder / "config.json", config)
    gpt2_train.main(gpt2_train.Config(runs=str(tmp_path), resume=folder.name))
    assert losses(folder / "adam_mini")[-1]["step"] == 8


# Several processes.


def start_processes(
    count: int, devices: int, arguments: list[str], log: Path, folders: list[Path] | None = None
) -> list:
    """As many processes of the gpt2 example, of one mesh; in `folders`, if there are any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    several = [f"--coordinator={coordinator}", f"--num-processes={count}"]
    processes = []
    for index in range(count):
        if folders:
            folders[index].mkdir()
        with log.with_suffix(f".{index}").open("w") as file:
            processes.append(
                subprocess.Popen(
                    command("gpt2", *arguments, *several, f"--process-id={index}"),
                    cwd=folders[index] if folders else REPOSITORY,
                    stdout=file,
                    stderr=file,
                    env={
                        **quick_environment(),
                        "JAX_NUM_CPU_DEVICES": str(devices),
                        "PYTHONPATH": str(REPOSITORY),
                    },
                )
            )
    return processes


def finish(processes: list, log: Path) -> list[str]:
    """Wait for all; what they printed."""
    status = [process.wait(timeout=300) for process in processes]
    printed = [log.with_suffix(f".{index}").read_text() for index in range(len(processes))]
    assert status == [0] * len(processes), "\n".join(printed)
    return printed


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_two_and_survives_kills(corpus, tmp_path):
    options = {"steps": 20, "eval_every": 10}
    gpt2_train.main(tiny_config(gpt2_train, corpus, tmp_path / "whole", **options))
    options["checkpoint_every"] = 1
    moving = tiny_config(gpt2_train, corpus, tmp_path / "moving", **options)
    run_killed_at_save(2, lambda: gpt2_train.main(moving))
    folder = only_run(tmp_path / "moving")
    arguments = [f"--resume={folder}", "--mesh=data=2,fsdp=2,tensor=2"]

    source, newest = random.Random(0), complete_checkpoints(tmp_path / "moving")
    assert newest == {"adam_mini": 1}
    for kill in range(2):
        log = tmp_path / f"killed_{kill}"
        processes = start_processes(2, 4, arguments, log)
        # However slow the machine is, a checkpoint is made each time.
        while all(process.poll() is None for process in processes):
            if complete_checkpoints(tmp_path / "moving") != newest:
                break
            time.sleep(0.01)
        time.sleep(source.uniform(0, 0.3))
        # One after the other: what the first leaves half done the second must not make whole.
        for process in source.sample(processes, 2):
            process.send_signal(signal.SIGKILL)
            time.sleep(source.uniform(0, 0.1))
        assert [process.wait() for process in processes] == 2 * [-signal.SIGKILL]
        assert_goes_on(log.with_suffix(".0").read_text(), newest, must=True)
        before, newest = newest, complete_checkpoints(tmp_path / "moving")
        assert newest["adam_mini"] > before["adam_mini"]

    log = tmp_path / "resumed"
    first, second = finish(start_processes(2, 4, arguments, log), log)
    assert_goes_on(first, newest, must=True)
    assert "held-out" in first
    assert "held-out" not in second  # one process speaks for all
    assert_same_losses(folder, only_run(tmp_path / "whole"), records=22)


@pytest.mark.slow
def test_two_processes_train_as_one(corpus, tmp_path):
    gpt2_train.main(tiny_config(gpt2_train, corpus, tmp_path / "one"))
    arguments = [*TINY, f"--text={corpus}", f"--runs={tmp_path / 'two'}", "--mesh=fsdp=4,tensor=2"]
    finish(start_processes(2, 4, arguments, tmp_path / "log"), tmp_path / "log")
    folder = only_run(tmp_path / "two")
    assert_same_losses(folder, only_run(tmp_path / "one"))
    assert (folder / "results.json").exists()


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(tmp_path):
    (tmp_path / "short.txt").write_text("a" * 20)
    text = [f"--text={tmp_path / 'short.txt'}", "--mesh=data=2", f"--runs={tmp_path / 'runs'}"]
    processes = start_processes(2, 1, text, tmp_path / "log")
    assert [process.wait(timeout=120) for process in processes] == [2, 2]
    for index in range(2):
        assert "error: the training text has 19 tokens" in (tmp_path / f"log.{index}").read_text()
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_all_processes_must_see_the_run(corpus, tmp_path):
    """Each is started in a folder of its own, with --runs relative to it."""
    text = [*TINY, f"--text={corpus}", "--mesh=data=2", "--runs=runs"]
    folders = [tmp_path / str(index) for index in range(2)]
    processes = start_processes(2, 1, text, tmp_path / "log", folders)
    assert [process.wait(timeout=120) for process in processes] == [2, 2]
    assert "process 1 cannot go on: it says why" in (tmp_path / "log.0").read_text()
    assert "error: process 1 does not see runs/" in (tmp_path / "log.1").read_text()


def test_command_line_takes_a_mesh():
    alone = run_command("gpt2", "--mesh=data=1", "--distributed")
    assert alone.returncode == 2
    assert "error: --distributed found no cluster (" in alone.stderr
    refused = run_command("llama", "--mesh=fsdp=3")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --mesh fsdp=3 is of 3 devices, but there are ")
