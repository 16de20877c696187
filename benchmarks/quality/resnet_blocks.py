"""Which cut of a convolution is best: a row and a column, a number per channel, or one number?

python -m benchmarks.quality.resnet_blocks

Trains the nano ResNet on scikit-learn's digits with AdamW and with Adam-mini's three cuts, all
with the hyper-parameters of examples/resnet, and prints the test accuracy of each.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from examples.common.cli import check_counts
from examples.common.training import result, train
from examples.resnet.train import Config, load_task

# By title of a row: the optimizer, and the options --v and --conv.
ROWS: dict[str, tuple[str, Literal["outer", "mean"], Literal["channel", "tensor"]]] = {
    "AdamW": ("adamw", "outer", "channel"),
    "Adam-mini, outer": ("adam_mini", "outer", "channel"),
    "Adam-mini, channel": ("adam_mini", "mean", "channel"),
    "Adam-mini, tensor": ("adam_mini", "mean", "tensor"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the blocks of convolutions on scikit-learn's digits."""

    seeds: int = 3
    """Number of seeds, from 0 on; the table has their mean."""


def accuracies(title: str, seeds: Sequence[int], **options: Any) -> tuple[list[float], int]:
    """The test accuracy of one row with each seed, and the numbers in `v`.

    Args:
        title: the row.
        seeds: the seeds.
        options: of the example, instead of its own.
    """
    optimizer, v, conv = ROWS[title]
    found = []
    for seed in seeds:
        config = Config(seed=seed, v=v, conv=conv, **options)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            task = load_task(config, folder)
            train(config, optimizer, task, folder, Console(quiet=True))
            row = result(task, optimizer, folder)
        found.append(row["accuracy"])
    return found, row["numbers_in_v"]


def main(options: Options) -> None:
    check_counts({"seeds": options.seeds})
    console = Console()
    seeds = range(options.seeds)
    table = Table(title=f"Test accuracy on digits, seeds 0 to {options.seeds - 1}")
    table.add_column("optimizer")
    for heading in ("mean", "each seed", "numbers in v"):
        table.add_column(heading, justify="right")
    for title in ROWS:
        with console.status(title):
            found, numbers = accuracies(title, seeds)
        table.add_row(
            title,
            f"{np.mean(found):.2%}",
            " ".join(f"{accuracy:.2%}" for accuracy in found),
            f"{numbers:,}",
        )
    console.print(table)


if __name__ == "__main__":
    main(
        tyro.cli(
            Options, prog="python -m benchmarks.quality.resnet_blocks", description=Options.__doc__
        )
    )
