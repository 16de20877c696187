"""How much time and memory does it take to infer the blocks of a large model?

python -m benchmarks.speed.inference

Traces Llama-2-7B with unrolled layers, at several depths, on abstract values. Each depth runs in
its own process, and the table has that process's peak memory.
"""

import dataclasses
import multiprocessing
import resource
import time
from typing import NamedTuple

import jax
import tyro
from jax.extend.core import Jaxpr, subjaxprs
from rich.console import Console
from rich.table import Table

from examples.common.cli import check_counts
from examples.common.language import abstract_model, abstract_tokens, make_logits
from examples.common.text import TextConfig
from examples.llama.train import Config
from optax_adam_mini import infer_block_specs


@dataclasses.dataclass(frozen=True)
class Options:
    """Infer the blocks of Llama-2-7B with several numbers of layers."""

    layers: tuple[int, ...] = (8, 16, 32, 64)
    """The numbers of layers."""


class Found(NamedTuple):
    """The measurements at one depth."""

    parameters: int
    equations: int
    trace_seconds: float
    """The time to make the jaxpr, which every use of the model takes."""
    seconds: float
    """The time of infer_block_specs, including its own tracing."""
    peak_bytes: int


def measure(layers: int) -> Found:
    """Measures one depth, in a process that has done nothing else."""
    data = TextConfig(tokenizer="bpe", vocab_size=32000)
    config = Config(model="llama2-7b", layers=layers, data=data)
    _, params = abstract_model(config)
    logits, tokens = make_logits(config), abstract_tokens(config)
    clock = time.perf_counter()
    jaxpr = jax.make_jaxpr(logits)(params, tokens)
    trace_seconds = time.perf_counter() - clock
    jax.clear_caches()
    clock = time.perf_counter()
    infer_block_specs(logits, params, tokens, v="mean")
    seconds = time.perf_counter() - clock
    return Found(
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        count_equations(jaxpr.jaxpr),
        trace_seconds,
        seconds,
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def count_equations(jaxpr: Jaxpr) -> int:
    """The number of equations, including those of called jaxprs."""
    return len(jaxpr.eqns) + sum(map(count_equations, subjaxprs(jaxpr)))


def main(options: Options) -> None:
    check_counts({"layers": min(options.layers, default=0)})
    table = Table(title="Llama-2-7B, layers unrolled")
    for column in ("layers", "parameters", "equations", "trace s", "infer s", "peak MB"):
        table.add_column(column, justify="right")
    spawn = multiprocessing.get_context("spawn")
    for layers in options.layers:
        with spawn.Pool(1) as pool:
            found = pool.apply(measure, (layers,))
        table.add_row(
            str(layers),
            f"{found.parameters:,}",
            f"{found.equations:,}",
            f"{found.trace_seconds:.2f}",
            f"{found.seconds:.2f}",
            f"{found.peak_bytes / 1e6:,.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.speed.inference", description=__doc__))
