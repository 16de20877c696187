"""Does Adam-mini train as well as AdamW, and better than other optimizers that save memory?

python -m benchmarks.quality                      # everything; hours on two CPU cores
python -m benchmarks.quality --studies gpt2 gcn   # some of it
python -m benchmarks.quality --quick              # minutes; shows that it runs

The study of a workload uses the example's own model, data, batches, steps, schedule, clipping and
weight decay. Each optimizer walks along one grid of learning rates, on seed 0, until both
neighbours are worse, and then trains with fresh seeds at the best rate. Adam-mini also trains at
AdamW's best rate. The runs are stored in JSON files in --output, from which tables and plots are
made; after an interruption, the same command continues.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from benchmarks.quality import report
from benchmarks.quality.others import SCALES
from benchmarks.quality.partitions import PARTITIONS
from benchmarks.quality.workloads import WORKLOADS, Workload
from benchmarks.results import Results
from examples.common import optimizers
from examples.common.cli import check_counts
from examples.common.training import Program, Task, TrainingConfig, measure_held_out

TITLES = {
    "adamw": "AdamW",
    "adam_mini": "Adam-mini",
    "adafactor": "Adafactor",
    "came": "CAME",
    "lion": "Lion",
    "sm3": "SM3",
    "sgd": "SGD, momentum",
}
COMPARED = ("adamw", "adam_mini", *SCALES)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
# Where an optimizer's walk begins, in steps of the grid from the example's own rate, which is
# AdamW's. A good start saves runs.
STARTS = {"came": -2, "lion": -2, "sm3": 3, "sgd": 3}
SWEEP_SEED = 0
# Options that do not change a run's result, or that are part of its record.
NO_MATTER = {
    "seed",
    "runs",
    "resume",
    "optimizer",
    "show_blocks",
    "parameters",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "sample",
    "run",
    "sample_tokens",
    "temperature",
    "v",
}
# AdamW and Adam-mini are trained at each of these rates, for the plot of sensitivity.
SENSITIVITY = {"gpt2": RATES[2:8], "llama": RATES[2:8]}
# Sizes of Llama, (layers, width, steps), with steps roughly in proportion to size.
SIZES = ((1, 64, 125), (2, 96, 250), (2, 128, 500), (3, 192, 1000))

StudyName = Literal["gpt2", "llama", "resnet", "diffusion", "gcn", "gat", "scaling", "ablations"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Train every example with every optimizer, and compare."""

    studies: tuple[StudyName, ...] = StudyName.__args__
    """What to study: workloads, the scaling of Llama, ablations of Llama's partition."""
    seeds: int = 3
    """Number of fresh seeds, from 1 on; the tables have their mean."""
    output: str | None = None
    """Folder of the results; by default docs/results, or runs/quality_quick with --quick."""
    quick: bool = False
    """A few steps of two optimizers, one rate, one seed: numbers without meaning, in minutes."""

    @property
    def compared(self) -> tuple[str, ...]:
        """The names of the optimizers to compare."""
        return COMPARED[:2] if self.quick else COMPARED

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.output or ("runs/quality_quick" if self.quick else "docs/results"))


class Study:
    """The runs of one workload; each is trained once and then stored."""

    def __init__(self, name: str, workload: Workload, options: Options, console: Console):
        self.name, self.workload, self.options, self.console = name, workload, options, console
        self.config = shortened(workload.config) if options.quick else workload.config
        self.seeds = range(1, 1 + options.seeds)
        self.results = Results(options.folder / f"{name}.json", settings(self.config))

    def run(
        self, optimizer: str, learning_rate: float, seed: int, **changes: Any
    ) -> dict[str, Any]:
        """One training; `changes` are options of the example."""
        asked = {"optimizer": optimizer, "learning_rate": learning_rate, "seed": seed, **changes}

        def train() -> dict[str, Any]:
            hyper = dataclasses.replace(self.config.hyper, learning_rate=learning_rate)
            config = dataclasses.replace(self.config, seed=seed, hyper=hyper, **changes)
            with self.console.status(f"{self.name}: {asked}"):
                found = train_once(config, self.workload.load_task, optimizer)
            self.console.print(f"{self.name}: {asked} -> {found}")
            return found

        return self.results.get(asked, train)

    def row(self, title: str, optimizer: str, rate: float, **changes: Any) -> dict[str, Any]:
        """One row of a table: the final values of the fresh seeds."""
        found = [self.run(optimizer, rate, seed, **changes) for seed in self.seeds]
        values = [self.workload.value(run) for run in found]
        facts = {name: found[0][name] for name in ("parameters", "optimizer_bytes")}
        return {"title": title, "values": values, "mean": sum(values) / len(values), **facts}

    def ms_per_step(self) -> dict[str, Any]:
        """The time of a step with each optimizer."""
        rounds = 2 if self.options.quick else 30
        return self.results.get(
            {"timing_rounds": rounds},
            lambda: ms_per_step(
                self.config, self.workload.load_task, self.options.compared, rounds
            ),
        )

    def best_rate(self, optimizer: str) -> float:
        """The rate where the walk along the grid ends."""
        own = np.log(self.config.hyper.learning_rate)
        index = int(np.argmin(np.abs(np.log(RATES) - own))) + STARTS.get(optimizer, 0)
        if self.options.quick:
            return RATES[index]

        def score(index: int) -> tuple[float, float]:
            return self.workload.score(self.run(optimizer, RATES[index], SWEEP_SEED))

        while True:
            near = [i for i in (index, index - 1, index + 1) if 0 <= i < len(RATES)]
            best = min(near, key=score)
            if best == index:
                return RATES[index]
            index = best


