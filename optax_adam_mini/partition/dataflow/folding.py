"""Constant folding of indices: integers that the program fixes, and that JAX leaves unevaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_LARGEST = 1 << 12  # entries in an array of indices; masks and tables are larger


def is_index(aval: Any) -> bool:
    """Whether an array may hold indices: it is small, of integers or booleans."""
    dtype = getattr(aval, "dtype", None)
    return (
        isinstance(dtype, np.dtype) and dtype.kind in "iub" and int(np.prod(aval.shape)) <= _LARGEST
    )


def folded(
    name: str, operands: Sequence[np.ndarray], params: dict[str, Any], aval: Any
) -> np.ndarray | None:
    """The result of a primitive on known operands, or None if it cannot be folded."""
    if name not in _FOLDED or not (is_index(aval) or name == "broadcast_in_dim"):  # that is a view
        return None
    return np.asarray(_FOLDED[name](params, *operands), aval.dtype).reshape(aval.shape)


def _broadcast(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    where = params["broadcast_dimensions"]
    sizes = [1] * len(params["shape"])
    for axis, to in enumerate(where):
        sizes[to] = x.shape[axis]
    return np.broadcast_to(x.reshape(sizes), params["shape"])


def _iota(params: dict[str, Any]) -> np.ndarray:
    shape, axis = params["shape"], params["dimension"]
    sizes = [-1 if a == axis else 1 for a in range(len(shape))]
    return np.broadcast_to(np.arange(shape[axis]).reshape(sizes), shape)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *operands: function(*operands)


_FOLDED: dict[str, Callable[..., Any]] = {
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": _plain(np.multiply),
    "div": _plain(lambda x, y: (x - np.fmod(x, y)) // np.where(y == 0, 1, y)),
    "rem": _plain(lambda x, y: np.fmod(x, np.where(y == 0, 1, y))),
    "sign": _plain(np.sign),
    "and": _plain(np.bitwise_and),
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "neg": _plain(np.negative),
    "lt": _plain(np.less),
    "le": _plain(np.less_equal),
    "gt": _plain(np.greater),
    "ge": _plain(np.greater_equal),
    "eq": _plain(np.equal),
    "ne": _plain(np.not_equal),
    "select_n": _plain(lambda which, *cases: np.choose(which.astype(int), cases)),
    "clamp": _plain(lambda low, x, high: np.clip(x, low, high)),
    "convert_element_type": _plain(lambda x: x),
    "copy": _plain(lambda x: x),
    "squeeze": _plain(lambda x: x),
    "reshape": _plain(lambda x: x),
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda params, *xs: np.concatenate(xs, params["dimension"]),
    "transpose": lambda params, x: np.transpose(x, params["permutation"]),
    "rev": lambda params, x: np.flip(x, params["dimensions"]),
    "slice": lambda params, x: x[
        tuple(
            slice(*bounds)
            for bounds in zip(
                params["start_indices"],
                params["limit_indices"],
                params["strides"] or (1,) * x.ndim,
                strict=True,
            )
        )
    ],
}
