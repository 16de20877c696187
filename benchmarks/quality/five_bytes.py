"""The plot of loss against the bytes per parameter of a whole training.

python -m benchmarks.quality.five_bytes

It reads the comparisons in docs/results/bfloat16 (`benchmarks.quality.paired` writes them), and
writes loss.png beside them.
"""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.quality.intervals import Interval, behind_adamw
from benchmarks.quality.workloads import WORKLOADS

RESULTS = Path("docs/results/bfloat16")
RATES = {"best": "AdamW's best rate", "third": "a third of it"}


class Marked(NamedTuple):
    """How a contender is drawn."""

    label: str
    itemsize: int
    """Bytes of a parameter, and of its gradient."""


MARKED = {
    "adamw": Marked("AdamW, float32", 4),
    "outer, 8 bits": Marked("outer, 8 bits, float32", 4),
    "adamw, bfloat16 to nearest": Marked("AdamW, bfloat16, to nearest", 2),
    "outer, 8 bits, bfloat16 to nearest": Marked("outer, 8 bits, bfloat16, to nearest", 2),
    "outer, 8 bits, bfloat16": Marked("outer, 8 bits, bfloat16, at random", 2),
}


def points(folder: Path, name: str) -> dict[str, tuple[float, Interval]]:
    """For each contender the bytes per parameter of a training, and how far it is behind AdamW."""
    rows = json.loads((folder / f"{name}_500.json").read_text())["rows"]
    return {
        row["contender"]: (
            2 * MARKED[row["contender"]].itemsize + row["optimizer_bytes"] / row["parameters"],
            behind_adamw(WORKLOADS[name], row, rows[0]),
        )
        for row in rows
        if row["contender"] in MARKED
    }


def draw(results: Path) -> Figure:
    """The plot, with a panel for each model and rate."""
    names = ("gpt2", "llama")
    figure, axes = plt.subplots(
        len(RATES), len(names), figsize=(6, 6.2), sharex=True, sharey=True, layout="constrained"
    )
    for line, (folder, rate) in zip(axes, RATES.items(), strict=True):
        for panel, name in zip(line, names, strict=True):
            found = points(results / folder, name)
            for index, (contender, marked) in enumerate(MARKED.items()):
                if contender not in found:
                    continue
                size, (mean, low, high) = found[contender]
                errors = [[100 * (mean - low)], [100 * (high - mean)]] if index else None
                beside = 0.35 * (index == 3)  # so that no bar hides another
                panel.errorbar(size + beside, 100 * mean, yerr=errors, fmt="osD^v"[index],
                               color=f"C{index}", capsize=3, label=marked.label)  # fmt: skip
            panel.axhline(0, color="gray", linewidth=0.8)
            panel.set(title=f"{WORKLOADS[name].title}, {rate}", xlim=(3, 18))
            panel.set_xticks([5, 9, 12, 16])
            panel.grid(alpha=0.3)
    figure.supylabel("held-out loss above AdamW's in float32 (%)", fontsize="medium")
    figure.supxlabel(
        "parameter, gradient and optimizer state (bytes per parameter); bars: 95% interval",
        fontsize="medium",
    )
    legends = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in figure.axes]
    handles = {label: handle for legend in legends for handle, label in legend}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
    return figure


def main() -> None:
    """Writes the plot."""
    figure = draw(RESULTS)
    figure.savefig(RESULTS / "loss.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
