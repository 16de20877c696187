"""Train with several optimizers, one after the other, and compare them.

What the examples have in common: the options, the loop, checkpoints and resuming, the results. An
example adds its model, its data and its loss, as a `Program` and a `Task`.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import tyro
from rich.console import Console, RenderableType

from examples.common import interrupts, mesh, optimizers, runs
from examples.common.cli import ConfigError, check_counts, comparison_table, progress_bar
from examples.common.optimizers import OptimizerConfig

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The options that every example has. An example adds its own, and may give other defaults."""

    optimizer: Literal[
        "adamw", "adam_mini", "adam_mini_int8", "muon_mini", "muon_mini_int8"
    ] | None = None  # fmt: skip
    """Train with this one alone; int8 keeps the first moment in 8 bits, and muon_mini is Muon for
    the matrices and Adam-mini for the rest. Without it, with AdamW and with Adam-mini, one after
    the other."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Examples a step."""
    seed: int = 0
    """Seed of the initial weights and of the batches."""

    eval_every: int = 100
    """Steps between two evaluations on held-out data."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two looks at the loss; between them the device is not waited for."""
    runs: str = "runs"
    """Folder in which every run makes its own."""

    resume: str | None = None
    """Go on with this run (a folder, or its name in --runs), with the options it was started
    with."""
    v: Literal["mean", "outer"] = "outer"
    """What Adam-mini keeps of the second moment in each block: one number, as in the paper, or a
    row and a column, which keeps AdamW's loss in the same memory."""
    show_blocks: bool = False
    """Print how Adam-mini cuts this configuration's parameters, and stop."""

    hyper: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=OptimizerConfig
    )

    compared: ClassVar[tuple[str, ...]] = ("adamw", "adam_mini")
    """Names of the optimizers that are trained with where none is named."""
    where: ClassVar[tuple[str, ...]] = ()
    """Groups of options that say where to train: a run that goes on takes new ones."""

    @property
    def optimizer_names(self) -> tuple[str, ...]:
        """Names of the optimizers to train with, in order."""
        return self.compared if self.optimizer is None else (self.optimizer,)

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        names = ("steps", "batch_size", "eval_every", "checkpoint_every", "log_every")
        check_counts({name: getattr(self, name) for name in names})
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, but must be at least 0.")
        for name in self.optimizer_names:
            optimizers.check_name(name)
        self.hyper.check(self.steps)


AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)


class Program(NamedTuple):
    """The functions that a configuration and an optimizer amount to; none is compiled here."""

    init: Callable[..., Any]
    """inputs -> state: what changes from step to step, and all that a checkpoint holds. It has an
    `opt_state`. Without weights to start from it takes a seed, and has the configuration's."""
    step: Callable[[Any, Any], tuple[Any, jax.Array]]
    """(state, batch) -> (state, mean loss)"""
    evaluate: Callable[[Any, Any], Any]
    """(state, held-out batch) -> sums over its examples"""
    inputs: tuple[Any, ...] = ()
    """What `init` takes: weights that training starts from. As constants of the compiled program
    they would be in memory twice."""
    shardings: Any = None
    """Of the state; None for one device."""

    def abstract_state(self) -> Any:
        """The state's shapes, dtypes and shardings."""
        return jax.jit(self.init, out_shardings=self.shardings).eval_shape(*self.inputs)


@dataclasses.dataclass(frozen=True)
class Task:
    """An example with its data read, as the loop sees it."""

    title: str
    """Of the table and the plot."""
    description: str
    """Model and data, for the first line of the output."""
    make_program: Callable[[str], Program]
    """The program of an optimizer."""
    batch: Callable[[int], Any]
    """The batch of a step. It must depend on the step alone, so that a run that goes on from a
    checkpoint sees the batches it would have seen."""
    held_out: Callable[[], Iterable[Any]]
    """The held-out batches, the same at every evaluation."""
    measure: Callable[[Any], dict[str, float]]
    """What `evaluate` found, summed over the held-out batches -> metrics, "held_out_loss" among
    them."""
    columns: Mapping[str, Callable[[Mapping], str]]
    """Heading -> text of the metrics that are shown."""
    unit: str
    """What the progress bar counts in a second: tokens, images."""
    units_per_step: int
    """How many of them are in a batch."""
    loss_unit: str
    """Of the losses that `step` returns and `measure` gives."""


# What runs did before they had these options.
BEFORE: dict[str, Any] = {"v": "mean", "parameters": {}}


