"""Which hyper-parameters are refused: out of range, of another type, of another shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_hyperparams(**hyperparams: Any) -> None:
    """Refuses decay rates that are not in [0, 1), and other numbers below 0.

    Raises:
        TypeError: if one is no number; a traced array passes.
        ValueError: if one is out of range, or an array that is no scalar.
    """
    for name, value in hyperparams.items():
        upper = 1.0 if name in ("b1", "b2") else None
        _check_scalar(name, value, 0.0, upper)


def check_scalar_or_schedule(name: str, value: Any, minimum: float | None) -> None:
    """Refuses what is neither a schedule nor a number of at least `minimum`.

    Raises:
        TypeError, ValueError: as [`check_hyperparams`][].
    """
    if not callable(value):
        _check_scalar(name, value, minimum, None, "a number or a schedule")


def check_mu_dtype(mu_dtype: Any) -> np.dtype | None:
    """The dtype, as JAX has it.

    Raises:
        TypeError: if it is none of floating-point numbers.
    """
    if mu_dtype is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"mu_dtype must be a floating-point dtype, got {mu_dtype!r}")
    return dtype


def _check_scalar(
    name: str, value: Any, minimum: float | None, below: float | None, kind: str = "a number"
) -> None:
    if isinstance(value, (jax.Array, np.ndarray)):  # may be traced: only its shape can be checked
        if value.shape != ():
            raise ValueError(f"{name} must be {kind}, got an array of shape {value.shape}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.generic)):
        if callable(value):
            raise TypeError(
                f"{name} must be {kind}, got the function {value!r}: for a schedule, wrap the "
                "optimizer in optax.inject_hyperparams"
            )
        raise TypeError(f"{name} must be {kind}, got {value!r} of type {type(value).__name__}")
    value = float(value)
    allowed = (minimum is None or value >= minimum) and (below is None or value < below)
    if not allowed or value != value:
        expected = f"in [{minimum:g}, {below:g})" if below is not None else f"at least {minimum:g}"
        raise ValueError(f"{name} must be {expected}, got {value}")
