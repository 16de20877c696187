"""The forward pass: finds the parameters that every value comes from.

It runs the rules over the steps until the values that loops carry have settled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Set

import numpy as np

from optax_adam_mini.partition.dataflow.axes import (
    NOTHING,
    Factor,
    Factors,
    Indices,
    Part,
    beside,
    blank,
    merged,
    regrouped,
    whole,
)
from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation, Use, Value
from optax_adam_mini.partition.dataflow.members import find_members, find_repeats
from optax_adam_mini.partition.dataflow.program import MERGE, RESHAPES, Program, Step, depending
from optax_adam_mini.partition.dataflow.rules import RULES, unknown
from optax_adam_mini.partition.dataflow.taps import find_taps

# Properties of indices that describe the numbers, and survive where no gradient passes.
_OF_NUMBERS = Indices.ONE_HOT | Indices.COUNTED
# Primitives whose new axes hold copies.
_RESHAPING = {*RESHAPES, "broadcast_in_dim"}


def follow(program: Program, n_params: int) -> Facts:
    """Finds what every value makes of the first `n_params` inputs, the parameters."""
    facts = _followed(program, n_params)
    members, repeats = find_members(facts), find_repeats(facts)
    return _followed(program, n_params, members, repeats) if members or repeats else facts


def _followed(
    program: Program,
    n_params: int,
    members: Set[int] = frozenset[int](),
    repeats: Set[int] = frozenset[int](),
) -> Facts:
    values = [Value(shape) for shape in program.shapes]
    facts = Facts(program, n_params, values, members=members, repeats=repeats)
    facts.data = depending(program, program.inputs[n_params:])
    facts.learned = depending(program, program.inputs[:n_params])
    facts.filters, facts.taps = find_taps(program, facts.data)
    for index, place in enumerate(program.inputs):
        value = facts.values[place]
        if index < n_params:
            value.kind, value.params = Kind.WEIGHT, frozenset([index])
            value.axes = [
                (Factor(size, own=frozenset([(index, axis)])),)
                for axis, size in enumerate(value.shape)
            ]
        else:
            _be_data(value)
    for place in program.arrays:
        _be_data(facts.values[place])
        facts.values[place].is_fixed = True
    while _pass(facts):
        pass
    return facts


def _be_data(value: Value) -> None:
    value.kind = Kind.DATA
    value.axes = [(Factor(size, moves=size > 1),) for size in value.shape]


def _pass(facts: Facts) -> bool:
    """Runs the rules once; returns whether a value changed after it was read, as in loops."""
    facts.trail = []
    read: set[int] = set()
    again = False
    for step in facts.program.steps:
        read.update(step.inputs)
        relation = _relation(facts, step)
        facts.trail.append((step, relation))
        for result, place in enumerate(step.outputs):
            value = _result(facts, step, relation, result)
            if step.name == MERGE:
                old = facts.values[place]
                if place in facts.given:
                    value = _with_what_was(old, value)
                facts.given.add(place)
                again |= place in read and _differs(old, value)
            facts.values[place] = value
        for summed, product in relation.sums:
            facts.trail.append((summed, product))
            for result, place in enumerate(summed.outputs):
                _use(facts, summed, product, result, facts.values[place])
    return again


def _relation(facts: Facts, step: Step) -> Relation:
    if step.is_backward:
        return _of_derivative(facts, step)
    try:
        relation = RULES.get(step.name, unknown)(facts, step)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        # A rule that fails counts as no rule, so that the user's error names the parameter, the
        # primitive and the line.
        return unknown(facts, step)
    return relation if _fits(facts, step, relation) else unknown(facts, step)


def _of_derivative(facts: Facts, step: Step) -> Relation:
    """A step of a derivative's backward pass: it has no new use, and its results are data."""
    kind = max((value.kind for value in facts.inputs(step)), default=Kind.CONSTANT)
    return Relation(kind=Kind.DATA if kind == Kind.WEIGHT else kind)


def _fits(facts: Facts, step: Step, relation: Relation) -> bool:
    """Whether the axes that a rule links have matching sizes."""
    for link in relation.links:
        operand = facts.values[step.inputs[link.operand]].shape
        result = facts.values[step.outputs[link.result]].shape
        sizes = [operand[axis] for axis in link.axes], [result[axis] for axis in link.result_axes]
        if link.positions is not None:
            good = math.prod(sizes[1]) == len(link.positions)
        else:
            good = (
                link.is_mixed
                or link.is_lost
                or link.parts > 1
                or math.prod(sizes[0]) == math.prod(sizes[1])
            )
        if not good:
            return False
    return True


