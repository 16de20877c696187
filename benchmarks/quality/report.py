"""Tables and plots of `benchmarks.quality`, made from its JSON files."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.quality.workloads import WORKLOADS, Workload
from benchmarks.results import Columns, Row, markdown

COMMAND = "python -m benchmarks.quality --studies"
UNTUNED = "Adam-mini, AdamW's rate"
MARKERS = "osD^vPX"


class Report(NamedTuple):
    """The tables and plots of a study."""

    title: str
    text: str
    """What was done, for the Markdown page."""
    columns: Columns
    rows: Sequence[Row]
    figures: dict[str, Figure]
    """Figures, by what they show."""


def result_columns(workload: Workload, rows: Sequence[Row]) -> Columns:
    """The columns of final values in every table; the first row is AdamW's."""
    what = "test accuracy" if workload.by_accuracy else "held-out loss"
    adamw = rows[0]["mean"]
    return {
        f"{what}, mean": lambda row: workload.text(row["mean"]),
        "of the seeds": lambda row: (
            f"{workload.text(min(row['values']))} to {workload.text(max(row['values']))}"
        ),
        "against AdamW": lambda row: (
            "" if row is rows[0] else workload.difference_text(workload.behind(row["mean"], adamw))
        ),
        "optimizer bytes": lambda row: f"{row['optimizer_bytes']:,}",
    }


def of_comparison(name: str, content: Mapping[str, Any]) -> Report:
    """The report on every optimizer on one workload."""
    workload, rows = WORKLOADS[name], content["rows"]
    columns: Columns = {
        "optimizer": lambda row: row["title"],
        "learning rate": lambda row: f"{row['learning_rate']:g}",
        **result_columns(workload, rows),
        "of AdamW's": lambda row: f"{row['optimizer_bytes'] / rows[0]['optimizer_bytes']:.1%}",
        "ms per step": lambda row: f"{row['ms_per_step']:.1f}",
    }
    seeds = len(rows[0]["values"])
    text = (
        f"{rows[0]['parameters']:,} parameters, {content['settings']['steps']} steps. Each "
        f"optimizer with the rate that was best on seed 0, means of {seeds} other seeds."
    )
    sweep: dict[str, dict[float, float]] = {}
    for run in content["runs"]:
        asked = run["asked"]
        if asked.get("seed") == 0:
            value = workload.value(run["found"])
            sweep.setdefault(asked["optimizer"], {})[asked["learning_rate"]] = value
    figures = {"the learning rates, and the seeds": draw_comparison(workload, rows, sweep)}
    both = {name: sweep.get(name, {}) for name in ("adamw", "adam_mini")}
    if all(len(rates) > 4 for rates in both.values()):
        figures["sensitivity to the learning rate"] = draw_sensitivity(workload, both)
    return Report(workload.title, text, columns, rows, figures)


def of_scaling(name: str, content: Mapping[str, Any]) -> Report:
    """The report on sizes of Llama."""
    del name
    workload, rows = WORKLOADS["llama"], content["rows"]
    size = lambda row: (row["layers"], row["width"])
    adamw = {size(row): row["mean"] for row in rows if row["title"] == "AdamW"}
    columns: Columns = {
        "parameters": lambda row: f"{row['parameters']:,}",
        "layers": lambda row: str(row["layers"]),
        "width": lambda row: str(row["width"]),
        "steps": lambda row: str(row["steps"]),
        "optimizer": lambda row: row["title"],
        **result_columns(workload, rows),
        "against AdamW": lambda row: workload.difference_text(
            workload.behind(row["mean"], adamw[size(row)])
        ),
    }
    text = (
        "Llama in several sizes, all at the example's learning rate, steps in proportion to size."
    )
    return Report("Scaling", text, columns, rows, {"loss against size": draw_scaling(rows)})


