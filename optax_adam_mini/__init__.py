"""Adam-mini for JAX: half of `optax.adamw`'s optimizer state (Zhang et al., arXiv 2406.16793)."""

from optax_adam_mini.blocks import (
    BlockSpec,
    fused,
    per_element,
    per_head,
    per_neuron,
    per_tensor,
    per_token,
)
from optax_adam_mini.convert import from_adam_state, to_adam_state
from optax_adam_mini.labels import BlockSpecs
from optax_adam_mini.muon import muon_mini
from optax_adam_mini.partition.by_path import by_path
from optax_adam_mini.partition.dataflow import (
    explain,
    infer_block_specs,
    infer_muon_dimension_numbers,
)
from optax_adam_mini.partition.flax_layers import flax_layers
from optax_adam_mini.partition.logical_axes import by_logical_axes
from optax_adam_mini.partition.measured import measure_block_specs
from optax_adam_mini.product import outer
from optax_adam_mini.report import block_table
from optax_adam_mini.rounding import StochasticRoundingState, stochastic_rounding
from optax_adam_mini.sharding import opt_state_shardings
from optax_adam_mini.transform import ScaleByAdamMiniState, adam_mini, scale_by_adam_mini

__version__ = "0.3.0.dev0"

__all__ = [
    "BlockSpec",
    "BlockSpecs",
    "ScaleByAdamMiniState",
    "StochasticRoundingState",
    "adam_mini",
    "block_table",
    "by_logical_axes",
    "by_path",
    "explain",
    "flax_layers",
    "from_adam_state",
    "fused",
    "infer_block_specs",
    "infer_muon_dimension_numbers",
    "measure_block_specs",
    "muon_mini",
    "opt_state_shardings",
    "outer",
    "per_element",
    "per_head",
    "per_neuron",
    "per_tensor",
    "per_token",
    "scale_by_adam_mini",
    "stochastic_rounding",
    "to_adam_state",
]
