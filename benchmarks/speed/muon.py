"""What Newton-Schulz costs, and what it gathers, according to compilers for a TPU and the H100.

python -m benchmarks.speed.muon

Compiles the update of AdamW, Adam-mini and Muon with Adam-mini, and its addition to the parameters,
for devices that need not be present (benchmarks/chips.py says how to install the compilers).
Reports FLOPs and bytes as the compiler counts them, FLOPs as a share of a training step (6 per
parameter and token), and the collectives that the compiler inserts. Without a GPU, the compiler for
GPUs counts nothing: FLOPs are then only those computed by hand, and bytes those that
benchmarks/speed/traffic.py finds. Nothing is run or allocated. Writes docs/results/muon_cost.json
and muon_cost.md; rows of other cases and optimizers stay as they are.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

from benchmarks.chips import devices, versions, without_devices
from benchmarks.memory.scale import MODELS, compile_update
from benchmarks.results import Columns, write_rows
from benchmarks.speed.traffic import traffic
from benchmarks.speed.update import known, rows_of_before
from examples.common.cli import comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.language import abstract_model
from examples.common.text import TextConfig
from examples.gpt2.train import Config
from examples.llama.model import Llama
from optax_adam_mini import adam_mini, infer_block_specs, infer_muon_dimension_numbers, muon_mini

TOKENS = 2**19
NS_STEPS = 5


class Model(NamedTuple):
    """Abstract parameters, with the block specs and matrices that are inferred from the model."""

    params: Any
    specs: Any
    matrices: Any


def read_off(graph: Any, params: Any, context: int) -> Model:
    tokens = jax.ShapeDtypeStruct((1, context), jnp.int32)
    logits = lambda p, x: nnx.merge(graph, p)(x)
    return Model(
        params,
        infer_block_specs(logits, params, tokens, v="outer"),
        infer_muon_dimension_numbers(logits, params, tokens),
    )


def gpt2() -> Model:
    data = TextConfig(tokenizer="bpe", vocab_size=50257)
    config = Config(model="gpt2", data=data, scan=True)
    return read_off(*abstract_model(config), config.architecture.context)


def llama() -> Model:
    config = MODELS["llama2-7b"]
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return read_off(*nnx.split(model), config.context)


class Case(NamedTuple):
    """A model, and the devices that its update is compiled for."""

    model: Callable[[], Model]
    topology: str
    devices: int = 1
    """Number of devices of the topology, all along fsdp."""


# Llama's update does not fit on one v5e, nor in float32 on one H100; the compiler for GPUs compiles
# it anyway.
CASES = {
    "GPT-2 124M, v5e": Case(gpt2, "v5e:2x2"),
    "GPT-2 124M, H100": Case(gpt2, "h100:1"),
    "Llama-2-7B, H100": Case(llama, "h100:1"),
    "Llama-2-7B, 16 v5e": Case(llama, "v5e:4x4", 16),
}


def muon(model: Model, mu_dtype: Any = None) -> optax.GradientTransformation:
    return muon_mini(
        2e-2,
        ns_steps=NS_STEPS,
        adam_learning_rate=3e-4,
        weight_decay=0.1,
        mu_dtype=mu_dtype,
        muon_weight_dimension_numbers=model.matrices,
        block_specs=model.specs,
    )


# On a mesh, momentum is sharded along the layers of a stack, and gradients and updates are moved
# there and back, so that each device has whole matrices.
LAYERS_APART = "Muon and Adam-mini, layers apart"
OPTIMIZERS: dict[str, Callable[[Model], optax.GradientTransformation]] = {
    "AdamW": lambda _: optax.adamw(3e-4, weight_decay=0.1),
    "Adam-mini": lambda model: adam_mini(3e-4, weight_decay=0.1, block_specs=model.specs),
    "Muon and Adam-mini": muon,
    "Muon and Adam-mini, 8 bits": lambda model: muon(model, jnp.int8),
    LAYERS_APART: muon,
}
OF_MUON = list(OPTIMIZERS)[2:]


@dataclasses.dataclass(frozen=True)
class Options:
    """Count what Muon's update costs, compiled for accelerators that need not be present."""

    cases: tuple[str, ...] = ()
    """Cases, by their names in the table; all by default."""
    optimizers: tuple[str, ...] = ()
    """Optimizers, by their names in the table; all by default."""
    output: Path = Path("docs/results")
    """Folder for muon_cost.json and muon_cost.md."""


