"""Tables and plots of `benchmarks.quality.paired`: differences seed by seed, with intervals."""

import functools
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
DEFAULT_OUTPUT = Path("docs/results/paired")
SUMMARIZED = {
    "outer": "a row and a column",
    "outer, 8 bits": "the same, `mu` in 8 bits",
    "mean": "one number a block",
}
# Labels in the plot of loss against memory.
MARKED = {
    "adamw": "AdamW",
    "outer": "Adam-mini",
    "outer, 8 bits": "Adam-mini, 8 bits",
    "mean": "Adam-mini, one number",
    "muon": "Muon, AdamW for the rest",
    "muon_mini": "Muon, Adam-mini for the rest",
    "muon_mini, 8 bits": "the same, 8 bits",
}


class Interval(NamedTuple):
    """The mean of differences, and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def paired(differences: Sequence[float]) -> Interval:
    """The interval of Student's t distribution; it is infinite for a single difference."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return Interval(mean, float("-inf"), float("inf"))
    error = scipy.stats.sem(differences)
    half = float(scipy.stats.t.ppf(0.975, len(differences) - 1) * error)
    return Interval(mean, mean - half, mean + half)


def behind(workload: Workload, values: Sequence[float], adamw: Sequence[float]) -> Interval:
    """How far values are behind AdamW's with the same seeds: a fraction of the loss, or points."""
    pairs = zip(values, adamw, strict=True)
    return paired([workload.behind(value, other) for value, other in pairs])


def behind_adamw(workload: Workload, row: Mapping[str, Any], adamw: Mapping[str, Any]) -> Interval:
    """How far a row is behind another row, such as AdamW's, on the seeds that both have."""
    count = min(len(row["values"]), len(adamw["values"]))
    return behind(workload, row["values"][:count], adamw["values"][:count])


def interval_text(workload: Workload, found: Interval) -> str:
    """An interval for a table, with the sign of the value's own difference."""
    ends = [found.low, found.high]
    if workload.by_accuracy:
        low, high = sorted(-end for end in ends)
        mean = round(-found.mean, 2) or 0.0  # avoids -0.0
        return f"{mean:+.2f} points [{low:+.2f}, {high:+.2f}]"
    return f"{found.mean:+.2%} [{found.low:+.2%}, {found.high:+.2%}]"


AT_ADAMWS = "at AdamW's best rate"


def write(output: Path, file: str, name: str) -> str:
    """Writes a comparison's Markdown page and plot beside its JSON file; returns the page."""
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
    where = "" if output == DEFAULT_OUTPUT else f" --output {output}"
    page = (
        f"# {workload.title}, {steps} steps\n\n{adamw['parameters']:,} parameters, seeds from 1; "
        f"differences are taken seed by seed.\n\n`{COMMAND} --workloads "
        f"{name} --steps {steps}{where}`, with Python {machine['python']} and JAX "
        f"{machine['jax']} on {machine['device']}:\n\n{markdown(columns, rows)}"
    )
    for where in dict.fromkeys(row.get("where", "") for row in rows):
        among = [row for row in rows[1:] if row.get("where", "") == where]
        if not where:
            among = [row for row in among if row["learning_rate"] == adamw["learning_rate"]]
        if len(among) > 1:
            page += f"\nThe rows against the columns, {where or AT_ADAMWS}, seed by seed:\n\n"
            page += _each_other(workload, among)
    curve = rate_curve(workload, content["runs"])
    if len(curve) > 1:
        figure = draw_rates(workload, curve)
        figure.savefig(output / f"{file}.png", dpi=120)
        plt.close(figure)
        page += f"\n![{workload.title}: {what} against the learning rate]({file}.png)\n"
    (output / f"{file}.md").write_text(page)
    return page


