"""Adam-mini as Optax gradient transformations (Zhang et al., arXiv 2406.16793, Algorithm 1)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.hyperparams import (
    check_first_values,
    check_hyperparams,
    check_is_bool,
    check_mu_dtype,
    check_param_dtype,
    check_scalar_or_schedule,
)
from optax_adam_mini.labels import (
    BlockSpecs,
    check_called,
    has_outer,
    is_empty,
    is_label_function,
    path_of,
    remembered,
    resolve_block_specs,
    spec_leaves,
)
from optax_adam_mini.messages import (
    check_given_mask,
    check_gradient,
    check_grids,
    check_is_chain,
    check_is_state,
    check_mask,
    check_order,
    check_shape,
    leaves_as,
)
from optax_adam_mini.partition.flax_layers import flax_layers
from optax_adam_mini.product import Spec, pack_nu, repack_nu, unpack_nu
from optax_adam_mini.quantized import (
    allowed_b2,
    check_decays,
    check_stored_dtype,
    pack_mu,
    read,
    tree_in,
    unpack_mu,
    write,
)
from optax_adam_mini.random_bits import rounding_seeds, salt_of
from optax_adam_mini.sums import spread_product, widen, widened, zeros_beside

if TYPE_CHECKING:
    from jaxtyping import Array, Int, PyTree


class ScaleByAdamMiniState(NamedTuple):
    """State of `scale_by_adam_mini`.

    Attributes:
        count: number of updates made, shape `()`, int32.
        mu: first moment, a pytree like the parameters, in their dtypes or in
            `mu_dtype`. With int8 it is a `Codes`.
        nu: second moment, a pytree like the parameters, float32 or wider. Each
            array has one number per block: the mean of Adam's `v` over the
            block. If any spec is an `outer`, it is an `OuterMoments` of two
            such pytrees.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: PyTree
    nu: PyTree


