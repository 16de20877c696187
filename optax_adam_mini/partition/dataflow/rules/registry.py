"""One rule for each primitive: how the axes of its results come from the axes of its operands.

A rule returns a `Relation`. Most primitives only move axes about, and their rules are a list of
links. Where a parameter meets data, the rule says what that makes of the parameter's axes; where
activations meet in an inner product, it couples the axes that are contracted. The files of this
folder have the rules by the kind of primitive.
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
    return Relation(links, kind=max(value.kind for value in ins), is_rows=ins[0].is_rows, **more)


def unknown(facts: Facts, step: Step) -> Relation:
    """No rule: harmless where neither parameters nor what they make come in."""
    ins = facts.inputs(step)
    kind = max((value.kind for value in ins), default=Kind.CONSTANT)
    touched = any(value.is_weight or any(value.features) for value in ins)
    return Relation(kind=Kind.DATA if touched else kind, unread=touched)
