"""What the tests of the examples share: run folders, command lines, kills."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.common import runs

REPOSITORY = Path(__file__).parents[2]


def only_run(root: Path) -> Path:
    (config,) = root.glob("*/config.json")
    return config.parent


def losses(folder: Path) -> list[dict]:
    """The metrics of a run without its timings."""
    records = runs.read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "ms"} for record in records]


def command(example: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"examples.{example}", *arguments]


def run_command(example: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(example, *arguments), cwd=REPOSITORY, capture_output=True, text=True, check=False
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


def run_through_kills(example: str, options: list[str], root: Path, seed: int, log: Path) -> int:
    """Kill the program again and again, wherever it is, until it gets through; how many times it
    was killed."""
    source = random.Random(seed)
    kills = 0
    resume: list[str] = []
    while True:
        arguments = [*(resume or options), f"--runs={root}"]
        with log.open("w") as file:
            process = subprocess.Popen(
                command(example, *arguments), cwd=REPOSITORY, stdout=file, stderr=file
            )
            try:
                # Longer each time, so that the run comes to its end; import takes the first
                # seconds.
                process.wait(timeout=source.uniform(5, 9) + 0.5 * kills)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            else:
                assert process.returncode == 0, log.read_text()
                return kills
        if list(root.glob("*/config.json")):
            resume = ["--resume", str(only_run(root))]
