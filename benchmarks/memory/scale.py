"""What the update costs on many devices, compiled and not run: no array is allocated.

python -m benchmarks.memory.scale

Compiles the optimizer's update and its addition to the parameters, for Llama models sharded over a
mesh of fsdp x tensor, on TPUs that need not be present (benchmarks/chips.py says how to install the
compiler). Reports the bytes on each device and the collectives that the compiler inserts, for AdamW
and Adam-mini. The state's shardings come from `opt_state_shardings`; in the last two rows of a case
they come from NNX's and Linen's own functions. A collective with a result as large as a device's
part of a matrix is an error: it would gather a parameter, a gradient or a moment. Writes
docs/results/scale.json and scale.md.
"""

import dataclasses
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import linen, nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console

from benchmarks.chips import chip_of, devices, versions, without_devices
from benchmarks.results import Columns, write_rows
from examples.common.cli import ConfigError, comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.mesh import param_shardings
from examples.common.optimizers import ParameterConfig, decayed
from examples.llama.model import CONFIGS, Llama, LlamaConfig
from examples.llama.train import Config
from optax_adam_mini import (
    adam_mini,
    infer_block_specs,
    opt_state_shardings,
    stochastic_rounding,
)

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
CASES = (
    "llama2-7b:16x1@v5e:4x4", "llama2-7b:8x2@v5e:4x4", "llama2-7b:8x1@v5p:2x2x2",
    "llama3-70b:16x4@v5p:4x4x4", "llama3-405b:64x8@v5p:8x8x8",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile the update of Llama models for many devices, with AdamW and with Adam-mini."""

    cases: tuple[str, ...] = CASES
    """MODEL:FSDPxTENSOR@TOPOLOGY, such as llama2-7b:8x2@v5e:4x4; without @TOPOLOGY, the case is
    compiled for as many CPU devices."""
    fsdp: Literal["outputs", "width"] = "outputs"
    """Which axis of the layers' first matrices fsdp shards: their outputs, which separate blocks,
    as in the example; or the model's width, which makes more sums over devices."""
    output: Path = Path("docs/results")
    """Folder for scale.json and scale.md."""


class Case(NamedTuple):
    """A model on a mesh."""

    model: str
    fsdp: int
    tensor: int
    topology: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The case that MODEL:FSDPxTENSOR@TOPOLOGY names."""
        found = re.fullmatch(r"([^:]+):(\d+)x(\d+)(?:@(.+))?", text)
        if not found or found[1] not in MODELS:
            raise ConfigError(
                f"--cases got {text}, but a case is MODEL:FSDPxTENSOR@TOPOLOGY, such as "
                f"llama2-7b:8x2@v5e:4x4, with a model of {', '.join(MODELS)}."
            )
        if found[4]:
            chip_of(found[4])
        return cls(found[1], int(found[2]), int(found[3]), found[4])

    @property
    def devices(self) -> list[Any]:
        """As many as the mesh has."""
        found = jax.devices() if self.topology is None else devices(self.topology)
        if len(found) < self.fsdp * self.tensor:
            raise ConfigError(f"{self.topology} has {len(found)} devices, too few for {self}.")
        return found[: self.fsdp * self.tensor]


class Compiled(NamedTuple):
    """The facts about a compiled update."""

    param_bytes: int
    """Bytes of all parameters, over all devices."""
    state_bytes: int
    """Bytes of the optimizer state on each device."""
    temporary_bytes: int
    collectives: dict[str, tuple[int, int]]
    """By name: how many, and the bytes of their results on each device."""
    largest: int
    """Bytes of the largest array among these results."""
    smallest_matrix: int
    """Bytes of a device's smallest part of a matrix, in float32, like sums over it."""
    seconds: float
    """The time to trace and compile."""
    program: Any
    """The result of `jax.stages.Lowered.compile`."""


def results(hlo: str) -> list[tuple[str, list[int]]]:
    """The collectives in a compiled program: the name of each, and the bytes of its results."""
    found: list[tuple[str, list[int]]] = []
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
    for result, name in re.findall(rf"= (.+?) ({names})(?:-start)?\(", hlo):
        sizes: list[int] = []
        for dtype, bits, dims in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", result):
            numbers = math.prod(int(n) for n in dims.split(",") if n)
            sizes.append(numbers * (1 if dtype == "pred" else int(bits) // 8))
        found.append((name, sizes))
    return found


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """By name: how many, and the bytes of their results."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name, sizes in results(hlo):
        count[name] += 1
        size[name] += sum(sizes)
    return {name: (count[name], size[name]) for name in count}


def abstract_llama(config: LlamaConfig) -> tuple[Any, dict[str, Any]]:
    """The parameters' shapes, and the block specs by `v`."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    logits = lambda p, x: nnx.merge(graph, p)(x)
    return params, {v: infer_block_specs(logits, params, tokens, v=v) for v in ("mean", "outer")}


def by_nnx(params: Any, of_params: Any) -> Any:
    """The parameters in NNX variables that name mesh axes, as a model's initializers do."""
    named = jax.tree.map(lambda leaf: leaf, params)
    for (_, variable), sharding in zip(
        nnx.to_flat_state(named), jax.tree.leaves(of_params), strict=True
    ):
        variable.set_metadata("out_sharding", tuple(sharding.spec))
    return named


def by_linen(params: Any, of_params: Any) -> Any:
    """The parameters in the boxes of `nn.with_partitioning`."""
    boxed = lambda leaf, sharding: linen.Partitioned(leaf, names=tuple(sharding.spec))
    return jax.tree.map(boxed, nnx.to_pure_dict(params), nnx.to_pure_dict(of_params))


def compile_update(
    make: Callable[[Any], Any],
    params: Any,
    specs: Any,
    mesh: jax.sharding.Mesh,
    fsdp: str,
    placed_by: Literal["opt_state_shardings", "NNX", "Linen"] = "opt_state_shardings",
    while_updating: Callable[[Any], Any] | None = None,
) -> Compiled:
    """Compiles the update of `make(specs)` and its addition, with parameters and state donated.
    `while_updating` takes the parameters' shardings and returns others, which the state then has,
    and gradients and updates during the update."""
    of_params = param_shardings(params, RULES[fsdp], mesh)
    if placed_by != "opt_state_shardings":
        params = (by_nnx if placed_by == "NNX" else by_linen)(params, of_params)
        like = jax.tree.structure(params)
        specs = jax.tree.unflatten(like, jax.tree.leaves(specs))
    tx = make(specs)
    state = jax.eval_shape(tx.init, params)
    if placed_by == "opt_state_shardings":
        of_state = opt_state_shardings(
            tx, params, while_updating(of_params) if while_updating else of_params
        )
    elif placed_by == "NNX":
        of_params, of_state = (nnx.get_named_sharding(tree, mesh) for tree in (params, state))
    else:
        of_params, of_state = (linen.get_sharding(tree, mesh) for tree in (params, state))

    def moved(tree: Any) -> Any:
        if while_updating is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, while_updating(of_params))

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(moved(grads), state, params)
        updates = moved(updates)
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
    hlo = compiled.as_text() or ""
    part = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    is_matrix = jax.tree.leaves(decayed(params))
    matrices = [
        4 * math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding, matrix in zip(
            jax.tree.leaves(params), jax.tree.leaves(of_params), is_matrix, strict=True
        )
        if matrix
    ]
    state_bytes = sum(
        part(leaf, sharding)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(of_state), strict=True)
    )
    return Compiled(
        param_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        state_bytes=state_bytes,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        collectives=collectives(hlo),
        largest=max((size for _, sizes in results(hlo) for size in sizes), default=0),
        smallest_matrix=min(matrices),
        seconds=seconds,
        program=compiled,
    )


def measure(case: Case, fsdp: str) -> dict[str, Compiled]:
    """The compiled updates of AdamW and of Adam-mini's variants."""
    mesh = jax.make_mesh(
        (case.fsdp, case.tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2,
        devices=case.devices,
    )  # fmt: skip
    params, specs = abstract_llama(MODELS[case.model])
    adamw = lambda _: optax.adamw(3e-4, weight_decay=0.1)
    mini = lambda specs: adam_mini(3e-4, weight_decay=0.1, block_specs=specs)
    mini_int8 = lambda specs: adam_mini(
        3e-4, weight_decay=0.1, block_specs=specs, mu_dtype=jnp.int8
    )
    rounded = lambda specs: stochastic_rounding(mini_int8(specs))
    narrow = jax.eval_shape(ParameterConfig("bfloat16").cast, params)
    mean, outer = specs["mean"], specs["outer"]
    return {
        "AdamW": compile_update(adamw, params, None, mesh, fsdp),
        "Adam-mini": compile_update(mini, params, mean, mesh, fsdp),
        "outer": compile_update(mini, params, outer, mesh, fsdp),
        "Adam-mini, 8 bits": compile_update(mini_int8, params, mean, mesh, fsdp),
        "outer, 8 bits": compile_update(mini_int8, params, outer, mesh, fsdp),
        "outer, 8 bits; bfloat16": compile_update(rounded, narrow, outer, mesh, fsdp),
        "outer, 8 bits; by NNX": compile_update(mini_int8, params, outer, mesh, fsdp, "NNX"),
        "outer, 8 bits; by Linen": compile_update(mini_int8, params, outer, mesh, fsdp, "Linen"),
    }


def row_of(case: Case, optimizer: str, found: dict[str, Compiled]) -> dict[str, Any]:
    """A row of the table."""
    compiled = found[optimizer]
    if compiled.largest >= compiled.smallest_matrix:
        raise RuntimeError(
            f"{case}, {optimizer}: a collective's result has {compiled.largest:,} bytes, the "
            f"smallest part of a matrix {compiled.smallest_matrix:,}: is one gathered?"
        )
    size = sum(size for _, size in compiled.collectives.values())
    return {
        **case._asdict(),
        "optimizer": optimizer,
        # Gradients have the size and the shardings of the parameters.
        "gb": (2 * compiled.param_bytes / case.fsdp / case.tensor + compiled.state_bytes) / 1e9,
        "state_share": compiled.state_bytes / found["AdamW"].state_bytes,
        "temporary_mb": compiled.temporary_bytes / 1e6,
        "collectives": {name: count for name, (count, _) in sorted(compiled.collectives.items())},
        "collective_share": size / compiled.param_bytes,
        "largest_mb": compiled.largest / 1e6,
        "smallest_matrix_mb": compiled.smallest_matrix / 1e6,
        "seconds": compiled.seconds,
    }


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "devices": lambda row: row["topology"] or "CPU",
    "fsdp x tensor": lambda row: f"{row['fsdp']} x {row['tensor']}",
    "optimizer": lambda row: row["optimizer"],
    "GB a device": lambda row: f"{row['gb']:.2f}",
    "state, of AdamW's": lambda row: f"{row['state_share']:.2%}",
    "temporary MB": lambda row: f"{row['temporary_mb']:,.1f}",
    "collectives": lambda row: ", ".join(f"{n} {name}" for name, n in row["collectives"].items()),
    "their bytes, of the parameters'": lambda row: f"{row['collective_share']:.1e}",
    "largest array of them, MB": lambda row: f"{row['largest_mb']:.2f}",
    "least part of a matrix, MB": lambda row: f"{row['smallest_matrix_mb']:.1f}",
    "compile s": lambda row: f"{row['seconds']:.1f}",
}


def main(options: Options) -> None:
    """Prints a row for each case and optimizer."""
    cases = [Case.parse(text) for text in options.cases]
    of_cpu = [case.fsdp * case.tensor for case in cases if case.topology is None]
    jax.config.update("jax_num_cpu_devices", max(of_cpu, default=1))
    title = (
        "The update, and adding it, compiled for each topology and not run; float32, or bfloat16 "
        f"rounded at random; fsdp over {options.fsdp}. GB are of parameters, gradients and "
        "state. No collective has a result as large as a device's part of a matrix: no parameter, "
        "gradient or moment is gathered."
    )
    console = Console(width=200)
    rows: list[dict[str, Any]] = []
    for case in cases:
        with console.status(str(case)):
            found = measure(case, options.fsdp)
        rows += [row_of(case, optimizer, found) for optimizer in found]
    console.print(comparison_table(title, COLUMNS, rows))
    content = {"machine": versions(), "rows": rows}
    heading, command = "The update on many devices", "python -m benchmarks.memory.scale"
    write_rows(options.output, "scale", heading, command, title, COLUMNS, content)


if __name__ == "__main__":
    end_on_interrupt()
    without_devices()
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.memory.scale", description=Options.__doc__
    )
    sys.exit(exit_status(lambda: main(parsed)))
