"""Block specs from a trace of the model's computation.

`infer` and `explain` are the entry points, and `interpret` runs the passes. `inline` flattens the
jaxpr into a `program`, a list of steps. `forward` applies the `rules`, one per primitive, and finds
the parameters that each value comes from. `backward` finds the coupled coordinates, and `roles` the
role of each axis. `specs` turns the result into block specs. `domain` defines the terms; `groups`
has the arithmetic of coupled coordinates.
"""

from optax_adam_mini.partition.dataflow.explain import explain
from optax_adam_mini.partition.dataflow.infer import (
    infer_block_specs,
    infer_muon_dimension_numbers,
)

__all__ = ["explain", "infer_block_specs", "infer_muon_dimension_numbers"]