def of_ablations(name: str, content: Mapping[str, Any]) -> Report:
    """The report on partitions of Llama."""
    del name
    workload, rows = WORKLOADS["llama"], content["rows"]
    columns: Columns = {"blocks": lambda row: row["title"], **result_columns(workload, rows)}
    text = (
        "Llama at AdamW's best rate, with Adam-mini's default partition and with one choice of it "
        "changed at a time."
    )
    better = sorted((row["mean"], row["title"]) for row in rows if row["title"] != "AdamW")
    ahead = [title for _, title in better[: [t for _, t in better].index("Adam-mini")]]
    if ahead:
        text += f" The default did not come out best; ahead of it: {'; '.join(map(repr, ahead))}."
    return Report("Ablations", text, columns, rows, {"the seeds": draw_ablations(rows)})


REPORTS = {"scaling": of_scaling, "ablations": of_ablations}


def write(output: Path, name: str) -> str:
    """Writes a study's Markdown page and plots beside its JSON file; returns the page."""
    content = json.loads((output / f"{name}.json").read_text())
    report = REPORTS.get(name, of_comparison)(name, content)
    machine = content["machine"]
    page = (
        f"# {report.title}\n\n{report.text}\n\n`{COMMAND} {name}`, with Python "
        f"{machine['python']} and JAX {machine['jax']} on {machine['device']}:\n\n"
        + markdown(report.columns, report.rows)
    )
    for index, (title, figure) in enumerate(report.figures.items()):
        picture = f"{name}_{index + 1}.png"
        figure.savefig(output / picture, dpi=120)
        plt.close(figure)
        page += f"\n![{report.title}: {title}]({picture})\n"
    (output / f"{name}.md").write_text(page)
    return page


def write_summary(output: Path) -> str:
    """Writes summary.md, on the workloads whose studies are done; returns its text."""
    rows = []
    for name, workload in WORKLOADS.items():
        path = output / f"{name}.json"
        if not path.exists() or "rows" not in (content := json.loads(path.read_text())):
            continue
        found = {row["title"]: row for row in content["rows"]}
        behind = workload.behind(found[UNTUNED]["mean"], found["AdamW"]["mean"])
        rows.append({"name": name, "workload": workload, "rows": found, "behind": behind})

    titles = rows[0]["rows"] if rows else ()
    others = [title for title in titles if not title.startswith(("AdamW", "Adam-mini"))]

    def value(title: str) -> Callable[[Row], str]:
        return lambda row: row["workload"].text(row["rows"][title]["mean"])

    columns: Columns = {
        "workload": lambda row: f"[{row['workload'].title}]({row['name']}.md)",
        "AdamW": value("AdamW"),
        "Adam-mini": value(UNTUNED),
        "difference": lambda row: row["workload"].difference_text(row["behind"]),
        "allowed": lambda row: row["workload"].difference_text(row["workload"].bar),
        "kept": lambda row: "yes" if row["behind"] <= row["workload"].bar else "no",
        **{title: value(title) for title in others},
    }
    page = (
        "# Adam-mini and other optimizers\n\n`python -m benchmarks.quality`. "
        "Held-out loss, or test accuracy, of the nano size of "
        "each example, means of fresh seeds. AdamW and the optimizers on the right at their own "
        f"best learning rates, Adam-mini at AdamW's.\n\n{markdown(columns, rows)}"
    )
    pages = [f"[{name}]({name}.md)" for name in REPORTS if (output / f"{name}.md").exists()]
    if pages:
        page += f"\nOf Llama also: {', '.join(pages)}.\n"
    (output / "summary.md").write_text(page)
    return page


