"""Hessians as heat maps, with their blocks outlined."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optax_adam_mini import BlockSpec
from optax_adam_mini.hessian import block_numbers

DECADES = 3  # of absolute values, from the largest down, that colours tell apart


class Panel(NamedTuple):
    """A parameter's Hessians, one below the other."""

    title: str
    spec: BlockSpec
    shape: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray
    """Before and after training."""


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """One column a panel: coordinates are ordered by block, the blocks outlined."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from PIL import Image

    figure, rows = plt.subplots(
        2, len(panels), figsize=(3.2 * len(panels) + 1, 7.2), layout="constrained", squeeze=False
    )
    image = None
    for column, panel in enumerate(panels):
        blocks = block_numbers(panel.spec, panel.shape)
        order = np.argsort(blocks, kind="stable")
        borders = np.flatnonzero(np.diff(blocks[order], prepend=-1))
        ends = np.append(borders[1:], len(blocks))
        for axes, matrix, when in zip(
            rows[:, column], (panel.before, panel.after), ("before", "after"), strict=True
        ):
            mass = np.abs(matrix[np.ix_(order, order)])
            image = axes.imshow(
                mass / np.quantile(mass, 0.999),  # a few coordinates may be far above all others
                norm=LogNorm(10.0**-DECADES, 1, clip=True),
                cmap="magma",
                interpolation="antialiased",
            )
            for start, end in zip(borders, ends, strict=True):
                corner, size = (start - 0.5, start - 0.5), end - start
                axes.add_patch(Rectangle(corner, size, size, fill=False, ec="cyan", lw=0.7))
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{panel.title}\n{when} training")
    if image is not None:
        figure.colorbar(
            image, ax=rows, label="absolute value, relative to the largest 0.1%", shrink=0.8
        )
    figure.savefig(path, dpi=100)
    plt.close(figure)
    # As good as noise, which a PNG can only make smaller by having fewer colours.
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
