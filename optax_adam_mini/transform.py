"""Adam-mini as Optax gradient transformations (Zhang et al., arXiv 2406.16793, Algorithm 1)."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from optax_adam_mini.compiled import compiled
from optax_adam_mini.hyperparams import (
    check_hyperparams,
    check_in_range,
    check_mu_dtype,
    check_param_dtype,
    check_scalar_or_schedule,
)
from optax_adam_mini.labels import (
    BlockSpecs,
    check_called,
    is_label_function,
    leaves_as,
    resolve_block_specs,
    spec_leaves,
)
from optax_adam_mini.partition.flax_layers import flax_layers
from optax_adam_mini.product import Spec, in_trees, like_state, of_parameters
from optax_adam_mini.quantized import check_decays, dequantize, quantize, rounding_seed
from optax_adam_mini.sums import widen

# Annotations are objects here, not strings: Optax's tests look learning_rate's up.
if TYPE_CHECKING:
    from jaxtyping import Array, Int, PyTree


class ScaleByAdamMiniState(NamedTuple):
    """State of [`scale_by_adam_mini`][].

    Attributes:
        count: number of updates made, shape `()`, int32.
        mu: first moment, a pytree like the parameters; their dtypes, or `mu_dtype`. With int8,
            codes relative to a bound that `nu` gives.
        nu: mean of the squared gradient's moving average over each block, a pytree like the
            parameters, float32 or wider; each array has the rank of its parameter and the shape
            of its grid of blocks. Where a spec is an [`outer`][optax_adam_mini.outer], an
            [`OuterMoments`][optax_adam_mini.product.OuterMoments] of two such pytrees.
    """

    count: 'Int[Array, ""]'  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: "PyTree"
    nu: "PyTree"


def scale_by_adam_mini(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    block_specs: BlockSpecs | None = None,
) -> optax.GradientTransformation:
    """Rescales updates by Adam-mini: Adam with one second moment for each block.

    As `optax.scale_by_adam`, argument for argument, but for `block_specs`. See [`adam_mini`][].

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of `nu`, at least 0.
        eps_root: added to `nu` under the square root, at least 0; greater than 0 where gradients
            are taken through the update.
        mu_dtype: dtype of `mu`, as in [`adam_mini`][].
        nesterov: whether to use Nesterov momentum (Dozat 2016).
        block_specs: pytree of [`BlockSpec`][] like the parameters, or a prefix of it, or a label
            function that returns one; None for [`flax_layers`][]`()`.

    Returns:
        The transformation; its state is a [`ScaleByAdamMiniState`][].

    Raises:
        TypeError, ValueError: here for hyper-parameters out of range; in `init` for block specs
            that do not fit the parameters.

    Examples:
        >>> tx = scale_by_adam_mini(block_specs=per_tensor())
        >>> params = {"scale": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"scale": jnp.array([1.0, 2.0, 3.0])}, state)
        >>> print([f"{u:.3f}" for u in updates["scale"]], state.nu["scale"].shape)
        ['0.463', '0.926', '1.389'] (1,)
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return compiled(
        _scale_by_adam_mini,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=check_mu_dtype(mu_dtype),
        nesterov=nesterov,
        block_specs=_check_block_specs(block_specs),
    )


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: "PyTree[bool] | Callable[[Any], Any] | None" = None,
    *,
    nesterov: bool = False,
    block_specs: BlockSpecs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam-mini with decoupled weight decay: `optax.adamw` with half of its memory.

    For the parameters `p` of each block, with the gradient `g`, at step `t`:

        m  = b1 m + (1 - b1) g                    for each coordinate
        v  = b2 v + (1 - b2) mean(g * g)          one number for each block
        p -= learning_rate * (m_hat / (sqrt(v_hat + eps_root) + eps) + weight_decay * p)

    with `m_hat = m / (1 - b1**t)` and `v_hat = v / (1 - b2**t)`. Where the spec is an
    [`outer`][optax_adam_mini.outer], `v` of a block is the product of a row and a column.
    Hyper-parameters carry over from AdamW unchanged. An eager `update` runs as one compiled
    program; inside `jax.jit` it is traced like any other code.

    Args:
        learning_rate: a number or a schedule `count -> number`.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to the root, at least 0.
        eps_root: added under the root, at least 0; greater than 0 where gradients are taken through
            the update.
        mu_dtype: dtype of `mu`; None for the parameters'. `jnp.int8` keeps it in 8 bits, an eighth
            of AdamW's state in all. Updates are made from `mu` as it is kept.
        weight_decay: at least 0, multiplied by the learning rate; or a schedule.
        mask: which parameters decay: a pytree of booleans like the parameters or a prefix of it, or
            a function of the parameters that returns one; None for all.
        nesterov: whether to use Nesterov momentum (Dozat 2016).
        block_specs: pytree of [`BlockSpec`][] like the parameters, or a prefix of it, or a label
            function that returns one; None for [`flax_layers`][]`()`.

    Returns:
        The transformation. Updates have the parameters' dtypes.

    Raises:
        TypeError, ValueError: here for hyper-parameters out of range; in `init` for block specs
            that do not fit the parameters; in `update` if weight decay needs `params` and there are
            none.

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
        More](https://arxiv.org/abs/2406.16793), Algorithms 1 to 3; Loshchilov and Hutter,
        [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101).
    """
    check_hyperparams(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    check_scalar_or_schedule("learning_rate", learning_rate, minimum=None)
    check_scalar_or_schedule("weight_decay", weight_decay, minimum=0.0)
    if mask is not None and not callable(mask):
        mask = jax.tree.map(bool, mask)
    return compiled(
        _adam_mini,
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=check_mu_dtype(mu_dtype),
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
        block_specs=_check_block_specs(block_specs),
    )


def _adam_mini(
    *, learning_rate: Any, weight_decay: Any, mask: Any, **adam: Any
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        _scale_by_adam_mini(**adam),
        _add_decayed_weights(weight_decay, mask),
        _keep_dtypes(optax.scale_by_learning_rate(learning_rate)),
    )


def _keep_dtypes(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Updates in the dtypes that they come in, which a rate in float32 would widen."""

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u, new: new.astype(u.dtype), updates, new), state

    return optax.GradientTransformation(tx.init, update_fn)


