"""Matches trees of specs with trees of parameters: paths, prefixes, defaults, messages."""

from __future__ import annotations

import difflib
import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from optax_adam_mini.blocks import BlockSpec
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.product import Outer, Spec

T = TypeVar("T")


LabelFn = Callable[[Any], Any]
"""A label function: params (arrays or `jax.ShapeDtypeStruct`s) -> pytree of `BlockSpec`."""


class Label(functools.partial[Any]):
    """A label function of this package: it can go to another process, and says how it was made."""

    made_by: tuple[str, tuple[Any, ...], dict[str, Any]]  # constructor, arguments, options

    def __repr__(self) -> str:
        name, args, options = self.made_by
        said = [*map(repr, args), *(f"{key}={value!r}" for key, value in options.items())]
        return f"{name}({', '.join(said)})"


def label(name: str, args: Sequence[Any], options: Mapping[str, Any], bound: LabelFn) -> Label:
    """`bound`, a partial, as the label function that `name(*args, **options)` made."""
    made = Label(bound)
    made.made_by = (name, tuple(args), {k: v for k, v in options.items() if v is not None})
    return made


BlockSpecs: TypeAlias = Spec | LabelFn | Mapping[Any, Any] | tuple[Any, ...] | list[Any]
"""What `block_specs=` takes: a spec for all parameters, a pytree of specs like the parameters or a
prefix of it, or a label function `params -> such a pytree`."""


def is_label_function(block_specs: Any) -> bool:
    """Whether specs are given as a function of the parameters, and not as a pytree.

    A tree that is callable itself, such as an Equinox module with specs for its arrays, is a tree:
    its leaves are looked at, as Optax does for masks.
    """
    if isinstance(block_specs, functools.partial):  # jax.tree_util.Partial is a tree
        return True
    leaves = jax.tree.leaves(block_specs, is_leaf=lambda x: x is None)  # None is no function
    return callable(block_specs) and all(map(callable, leaves))


_TO_BE_CALLED = {
    "BlockSpec", "per_tensor", "per_element", "per_neuron", "per_head", "per_token", "fused",
    "outer", "by_path", "by_logical_axes", "flax_layers", "infer_block_specs",
    "infer_muon_dimension_numbers", "measure_block_specs",
}  # fmt: skip


def check_called(block_specs: Any) -> None:
    """Refuses this package's functions that were passed without being called.

    Raises:
        TypeError: if it is one.
    """
    if isinstance(block_specs, functools.partial) and not isinstance(block_specs, Label):
        block_specs = block_specs.func
    name = getattr(block_specs, "__qualname__", "")
    if isinstance(block_specs, type) and name not in _TO_BE_CALLED:
        raise TypeError(f"expected a pytree or a function of the parameters, got {block_specs!r}")
    module = str(getattr(block_specs, "__module__", ""))
    if module.startswith(f"{__package__}.") and name in _TO_BE_CALLED:
        arguments = "fn, params, *args" if "infer_" in name or "measure_" in name else "..."
        wanted = f"what it returns: call it, {name}({arguments})"
        raise TypeError(f"got the function {name} itself, expected {wanted}")


