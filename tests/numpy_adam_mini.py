"""Adam-mini from the paper's formulas in plain NumPy and float64, block by block."""

import itertools

import numpy as np


def edges_of(runs):
    """The borders of the blocks along one axis, from `(number of blocks, size)` pairs."""
    sizes = [size for n, size in runs for _ in range(n)]
    return np.cumsum([0, *sizes])


def blocks_of(edges_by_axis):
    """Pairs (index of the block in the grid, slices of the array it covers)."""
    ranges = [range(len(edges) - 1) for edges in edges_by_axis]
    for index in itertools.product(*ranges):
        yield index, tuple(slice(e[i], e[i + 1]) for i, e in zip(index, edges_by_axis, strict=True))


def block_mean(x, edges_by_axis):
    out = np.zeros([len(edges) - 1 for edges in edges_by_axis])
    for index, block in blocks_of(edges_by_axis):
        out[index] = np.asarray(x[block], np.float64).mean()
    return out


def run(p, grads, edges_by_axis, lr, b1, b2, eps, weight_decay):
    """The parameter after all of `grads`, and the last v."""
    p = np.asarray(p, np.float64)
    m, v = np.zeros_like(p), np.zeros([len(edges) - 1 for edges in edges_by_axis])
    for t, g in enumerate(np.asarray(grads, np.float64), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * block_mean(g * g, edges_by_axis)
        new = p.copy()
        for index, block in blocks_of(edges_by_axis):
            m_hat, v_hat = m[block] / (1 - b1**t), v[index] / (1 - b2**t)
            new[block] = p[block] - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p[block])
        p = new
    return p, v
