"""`muon_mini`: Muon for matrices and Adam-mini for the rest, with one moment per parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from optax_adam_mini.dimension_numbers import Pieces, dimension_numbers, specs_of
from optax_adam_mini.hyperparams import (
    check_count,
    check_first_values,
    check_hyperparams,
    check_is_bool,
    check_mu_dtype,
    check_scalar_or_schedule,
)
from optax_adam_mini.labels import (
    BlockSpecs,
    call_noting_parts,
    check_called,
    function_of_some,
    is_empty,
    is_label_function,
    remembered,
)
from optax_adam_mini.messages import (
    check_given_mask,
    check_has_gradients,
    check_mask,
    check_order,
)
from optax_adam_mini.momentum import check_coefficients, coefficients, scale_by_muon_in_pieces
from optax_adam_mini.partition.flax_layers import flax_layers
from optax_adam_mini.sums import widened
from optax_adam_mini.transform import adam_mini, add_decayed_weights, cast_to_param_dtypes

if TYPE_CHECKING:
    from jaxtyping import PyTree

Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]
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
    preconditioning: Preconditioning = "frobenius",
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
            for what goes to Adam-mini, or a function of the parameters (their shapes and dtypes)
            that returns one and is called once;
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
    from optax.contrib import scale_by_muon

    learning_rate = check_scalar_or_schedule("learning_rate", learning_rate)
    weight_decay = check_scalar_or_schedule("weight_decay", weight_decay)
    adam_rate = learning_rate
    if adam_learning_rate is not None:
        adam_rate = check_scalar_or_schedule("adam_learning_rate", adam_learning_rate)
    adam_weight_decay = check_scalar_or_schedule("adam_weight_decay", adam_weight_decay)
    check_given_mask("weight_decay_mask", weight_decay_mask)
    hyperparams: dict[str, Any] = {
        "beta": beta, "eps": eps, "adam_b1": adam_b1, "adam_b2": adam_b2,
        "adam_eps_root": adam_eps_root,
    }  # fmt: skip
    if consistent_rms is not None:
        hyperparams["consistent_rms"] = consistent_rms
    check_hyperparams(**hyperparams)
    rates = {"learning_rate": learning_rate, "adam_learning_rate": adam_rate,
             "weight_decay": weight_decay, "adam_weight_decay": adam_weight_decay}  # fmt: skip
    schedules = {name: rate for name, rate in rates.items() if callable(rate)}
    arrays = {name: x for name, x in (hyperparams | rates).items() if name not in schedules}
    ns_steps = check_count("ns_steps", ns_steps)
    dtype = check_mu_dtype(mu_dtype)
    check_is_bool(nesterov=nesterov, adaptive=adaptive, parts=parts)
    if preconditioning not in (known := get_args(Preconditioning)):
        raise ValueError(f"preconditioning must be one of {known}, got {preconditioning!r}")
    check_coefficients(ns_coeffs, ns_steps)
    check_called(muon_weight_dimension_numbers)

    def orthogonalize(pieces: list[Pieces]) -> optax.GradientTransformation:
        return scale_by_muon(
            coefficients(ns_coeffs), ns_steps, widened(beta), widened(eps), nesterov=nesterov,
            adaptive=adaptive, preconditioning=preconditioning,
            weight_dimension_numbers=[[p.numbers] * p.matrices for p in pieces],
        )  # fmt: skip

    matrices = lambda pieces_of, mask: cast_to_param_dtypes(
        optax.chain(
            scale_by_muon_in_pieces(orthogonalize, pieces_of, dtype, consistent_rms),
            optax.identity(),  # `optax.contrib.muon` has an entry in its state here
            add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        ),
        4,
    )  # fmt: skip
    rest = lambda block_specs, mask: adam_mini(
        adam_rate, adam_b1, adam_b2, eps, adam_eps_root, dtype, adam_weight_decay,
        mask, nesterov=nesterov, bounded=bounded, block_specs=block_specs,
    )  # fmt: skip
    rest_as_given = rest(block_specs, weight_decay_mask)
    default = flax_layers()

    def both(params: Any, is_init: bool = False) -> optax.GradientTransformationExtraArgs:
        ask = lambda of, given, *args: remembered(of, given, params, *args, is_init=is_init)
        found = ask(dimension_numbers, muon_weight_dimension_numbers)
        numbers = [each for each in found if each is not None]
        # Functions see the whole tree.
        given = default if block_specs is None and not parts else block_specs
        if is_label_function(given) and not is_empty(params):
            given = ask(function_of_some, given, tuple(parts or n is None for n in found))
        mask = weight_decay_mask
        if is_label_function(mask) and not is_empty(params):
            mask = ask(_mask_of, mask)

        def pieces_of(part: Any) -> list[Pieces]:
            """The pieces of every matrix, in a tree of the matrices alone."""
            specs = specs_of(given, part, is_init) if parts else [None] * len(numbers)
            shapes = [jnp.shape(p) for p in jax.tree.leaves(part)]
            return [Pieces.of(*each) for each in zip(shapes, numbers, specs, strict=True)]

        names = [ADAM if each is None else MUON for each in found]
        labels = jax.tree.unflatten(jax.tree.structure(params), names)
        as_given = given is block_specs and mask is weight_decay_mask
        adam = rest_as_given if as_given else rest(given, mask)
        # As a function: Optax would call labels in an Equinox module.
        return optax.partition({MUON: matrices(pieces_of, mask), ADAM: adam}, lambda _: labels)

    def init_fn(params: Any) -> Any:
        # Here, because the parts know some of them by other names.
        check_hyperparams(are_known=True, **arrays)
        check_first_values(**schedules)
        if not is_label_function(weight_decay_mask):
            check_mask("weight_decay_mask", weight_decay_mask, params)
        return both(params, is_init=True).init(params)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        check_order(updates)
        check_has_gradients(updates, params)
        if set(getattr(state, "inner_states", ())) != {MUON, ADAM}:
            raise ValueError(
                "muon_mini: expected the PartitionState that init made, got a "
                f"{type(state).__name__}: call tx.update(grads, state, params), in this order"
            )
        # Functions get the parameters, whose dtypes may differ from the gradients'.
        return both(updates if params is None else params).update(
            updates, state, params, **extra_args
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mask_of(mask: Any, params: Any) -> Any:
    """What a mask function returns for the whole tree, as a function for its parts."""
    found = call_noting_parts("weight_decay_mask", mask, params)
    check_mask("weight_decay_mask", lambda _: found, params)
    return lambda _: found