def scale_by_adam_mini(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    bounded: bool = True,
    block_specs: BlockSpecs | None = None,
) -> optax.GradientTransformation:
    """Rescales updates by Adam-mini: Adam with one second moment per block.

    It takes the arguments of `optax.scale_by_adam`, and `bounded` and
    `block_specs`. See `adam_mini`.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of `nu`, at least 0.
        eps_root: added to `nu` under the square root, at least 0; greater than
            0 where gradients are taken through the update.
        mu_dtype: dtype of `mu`, as in `adam_mini`.
        nesterov: whether to use Nesterov momentum (Dozat 2016).
        bounded: whether to limit each coordinate to the longest step that Adam
            could make with these decay rates. `False` gives the paper's
            Algorithm 1 and the arithmetic of the reference package.
        block_specs: the blocks: a pytree of specs like the parameters
            (`infer_block_specs` makes one), or a prefix of it, or a label
            function that returns one. None uses `flax_layers()`, the paper's
            cut by layer names.

    Returns:
        The transformation; its state is a `ScaleByAdamMiniState`.

    Raises:
        TypeError, ValueError: here for hyper-parameters out of range; in
            `init` for block specs that do not fit the parameters.

    Examples:
        >>> tx = scale_by_adam_mini(block_specs=per_tensor())
        >>> params = {"scale": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"scale": jnp.array([1.0, 2.0, 3.0])}, state)
        >>> print([f"{u:.3f}" for u in updates["scale"]], state.nu["scale"].shape)
        ['0.463', '0.926', '1.000'] (1,)
    """
    return cast_to_param_dtypes(
        _wide_adam_mini(
            **_checked(b1, b2, eps, eps_root, mu_dtype, nesterov, bounded),
            block_specs=_check_block_specs(block_specs),
        )
    )


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: PyTree[bool] | Callable[[Any], Any] | None = None,
    *,
    nesterov: bool = False,
    bounded: bool = True,
    block_specs: BlockSpecs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam-mini with decoupled weight decay: half of `optax.adamw`'s state.

    For the parameters `p` of each block, with the gradient `g`, at step `t`:

        m  = b1 m + (1 - b1) g               for each coordinate
        v  = b2 v + (1 - b2) mean(g * g)     one number for each block
        p -= learning_rate * (m_hat / (sqrt(v_hat + eps_root) + eps)
                              + weight_decay * p)

    with `m_hat = m / (1 - b1**t)` and `v_hat = v / (1 - b2**t)`. If the spec
    is an `outer`, `v` is the product of a row and a column instead. Use
    AdamW's hyper-parameters unchanged.

    When many coordinates share one `v`, one with a large gradient could move
    further than Adam would ever move it. It is limited to Adam's longest step,
    unless `bounded=False`.

    Args:
        learning_rate: a number or a schedule `count -> number`.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the root, at least 0.
        eps_root: added under the root, at least 0; greater than 0 where
            gradients are taken through the update.
        mu_dtype: dtype of `mu`; None for that of the parameters. `jnp.int8`
            stores it in 8 bits, and the whole state is then an eighth of
            AdamW's. Updates use `mu` as it is stored.
        weight_decay: a number of at least 0, or a schedule; it is multiplied
            by the learning rate.
        mask: which parameters decay: a pytree of booleans like the parameters,
            or a prefix of it, or a function of the parameters that returns
            one; None for all.
        nesterov: whether to use Nesterov momentum (Dozat 2016).
        bounded: whether to limit each coordinate to the longest step that Adam
            could make with these decay rates. `False` gives the paper's
            Algorithm 1 and the arithmetic of the reference package.
        block_specs: the blocks: a pytree of specs like the parameters
            (`infer_block_specs` makes one), or a prefix of it, or a label
            function that returns one. None uses `flax_layers()`, the paper's
            cut by layer names.

    Returns:
        The transformation. Updates have the parameters' dtypes (without
        `params`, the gradients').

    Raises:
        TypeError, ValueError: here for hyper-parameters out of range; in
            `init` for schedules that begin out of range, and for block specs
            that do not fit the parameters; in `update` if weight decay needs
            `params` and got none.

    Examples:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> tx = adam_mini(1e-1)
        >>> state = tx.init(params)
        >>> jax.tree.map(jnp.shape, state[0].nu)
        {'bias': (3,), 'kernel': (1, 3)}
        >>> loss = lambda params: jnp.sum(params["kernel"] ** 2) + jnp.sum(params["bias"])
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{loss(params):.2f}")
        2.05

    References:
        Zhang et al., [Adam-mini: Use Fewer Learning Rates To Gain
        More](https://arxiv.org/abs/2406.16793), Algorithms 1 to 3; Loshchilov
        and Hutter, [Decoupled Weight Decay
        Regularization](https://arxiv.org/abs/1711.05101).
    """
    learning_rate = check_scalar_or_schedule("learning_rate", learning_rate)
    weight_decay = check_scalar_or_schedule("weight_decay", weight_decay)
    check_given_mask("mask", mask)
    return cast_to_param_dtypes(
        optax.chain(
            _wide_adam_mini(
                **_checked(b1, b2, eps, eps_root, mu_dtype, nesterov, bounded),
                block_specs=_check_block_specs(block_specs),
            ),
            add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        ),
        3,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )


def _checked(
    b1: Any, b2: Any, eps: Any, eps_root: Any, mu_dtype: Any, nesterov: Any, bounded: Any
) -> dict[str, Any]:
    decays = check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    mu_dtype = check_mu_dtype(mu_dtype)
    if mu_dtype == jnp.int8 and not any(isinstance(decays[b], jax.Array) for b in ("b1", "b2")):
        check_decays(decays["b1"], decays["b2"])
    check_is_bool(nesterov=nesterov, bounded=bounded)
    return {**decays, "mu_dtype": mu_dtype, "nesterov": nesterov, "bounded": bounded}


def cast_to_param_dtypes(
    tx: optax.GradientTransformation, length: int | None = None, **hyperparams: Any
) -> optax.GradientTransformationExtraArgs:
    """Computes everything in float32, and casts once, at the end, to the parameters' dtypes.

    Args:
        tx: what computes it.
        length: of the chain that `tx` is, if it is one.
        hyperparams: its numbers and schedules. `init` refuses arrays, and first values of
            schedules, that are out of range.
    """
    schedules = {name: value for name, value in hyperparams.items() if callable(value)}
    numbers = {name: value for name, value in hyperparams.items() if name not in schedules}

    def init_fn(params: Any) -> Any:
        check_hyperparams(are_known=True, **numbers)
        check_first_values(**schedules)
        return tx.init(params)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        check_order(updates)
        if length is not None:
            check_is_chain(state, length)
        params = _in_state(state if length is None else state[0], params)
        new, state = tx.update(updates, state, params)
        like = updates if params is None else params
        cast = lambda u, p: None if u is None else u.astype(jnp.result_type(p))
        return jax.tree.map(cast, new, like, is_leaf=lambda u: u is None), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _in_state(state: Any, params: Any) -> Any:
    """`params` without what the state has no moments for: a whole Equinox model may be given."""
    mu = tree_in(getattr(state, "mu", None))
    if params is None or jax.tree.structure(mu) == jax.tree.structure(params):
        return params
    keep = lambda m, p: None if m is None else p
    try:
        return jax.tree.map(keep, mu, params, is_leaf=lambda m: m is None)
    except ValueError:  # another structure, about which update has a better message
        return params


def add_decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` for numbers and schedules, with errors that say what to do."""
    is_number = not isinstance(weight_decay, jax.Array) and not callable(weight_decay)
    rate: Any = weight_decay

    def decay(params: Any) -> optax.GradientTransformation:
        # Optax would call the function with the updates, whose dtypes are not the parameters'.
        is_called = is_label_function(mask) and not is_empty(params)
        return optax.add_decayed_weights(rate, mask(params) if is_called else mask)

    def init_fn(params: Any) -> Any:
        check_mask("mask", mask, params)
        return decay(params).init(params)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if is_number and weight_decay == 0:  # params may be left out
            return updates, state
        if params is None:
            raise ValueError(
                f"weight decay (weight_decay={weight_decay}) needs the parameters, and update got "
                "none: call tx.update(grads, state, params), or set weight_decay=0.0 (a number: "
                "inside optax.inject_hyperparams, name it in static_args)"
            )
        # Integers do not decay, and a parameter without a gradient does not move.
        is_none = lambda u: u is None
        keep = lambda u, p, d: d if u is not None and _is_inexact(p) else u
        wide = lambda x: x if x is None else jnp.asarray(x, widen(jnp.result_type(x)))
        kept = lambda tree: jax.tree.map(
            lambda x, p: wide(x) if _is_inexact(p) else 0.0, tree, params, is_leaf=is_none
        )
        # Optax's state says whether there is a mask, and a converted run may have had none.
        inner = state.inner_state if isinstance(state, optax.MaskedState) else state
        given = inner if mask is None else optax.MaskedState(inner)
        decayed, given = decay(params).update(kept(updates), given, kept(params))
        inner = given.inner_state if isinstance(given, optax.MaskedState) else given
        state = state._replace(inner_state=inner) if isinstance(state, optax.MaskedState) else inner
        return jax.tree.map(keep, updates, params, decayed, is_leaf=is_none), state

    return optax.GradientTransformation(init_fn, update_fn)


def _wide_adam_mini(
    *,
    b1: Any,
    b2: Any,
    eps: Any,
    eps_root: Any,
    mu_dtype: Any,
    nesterov: bool,
    bounded: bool,
    block_specs: Any,
) -> optax.GradientTransformation:
    """`scale_by_adam_mini` with updates in float32 or wider, whatever the parameters are."""

    def init_fn(params: Any) -> ScaleByAdamMiniState:
        leaves = jax.tree.leaves(params)
        check_hyperparams(are_known=True, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
        if mu_dtype == jnp.int8 and not any(isinstance(b, jax.core.Tracer) for b in (b1, b2)):
            check_decays(b1, b2)
        labels = remembered(resolve_block_specs, block_specs, params, is_init=True)
        is_outer = has_outer(block_specs, [spec for _, spec in labels])
        for (path, _), leaf in zip(labels, leaves, strict=True):
            check_param_dtype(path, jnp.result_type(leaf), mu_dtype)
        # Zeros like the results of update, with the same shapes, dtypes and shardings.
        nu = [
            jax.tree.map(
                functools.partial(zeros_beside, leaf),
                jax.eval_shape(lambda x, spec=spec: spec.block_mean(x, _abs_sq), leaf),
            )
            for (_, spec), leaf in zip(labels, leaves, strict=True)
        ]
        mu = jax.tree.map(  # with an explicit dtype, so that it is not weak
            lambda p: jnp.zeros_like(p, dtype=mu_dtype or jnp.result_type(p)), params
        )
        return ScaleByAdamMiniState(
            jnp.zeros([], jnp.int32), pack_mu(mu, mu_dtype), pack_nu(nu, params, is_outer)
        )

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByAdamMiniState]:
        check_is_state(state)
        mu_tree = unpack_mu(state.mu, mu_dtype)
        mu, treedef = jax.tree.flatten(mu_tree)
        grads = leaves_as(mu_tree, "gradients", updates)
        like = grads if params is None else leaves_as(mu_tree, "params", params)
        # A label function sees the parameters: mu has another dtype, and gradients may be None.
        dtypes = [
            m.dtype if p is None else jnp.result_type(p) for m, p in zip(mu, like, strict=True)
        ]
        shapes = [jax.ShapeDtypeStruct(m.shape, dtype) for m, dtype in zip(mu, dtypes, strict=True)]
        labels = remembered(resolve_block_specs, block_specs, jax.tree.unflatten(treedef, shapes))
        nu = unpack_nu(state.nu, [spec for _, spec in labels])
        check_grids(labels, shapes, nu)

        count = jnp.asarray(optax.safe_increment(state.count))
        step = _step(count, b1, b2, eps, eps_root, nesterov, bounded, mu_dtype == jnp.int8)
        seeds: list[Any] = [None] * len(mu)
        if mu_dtype == jnp.int8:
            salts = [salt_of(path_of(keys)) for keys, _ in leaves_with_path(mu_tree)]
            seeds = rounding_seeds(count, salts)
        new: list[tuple[Any, Any, Any]] = []
        for (path, spec), seed, shape, g, p, m, v in zip(
            labels, seeds, shapes, grads, like, mu, nu, strict=True
        ):
            # Without params, mu says what kind of numbers a parameter has.
            of_mu = m if params is None and mu_dtype is None else shape
            check_gradient(path, of_mu, g)
            check_shape(path, "parameter", shape.shape, p)
            if g is None:
                new.append((None, m, v))
            elif not (_is_inexact(g) and _is_inexact(shape)):  # integers are left alone
                new.append((jnp.zeros(shape.shape, widen(shape.dtype)), m, v))
            else:
                check_stored_dtype(path, m, is_codes=mu_dtype == jnp.int8)
                kept = m.dtype if params is None else shape.dtype
                new.append(
                    _update_parameter(
                        spec, np.dtype(mu_dtype or kept), nesterov, bounded, g, m, v, step, seed
                    )
                )  # fmt: skip
        in_tree = lambda i: jax.tree.unflatten(treedef, [leaf[i] for leaf in new])
        nu = repack_nu(state.nu, [leaf[2] for leaf in new])
        return in_tree(0), ScaleByAdamMiniState(count, pack_mu(in_tree(1), mu_dtype), nu)

    return optax.GradientTransformation(init_fn, update_fn)


class _Step(NamedTuple):
    """The numbers of one step, the same for all parameters."""

    b1: Any
    b1_rest: Any  # 1 - b1, to all digits
    b2: Any
    b2_rest: Any
    c2: Any  # 1 - b2**t
    eps: Any
    eps_root: Any
    mu_weight: Any  # m_hat = mu_weight * mu, and with Nesterov's momentum + g_weight * g
    g_weight: Any
    longest: Any  # the longest step of Adam


# One program for each kind of parameter, with the numbers as arguments: an eager update is as fast
# as Adam's, and inside jax.jit equal parameters are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _update_parameter(
    spec: Spec, dtype: np.dtype, nesterov: bool, bounded: bool,
    g: Array, m: Array, v: Any, t: _Step, seed: Any,
) -> tuple[Array, Array, Any]:  # fmt: skip
    """Algorithm 1 for one parameter: its update, and the new `m` and `v`."""
    g = jnp.asarray(g)
    squares = spec.block_mean(g, _abs_sq)
    # A second moment that was cast to 16 bits would no longer change: it is widened again.
    nu = jax.tree.map(lambda v, s: (t.b2 * v + t.b2_rest * s).astype(widen(v.dtype)), v, squares)
    g = g.astype(widen(g.dtype))
    old, new = spec.factors(v, g.shape), spec.factors(nu, g.shape)
    mu = t.b1 * read(m, old) + t.b1_rest * g
    # Use the rounded m of the state: with the exact one, XLA would keep a copy of m.
    kept = write(mu, new, dtype, seed)
    m_hat = t.mu_weight * read(kept, new)
    if nesterov:
        m_hat += t.g_weight * g
    # With one number for each block it is computed once for each, and then spread.
    inverse_root = lambda v: 1 / (jnp.sqrt(v / t.c2 + t.eps_root) + t.eps)
    update = m_hat * spread_product(new, g.shape, inverse_root)
    return _clip_step(update, t.longest) if bounded else update, kept, nu


def _clip_step(update: Array, longest: Any) -> Array:
    """Limits every coordinate to `longest`."""
    if jnp.issubdtype(update.dtype, jnp.complexfloating):
        length = jnp.abs(jnp.where(update == 0, 1, update))  # at 0 it has no derivative
        is_long = length > longest
        return update * jnp.where(is_long, longest / jnp.where(is_long, length, 1), 1)
    return jnp.clip(update, -longest, longest)


def _step(
    count: Array, b1: Any, b2: Any, eps: Any, eps_root: Any, nesterov: bool, bounded: bool,
    is_int8: bool,
) -> _Step:  # fmt: skip
    b1, b2, eps, eps_root = map(widened, (b1, b2, eps, eps_root))
    if is_int8 and not all(isinstance(b, (int, float)) for b in (b1, b2)):
        b2 = jnp.clip(b2, *allowed_b2(b1))
    c1, c2 = _bias_correction(b1, count), _bias_correction(b2, count)
    mu_weight, g_weight = 1 / c1, 0.0
    if nesterov:
        c1_next = _bias_correction(b1, jnp.asarray(optax.safe_increment(count)))
        mu_weight, g_weight = b1 / c1_next, (1 - b1) / c1
    longest = _longest(count, b1, b2, c2, mu_weight, g_weight) if bounded else jnp.inf
    return _Step(b1, 1 - b1, b2, 1 - b2, c2, eps, eps_root, mu_weight, g_weight, longest)


def _longest(count: Any, b1: Any, b2: Any, c2: Any, mu_weight: Any, g_weight: Any) -> Array:
    """The longest step that Adam can make, by the Cauchy-Schwarz inequality.

    Let `m = sum a_i g_i` and `v = sum b_i g_i**2`, with `a_i = (1 - b1) b1**i` and `b_i = (1 - b2)
    b2**i`. Then `m**2 <= sum(a_i**2 / b_i) v`. Nesterov's momentum adds `g_weight` to the weight of
    the newest gradient.
    """
    # a_i**2 / b_i = r**i (1 - b1)**2 / (1 - b2); with b2 = 0 it is infinite from i = 1 on
    log_r = jnp.minimum(2 * _log(b1) - _log(b2), 80.0)
    t = count.astype(jnp.float32)
    is_one = jnp.abs(log_r) < 1e-6
    below_one = jnp.where(is_one, -1.0, log_r)
    exponent = t * below_one
    ratio = jnp.expm1(jnp.minimum(exponent, 80.0)) / jnp.expm1(below_one)
    total = jnp.where(is_one, t, ratio) * (1 - b1) ** 2
    total = mu_weight**2 * total + g_weight * (2 * mu_weight * (1 - b1) + g_weight)
    longest = jnp.sqrt(c2 * total / (1 - b2))
    # A little more, so that rounding never shortens a step of Adam's; infinite without a bound.
    is_bounded = jnp.isfinite(longest) & (exponent <= 80)
    return jnp.where(is_bounded, longest * (1 + 1e-5), jnp.inf)


def _bias_correction(decay: Any, count: Array) -> Array:
    """1 - decay**count to full float32 precision: the plain form loses five digits at 0.999."""
    exact = -jnp.expm1(count * _log(decay))
    if isinstance(decay, (int, float)):
        return exact
    return jnp.where(decay > 0, exact, 1 - decay**count)  # a logarithm has no derivative at 0


_TINY = float(np.finfo(np.float32).tiny)


def _log(decay: Any) -> Any:
    """The logarithm of a decay rate, finite at 0."""
    if isinstance(decay, (int, float)):
        return math.log(max(decay, _TINY))
    return jnp.log(jnp.maximum(decay, _TINY))


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _abs_sq(x: Array) -> Array:
    return jnp.real(x * jnp.conj(x))


def _check_block_specs(block_specs: Any) -> Any:
    """Refuses labels that are not specs; only `init` can check the rest, against parameters."""
    if block_specs is None:
        return flax_layers()
    check_called(block_specs)
    if not is_label_function(block_specs):
        spec_leaves(block_specs)
    return block_specs