def resolve_block_specs(block_specs: Any, params: Any) -> list[tuple[str, Spec]]:
    """The path and the spec of every leaf of `params`, checked against the leaf's shape.

    Args:
        block_specs: a pytree of specs with the structure of `params` or a prefix of it (so one spec
            may stand for all), or a label function that returns one.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s. Where it is empty (`None`,
            `optax.MaskedNode`), specs are not needed and not looked at.

    Returns:
        `(path, spec)` in the order of `jax.tree.leaves(params)`; a path reads `"a/b/c"`.

    Raises:
        TypeError: if a label is not a `BlockSpec`.
        ValueError: if a parameter has no spec, a spec no parameter, or a spec does not fit its
            parameter's shape. The message names the first few parameters concerned.

    Examples:
        >>> resolve_block_specs(per_tensor(), {"scale": jnp.ones(3)})
        [('scale', per_tensor())]
    """
    check_called(block_specs)
    check_arrays(params)
    specs = spec_leaves(
        _call(block_specs, params) if is_label_function(block_specs) else block_specs
    )
    found: list[tuple[str, Spec]] = []
    wrong: list[str] = []
    for path, leaf, spec in match_leaves("block_specs", "spec", specs, params):
        try:
            spec.check(jnp.shape(leaf))
        except ValueError as error:
            wrong.append(f"{path or 'params'}: {error}")
        found.append((path, spec))
    if wrong:
        raise ValueError(
            "\n".join(
                wrong[:_SHOWN] + [f"... and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
            )
        )
    return found


def match_leaves(
    what: str, word: str, given: Mapping[tuple[str, ...], T], params: Any
) -> list[tuple[str, Any, T]]:
    """What is given for every leaf of `params`, at its path or at a prefix of it.

    Args:
        what: the name of what was given, which begins the message.
        word: the noun for one entry, such as "spec".
        given: the entries by path; a path may be a prefix.
        params: pytree of parameters. Where it is empty, nothing is needed and nothing looked at.

    Returns:
        `(path, leaf, what is given for it)` in the order of the leaves; a path reads `"a/b/c"`.

    Raises:
        ValueError: if nothing is given for a parameter, or something for none.
    """
    found: list[tuple[str, Any, T]] = []
    empty: list[tuple[str, ...]] = []
    used: set[tuple[str, ...]] = set()
    missing: list[str] = []
    for keys, leaf in leaves_with_path(params, is_leaf=is_empty):
        path = path_of(keys)
        if is_empty(leaf):
            empty.append(path)
            continue
        prefix = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in given), None)
        if prefix is None:
            missing.append("/".join(path) or "params")
        else:
            used.add(prefix)
            found.append(("/".join(path), leaf, given[prefix]))
    unused = [
        "/".join(path)
        for path in given
        if path not in used and not any(_overlap(path, other) for other in empty)
    ]
    if missing or unused:
        lacking = [f"no {word} for {first_few(missing)}"] if missing else []
        surplus = [f"no parameter for the {word} at {first_few(unused)}"] if unused else []
        hint = ""
        if missing == ["params"]:
            hint = (
                f": params is one array, as inside optax.flatten: leave it out, or give one {word}"
            )
        raise ValueError(
            f"{what} must have the structure of the parameters, or be a prefix of it: "
            + "; ".join(lacking + surplus)
            + hint
        )
    return found


_REMEMBERED: dict[int, dict[Any, Any]] = {}  # by the id of a function, while it lives


def remembered(
    of: Callable[..., T], given: Any, params: Any, *args: Any, is_init: bool = False
) -> T:
    """`of(given, params, *args)`; a user's function is called once for a tree, not at every step.

    A function that cannot be weakly referenced is called at every step. What a function returned is
    freed with it.

    What `init` finds counts for every tree with the same paths and shapes: `nnx.Optimizer` passes
    variables to `init`, and arrays without their metadata to `update`, and the dtype of a missing
    gradient is unknown.

    Args:
        of: `resolve_block_specs`, or another function of `given` and the parameters.
        given: what the user gave: a function, or a pytree.
        params: the parameters, or their shapes.
        *args: further arguments of `of`, with hashes.
        is_init: whether to call it in any case, and to let the result count for such trees.
    """
    if is_init:
        check_arrays(params)
    memory = _memory(given)
    if memory is None:
        return of(given, params, *args)
    treedef, shapes = shapes_of(params)
    # Treedefs that differ only in names have equal hashes.
    exact = (of, args, treedef, tuple(shapes))
    try:
        if exact in memory and not is_init:
            return memory[exact]
    except TypeError:  # metadata in the treedef have no hash
        exact = None
    paths = tuple(path_of(keys) for keys, _ in leaves_with_path(params))
    alike = (of, args, paths, tuple(x.shape for x in shapes))
    if alike in memory and not is_init:
        return memory[alike]
    found = of(given, params, *args)
    for key in (exact, alike) if is_init else (exact,):
        if key is not None:
            memory[key] = found
    return found


def _memory(given: Any) -> dict[Any, Any] | None:
    """What was found with a label function; None for a tree, and for what has no weak reference."""
    if not is_label_function(given):
        return None
    if id(given) not in _REMEMBERED:
        try:
            weakref.finalize(given, _REMEMBERED.pop, id(given), None).atexit = False
        except TypeError:
            return None
        _REMEMBERED[id(given)] = {}
    return _REMEMBERED[id(given)]