def shortened(config: TrainingConfig) -> TrainingConfig:
    """The same configuration with a few steps."""
    hyper = dataclasses.replace(config.hyper, warmup_steps=2)
    return dataclasses.replace(config, steps=8, hyper=hyper)


def settings(config: TrainingConfig) -> dict[str, Any]:
    """Everything that determines a run and is not part of its record."""
    stored = dataclasses.asdict(config)
    hyper = stored["hyper"]
    del hyper["learning_rate"], hyper["muon_learning_rate"], hyper["warmup_share"]
    hyper["warmup_steps"] = config.hyper.warmup(config.steps)
    return {name: value for name, value in stored.items() if name not in NO_MATTER}


def train_once(
    config: TrainingConfig, load_task: Callable[[Any, Path], Task], optimizer: str
) -> dict[str, Any]:
    """The held-out metrics at the end of a training, its memory and its time."""
    (found,) = train_seeds(config, load_task, optimizer, [config.seed])
    return found


def train_seeds(
    config: TrainingConfig,
    load_task: Callable[[Any, Path], Task],
    optimizer: str,
    seeds: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Like `train_once`, for one seed after another. The step is compiled once, because the seed
    only affects the first state and the batches."""
    config.check()
    init = step = evaluate = None
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            task = load_task(dataclasses.replace(config, seed=seed), Path(folder))
            program = task.make_program(optimizer)
            init = init or jax.jit(program.init)
            state = init(seed)
            facts = {
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                "optimizer_bytes": optimizers.state_bytes(state.opt_state),
            }
            step = step or jax.jit(program.step, donate_argnums=0)
            evaluate = evaluate or jax.jit(program.evaluate)
            clock = time.perf_counter()
            for number in range(1, config.steps + 1):
                state, loss = step(state, task.batch(number))
                if number % 20 == 0 and not np.isfinite(loss):
                    break  # it has diverged
            measured = measure_held_out(task, evaluate, state)
        yield {**measured, **facts, "seconds": round(time.perf_counter() - clock, 1)}


def ms_per_step(
    config: TrainingConfig,
    load_task: Callable[[Any, Path], Task],
    compared: Sequence[str],
    rounds: int,
) -> dict[str, float]:
    """The median time of a training step with each optimizer; the optimizers take turns."""
    with tempfile.TemporaryDirectory() as folder:
        task = load_task(config, Path(folder))
        batch = task.batch(1)
        programs: dict[str, Program] = {name: task.make_program(name) for name in compared}
        steps = {name: jax.jit(p.step, donate_argnums=0) for name, p in programs.items()}
        states = {name: jax.jit(program.init)() for name, program in programs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(1 + rounds):
            for name, step in steps.items():
                clock = time.perf_counter()
                states[name], loss = step(states[name], batch)
                loss.block_until_ready()
                seconds[name].append(time.perf_counter() - clock)
    # The first round compiles.
    return {name: round(1e3 * float(np.median(times[1:])), 2) for name, times in seconds.items()}


def compare(study: Study) -> None:
    """Trains every optimizer at its best rate, and Adam-mini also at AdamW's; times steps."""
    best = {optimizer: study.best_rate(optimizer) for optimizer in study.options.compared}
    # Title, optimizer and rate of each row of the table.
    entries = [(TITLES[optimizer], optimizer, rate) for optimizer, rate in best.items()]
    entries.insert(1, ("Adam-mini, AdamW's rate", "adam_mini", best["adamw"]))
    times = study.ms_per_step()
    rows = [
        {
            **study.row(title, optimizer, rate),
            "optimizer": optimizer,
            "learning_rate": rate,
            "ms_per_step": times[optimizer],
        }
        for title, optimizer, rate in entries
    ]
    if not study.options.quick:
        for rate in SENSITIVITY.get(study.name, ()):
            for optimizer in ("adamw", "adam_mini"):
                study.run(optimizer, rate, SWEEP_SEED)
    study.results.conclude(rows)


def scale(study: Study) -> None:
    """Trains Llama in several sizes, on about the same number of tokens per parameter."""
    rate = study.config.hyper.learning_rate
    rows = []
    for layers, width, steps in SIZES[:2] if study.options.quick else SIZES:
        size = {"layers": layers, "width": width}
        size["steps"] = study.config.steps if study.options.quick else steps
        for optimizer in ("adamw", "adam_mini"):
            rows.append({**study.row(TITLES[optimizer], optimizer, rate, **size), **size})
    study.results.conclude(rows)


def ablate(study: Study, rate: float) -> None:
    """Trains Llama with other partitions, at AdamW's best rate."""
    names = {"adamw": "AdamW", **{name: name for name in PARTITIONS}, "adam_mini": "Adam-mini"}
    if study.options.quick:
        names = dict(list(names.items())[:3])
    study.results.conclude([study.row(title, name, rate) for name, title in names.items()])


def main(options: Options) -> None:
    check_counts({"seeds": options.seeds})
    console = Console()
    show = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.quick:
        options = dataclasses.replace(options, seeds=1)
        jax.config.update("jax_disable_most_optimizations", True)  # halves the time to compile
    for name in options.studies:
        study = Study(name, WORKLOADS.get(name, WORKLOADS["llama"]), options, console)
        if name == "scaling":
            scale(study)
        elif name == "ablations":
            ablate(study, Study("llama", WORKLOADS["llama"], options, console).best_rate("adamw"))
        else:
            compare(study)
        show(report.write(options.folder, name))
    show(report.write_summary(options.folder))
