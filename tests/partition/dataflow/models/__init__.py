"""Models whose names mean nothing, and the grid of each parameter, written out by hand.

Of some parameters nothing is derived: these have no grid.
"""

from tests.partition.dataflow.models import (
    attentions,
    corners,
    kernels,
    layers,
    losses,
    projections,
)

TABLE_OF_MODELS = {
    **attentions.MODELS,
    **projections.MODELS,
    **kernels.MODELS,
    **layers.MODELS,
    **losses.MODELS,
    **corners.MODELS,
}
# Those that are cut finer than they have to be, with the grids that differ, as they are now.
FINER = {**attentions.FINER, **kernels.FINER, **layers.FINER}

COUNT = sum(
    len(part.MODELS) for part in (attentions, projections, kernels, layers, losses, corners)
)
assert len(TABLE_OF_MODELS) == COUNT, "two models of one name"
