"""Parameters in bfloat16 without a float32 copy: rounded up or down at random, in proportion.

Rounding to nearest loses every step of less than half a unit in the last place, however often the
step is repeated. Rounding at random preserves the step in the mean.

The random numbers are a hash of the step, the parameter's path and the coordinate. No key is
stored, and they are the same on any mesh, in any process and after any restart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import path_of
from optax_adam_mini.messages import (
    check_counts,
    check_gradients,
    check_in_bfloat16,
    check_order,
)
from optax_adam_mini.random_bits import round_to_bfloat16, rounding_seeds, salt_of

if TYPE_CHECKING:
    from jaxtyping import Array, Int, PyTree


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        count: number of updates made, shape `()`, int32; the random numbers
            depend on it.
        inner_state: state of the transformation inside, for parameters in
            float32.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: PyTree


def stochastic_rounding(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 parameters as if in float32, and rounds them at random after each step.

    `inner` gets gradients and parameters in float32, also for weight decay,
    and its state is made for these. The new parameter, `p + u` in float32, is
    rounded to one of its two neighbours in bfloat16, with the probabilities
    that make `p + u` the mean. `update` returns the difference between the new
    parameter and the old one, in float32: `optax.apply_updates` adds it and
    gets exactly the new parameter. (In bfloat16 the difference would be
    rounded.)

    It must be the outermost wrapper: a later transformation would round to
    nearest again. Parameters in float32 or wider, and integers, are updated as
    without it. Call `init` under `jax.jit`: otherwise it makes float32 copies
    of the parameters.

    Args:
        inner: any transformation, in any chain or wrapper, whose updates are
            added to the parameters.

    Returns:
        The transformation; its state is a `StochasticRoundingState`.

    Raises:
        TypeError: if `inner` is not a transformation; if a parameter is in
            float16 or narrower; if an update is differentiated.
        ValueError: if no parameter is in bfloat16; in `update`, if `params`
            are missing, or the state is another transformation's.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 6), jnp.bfloat16)}
        >>> tx = stochastic_rounding(adam_mini(1e-3, mu_dtype=jnp.int8))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> optax.apply_updates(params, updates)["kernel"].dtype
        dtype(bfloat16)

    References:
        Zamirai et al., [Revisiting BFloat16
        Training](https://arxiv.org/abs/2010.06192).
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"stochastic_rounding: expected a transformation, got {inner!r}: for example "
            "stochastic_rounding(adam_mini(1e-3))"
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> StochasticRoundingState:
        check_in_bfloat16(params)
        return StochasticRoundingState(jnp.zeros([], jnp.int32), inner.init(_widened(params)))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError(
                "stochastic_rounding rounds the parameters, and update got none: call "
                "tx.update(grads, state, params)"
            )
        if not isinstance(state, StochasticRoundingState):
            raise ValueError(
                "stochastic_rounding: expected the StochasticRoundingState that init made, got a "
                f"{type(state).__name__}: call tx.update(grads, state, params), in this order; the "
                "state of the transformation inside goes into its field inner_state"
            )
        check_in_bfloat16(params)
        check_order(updates)
        check_gradients(updates, params)
        check_counts(state)
        count = jnp.asarray(optax.safe_increment(state.count))

        def round_leaf(seed: Any, u: Any, p: Any) -> Any:
            if u is None or not _is_bfloat16(p):
                return u
            old = p.astype(jnp.float32)
            new = round_to_bfloat16((old + u).astype(jnp.float32), seed)
            # Adding -0.0 changes nothing: infinity stays, and zero keeps its sign.
            return jnp.where(new == old, -0.0, new - old)

        updates, inner_state = inner.update(
            _widened(updates), state.inner_state, _widened(params), **extra_args
        )
        salts = [salt_of((path_of(keys), "params")) for keys, _ in leaves_with_path(params)]
        leaves, treedef = jax.tree.flatten(params)
        seeds = rounding_seeds(count, salts)
        rounded = list(map(round_leaf, seeds, treedef.flatten_up_to(updates), leaves))
        return jax.tree.unflatten(treedef, rounded), StochasticRoundingState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_bfloat16(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.bfloat16


def _widened(tree: Any) -> Any:
    is_narrow = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4

    def widen(x: Any) -> Any:
        if not (hasattr(x, "dtype") and is_narrow(x)):
            return x
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        return x.update(dtype=jnp.float32) if is_shape else x.astype(jnp.float32)

    return jax.tree.map(widen, tree)
