"""Errors of `update` and `init` about states, gradients and masks that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import first_few, is_empty, is_label_function, path_of, path_str
from optax_adam_mini.product import Spec

_CONVERT = "convert it, from_adam_state(state, params, block_specs)"
_OTHER_SPECS = (
    "the state was made with other block specs: pass those, or convert it, "
    "from_adam_state(to_adam_state(state, params, its_specs), params, block_specs)"
)
_LIKE_ADAMS = f"if it is the state of optax.adam or optax.adamw, {_CONVERT}; or {_OTHER_SPECS}"


def check_order(updates: Any) -> None:
    """Refuses a state where gradients are expected.

    Raises:
        ValueError: if `updates` contains a state.
    """
    is_state = lambda x: {"count", "mu", "nu"} <= {*getattr(x, "_fields", ())}
    if any(map(is_state, jax.tree.leaves(updates, is_leaf=is_state))):
        raise ValueError(
            "update: got a state in the place of the gradients: call tx.update(grads, state, "
            "params), in this order"
        )


def check_is_state(state: Any) -> None:
    """Refuses the state of another transformation.

    Raises:
        ValueError: if `state` is such a state.
    """
    if isinstance(state, optax.ScaleByAdamState):
        raise ValueError(f"update: got the state of optax.adam or optax.adamw: {_CONVERT}")
    if not all(hasattr(state, name) for name in ("count", "mu", "nu")):
        raise ValueError(f"update: expected the state that init made, got a {type(state).__name__}")
    check_counts(state)


def check_counts(state: Any) -> None:
    """Refuses a count that was cast to a float: in bfloat16 it stays at 256.

    Raises:
        TypeError: if the state has no numbers.
        ValueError: if the count was cast.
    """
    if isinstance(state.count, jax.ShapeDtypeStruct):
        raise TypeError(
            "got a state of shapes without numbers, such as the template of a restore: "
            "pass the state that the restore returned, or the one that init made"
        )
    if not jnp.issubdtype(jnp.result_type(state.count), jnp.integer):
        raise ValueError(
            f"update: the state's count was cast to {jnp.result_type(state.count)}, which cannot "
            "represent every step: do not cast an optimizer state, and restore it in the dtypes it "
            "was saved in"
        )


def check_is_chain(state: Any, length: int) -> None:
    """Refuses anything but the state of a chain of `length` transformations.

    Raises:
        ValueError: if `state` is anything else.
    """
    if type(state) in (tuple, list) and len(state) == length:
        return
    of_others = f" of {len(state)}" if type(state) in (tuple, list) else ""
    if of_others == " of 2" and length == 3 and hasattr(state[0], "mu"):
        of_others += (
            " (optax.adam has no weight decay: its state continues in optax.chain("
            "scale_by_adam_mini(...), optax.scale_by_learning_rate(...)))"
        )
    raise ValueError(
        f"update: expected the state that init made, a tuple of {length}, got a "
        f"{type(state).__name__}{of_others}: call tx.update(grads, state, params), in this order, "
        "with the state of the same transformation"
    )


def check_grids(
    labels: Sequence[tuple[str, Spec]], shapes: Sequence[Any], nu: Sequence[Any]
) -> None:
    """Refuses second moments whose shapes are not the specs' grids.

    Raises:
        ValueError: if a shape differs; the message names the parameter.
    """
    found = [jax.tree.map(jnp.shape, v) for v in nu]
    is_like_adams = found == [shape.shape for shape in shapes]
    for (path, spec), shape, grid in zip(labels, shapes, found, strict=True):
        if grid != (expected := spec.grid(shape.shape)):
            raise ValueError(
                f"{path or 'params'}: the state's nu has shape {grid}, but {spec} cuts the shape "
                f"{shape.shape} into the grid {expected}: "
                + (_LIKE_ADAMS if is_like_adams else _OTHER_SPECS)
            )


def check_gradient(path: str, shape: Any, gradient: Any) -> None:
    """Refuses a gradient that does not have the shape, or the kind of numbers, of its parameter.

    Raises:
        TypeError: if a parameter has a gradient of integers, booleans, or floats of 8 bits, or a
            real parameter has one of complex numbers.
        ValueError: if the gradient has another shape.
    """
    check_shape(path, "gradient", shape.shape, gradient)
    if gradient is None or not jnp.issubdtype(shape.dtype, jnp.inexact):
        return
    dtype = jnp.result_type(gradient)
    is_real = jnp.issubdtype(shape.dtype, jnp.floating)
    kind = jnp.floating if is_real else jnp.inexact
    if not jnp.issubdtype(dtype, kind) or dtype.itemsize < 2:
        remedy = ", or take the gradient of a real loss" * (dtype.itemsize > 1)
        raise TypeError(
            f"{path or 'params'}: got a gradient of {dtype} for a parameter of {shape.dtype}: cast "
            f"it{remedy}"
        )


def check_shape(path: str, what: str, shape: tuple[int, ...], array: Any) -> None:
    """Refuses a gradient, or a parameter, of another shape than the state was made for.

    Raises:
        ValueError: if it has another shape.
    """
    if array is not None and jnp.shape(array) != shape:
        raise ValueError(
            f"{path or 'params'}: got a {what} of shape {jnp.shape(array)}, but the state was "
            f"made for a parameter of shape {shape}: call update with the parameters given to "
            "init, and with their gradients"
        )


def check_gradients(updates: Any, params: Any) -> list[tuple[str, Any]]:
    """Refuses gradients that do not fit the parameters.

    Returns:
        The path and the gradient of every parameter; None where there is no gradient.

    Raises:
        TypeError, ValueError: as `check_gradient`; also if the structures differ.
    """
    paths = [path_str(keys) or "params" for keys, _ in leaves_with_path(params)]
    grads = list(zip(paths, leaves_as(params, "gradients", updates), strict=True))
    for (path, g), p in zip(grads, jax.tree.leaves(params), strict=True):
        if g is not None:
            check_gradient(path, jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), g)
    return grads


def check_has_gradients(updates: Any, params: Any) -> None:
    """Refuses gradients that do not fit `params`, and None, which `optax.partition` misplaces.

    Raises:
        TypeError, ValueError: as `check_gradients`; also if a gradient is None.
    """
    if params is None:
        return
    missing = [path for path, g in check_gradients(updates, params) if g is None]
    if missing:
        raise ValueError(
            f"the gradients at {first_few(missing)} are None, and muon_mini needs one for every "
            "parameter: pass zeros, or set these parameters to None in init and in update"
        )


def check_given_mask(what: str, mask: Any) -> None:
    """Refuses anything but a pytree of booleans and a function, and a single boolean.

    `optax.inject_hyperparams` calls a mask function with the step, and passes on a single boolean.

    Args:
        what: the name of the argument.
        mask: what was given.

    Raises:
        TypeError: if it is refused.
    """
    if isinstance(mask, type):
        raise TypeError(f"{what}: expected a pytree of booleans or a function, got {mask!r}")
    if isinstance(mask, bool | np.bool_ | jax.Array):
        raise TypeError(
            f"{what}: expected a pytree of booleans or a function, got {mask!r}: if it was a "
            "function, optax.inject_hyperparams took it for a schedule: name the argument in "
            "static_args; if everything decays, leave the mask out; if nothing does, set the "
            "weight decay to 0"
        )
    check_mask_leaves(what, mask)


def check_mask_leaves(what: str, mask: Any) -> None:
    """Refuses a mask that is neither a pytree of booleans nor a function that returns one.

    Raises:
        TypeError: if a leaf of `mask` is anything else.
    """
    for keys, value in leaves_with_path(mask):
        is_array = hasattr(value, "dtype") and value.dtype == jnp.bool_ and value.shape == ()
        is_function = callable(value) and not keys  # `init` checks what the function returns
        if not (isinstance(value, bool) or is_array or is_function):
            raise TypeError(
                f"{what}{'' if not keys else ' at ' + path_str(keys)}: expected True or False, got "
                f"{value!r}: give a pytree of booleans like the parameters, or a function that "
                "returns one"
            )


def check_mask(what: str, mask: Any, params: Any) -> None:
    """Refuses a mask that does not have the structure of the parameters.

    Raises:
        ValueError: if the structure differs.
    """
    if is_empty(params):  # such as the placeholder of `optax.tree.map_params`
        return
    if is_label_function(mask):
        mask = mask(params)
        check_mask_leaves(what, mask)
        if mask is None:
            raise ValueError(f"{what}: the function returned None, expected a pytree of booleans")
    if mask is None:
        return
    try:
        jax.tree.map(lambda _, p: None, mask, params)
    except ValueError as error:
        raise ValueError(
            f"{what} must have the structure of the parameters, or be a prefix of it: {error}"
        ) from None


def leaves_as(like: Any, what: str, tree: Any) -> list[Any]:
    """The leaves of `tree`, which must have the structure of `like`; None counts as a leaf.

    Raises:
        ValueError: if it has another structure; the message says where.
    """
    try:
        leaves = jax.tree.structure(like).flatten_up_to(tree)
        if jax.tree_util.all_leaves([leaf for leaf in leaves if leaf is not None]):
            return leaves
    except ValueError:
        pass
    is_none = lambda x: x is None
    got = [path_str(keys) for keys, _ in leaves_with_path(tree, is_leaf=is_none)]
    expected = [path_str(keys) for keys, _ in leaves_with_path(like)]
    if type(tree) is not type(like):
        said = [f"got a {type(tree).__name__}, expected a {type(like).__name__}"]
        if isinstance(tree, tuple) and len(tree) == 2:
            said += ["jax.value_and_grad returns the pair (loss, gradients): pass the gradients"]
    else:
        missing = [path for path in expected if path not in got]
        present = [path_str(keys) for keys, _ in leaves_with_path(tree)]
        surplus = [path for path in present if path not in expected]
        said = [f"got nothing for {first_few(missing)}"] if missing else []
        said += [f"got {first_few(surplus)}, which the parameters do not have"] if surplus else []
    if not said:
        said = [f"got {jax.tree.structure(tree)}, expected {jax.tree.structure(like)}"]
    raise ValueError(
        f"update: the {what} must have the structure of the parameters given to init: "
        + "; ".join(said)
    )


def check_in_bfloat16(params: Any) -> None:
    """Refuses parameters that `stochastic_rounding` cannot round, and trees without bfloat16.

    Raises:
        TypeError: if one is in float16 or narrower.
        ValueError: if none is in bfloat16.
    """
    dtypes = {path_of(keys): getattr(p, "dtype", None)
              for keys, p in leaves_with_path(params)}  # fmt: skip
    for path, dtype in dtypes.items():
        is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        if is_float and dtype != jnp.bfloat16 and jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f"{'/'.join(path) or 'params'}: expected bfloat16, or float32 and wider, which are "
                f"left alone; got {dtype}, which turns small parameters and gradients into 0 "
                "before they can be rounded: keep the parameters in bfloat16"
            )
    if dtypes and jnp.bfloat16 not in dtypes.values():
        path, dtype = next(iter(dtypes.items()))
        raise ValueError(
            "stochastic_rounding: expected parameters in bfloat16, and found none "
            f"({'/'.join(path) or 'params'} is {dtype}): leave it out, or cast them, "
            "jax.tree.map(lambda p: p.astype(jnp.bfloat16), params). If they were in bfloat16 at "
            "init, the function that adds the updates has widened them (eqx.apply_updates does): "
            "use optax.apply_updates"
        )


def check_has_state(what: str, wanted: str, others: Mapping[str, str], state: Any) -> None:
    """Refuses an optimizer state that does not contain the wanted one.

    Args:
        what: the beginning of the message, which names the caller.
        wanted: the class name of the state that must be there.
        others: hints for states of other classes, by class name.
        state: the optimizer state.

    Raises:
        ValueError: if `state` contains no `wanted`; the message names the states that it contains.
    """
    found: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, tuple) and type(node).__name__.endswith("State"):
            found.append(type(node).__name__)
        return False

    jax.tree.leaves(state, is_leaf=visit)
    if wanted not in found:
        root = type(state).__name__
        inner = [name for name in dict.fromkeys(found) if name != root]
        seen = f"a {root}" + (f" of {first_few(inner)}" if inner else "")
        hint = "".join(f": {said}" for name, said in others.items() if name in found)
        raise ValueError(
            f"{what}expected an optimizer state with a {wanted} in it, got {seen}{hint}"
        )