def _result(facts: Facts, step: Step, relation: Relation, result: int) -> Value:
    """The value of a result, according to the relation."""
    ins = facts.inputs(step)
    value = Value(facts.program.shapes[step.outputs[result]])
    value.kind = max((v.kind for v in ins), default=Kind.CONSTANT)
    if relation.kind is not None:
        value.kind = relation.kind
    kept = relation.keeps
    if len(step.outputs) > 1:
        kept = {link.operand for link in relation.links if link.result == result} & kept
    value.params = frozenset[int]().union(*(ins[operand].params for operand in kept))
    value.is_plain = relation.is_plain
    made = max((ins[operand].made for operand in relation.keeps), default=0)
    value.made = made if relation.made is None else relation.made and max(made, relation.made)
    value.is_summary = relation.is_summary
    value.is_fixed = bool(ins) and all(v.is_fixed or v.kind == Kind.CONSTANT for v in ins)
    for v in ins:
        value.mixtures |= v.mixtures
    if relation.is_mixture:
        value.mixtures |= 1 << facts.number(("mixture", id(step)))
    if step.is_backward:
        value.axes = [(Factor(size, moves=size > 1),) for size in value.shape]
        return value
    found: list[list[Factors]] = [[] for _ in value.shape]
    for link in relation.links:
        operand = ins[link.operand]
        # Features replace a parameter that is used; data combined with it pass through.
        if link.result == result and (link.operand not in relation.uses or operand.is_combined):
            _follow(link, operand, value, found, link.operand in relation.keeps)
    linked = {axis for link in relation.links if link.result == result for axis in link.result_axes}
    data = value.kind == Kind.DATA
    for axis, parts in enumerate(found):
        # Data may vary along an axis of unknown origin.
        factors = blank(value.shape[axis])
        if data and axis not in linked and value.shape[axis] > 1:
            factors = (Factor(value.shape[axis], moves=step.name not in _RESHAPING),)
        for part in parts:
            factors = part if factors == blank(value.shape[axis]) else merged(factors, part)
        value.axes[axis] = factors
    if relation.keeps_dropped:
        for operand in ins:
            value.dropped = beside(value.dropped, operand.dropped)
        if step.name in _RESHAPING:
            _drop_axes(step, ins[0], value)
    _flag(facts, step, relation, value)
    _use(facts, step, relation, result, value)
    return value


def _drop_axes(step: Step, operand: Value, value: Value) -> None:
    """Remembers dropped axes of size 1 and restores them: arrays are iterated over and stacked."""
    before, after = (sum(n == 1 for n in v.shape) for v in (operand, value))
    if step.name != "broadcast_in_dim" and before > after:
        for axis, size in enumerate(operand.shape):
            if size == 1:
                value.dropped = beside(value.dropped, (operand.whole(axis),))
    elif before < after and value.dropped:
        new = [axis for axis, size in enumerate(value.shape) if size == 1]
        for axis in new:
            if value.axes[axis] == blank(1):
                value.axes[axis] = (whole(value.dropped, 1),)


def _flag(facts: Facts, step: Step, relation: Relation, value: Value) -> None:
    """Updates the properties of a result's axes that its relation sets or ends."""
    for axis, factors in enumerate(value.axes):
        changed = factors
        if relation.is_stopped:
            changed = tuple(
                Factor(f.size, moves=f.moves or bool(f.own), indices=f.indices & _OF_NUMBERS)
                for f in changed
            )
        if relation.drops:
            changed = tuple(f._replace(products=frozenset()) for f in changed)
        if relation.ends:
            changed = tuple(f.without(relation.ends) for f in changed)
        if relation.is_product and value.shape[axis] > 1:
            facts.products[id(step)] = step
            tag = frozenset([(id(step), axis)])
            # A product that a parameter is multiplied with is summed as well.
            ins = facts.inputs(step)
            is_scaled = any(not f.products for i in relation.keeps for f in ins[i].axes[axis])
            changed = tuple(
                f._replace(products=f.products | tag if is_scaled else tag) for f in changed
            )
        if axis in relation.indices:
            become = relation.indices[axis]
            changed = tuple(f._replace(indices=f.indices | become) for f in changed)
        value.axes[axis] = changed


