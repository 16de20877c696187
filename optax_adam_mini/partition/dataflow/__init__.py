"""Block specs from a trace of the model's computation.

`infer` and `explain` take the question, `interpret` runs the passes: `program` writes the jaxpr
out, `forward` follows what every value is made of with the `rules`, one for each primitive,
`backward` what is coupled, `roles` what the axes are, and `specs` makes block specs of it. `domain`
has the words, `groups` the arithmetic of what is coupled.
"""

from optax_adam_mini.partition.dataflow.explain import explain
from optax_adam_mini.partition.dataflow.infer import (
    infer_block_specs,
    infer_muon_dimension_numbers,
)

__all__ = ["explain", "infer_block_specs", "infer_muon_dimension_numbers"]
