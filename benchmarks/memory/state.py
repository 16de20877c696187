"""The optimizer memory of the models in the paper's memory table, computed from shapes.

python -m benchmarks.memory.state

Nothing is allocated: the shapes are those of the states that `init` would make.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from examples.common.language import LanguageConfig, abstract_model, block_specs, matrices
from examples.common.optimizers import state_bytes
from examples.common.text import TextConfig
from examples.gpt2.train import Config as GPT2Training
from examples.llama.train import Config as LlamaTraining
from optax_adam_mini import adam_mini, muon_mini


class Model(NamedTuple):
    """A model, and the memory of AdamW's state in the paper's memory table, in GB."""

    name: str
    config: LanguageConfig
    paper_adamw: float | None


def _bpe(vocab_size: int) -> TextConfig:
    return TextConfig(tokenizer="bpe", vocab_size=vocab_size)


MODELS = (
    Model("GPT-2 124M", GPT2Training(model="gpt2", data=_bpe(50257), scan=True), None),
    Model("GPT-2-1.5B", GPT2Training(model="gpt2-xl", data=_bpe(50257), scan=True), 12.48),
    Model("Llama 2-1B", LlamaTraining(model="tinyllama-1b", data=_bpe(32000), scan=True), 8.80),
    Model("Llama 2-7B", LlamaTraining(model="llama2-7b", data=_bpe(32000), scan=True), 53.92),
    Model("Llama 2-13B", LlamaTraining(model="llama2-13b", data=_bpe(32000), scan=True), 104.16),
    Model("Llama 3-8B", LlamaTraining(model="llama3-8b", data=_bpe(128256), scan=True), 64.24),
)


class Memory(NamedTuple):
    """The number of parameters, and the bytes of the optimizers' states."""

    count: int
    adamw: int
    mean: int
    """Adam-mini with one number per block."""
    outer: int
    """Adam-mini with a row and a column per block."""
    mean_int8: int
    """One number per block, and the first moment in 8 bits."""
    outer_int8: int
    muon: int
    """Muon for the matrices and Adam-mini for the rest."""
    muon_int8: int


def memory(config: LanguageConfig) -> Memory:
    """The memory of a model's optimizer states, computed from shapes."""
    _, params = abstract_model(config)

    def of(tx: Any) -> int:
        return state_bytes(jax.eval_shape(tx.init, params))

    specs = {v: block_specs(dataclasses.replace(config, v=v)) for v in ("mean", "outer")}

    def mini(v: str, mu_dtype: Any = None) -> int:
        return of(adam_mini(1e-3, mu_dtype=mu_dtype, block_specs=specs[v]))

    numbers = matrices(config)

    def muon(mu_dtype: Any = None) -> int:
        return of(
            muon_mini(
                2e-2,
                mu_dtype=mu_dtype,
                muon_weight_dimension_numbers=numbers,
                block_specs=specs["outer"],
            )
        )

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Memory(
        count, of(optax.adamw(1e-3)), mini("mean"), mini("outer"),
        mini("mean", jnp.int8), mini("outer", jnp.int8), muon(), muon(jnp.int8),
    )  # fmt: skip


def main() -> None:
    """Prints a row for each model."""
    table = Table(title="Optimizer state in float32, computed")
    table.add_column("model")
    of_adamws = "of AdamW's"
    for heading in (
        "parameters", "AdamW GB", "in the paper", "Adam-mini GB", of_adamws, "outer GB", of_adamws,
        "8 bits GB", of_adamws, "outer, 8 bits GB", of_adamws, "muon_mini GB", of_adamws,
        "muon_mini, 8 bits GB", of_adamws,
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, config, paper in MODELS:
        count, adamw, *minis = memory(config)
        table.add_row(
            name, f"{count / 1e6:,.0f} M", f"{adamw / 1e9:.2f}", f"{paper:.2f}" if paper else "",
            *(text for mini in minis for text in (f"{mini / 1e9:.2f}", f"{mini / adamw:.2%}")),
        )  # fmt: skip
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
