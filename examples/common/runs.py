"""The folder of a run: configuration, metrics as JSON lines, checkpoints, pictures.

A run can be killed at any moment. Whole files are written aside and renamed; metrics are on disk
before the checkpoint of the same step; what was logged after the last checkpoint is cut off when
the run goes on.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.common import mesh
from examples.common.cli import ConfigError

CONFIG_FILE = "config.json"


def new_run(root: Path, config: Any) -> Path:
    """Make the folder root/<time> with `config` (a dataclass) in it."""
    time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):  # runs started in the same second
            folder = root / (time if attempt == 0 else f"{time}_{attempt}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
        write_json(folder / CONFIG_FILE, dataclasses.asdict(config))
    except OSError as error:
        raise ConfigError(
            f"the run folder in {root} cannot be written ({error.strerror}): give another --runs."
        ) from error
    return folder


def check_visible(folder: Path) -> None:
    """Refuse a run of several processes whose folder one of them does not see."""
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"process {jax.process_index()} does not see {folder}, the run that the first one "
            "writes: give a --runs on a file system that all processes see."
        )


def find_run(root: Path, run: str | None) -> Path:
    """The folder of `run`, a path or a name in `root`; the newest one where `run` is None."""
    runs = sorted(path.parent for path in root.glob(f"*/{CONFIG_FILE}"))
    if run is None:
        if not runs:
            raise ConfigError(
                f"there is no run in {root}: train one first, or give another --runs."
            )
        return runs[-1]
    for folder in (Path(run), root / run):
        if (folder / CONFIG_FILE).exists():
            return folder
    known = (
        f"the runs in {root} are {', '.join(r.name for r in runs)}" if runs else f"{root} is empty"
    )
    raise ConfigError(f"{run} is not a run, a folder with a {CONFIG_FILE}: {known}.")


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that `path` never holds half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Metrics:
    """Metrics as JSON lines, each with its "step". What is later than `step` is cut off. Of several
    processes only the first writes."""

    def __init__(self, path: Path, step: int):
        self._file = None
        if not mesh.is_first():
            return
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, records: Iterable[Mapping]) -> None:
        """Append `records` and bring them to the disk."""
        if self._file is None:
            return
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def open_checkpoints(folder: Path, *, to_write: bool) -> ocp.CheckpointManager:
    """The checkpoints in `folder`, of which the newest two are kept. All processes open them
    together; they are written beside the steps that follow, and whole when this is closed."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        create=to_write,
        # What a killed run left half written; a reader must not take a living run's for that.
        cleanup_tmp_directories=to_write,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def newest_checkpoint(folder: Path) -> int | None:
    """The step of the newest whole checkpoint in `folder`; None where there is none."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def save_checkpoint(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Write `state` as the checkpoint of `step`; it appears whole or not at all. Returns when
    `state` is copied and may be donated."""
    checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore_checkpoint(checkpoints: ocp.CheckpointManager, abstract_state: Any) -> Any:
    """The newest checkpoint, in the structure of `abstract_state` and with its shardings, which
    need not be those it was saved with; on one device where it has none."""
    step = checkpoints.latest_step()
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one_device),
        abstract_state,
    )
    try:
        return checkpoints.restore(step, args=ocp.args.StandardRestore(abstract_state))
    except Exception as error:  # of many kinds: of the file system, of the format, of the tree
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the checkpoint {checkpoints.directory / str(step)} cannot be read ({reason[:200]}): "
            "move it away to go on from an older one, or start a new run."
        ) from error


def plot_curves(
    path: Path, metrics: Mapping[str, Sequence[Mapping]], title: str, unit: str
) -> None:
    """Draw the curves of several optimizers: training loss thin, held-out loss with markers; beside
    them how far each held-out loss is from the first optimizer's, which shows curves that lie on
    each other, and the held-out accuracy, where the metrics have one."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    held_out = {
        name: {r["step"]: r["held_out_loss"] for r in records if "held_out_loss" in r}
        for name, records in metrics.items()
    }
    first, *others = metrics
    panels = ["loss"]
    panels += (
        ["difference"] if any(held_out[name].keys() & held_out[first] for name in others) else []
    )
    panels += ["accuracy"] if any("accuracy" in r for rs in metrics.values() for r in rs) else []
    figure, (row,) = plt.subplots(
        1, len(panels), figsize=(2.5 + 4.5 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    axes_of = dict(zip(panels, row, strict=True))
    for index, (name, records) in enumerate(metrics.items()):
        color, marker = f"C{index}", "os^D"[index % 4]
        marked = {"color": color, "marker": marker, "label": f"{name}, held out"}
        thin = {"color": color, "alpha": 0.35, "linewidth": 0.8, "label": f"{name}, training"}
        training = {r["step"]: r["loss"] for r in records if "loss" in r}
        axes_of["loss"].plot(training.keys(), training.values(), **thin)
        if held_out[name]:
            axes_of["loss"].plot(held_out[name].keys(), held_out[name].values(), **marked)
        if "difference" in axes_of:
            steps = [step for step in held_out[name] if step in held_out[first]]
            apart = [held_out[name][step] - held_out[first][step] for step in steps]
            axes_of["difference"].plot(steps, apart, **marked)
        if "accuracy" in axes_of:
            accuracy = {r["step"]: r["accuracy"] for r in records if "accuracy" in r}
            axes_of["accuracy"].plot(accuracy.keys(), accuracy.values(), **marked)
    axes_of["loss"].set(ylabel=f"loss ({unit})")
    if "difference" in axes_of:
        axes_of["difference"].set(ylabel=f"held-out loss minus that of {first} ({unit})")
    if "accuracy" in axes_of:
        axes_of["accuracy"].set(ylabel="accuracy")
        axes_of["accuracy"].yaxis.set_major_formatter("{x:.1%}")
    for axes in row:
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