def check_arrays(params: Any) -> None:
    """Refuses specs and functions where parameters are expected.

    Raises:
        TypeError: if there are such.
    """
    is_spec = lambda x: isinstance(x, Spec)
    for keys, leaf in leaves_with_path(params, is_leaf=is_spec):
        path = path_str(keys) or "params"
        if is_spec(leaf):
            raise TypeError(
                f"{path}: expected a parameter, got the spec {leaf}: the parameters come first, "
                "block_table(params, block_specs)"
            )
        if not hasattr(leaf, "shape") and not isinstance(leaf, (int, float, complex)):
            raise TypeError(
                f"{path}: expected an array, got {leaf!r}: take the arrays of the model alone (in "
                "Equinox, eqx.filter(model, eqx.is_inexact_array))"
            )


def has_outer(block_specs: Any, specs: Iterable[Spec]) -> bool:
    """Whether the `nu` of a state has two trees.

    A tree of specs counts as a whole, so that every group of `optax.multi_transform` gets a state
    of the same structure. Of a label function only the specs of the group are known.

    Args:
        block_specs: what the user gave.
        specs: the specs of the parameters in the state.
    """
    if not is_label_function(block_specs):
        specs = spec_leaves(block_specs).values()
    return any(isinstance(spec, Outer) for spec in specs)


def specs_of_some(block_specs: Any, params: Any, needed: Sequence[bool]) -> list[tuple[str, Spec]]:
    """As `resolve_block_specs`, for some leaves; a label function sees all parameters.

    It may not expect `optax.MaskedNode`, and the shape of a bias may say which axes of a kernel are
    outputs. The label functions of this package are told which leaves need specs, so that they
    refuse no others.

    Args:
        block_specs: as in `resolve_block_specs`.
        params: all parameters.
        needed: which of the leaves need a spec.
    """
    check_called(block_specs)
    check_arrays(params)
    if not any(needed):
        return []
    leaves, treedef = jax.tree.flatten(params)
    kept = [p if n else optax.MaskedNode() for p, n in zip(leaves, needed, strict=True)]
    some = jax.tree.unflatten(treedef, kept)
    if isinstance(block_specs, Label):
        block_specs = block_specs(params, needed=needed)
    elif is_label_function(block_specs):
        block_specs = _call(block_specs, params)
    return resolve_block_specs(block_specs, some)


def function_of_some(block_specs: Any, params: Any, needed: Sequence[bool]) -> LabelFn:
    """A label function for parts of `params`, which returns what `specs_of_some` finds."""
    found = iter(specs_of_some(block_specs, params, needed))
    specs = [next(found)[1] if is_needed else None for is_needed in needed]
    tree = jax.tree.unflatten(jax.tree.structure(params), specs)
    return lambda _: tree


def shapes_of(params: Any) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The structure of `params`, and the shapes and dtypes of its leaves."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef, [jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)) for p in leaves]


def call_noting_parts(what: str, function: Callable[[Any], T], params: Any) -> T:
    """Calls a user's function; if it fails on a part of a tree, a note says that this is one."""
    try:
        return function(params)
    except Exception as error:
        if not has_masked(params):
            error.add_note(f"{what}: the function was called with the pytree of parameters")
        else:
            error.add_note(
                f"{what}: the function was called with a part of the parameters: optax.masked, "
                "multi_transform and partition put optax.MaskedNode() in the place of the others. "
                "Let the function accept these, or pass what it returns for all parameters, "
                f"{what}=function(params)"
            )
        raise


def _call(label_fn: LabelFn, params: Any) -> Any:
    """What a label function returns; refuses what cannot be specs."""
    returned = call_noting_parts("block_specs", label_fn, params)
    if is_empty(returned) and not is_empty(params):
        raise TypeError(
            f"block_specs: the label function returned {returned!r}, expected a BlockSpec such as "
            "per_neuron(), or a pytree of them like the parameters: return the specs"
        )
    if is_label_function(returned):
        function = jax.tree.leaves(returned)[0]
        named = getattr(function, "func", function)  # of a partial
        name = getattr(named, "__name__", type(named).__name__)
        raise TypeError(
            f"block_specs: the label function returned the function {name}, expected a BlockSpec "
            "or a pytree of them: call it, as in lambda params: per_neuron() or "
            "lambda params: flax_layers()(params)"
        )
    return returned


