"""Llama (Touvron et al., 2023; Llama 3, 2024) in Flax NNX, with Flax's names for attention.

Shapes in comments: B sequences, T positions, D width, H query heads, K key-value heads, L layers, F
neurons of the MLP, V tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common.language import with_adapter
from examples.common.mesh import over_batch

RMS_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Architecture, and how it is computed."""

    vocab_size: int = 32000
    context: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    """Heads of key and value; each serves heads / kv_heads query heads."""
    width: int = 4096
    mlp_width: int = 11008
    """Neurons of the MLP."""
    rotary_base: float = 10_000.0
    """The longest wavelength of the rotary positions is about 2 pi times this, in tokens."""
    scan: bool = False
    """Stack the layers' parameters and compile one layer, not `layers` of them."""
    remat: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again."""
    dtype: str = "float32"
    """Type of the computation; the parameters are float32."""
    lora_rank: int = 0
    """Rank of an adapter beside every linear layer but the head; 0 for none."""


CONFIGS = {
    "nano": LlamaConfig(
        vocab_size=256, context=64, layers=2, heads=8, kv_heads=4, width=128, mlp_width=344
    ),
    "tinyllama-1b": LlamaConfig(context=2048, layers=22, kv_heads=4, width=2048, mlp_width=5632),
    "llama2-7b": LlamaConfig(),
    "llama2-13b": LlamaConfig(layers=40, heads=40, kv_heads=40, width=5120, mlp_width=13824),
    "llama3-8b": LlamaConfig(
        vocab_size=128256, context=8192, kv_heads=8, mlp_width=14336, rotary_base=500_000.0
    ),
}


def linear(
    config: LlamaConfig, features_in: int, features_out: int, std: float, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer with normal weights and no bias."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def adapted(
    config: LlamaConfig, features_in: int, features_out: int, std: float, rngs: nnx.Rngs
) -> nnx.Module:
    """A linear layer, and its adapter."""
    layer = linear(config, features_in, features_out, std, rngs)
    return with_adapter(layer, config.lora_rank, rngs)


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Divide by the root of the mean square, and multiply by a gain."""
    return nnx.RMSNorm(
        config.width, epsilon=RMS_NORM_EPSILON, dtype=jnp.dtype(config.dtype), rngs=rngs
    )


def residual_std(config: LlamaConfig) -> float:
    """Weights that add to the residual stream start smaller, because 2L of them do."""
    return 0.02 / (2 * config.layers) ** 0.5


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Rotary positions (Su et al., 2021) of x, B T H D/H: features i and i + half are a point of a
    plane, which position t turns by the angle t * base^(-i / half)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # In float32 whatever the type of x: bfloat16 cannot tell one late position from the next.
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # T 1 D/2H
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, in which several query heads share one head of
    key and value."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.rotary_base = config.rotary_base
        width, kv_width = config.width, config.width // config.heads * config.kv_heads
        self.query = adapted(config, width, width, 0.02, rngs)
        self.key = adapted(config, width, kv_width, 0.02, rngs)
        self.value = adapted(config, width, kv_width, 0.02, rngs)
        self.out = adapted(config, width, width, residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def split(y: jax.Array, heads: int) -> jax.Array:
            return y.reshape(*y.shape[:-1], heads, -1)

        query = rotate(split(self.query(x), self.heads), self.rotary_base)  # B T H D/H
        key = rotate(split(self.key(x), self.kv_heads), self.rotary_base)  # B T K D/H
        value = split(self.value(x), self.kv_heads)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020): a linear layer gated by the SiLU of another one."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, mlp_width = config.width, config.mlp_width
        self.gate = adapted(config, width, mlp_width, 0.02, rngs)
        self.up = adapted(config, width, mlp_width, 0.02, rngs)
        self.down = adapted(config, mlp_width, width, residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """The language model: tokens (B, T) to logits (B, T, V)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        if config.scan:
            keys = jax.random.split(rngs.params(), config.layers)
            self.layers = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = rms_norm(config, rngs)
        self.head = linear(config, config.width, config.vocab_size, 0.02, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = over_batch(self.embed(tokens))  # B T D

        graph, _ = nnx.split(self.layers if self.config.scan else self.layers[0])

        def layer(x: jax.Array, params: Any) -> jax.Array:
            return over_batch(nnx.merge(graph, params)(x))

        if self.config.remat:
            layer = jax.checkpoint(layer)
        if self.config.scan:
            x, _ = jax.lax.scan(
                lambda x, params: (layer(x, params), None), x, nnx.state(self.layers)
            )
        else:
            for block in self.layers:
                x = layer(x, nnx.state(block))
        return self.head(self.norm(x))
