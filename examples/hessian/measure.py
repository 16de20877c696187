"""Measure the Hessians of small models, before and after training, against their blocks."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

from examples.common import images, runs, text
from examples.common.cli import ConfigError, check_counts
from examples.common.images import ImageConfig
from examples.common.text import TextConfig
from examples.hessian.model import MLP, Transformer
from examples.hessian.picture import Panel, draw
from optax_adam_mini import infer_block_specs, per_neuron
from optax_adam_mini.hessian import BlockShare, block_share, hessians

CONTEXT = 16
WINDOWS = 4096  # of text, to train on


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an MLP on scikit-learn's digits and a Transformer of one layer on text, compute the
    exact Hessian of every kernel before and after, and draw it with the blocks that
    infer_block_specs reads off the model. Takes minutes on two CPU cores."""

    steps: int = 1000
    """Optimizer steps, of AdamW."""
    batch_size: int = 64
    """Images or windows of text a step."""
    learning_rate: float = 1e-2
    """Peak; it falls to zero along a cosine."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    windows: int = 64
    """Windows of 16 bytes of text over which the loss of the Transformer's Hessian is the mean."""
    runs: str = "runs/hessian"
    """Folder in which every run makes its own."""

    def check(self) -> None:
        """Refuse what cannot work, before anything is computed."""
        check_counts({name: getattr(self, name) for name in ("steps", "batch_size", "windows")})
        if self.windows > WINDOWS:
            raise ConfigError(f"--windows is {self.windows}, but there are {WINDOWS:,} windows.")
        if self.learning_rate <= 0:
            raise ConfigError(f"--learning-rate is {self.learning_rate}, but must be positive.")


class Problem(NamedTuple):
    """A model with its data."""

    model: nn.Module
    inputs: np.ndarray
    targets: np.ndarray
    measured: int
    """How many of the first examples the Hessian is the mean of."""
    parts: tuple[str, ...]
    """The layers of the picture."""


def digits() -> Problem:
    """An MLP on handwritten digits."""
    train = images.load(ImageConfig()).train
    found = train.take(np.arange(len(train)))
    inputs = found.images.astype(np.float32) / 255
    return Problem(MLP(), inputs, found.labels, len(inputs), ("hidden", "output"))


def language(folder: Path, windows: int) -> Problem:
    """A Transformer on the text of Python's standard library, byte by byte."""
    data = text.load(TextConfig(), folder)
    found = text.batch(data.train, 0, 0, WINDOWS, CONTEXT)
    parts = *(f"attention/{name}" for name in ("query", "key", "value", "out")), "up", "down"
    return Problem(Transformer(), found[:, :-1], found[:, 1:], windows, parts)


def make_loss(model: nn.Module) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The mean cross-entropy, in nats."""

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss


def trained(config: Config, problem: Problem, params: Any) -> Any:
    """The parameters after training."""
    tx = optax.adamw(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    loss = make_loss(problem.model)

    @jax.jit
    def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, inputs[rows], targets[rows])
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    inputs, targets = jnp.asarray(problem.inputs), jnp.asarray(problem.targets)
    rows = np.random.default_rng(config.seed).integers(
        len(inputs), size=(config.steps, config.batch_size)
    )
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows)
    return params


class Measured(NamedTuple):
    """One way to cut a parameter, and what share of the Hessian the blocks hold."""

    layer: str
    blocks: str
    before: BlockShare
    after: BlockShare


def measure(
    config: Config, problem: Problem, report: Callable[[str], None]
) -> tuple[list[Measured], list[Panel]]:
    """Every kernel that has blocks of more than one coordinate, and the panels of the picture.

    What is cut by head is measured by neuron as well.
    """
    inputs = jnp.asarray(problem.inputs[: problem.measured])
    targets = jnp.asarray(problem.targets[: problem.measured])
    loss = make_loss(problem.model)
    start = problem.model.init(jax.random.key(config.seed), inputs)["params"]
    specs = flatten_dict(infer_block_specs(loss, start, inputs, targets, v="mean"), sep="/")
    end = trained(config, problem, start)
    before, after = (flatten_dict(params, sep="/") for params in (start, end))
    report(
        f"{type(problem.model).__name__}: loss {loss(start, inputs, targets):.3f} before training, "
        f"{loss(end, inputs, targets):.3f} after {config.steps} steps"
    )
    kernels = [
        path for path, spec in specs.items()
        if 1 < math.prod(spec.grid(before[path].shape)) < before[path].size
    ]  # fmt: skip
    both = [hessians_of(loss, params, kernels, inputs, targets) for params in (before, after)]
    measured, panels = [], {}
    for path in kernels:
        shape, spec, (layer, _, _) = before[path].shape, specs[path], path.rpartition("/")
        matrices = [found[path] for found in both]
        cuts = [spec, per_neuron(tuple(range(1, len(shape))))]
        for cut in cuts[: 2 if spec.unit == "head" else 1]:
            shares = (block_share(matrix, cut, shape) for matrix in matrices)
            measured.append(Measured(layer, f"by {cut.unit}", *shares))
        panels[layer] = Panel(f"{layer}, by {spec.unit}", spec, shape, *matrices)
    return measured, [panels[layer] for layer in problem.parts]


def hessians_of(
    loss: Callable[..., jax.Array],
    params: Mapping[str, jax.Array],
    paths: Sequence[str],
    *args: jax.Array,
) -> dict[str, np.ndarray]:
    """The Hessian of the loss in each of these parameters."""
    of_some = lambda some: loss(unflatten_dict({**params, **some}, sep="/"), *args)
    return hessians(of_some, {path: params[path] for path in paths})


def table(title: str, measured: list[Measured]) -> Table:
    """A row for each way to cut a parameter."""
    found = Table(title=title)
    found.add_column("layer")
    found.add_column("blocks")
    for heading in ("by chance", "before", "times", "after", "times"):
        found.add_column(heading, justify="right")
    for layer, blocks, before, after in measured:
        found.add_row(
            layer, blocks, f"{before.chance:.1%}", f"{before.inside:.1%}", f"{before.ratio:.1f}",
            f"{after.inside:.1%}", f"{after.ratio:.1f}",
        )  # fmt: skip
    return found


def main(config: Config) -> None:
    """What the command line asks for."""
    config.check()
    console = Console()
    folder = runs.new_run(Path(config.runs), config)
    results = {}
    for problem in (digits(), language(folder / "data", config.windows)):
        measured, panels = measure(config, problem, console.print)
        name = type(problem.model).__name__
        console.print(table(f"{name}: the Hessian's mass off the diagonal inside blocks", measured))
        draw(folder / f"{name.lower()}.png", panels)
        results[name] = [
            {"layer": row.layer, "blocks": row.blocks, "by chance": row.before.chance,
             "before": row.before.inside, "after": row.after.inside}
            for row in measured
        ]  # fmt: skip
    runs.write_json(folder / "results.json", results)
    console.print(f"pictures and results.json are in {folder}")
