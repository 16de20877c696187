"""Tables and plots of `benchmarks.quality.paired`: differences seed by seed, with intervals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from benchmarks.quality.workloads import WORKLOADS, Workload
from benchmarks.results import Columns, markdown

COMMAND = "python -m benchmarks.quality.paired"


class Interval(NamedTuple):
    """The mean of differences, and where it lies with 95% confidence."""

    mean: float
    low: float
    high: float


def paired(differences: Sequence[float]) -> Interval:
    """By Student's distribution; of one difference nothing is known but itself."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return Interval(mean, float("-inf"), float("inf"))
    error = scipy.stats.sem(differences)
    half = float(scipy.stats.t.ppf(0.975, len(differences) - 1) * error)
    return Interval(mean, mean - half, mean + half)


def behind(workload: Workload, values: Sequence[float], adamw: Sequence[float]) -> Interval:
    """How far values are behind AdamW's with the same seeds: of the loss, or in points."""
    pairs = zip(values, adamw, strict=True)
    return paired([workload.behind(value, other) for value, other in pairs])


def behind_adamw(workload: Workload, row: Mapping[str, Any], adamw: Mapping[str, Any]) -> Interval:
    """How far a row is behind AdamW's; it may have fewer of the first seeds."""
    return behind(workload, row["values"], adamw["values"][: len(row["values"])])


def interval_text(workload: Workload, found: Interval) -> str:
    """For a table, with the sign of the value's own difference."""
    ends = [found.low, found.high]
    if workload.by_accuracy:
        low, high = sorted(-end for end in ends)
        return f"{-found.mean:+.2f} points [{low:+.2f}, {high:+.2f}]"
    return f"{found.mean:+.2%} [{found.low:+.2%}, {found.high:+.2%}]"


def write(output: Path, file: str, name: str) -> str:
    """The Markdown page and the plot of a comparison, beside its JSON file; the page's text."""
    content = json.loads((output / f"{file}.json").read_text())
    workload, rows = WORKLOADS[name], content["rows"]
    what = "test accuracy" if workload.by_accuracy else "held-out loss"
    adamw = rows[0]
    columns: Columns = {
        "optimizer": lambda row: row["title"],
        "learning rate": lambda row: f"{row['learning_rate']:g}",
        f"{what}, mean": lambda row: workload.text(float(np.mean(row["values"]))),
        "against AdamW, 95% interval": lambda row: (
            "" if row is adamw else interval_text(workload, behind_adamw(workload, row, adamw))
        ),
        "seeds": lambda row: str(len(row["values"])),
        "optimizer bytes": lambda row: f"{row['optimizer_bytes']:,}",
        "of AdamW's": lambda row: f"{row['optimizer_bytes'] / adamw['optimizer_bytes']:.1%}",
    }
    machine, steps = content["machine"], content["settings"]["steps"]
    page = (
        f"# {workload.title}, {steps} steps\n\n{adamw['parameters']:,} parameters, seeds from 1; "
        f"differences are taken seed by seed.\n\n`{COMMAND} --workloads "
        f"{name} --steps {steps}`, with Python {machine['python']} and JAX {machine['jax']} on "
        f"{machine['device']}:\n\n{markdown(columns, rows)}"
    )
    curve = rate_curve(workload, content["runs"])
    if len(curve) > 1:
        figure = draw_rates(workload, curve)
        figure.savefig(output / f"{file}.png", dpi=120)
        plt.close(figure)
        page += f"\n![{workload.title}: {what} against the learning rate]({file}.png)\n"
    (output / f"{file}.md").write_text(page)
    return page


def write_memory(output: Path) -> None:
    """The plot of loss against memory, from the comparisons in `output`."""
    figure = draw_memory(output)
    if figure is not None:
        figure.savefig(output / "memory.png", dpi=120)
        plt.close(figure)


