"""Which hyper-parameters are refused: out of range, of another type, of another shape."""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def check_hyperparams(*, are_known: bool = False, **hyperparams: Any) -> dict[str, Any]:
    """Refuses decay rates that are not in [0, 1), and other numbers below 0.

    `optax.inject_hyperparams` makes arrays of the parameters' dtype, in which 0.999 may be 1 and
    1e-8 may be 0.

    Args:
        are_known: whether to read arrays, which waits until they are computed; traced arrays are
            never read.
        hyperparams: numbers and arrays, by name.

    Returns:
        The same, numbers as Python's.

    Raises:
        TypeError: if one is no number.
        ValueError: if one is out of range, or an array that is no scalar.
    """
    decays = ("b1", "b2", "beta", "adam_b1", "adam_b2")
    return {
        name: _checked(name, value, 1.0 if name in decays else math.inf, "a number", are_known)
        for name, value in hyperparams.items()
    }


def check_is_bool(**hyperparams: Any) -> None:
    """Refuses what is not True or False.

    Raises:
        TypeError: if one is not.
    """
    for name, value in hyperparams.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(
                f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
                + _STATIC_ARGS * isinstance(value, jax.Array)
            )


def check_count(name: str, value: Any) -> int:
    """Refuses anything but a whole number of at least 1 that is known before compilation.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        hint = (
            f": optax.inject_hyperparams takes it for a hyper-parameter; tell it not to, "
            f'static_args=("{name}", ...)'
        )
        raise TypeError(
            f"{name} must be a whole number, got {value!r} of type {type(value).__name__}"
            + hint * isinstance(value, jax.Array)
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_param_dtype(path: str, dtype: Any, mu_dtype: Any = None) -> None:
    """Refuses dtypes that cannot be trained.

    Raises:
        TypeError: for random keys; for floats of 8 bits and fewer, which JAX does not promote; for
            complex parameters with a `mu_dtype`, because that is a dtype of real numbers.
    """
    path = path or "params"
    if mu_dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{path}: mu_dtype={mu_dtype} keeps real numbers, and the parameter is {dtype}: leave "
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
            f"{path}: expected float32, bfloat16 or float16, got {dtype}, in which small "
            "steps are rounded away: keep the parameters in bfloat16 or wider, and cast them in "
            "the model"
        )


def check_scalar_or_schedule(name: str, value: Any) -> Any:
    """Refuses what is neither a finite number of at least 0 nor a schedule that returns one.

    Returns:
        The number, as one of Python's, or the schedule.

    Raises:
        TypeError, ValueError: as `check_hyperparams`.
    """
    kind = "a number or a schedule"
    if not callable(value):
        return _checked(name, value, math.inf, kind, False)
    schedule: Any = value
    if hasattr(value, "made_by"):  # by a function of this package, which makes label functions
        raise TypeError(f"{name}: expected {kind}, got the label function {value!r}")
    try:
        takes = inspect.signature(schedule)
    except (TypeError, ValueError):  # some functions that are written in C have none
        takes = inspect.Signature([inspect.Parameter("count", inspect.Parameter.POSITIONAL_ONLY)])
    try:
        takes.bind(0)
    except TypeError:
        named = getattr(schedule, "__name__", type(schedule).__name__)
        raise TypeError(
            f"{name}: expected a schedule, a function count -> number, got "
            f"{named}({', '.join(takes.parameters)}): if this function makes a schedule, call it "
            "and pass what it returns"
        ) from None
    returned: list[Any] = []

    def first(step: Any) -> None:
        returned.append(schedule(step))

    try:  # with an abstract step: optimizers may be built before jax.distributed.initialize
        jax.eval_shape(first, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception:  # the first update raises it, or it takes no abstract step
        return value
    _check_returned(name, returned[0])
    return value


def check_first_values(**schedules: Any) -> None:
    """Refuses schedules whose value at step 0 is out of range.

    Raises:
        TypeError, ValueError: as `check_hyperparams`.
    """
    for name, schedule in schedules.items():
        try:
            returned = schedule(jnp.zeros([], jnp.int32))
        except Exception:  # the first update raises it
            continue
        _check_returned(name, returned)


def _check_returned(name: str, returned: Any) -> None:
    if callable(returned):
        raise TypeError(
            f"{name}: expected a schedule, a function count -> number, got one that returns the "
            f"function {returned!r}: call it"
        )
    if returned is None or (not jnp.isscalar(returned) and jnp.shape(returned) != ()):
        raise ValueError(
            f"{name}: the schedule returned {returned!r} for step 0, expected a number: a schedule "
            "is a function count -> number"
        )
    _checked(f"{name}: what the schedule returns for step 0", returned, math.inf, "a number", True)


def check_mu_dtype(mu_dtype: Any) -> np.dtype | None:
    """Checks `mu_dtype`, and returns it as NumPy's; without x64, float64 becomes float32.

    Raises:
        TypeError: if it is neither int8 nor a dtype of real floating-point numbers of at least 16
            bits.
    """
    if mu_dtype is None:
        return None
    if isinstance(mu_dtype, (jax.Array, np.ndarray, np.generic, bool)):  # with dtypes of their own
        hint = _STATIC_ARGS * isinstance(mu_dtype, jax.Array)
        raise TypeError(f"mu_dtype must be a dtype, got the value {mu_dtype!r}{hint}")
    try:
        dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    except TypeError:
        dtype = None
    is_wide = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    if not (is_wide or dtype == jnp.int8):
        raise TypeError(
            f"mu_dtype must be a floating-point dtype or jnp.int8, got {mu_dtype!r}"
            + ": pass jnp.int8 for 8 bits" * (dtype is not None and dtype.itemsize == 1)
        )
    return dtype


_STATIC_ARGS = (
    ": optax.inject_hyperparams takes it for a hyper-parameter; tell it not to, static_args=("
    '"mu_dtype", "block_specs", "nesterov", "bounded")'
)


def _checked(name: str, value: Any, below: float, kind: str, is_known: bool) -> Any:
    if isinstance(value, (jax.Array, np.ndarray)):
        if value.shape != ():
            raise ValueError(f"{name} must be {kind}, got an array of shape {value.shape}")
        if not _is_real(value.dtype):
            raise TypeError(f"{name} must be {kind}, got an array of {value.dtype}")
        if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and not is_known):
            if name == "eps" and value.dtype == jnp.float16 and is_known:
                raise ValueError(
                    f"eps is in float16, in which the usual 1e-8 is 0{_WIDER}, or call init "
                    "outside jax.jit, where its value is known"
                )
            return value
    elif isinstance(value, bool) or not (
        isinstance(value, (int, float)) or (isinstance(value, np.generic) and _is_real(value.dtype))
    ):
        if callable(value):
            raise TypeError(
                f"{name} must be {kind}, got the function {value!r}: for a schedule, wrap the "
                "optimizer in optax.inject_hyperparams"
            )
        raise TypeError(f"{name} must be {kind}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not 0 <= number < below:
        expected = "in [0, 1)" if below == 1 else "at least 0" + ", and finite" * (number > 0)
        dtype = f" in {value.dtype}" if isinstance(value, jax.Array) else ""
        is_narrow = isinstance(value, jax.Array) and value.dtype.itemsize < 4
        remedy = f": 0.999 rounds to 1 in it{_WIDER}" if is_narrow and number == 1 else ""
        raise ValueError(f"{name} must be {expected}, got {number}{dtype}{remedy}")
    if name == "eps" and number == 0 and isinstance(value, jax.Array) and value.dtype.itemsize < 4:
        raise ValueError(f"eps is 0 in {value.dtype}, in which 1e-8 is 0{_WIDER}")
    return value if isinstance(value, jax.Array) else number


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


_WIDER = "; pass hyperparam_dtype=jnp.float32 to optax.inject_hyperparams"
