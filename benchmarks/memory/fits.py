"""Does it fit? Whole training steps, compiled for TPUs and GPUs that need not be present.

python -m benchmarks.memory.fits --model llama2-7b --topology v5e:2x4 --context 2048

Compiles loss, gradient, clipping and update of the GPT-2 or Llama example with XLA's compiler for
the chip (scanned layers, recomputed in the backward pass, in bfloat16, with FSDP over all devices).
Reports the bytes on each device: parameters, optimizer state and temporaries, which include
gradients and activations. No array is allocated, and nothing is run. benchmarks/chips.py says how
to install the compilers.

Rows go to docs/results/fits.json and fits.md; rows of other cases stay as they are.
"""

import dataclasses
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import benchmarks.quality.others  # noqa: F401  adds optimizers to the examples'
from benchmarks.chips import RESERVED, chip_of, devices, versions, without_devices
from benchmarks.results import Columns, write_rows
from benchmarks.speed.update import known, rows_of_before
from examples.common.cli import check_counts, comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.language import LanguageConfig, make_program
from examples.common.mesh import BATCH_AXES, MeshConfig
from examples.common.optimizers import ParameterConfig
from examples.common.text import TextConfig
from examples.gpt2.train import Config as GPT2Training
from examples.llama.train import Config as LlamaTraining


class Optimizer(NamedTuple):
    """An optimizer of the examples, and what Adam-mini stores per block."""

    name: str
    v: Literal["mean", "outer"] = "mean"
    parameters: ParameterConfig = ParameterConfig()


OPTIMIZERS = {
    "AdamW": Optimizer("adamw"),
    "Adam-mini, one number": Optimizer("adam_mini", "mean"),
    "Adam-mini, row and column": Optimizer("adam_mini", "outer"),
    "Adam-mini, row and column, 8 bits": Optimizer("adam_mini_int8", "outer"),
    "Adam-mini, row and column, 8 bits; bfloat16": Optimizer(
        "adam_mini_int8", "outer", ParameterConfig("bfloat16")
    ),
    "AdamW; bfloat16": Optimizer("adamw", parameters=ParameterConfig("bfloat16")),
    "SGD, momentum": Optimizer("sgd"),
    "Lion": Optimizer("lion"),
    "Adafactor, momentum": Optimizer("adafactor"),
}
# Each model has the vocabulary of its published tokenizer.
MODELS: dict[str, Callable[..., LanguageConfig]] = {
    "gpt2": lambda **given: GPT2Training(model="gpt2", data=_bpe(50257), **given),
    "gpt2-xl": lambda **given: GPT2Training(model="gpt2-xl", data=_bpe(50257), **given),
    "tinyllama-1b": lambda **given: LlamaTraining(model="tinyllama-1b", data=_bpe(32000), **given),
    "llama2-7b": lambda **given: LlamaTraining(model="llama2-7b", data=_bpe(32000), **given),
    "llama2-13b": lambda **given: LlamaTraining(model="llama2-13b", data=_bpe(32000), **given),
    "llama3-8b": lambda **given: LlamaTraining(model="llama3-8b", data=_bpe(128256), **given),
    "llama3-70b": lambda **given: LlamaTraining(
        model="llama3-8b", layers=80, heads=64, width=8192, mlp_width=28672, data=_bpe(128256),
        **given,
    ),
}  # fmt: skip


