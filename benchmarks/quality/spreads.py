"""How well each cut explains the second moment of an AdamW that has run.

python -m benchmarks.quality.spreads
python -m benchmarks.quality.spreads --model llama --steps 300

Trains a nano language model with AdamW. Prints for several cuts, by group of parameters, the spread
of the steps around Adam's (0 if the cut explains `v`), and the signal-to-noise ratio
mean(v)^2 / var(v) inside blocks (Kalra et al., arXiv 2503.01843).
"""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.quality.variants import rows_for_matrices
from benchmarks.quality.workloads import WORKLOADS
from examples.common.language import block_specs
from optax_adam_mini import BlockSpec, per_neuron
from optax_adam_mini.product import Outer, Spec


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure how well cuts explain AdamW's second moment."""

    model: Literal["gpt2", "llama"] = "gpt2"
    """Which nano language model."""
    steps: int = 300
    """Steps of AdamW before `v` is measured."""
    learning_rate: float = 4.5e-3
    """AdamW's learning rate."""
    seed: int = 1
    """Seed of the weights and the batches."""


def spread(spec: Spec, v: Any) -> float:
    """The spread of the steps around Adam's."""
    of_blocks = spec.spread(spec.block_mean(v), v.shape)
    ratio = np.asarray(v) / np.where(of_blocks > 0, of_blocks, 1)
    return float(np.sqrt(np.mean((np.sqrt(ratio) - 1) ** 2)))


def signal_to_noise(spec: BlockSpec, v: Any) -> float:
    """The median over blocks of mean(v)^2 / var(v)."""
    mean = spec.block_mean(v)
    variance = spec.block_mean(v**2) - mean**2
    return float(np.median(np.asarray(mean**2) / np.maximum(variance, 1e-45)))


def main(options: Options) -> None:
    workload = WORKLOADS[options.model]
    hyper = dataclasses.replace(workload.config.hyper, learning_rate=options.learning_rate)
    config = dataclasses.replace(workload.config, hyper=hyper, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        task = workload.load_task(config, Path(folder))
        program = task.make_program("adamw")
        state, step = jax.jit(program.init)(), jax.jit(program.step, donate_argnums=0)
        for number in range(1, options.steps + 1):
            state, _ = step(state, task.batch(number))
    (adam,) = (s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    mean = block_specs(dataclasses.replace(config, v="mean"))
    outer = block_specs(dataclasses.replace(config, v="outer"))

    groups: dict[str, list[tuple[Any, BlockSpec, Spec]]] = {}
    flat = lambda tree: jax.tree.leaves(tree)
    paths = [jax.tree_util.keystr(k, simple=True, separator="/")
             for k, _ in jax.tree_util.tree_leaves_with_path(mean)]  # fmt: skip
    for path, v, *specs in zip(paths, flat(adam.nu), flat(mean), flat(outer), strict=True):
        groups.setdefault(re.sub(r"\d+", "*", path), []).append((jnp.asarray(v), *specs))

    table = Table(title=f"{workload.title} nano, AdamW's v after {options.steps} steps")
    table.add_column("parameters")
    titles = ("the paper's", "by input", "by output", "row per matrix", "outer")
    for title in titles:
        table.add_column(f"spread, {title}", justify="right")
    for title in ("the paper's", "by input", "by output"):
        table.add_column(f"signal to noise, {title}", justify="right")
    for path, found in groups.items():
        cells = [path]
        is_matrix = isinstance(found[0][2], Outer)
        for spec in (
            lambda m, o: m,
            lambda m, o: per_neuron(axis=0),
            lambda m, o: per_neuron(),
            lambda m, o: rows_for_matrices(o),
            lambda m, o: o,
        ):
            values = [spread(spec(m, o), v) for v, m, o in found]
            cells.append(f"{np.mean(values):.2f}")
        for spec in (lambda m: m, lambda m: per_neuron(axis=0), lambda m: per_neuron()):
            values = [signal_to_noise(spec(m), v) for v, m, _ in found]
            cells.append(f"{np.mean(values):.2f}" if is_matrix else "")
        table.add_row(*cells)
    Console(width=160).print(table)


def _is_adam(node: Any) -> bool:
    return type(node).__name__ == "ScaleByAdamState"


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.quality.spreads", description=__doc__))
