"""`measure_block_specs`: the cheapest cuts that explain a running Adam's second moment."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_adam_mini.blocks import BlockSpec, per_element, per_tensor
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import (
    LabelFn,
    first_few,
    path_of,
    resolve_block_specs,
    spec_leaves,
)
from optax_adam_mini.messages import check_has_state
from optax_adam_mini.product import Spec, outer
from optax_adam_mini.sums import widen

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree


def measure_block_specs(
    adam_state: PyTree,
    params: PyTree,
    candidates: Mapping[str, PyTree[Spec] | LabelFn] | None = None,
    budget: float | None = None,
    *,
    tolerance: float = 0.3,
) -> PyTree[Spec]:
    """Picks for each parameter the cheapest spec that explains its second moment.

    It needs the state of an Adam that has run for a few hundred steps. If a
    candidate would replace Adam's `v` with `v_b`, the *spread*

        sqrt(mean((sqrt(v / v_b) - 1)**2))

    says how far the steps are from Adam's: 0 if every coordinate keeps its own
    `v`, below 1.42 for one number per block. A cut that explains `v` does not always reach
    the same loss (docs/results/cause.md).

    Args:
        adam_state: optimizer state that contains an `optax.ScaleByAdamState`,
            in any chain or wrapper.
        params: the parameters that it was made for: arrays or
            `jax.ShapeDtypeStruct`s.
        candidates: by name, specs or label functions, such as `{"outer":
            infer_block_specs(...), "mean": infer_block_specs(..., v="mean")}`.
            None tries those that a shape allows: one block, a block at each
            index of the last axis or of the others, and the outer of these
            two. Per coordinate, as in Adam, is always tried.
        budget: the largest size of `nu`, as a fraction of Adam's. Candidates
            are picked greedily, by the spread that they remove per entry. None
            picks the cheapest within `tolerance`, parameter by parameter.
        tolerance: the largest spread that counts as explained, if there is no
            budget.

    Returns:
        A pytree of specs like `params`. Their notes, which `block_table`
        shows, give the spread of the picked spec and of cheaper ones.

    Raises:
        TypeError, ValueError: if `adam_state` contains no `ScaleByAdamState`,
            has made no step yet, is not finite, or does not belong to
            `params`; if a candidate does not fit them; if the cheapest
            candidates exceed the budget; or if `budget` or `tolerance` is out
            of range.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 6))}
        >>> adamw = optax.adamw(1e-3)
        >>> grads = {"kernel": jnp.arange(1.0, 5)[:, None] * jnp.arange(1.0, 7)}
        >>> _, state = adamw.update(grads, adamw.init(params), params)
        >>> specs = measure_block_specs(state, params)
        >>> print(specs["kernel"].note)
        outer 0.00; one block 0.60, other axes 0.45, last axis 0.42
        >>> state = from_adam_state(state, params, specs)
        >>> tx = adam_mini(1e-3, block_specs=specs)  # continues with this state
    """
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(
            f"measure_block_specs: budget must be more than 0 and up to 1, got {budget}"
        )
    if not tolerance >= 0:
        raise ValueError(f"measure_block_specs: tolerance must be at least 0, got {tolerance}")
    _check_candidates(candidates, params)
    moments = _second_moments(adam_state)
    named = {**(_OF_SHAPES if candidates is None else candidates)}
    named.setdefault("per coordinate", per_element())
    by_name = {name: resolve_block_specs(specs, params) for name, specs in named.items()}

    leaves, treedef = leaves_with_path(params), jax.tree.structure(params)
    missing = ["/".join(path_of(keys)) for keys, _ in leaves if path_of(keys) not in moments]
    if missing:
        raise ValueError(f"measure_block_specs: adam_state has no nu for {first_few(missing)}")
    measured: list[list[_Choice]] = []
    for index, (keys, leaf) in enumerate(leaves):
        shape, v = jnp.shape(leaf), moments[path_of(keys)]
        if jnp.shape(v) != shape:
            raise ValueError(
                f"{'/'.join(path_of(keys))}: the state is not of these params: nu has shape "
                f"{jnp.shape(v)}, the parameter {shape}"
            )
        if not bool(jnp.isfinite(v).all()):
            raise ValueError(
                f"{'/'.join(path_of(keys)) or 'params'}: nu of adam_state is not finite: measure a "
                "state before the gradient that overflowed or was NaN"
            )
        specs = [(name, labels[index][1]) for name, labels in by_name.items()]
        found = [_Choice(name, s, s.size(shape), float(_spread(s, v))) for name, s in specs]
        measured.append(sorted(found, key=lambda choice: choice.size))

    if budget is None:
        taken = [next((c for c in m if c.spread <= tolerance), m[-1]) for m in measured]
    else:
        sizes = [math.prod(jnp.shape(leaf)) for _, leaf in leaves]
        taken = _within(budget, measured, sizes)
    return jax.tree.unflatten(treedef, list(map(_noted, taken, measured)))


def _check_candidates(candidates: Any, params: Any) -> None:
    """Refuses candidates that are not given by name."""
    is_spec = lambda x: isinstance(x, Spec)
    structure = lambda tree: jax.tree.structure(tree, is_leaf=is_spec)
    if candidates is None:
        return
    name = type(candidates).__name__
    given = "" if isinstance(candidates, Mapping) else f"a{'n' * (name[0] in 'AO')} {name}"
    if not given and structure(candidates) == structure(params) and spec_leaves(candidates):
        given = "a tree of specs like the parameters"
    if given:
        raise TypeError(
            f"measure_block_specs: candidates must be a dict of specs by name, got {given}: pass "
            'candidates={"outer": specs}'
        )


_VISIBLE = 0.005  # smaller differences of spreads are rounding


class _Choice(NamedTuple):
    """A candidate for one parameter."""

    name: str
    spec: Spec
    size: int
    """Entries in `nu`."""
    spread: float


def _each(axes: Callable[[int], Sequence[int]]) -> LabelFn:
    """A label function with a block at each index of some axes of every parameter."""
    spec = lambda p: BlockSpec(tuple((axis, None) for axis in axes(jnp.ndim(p))))
    return lambda params: jax.tree.map(spec, params)


_LAST, _OTHERS = _each(lambda rank: [-1][:rank]), _each(lambda rank: range(rank - 1))
_OF_SHAPES: dict[str, Any] = {
    "one block": per_tensor(),
    "other axes": _OTHERS,
    "last axis": _LAST,
    "outer": lambda params: jax.tree.map(outer, _OTHERS(params), _LAST(params)),
}


def _second_moments(state: Any) -> dict[tuple[str, ...], Any]:
    """`nu` of all Adam states in `state`, by the parameters' paths."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    states = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    others = {"ScaleByAdamMiniState": "Adam-mini's nu has means over blocks, and not Adam's v"}
    check_has_state("measure_block_specs: ", "ScaleByAdamState", others, state)
    if any(int(node.count) == 0 for node in states):
        raise ValueError(
            "measure_block_specs: adam_state has count 0: train with AdamW for a few hundred steps "
            "first"
        )
    return {path_of(keys): v for node in states for keys, v in leaves_with_path(node.nu)}


