"""How long does XLA take to compile the update of GPT-2 124M on a CPU?

python -m benchmarks.speed.compile

Compiles the donated update, alone, for each optimizer in turn, with layers unrolled and with layers
stacked for a scan. Prints the smallest CPU time of several rounds.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.speed.update import Tree, gpt2
from examples.common.cli import check_counts
from optax_adam_mini import adam_mini


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile the update of GPT-2 124M with several optimizers."""

    rounds: int = 3
    """Compilations of each; the fastest counts."""
    layers: int | None = None
    """The number of layers; None for the model's own."""


def optimizers(tree: Tree) -> dict[str, optax.GradientTransformation]:
    """What is compared."""
    return {
        "AdamW": optax.adamw(1e-3),
        "one number": adam_mini(1e-3, block_specs=tree.specs),
        "outer": adam_mini(1e-3, block_specs=tree.outer),
        "one number, 8 bits": adam_mini(1e-3, mu_dtype=jnp.int8, block_specs=tree.specs),
        "outer, 8 bits": adam_mini(1e-3, mu_dtype=jnp.int8, block_specs=tree.outer),
    }


def seconds(tx: optax.GradientTransformation, params: Any, state: Any) -> float:
    """CPU time of one compilation."""
    jax.clear_caches()
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params)
    clock = time.process_time()
    lowered.compile()
    return time.process_time() - clock


def main(options: Options) -> None:
    check_counts({"rounds": options.rounds})
    table = Table(title="CPU time to compile the update of GPT-2 124M, seconds")
    for column in ("layers", "optimizer", "seconds", "of AdamW's"):
        table.add_column(column, justify="right")
    for name, scan in (("unrolled", False), ("stacked", True)):
        tree = gpt2("gpt2", scan, options.layers)
        found: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for label, tx in optimizers(tree).items():
                state = jax.eval_shape(tx.init, tree.params)
                found.setdefault(label, []).append(seconds(tx, tree.params, state))
        for label, times in found.items():
            ratio = min(times) / min(found["AdamW"])
            table.add_row(name, label, f"{min(times):.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
