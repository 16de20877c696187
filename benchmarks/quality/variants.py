"""Other rows and columns than those that `infer_block_specs(v="outer")` gives, to see what each
choice is worth. To import this module adds Adam-mini with each of them to the examples' optimizers.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from examples.common.optimizers import OPTIMIZERS
from optax_adam_mini import by_path, per_element, per_neuron, per_tensor, per_token
from optax_adam_mini.blocks import BlockSpec
from optax_adam_mini.outer import Outer, Spec, outer

MATRIX = outer(per_neuron(axis=0), per_neuron())


def rows_for_matrices(spec: Spec) -> Spec:
    """One row for the whole kernel, as in Adafactor."""
    return MATRIX if isinstance(spec, Outer) else spec


def rows_for_parts(spec: Spec) -> Spec:
    """One row for query, key and value in a fused kernel, which are equally wide, and for every
    other kernel."""
    if not isinstance(spec, Outer):
        return spec
    cut = spec.a.cut_along(1)
    rows = ((0, None), (1, 3)) if isinstance(cut, tuple) else ((0, None),)
    return outer(BlockSpec(rows), per_neuron())


# Title: a function of every spec, or rules over paths that go before.
VARIANTS: dict[str, Callable[[Spec], Spec] | list[tuple[str, Spec]]] = {
    "rows for matrices": rows_for_matrices,
    "rows for parts": rows_for_parts,
    "embedding by token": [("wte|embed/|head/", per_token())],
    "embedding per coordinate": [("wte|embed/|head/", per_element())],
    "positions by position": [("wpe", per_token())],
    "gains in one block": [("scale$", per_tensor())],
    "biases in one block": [("bias$", per_tensor())],
    "attention per coordinate": [("attn/.*kernel|attention/.*kernel", per_element())],
    "MLP per coordinate": [("mlp/.*kernel", per_element())],
    "all per coordinate": [("", per_element())],
}


def _optimizer(change: Any) -> Callable[..., optax.GradientTransformation]:
    def build(schedule: optax.Schedule, config: Any, block_specs: Any) -> Any:
        if callable(change):
            specs = jax.tree.map(change, block_specs)
        else:
            specs = by_path(change, default=lambda _: block_specs)
        return OPTIMIZERS["adam_mini"](schedule, config, specs)

    return build


OPTIMIZERS.update({title: _optimizer(change) for title, change in VARIANTS.items()})