def spec_leaves(labels: Any) -> dict[tuple[str, ...], Spec]:
    """The specs of a pytree of specs by their paths.

    Raises:
        TypeError: if a leaf is not a `BlockSpec`.
    """
    is_spec = lambda x: isinstance(x, Spec)
    specs: dict[tuple[str, ...], Spec] = {}
    for keys, spec in leaves_with_path(labels, is_leaf=is_spec):
        if not is_spec(spec):
            is_kept = isinstance(spec, str) and spec in ("mean", "outer")
            hint = f": v={spec!r} is an argument of infer_block_specs" if is_kept else ""
            raise TypeError(
                f"{path_str(keys) or 'block_specs'}: expected a BlockSpec such as per_neuron(), "
                f"got {spec!r} of type {type(spec).__name__}{hint}"
            )
        specs[path_of(keys)] = spec
    return specs


def is_empty(tree: Any) -> bool:
    """Whether a subtree holds no leaves: `None`, `optax.MaskedNode`, an empty container."""
    return not jax.tree.leaves(tree)


def path_of(keys: Sequence[Any]) -> tuple[str, ...]:
    """The names along a key path."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def path_str(keys: Sequence[Any]) -> str:
    """A key path as `"a/b/c"`."""
    return "/".join(path_of(keys))


def check_is_params(what: str, params: Any) -> None:
    """Refuses one integer: `optax.inject_hyperparams` calls a label function with the step.

    Raises:
        TypeError: if `params` is one; of int8 it is the `mu` of one parameter.
    """
    if not jax.tree_util.all_leaves([params]):
        return
    dtype = jnp.result_type(params)
    if jnp.issubdtype(dtype, jnp.integer) and dtype != jnp.int8:
        raise TypeError(
            f"{what}: expected a pytree of parameters, got one integer. optax.inject_hyperparams "
            "takes a label function for a schedule: tell it not to, "
            'optax.inject_hyperparams(adam_mini, static_args=("block_specs",))'
        )


def check_only_params(
    what: str, params: Any, is_given: Callable[[str], Any] = lambda _: False
) -> None:
    """Refuses NNX's variables that are no parameters, such as the averages of a BatchNorm.

    Args:
        what: who asks, to begin the message with.
        params: pytree of parameters.
        is_given: whether the path `"a/b/c"` has a spec of its own, and is meant to be trained.

    Raises:
        ValueError: if there are such variables.
    """
    nnx = sys.modules.get("flax.nnx")  # where it was never imported, nothing can be of it
    if nnx is None:
        return
    is_variable = lambda x: isinstance(x, nnx.Variable)
    found = [
        (path_str(keys), node)
        for keys, node in leaves_with_path(params, is_leaf=is_variable)
        if is_variable(node) and not (isinstance(node, nnx.Param) or is_empty(node))
    ]
    others = [(path, node) for path, node in found if not is_given(path)]
    is_key = lambda x: jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.extended)
    # Random keys get an error of their own, later.
    if others and not any(map(is_key, jax.tree.leaves(params))):
        kinds = first_few([f"{path}, a {type(node).__name__}" for path, node in others])
        raise ValueError(
            f"{what}: {kinds}: not parameters, and weight decay alone would change them: "
            "pass the parameters alone, nnx.Optimizer(model, tx, wrt=nnx.Param), "
            "or graph, params, rest = nnx.split(model, nnx.Param, ...) and, inside the loss, "
            "nnx.merge(graph, params, rest); or give specs for them"
        )


def check_used(what: str, matches: Callable[[str], Any], given: str, params: Any) -> None:
    """Refuses a user's path or pattern that matches no parameter.

    Parts of a tree, as `optax.masked` and `optax.multi_transform` pass them, are not checked.

    Args:
        what: what was given, to begin the message with.
        matches: whether a path `"a/b/c"` is meant.
        given: what paths are compared with, to list the closest.
        params: pytree of parameters.

    Raises:
        ValueError: if no path matches.
    """
    paths = [path_str(keys) for keys, _ in leaves_with_path(params)]
    if not paths or has_masked(params) or any(map(matches, paths)):
        return
    closest = difflib.get_close_matches(given, paths, n=3, cutoff=0.0)
    form = "" if "/" in given or not any("/" in path for path in paths) else " (a path reads a/b/c)"
    raise ValueError(
        f"{what} matches no parameter; the closest paths are {', '.join(closest)}{form}"
    )


def has_masked(params: Any) -> bool:
    """Whether it is a part of a tree that `optax.masked` or `optax.multi_transform` took."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    return any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked)))


