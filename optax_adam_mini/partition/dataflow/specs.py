"""Turns groups into block specs: grids that are never coarser than the groups."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from optax_adam_mini.blocks import BlockSpec, Cut, per_head, per_neuron
from optax_adam_mini.partition.dataflow.domain import Role
from optax_adam_mini.partition.dataflow.groups import ALONE, UNSEEN, Label
from optax_adam_mini.partition.dataflow.interpret import Result


def spec_of(shape: Sequence[int], result: Result, index: int) -> BlockSpec:
    """The spec of a parameter, with the name of its blocks."""
    labels = result.labels[index]
    cuts: list[tuple[int, Cut]] = []
    for axis, (size, label) in enumerate(zip(shape, labels, strict=True)):
        cut = _cut(axis, size, label)
        if cut != 1 and size > 1:
            cuts.append((axis, cut))
    spec = BlockSpec(tuple(cuts))
    grid, roles = spec.grid(shape), result.roles[index]
    outputs = [found for found in roles if Role.OUTPUT in found]
    is_lookup = any(use.is_lookup for use in result.uses.get(index, ()))
    if grid == tuple(shape) and grid:
        unit = "element"
    elif is_lookup and all(Role.BATCH in found for found in outputs):
        unit = "token"
    elif all(n == 1 for n, found in zip(grid, roles, strict=True) if found != {Role.BATCH}):
        unit = "tensor"
    elif index in result.coupled and any(
        n < size for n, size, found in zip(grid, shape, roles, strict=True) if Role.OUTPUT in found
    ):
        unit = "head"
    else:
        unit = "neuron"
    return dataclasses.replace(spec, unit=unit)


def _cut(axis: int, size: int, label: Label) -> Cut:
    """The cut of an axis: each run of neighbours in one group is a block.

    A group whose indices are not neighbours becomes several blocks: finer, never coarser.
    """
    if label is None:
        return None
    if isinstance(label, int):
        return 1
    seen = label[label != UNSEEN]
    if len(seen) == 0 or (seen == seen[0]).all():
        # Indices that no use has seen go with the rest.
        return None if len(seen) and seen[0] == ALONE else 1
    label = np.where(label == UNSEEN, ALONE, label)
    borders = np.flatnonzero((label[1:] != label[:-1]) | (label[1:] == ALONE)) + 1
    return cut_into(axis, size, np.diff([0, *borders.tolist(), size]).tolist())


def cut_into(axis: int, size: int, sizes: Sequence[int]) -> Cut:
    """The cut of an axis into neighbouring blocks of these sizes."""
    runs = [(block, len(list(run))) for block, run in itertools.groupby(sizes)]
    if len(runs) == 1:
        ((block, count),) = runs
        return None if block == 1 < size else count
    return tuple(
        (block * count, per_neuron(axis) if block == 1 else per_head(count, axis))
        for block, count in runs
    )
