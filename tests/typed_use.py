"""What pyright makes of `block_specs=`: it is run over this file, and every marked line must be an error."""

# pyright: reportUnnecessaryTypeIgnoreComment=true, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false
from typing import Any

import optax

from optax_adam_mini import BlockSpecs, adam_mini, flax_layers, outer, per_neuron, per_tensor


def build(block_specs: BlockSpecs) -> optax.GradientTransformationExtraArgs:
    return adam_mini(1e-3, block_specs=block_specs)


def specs_of(params: dict[str, Any]) -> BlockSpecs:
    return {name: per_neuron() for name in params}


def uses() -> None:
    build(per_neuron())
    build(outer(per_neuron(axis=0), per_neuron()))
    build({"kernel": per_neuron(), "layers": [per_tensor(), (per_tensor(),)]})
    build(flax_layers())
    build(specs_of)
    build(3)  # pyright: ignore[reportArgumentType]
    build("per_neuron")  # pyright: ignore[reportArgumentType]
    adam_mini(1e-3, block_specs=0.5)  # pyright: ignore[reportArgumentType]
