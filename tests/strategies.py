"""Random shapes, and specs that fit them together with the borders of their blocks."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np

from optax_adam_mini import BlockSpec, fused, per_tensor


def given(*strategies):
    """hypothesis.given, with the compiled programs of earlier examples forgotten from time to time:
    each holds maps of memory, and thousands of them are more than a process may have."""

    def decorate(test):
        examples = itertools.count(1)

        @functools.wraps(test)
        def tested(**drawn):
            if next(examples) % 200 == 0:
                jax.clear_caches()
            test(**drawn)

        return hypothesis.given(*strategies)(tested)

    return decorate


@st.composite
def cuts(draw, size, depth=0):
    """A cut of an axis of `size`, and the sizes of its blocks in order."""
    kinds = ["whole", "each", "equal"] + (["parts"] if size > 1 and depth == 0 else [])
    kind = draw(st.sampled_from(kinds))
    if size == 0:
        return (1 if kind == "whole" else None), []
    if kind == "whole":
        return 1, [size]
    if kind == "each":
        return None, [1] * size
    if kind == "equal":
        n = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        return n, [size // n] * n
    border = draw(st.integers(1, size - 1))
    parts, sizes = [], []
    for part in (border, size - border):
        cut, block_sizes = draw(cuts(part, depth=1))
        parts.append((part, cut))
        sizes += block_sizes
    return tuple(parts), sizes


@st.composite
def shapes_and_specs(draw, max_rank=4, min_side=0, max_side=6):
    """A shape, a spec that fits it, and the borders of the blocks along each axis."""
    shape = tuple(draw(st.lists(st.integers(min_side, max_side), max_size=max_rank)))
    spelt, sizes = [], []
    fused_axis = None
    for axis, size in enumerate(shape):
        cut, block_sizes = draw(cuts(size))
        name = axis if draw(st.booleans()) else axis - len(shape)
        if isinstance(cut, tuple):
            inner = [(n, BlockSpec(((name, c),))) for n, c in cut]
            spelt += fused(name, inner).cuts
            fused_axis = axis
        elif cut != 1:
            spelt.append((name, cut))
        sizes.append(block_sizes)
    del fused_axis
    spec = BlockSpec(tuple(draw(st.permutations(spelt)))) if spelt else per_tensor()
    return shape, spec, [np.cumsum([0, *s]) for s in sizes]