def _bpe(vocab_size: int) -> TextConfig:
    return TextConfig(tokenizer="bpe", vocab_size=vocab_size)


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile training steps for TPUs and GPUs that need not be present, and see if they fit."""

    model: tuple[str, ...] = ("llama2-7b",)
    """Models: gpt2, gpt2-xl, tinyllama-1b, llama2-7b, llama2-13b, llama3-8b, llama3-70b."""
    topology: tuple[str, ...] = ("v5e:2x4",)
    """Chips (v5e, v5p, v6e or h100), each with a shape: v5e:2x4, v5p:2x2x1, h100:8."""
    context: int | None = None
    """Tokens per sequence, instead of the model's context."""
    batch: int = 1
    """Sequences per device and step."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)[:4]
    """Optimizers, by their names in the table."""
    search: bool = False
    """Search for the largest batch at this context and, at this batch, for the longest context, in
    powers of two times this one. Each attempt compiles a step."""
    effort: float = -1.0
    """XLA's exec_time_optimization_effort on TPUs. 0 is the default: it takes five times as long to
    compile, uses spare memory for speed, and fails if there is none."""
    output: Path = Path("docs/results")
    """Folder for fits.json and fits.md."""


@dataclasses.dataclass(frozen=True)
class Devices(MeshConfig):
    """The devices of a topology, instead of those of this machine."""

    topology: str = ""

    def make_mesh(self) -> Mesh:
        return jax.make_mesh(
            tuple(self.sizes.values()), tuple(self.sizes),
            axis_types=(AxisType.Auto,) * len(self.sizes), devices=devices(self.topology),
        )  # fmt: skip


class Case(NamedTuple):
    """A training step to compile."""

    model: str
    topology: str
    optimizer: str
    context: int | None
    batch: int
    effort: float = -1.0


def config_of(case: Case) -> LanguageConfig:
    """The example's configuration for a case."""
    count = len(devices(case.topology))
    return MODELS[case.model](
        context=case.context, dtype="bfloat16", scan=True, remat=True,
        batch_size=case.batch * count, v=OPTIMIZERS[case.optimizer].v,
        parameters=OPTIMIZERS[case.optimizer].parameters,
        devices=Devices(mesh=f"fsdp={count}", topology=case.topology),
    )  # fmt: skip


