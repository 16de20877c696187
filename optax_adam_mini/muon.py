"""`muon_mini`: Muon for matrices and Adam-mini for the rest, with one moment per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_adam_mini.boxes import leaves_with_path, with_kept_names
from optax_adam_mini.hyperparams import (
    check_count,
    check_hyperparams,
    check_is_bool,
    check_mu_dtype,
    check_param_dtype,
    check_scalar_or_schedule,
)
from optax_adam_mini.labels import (
    BlockSpecs,
    of_leaves,
    path_of,
    path_str,
    remembered_block_specs,
)
from optax_adam_mini.messages import (
    check_gradient,
    check_mask_leaves,
    check_order,
    leaves_as,
    some,
)
from optax_adam_mini.product import Outer, Spec
from optax_adam_mini.quantized import RowCodes, read_row, write_row
from optax_adam_mini.rounding import rounding_seed, salt_of
from optax_adam_mini.sums import widen
from optax_adam_mini.transform import adam_mini, add_decayed_weights, in_dtypes

if TYPE_CHECKING:
    from jaxtyping import Array, PyTree
    from optax.contrib import MuonDimensionNumbers

MUON, ADAM = "muon", "adam"  # the parts of the state, as `optax.contrib.muon` calls them


def muon_mini(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Any = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: PyTree[bool] | Callable[[Any], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius",
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: jax.typing.ArrayLike | None = None,
    parts: bool = False,
    bounded: bool = True,
    block_specs: BlockSpecs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices and [`adam_mini`][] for the rest: half of AdamW's memory.

    It takes the arguments of `optax.contrib.muon`, and uses Adam-mini in place of Adam. A matrix
    with gradient `g` is updated by its orthogonalized momentum:

        m  = beta m + (1 - beta) g
        p -= learning_rate * (scale * orthogonalized(m_hat) + weight_decay * p)

    with Nesterov's momentum `m_hat`, and `scale = sqrt(max(1, outputs / inputs))`. Everything is
    computed in float32, and cast once, at the end, to the parameters' dtypes.

    Args:
        learning_rate: learning rate of the matrices, a number or a schedule `count -> number`.
        ns_coeffs: three coefficients of the Newton-Schulz iteration, or three for each step, or
            the name of a preset of `optax.contrib.muon`.
        ns_steps: number of iterations.
        beta: decay rate of the matrices' momentum, in [0, 1).
        eps: added to denominators, at least 0.
        weight_decay: weight decay of the matrices, at least 0, multiplied by the learning rate; or
            a schedule.
        weight_decay_mask: which parameters decay, among the matrices and, unlike in
            `optax.contrib.muon`, among the rest: a pytree of booleans like the parameters or a
            prefix of it, or a function of the parameters that returns one; None for all.
        mu_dtype: dtype of the momentum, and of Adam-mini's `mu`; None for the parameters'.
            `jnp.int8` stores both in 8 bits, an eighth of AdamW's state in all.
        nesterov: whether to use Nesterov momentum, for both.
        adaptive: whether to scale updates by the dual norm of the momentum (arXiv 2409.20325).
        preconditioning: preconditioning of the Newton-Schulz iteration, as in
            `optax.contrib.muon`.
        adam_b1: `b1` of [`adam_mini`][].
        adam_b2: its `b2`.
        adam_eps_root: its `eps_root`.
        adam_weight_decay: its `weight_decay`.
        adam_learning_rate: its `learning_rate`; None for the learning rate of the matrices.
        muon_weight_dimension_numbers: which axes of a matrix are inputs and outputs: a pytree of
            `optax.contrib.MuonDimensionNumbers` like the parameters or a prefix of it, with `None`
            for what goes to Adam-mini, or a function of the parameters that returns one;
            [`infer_muon_dimension_numbers`][] infers them from the loss. With None, all parameters
            with two axes are matrices.
        consistent_rms: with a number, `scale = sqrt(max(inputs, outputs)) * consistent_rms`
            (Moonlight; 0.2 is about the size of AdamW's updates).
        parts: whether the parts of a fused kernel (query, key and value; a gate and its value) are
            separate matrices. The parts are those to which `block_specs` gives separate rows, as
            [`infer_block_specs`][] does. The state is the same either way.
        bounded: as in [`adam_mini`][].
        block_specs: as in [`adam_mini`][]. It may cover the whole tree; the specs of matrices are
            used only for `parts`.

    Returns:
        The transformation; its state is an `optax.transforms.PartitionState` of `"muon"`, with an
        `optax.contrib.MuonState`, and of `"adam"`, with a [`ScaleByAdamMiniState`][].

    Raises:
        TypeError, ValueError: here for hyper-parameters out of range; in `init` for dimension
            numbers or block specs that do not fit the parameters; in `update` if weight decay needs
            `params` and gets none, or if a parameter's gradient is None.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 3)), "head": jnp.ones((3, 8)), "bias": jnp.zeros(8)}
        >>> loss = lambda p, x: jnp.sum((jnp.tanh(x @ p["kernel"]) @ p["head"] + p["bias"]) ** 2)
        >>> x = jnp.ones((5, 4))
        >>> numbers = infer_muon_dimension_numbers(loss, params, x)
        >>> specs = infer_block_specs(loss, params, x, v="outer")
        >>> tx = muon_mini(
        ...     2e-2,
        ...     adam_learning_rate=4e-3,
        ...     muon_weight_dimension_numbers=numbers,
        ...     block_specs=specs,
        ... )
        >>> updates, state = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
        >>> jax.tree.map(jnp.shape, state.inner_states["muon"].inner_state[0].mu["kernel"])
        (4, 3)

    References:
        Jordan et al., [Muon: An optimizer for hidden layers in neural
        networks](https://kellerjordan.github.io/posts/muon/), 2024; Liu et al., [Muon is Scalable
        for LLM Training](https://arxiv.org/abs/2502.16982) (Moonlight), for `consistent_rms`; Zhang
        et al., [Adam-mini](https://arxiv.org/abs/2406.16793).
    """
    from optax.contrib import muon, scale_by_muon

    learning_rate = check_scalar_or_schedule("learning_rate", learning_rate)
    weight_decay = check_scalar_or_schedule("weight_decay", weight_decay)
    adam_rate = learning_rate
    if adam_learning_rate is not None:
        adam_rate = check_scalar_or_schedule("adam_learning_rate", adam_learning_rate)
    adam_weight_decay = check_scalar_or_schedule("adam_weight_decay", adam_weight_decay)
    check_mask_leaves(weight_decay_mask)
    check_hyperparams(beta=beta, eps=eps)
    if consistent_rms is not None:
        check_hyperparams(consistent_rms=consistent_rms)
    ns_steps = check_count("ns_steps", ns_steps)
    dtype = check_mu_dtype(mu_dtype)
    check_is_bool(nesterov=nesterov, adaptive=adaptive, parts=parts)
    if preconditioning not in _PRECONDITIONINGS:
        raise ValueError(
            f"preconditioning must be one of {_PRECONDITIONINGS}, got {preconditioning!r}"
        )
    if isinstance(ns_coeffs, str):  # a preset: Optax's state has its numbers
        preset = muon(1.0, ns_coeffs).init(jnp.zeros((1, 1)))
        ns_coeffs = optax.tree.get(preset, "ns_coeffs")
    elif np.ndim(ns_coeffs) not in (1, 2) or np.shape(ns_coeffs)[-1] != 3:
        raise ValueError(
            "ns_coeffs must be three numbers, or three for each step, got an array of shape "
            f"{np.shape(ns_coeffs)}"
        )

    if np.ndim(ns_coeffs) == 2 and len(ns_coeffs) > ns_steps:
        raise ValueError(
            f"ns_coeffs has coefficients for {len(ns_coeffs)} steps, and ns_steps is {ns_steps}: "
            "give as many steps"
        )

    given = muon_weight_dimension_numbers

    def pieces_of(params: Any) -> list[_Pieces]:
        """The pieces of every matrix in a tree of matrices."""
        numbers = dimension_numbers(given, params)
        specs = _specs(block_specs, params) if parts else [None] * len(numbers)
        shapes = [jnp.shape(p) for p in jax.tree.leaves(params)]
        return [_Pieces.of(*each) for each in zip(shapes, numbers, specs, strict=True)]

    def orthogonalize(pieces: list[_Pieces]) -> optax.GradientTransformation:
        return scale_by_muon(
            ns_coeffs, ns_steps, beta, eps, nesterov=nesterov, adaptive=adaptive,
            preconditioning=preconditioning,
            weight_dimension_numbers=[[p.numbers] * p.matrices for p in pieces],
        )  # fmt: skip

    matrices = in_dtypes(
        optax.chain(
            _kept(orthogonalize, pieces_of, dtype, consistent_rms),
            optax.identity(),  # `optax.contrib.muon` has an entry in its state here
            add_decayed_weights(weight_decay, weight_decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        ),
        4,
        learning_rate=learning_rate, weight_decay=weight_decay, beta=beta, eps=eps,
        **({} if consistent_rms is None else {"consistent_rms": consistent_rms}),
    )  # fmt: skip
    rest = adam_mini(
        adam_rate, adam_b1, adam_b2, eps, adam_eps_root, dtype, adam_weight_decay,
        weight_decay_mask, nesterov=nesterov, bounded=bounded, block_specs=block_specs,
    )  # fmt: skip

    def both(params: Any) -> optax.GradientTransformationExtraArgs:
        names = [ADAM if numbers is None else MUON for numbers in dimension_numbers(given, params)]
        labels = jax.tree.unflatten(jax.tree.structure(params), names)
        return optax.partition({MUON: matrices, ADAM: rest}, labels)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        _check_gradients(updates, params)
        if set(getattr(state, "inner_states", ())) != {MUON, ADAM}:
            raise ValueError(
                "muon_mini: expected the PartitionState that init made, got a "
                f"{type(state).__name__}: call tx.update(grads, state, params), in this order"
            )
        # Label functions get the parameters, whose dtypes may differ from the gradients'.
        return both(updates if params is None else params).update(
            updates, state, params, **extra_args
        )

    return optax.GradientTransformationExtraArgs(
        lambda params: both(params).init(params), update_fn
    )


def _check_gradients(updates: Any, params: Any) -> None:
    """Refuses gradients that do not fit `params`, and None, which `optax.partition` misplaces."""
    check_order(updates)
    if params is None:
        return
    leaves = leaves_with_path(params)
    grads = list(zip(leaves, leaves_as(params, "gradients", updates), strict=True))
    if missing := [path_str(keys) or "params" for (keys, _), g in grads if g is None]:
        raise ValueError(
            f"no gradient, but None, for the parameters at {some(missing)}: muon_mini needs one "
            "for each; give zeros, or None in the parameters as well, to init and to update"
        )
    for (keys, param), g in grads:
        check_gradient(
            path_str(keys), jax.ShapeDtypeStruct(jnp.shape(param), jnp.result_type(param)), g
        )


_PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")


class _Pieces(NamedTuple):
    """The matrices into which a kernel is cut along its outputs; one, if it is not cut."""

    numbers: MuonDimensionNumbers
    cuts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Axes, and the start of each piece but the first along each axis."""

    @classmethod
    def of(
        cls, shape: tuple[int, ...], numbers: MuonDimensionNumbers, spec: Spec | None
    ) -> _Pieces:
        runs = spec.runs(shape) if isinstance(spec, Outer) else [()] * len(shape)
        _, outputs = ([axis % len(shape) for axis in axes] for axes in _axes(numbers))
        ends = {
            axis: np.cumsum([size for n, size in runs[axis] for _ in range(n)]) for axis in outputs
        }
        return cls(numbers, tuple((axis, tuple(e[:-1].tolist())) for axis, e in ends.items()))

    @property
    def matrices(self) -> int:
        return math.prod(1 + len(starts) for _, starts in self.cuts)

    def split(self, x: Array) -> list[Array]:
        pieces = [x]
        for axis, starts in self.cuts:
            pieces = [part for x in pieces for part in jnp.split(x, starts, axis)]
        return pieces

    def join(self, pieces: list[Array]) -> Array:
        for axis, starts in reversed(self.cuts):
            n = 1 + len(starts)
            pieces = [
                pieces[i] if n == 1 else jnp.concatenate(pieces[i : i + n], axis)
                for i in range(0, len(pieces), n)
            ]
        return pieces[0]


def _specs(block_specs: Any, params: Any) -> list[Spec]:
    """The specs of the matrices, which say which parts have separate rows."""
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)) for p in leaves]
    labels = remembered_block_specs(block_specs, treedef, shapes) if block_specs is not None else []
    specs = [spec for _, spec in labels]
    if leaves and not any(isinstance(spec, Outer) for spec in specs):
        raise ValueError(
            "parts=True: the parts of a kernel are those that have rows of their own, and "
            "block_specs has no rows for a matrix (no outer): give "
            "block_specs=infer_block_specs(loss_fn, params, ...), or leave parts out"
        )
    return specs


def _kept(
    orthogonalize: Callable[[list[_Pieces]], optax.GradientTransformation],
    pieces_of: Callable[[Any], list[_Pieces]],
    mu_dtype: Any,
    consistent_rms: Any,
) -> optax.GradientTransformation:
    """`scale_by_muon` on pieces in float32, with momenta stored for whole kernels in `mu_dtype`."""

    def init_fn(params: Any) -> Any:
        for keys, p in leaves_with_path(params):
            path, of_param = path_str(keys) or "params", jnp.result_type(p)
            check_param_dtype(path, of_param, mu_dtype)
            if not jnp.issubdtype(of_param, jnp.inexact):
                raise TypeError(
                    f"{path}: expected a matrix of floating-point numbers, got {of_param}: give "
                    "None in muon_weight_dimension_numbers"
                )
        pieces, treedef = pieces_of(params), jax.tree.structure(params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype or jnp.result_type(p)), params)
        if mu_dtype == jnp.int8:
            rows = [
                jnp.zeros(rows_of(p.shape, piece.numbers)[1], jnp.bfloat16)
                for p, piece in zip(jax.tree.leaves(params), pieces, strict=True)
            ]
            mu = RowCodes(mu, with_kept_names(treedef.unflatten(rows), params))
        state: Any = orthogonalize(pieces).init(params)
        return state._replace(mu=mu)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        like = updates if params is None else params
        _check_momentum(state.mu, updates, mu_dtype)
        pieces, treedef = pieces_of(like), jax.tree.structure(updates)
        wide = lambda x: x.astype(widen(x.dtype))
        split = lambda tree: [
            piece.split(wide(x)) for x, piece in zip(jax.tree.leaves(tree), pieces, strict=True)
        ]
        join = lambda parts: treedef.unflatten(
            piece.join(x) for x, piece in zip(parts, pieces, strict=True)
        )
        new: Any
        after: Any
        new, after = orthogonalize(pieces).update(
            split(updates), state._replace(mu=split(_read(state.mu)))
        )
        scaled = [
            [u * _scale(u.shape, piece.numbers, consistent_rms) for u in parts]
            for parts, piece in zip(new, pieces, strict=True)
        ]
        return join(scaled), after._replace(
            mu=_written(join(after.mu), state.mu, after.count, pieces, mu_dtype, params)
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _read(mu: Any) -> Any:
    """The momentum from a state, as a tree like the parameters."""
    if not isinstance(mu, RowCodes):
        return mu
    codes, treedef = jax.tree.flatten(mu.codes)
    pairs = zip(codes, jax.tree.leaves(mu.largest), strict=True)
    return jax.tree.unflatten(treedef, [read_row(*pair) for pair in pairs])


def _check_momentum(mu: Any, updates: Any, mu_dtype: Any) -> None:
    """Refuses a momentum of other matrices or with another `mu_dtype`."""
    is_int8 = isinstance(mu, RowCodes)
    if is_int8 != (mu_dtype == jnp.int8):
        raise ValueError(
            f"the state's mu is {'int8' if is_int8 else 'not int8'}, but the transformation has "
            f"mu_dtype={mu_dtype}: pass the mu_dtype that the state was made with. Muon's momentum "
            "is not converted: to begin it anew, take that of tx.init(params)"
        )
    shapes = lambda tree: {
        path_str(keys) or "params": jnp.shape(x) for keys, x in leaves_with_path(tree)
    }
    found, expected = shapes(mu.codes if is_int8 else mu), shapes(updates)
    if found != expected:
        differ = [p for p in {**found, **expected} if found.get(p) != expected.get(p)]
        raise ValueError(
            f"the state's momentum does not fit the matrices at {some(differ)}: it was made with "
            "other parameters, or other muon_weight_dimension_numbers"
        )


def _written(
    mu: Any, old: Any, count: Any, pieces: list[_Pieces], mu_dtype: Any, params: Any
) -> Any:
    """The momentum as a state stores it, in the boxes of the old one."""
    if not isinstance(old, RowCodes):
        like = old if params is None else params
        dtypes = [mu_dtype or jnp.result_type(x) for x in jax.tree.leaves(like)]
        cast = [m.astype(d) for m, d in zip(jax.tree.leaves(mu), dtypes, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(old), cast)
    pairs: list[Any] = []
    for (keys, m), piece in zip(leaves_with_path(mu), pieces, strict=True):
        seed = rounding_seed(count, salt_of(path_str(keys)))
        pairs.append(write_row(m, rows_of(m.shape, piece.numbers)[0], seed))
    in_tree_of = lambda i: jax.tree.unflatten(jax.tree.structure(old[i]), [p[i] for p in pairs])
    return RowCodes(in_tree_of(0), in_tree_of(1))


def rows_of(shape: tuple[int, ...], numbers: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a matrix's rows, along its longer side, and the shape of one number per row."""
    axes = max(_axes(numbers), key=lambda axes: math.prod(shape[axis] for axis in axes))
    axes = tuple(axis % len(shape) for axis in axes)
    return axes, tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def sizes_of(shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> tuple[int, int]:
    """The numbers of inputs and outputs of a matrix."""
    inputs, outputs = (math.prod(shape[axis] for axis in axes) for axes in _axes(numbers))
    return inputs, outputs


def _scale(shape: tuple[int, ...], numbers: MuonDimensionNumbers, consistent_rms: Any) -> Any:
    """The scale of the update of a matrix of this shape."""
    inputs, outputs = sizes_of(shape, numbers)
    if consistent_rms is None:
        return math.sqrt(max(1, outputs / max(1, inputs)))
    return math.sqrt(max(inputs, outputs)) * consistent_rms


def _axes(numbers: MuonDimensionNumbers) -> list[tuple[int, ...]]:
    return [tuple(axes) if isinstance(axes, Sequence) else (axes,) for axes in numbers]


def dimension_numbers(given: Any, params: Any) -> list[Any]:
    """The dimension numbers of every leaf of `params`, None for leaves that go to Adam-mini.

    Raises:
        TypeError: if an entry of `given` is neither dimension numbers nor None.
        ValueError: if a parameter has no entry, if an entry has no parameter, or if dimension
            numbers do not fit a parameter's shape.
    """
    from optax.contrib import MuonDimensionNumbers

    leaves = leaves_with_path(params)
    if given is None:
        is_matrix = lambda p: jnp.ndim(p) == 2 and jnp.issubdtype(jnp.result_type(p), jnp.inexact)
        return [MuonDimensionNumbers() if is_matrix(p) else None for _, p in leaves]
    is_one = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    name = "muon_weight_dimension_numbers"
    by_path = {
        path_of(keys): numbers
        for keys, numbers in leaves_with_path(
            given(params) if callable(given) else given, is_leaf=is_one
        )
    }
    for path, numbers in by_path.items():
        if not is_one(numbers):
            raise TypeError(
                f"{name}: {'/'.join(path) or 'params'}: expected "
                f"optax.contrib.MuonDimensionNumbers, or None for Adam-mini, got {numbers!r} of "
                f"type {type(numbers).__name__}"
            )
    found = of_leaves(name, "entry", by_path, params)
    for path, leaf, numbers in found:
        if numbers is not None:
            _check_fits(path or "params", numbers, jnp.shape(leaf))
    return [numbers for _, _, numbers in found]


def _check_fits(path: str, numbers: MuonDimensionNumbers, shape: tuple[int, ...]) -> None:
    parts = [part if isinstance(part, Sequence) else (part,) for part in numbers]
    axes = [axis for part in parts for axis in part]
    known = [axis for axis in axes if isinstance(axis, (int, np.integer))]
    distinct = {axis % len(shape) for axis in known if -len(shape) <= axis < len(shape)}
    if not all(parts) or len(distinct) < len(axes):
        raise ValueError(
            f"{path} {shape}: {numbers} does not fit: expected axes of the parameter, each once, "
            "at least one of inputs (reduction_axis) and one of outputs (output_axis); give None "
            "to leave the parameter to Adam-mini"
        )