def _each_other(workload: Workload, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of each row against those above it."""
    columns: Columns = {"": lambda row: row["title"]}
    for index, other in enumerate(rows[:-1]):
        columns[other["title"]] = lambda row, index=index, other=other: (
            interval_text(workload, behind_adamw(workload, row, other))
            if rows.index(row) > index
            else ""
        )
    return markdown(columns, rows[1:])


def write_summary(output: Path) -> str:
    """Writes the page with Adam-mini's distance from AdamW in every comparison in `output`."""
    rows: list[dict[str, Any]] = []
    for name, workload in WORKLOADS.items():
        files = sorted(output.glob(f"{name}_*.json"), key=lambda file: int(file.stem.split("_")[1]))
        for file in files:
            content = json.loads(file.read_text())
            by_name = {row["contender"]: row for row in content.get("rows", [])}
            if "adamw" in by_name:
                steps = content["settings"]["steps"]
                rows.append({**by_name, "workload": workload, "steps": steps})

    def distance(contender: str, other: str, row: Mapping[str, Any]) -> str:
        if contender not in row or other not in row:
            return ""
        found = behind_adamw(row["workload"], row[contender], row[other])
        return interval_text(row["workload"], found)

    def seeds(row: Mapping[str, Any]) -> str:
        counts = {len(row[name]["values"]) for name in SUMMARIZED if name in row}
        if not counts:  # others alone
            return ""
        return " to ".join(map(str, sorted({min(counts), max(counts)})))

    which: Columns = {
        "workload": lambda row: row["workload"].title,
        "steps": lambda row: f"{row['steps']:,}",
        "rate": lambda row: f"{row['adamw']['learning_rate']:g}",
    }
    columns: Columns = {
        **which,
        "AdamW": lambda row: row["workload"].text(float(np.mean(row["adamw"]["values"]))),
        **{title: functools.partial(distance, name, "adamw") for name, title in SUMMARIZED.items()},
        "seeds": seeds,
    }
    in_8_bits: Columns = {
        **which,
        "a row and a column": functools.partial(distance, "outer, 8 bits", "outer"),
        "one number a block": functools.partial(distance, "mean, 8 bits", "mean"),
        "seeds": seeds,
    }
    page = (
        "# Against AdamW, at AdamW's best rate\n\nThe mean of the differences seed by seed, and "
        f"its 95% interval, by `{COMMAND}`:\n\n{markdown(columns, rows)}\n"
        "## `mu` in 8 bits against `mu` in float32\n\nAt the same rates, seed by seed:\n\n"
        + markdown(in_8_bits, [row for row in rows if "outer, 8 bits" in row])
    )
    (output / "summary.md").write_text(page)
    return page


def write_memory(output: Path) -> None:
    """Writes the plot of loss against memory, from the comparisons in `output`."""
    figure = draw_memory(output)
    if figure is not None:
        figure.savefig(output / "memory.png", dpi=120)
        plt.close(figure)


def draw_memory(output: Path) -> Figure | None:
    """A plot of the loss relative to AdamW's against bytes of optimizer state per parameter. It has
    a panel for each language model and length in `output`, and is None if there are none."""
    panels: dict[str, dict[str, tuple[float, Interval]]] = {}
    files = output.glob("*_[0-9]*.json")  # not benchmarks.quality.reference's
    of_steps = lambda file: file.stem.rsplit("_", 1)
    for file in sorted(files, key=lambda file: (of_steps(file)[0], int(of_steps(file)[1]))):
        name, steps = of_steps(file)
        rows = json.loads(file.read_text()).get("rows", [])
        if name in ("gpt2", "llama") and rows:
            panels[f"{WORKLOADS[name].title}, {int(steps):,} steps"] = {
                row["contender"]: (
                    row["optimizer_bytes"] / row["parameters"],
                    behind_adamw(WORKLOADS[name], row, rows[0]),
                )
                for row in rows
                if row["contender"] in MARKED
            }
    if not panels:
        return None
    lines = -(-len(panels) // 2)  # two panels side by side are readable on a phone
    figure, axes = plt.subplots(
        lines, 2, figsize=(6, 1.4 + 2.4 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for empty in axes.flat[len(panels) :]:
        empty.remove()
    for panel, (title, points) in zip(axes.flat, panels.items(), strict=False):
        for index, (contender, label) in enumerate(MARKED.items()):
            if contender not in points:
                continue
            size, (mean, low, high) = points[contender]
            errors = [[100 * (mean - low)], [100 * (high - mean)]] if contender != "adamw" else None
            panel.errorbar(size, 100 * mean, yerr=errors, fmt="osD^vPX"[index], color=f"C{index}",
                           capsize=3, label=label)  # fmt: skip
        panel.axhline(0, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        panel.set(title=title, xlim=(0.7, 11.5))
        panel.grid(alpha=0.3)
    figure.supylabel("held-out loss above AdamW's (%)", fontsize="medium")
    figure.supxlabel("optimizer state (bytes per parameter); bars: 95% interval", fontsize="medium")
    legends = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in figure.axes]
    handles = {label: handle for legend in legends for handle, label in legend}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
    return figure


def rate_curve(
    workload: Workload, runs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[float, list[float]]]:
    """For AdamW and Adam-mini, by learning rate: the values of the seeds that all of these have."""
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
    """A plot of the mean over the first seeds against the learning rate."""
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
