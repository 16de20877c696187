"""What the tests of the examples share: run folders, command lines, kills."""

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from examples.common import runs

REPOSITORY = Path(__file__).parents[2]


def only_run(root: Path) -> Path:
    (config,) = root.glob("*/config.json")
    return config.parent


class Whole(NamedTuple):
    """A run that nothing interrupted, and what it printed."""

    folder: Path
    output: str


def run_whole(root: Path, train: Callable[[], None]) -> Whole:
    """`train` leaves one run in the folder `root`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train()
    return Whole(only_run(root), output.getvalue())


def losses(folder: Path) -> list[dict]:
    """The metrics of a run without its timings."""
    records = runs.read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "ms"} for record in records]


def command(example: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"examples.{example}", *arguments]


def quick_environment() -> dict[str, str]:
    """For programs that are compiled more than they run: without most optimizations."""
    return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def run_command(
    example: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    return run_program(command(example, *arguments), environment)


def run_program(
    program: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        program, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment
    )


class KilledError(Exception):
    """Stands for a kill, in tests that stay in one process."""


def run_killed_at_save(number: int, main: Callable[[], None]) -> None:
    """Run `main` up to its checkpoint of this number, from 1 on, which is not written."""
    saves = iter(range(1, 100))
    save = runs.save_checkpoint

    def killed_save(*arguments):
        if next(saves) == number:
            raise KilledError
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", killed_save)
        with pytest.raises(KilledError):
            main()


def run_through_kills(
    program: list[str],
    options: list[str],
    root: Path,
    seed: int,
    log: Path,
    environment: dict[str, str],
    most: int = 4,
    within: float = 1.0,
) -> int:
    """Kill the program up to `most` times, by turns some seconds after it has begun to train and
    anywhere before that, and let it get through; how many times it was killed. Every time it must
    go on from the last complete checkpoint."""
    source = random.Random(seed)
    resume: list[str] = []
    newest: dict[str, int] = {}
    until_it_trains = 0.0
    for kills in range(most + 1):
        arguments = [*(resume or options), f"--runs={root}"]
        before = last_steps(root)
        start = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [*program, *arguments],
                cwd=REPOSITORY,
                stdout=file,
                stderr=file,
                env=environment,
            )
            trains = not kills % 2 or kills == most
            if trains:
                # However slow the machine is, some steps are made each other time.
                while process.poll() is None and (kills == most or not advanced(root, before)):
                    time.sleep(0.01)
                until_it_trains = time.monotonic() - start
            try:
                process.wait(timeout=source.uniform(0, within if trains else until_it_trains))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        assert_goes_on(log.read_text(), newest, must=trains)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, log.read_text()
            return kills
        newest = complete_checkpoints(root)
        resume = ["--resume", str(only_run(root))]
    raise AssertionError("the last round is not killed")


def last_steps(root: Path) -> dict[Path, int]:
    """The last step that is logged for each optimizer."""
    found = {path: runs.read_metrics(path) for path in root.glob("*/*/metrics.jsonl")}
    return {path: records[-1]["step"] for path, records in found.items() if records}


def advanced(root: Path, before: dict[Path, int]) -> bool:
    """Whether steps were made that were not logged before."""
    return any(step > before.get(path, 0) for path, step in last_steps(root).items())


def complete_checkpoints(root: Path) -> dict[str, int]:
    """The newest checkpoint of each optimizer that has its final name."""
    found: dict[str, int] = {}
    for path in root.glob("*/*/checkpoints/*"):
        if path.name.isdigit():
            optimizer = path.parents[1].name
            found[optimizer] = max(int(path.name), found.get(optimizer, 0))
    return found


def assert_goes_on(printed: str, newest: dict[str, int], *, must: bool) -> None:
    """Every optimizer goes on from its newest checkpoint; where it `must` have come so far, it
    did."""
    told = re.findall(r"(\w+): (?:goes on after step|has finished its) (\d+)", printed)
    for optimizer, step in told:
        assert int(step) == newest[optimizer], printed
    if must:
        assert newest.keys() <= {optimizer for optimizer, _ in told}, printed
