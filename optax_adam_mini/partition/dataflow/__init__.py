"""Block specs read off the model's own computation.

What is known of every value is in `rules`, with one rule for each primitive; `interpreter` runs the
rules over the steps of a `program`, forward and backward; `groups` is the arithmetic of what is
coupled; `infer` makes specs of it.
"""

from optax_adam_mini.partition.dataflow.infer import (
    explain,
    infer_block_specs,
    infer_muon_dimension_numbers,
)

__all__ = ["explain", "infer_block_specs", "infer_muon_dimension_numbers"]