def on_each(tree: Any) -> int:
    """Bytes of abstract arrays on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def used(error: str) -> float:
    """The bytes that a program needs, from the compiler's error that they do not fit."""
    found = re.search(r"Total hbm usage >= ([\d.]+)([MGT])", error) or re.search(
        r"temporaries \(([\d.]+)([MGT])\)", error
    )
    if not found:
        raise ValueError(error)
    return float(found[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[found[2]] - RESERVED


def compiled(case: Case) -> dict[str, Any]:
    """Bytes on each device by kind, and whether they fit."""
    config = config_of(case)
    chip = chip_of(case.topology)
    program = make_program(config, OPTIMIZERS[case.optimizer].name)
    state = program.abstract_state()
    row: dict[str, Any] = {
        **case._asdict(),
        "context": config.architecture.context,
        "parameters": on_each(state.params),
        "state": on_each(state.opt_state),
        "memory": chip.memory,
    }
    arguments = row["parameters"] + row["state"]
    if arguments > chip.memory:  # no need to compile
        return {**row, "temporaries": None, "total": arguments, "fits": False, "seconds": None}
    windows = jax.ShapeDtypeStruct(
        (config.batch_size, config.architecture.context + 1), jnp.int32,
        sharding=NamedSharding(config.devices.make_mesh(), P(BATCH_AXES)),
    )  # fmt: skip
    step = jax.jit(program.step, donate_argnums=0, out_shardings=(program.shardings, None))
    is_tpu = not case.topology.startswith("h100")
    options = {"exec_time_optimization_effort": case.effort} if is_tpu and case.effort else {}
    start = time.perf_counter()
    try:
        memory = step.lower(state, windows).compile(compiler_options=options).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        total, compiles = used(str(error)), False
    else:
        compiles = True
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return {
        **row,
        "temporaries": total - arguments,
        "total": total,
        # A TPU's compiler refuses what does not fit; its total includes arrays kept on the chip.
        "fits": compiles and (is_tpu or total <= chip.memory),
        "seconds": time.perf_counter() - start,
    }


def largest(total: Callable[[int], float], limit: float) -> int:
    """The largest number for which the increasing function `total` is within the limit. `total` is
    nearly linear, so a few guesses along the line are enough."""
    tried: dict[int, float] = {0: -math.inf}
    low, high, guess = 0, math.inf, 1
    while high - low > 1:
        tried[guess] = total(guess)
        low, high = (guess, high) if tried[guess] <= limit else (low, guess)
        last = [n for n in tried if n][-2:]
        step = (tried[last[-1]] - tried[last[0]]) / (last[-1] - last[0] or 1)
        line = last[-1] + (limit - tried[last[-1]]) // step if step > 0 else 2 * low
        guess = int(min(max(line, low + 1), high - 1, 16 * low + 1))
    return low


def searched(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """The largest batch, and the longest context at this batch."""
    total = lambda batch: compiled(case._replace(batch=batch))["total"]
    batch = largest(total, row["memory"])
    context = row["context"]
    fits = lambda context: compiled(case._replace(context=context))["fits"]
    if row["fits"]:
        while fits(2 * context):
            context *= 2
    else:
        while context > 64 and not fits(context := context // 2):
            pass
    return {"largest_batch": batch, "longest_context": context}


def gb(name: str) -> Callable[[Any], str]:
    return lambda row: "" if row[name] is None else f"{row[name] / 1e9:.2f}"


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "topology": lambda row: row["topology"],
    "tokens": lambda row: f"{row['batch']} x {row['context']:,}",
    "optimizer": lambda row: row["optimizer"],
    "parameters": gb("parameters"),
    "state": gb("state"),
    "temporaries": gb("temporaries"),
    "total": lambda row: ("over " if row["temporaries"] is None else "") + gb("total")(row),
    "of": gb("memory"),
    "fits": lambda row: "yes" if row["fits"] else "**no**",
    "largest batch": lambda row: str(row.get("largest_batch", "")),
    "longest context": lambda row: (
        f"{row['longest_context']:,}" if "longest_context" in row else ""
    ),
    "effort": lambda row: "" if row["topology"].startswith("h100") else f"{row['effort']:g}",
    "compile s": lambda row: "" if row["seconds"] is None else f"{row['seconds']:.0f}",
}
FACTS = (
    "Compiled for each topology, and not run: nothing here is measured. The training step of the "
    "example: layers scanned and computed again in the backward pass, computed in bfloat16 over "
    "float32 parameters, or bfloat16 ones rounded at random where it says so, FSDP over all "
    "devices, attention as XLA makes it (scores in memory). GB (10^9 "
    "bytes) on each device: parameters and optimizer state from their shapes and shardings, the "
    "total from the compiler, temporaries (gradients and activations) what is left. Memory is what "
    "a TPU's compiler gives a program, and 80 GB on an H100. A TPU's compiler refuses what does "
    "not fit; what it keeps on the chip (up to 128 MiB on a v5e) is in its totals. Effort is XLA's "
    "exec_time_optimization_effort on TPUs: 0 is its ordinary way, -1 compiles in a fifth of the "
    'time and spends no memory on speed. "over": parameters and state alone are more.'
)


def main(options: Options) -> None:
    """Prints a row for each model, topology and optimizer."""
    known("model", options.model, MODELS)
    known("optimizers", options.optimizers, OPTIMIZERS)
    for topology in options.topology:
        chip_of(topology)
    check_counts({"batch": options.batch, "context": options.context or 1})
    facts = versions()
    title = f"{FACTS} JAX {facts['jax']}, libtpu {facts['libtpu']}."
    console = Console(width=200)
    key = lambda row: json.dumps([row[name] for name in Case._fields])
    asked = []
    for model, topology, optimizer in itertools.product(
        options.model, options.topology, options.optimizers
    ):
        case = Case(model, topology, optimizer, options.context, options.batch, options.effort)
        with console.status(f"{model}, {topology}, {optimizer}"):
            row = compiled(case)
            if options.search:
                row |= searched(case, row)
        asked.append(row)
        # Read again for each row: another process may have added some.
        before = rows_of_before(options.output / "fits.json", facts)
        rows = [old for old in before if key(old) != key(row)] + [row]
        rows.sort(key=lambda row: (list(MODELS).index(row["model"]), row["context"]))
        content = {"machine": facts, "rows": rows}
        command = "python -m benchmarks.memory.fits --model ... --topology ..."
        write_rows(options.output, "fits", "What fits", command, title, COLUMNS, content)
    console.print(comparison_table("GB on each device, compiled and not run", COLUMNS, asked))


if __name__ == "__main__":
    end_on_interrupt()
    without_devices()
    parsed = tyro.cli(Options, prog="python -m benchmarks.memory.fits", description=Options.__doc__)
    sys.exit(exit_status(lambda: main(parsed)))
