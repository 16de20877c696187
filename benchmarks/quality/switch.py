"""From AdamW to Adam-mini in the middle of a run: does the loss jump?

python -m benchmarks.quality.switch

Trains the nano GPT-2 with AdamW. Halfway, four copies continue on the same batches: with AdamW,
with Adam-mini from the converted state (in float32, and with the first moment in 8 bits), and with
Adam-mini from a fresh state.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from examples.common import text
from examples.common.language import Training, block_specs
from examples.gpt2.train import Config, make_program
from optax_adam_mini import from_adam_state


@dataclasses.dataclass(frozen=True)
class Options:
    """Switch the optimizer of a nano GPT-2 in the middle of its run."""

    steps: int = 400
    """Optimizer steps; the switch is halfway."""
    seed: int = 0
    """Seed of the weights and the batches."""
    v: Literal["mean", "outer"] = "outer"
    """What Adam-mini stores per block."""
    data: str = "runs/switch"
    """Folder for the tokens."""


def main(options: Options) -> None:
    config = Config(steps=options.steps, seed=options.seed, v=options.v)
    context = config.architecture.context
    data = text.load(config.data, Path(options.data))
    held_out = text.held_out_windows(data.held_out, config.eval_windows, context)
    programs = {name: make_program(config, name) for name in Config.compared}
    steps = {name: jax.jit(program.step) for name, program in programs.items()}
    evaluate = jax.jit(programs["adamw"].evaluate)

    def run(name: str, training: Training, first: int, last: int) -> tuple[Training, list[float]]:
        losses = []
        for step in range(first, last + 1):
            windows = text.batch(data.train, config.seed, step, config.batch_size, context)
            training, loss = steps[name](training, windows)
            losses.append(loss)
        return training, [float(loss) for loss in losses]

    half = options.steps // 2
    training, _ = run("adamw", jax.jit(programs["adamw"].init)(), 1, half)
    params = training.params
    specs = block_specs(config)
    converted = from_adam_state(training.opt_state, params, specs)
    in_8_bits = from_adam_state(training.opt_state, params, specs, mu_dtype=jnp.int8)
    fresh = jax.jit(programs["adam_mini"].init)().opt_state
    runs = {
        "AdamW carried on": ("adamw", training.opt_state),
        "Adam-mini, converted state": ("adam_mini", converted),
        "Adam-mini, converted to 8 bits": ("adam_mini_int8", in_8_bits),
        "Adam-mini, fresh state": ("adam_mini", fresh),
    }

    table = Table(title=f"Mean training loss after a switch at step {half} of {options.steps}")
    table.add_column("after the switch")
    spans = [(1, 10), (11, 50), (51, options.steps - half)]
    for first, last in spans:
        table.add_column(f"steps {first}-{last}", justify="right")
    table.add_column("highest above AdamW's", justify="right")
    table.add_column("held out, at the end", justify="right")
    adamw: list[float] = []
    for title, (name, opt_state) in runs.items():
        end, losses = run(name, Training(params, opt_state), half + 1, options.steps)
        adamw = adamw or losses
        nats = float(evaluate(end, held_out)) / held_out[:, 1:].size
        table.add_row(
            title,
            *(f"{np.mean(losses[first - 1 : last]):.4f}" for first, last in spans),
            f"{np.max(np.subtract(losses, adamw)):.4f}",
            f"{nats:.4f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.quality.switch", description=Options.__doc__))