def newton_schulz_flops(model: Model) -> int:
    """FLOPs by hand: a step on n x m, n <= m, multiplies n x m x n, n x n x n and n x n x m."""
    leaves, treedef = jax.tree.flatten(model.params)
    total = 0
    for p, numbers in zip(leaves, treedef.flatten_up_to(model.matrices), strict=True):
        if numbers is not None:
            n, m = sorted(math.prod(p.shape[a] for a in np.atleast_1d(axes)) for axes in numbers)
            total += NS_STEPS * (p.size // (n * m)) * 2 * (2 * n * n * m + n**3)
    return total


def layers_apart(model: Model, of_params: Any) -> Any:
    """The shardings of the parameters, except that stacks of matrices are sharded by layer."""
    treedef = jax.tree.structure(model.params)
    apart = [
        sharding if numbers is None else NamedSharding(sharding.mesh, PartitionSpec("fsdp"))
        for numbers, sharding in zip(
            treedef.flatten_up_to(model.matrices), jax.tree.leaves(of_params), strict=True
        )
    ]
    return jax.tree.unflatten(treedef, apart)


def measure(case: Case, model: Model, optimizer: str) -> dict[str, Any]:
    """The facts about a compiled update; FLOPs and bytes are summed over devices."""
    mesh = jax.make_mesh(
        (case.devices, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2,
        devices=devices(case.topology)[: case.devices],
    )  # fmt: skip
    found = compile_update(
        lambda _: OPTIMIZERS[optimizer](model),
        model.params,
        None,
        mesh,
        "outputs",
        while_updating=functools.partial(layers_apart, model)
        if optimizer == LAYERS_APART
        else None,
    )
    cost = found.program.cost_analysis()
    by_hand = newton_schulz_flops(model) if optimizer in OF_MUON else 0
    moved = cost["bytes accessed"] if cost else traffic(found.program.as_text()).moved
    flops = case.devices * cost["flops"] if cost else None
    parameters = sum(p.size for p in jax.tree.leaves(model.params))
    return {
        "flops": flops,
        "newton_schulz_flops": by_hand,
        "step_share": (by_hand if flops is None else flops) / (6 * parameters * TOKENS),
        "arrays": case.devices * moved / found.param_bytes,
        "temporary_gb": found.temporary_bytes / 1e9,
        "collectives": found.collectives,
        "largest_mb": found.largest / 1e6,
        "seconds": found.seconds,
    }


COLUMNS: Columns = {
    "case": lambda row: row["case"],
    "optimizer": lambda row: row["optimizer"],
    "FLOPs": lambda row: "" if row["flops"] is None else f"{row['flops']:.3g}",
    "of Newton-Schulz, by hand": lambda row: f"{row['newton_schulz_flops']:.3g}",
    "of a training step": lambda row: f"{row['step_share']:.2%}",
    "arrays of the parameters' size moved": lambda row: f"{row['arrays']:.1f}",
    "temporary GB a device": lambda row: f"{row['temporary_gb']:.2f}",
    "collectives": lambda row: (
        ", ".join(f"{count} {name}" for name, (count, _) in sorted(row["collectives"].items()))
        or "none"
    ),
    "their GB on a device": lambda row: (
        f"{sum(size for _, size in row['collectives'].values()) / 1e9:.2f}"
    ),
    "largest array of them, MB": lambda row: f"{row['largest_mb']:,.1f}",
    "compile s": lambda row: f"{row['seconds']:.0f}",
}


def main(options: Options) -> None:
    """Prints a row for each case and optimizer."""
    cases = known("cases", options.cases, CASES)
    optimizers = known("optimizers", options.optimizers, OPTIMIZERS)
    facts = versions()
    title = (
        "The update, and adding it, in float32 with layers stacked, compiled, not run; FLOPs and "
        "arrays moved are of all devices together. A training step is one of 2^19 tokens, with 6 "
        "FLOPs for each parameter and token. For the H100 the compiler counts nothing: the FLOPs "
        "of Newton-Schulz by hand stand for all, and arrays moved are those in device memory, not "
        "the compiler's bytes accessed."
    )
    rows: list[dict[str, Any]] = []
    console = Console(width=200)
    key = lambda row: (row["case"], row["optimizer"])
    order = lambda row: (list(CASES).index(row["case"]), list(OPTIMIZERS).index(row["optimizer"]))
    for name in cases:
        model = CASES[name].model()
        for optimizer in optimizers:
            if optimizer == LAYERS_APART and CASES[name].devices == 1:
                continue
            with console.status(f"{name}, {optimizer}"):
                found = {"case": name, "optimizer": optimizer}
                found |= measure(CASES[name], model, optimizer)
            # Read again for each row: another process may have added some.
            before = rows_of_before(options.output / "muon_cost.json", facts)
            rows = sorted({key(row): row for row in [*before, found]}.values(), key=order)
            content = {"machine": facts, "rows": rows}
            heading, command = "What Newton-Schulz costs", "python -m benchmarks.speed.muon"
            write_rows(options.output, "muon_cost", heading, command, title, COLUMNS, content)
    console.print(comparison_table(title, COLUMNS, rows))


if __name__ == "__main__":
    end_on_interrupt()
    without_devices()
    parsed = tyro.cli(Options, prog="python -m benchmarks.speed.muon", description=Options.__doc__)
    sys.exit(exit_status(lambda: main(parsed)))