def read_config(config_type: type[TrainingConfig], folder: Path) -> dict[str, Any]:
    """The options that a run was started with; those of `config_type` that came later are as they
    were before."""
    names = {field.name for field in dataclasses.fields(config_type)}
    try:
        stored = json.loads((folder / runs.CONFIG_FILE).read_text())
        return {**{name: value for name, value in BEFORE.items() if name in names}, **stored}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder / runs.CONFIG_FILE} cannot be read ({error}): start a new run."
        ) from error


def load_config(config_type: type[AnyConfig], folder: Path) -> AnyConfig:
    """The configuration that a run was started with."""
    stored = read_config(config_type, folder)
    config = config_type()
    of_example = {field.name for field in dataclasses.fields(config_type)} - set(config.where)
    if stored.keys() - set(config.where) != of_example:
        raise ConfigError(
            f"{folder} is no run of this example: its options are others. Give a run in "
            f"{config.runs}, or go on with the example that made it."
        )
    try:
        for name, default in vars(config).items():
            if dataclasses.is_dataclass(default) and name in stored:
                stored[name] = type(default)(**stored[name])
        config = config_type(**stored)
        # Where it was trained is no matter: a run that goes on takes new devices.
        anywhere = {name: getattr(config_type(), name) for name in config.where}
        dataclasses.replace(config, **anywhere).check()
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise ConfigError(
            f"the options in {folder / runs.CONFIG_FILE} cannot be read ({error}): start a new run."
        ) from error
    return config


def given_options(config: Any, default: Any) -> list[str]:
    """Names of the options in which `config` differs from `default`."""
    names: list[str] = []
    for name, plain in vars(default).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(plain):
            names += given_options(value, plain)
        elif value != plain:
            names.append(name)
    return names


def refuse_others(config: TrainingConfig, mode: str, allowed: set[str]) -> None:
    """`mode` takes all options but `allowed` from the run; others would be ignored silently."""
    given = [name for name in given_options(config, type(config)()) if name not in allowed]
    if given:
        options = ", ".join("--" + name.rstrip("_").replace("_", "-") for name in given)
        raise ConfigError(
            f"{mode} goes by the options that the run was started with: leave out {options}."
            + " For more steps start a new run: the learning rate falls as planned for the "
            "steps of the old one." * ("steps" in given)
        )


def measure_held_out(
    task: Task, evaluate: Callable[[Any, Any], Any], state: Any
) -> dict[str, float]:
    """The metrics of `state` on the held-out batches; `evaluate` is the program's, compiled."""
    sums = [jax.device_get(evaluate(state, batch)) for batch in task.held_out()]
    return task.measure(jax.tree.map(lambda *parts: sum(map(float, parts)), *sums))


def train(
    config: TrainingConfig, optimizer: str, task: Task, folder: Path, console: Console
) -> None:
    """Train with one optimizer, from its newest checkpoint if there is one. Losses and checkpoints
    go to `folder`."""
    program = task.make_program(optimizer)
    mesh.from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    with runs.open_checkpoints(folder / "checkpoints", to_write=True) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start == config.steps:
            console.print(
                f"{optimizer}: has finished its {config.steps} steps already; for more, "
                f"start a new run: the learning rate has fallen as planned for {config.steps}"
            )
            return
        if start:
            state = runs.restore_checkpoint(checkpoints, program.abstract_state())
            console.print(f"{optimizer}: goes on after step {start}")
        else:
            state = jax.jit(program.init, out_shardings=program.shardings)(*program.inputs)

        evaluate = jax.jit(program.evaluate)
        with console.status(f"{optimizer}: compiling"):
            jitted = jax.jit(
                program.step, donate_argnums=0, out_shardings=(program.shardings, None)
            )
            step = jitted.lower(state, task.batch(1)).compile()

        metrics = runs.Metrics(folder / METRICS_FILE, start)
        with metrics, progress_bar(console) as progress:
            bar = progress.add_task(
                optimizer,
                total=config.steps,
                completed=start,
                loss=float("nan"),
                rate=0.0,
                unit=task.unit,
            )
            losses: list[jax.Array] = []  # of the steps since the device was last waited for
            clock = time.perf_counter()
            for done in range(start + 1, config.steps + 1):
                state, loss = step(state, task.batch(done))
                losses.append(loss)

                last = done == config.steps
                evaluates = last or done % config.eval_every == 0
                saves = last or done % config.checkpoint_every == 0
                if not (evaluates or saves or done % config.log_every == 0):
                    continue

                values = [float(loss) for loss in losses]
                seconds = (time.perf_counter() - clock) / len(values)
                rate = task.units_per_step / seconds
                progress.update(bar, completed=done, loss=values[-1], rate=rate)
                metrics.write(
                    {"step": number, "loss": value, "ms": round(1e3 * seconds, 3)}
                    for number, value in enumerate(values, done - len(values) + 1)
                )
                if not np.isfinite(values).all():
                    raise ConfigError(
                        f"the loss of {optimizer} is no longer a number at step {done}: give a "
                        f"--learning-rate smaller than {config.hyper.learning_rate}."
                    )
                if evaluates:
                    measured = measure_held_out(task, evaluate, state)
                    metrics.write([{"step": done, **measured}])
                    shown = [f"{name} {text(measured)}" for name, text in task.columns.items()]
                    progress.console.print(f"{optimizer}: step {done}, {', '.join(shown)}")
                if saves:
                    runs.save_checkpoint(checkpoints, done, state)
                losses = []
                clock = time.perf_counter()


