"""Measure on a small model whether the blocks are those of its Hessian."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini.labels import BlockSpecs, first_few, resolve_block_specs
from optax_adam_mini.product import Spec
from optax_adam_mini.sums import spread

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree

_LARGEST = 1 << 14  # coordinates of a parameter: a Hessian of 1 GiB in float32


@dataclasses.dataclass(frozen=True)
class BlockShare:
    """How much of a parameter's Hessian its blocks hold.

    Attributes:
        inside: share, from 0 to 1, of the absolute mass off the diagonal that
            lies inside blocks; nan where there is none, as of a loss that is
            linear in the parameter.
        chance: what random blocks of the same sizes would hold on average.
    """

    inside: float
    chance: float

    @property
    def ratio(self) -> float:
        """How many times more than random blocks of the same sizes; nan without any chance."""
        return self.inside / self.chance if self.chance else math.nan


def block_shares(
    loss: Callable[..., Any],
    params: PyTree[Array],
    block_specs: BlockSpecs,
    *args: Any,
) -> dict[str, BlockShare]:
    """How much of the Hessian of each parameter lies inside its blocks.

    The paper justifies one second moment per block by Hessians that are nearly
    block diagonal (section 2.1). This computes the exact Hessian of the loss
    with respect to one parameter at a time. Of its absolute values off the
    diagonal, it returns the share with both coordinates in one block.

    Args:
        loss: `loss(params, *args)`, a scalar, twice differentiable.
        params: pytree of arrays.
        block_specs: pytree of `BlockSpec` like the parameters, or a label
            function.
        *args: further arguments of the loss.

    Returns:
        By path, a `BlockShare` of every parameter, except those that are cut
        per coordinate (whose blocks have nothing off the diagonal), those of
        one block (which has everything), and integers.

    Raises:
        ValueError: if a parameter that is measured has more than 16,384
            coordinates, and a Hessian larger than 1 GiB, or if the specs do
            not fit the parameters.
        TypeError: if such a parameter is complex, or the loss no scalar.

    Examples:
        >>> loss = lambda p, x: ((x @ p["w"] - 1) ** 2).mean()  # no term has two neurons
        >>> block_shares(loss, {"w": jnp.ones((2, 3))}, per_neuron(), jnp.ones((5, 2)))["w"].inside
        1.0
    """
    leaves, treedef = jax.tree.flatten(params)
    labels = resolve_block_specs(block_specs, params)
    measured = {}  # the paths, by index
    for index, ((path, spec), leaf) in enumerate(zip(labels, leaves, strict=True)):
        grid = _grid(spec, jnp.shape(leaf))
        if math.prod(grid) in (1, jnp.size(leaf)) or not _is(leaf, jnp.inexact):
            continue
        if _is(leaf, jnp.complexfloating):
            raise TypeError(
                f"{path} {leaf.shape}: is {leaf.dtype}, and block_shares takes real parameters: "
                "measure its real and imaginary parts as two parameters"
            )
        if leaf.size > _LARGEST:
            raise ValueError(
                f"{path} {leaf.shape}: has {leaf.size:,} coordinates, and block_shares makes whole "
                f"Hessians, of at most {_LARGEST:,}: measure a smaller model"
            )
        measured[index] = path
    alike = [path for path, n in collections.Counter(measured.values()).items() if n > 1]
    if alike:
        raise ValueError(
            "block_shares returns shares by path, and two parameters have paths that read alike, "
            f"{first_few(alike)}: rename one"
        )

    def of_measured(xs: dict[int, Array]) -> Any:
        replaced = [xs.get(index, leaf) for index, leaf in enumerate(leaves)]
        return loss(jax.tree.unflatten(treedef, replaced), *args)

    matrices = hessians(of_measured, {index: leaves[index] for index in measured})
    return {
        measured[index]: block_share(matrix, labels[index][1], leaves[index].shape)
        for index, matrix in matrices.items()
    }


def block_share(matrix: Float[Array, "n n"], block_spec: Spec, shape: Sequence[int]) -> BlockShare:
    """How much of the Hessian of one parameter lies inside its blocks.

    Args:
        matrix: array `(n, n)`, in the order of the raveled parameter, as
            `hessians` gives it.
        block_spec: how the parameter is cut.
        shape: the parameter's shape, of `n` coordinates.

    Returns:
        A `BlockShare`.

    Raises:
        ValueError: if the spec or the matrix does not fit the shape.

    Examples:
        >>> block_share(jnp.ones((6, 6)), per_neuron(), (2, 3))  # all alike: as by chance
        BlockShare(inside=0.2, chance=0.2)
    """
    blocks = block_numbers(block_spec, shape)
    if jnp.shape(matrix) != (len(blocks), len(blocks)):
        raise ValueError(
            f"block_share: a Hessian of parameters of shape {tuple(shape)} has the shape "
            f"{(len(blocks), len(blocks))}, got {jnp.shape(matrix)}"
        )
    mass = np.abs(np.asarray(matrix, np.float64))
    np.fill_diagonal(mass, 0.0)
    sizes = np.bincount(blocks)
    inside = sum(mass[np.ix_(rows, rows)].sum() for rows in _members(blocks))
    chance = (sizes * (sizes - 1)).sum() / max(len(blocks) * (len(blocks) - 1), 1)
    total = mass.sum()
    return BlockShare(float(inside / total) if total else math.nan, float(chance))


def block_numbers(block_spec: Spec, shape: Sequence[int]) -> np.ndarray:
    """The number of the block that each coordinate is in.

    Args:
        block_spec: how a parameter is cut; of an `outer`, the blocks that hold
            a row and a column each.
        shape: the parameter's shape, of `n` coordinates.

    Returns:
        Integers `(n,)` from 0, in the order of the raveled parameter.

    Raises:
        ValueError: if the spec does not fit the shape.

    Examples:
        >>> block_numbers(per_head(2), (2, 4)).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]
    """
    grid = _grid(block_spec, shape)
    numbers = jnp.arange(math.prod(grid)).reshape(grid)
    return np.asarray(spread(numbers, block_spec.runs(shape), shape)).ravel()


def hessians(
    fn: Callable[[PyTree[Array]], Any], params: PyTree[Array], batch_size: int = 64
) -> PyTree[Float[np.ndarray, "n n"]]:
    """The exact Hessian of a scalar function in each of its arrays, the others held.

    Args:
        fn: `fn(params)`, a scalar, twice differentiable.
        params: pytree of real arrays; let `n` be how many coordinates one has.
        batch_size: how many columns are computed at once.

    Returns:
        A pytree like `params`, with an array `(n, n)` for each array, of its
        dtype and in the order of its raveled coordinates.

    Examples:
        >>> hessians(lambda p: p["x"][0] ** 2 * p["y"], {"x": jnp.array([1.0]), "y": 3.0})
        {'x': array([[6.]], dtype=float32), 'y': array([[0.]], dtype=float32)}
    """
    leaves, treedef = jax.tree.flatten(params)

    def hessian(index: int) -> np.ndarray:
        leaf = jnp.asarray(leaves[index])

        def of_leaf(flat: Array) -> Any:
            replaced = [*leaves[:index], flat.reshape(leaf.shape), *leaves[index + 1 :]]
            return fn(jax.tree.unflatten(treedef, replaced))

        column = lambda unit: jax.jvp(jax.grad(of_leaf), (leaf.ravel(),), (unit,))[1]
        units = jnp.eye(leaf.size, dtype=leaf.dtype)
        batched = jax.jit(lambda: jax.lax.map(column, units, batch_size=min(batch_size, leaf.size)))
        return np.asarray(batched())

    return jax.tree.unflatten(treedef, [hessian(index) for index in range(len(leaves))])


def _grid(block_spec: Spec, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(n for n, _ in runs) for runs in block_spec.runs(shape))


def _is(leaf: Any, kind: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), kind)


def _members(blocks: np.ndarray) -> list[np.ndarray]:
    """The coordinates of each block."""
    order = np.argsort(blocks, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1)
