"""Does Adam-mini match AdamW's loss? Paired seeds, a fine grid of learning rates, and intervals.

python -m benchmarks.quality.paired                              # all workloads; hours
python -m benchmarks.quality.paired --workloads gpt2 --steps 4000
python -m benchmarks.quality.paired --quick                      # minutes; shows that it runs

AdamW walks along a grid of learning rates of factor 1.5, on the mean of the first seeds, until both
neighbours are worse. Every optimizer is then trained with every seed at AdamW's best rate. With
--own-rates, the others also walk, and are trained at their own best rates. A seed gives every
optimizer the same first weights and the same batches, so differences are taken seed by seed. The
runs are stored in JSON files in --output, from which tables and plots are made; after an
interruption, the same command continues.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks.quality import intervals
from benchmarks.quality.studies import settings, shortened, train_seeds
from benchmarks.quality.together import train_together
from benchmarks.quality.variants import ORDERS, VARIANTS
from benchmarks.quality.workloads import WORKLOADS, Workload
from benchmarks.results import Results
from examples.common.cli import check_counts, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.optimizers import OF_MATRICES, ParameterConfig


class Contender(NamedTuple):
    """An optimizer in the comparison."""

    title: str
    optimizer: str
    v: str | None = None
    """What Adam-mini stores per block; None for other optimizers."""
    start: float = 1.0
    """The rate where its walk begins, as a multiple of AdamW's."""
    parameters: ParameterConfig = ParameterConfig()
    """How language models store their parameters."""


RANDOM = ParameterConfig("bfloat16")
NEAREST = ParameterConfig("bfloat16", "nearest")
CONTENDERS = {
    "adamw": Contender("AdamW", "adamw"),
    "mean": Contender("Adam-mini, the paper's", "adam_mini", "mean"),
    "outer": Contender("Adam-mini, outer", "adam_mini", "outer"),
    "mean, 8 bits": Contender("Adam-mini, the paper's, 8 bits", "adam_mini_int8", "mean"),
    "outer, 8 bits": Contender("Adam-mini, outer, 8 bits", "adam_mini_int8", "outer"),
    "outer, 8 bits, bfloat16": Contender(
        "Adam-mini, outer, 8 bits; bfloat16 at random", "adam_mini_int8", "outer", parameters=RANDOM
    ),
    "outer, 8 bits, bfloat16 to nearest": Contender(
        "Adam-mini, outer, 8 bits; bfloat16 to nearest",
        "adam_mini_int8",
        "outer",
        parameters=NEAREST,
    ),
    "adamw, bfloat16": Contender("AdamW; bfloat16 at random", "adamw", parameters=RANDOM),
    "adamw, bfloat16 to nearest": Contender(
        "AdamW; bfloat16 to nearest, state too", "adamw", parameters=NEAREST
    ),
    "adafactor": Contender("Adafactor, momentum", "adafactor"),
    "came": Contender("CAME", "came", start=0.1),
    "muon": Contender("Muon, AdamW for the rest", "muon"),
    "muon_mini": Contender("Muon, Adam-mini outer for the rest", "muon_mini", "outer"),
    "muon_mini, 8 bits": Contender(
        "Muon, Adam-mini outer for the rest, 8 bits", "muon_mini_int8", "outer"
    ),
    "muon_mini, parts": Contender(
        "the same, of query, key and value each", "muon_mini, parts", "outer"
    ),
    "muon_mini, heads": Contender(
        "the same, of each head of query and key", "muon_mini, heads", "outer"
    ),
    **{name: Contender(name, name, "outer") for name in (*VARIANTS, *ORDERS)},
}
# The rates where AdamW's walk begins: the best ones of the coarse grid.
STARTS = {"gpt2": 3e-3, "llama": 3e-3, "resnet": 1e-2, "diffusion": 1e-2, "gcn": 3e-2, "gat": 3e-2}
FACTOR = 1.5