def _add_decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.identity()  # so that params may be left out of update

    decay = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                f"weight decay (weight_decay={weight_decay}) needs the parameters, and update got "
                "none: call tx.update(grads, state, params), or set weight_decay=0.0"
            )
        decayed, state = decay.update(updates, state, params)
        # Integers do not decay, and what has no gradient does not move.
        keep = lambda p, u, d: d.astype(u.dtype) if u is not None and _is_inexact(p) else u
        kept = jax.tree.map(keep, params, updates, decayed)
        return kept, state

    return optax.GradientTransformation(decay.init, update_fn)


_CONVERT = "convert it, from_adam_state(state, params, block_specs)"
_OTHER_SPECS = (
    "the state was made with other block specs: pass those, or convert it, "
    "from_adam_state(to_adam_state(state, params, its_specs), params, block_specs)"
)
_LIKE_ADAMS = f"it may be that of optax.adam or optax.adamw: {_CONVERT}; or {_OTHER_SPECS}"


def _scale_by_adam_mini(
    *, b1: Any, b2: Any, eps: Any, eps_root: Any, mu_dtype: Any, nesterov: bool, block_specs: Any
) -> optax.GradientTransformation:
    def init_fn(params: Any) -> ScaleByAdamMiniState:
        leaves = jax.tree.leaves(params)
        labels = resolve_block_specs(block_specs, params)
        check_in_range(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
        if mu_dtype == jnp.int8:
            check_decays(b1, b2)
        for (path, _), leaf in zip(labels, leaves, strict=True):
            check_param_dtype(path, jnp.result_type(leaf), mu_dtype)
        # Zeros of what update will make, so that shape, dtype and sharding are the same.
        blocks = [
            jax.eval_shape(lambda x, spec=spec: spec.block_mean(x, _abs_sq), leaf)
            for (_, spec), leaf in zip(labels, leaves, strict=True)
        ]
        return ScaleByAdamMiniState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(  # with a dtype given, so that none is weak
                lambda p: jnp.zeros_like(p, dtype=mu_dtype or jnp.result_type(p)), params
            ),
            nu=in_trees(
                [
                    jax.tree.map(lambda v, leaf=leaf: _zeros_beside(v, leaf), block)
                    for block, leaf in zip(blocks, leaves, strict=True)
                ],
                params,
            ),
        )

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByAdamMiniState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        c1, c2 = _bias_correction(b1, count), _bias_correction(b2, count)

        # Parameters that are alike are traced once, which halves the time of tracing GPT-2.
        @functools.partial(jax.jit, static_argnums=0)
        def adam_mini(spec: Spec, g: "Array", m: "Array", v: Any, seed: Any) -> tuple[Any, ...]:
            mean = spec.block_mean(g, _abs_sq)
            nu = jax.tree.map(lambda v, mean: b2 * v + (1 - b2) * mean, v, mean)
            nu_hat = jax.tree.map(lambda nu: nu / c2, nu)
            g = g.astype(widen(g.dtype))
            # As it is kept, rounded: from an exact one XLA would make the update with a copy of m.
            if m.dtype == jnp.int8:
                kept = quantize(spec, b1 * dequantize(spec, m, v) + (1 - b1) * g, nu, seed)
                mu = dequantize(spec, kept, nu)
            else:
                kept = (b1 * m.astype(g.dtype) + (1 - b1) * g).astype(m.dtype)
                mu = kept.astype(g.dtype)
            # What is the same for a whole block is computed once for the block, and then spread.
            step = lambda v: 1 / (jnp.sqrt(v + eps_root) + eps)
            if nesterov:
                c1_next = _bias_correction(b1, count + 1)
                mean = b1 * mu / c1_next + (1 - b1) * g / c1
                update = mean * spec.spread(nu_hat, g.shape, step)
            else:
                update = mu * spec.spread(nu_hat, g.shape, lambda v: step(v) / c1)
            return update, kept, nu

        def update_leaf(index: int, path: str, spec: Spec, g: Any, m: Any, v: Any, p: Any) -> Any:
            if (shapes := jax.tree.map(jnp.shape, v)) != spec.grid(m.shape):
                raise ValueError(
                    f"{path}: the state's nu has shape {shapes}, but {spec} cuts the shape "
                    f"{m.shape} into the grid {spec.grid(m.shape)}: "
                    + (_LIKE_ADAMS if is_like_adams else _OTHER_SPECS)
                )
            if g is None:
                return None, m, v
            if jnp.shape(g) != m.shape:
                raise ValueError(
                    f"{path}: got a gradient of shape {jnp.shape(g)}, but the state was made for a "
                    f"parameter of shape {m.shape}: call update with gradients of the parameters "
                    "given to init"
                )
            if not (_is_inexact(g) and _is_inexact(p)):  # integers are left alone
                return jnp.zeros(m.shape, p.dtype), m, v
            if (m.dtype == jnp.int8) != (mu_dtype == jnp.int8):
                raise ValueError(
                    f"{path}: the state's mu is {m.dtype}, but the transformation has "
                    f"mu_dtype={mu_dtype}: pass the mu_dtype that the state was made with, or "
                    "convert it, from_adam_state(to_adam_state(state, params, block_specs), "
                    f"params, block_specs, mu_dtype={mu_dtype})"
                )
            update, mu, nu = adam_mini(spec, g, m, v, rounding_seed(count, index))
            dtype = g.dtype if params is None else p.dtype
            return update.astype(dtype), mu, jax.tree.map(lambda nu, v: nu.astype(v.dtype), nu, v)

        if isinstance(state, optax.ScaleByAdamState):
            raise ValueError(f"update: got the state of optax.adam or optax.adamw: {_CONVERT}")
        # mu, not updates, has the parameters' structure: gradients may be None.
        mu, treedef = jax.tree.flatten(state.mu)
        nu, grads = of_parameters(state.nu), leaves_as(state.mu, "gradients", updates)
        like = grads if params is None else leaves_as(state.mu, "params", params)
        labels = resolve_block_specs(block_specs, state.mu)
        is_like_adams = jax.tree.map(jnp.shape, nu) == [m.shape for m in mu]
        new = [
            update_leaf(index, *label, *leaves)
            for index, (label, *leaves) in enumerate(zip(labels, grads, mu, nu, like, strict=True))
        ]
        updates, mu = (jax.tree.unflatten(treedef, [leaf[i] for leaf in new]) for i in range(2))
        nu = like_state(state.nu, [leaf[2] for leaf in new])
        return updates, ScaleByAdamMiniState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _zeros_beside(block: jax.ShapeDtypeStruct, param: Any) -> "Array":
    """Zeros like `block`; where its sharding is explicit, on the devices that a parameter is on."""
    mesh = getattr(getattr(param, "sharding", None), "mesh", None)  # has devices if param has
    if not (isinstance(block.sharding, NamedSharding) and isinstance(mesh, Mesh)):
        return jnp.zeros_like(block)
    return jnp.zeros_like(block, device=NamedSharding(mesh, block.sharding.spec))


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _bias_correction(decay: Any, count: "Array") -> "Array":
    """1 - decay**count, to all of float32's digits: the plain form loses five at 0.999."""
    if isinstance(decay, jax.Array):
        log = jnp.log(decay)
    else:
        log = math.log(decay) if decay > 0 else -math.inf
    return -jnp.expm1(count * log)


def _abs_sq(x: "Array") -> "Array":
    return jnp.real(x * jnp.conj(x))


def _check_block_specs(block_specs: Any) -> Any:
    """Refuses labels that are no specs; the rest can only be checked against parameters."""
    if block_specs is None:
        return flax_layers()
    check_called(block_specs)
    if not is_label_function(block_specs):
        spec_leaves(block_specs)
    return block_specs
