"""Measure on a small model whether the blocks are those of its Hessian."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_adam_mini.blocks import BlockSpec, LabelFn, resolve_block_specs

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree

_LARGEST = 1 << 14  # coordinates of a parameter: a Hessian of 1 GiB in float32


@dataclasses.dataclass(frozen=True)
class BlockShare:
    """How much of a parameter's Hessian its blocks hold.

    Attributes:
        inside: share, from 0 to 1, of the absolute mass off the diagonal that lies inside blocks;
            nan where there is none, as of a loss that is linear in the parameter.
        chance: what random blocks of the same sizes would hold on average.
    """

    inside: float
    chance: float

    @property
    def ratio(self) -> float:
        """How many times more than random blocks of the same sizes."""
        return self.inside / self.chance


def block_shares(
    loss: Callable[..., Any],
    params: PyTree[Array],
    block_specs: PyTree[BlockSpec] | LabelFn,
    *args: Any,
) -> dict[str, BlockShare]:
    """How much of the Hessian of each parameter lies inside its blocks.

    The paper's case for one second moment a block is that Hessians are close to block diagonal
    (section 2.1). This measures it: the exact Hessian of the loss with respect to one parameter at
    a time, and the share of its absolute values off the diagonal, where both coordinates are in
    one block.

    Args:
        loss: `loss(params, *args)`, a scalar, twice differentiable.
        params: pytree of arrays.
        block_specs: pytree of [`BlockSpec`][] like the parameters, or a label function.
        *args: further arguments of the loss.

    Returns:
        By path, a [`BlockShare`][] of every parameter whose blocks can hold something: those with
        one coordinate a block have nothing off the diagonal inside, and one block holds it all.
        Integers are no parameters of a Hessian and are left out as well.

    Raises:
        ValueError: if a parameter that is measured has more than 16,384 coordinates, and a Hessian
            larger than 1 GiB, or if the specs do not fit the parameters.
        TypeError: if such a parameter is complex, or the loss no scalar.

    Examples:
        >>> loss = lambda p, x: ((x @ p["w"] - 1) ** 2).mean()  # in it, neurons do not meet
        >>> block_shares(loss, {"w": jnp.ones((2, 3))}, per_neuron(), jnp.ones((5, 2)))["w"].inside
        1.0
    """
    leaves, treedef = jax.tree.flatten(params)
    labels = resolve_block_specs(block_specs, params)
    measured = {}  # by index: the path and the grid
    for index, ((path, spec), leaf) in enumerate(zip(labels, leaves, strict=True)):
        grid = spec.grid(jnp.shape(leaf))
        if math.prod(grid) in (1, jnp.size(leaf)) or not _is(leaf, jnp.inexact):
            continue
        if _is(leaf, jnp.complexfloating):
            raise TypeError(
                f"{path} {leaf.shape}: is {leaf.dtype}, and block_shares takes real parameters: "
                "measure its real and imaginary parts as two"
            )
        if leaf.size > _LARGEST:
            raise ValueError(
                f"{path} {leaf.shape}: has {leaf.size:,} coordinates, and block_shares makes whole "
                f"Hessians, of at most {_LARGEST:,}: measure a smaller model"
            )
        measured[index] = path, grid
    found = {}
    for index, (path, grid) in measured.items():
        leaf, (_, spec) = leaves[index], labels[index]

        def of_leaf(x: Array, index: int = index) -> Any:
            replaced = [*leaves[:index], x, *leaves[index + 1 :]]
            return loss(jax.tree.unflatten(treedef, replaced), *args)

        mass = np.abs(np.asarray(hessian(of_leaf, leaf), np.float64))
        np.fill_diagonal(mass, 0.0)
        numbers = jnp.arange(math.prod(grid)).reshape(grid)
        blocks = np.asarray(spec.spread(numbers, leaf.shape)).ravel()
        sizes = np.bincount(blocks)
        inside = sum(mass[np.ix_(rows, rows)].sum() for rows in _members(blocks))
        chance = (sizes * (sizes - 1)).sum() / (leaf.size * (leaf.size - 1))
        total = mass.sum()
        found[path] = BlockShare(float(inside / total) if total else math.nan, float(chance))
    return found


def hessian(fn: Callable[[Array], Any], x: Array, batch_size: int = 64) -> Float[Array, "n n"]:
    """The exact Hessian of a scalar function of one array.

    Args:
        fn: `fn(x)`, a scalar.
        x: array of `n` coordinates.
        batch_size: how many of its columns are computed at once.

    Returns:
        Array `(n, n)` of the dtype of `x`, in the order of `x.ravel()`.

    Examples:
        >>> hessian(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0])).tolist()
        [[4.0, 2.0], [2.0, 0.0]]
    """
    gradient = jax.grad(lambda flat: fn(flat.reshape(x.shape)))
    flat = jnp.ravel(x)

    @jax.jit
    def columns(directions: Array) -> Array:
        column = lambda direction: jax.jvp(gradient, (flat,), (direction,))[1]
        return jax.lax.map(column, directions, batch_size=min(batch_size, len(flat)))

    return columns(jnp.eye(len(flat), dtype=flat.dtype))


def _is(leaf: Any, kind: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), kind)


def _members(blocks: np.ndarray) -> list[np.ndarray]:
    """The coordinates of each block."""
    order = np.argsort(blocks, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1)
