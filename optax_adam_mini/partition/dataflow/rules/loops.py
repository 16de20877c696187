"""Loops: an array that a loop runs over has one axis fewer inside.

Layers that are stacked along that axis have their own blocks.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Facts, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.registry import layout, rule


@rule("scan_slice")
def _scan_slice(facts: Facts, step: Step) -> Relation:
    """One layer of a stack that a loop runs over."""
    value = facts.inputs(step)[0]
    found = layout(facts, step, [Link(0, (a,), (a - 1,)) for a in range(1, len(value.shape))])
    if value.is_weight and value.is_own(0) and id(step) not in facts.taps:
        found.cuts.append((0, 0))
    return found


@rule("scan_stack")
def _scan_stack(facts: Facts, step: Step) -> Relation:
    value = facts.inputs(step)[0]
    return layout(facts, step, [Link(0, (a,), (a + 1,)) for a in range(len(value.shape))])
