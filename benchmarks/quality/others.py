"""Optimizers to compare with AdamW and Adam-mini. They use the schedule, the clipping, the weight
decay (decoupled) and the `b1` of the examples; their other hyper-parameters are those of their
papers and of Optax.

Importing this module adds them to the examples' optimizers.
"""

from collections.abc import Callable
from typing import Any

import optax

from benchmarks.quality.came import scale_by_came
from examples.common.optimizers import OF_MATRICES, OPTIMIZERS, OptimizerConfig, decayed, muon
from optax_adam_mini import per_element


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """`optax.adafactor` with momentum, and without steps in proportion to the parameters."""
    return optax.chain(
        # By default Optax factors only axes of 128 or more; the small models have few of these.
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
    """An optimizer of the examples with `scale(config, block_specs)` in place of Adam's scaling."""

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
# Adam-mini with a number per coordinate is Adam: this is `optax.contrib.muon`, except that the mask
# of weight decay also applies to the rest.
OF_MATRICES["muon"] = lambda schedule, config, _, matrices: muon(
    schedule, config, per_element(), matrices
)
