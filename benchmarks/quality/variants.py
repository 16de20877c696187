"""Rows and columns other than those of `infer_block_specs(v="outer")`, and other orders of
dividing, clipping and averaging, to see what each choice is worth. Importing this module adds
Adam-mini with each variant to the examples' optimizers.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks.quality.others import chain_of
from examples.common.optimizers import OF_MATRICES, OPTIMIZERS, OptimizerConfig, muon
from optax_adam_mini import (
    by_path,
    fused,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
    scale_by_adam_mini,
)
from optax_adam_mini.blocks import BlockSpec
from optax_adam_mini.labels import path_str
from optax_adam_mini.product import Outer, Spec, outer

MATRIX = outer(per_neuron(axis=0), per_neuron())


def rows_for_matrices(spec: Spec) -> Spec:
    """One row for the whole kernel, as in Adafactor."""
    return MATRIX if isinstance(spec, Outer) else spec


def _rows(*outputs: tuple[int, BlockSpec]) -> Spec:
    """A spec with a row for each block along the outputs."""
    cut = fused(1, outputs)
    return outer(BlockSpec(((0, None), *cut.cuts)), per_neuron())


def _heads(count: int, size: int) -> tuple[int, BlockSpec]:
    return count * size, per_head(count, axis=1)


TABLES = "wte|embed/|head/"
ROWS_FOR_HEADS = [
    ("c_attn/kernel", _rows(_heads(8, 16), _heads(8, 16), (128, per_tensor()))),
    ("query/kernel", _rows(_heads(8, 16))),
    ("key/kernel", _rows(_heads(4, 16))),
]

# By title: a function of every spec, or rules over paths that come before the default.
VARIANTS: dict[str, Callable[[Spec], Spec] | list[tuple[str, Spec]]] = {
    "rows for matrices": rows_for_matrices,
    "rows for heads": ROWS_FOR_HEADS,
    "rows for heads, embedding by token": [*ROWS_FOR_HEADS, (TABLES, per_token())],
    "rows for heads, embedding per coordinate": [*ROWS_FOR_HEADS, (TABLES, per_element())],
    "embedding by token": [(TABLES, per_token())],
    "embedding per coordinate": [(TABLES, per_element())],
    "positions by position": [("wpe", per_token())],
    "query and key by head": [
        ("c_attn/kernel", fused(1, [_heads(8, 16), _heads(8, 16), (128, per_neuron(axis=1))])),
        ("query/kernel", _heads(8, 16)[1]),
        ("key/kernel", _heads(4, 16)[1]),
    ],
    "gains in one block": [("scale$", per_tensor())],
    "biases in one block": [("bias$", per_tensor())],
    "attention per coordinate": [("attn/.*kernel|attention/.*kernel", per_element())],
    "MLP per coordinate": [("mlp/.*kernel", per_element())],
    "all per coordinate": [("", per_element())],
}


def _scale(config: OptimizerConfig, specs: Any, b1: float) -> optax.GradientTransformation:
    return scale_by_adam_mini(b1, config.b2, config.eps, bounded=False, block_specs=specs)


# By title: what replaces Adam-mini's scaling.
ORDERS: dict[str, Callable[[OptimizerConfig, Any], optax.GradientTransformation]] = {
    "outer, not bounded": lambda config, specs: _scale(config, specs, config.b1),
    "update clipped at 1": lambda config, specs: optax.chain(
        _scale(config, specs, config.b1), optax.clip_by_block_rms(1.0)
    ),
    # Adafactor's order.
    "divided, clipped at 1, then averaged": lambda config, specs: optax.chain(
        _scale(config, specs, b1=0.0), optax.clip_by_block_rms(1.0), optax.ema(config.b1)
    ),
}


def _that_match(rules: list[tuple[str, Spec]], block_specs: Any) -> list[tuple[str, Spec]]:
    """The rules that match a layer of this model; some are for layers of the other model."""
    paths = [path_str(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(block_specs)]
    return [rule for rule in rules if any(re.search(rule[0], path) for path in paths)]


def _optimizer(change: Any) -> Callable[..., optax.GradientTransformation]:
    def build(schedule: optax.Schedule, config: Any, block_specs: Any) -> Any:
        if callable(change):
            specs = jax.tree.map(change, block_specs)
        else:
            specs = by_path(_that_match(change, block_specs), default=lambda _: block_specs)
        return OPTIMIZERS["adam_mini"](schedule, config, specs)

    return build


def _muon_by_rows(rules: list[tuple[str, Spec]]) -> Callable[..., optax.GradientTransformation]:
    """Muon with a separate matrix for each part that has its own row."""

    def build(schedule: optax.Schedule, config: Any, block_specs: Any, matrices: Any) -> Any:
        specs = by_path(_that_match(rules, block_specs), default=lambda _: block_specs)
        return muon(schedule, config, specs, matrices, parts=True)

    return build


OF_MATRICES["muon_mini, parts"] = _muon_by_rows([])
OF_MATRICES["muon_mini, heads"] = _muon_by_rows(ROWS_FOR_HEADS)
OPTIMIZERS.update({title: _optimizer(change) for title, change in VARIANTS.items()})
OPTIMIZERS.update({title: chain_of(scale) for title, scale in ORDERS.items()})
