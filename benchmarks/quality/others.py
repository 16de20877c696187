"""What Adam-mini and AdamW are compared with, on the schedule, the clipping and the decoupled
weight decay of the examples. Of their other hyper-parameters, `b1` is the examples' and the rest
what their papers and Optax give.

To import this module adds them to the examples' optimizers.
"""

from collections.abc import Callable
from typing import Any

import optax

from benchmarks.quality.came import scale_by_came
from examples.common.optimizers import OF_MATRICES, OPTIMIZERS, OptimizerConfig, decayed, muon
from optax_adam_mini import per_element


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """`optax.adafactor` with momentum, and steps that do not grow with the parameters."""
    return optax.chain(
        # Optax factors axes of 128 and more, of which the small models here have few.
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, debias=False),
    )


SCALES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adafactor": _adafactor,
    "came": lambda config: scale_by_came(config.b1),
    "lion": lambda config: optax.scale_by_lion(config.b1),
    "sm3": lambda config: optax.scale_by_sm3(config.b1),
    "sgd": lambda config: optax.trace(config.b1),
}


def chain_of(
    scale: Callable[[OptimizerConfig, Any], optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformation]:
    """An optimizer of the examples with `scale(config, block_specs)` in the place of Adam's."""

    def build(schedule: optax.Schedule, config: OptimizerConfig, block_specs: Any):
        return optax.chain(
            scale(config, block_specs),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(schedule),
        )

    return build


OPTIMIZERS.update(
    {name: chain_of(lambda config, _, scale=scale: scale(config)) for name, scale in SCALES.items()}
)
# With a number for each coordinate Adam-mini is Adam: this is `optax.contrib.muon`, with the mask
# of weight decay for the rest too.
OF_MATRICES["muon"] = lambda schedule, config, _, matrices: muon(
    schedule, config, per_element(), matrices
)
