"""Devices: what `shard_map` and collectives do to axes.

A device has a part of an axis. Parts of a parameter or of its outputs are not followed when they
are gathered again.
"""

from __future__ import annotations

from optax_adam_mini.partition.dataflow.domain import Facts, Kind, Link, Relation
from optax_adam_mini.partition.dataflow.program import Step
from optax_adam_mini.partition.dataflow.rules.registry import layout, rule


@rule("shard")
def _shard(facts: Facts, step: Step) -> Relation:
    """From the whole array to one device's part of it."""
    value, out = facts.inputs(step)[0], facts.outputs(step)[0]
    if value.kind != Kind.WEIGHT:
        return _moved_across(facts, step)
    links = [
        Link(0, (axis,), (axis,), parts=size // max(out.shape[axis], 1))
        for axis, size in enumerate(value.shape)
    ]
    return layout(facts, step, links)


@rule("unshard", "all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all")
def _moved_across(facts: Facts, step: Step) -> Relation:
    """Axes that are split or joined across devices: unread if they are a parameter's."""
    value, out = facts.inputs(step)[0], facts.outputs(step)[0]
    axes = list(range(len(value.shape)))  # the operand's axis for each of the result's
    if not step.params.get("tiled", True):  # an axis of devices is removed or added
        for gone in ("scatter_dimension", "split_axis"):
            if gone in step.params:
                axes.remove(step.params[gone])
        for new in ("all_gather_dimension", "concat_axis"):
            if new in step.params:
                axes.insert(step.params[new], -1)
    links = [
        Link(0, (axis,), (to,))
        for to, axis in enumerate(axes)
        if axis >= 0 and value.shape[axis] == out.shape[to]
    ]
    found = layout(facts, step, links)
    kept = [link.axes[0] for link in links]
    if any(
        value.features(axis) or value.is_own(axis)
        for axis, size in enumerate(value.shape)
        if axis not in kept and size > 1
    ):
        found.unread = {0}
    return found


@rule("psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast",
      "unreduced_psum")  # fmt: skip
def _across(facts: Facts, step: Step) -> Relation:
    """Arrays of all devices, combined or exchanged element by element.

    An axis named by `vmap` is an axis of the array, and is reduced as in a sum.
    """
    named = step.params.get("axes", ())
    gone = {axis for axis in named if isinstance(axis, int)} if isinstance(named, tuple) else set()
    links = [
        Link(i, (a,), (place,), i)
        for i, value in enumerate(facts.inputs(step))
        for place, a in enumerate(a for a in range(len(value.shape)) if a not in gone)
    ]
    return layout(facts, step, links)
