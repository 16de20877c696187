"""The largest batch that fits beside an optimizer's state, from whole training steps that are
compiled and not run.

python -m benchmarks.memory.largest_batch

Loss, gradient, clipping and update of a Llama model under FSDP: its bytes on each device are what
the compiler says (`memory_analysis`): arguments, results that are not put in their place, and
temporaries. The compiler is the CPU's, whose attention holds its scores in memory, and which
schedules otherwise than one for an accelerator: the state's bytes are exact, those of the
activations an estimate.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks.speed.train_step import step_bytes
from examples.common.cli import ConfigError, check_counts, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.mesh import BATCH_AXES, MeshConfig
from examples.common.text import TextConfig
from examples.llama.model import CONFIGS
from examples.llama.train import Config, make_program

NAMES = {"adamw": "AdamW", "adam_mini": "Adam-mini"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile training steps of ever more sequences and find the most that fit."""

    model: str = "llama2-7b"
    """As in python -m examples.llama; 32,000 tokens."""
    devices: int = 2
    """FSDP over so many devices."""
    memory_gb: float = 80.0
    """Memory of each device, in 10^9 bytes."""
    context: int | None = None
    """Tokens a sequence, instead of the model's."""
    dtype: str = "bfloat16"
    """Type of the computation; parameters, gradients and state are float32."""


def bytes_with(options: Options, optimizer: str, batch: int) -> int:
    """The bytes on each device of a step of `batch` sequences for each."""
    config = Config(
        model=options.model,
        context=options.context,
        dtype=options.dtype,
        scan=True,
        remat=True,
        batch_size=batch * options.devices,
        data=TextConfig(tokenizer="bpe", vocab_size=32000),
        devices=MeshConfig(mesh=f"fsdp={options.devices}"),
    )
    program = make_program(config, optimizer)
    windows = jax.ShapeDtypeStruct(
        (config.batch_size, config.architecture.context + 1),
        jnp.int32,
        sharding=NamedSharding(config.devices.make_mesh(), P(BATCH_AXES)),
    )
    step = jax.jit(program.step, donate_argnums=0, out_shardings=(program.shardings, None))
    return step_bytes(step.lower(program.abstract_state(), windows).compile())


def largest_batch(fits: Any) -> int:
    """The most sequences for which `fits` is true; it is for all that are fewer."""
    upper = 1
    while fits(upper):
        upper *= 2
    lower = upper // 2
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (middle, upper) if fits(middle) else (lower, middle)
    return lower


def main(options: Options) -> None:
    """Prints a row for each optimizer."""
    if options.model not in CONFIGS:
        raise ConfigError(f"--model is {options.model}, but must be of {', '.join(CONFIGS)}.")
    check_counts({"devices": options.devices})
    jax.config.update("jax_num_cpu_devices", options.devices)
    table = Table(
        title=f"{options.model} on {options.devices} devices of {options.memory_gb:g} GB, "
        f"{options.dtype}; compiled, not run"
    )
    for heading in ("optimizer", "sequences a device", "GB a device", "GB with one more"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for optimizer, name in NAMES.items():
        size: dict[int, int] = {}

        def fits(batch: int, optimizer: str = optimizer, size: dict[int, int] = size) -> bool:
            size[batch] = bytes_with(options, optimizer, batch)
            return size[batch] <= options.memory_gb * 1e9

        most = largest_batch(fits)
        used = f"{size[most] / 1e9:.1f}" if most else ""
        table.add_row(name, str(most), used, f"{size[most + 1] / 1e9:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.memory.largest_batch", description=Options.__doc__
    )
    end_on_interrupt()
    sys.exit(exit_status(lambda: main(parsed)))
