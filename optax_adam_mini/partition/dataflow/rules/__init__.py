"""The rules of all primitives, one file per kind."""

from optax_adam_mini.partition.dataflow.rules import (
    contractions,
    devices,
    elementwise,
    indexing,
    layout,
    linalg,
    loops,
    reductions,
)
from optax_adam_mini.partition.dataflow.rules.registry import RULES, unknown

__all__ = [
    "RULES",
    "contractions",
    "devices",
    "elementwise",
    "indexing",
    "layout",
    "linalg",
    "loops",
    "reductions",
    "unknown",
]
