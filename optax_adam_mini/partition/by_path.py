"""`by_path`: block specs by rules over the parameters' paths."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import (
    LabelFn,
    check_default,
    check_is_params,
    check_used,
    compiled_rules,
    completed,
    label,
    path_str,
)
from optax_adam_mini.product import Spec


def by_path(
    rules: Sequence[tuple[str, Spec]],
    default: Spec | LabelFn | None = None,
) -> LabelFn:
    """Makes a label function from rules over the parameters' paths.

    Args:
        rules: pairs `(pattern, spec)`. The first whose regular expression is
            found (`re.search`) in a parameter's path `"a/b/c"` gives its spec.
        default: spec, or label function, for parameters that no rule matches;
            None makes such a parameter an error. A function is called with all
            parameters.

    Returns:
        A label function `params -> pytree of BlockSpec`, for params that are
        arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        TypeError, ValueError: here if a rule is not a regular expression and a
            spec; from the label function if a rule matches no parameter, or if
            no rule matches a parameter and there is no default.

    Examples:
        >>> label = by_path([("embed", per_token()), ("mlp", per_neuron())], default=per_tensor())
        >>> params = {"embed": jnp.ones((9, 2)), "mlp": {"kernel": jnp.ones((2, 4))}}
        >>> specs = label(params)
        >>> specs["embed"] == per_token(), specs["mlp"]["kernel"] == per_neuron()
        (True, True)
    """
    compiled = compiled_rules("by_path", rules)
    check_default("by_path", default)

    made = functools.partial(_label, compiled, default)
    said = [(pattern.pattern, spec) for pattern, spec in compiled]
    return label("by_path", [said], {"default": default}, made)


def _label(
    rules: list[tuple[re.Pattern[str], Spec]],
    default: Spec | LabelFn | None,
    params: Any,
    needed: Sequence[bool] | None = None,
) -> Any:
    """The specs of `params`; a module-level function, so that it can be pickled."""
    check_is_params("by_path", params)
    paths = [path_str(keys) for keys, _ in leaves_with_path(params)]
    for rule, _ in rules:
        check_used(f"by_path: the rule {rule.pattern!r}", rule.search, rule.pattern, params)
    specs = [next((s for rule, s in rules if rule.search(path)), None) for path in paths]
    return completed("by_path", params, specs, default, lambda _, leaf: jnp.shape(leaf), needed)
