"""How much device memory the update reads and writes, by the compilers of a TPU and an H100.

python3 -m venv tpu && tpu/bin/pip install --editable '.[examples]' 'jax[tpu]'
tpu/bin/python -m benchmarks.speed.traffic

python3 -m venv gpu && gpu/bin/pip install --editable '.[examples]'
gpu/bin/pip install --no-deps jax-cuda12-{plugin,pjrt} nvidia-cuda-{nvcc,runtime}-cu12
gpu/bin/python -m benchmarks.speed.traffic --chip h100

No device is needed: XLA compiles for a topology. Counted are the operands and results of each
kernel of the compiled step (the update, and adding it to the parameters, with parameters and state
donated) that are in device memory, as large as their layout makes them; a copy into memory on the
chip counts what it reads. Kernels' own temporaries on the chip are free. An array is one of the
parameters' size.
"""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from benchmarks.speed.update import TREES, Tree
from examples.common.cli import exit_status
from examples.common.interrupts import end_on_interrupt
from optax_adam_mini import adam_mini, per_element

# Of an H100 SXM, from its data sheet and XLA's own description of it: what the compiler asks for.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CASES: dict[str, Callable[[], Tree]] = {
    **{name: tree for name, tree in TREES.items() if name != "ViT-B/16"},
    "per coordinate, 4096 x 11008": lambda: TREES["neurons, 4096 x 11008"]()._replace(
        specs={"kernel": per_element()}, outer={"kernel": per_element()}
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Count the bytes that the update moves, compiled for an accelerator that is not there."""

    chip: Literal["v5e", "v5p", "v6e", "h100"] = "v5e"
    """A TPU or a GPU."""
    trees: tuple[str, ...] = tuple(CASES)
    """Names of trees and layouts."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of parameters and first moment."""


class Array(NamedTuple):
    """An array in a compiled program."""

    size: int
    """Bytes, with the padding of its tiles."""
    on_chip: bool


BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16}
_TYPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_STEP = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)")
NO_WORK = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done",
    "after-all", "opt-barrier",
}  # fmt: skip


def arrays(text: str) -> list[Array]:
    """Those that a type in a compiled program names."""
    found: list[Array] = []
    for dtype, dims, order, layout in _TYPE.findall(text):
        bits = BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])
        shape = [int(n) for n in dims.split(",") if n]
        tile = re.match(r"T\(([\d,]+)\)", layout)
        if tile and shape:
            sizes = [int(n) for n in tile[1].split(",")]
            minor_first = [int(n) for n in order.split(",")]
            for axis, size in zip(minor_first, reversed(sizes), strict=False):
                shape[axis] = -(-shape[axis] // size) * size
        memory = re.search(r"S\((\d+)\)", layout)
        on_chip = memory is not None and memory[1] != "0"
        found.append(Array(math.prod(shape) * bits // 8, on_chip))
    return found


def moved(hlo: str) -> int:
    """The bytes of device memory that the kernels of the entry computation read and write."""
    known: dict[str, list[Array]] = {}
    total = 0
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        step = _STEP.match(line)
        if not step:
            continue
        name, result, opcode, operands = step.groups()
        known[name] = arrays(result)
        if opcode in NO_WORK:
            continue
        if opcode in ("while", "conditional", "call"):
            raise ValueError(f"the program has a {opcode}, whose kernels are not counted")
        touched = list(known[name])
        if not opcode.endswith("-start"):  # its result has what it reads
            for operand in dict.fromkeys(re.findall(r"%([\w.-]+)", operands)):
                touched += known.get(operand, [])
        total += sum(array.size for array in touched if not array.on_chip)
    return total


def device(chip: str) -> Any:
    """One device of the chip's topology."""
    if chip == "h100":
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology="1x1x1", target_config=H100
        ).devices[0]
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip]).devices[0]


def compiled(tx: Any, params: Any, where: Any) -> Any:
    """The step, for a device that need not be there."""
    sharding = jax.sharding.SingleDeviceSharding(where)
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(placed, params)
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def main(options: Options) -> None:
    """Prints a row for each tree and dtype."""
    where = device(options.chip)
    table = Table(
        title=f"Arrays of the parameters' size moved by a step, compiled for {options.chip}"
    )
    table.add_column("tree")
    table.add_column("dtype")
    for heading in ("AdamW", "SGD, momentum", "one number a block", "of AdamW's",
                    "a row and a column", "of AdamW's", "temporaries"):  # fmt: skip
        table.add_column(heading, justify="right")
    for name in options.trees:
        tree = CASES[name]()
        for dtype in options.dtypes:
            params = jax.tree.map(lambda p, d=dtype: jax.ShapeDtypeStruct(p.shape, d), tree.params)
            size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
            programs = [
                compiled(tx, params, where)
                for tx in (
                    optax.adamw(1e-4, mu_dtype=dtype),
                    optax.sgd(1e-4, 0.9),
                    adam_mini(1e-4, mu_dtype=dtype, block_specs=tree.specs),
                    adam_mini(1e-4, mu_dtype=dtype, block_specs=tree.outer),
                )
            ]
            adamw, sgd, mean, outer = (moved(p.as_text()) / size for p in programs)
            temporary = programs[-1].memory_analysis().temp_size_in_bytes / size
            table.add_row(
                name, dtype, f"{adamw:.2f}", f"{sgd:.2f}", f"{mean:.2f}", f"{mean / adamw:.2f}",
                f"{outer:.2f}", f"{outer / adamw:.2f}", f"{temporary:.2%}",
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    end_on_interrupt()
    # What the compilers look for when they are loaded: a machine that has such a device.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        JAX_PLATFORMS="cpu",
    )
    jax.config.update("jax_platforms", "cpu")
    parsed = tyro.cli(Options, prog="python -m benchmarks.speed.traffic", description=__doc__)
    sys.exit(exit_status(lambda: main(parsed)))
