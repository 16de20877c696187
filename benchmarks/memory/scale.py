"""What the update costs on many devices, compiled and not run: no array is allocated.

python -m benchmarks.memory.scale

The optimizer's update, and adding it to the parameters, of Llama models sharded over a mesh of
fsdp x tensor, compiled for as many (CPU) devices: bytes on each device, and the collectives that
the compiler put in, AdamW beside Adam-mini. With the 512 devices of the default cases every sum is
a plain reduction, as it is on accelerators.
"""

import dataclasses
import math
import re
import sys
import time
from collections import Counter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from examples.common.cli import ConfigError, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.mesh import param_shardings
from examples.llama.model import CONFIGS, Llama, LlamaConfig
from examples.llama.train import Config
from optax_adam_mini import adam_mini, infer_block_specs, opt_state_shardings

LARGE = {
    # The Llama 3 Herd of Models (arXiv 2407.21783), table 3.
    "llama3-70b": LlamaConfig(
        vocab_size=128256, context=8192, layers=80, heads=64, kv_heads=8, width=8192,
        mlp_width=28672, rotary_base=500_000.0,
    ),
    "llama3-405b": LlamaConfig(
        vocab_size=128256, context=8192, layers=126, heads=128, kv_heads=8, width=16384,
        mlp_width=53248, rotary_base=500_000.0,
    ),
}  # fmt: skip
MODELS = {
    name: dataclasses.replace(config, scan=True) for name, config in {**CONFIGS, **LARGE}.items()
}
RULES = {
    "outputs": Config.shardings,
    "width": (("(query|key|value|gate|up)/kernel", P("fsdp", "tensor")), *Config.shardings),
}
CASES = ("llama2-7b:8x1", "llama2-7b:4x2", "llama2-13b:8x2", "llama3-70b:8x8", "llama3-405b:64x8")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile the update of Llama models for many devices, AdamW beside Adam-mini."""

    cases: tuple[str, ...] = CASES
    """MODEL:FSDPxTENSOR, such as llama2-7b:4x2 for 8 devices."""
    fsdp: Literal["outputs", "width"] = "outputs"
    """Which axis of the layers' first matrices fsdp shards: their outputs, as the example does,
    which separate blocks, or the model's width, so that there is more to sum over devices."""


class Case(NamedTuple):
    """A model on a mesh."""

    model: str
    fsdp: int
    tensor: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """From MODEL:FSDPxTENSOR."""
        found = re.fullmatch(r"(\S+):(\d+)x(\d+)", text)
        if not found or found[1] not in MODELS:
            raise ConfigError(
                f"--cases got {text}, but a case is MODEL:FSDPxTENSOR, such as llama2-7b:4x2, with "
                f"a model of {', '.join(MODELS)}."
            )
        return cls(found[1], int(found[2]), int(found[3]))


class Compiled(NamedTuple):
    """What is known of a compiled update."""

    param_bytes: int
    """Of all parameters, over all devices."""
    state_bytes: int
    """Of the optimizer's state, on each device."""
    temporary_bytes: int
    collectives: dict[str, tuple[int, int]]
    """By name: how many, and the bytes of their results on each device."""
    seconds: float
    """To trace and compile."""


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """The collectives in a compiled program, by name: how many, and the bytes of their results."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
    for result, name in re.findall(rf"= (.+?) ({names})(?:-start)?\(", hlo):
        count[name] += 1
        for dtype, bits, dims in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", result):
            numbers = math.prod(int(n) for n in dims.split(",") if n)
            size[name] += numbers * (1 if dtype == "pred" else int(bits) // 8)
    return {name: (count[name], size[name]) for name in count}


def abstract_llama(config: LlamaConfig) -> tuple[Any, dict[str, Any]]:
    """The parameters' shapes, and Adam-mini's partitions by what is kept of each block."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    logits = lambda p, x: nnx.merge(graph, p)(x)
    return params, {v: infer_block_specs(logits, params, tokens, v=v) for v in ("mean", "outer")}


def compile_update(tx: Any, params: Any, mesh: jax.sharding.Mesh, fsdp: str) -> Compiled:
    """The update of `tx`, and adding it, with parameters and state donated."""
    of_params = param_shardings(params, RULES[fsdp], mesh)
    state = jax.eval_shape(tx.init, params)
    of_state = opt_state_shardings(tx, params, of_params)

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    compiled = (
        jax.jit(
            update,
            in_shardings=(of_params, of_state, of_params),
            out_shardings=(of_params, of_state),
            donate_argnums=(0, 1),
        )
        .lower(params, state, params)
        .compile()
    )
    seconds = time.perf_counter() - start
    state_bytes = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(of_state), strict=True)
    )
    return Compiled(
        param_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        state_bytes=state_bytes,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        collectives=collectives(compiled.as_text()),
        seconds=seconds,
    )


def measure(case: Case, fsdp: str) -> dict[str, Compiled]:
    """AdamW and Adam-mini."""
    devices = jax.devices()[: case.fsdp * case.tensor]
    mesh = jax.make_mesh(
        (case.fsdp, case.tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )  # fmt: skip
    params, specs = abstract_llama(MODELS[case.model])
    optimizers = {
        "AdamW": optax.adamw(3e-4, weight_decay=0.1),
        "Adam-mini": adam_mini(3e-4, weight_decay=0.1, block_specs=specs["mean"]),
        "outer": adam_mini(3e-4, weight_decay=0.1, block_specs=specs["outer"]),
    }
    return {name: compile_update(tx, params, mesh, fsdp) for name, tx in optimizers.items()}


def main(options: Options) -> None:
    """Prints a row for each case and optimizer."""
    cases = [Case.parse(text) for text in options.cases]
    jax.config.update("jax_num_cpu_devices", max(case.fsdp * case.tensor for case in cases))
    table = Table(
        title=f"The update, compiled for fsdp x tensor devices; float32; fsdp over {options.fsdp}"
    )
    table.add_column("model")
    table.add_column("devices")
    table.add_column("optimizer")
    for heading in ("GB a device", "of AdamW's", "temporary MB", "collectives",
                    "their bytes, of the parameters'", "compile s"):  # fmt: skip
        table.add_column(heading, justify="right")
    for case in cases:
        found = measure(case, options.fsdp)
        for name, row in found.items():
            share = sum(size for _, size in row.collectives.values()) / row.param_bytes
            counts = ", ".join(f"{n} {op}" for op, (n, _) in sorted(row.collectives.items()))
            # Parameters and gradients are as large as each other, and sharded alike.
            devices = case.fsdp * case.tensor
            table.add_row(
                case.model, f"{case.fsdp} x {case.tensor}", name,
                f"{(2 * row.param_bytes / devices + row.state_bytes) / 1e9:.2f}",
                f"{row.state_bytes / found['AdamW'].state_bytes:.2%}",
                f"{row.temporary_bytes / 1e6:,.1f}", counts or "none", f"{share:.1e}",
                f"{row.seconds:.1f}",
            )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.memory.scale", description=Options.__doc__
    )
    end_on_interrupt()
    sys.exit(exit_status(lambda: main(parsed)))
