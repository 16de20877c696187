"""Trains several seeds in one program, for accelerators: with models of this size, an accelerator
is idle between the kernels of a step, and eight seeds cost little more than one."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.common import optimizers
from examples.common.training import Task, TrainingConfig, measure_held_out

STEPS = 50
"""Steps per call, for every seed; their batches are on the device together."""


def train_together(
    config: TrainingConfig,
    load_task: Callable[[Any, Path], Task],
    optimizer: str,
    seeds: Sequence[int],
    *,
    in_turns: bool,
) -> Iterator[dict[str, Any]]:
    """Like `studies.train_seeds`, but all seeds advance together. With `in_turns`, each step runs
    one seed after another: convolutions with different kernels are slow as one batch."""
    if not seeds:
        return
    config.check()

    def over_seeds(step: Callable[..., Any]) -> Callable[..., Any]:
        if in_turns:
            return lambda *args: jax.lax.map(lambda args: step(*args), args)
        return jax.vmap(step)

    with tempfile.TemporaryDirectory() as folder:
        tasks = [load_task(dataclasses.replace(config, seed=s), Path(folder)) for s in seeds]
        program = tasks[0].make_program(optimizer)
        states = jax.jit(over_seeds(program.init))(jnp.asarray(seeds))
        step = over_seeds(program.step)
        steps = jax.jit(lambda states, batches: jax.lax.scan(step, states, batches)[0],
                        donate_argnums=0)  # fmt: skip
        clock = time.perf_counter()
        for start in range(1, config.steps + 1, STEPS):
            numbers = range(start, min(start + STEPS, config.steps + 1))
            batches = [_stack([task.batch(number) for task in tasks]) for number in numbers]
            states = steps(states, _stack(batches))
        evaluate = jax.jit(program.evaluate)
        for index, task in enumerate(tasks):
            state = jax.tree.map(lambda leaf, index=index: leaf[index], states)
            yield {
                **measure_held_out(task, evaluate, state),
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                "optimizer_bytes": optimizers.state_bytes(state.opt_state),
                "seconds": round((time.perf_counter() - clock) / len(seeds), 1),
            }


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
