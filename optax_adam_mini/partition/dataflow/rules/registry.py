"""The table of rules.

A rule says how the axes of a primitive's results come from the axes of its operands: it returns a
`Relation`. Most primitives only move axes about, and their rules are a list of links. Where a
parameter meets data, the rule says what that makes of the parameter's axes; where activations meet
in an inner product, it couples the axes that are contracted.
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
    """Enters a rule into the table."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def same(operand: int, axes: Iterable[int], result: int = 0) -> list[Link]:
    """Links of axes that stay what they are."""
    return [Link(operand, (axis,), (axis,), result) for axis in axes]


def layout(facts: Facts, step: Step, links: list[Link], **more: Any) -> Relation:
    """Axes are moved about; nothing is used."""
    ins = facts.inputs(step)
    kind = max((value.kind for value in ins), default=Kind.CONSTANT)
    more.setdefault("keeps", {i for i, value in enumerate(ins) if value.is_weight})
    more.setdefault("drops", False)
    more.setdefault("keeps_dropped", True)
    more.setdefault("is_summary", all(value.is_summary for value in ins if value.is_weight))
    return Relation(links, kind=kind, **more)


def unknown(facts: Facts, step: Step) -> Relation:
    """No rule: harmless where neither parameters nor what they make come in."""
    ins = facts.inputs(step)
    kind = max((value.kind for value in ins), default=Kind.CONSTANT)
    touched = {i for i, value in enumerate(ins) if value.is_weight or value.has_features}
    return Relation(kind=Kind.DATA if touched else kind, unread=touched)
