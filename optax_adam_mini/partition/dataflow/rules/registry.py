"""The table of rules.

A rule returns a `Relation`, which says how the axes of a primitive's results come from the axes of
its operands. Most primitives only move axes, and their rules are a list of links. Where a parameter
meets data, the rule also says what role its axes have. Where activations meet in an inner product,
the rule couples the contracted axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step

Rule = Callable[[Facts, Step], Relation]
RULES: dict[str, Rule] = {}
"""The rule of each primitive that has one."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Adds a rule to the table."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def same(operand: int, axes: Iterable[int], result: int = 0) -> list[Link]:
    """Links of axes that keep their places."""
    return [Link(operand, (axis,), (axis,), result) for axis in axes]


def layout(facts: Facts, step: Step, links: list[Link], **more: Any) -> Relation:
    """A relation that only moves axes; nothing is used."""
    ins = facts.inputs(step)
    kind = max((value.kind for value in ins), default=Kind.CONSTANT)
    more.setdefault("keeps", {i for i, value in enumerate(ins) if value.is_weight})
    more.setdefault("drops", False)
    more.setdefault("keeps_dropped", True)
    more.setdefault("is_summary", all(value.is_summary for value in ins if value.is_weight))
    return Relation(links, kind=kind, **more)


def unknown(facts: Facts, step: Step) -> Relation:
    """The relation of a primitive without a rule: unread if parameters or features go into it."""
    ins = facts.inputs(step)
    kind = max((value.kind for value in ins), default=Kind.CONSTANT)
    touched = {i for i, value in enumerate(ins) if value.is_weight or value.has_features}
    return Relation(kind=Kind.DATA if touched else kind, unread=touched)
