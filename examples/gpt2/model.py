"""GPT-2 (Radford et al., 2019) in Flax NNX, with GPT-2's names for its layers.

Shapes in comments: B sequences, T positions, D width, H heads, L layers, V tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common.language import with_adapter
from examples.common.mesh import over_batch

LAYER_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Architecture, and how it is computed."""

    vocab_size: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    scan: bool = False
    """Stack the layers' parameters and compile one layer, not `layers` of them."""
    remat: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again."""
    dtype: str = "float32"
    """Type of the computation; the parameters are float32."""
    lora_rank: int = 0
    """Rank of an adapter beside every linear layer; 0 for none."""


CONFIGS = {
    "nano": GPT2Config(vocab_size=256, context=64, layers=2, heads=8, width=128),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(layers=24, heads=16, width=1024),
    "gpt2-large": GPT2Config(layers=36, heads=20, width=1280),
    "gpt2-xl": GPT2Config(layers=48, heads=25, width=1600),
}


def linear(
    config: GPT2Config, features_in: int, features_out: int, std: float, rngs: nnx.Rngs
) -> nnx.Module:
    """A linear layer with normal weights and a zero bias, and its adapter."""
    layer = nnx.Linear(
        features_in,
        features_out,
        kernel_init=nnx.initializers.normal(std),
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )
    return with_adapter(layer, config.lora_rank, rngs)


def layer_norm(width: int, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """GPT-2's LayerNorm."""
    return nnx.LayerNorm(
        width,
        epsilon=LAYER_NORM_EPSILON,
        # E[x^2] - E[x]^2 cancels badly on GPT-2's large residual streams.
        use_fast_variance=False,
        dtype=jnp.dtype(dtype),
        rngs=rngs,
    )


def residual_std(config: GPT2Config) -> float:
    """Weights that add to the residual stream start smaller, because 2L of them do."""
    return 0.02 / (2 * config.layers) ** 0.5


class Attention(nnx.Module):
    """Causal self-attention with query, key and value in one projection."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        width = config.width
        self.heads = config.heads
        self.c_attn = linear(config, width, 3 * width, 0.02, rngs)
        self.c_proj = linear(config, width, width, residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads_shape = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            part.reshape(heads_shape) for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)  # B T H D/H
        return self.c_proj(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with GPT-2's tanh approximation of GELU between them."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        width = config.width
        self.c_fc = linear(config, width, 4 * width, 0.02, rngs)
        self.c_proj = linear(config, 4 * width, width, residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.ln_1 = layer_norm(config.width, config.dtype, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = layer_norm(config.width, config.dtype, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nnx.Module):
    """The language model: tokens (B, T) to logits (B, T, V), with the embedding as head."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.wte = self._embedding(config.vocab_size, 0.02, rngs)
        self.wpe = self._embedding(config.context, 0.02, rngs)
        if config.scan:
            keys = jax.random.split(rngs.params(), config.layers)
            self.h = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        else:
            self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.ln_f = layer_norm(config.width, config.dtype, rngs)

    def _embedding(self, count: int, std: float, rngs: nnx.Rngs) -> nnx.Embed:
        return nnx.Embed(
            count,
            self.config.width,
            embedding_init=nnx.initializers.normal(std),
            dtype=jnp.dtype(self.config.dtype),
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = over_batch(self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[-1])))  # B T D

        graph, _ = nnx.split(self.h if self.config.scan else self.h[0])

        def layer(x: jax.Array, params: Any) -> jax.Array:
            return over_batch(nnx.merge(graph, params)(x))

        if self.config.remat:
            layer = jax.checkpoint(layer)
        if self.config.scan:
            x, _ = jax.lax.scan(lambda x, params: (layer(x, params), None), x, nnx.state(self.h))
        else:
            for block in self.h:
                x = layer(x, nnx.state(block))
        return self.wte.attend(self.ln_f(x))