def _use(facts: Facts, step: Step, relation: Relation, result: int, value: Value) -> None:
    """Gives a result the features of the parameters that are used in the step."""
    ins = facts.inputs(step)
    for operand, axes in relation.uses.items():
        number = facts.number(("use", id(step), operand))
        partner = relation.partner.get(operand)
        if partner is not None:
            bit = 1 << number
            for link in relation.links:  # it runs over the free axes of what it meets
                if link.operand == partner and link.result == result:
                    for axis in link.result_axes:
                        value.axes[axis] = tuple(
                            f._replace(over=f.over | bit) for f in value.axes[axis]
                        )
        met = (0, False) if partner is None else _contracted(ins[partner], relation, partner)
        facts.uses[number] = Use(
            step, operand, ins[operand].params, relation.is_lookup, partner, *met
        )
        distance, count = 1, math.prod(value.shape[axis] for axis in axes)
        for axis in reversed(axes):
            size = value.shape[axis]
            if size > 1:
                found = value.whole(axis)
                value.axes[axis] = (
                    found._replace(
                        features={**found.features, number: Part(distance, 0, count)},
                        moves=True,
                    ).without(Indices.PARTS),
                )
            distance *= size
        if operand in relation.keeps:  # rows that were chosen: parameters still
            for link in relation.links:
                if (link.operand, link.result, len(link.result_axes)) == (operand, result, 1):
                    (axis,) = link.result_axes
                    own = frozenset[tuple[int, int]]().union(
                        *(factor.own for a in link.axes for factor in ins[operand].axes[a])
                    )
                    value.axes[axis] = tuple(f._replace(own=f.own | own) for f in value.axes[axis])
    for operand in relation.spent:
        number = facts.number(("spent", id(step), operand))
        facts.uses[number] = Use(step, operand, ins[operand].params)


def _contracted(value: Value, relation: Relation, operand: int) -> tuple[int, bool]:
    """The uses that ran over all contracted axes of data, and whether these have features."""
    kept = {axis for link in relation.links if link.operand == operand for axis in link.axes}
    gone = [axis for axis, size in enumerate(value.shape) if axis not in kept and size > 1]
    over = [value.whole(axis).over for axis in gone]
    return (
        functools.reduce(operator.and_, over) if over else 0,
        any(value.features(axis) for axis in gone),
    )


def _follow(
    link: Link, operand: Value, result: Value, found: list[list[Factors]], keeps: bool
) -> None:
    """Adds to `found` what the operand's axes say about the result's."""
    if not link.result_axes:
        return
    sources = [factor for axis in link.axes for factor in operand.axes[axis]]
    if not keeps:
        sources = [f._replace(own=frozenset(), moves=True) if f.own else f for f in sources]
    if not sources:  # a new axis of which an operand has one index
        (axis,) = link.result_axes
        is_parameter = keeps and operand.kind == Kind.WEIGHT
        own = frozenset((param, -1) for param in operand.params if is_parameter)
        moves = operand.kind == Kind.DATA
        was = whole(operand.dropped or (NOTHING,), result.shape[axis])._replace(moves=moves)
        found[axis].append((was._replace(own=was.own | own if keeps else own),))
        return
    sizes = [result.shape[axis] for axis in link.result_axes]
    if link.is_mixed or link.is_lost or link.parts > 1:
        one = whole(tuple(sources))._replace(products=frozenset()).without(Indices.ONE_HOT)
        new = [(one._replace(size=size),) for size in sizes]
    elif link.positions is not None:
        taken = _taken(whole(tuple(sources)), link.positions)
        new = [(taken,)] if len(sizes) == 1 else regrouped([taken], sizes)
    elif len(link.axes) == len(link.result_axes) == 1:
        new = [operand.axes[link.axes[0]] if keeps else tuple(sources)]
    else:
        new = regrouped(sources, sizes)
    for axis, factors in zip(link.result_axes, new, strict=True):
        found[axis].append(factors)


def _taken(factor: Factor, positions: np.ndarray) -> Factor:
    """An axis from which some indices are taken."""
    taken = positions[positions >= 0]
    if not len(taken):
        return Factor(len(positions))
    first, last = int(taken.min()), int(taken.max())
    features = factor.features
    if last - first + 1 < factor.size:
        features = {
            use: part._replace(
                start=part.start + first * part.distance,
                stop=min(part.stop, part.start + (last + 1) * part.distance),
            )
            for use, part in features.items()
        }
    return factor._replace(size=len(positions), features=features)


def _with_what_was(old: Value, new: Value) -> Value:
    """Joins two values that a loop carries or branches return, as one value."""
    params = frozenset[int]() if old.is_plain or new.is_plain else old.params | new.params
    axes = [
        tuple(f if both & Indices.ONE_HOT else f.without(Indices.ONE_HOT) for f in factors)
        for factors, both in (
            (merged(a, b), whole(a).indices & whole(b).indices)
            for a, b in zip(old.axes, new.axes, strict=True)
        )
    ]
    if not params:
        axes = [tuple(f._replace(own=frozenset()) for f in factors) for factors in axes]
    return dataclasses.replace(
        new,
        kind=max(old.kind, new.kind),
        params=params,
        axes=axes,
        made=max(old.made, new.made),
        is_summary=old.is_summary and new.is_summary,
        is_plain=old.is_plain or new.is_plain,
        is_fixed=old.is_fixed and new.is_fixed,
        dropped=beside(old.dropped, new.dropped),
        mixtures=old.mixtures | new.mixtures,
    )


def _differs(a: Value, b: Value) -> bool:
    return any(
        getattr(a, field.name) != getattr(b, field.name) for field in dataclasses.fields(Value)
    )