def check_default(what: str, default: Any) -> None:
    """Refuses a default of a label function that is neither a spec nor a label function.

    Raises:
        TypeError: if it is not, nor None.
    """
    is_one = isinstance(default, Spec) or is_label_function(default)
    if default is not None and not is_one:
        raise TypeError(f"{what}: default must be a BlockSpec or a label function, got {default!r}")


def completed(
    what: str,
    params: Any,
    specs: Sequence[Spec | None],
    default: Spec | LabelFn | None,
    seen: Callable[[Any, Any], Any],
    needed: Sequence[bool] | None = None,
) -> Any:
    """A pytree of the specs of `params`, with the default's where they are None.

    A default sees all parameters: the shape of a bias may say which axes of a kernel are outputs.

    Args:
        what: the label function that asks.
        params: the parameters.
        specs: what its rules give for each leaf.
        default: a spec, or a label function.
        seen: what the rules look at, `seen(keys, leaf)`, for the message.
        needed: which leaves need a spec; None for all.

    Raises:
        ValueError: if there is no default where one is needed.
    """
    leaves, treedef = leaves_with_path(params), jax.tree.structure(params)
    asked = [spec is None for spec in specs]
    asked = asked if needed is None else [a and n for a, n in zip(asked, needed, strict=True)]
    unmatched = [pair for is_asked, pair in zip(asked, leaves, strict=True) if is_asked]
    if isinstance(default, Label):
        given = {path_str(keys) for (keys, _), a in zip(leaves, asked, strict=True) if not a}
        check_only_params(what, params, given.__contains__)
    if not unmatched:
        return jax.tree.unflatten(treedef, specs)
    if default is None:
        shown = first_few([f"{path_str(keys)} {seen(keys, leaf)}" for keys, leaf in unmatched])
        raise ValueError(
            f"{what}: no rule matches {shown}: add a rule for it, or a default such as "
            "flax_layers() or per_element()"
        )
    defaults = iter(specs_of_some(default, params, asked))
    return jax.tree.unflatten(
        treedef, [next(defaults)[1] if a else spec for spec, a in zip(specs, asked, strict=True)]
    )


def compiled_rules(
    what: str, rules: Sequence[tuple[str, T]], types: tuple[type, ...] = (BlockSpec, Outer)
) -> list[tuple[re.Pattern[str], T]]:
    """Rules over paths, their regular expressions compiled; they give a value of one of `types`.

    Raises:
        TypeError, ValueError: if a rule is not a valid regular expression and such a value.
    """
    compiled: list[tuple[re.Pattern[str], T]] = []
    is_pair = isinstance(rules, tuple) and len(rules) == 2 and isinstance(rules[0], str)
    if not isinstance(rules, Iterable) or isinstance(rules, (str, Mapping)) or is_pair:
        raise TypeError(
            f"{what}: expected a sequence of pairs [(pattern, spec), ...], got {rules!r}"
        )
    for rule in rules:
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(f"each rule of {what} is a pair (pattern, spec), got {rule!r}")
        pattern, spec = rule
        if not isinstance(spec, types):
            named = [t for t in types if t is not Outer]
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in named)
            example = " such as per_neuron()" if BlockSpec in types else ""
            check_called(spec)
            raise TypeError(
                f"{what}: the rule {pattern!r} must give a {wanted}{example}, got "
                f"{spec!r} of type {type(spec).__name__}"
            )
        try:
            compiled.append((re.compile(pattern), spec))
        except re.error as error:
            raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}") from error
    return compiled


_SHOWN = 8  # paths named in one error


def first_few(paths: Sequence[str]) -> str:
    """The first few of `paths`, for an error message."""
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    n = min(len(a), len(b))
    return a[:n] == b[:n]