def result(task: Task, optimizer: str, folder: Path) -> dict[str, Any]:
    """One row of the table, from what the finished training left in `folder`."""
    program = task.make_program(optimizer)
    state = program.abstract_state().opt_state
    records = runs.read_metrics(folder / METRICS_FILE)
    held_out = next(record for record in reversed(records) if "held_out_loss" in record)
    return {
        "optimizer": optimizer,
        **held_out,
        "optimizer_bytes": optimizers.state_bytes(state),
        "numbers_in_v": optimizers.numbers_in_v(state),
        "ms_per_step": float(np.median([record["ms"] for record in records if "ms" in record])),
    }


def where_it_goes_on(folder: Path, names: Sequence[str]) -> str:
    """From where --resume would take up a run that ends now."""
    for optimizer in reversed(names):
        if step := runs.newest_checkpoint(folder / optimizer / "checkpoints"):
            return f"--resume {folder} goes on with {optimizer} after step {step}."
    return f"no checkpoint was written yet; --resume {folder} starts from the beginning."


def train_and_compare(config: TrainingConfig, task: Task, folder: Path, console: Console) -> None:
    """Train with each of the optimizers what is not trained yet; draw the curves, print the
    table."""
    console.print(f"{task.description}; run folder {folder}")
    interrupts.end_on_interrupt(lambda: where_it_goes_on(folder, config.optimizer_names))
    count = len(config.optimizer_names)
    for number, optimizer in enumerate(config.optimizer_names, 1):
        if count > 1:
            console.print(f"Training {number}/{count}, with {optimizer}")
        train(config, optimizer, task, folder / optimizer, console)
    if not mesh.is_first():
        return

    results = [result(task, optimizer, folder / optimizer) for optimizer in config.optimizer_names]
    runs.write_json(folder / "results.json", results)
    runs.plot_curves(
        folder / "loss.png",
        {name: runs.read_metrics(folder / name / METRICS_FILE) for name in config.optimizer_names},
        title=task.title,
        unit=task.loss_unit,
    )
    columns = {
        "optimizer": lambda row: row["optimizer"],
        **task.columns,
        "optimizer bytes": lambda row: f"{row['optimizer_bytes']:,}",
        "numbers in v": lambda row: f"{row['numbers_in_v']:,}",
        "ms per step": lambda row: f"{row['ms_per_step']:.1f}",
    }
    console.print(comparison_table(task.title, columns, results))
    console.print(f"Loss curves: {folder / 'loss.png'}")


def compare(
    config: AnyConfig,
    load_task: Callable[[AnyConfig, Path], Task],
    blocks: Callable[[AnyConfig], RenderableType],
    finish: Callable[[AnyConfig, Path, Console], None] | None = None,
) -> None:
    """A new run, the rest of an old one, or the table of `blocks`, as `config` says. `load_task`
    may keep data in the run's folder; `finish` is called when everything is trained."""
    console = Console(quiet=not mesh.is_first())
    root = Path(config.runs)
    if config.resume is not None:
        where = {name: getattr(config, name) for name in config.where}
        own = {field.name for group in where.values() for field in dataclasses.fields(group)}
        refuse_others(config, "--resume", {"resume", "runs"} | own)
        folder = Path(mesh.from_first(lambda: str(runs.find_run(root, config.resume))))
        mesh.first_then_others(lambda: runs.check_visible(folder))
        config = dataclasses.replace(load_config(type(config), folder), **where)
        task = load_task(config, folder)
    else:
        config.check()
        if config.show_blocks:
            console.print(blocks(config))
            return
        folder = Path(mesh.from_first(lambda: str(runs.new_run(root, config))))
        mesh.first_then_others(lambda: runs.check_visible(folder))
        try:
            task = load_task(config, folder)
        except ConfigError:
            mesh.from_first(lambda: shutil.rmtree(folder))  # it never was a run
            raise
    train_and_compare(config, task, folder, console)
    if finish is not None:
        finish(config, folder, console)