def draw_comparison(
    workload: Workload, rows: Sequence[Row], sweep: Mapping[str, Mapping[float, float]]
) -> Figure:
    """A plot of the walks along the learning rates, and of each seed's final value."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    styles = {
        optimizer: {"color": f"C{index}", "marker": MARKERS[index]}
        for index, optimizer in enumerate(dict.fromkeys(row["optimizer"] for row in rows))
    }
    tuned = [row for row in rows if row["title"] != UNTUNED]
    for row in tuned:
        if row["optimizer"] in sweep:
            points = sorted(sweep[row["optimizer"]].items())
            left.plot(*zip(*points, strict=True), **styles[row["optimizer"]], label=row["title"])
    left.set(xscale="log", xlabel="learning rate", title="seed 0")
    if sweep:
        figure.legend(loc="outside lower center", ncols=len(tuned))
    for place, row in enumerate(rows):
        style = styles[row["optimizer"]]
        right.plot(row["values"], [place] * len(row["values"]), linestyle="", alpha=0.6, **style)
        right.plot(row["mean"], place, linestyle="", marker="|", markersize=22, color="black")
    right.set(yticks=range(len(rows)), title="fresh seeds at the best rate, and their mean")
    right.set_yticklabels([row["title"] for row in rows])
    right.invert_yaxis()
    # Limit the axis: rates that diverged would squeeze the others together.
    finals = [value for row in rows for value in row["values"] if math.isfinite(value)]
    if finals:
        low, high = min(finals), max(finals)
        margin = max(0.6 * (high - low), 1e-3)
        if workload.by_accuracy:
            left.set_ylim(low - margin, min(high + margin / 3, 1.0))
        else:
            left.set_ylim(low - margin / 3, high + margin)
    _finish(
        workload,
        figure,
        [(left, left.yaxis, left.set_ylabel), (right, right.xaxis, right.set_xlabel)],
    )
    return figure


def draw_sensitivity(workload: Workload, sweep: Mapping[str, Mapping[float, float]]) -> Figure:
    """A plot of AdamW and Adam-mini at several learning rates."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    titles = {"adamw": "AdamW", "adam_mini": "Adam-mini"}
    for index, (optimizer, rates) in enumerate(sweep.items()):
        points = sorted((rate, value) for rate, value in rates.items() if math.isfinite(value))
        axes.plot(*zip(*points, strict=True), marker=MARKERS[index], label=titles[optimizer])
    axes.set(xscale="log", xlabel="learning rate", title="seed 0")
    axes.legend()
    _finish(workload, figure, [(axes, axes.yaxis, axes.set_ylabel)])
    return figure


def draw_scaling(rows: Sequence[Row]) -> Figure:
    """A plot of loss against size."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for index, title in enumerate(dict.fromkeys(row["title"] for row in rows)):
        points = [(row["parameters"], row) for row in rows if row["title"] == title]
        sizes, found = zip(*points, strict=True)
        axes.plot(sizes, [row["mean"] for row in found], marker=MARKERS[index], label=title)
    axes.set(xscale="log", xlabel="parameters")
    axes.legend()
    _finish(WORKLOADS["llama"], figure, [(axes, axes.yaxis, axes.set_ylabel)])
    return figure


def draw_ablations(rows: Sequence[Row]) -> Figure:
    """A plot of each seed's final value with each partition."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for place, row in enumerate(rows):
        axes.plot(row["values"], [place] * len(row["values"]), "o", color="C0", alpha=0.6)
        axes.plot(row["mean"], place, marker="|", markersize=22, color="black")
    axes.set(yticks=range(len(rows)))
    axes.set_yticklabels([row["title"] for row in rows])
    axes.invert_yaxis()
    _finish(WORKLOADS["llama"], figure, [(axes, axes.xaxis, axes.set_xlabel)])
    return figure


def _finish(workload: Workload, figure: Figure, parts: Sequence[tuple]) -> None:
    """Labels the axes of values, and adds the grid."""
    for axes, axis, set_label in parts:
        set_label("test accuracy" if workload.by_accuracy else "held-out loss")
        if workload.by_accuracy:
            axis.set_major_formatter("{x:.1%}")
        axes.grid(alpha=0.3)
    figure.suptitle(workload.title)
