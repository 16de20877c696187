"""One compiled program for a transformation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax


def compiled(
    factory: Callable[..., Any], **hyperparams: Any
) -> optax.GradientTransformationExtraArgs:
    """`factory(**hyperparams)`, its update compiled as one program.

    Hyper-parameters that are arrays (`optax.inject_hyperparams` passes such) are arguments of the
    program, so that new values do not compile it again.
    """
    leaves, treedef = jax.tree.flatten(hyperparams)
    is_array = lambda x: isinstance(x, (jax.Array, np.ndarray, np.generic))
    arrays = tuple(x if is_array(x) else None for x in leaves)
    static = _Static(factory, tuple(None if is_array(x) else x for x in leaves), treedef)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        return _update(static, arrays, updates, state, _with_gradients(updates, params))

    return optax.GradientTransformationExtraArgs(static.build(arrays).init, update_fn)


class _Static:
    """The hyper-parameters of a transformation that are not arrays: a key of the jit cache."""

    def __init__(self, factory: Callable[..., Any], leaves: tuple[Any, ...], treedef: Any):
        self.factory, self.leaves, self.treedef = factory, leaves, treedef
        self._hash = hash((factory, leaves, treedef))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and (self.factory, self.leaves, self.treedef) == (
            other.factory,
            other.leaves,
            other.treedef,
        )

    def build(self, arrays: Any) -> optax.GradientTransformationExtraArgs:
        leaves = [s if a is None else a for s, a in zip(self.leaves, arrays, strict=True)]
        return self.factory(**jax.tree.unflatten(self.treedef, leaves))


def _with_gradients(updates: Any, params: Any) -> Any:
    """`params` without the leaves whose gradient is None, which may be anything.

    Of an Equinox model's leaves some are functions, and no argument of a compiled program.
    """
    is_none = lambda x: x is None
    if params is None or jax.tree.structure(updates) == jax.tree.structure(params):
        return params
    keep = lambda g, p: jax.tree.map(lambda _: None, p) if g is None else p
    try:
        return jax.tree.map(keep, updates, params, is_leaf=is_none)
    except ValueError:  # of another structure, which update itself says better
        return params


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _update(static: _Static, arrays: Any, updates: Any, state: Any, params: Any) -> Any:
    return static.build(arrays).update(updates, state, params)
