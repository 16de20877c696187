"""Optimizers by name, with the schedule and the clipping that all examples use."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from examples.common.cli import ConfigError
from optax_adam_mini import adam_mini, muon_mini, stochastic_rounding


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters; every optimizer gets the same."""

    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warmup; with Muon, that of what is no matrix."""
    muon_learning_rate: float = 2e-2
    """The same of Muon's matrices."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises from 0; it then falls on a cosine. Without it, the
    part of --steps that --warmup-share says, and no more than 100."""
    warmup_share: float = 0.2
    """Part of the steps, from 0 to less than 1."""
    final_learning_rate: float = 0.1
    """Learning rate of the last step, as a fraction of the highest."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and gains have none."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""

    def warmup(self, steps: int) -> int:
        """Steps of the warmup in a run of `steps` steps."""
        if self.warmup_steps is None:
            return min(int(self.warmup_share * steps), 100)
        return self.warmup_steps

    def check(self, steps: int) -> None:
        """Refuse what cannot work in a run of `steps` steps."""
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(
                f"--warmup-share is {self.warmup_share}, but must be from 0 to less than 1."
            )
        if self.warmup_steps is not None and not 0 <= self.warmup_steps < steps:
            raise ConfigError(
                f"--warmup-steps is {self.warmup_steps}, but must be from 0 to --steps - 1 = "
                f"{steps - 1}."
            )
        for option, value in (("b1", self.b1), ("b2", self.b2)):
            if not 0 <= value < 1:
                raise ConfigError(f"--{option} is {value}, but must be from 0 to less than 1.")
        for option, value in (
            ("learning-rate", self.learning_rate),
            ("muon-learning-rate", self.muon_learning_rate),
            ("eps", self.eps),
        ):
            if not value > 0:
                raise ConfigError(f"--{option} is {value}, but must be more than 0.")
        for option, value in (
            ("weight-decay", self.weight_decay),
            ("clip-norm", self.clip_norm),
            ("final-learning-rate", self.final_learning_rate),
        ):
            if not value >= 0:
                raise ConfigError(f"--{option} is {value}, but must be at least 0.")


@dataclasses.dataclass(frozen=True)
class ParameterConfig:
    """In what the parameters are kept."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and gradients. bfloat16 halves their memory: the update is made in
    float32, and every new parameter is rounded."""
    rounding: Literal["random", "nearest"] = "random"
    """How parameters in bfloat16 are rounded: up or down at random, in proportion, which keeps
    steps that are too small for bfloat16 in the mean; or to nearest, which loses them."""

    @property
    def rounds_at_random(self) -> bool:
        """Whether the optimizer is wrapped in stochastic_rounding."""
        return self.param_dtype == "bfloat16" and self.rounding == "random"

    @property
    def mu_dtype(self) -> str | None:
        """That of a first moment which is not in 8 bits, where it is not the parameters'."""
        return "float32" if self.rounds_at_random else None

    def cast(self, params: Any) -> Any:
        """`params`, which are in float32. Those that were made in bfloat16 would be others: other
        types have other random numbers."""
        return jax.tree.map(lambda p: p.astype(self.param_dtype), params)


def decayed(params: Any) -> Any:
    """Weight decay's mask: True for matrices and embeddings. By name, because a bias of layers
    stacked for a scan has two axes as well."""

    def is_matrix(path: tuple, _: Any) -> bool:
        return not {"kernel", "embedding"}.isdisjoint(getattr(key, "key", None) for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _adamw(schedule: optax.Schedule, config: OptimizerConfig, block_specs: Any):
    del block_specs
    return optax.adamw(
        schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
    )


def _adam_mini(
    schedule: optax.Schedule, config: OptimizerConfig, block_specs: Any, mu_dtype: Any = None
):
    return adam_mini(
        schedule,
        config.b1,
        config.b2,
        config.eps,
        mu_dtype=mu_dtype,
        weight_decay=config.weight_decay,
        mask=decayed,
        block_specs=block_specs,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adam_mini": _adam_mini,
    "adam_mini_int8": functools.partial(_adam_mini, mu_dtype=jnp.int8),
}


def muon(
    schedule: optax.Schedule,
    config: OptimizerConfig,
    block_specs: Any,
    matrices: Any,
    **options: Any,
) -> optax.GradientTransformation:
    """Muon for `matrices`, Adam-mini for the rest, with a rate of its own for each."""
    ratio = config.muon_learning_rate / config.learning_rate
    return muon_mini(
        lambda count: ratio * schedule(count),
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_decay_mask=decayed,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        adam_learning_rate=schedule,
        muon_weight_dimension_numbers=matrices,
        block_specs=block_specs,
        **options,
    )


# Those that are told, too, what is a matrix.
OF_MATRICES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "muon_mini": muon,
    "muon_mini_int8": functools.partial(muon, mu_dtype=jnp.int8),
}


def check_name(name: str, option: str = "optimizer") -> None:
    """Refuse an optimizer that is not known."""
    known = [*OPTIMIZERS, *OF_MATRICES]
    if name not in known:
        raise ConfigError(f"--{option} is {name}, but must be one of {', '.join(known)}.")


def make_optimizer(
    name: str,
    config: OptimizerConfig,
    steps: int,
    block_specs: Any = None,
    matrices: Callable[[], Any] = dict,
    *,
    rounds_at_random: bool = False,
) -> optax.GradientTransformation:
    """Clip, then the optimizer `name` on a warmup and cosine schedule over `steps` steps.
    `block_specs` is Adam-mini's; the others do not look at it. `matrices()` gives Muon's
    dimension numbers, and is called for Muon alone. With `rounds_at_random` all of it
    is done in float32, for parameters in bfloat16."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup(steps),
        decay_steps=steps,
        end_value=config.final_learning_rate * config.learning_rate,
    )
    if name in OF_MATRICES:
        optimizer = OF_MATRICES[name](schedule, config, block_specs, matrices())
    else:
        optimizer = OPTIMIZERS[name](schedule, config, block_specs)
    if config.clip_norm != 0:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return stochastic_rounding(optimizer) if rounds_at_random else optimizer


def state_bytes(state: optax.OptState) -> int:
    """Bytes of all arrays of an optimizer's state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def numbers_in_v(state: optax.OptState) -> int:
    """How many numbers the second moment holds."""
    moments = [value for _, value in optax.tree.get_all_with_path(state, "nu")]
    return sum(leaf.size for leaf in jax.tree.leaves(moments))