WorkloadName = Literal["gpt2", "llama", "resnet", "diffusion", "gcn", "gat"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare optimizers seed by seed, at AdamW's best rate and at their own."""

    workloads: tuple[WorkloadName, ...] = WorkloadName.__args__
    """Models to train."""
    contenders: tuple[str, ...] = ("adamw", "mean", "outer", "adafactor", "came")
    """Optimizers, AdamW first; variants of benchmarks.quality.variants are allowed."""
    steps: int | None = None
    """Optimizer steps, instead of the example's own."""
    seeds: int = 8
    """Number of seeds, from 1 on."""
    sweep_seeds: int = 2
    """Number of these seeds that choose the rate."""
    reach: int = 1
    """Number of neighbours on each side that must be worse than the best rate (Muon's matrices:
    one). Few seeds are noisy, and a walk that looks at one neighbour may stop early."""
    rate: float | None = None
    """AdamW's best rate, if it is known; this skips AdamW's walk."""
    muon_rate: float = 2e-2
    """Learning rate of Muon's matrices; the other rates are for the rest."""
    own_rates: bool = False
    """Also train the others at their own best rates. For Muon, the walk over the matrices' rate
    comes first, at AdamW's best rate for the rest; then the walk over the rate of the rest."""
    also: tuple[float, float] | None = None
    """Rates of the rest and of the matrices at which all contenders with Muon are also trained."""
    output: str = str(intervals.DEFAULT_OUTPUT)
    """Folder of the results."""
    together: bool | None = None
    """Train all seeds in one program; by default only on accelerators."""
    quick: bool = False
    """A few steps, one rate, two seeds: numbers without meaning, in minutes."""


class Comparison:
    """The runs of one workload; each is trained once and then stored."""

    def __init__(self, name: str, options: Options, console: Console):
        self.name, self.options, self.console = name, options, console
        self.workload: Workload = WORKLOADS[name]
        config = self.workload.config
        if options.steps is not None:
            config = dataclasses.replace(config, steps=options.steps)
        self.config = shortened(config) if options.quick else config
        self.file = f"{name}_{self.config.steps}"
        self.muon_rates = dict.fromkeys(
            (name for name in options.contenders if CONTENDERS[name].optimizer in OF_MATRICES),
            options.muon_rate,
        )
        self.results = Results(Path(options.output) / f"{self.file}.json", settings(self.config))

    def title(self, contender: str) -> str:
        """A contender's title, with Muon's rate if it has one."""
        title = CONTENDERS[contender].title
        rate = self.muon_rates.get(contender)
        return title if rate is None else f"{title} (matrices {rate:g})"

    def values(self, contender: str, rate: float, seeds: int) -> list[float]:
        """The held-out loss, or the accuracy, of the first seeds."""
        numbers = range(1, 1 + seeds)
        return [self.workload.value(run) for run in self.runs(contender, rate, numbers)]

    def runs(self, contender: str, rate: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The runs of a contender, one per seed; missing ones are trained."""
        who = CONTENDERS[contender]
        rates: dict[str, Any] = {"learning_rate": rate}
        if contender in self.muon_rates:
            rates["muon_learning_rate"] = self.muon_rates[contender]
        asked = [{"contender": contender, **rates, "seed": seed} for seed in seeds]
        known = [run["asked"] for run in self.results.runs]
        missing = [seed for seed, one in zip(seeds, asked, strict=True) if one not in known]
        hyper = dataclasses.replace(self.config.hyper, **rates)
        config = dataclasses.replace(self.config, hyper=hyper, v=who.v or self.config.v)
        if who.parameters != ParameterConfig():
            config = dataclasses.replace(config, parameters=who.parameters)
        trained = self._train(config, who.optimizer, missing)
        for one in asked:
            if one["seed"] in missing:
                with self.console.status(f"{self.file}: {one}"):
                    found = self.results.get(one, lambda: next(trained))
                text = self.workload.text(self.workload.value(found))
                self.console.print(f"{self.file}: {one}: {text}, {found['seconds']} s")
        return [self.results.get(one, dict) for one in asked]

    def _train(self, config: Any, optimizer: str, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
        load_task, together = self.workload.load_task, self.options.together
        if jax.default_backend() != "cpu" if together is None else together:
            in_turns = self.workload.convolutions
            return train_together(config, load_task, optimizer, seeds, in_turns=in_turns)
        return train_seeds(config, load_task, optimizer, seeds)

    def best_rate(self, contender: str, adamws: float | None = None) -> float:
        """The rate where the walk along the grid ends; Muon first walks the matrices' rate."""
        start = STARTS[self.name] * CONTENDERS[contender].start
        sweep = min(self.options.sweep_seeds, self.options.seeds)

        def muons_score(rate: float) -> float:
            self.muon_rates[contender] = rate
            return self._score(contender, start, sweep)

        if contender in self.muon_rates:
            start = adamws or start
            self.muon_rates[contender] = _walk(self.muon_rates[contender], muons_score)
        reach = self.options.reach
        return _walk(start, lambda rate: self._score(contender, rate, sweep), reach)

    def _score(self, contender: str, rate: float, seeds: int) -> float:
        """A score; smaller is better, and the loss decides among equal accuracies."""
        runs = self.runs(contender, rate, range(1, 1 + seeds))
        scores = [self.workload.score(run) for run in runs]
        return float(np.mean([first + 1e-6 * second for first, second in scores]))

    def rates(self, contender: str) -> list[float]:
        """The rates that a contender was trained at."""
        asked = [run["asked"] for run in self.results.runs]
        return sorted({one["learning_rate"] for one in asked if one["contender"] == contender})


def _walk(start: float, score: Callable[[float], float], reach: int = 1) -> float:
    """The rate of the grid through `start` whose neighbours are all worse."""
    index, rate = 0, lambda index: _rounded(start * FACTOR**index)
    while True:
        near = [index, *(index + way * n for n in range(1, 1 + reach) for way in (-1, 1))]
        best = min(near, key=lambda index: score(rate(index)))
        if best == index:
            return rate(index)
        index = best


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def compare(comparison: Comparison) -> None:
    """Runs the walks, the seeds at the best rates, and the curve over rates."""
    options = comparison.options
    known = options.rate or (STARTS[comparison.name] if options.quick else None)
    best = known or comparison.best_rate("adamw")
    muon_rates = comparison.muon_rates
    entries = [("", name, best, muon_rates.get(name)) for name in options.contenders]
    if options.also is not None:
        entries += [("at one pair of rates for all", name, *options.also) for name in muon_rates]
    if options.own_rates:
        for name in options.contenders[1:]:
            rate = comparison.best_rate(name, best)
            entries.append(("at their own best rates", name, rate, muon_rates.get(name)))
    rows = []
    for where, name, rate, muon_rate in entries:
        if muon_rate is not None:
            muon_rates[name] = muon_rate
        runs = comparison.runs(name, rate, range(1, 1 + options.seeds))
        rows.append(
            {
                "contender": name,
                "where": where,
                "title": comparison.title(name),
                "learning_rate": rate,
                "values": [comparison.workload.value(run) for run in runs],
                "optimizer_bytes": runs[0]["optimizer_bytes"],
                "parameters": runs[0]["parameters"],
            }
        )
    if known is None:  # the curve: how the distance depends on the rate
        sweep = min(options.sweep_seeds, options.seeds)
        for rate in comparison.rates("adamw"):
            for name in {"mean", "outer"} & set(options.contenders):
                comparison.values(name, rate, sweep)
    comparison.results.conclude(rows)


def main(options: Options) -> None:
    check_counts(
        {"seeds": options.seeds, "sweep_seeds": options.sweep_seeds, "reach": options.reach}
    )
    console = Console()
    if options.quick:
        options = dataclasses.replace(options, seeds=2, contenders=options.contenders[:3],
                                      output="runs/paired_quick")  # fmt: skip
        jax.config.update("jax_disable_most_optimizations", True)  # halves the time to compile
    for name in options.workloads:
        comparison = Comparison(name, options, console)
        compare(comparison)
        page = intervals.write(Path(options.output), comparison.file, name)
        console.print(page, markup=False, highlight=False, soft_wrap=True)
    intervals.write_memory(Path(options.output))
    intervals.write_summary(Path(options.output))


if __name__ == "__main__":
    options = tyro.cli(Options, prog="python -m benchmarks.quality.paired", description=__doc__)
    end_on_interrupt(lambda: "the same command goes on from here.")
    sys.exit(exit_status(lambda: main(options)))
