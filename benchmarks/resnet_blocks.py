"""Does a block for each output channel of a convolution serve better than one for the convolution?

python -m benchmarks.resnet_blocks

Trains the nano ResNet on scikit-learn's digits with AdamW and with Adam-mini's two partitions, all
with the hyper-parameters of examples/resnet, and prints the test accuracy of each.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from examples.common.training import result, train
from examples.resnet.train import Config, load_task

# Title of a row: optimizer, and the option --conv.
ROWS = {
    "AdamW": ("adamw", "channel"),
    "Adam-mini, a block a channel": ("adam_mini", "channel"),
    "Adam-mini, a block a convolution": ("adam_mini", "tensor"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare the blocks of convolutions on scikit-learn's digits."""

    seeds: int = 3
    """How many seeds, from 0 on; the table has their mean."""


def accuracies(title: str, seeds: Sequence[int]) -> tuple[list[float], dict]:
    """The test accuracy of one row with each seed, and the last seed's whole result."""
    optimizer, conv = ROWS[title]
    found = []
    for seed in seeds:
        config = Config(seed=seed, conv=conv)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            task = load_task(config, folder)
            train(config, optimizer, task, folder, Console(quiet=True))
            last = result(task, optimizer, folder)
        found.append(last["accuracy"])
    return found, last


def main(options: Options) -> None:
    console = Console()
    seeds = range(options.seeds)
    table = Table(title=f"Test accuracy on digits, seeds 0 to {options.seeds - 1}")
    table.add_column("optimizer")
    for heading in ("mean", "each seed", "numbers in v", "ms per step"):
        table.add_column(heading, justify="right")
    for title in ROWS:
        with console.status(title):
            found, last = accuracies(title, seeds)
        table.add_row(
            title,
            f"{np.mean(found):.2%}",
            " ".join(f"{accuracy:.2%}" for accuracy in found),
            f"{last['numbers_in_v']:,}",
            f"{last['ms_per_step']:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=Options.__doc__))