def draw_memory(output: Path) -> Figure | None:
    """How far Adam-mini is behind AdamW against the memory of its state, in the comparisons that
    there are; None where there is none."""
    found: dict[str, list[tuple[float, Interval, str]]] = {}
    for file in sorted(output.glob("*_*.json")):  # not benchmarks.quality.reference's
        content = json.loads(file.read_text())
        name, steps = file.stem.rsplit("_", 1)
        workload, rows = WORKLOADS[name], content.get("rows", [])
        if name in ("gpt2", "llama", "resnet") and rows:
            unit = "points" if workload.by_accuracy else "%"
            factor = 1 if workload.by_accuracy else 100
            for row in rows:
                if row["contender"] not in ("mean", "outer"):
                    continue
                share = 100 * row["optimizer_bytes"] / rows[0]["optimizer_bytes"]
                interval = behind_adamw(workload, row, rows[0])
                scaled = Interval(*(factor * value for value in interval))
                title = f"{workload.title}, {steps} steps ({unit})"
                found.setdefault(title, []).append((share, scaled, row["contender"]))
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for index, (title, points) in enumerate(found.items()):
        shift = 0.12 * (index - (len(found) - 1) / 2)
        ends = [*sorted(points), (100.0, Interval(0.0, 0.0, 0.0), "adamw")]
        order = [{"mean": 0, "outer": 1, "adamw": 2}[who] + shift for _, _, who in ends]
        means = [interval.mean for _, interval, _ in ends]
        errors = [[m - i.low for m, (_, i, _) in zip(means, ends, strict=True)],
                  [i.high - m for m, (_, i, _) in zip(means, ends, strict=True)]]  # fmt: skip
        axes.errorbar(order, means, yerr=errors, marker="osD^v"[index % 5], capsize=3, label=title)
    shares = {who: sorted({f"{s:.1f}" for p in found.values() for s, _, w in p if w == who})
              for who in ("mean", "outer")}  # fmt: skip
    span = lambda who: f"{shares[who][0]} to {shares[who][-1]}%" if shares[who] else ""
    axes.set_xticks(range(3))
    axes.set_xticklabels(
        [f"one number a block\n{span('mean')}", f"a row and a column\n{span('outer')}",
         "AdamW, per coordinate\n100%"]
    )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="what is kept of v, and the optimizer's memory", ylabel="behind AdamW")
    axes.grid(alpha=0.3)
    axes.legend(title="mean and 95% interval")
    return figure


def rate_curve(
    workload: Workload, runs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[float, list[float]]]:
    """Of AdamW and Adam-mini: by learning rate, the values of the seeds that all of them have."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for run in runs:
        asked = run["asked"]
        if asked["contender"] in ("adamw", "mean", "outer"):
            at = found.setdefault(asked["contender"], {}).setdefault(asked["learning_rate"], {})
            at[asked["seed"]] = workload.value(run["found"])
    if not found:
        return {}
    common = set.intersection(*(set(seeds) for rates in found.values() for seeds in rates.values()))
    return {
        contender: {
            rate: [seeds[s] for s in sorted(common)] for rate, seeds in sorted(rates.items())
        }
        for contender, rates in found.items()
        if len(rates) > 1 and common
    }


def draw_rates(workload: Workload, curve: Mapping[str, Mapping[float, list[float]]]) -> Figure:
    """The mean of the first seeds against the learning rate."""
    titles = {"adamw": "AdamW", "mean": "Adam-mini, the paper's", "outer": "Adam-mini, outer"}
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for index, (contender, title) in enumerate(titles.items()):
        if contender in curve:
            rates = list(curve[contender])
            means = [float(np.mean(values)) for values in curve[contender].values()]
            axes.plot(rates, means, marker="osD"[index], color=f"C{index}", label=title)
    axes.set(xscale="log", xlabel="learning rate", title=f"{workload.title}, first seeds")
    axes.set_ylabel("test accuracy" if workload.by_accuracy else "held-out loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
