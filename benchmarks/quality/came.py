"""CAME (Luo et al., arXiv 2307.02047), for comparison: Adafactor's factored second moment, with
shorter steps where the momentum disagrees with the updates that it averages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class ScaleByCameState(NamedTuple):
    """For each parameter, `mu` has an array of its shape, and `nu` and `instability` have factors.
    A vector has an unfactored `nu` and no `instability`."""

    mu: Any
    """The paper's m."""
    nu: Any
    """The paper's r and c: factors of the mean squared gradient."""
    instability: Any
    """The paper's R and C: factors of the mean squared distance of updates from the momentum."""


def factored_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The two largest axes; none for a vector, which is not factored."""
    return tuple(int(a) for a in np.argsort(shape, kind="stable")[-2:]) if len(shape) > 1 else ()


def means(x: jax.Array) -> tuple[jax.Array, ...]:
    """The means of `x` along each factored axis, or `x` itself."""
    return tuple(x.mean(axis, keepdims=True) for axis in factored_axes(x.shape)) or (x,)


def zero_factors(x: jax.Array) -> tuple[jax.Array, ...]:
    """The initial factors for `average`."""
    return means(jnp.zeros(x.shape, jnp.float32))


def average(decay: float, factors: tuple[jax.Array, ...], x: jax.Array) -> tuple[jax.Array, ...]:
    """Updates the exponential moving averages of `means` by one step."""
    return tuple(decay * f + (1 - decay) * m for f, m in zip(factors, means(x), strict=True))


def scale_by_came(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
) -> optax.GradientTransformation:
    """Algorithm 2 of the paper, without its learning rate. As in the authors' implementation, a
    vector's second moment is not factored and its momentum is not rescaled."""

    def over_root(x: jax.Array, factors: tuple[jax.Array, ...]) -> jax.Array:
        """x / sqrt(r c / mean(r)), with separate roots because r c may underflow."""
        if len(factors) == 1:
            return x / jnp.sqrt(factors[0])
        r, c = factors
        return x / jnp.sqrt(r / r.mean(factored_axes(x.shape)[1], keepdims=True)) / jnp.sqrt(c)

    def one_leaf(g, m, nu, instability):
        nu = average(b2, nu, g**2 + eps[0])
        u = over_root(g, nu)
        u = u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(u**2)) / clip_threshold)
        m = b1 * m + (1 - b1) * u
        if not instability:
            return m, m, nu, instability
        instability = average(b3, instability, (u - m) ** 2 + eps[1])
        return over_root(m, instability), m, nu, instability

    def init(params: optax.Params) -> ScaleByCameState:
        return ScaleByCameState(
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(zero_factors, params),
            instability=jax.tree.map(lambda p: zero_factors(p) if p.ndim > 1 else (), params),
        )

    def update(
        updates: optax.Updates, state: ScaleByCameState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByCameState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        moments = [treedef.flatten_up_to(part) for part in state]
        columns = zip(*map(one_leaf, leaves, *moments), strict=True)
        step, *parts = (treedef.unflatten(column) for column in columns)
        return step, ScaleByCameState(*parts)

    return optax.GradientTransformation(init, update)
