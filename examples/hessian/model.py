"""A classifier and a language model, each of one layer, small enough for exact Hessians.

Shapes in comments: B images or windows, T positions, D width, V tokens.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


class MLP(nn.Module):
    """Images (B, height, width, 1) to logits (B, 10)."""

    hidden: int = 8

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        return nn.Dense(10, name="output")(nn.tanh(nn.Dense(self.hidden, name="hidden")(x)))


class Transformer(nn.Module):
    """Tokens (B, T) to logits (B, T, V): one pre-norm layer of attention and an MLP."""

    vocab_size: int = 256
    width: int = 16
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab_size, self.width, name="embed")(tokens)  # B T D
        x = x + nn.Embed(tokens.shape[-1], self.width, name="positions")(
            jnp.arange(tokens.shape[-1])
        )
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, use_bias=False, name="attention"
        )
        x = x + attention(nn.RMSNorm(name="norm_1")(x), mask=nn.make_causal_mask(tokens))
        hidden = nn.Dense(4 * self.width, use_bias=False, name="up")(nn.RMSNorm(name="norm_2")(x))
        x = x + nn.Dense(self.width, use_bias=False, name="down")(nn.gelu(hidden))
        return nn.Dense(self.vocab_size, use_bias=False, name="output")(nn.RMSNorm(name="norm")(x))
