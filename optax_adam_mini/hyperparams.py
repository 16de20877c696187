"""Which hyper-parameters are refused: out of range, of another type, of another shape."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
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


def check_in_range(**hyperparams: Any) -> None:
    """Refuses arrays that are out of range, where their values can be known.

    `optax.inject_hyperparams` makes arrays of the parameters' dtype, in which 0.999 may be 1.

    Raises:
        ValueError: if one is; a traced array passes.
    """
    for name, value in hyperparams.items():
        if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
            continue
        number, upper = float(value), 1.0 if name in ("b1", "b2") else math.inf
        if not 0 <= number < upper:
            remedy = (
                ": 0.999 rounds to 1 in it; pass hyperparam_dtype=jnp.float32 to "
                "optax.inject_hyperparams"
                if number == 1 and value.dtype.itemsize < 4
                else ""
            )
            expected = "in [0, 1)" if upper == 1 else "at least 0"
            raise ValueError(f"{name} must be {expected}, got {number} in {value.dtype}{remedy}")


def check_param_dtype(path: str, dtype: Any, mu_dtype: Any = None) -> None:
    """Refuses what cannot be trained with a moment of its own dtype, or of `mu_dtype`.

    Raises:
        TypeError: for random keys, for floats of 8 bits and fewer, which JAX promotes to nothing,
            and for complex numbers with a moment in 8 bits.
    """
    if mu_dtype == jnp.int8 and jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{path}: mu_dtype=int8 keeps real numbers, and the parameter is {dtype}: leave "
            "mu_dtype out, or give these parameters an optimizer of their own "
            "(optax.multi_transform)"
        )
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise TypeError(
            f"{path}: expected numbers, got dtype {dtype}: keep random keys out of the parameters "
            "(in NNX, wrt=nnx.Param; in Equinox, eqx.filter(model, eqx.is_inexact_array))"
        )
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 2:
        raise TypeError(
            f"{path}: expected float32, bfloat16 or float16, got {dtype}: too few digits for steps "
            "to add up; keep the parameters in bfloat16 or wider, and cast them in the model"
        )


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
        TypeError: if it is none of floating-point numbers, nor int8.
    """
    if mu_dtype is None:
        return None
    try:
        dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    except TypeError:
        dtype = None
    if dtype is None or not (jnp.issubdtype(dtype, jnp.inexact) or dtype == jnp.int8):
        raise TypeError(f"mu_dtype must be a floating-point dtype or jnp.int8, got {mu_dtype!r}")
    return dtype


def _check_scalar(
    name: str, value: Any, minimum: float | None, below: float | None, kind: str = "a number"
) -> None:
    if isinstance(value, (jax.Array, np.ndarray)):
        if value.shape != ():
            raise ValueError(f"{name} must be {kind}, got an array of shape {value.shape}")
        if isinstance(value, jax.Array):  # may be traced: init looks at its value
            return
        value = value.item()
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
