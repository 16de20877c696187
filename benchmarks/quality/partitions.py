"""Partitions of Llama other than the paper's, to see what each of the paper's choices is worth.

Importing this module adds Adam-mini with each partition to the examples' optimizers.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from examples.common.optimizers import OPTIMIZERS, OptimizerConfig, decayed
from examples.llama.model import CONFIGS
from optax_adam_mini import (
    BlockSpec,
    by_path,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    scale_by_adam_mini,
)

QUERY, KEY, VALUE = "query/kernel", "key/kernel", "value/kernel"
TOKENS = "embed/embedding|head/kernel"
HEADS, KV_HEADS = CONFIGS["nano"].heads, CONFIGS["nano"].kv_heads

# By title in the table: the rules that come before the default. Kernels are (inputs, outputs).
CHANGES = {
    "query and key: one block": [(f"{QUERY}|{KEY}", per_tensor())],
    "query and key: by neuron": [(f"{QUERY}|{KEY}", per_neuron())],
    "query and key: by input": [(f"{QUERY}|{KEY}", per_neuron(axis=0))],
    "query and key: by head and input": [
        (QUERY, per_head(HEADS, stacked=0)),
        (KEY, per_head(KV_HEADS, stacked=0)),
    ],
    "query and key: per coordinate": [(f"{QUERY}|{KEY}", per_element())],
    "value: one block": [(VALUE, per_tensor())],
    "embedding and head: one block": [(TOKENS, per_tensor())],
    "all matrices: by input": [("kernel", per_neuron(axis=0))],
    "everything per coordinate": [("", per_element())],
}


def _changed(rules: list[tuple[str, BlockSpec]]) -> Callable[..., optax.GradientTransformation]:
    return lambda schedule, config, block_specs: OPTIMIZERS["adam_mini"](
        schedule, config, by_path(rules, default=lambda _: block_specs)
    )


def shuffled(pattern: str, *, back: bool = False) -> optax.GradientTransformation:
    """Shuffles the coordinates of parameters whose path matches, in the same way at every step."""

    def shuffle(keys: tuple, x: jax.Array) -> jax.Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not re.search(pattern, path):
            return x
        order = np.random.default_rng(zlib.crc32(path.encode())).permutation(x.size)
        return x.ravel()[np.argsort(order) if back else order].reshape(x.shape)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(shuffle, updates))


def _in_random_blocks(schedule: optax.Schedule, config: OptimizerConfig, block_specs: Any):
    """Queries and keys have as many blocks, of the same sizes, but of random coordinates."""
    return optax.chain(
        shuffled(f"{QUERY}|{KEY}"),
        scale_by_adam_mini(config.b1, config.b2, config.eps, block_specs=block_specs),
        shuffled(f"{QUERY}|{KEY}", back=True),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


PARTITIONS = {
    "adam_mini": OPTIMIZERS["adam_mini"],
    "query and key: random blocks": _in_random_blocks,
    **{title: _changed(rules) for title, rules in CHANGES.items()},
}
OPTIMIZERS.update(PARTITIONS)
