"""Text from a trained model, one token at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def generate(
    logits: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    prompt: Sequence[int],
    *,
    context: int,
    count: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """`prompt` and `count` tokens that go on from it. The model sees the last `context` tokens."""

    @jax.jit
    def next_token(params: Any, window: jax.Array, length: jax.Array, key: jax.Array) -> jax.Array:
        scores = logits(params, window[None])[0, length - 1]
        if temperature == 0:
            return jnp.argmax(scores)
        return jax.random.categorical(key, scores / temperature)

    tokens = list(prompt)
    for key in jax.random.split(jax.random.key(seed), count):
        seen = tokens[-context:]
        # Always the same length, so that one program serves; causal attention ignores the padding.
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        tokens.append(int(next_token(params, window, np.int32(len(seen)), key)))
    return tokens