@functools.partial(jax.jit, static_argnums=0)
def _spread(spec: Spec, v: Float[Array, "*shape"]) -> Float[Array, ""]:
    """How far the steps with `spec` are from Adam's: a root mean square over coordinates."""
    v = jnp.real(v).astype(widen(jnp.real(v).dtype))  # of complex parameters it is complex
    v = v / jnp.max(v, initial=jnp.finfo(v.dtype).tiny)  # so that small values do not underflow
    nu: Any = spec.block_mean(v)
    of_blocks = spec.spread(nu, v.shape)
    ratio = jnp.where(of_blocks > 0, v / jnp.where(of_blocks > 0, of_blocks, 1), 1)
    return jnp.sqrt(jnp.mean(jnp.square(jnp.sqrt(ratio) - 1))) if v.size else jnp.zeros(())


def _within(
    budget: float, measured: Sequence[Sequence[_Choice]], sizes: Sequence[int]
) -> list[_Choice]:
    """Greedy choices: each step removes the most squared spread per entry of `nu`."""
    taken = [choices[0] for choices in measured]
    left = int(budget * sum(sizes)) - sum(choice.size for choice in taken)
    if left < 0:
        raise ValueError(
            f"measure_block_specs: the cheapest candidates have {sum(c.size for c in taken):,} "
            f"entries, {sum(c.size for c in taken) / sum(sizes):.2%} of Adam's, and the budget is "
            f"{budget:.2%}: give a larger budget, or cheaper candidates"
        )

    def gain(step: tuple[int, _Choice]) -> float:
        index, choice = step
        saved = sizes[index] * (taken[index].spread ** 2 - choice.spread**2)
        return saved / max(choice.size - taken[index].size, 1)

    while True:
        steps = [
            (index, choice)
            for index, choices in enumerate(measured)
            for choice in choices
            if choice.spread < taken[index].spread - _VISIBLE
            and choice.size - taken[index].size <= left
        ]
        if not steps:
            return taken
        index, choice = max(steps, key=gain)
        left -= choice.size - taken[index].size
        taken[index] = choice


def _noted(taken: _Choice, choices: Sequence[_Choice]) -> Spec:
    """The taken spec, with the measured spreads in its note."""
    text = lambda choice: f"{choice.name} {choice.spread:.2f}"
    cheaper = ", ".join(text(c) for c in choices if c.size < taken.size)
    return dataclasses.replace(taken.spec, note="; ".join(filter(None, [text(taken), cheaper])))
