"""What the tests of language models share: a little text, weights, the forward pass."""

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.common.optimizers import OptimizerConfig

TINY_OPTIONS = {"layers": 2, "heads": 2, "width": 16, "context": 16}
TINY_RUN = {
    **TINY_OPTIONS,
    "layers": 1,
    "batch_size": 4,
    "steps": 8,
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "eval_windows": 8,
    "hyper": OptimizerConfig(warmup_steps=2),
}


def write_corpus(folder: Path) -> Path:
    """A folder with a little text, so that tests do not read the standard library."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it"]
    for index in range(10):
        source = random.Random(index)
        content = " ".join(source.choice(words) for _ in range(200))
        (folder / f"{index}.txt").write_text(content)
    return folder


def abstract(module: type[nnx.Module], config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))


def random_weights(params: nnx.State) -> nnx.State:
    """Weights unlike the initial ones: no bias is zero, no gain is one."""
    source = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * source.normal(size=leaf.shape), jnp.float32), params
    )


def forward(graph: nnx.GraphDef, params: nnx.State, x) -> jax.Array:
    return jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, x)


def stack_layers(params: nnx.State, name: str) -> nnx.State:
    """The parameters of an unrolled model as a scanned model has them."""
    stacked = dict(params)
    stacked[name] = jax.tree.map(lambda *layers: jnp.stack(layers), *params[name].values())
    return nnx.State(stacked)


def shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its path."""
    return {
        "/".join(str(part) for part in path): value.shape
        for path, value in nnx.to_flat_state(nnx.as_pure(state))
    }


def second_moment(opt_state: Any) -> Any:
    """Adam-mini's v, in the structure of the parameters."""
    has_nu = lambda value: hasattr(value, "nu")
    (state,) = filter(has_nu, jax.tree.leaves(opt_state, is_leaf=has_nu))
    return state.nu
