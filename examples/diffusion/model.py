"""The U-Net of denoising diffusion (Ho et al., 2020) in Flax NNX.

Shapes in comments: B images, H height, W width, C channels, E width of the time embedding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture, and how it is computed."""

    image_channels: int = 3
    width: int = 128
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in widths; every level but the first halves height and width."""
    blocks: int = 2
    """Residual blocks a level on the way down; there is one more on the way up."""
    attention_sizes: tuple[int, ...] = (16,)
    """Heights of the images at which every residual block is followed by attention."""
    heads: int = 4
    groups: int = 32
    """Groups of a GroupNorm."""
    dtype: str = "float32"
    """Type of the computation; the parameters are float32."""

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)


CONFIGS = {
    "nano": UNetConfig(
        width=16, multipliers=(1, 2), blocks=1, attention_sizes=(4,), heads=4, groups=8
    ),
    "cifar10": UNetConfig(),
    "celeba": UNetConfig(multipliers=(1, 2, 2, 2, 4)),
}

# Layers whose output is added to something, and the last one, start at zero.
zeros = nnx.initializers.zeros
uniform = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform")


def conv(inputs: int, outputs: int, size: int, dtype: str, rngs: nnx.Rngs, **options) -> nnx.Conv:
    """A convolution of `size` x `size`."""
    options = {"kernel_init": uniform, **options}
    return nnx.Conv(inputs, outputs, (size, size), dtype=jnp.dtype(dtype), rngs=rngs, **options)


def linear(inputs: int, outputs: int, dtype: str, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer."""
    return nnx.Linear(inputs, outputs, kernel_init=uniform, dtype=jnp.dtype(dtype), rngs=rngs)


def norm(channels: int, config: UNetConfig, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Normalise the channels in groups."""
    return nnx.GroupNorm(channels, config.groups, dtype=jnp.dtype(config.dtype), rngs=rngs)


def time_embedding(times: jax.Array, width: int) -> jax.Array:
    """Times (B,) as sines and cosines (B, width) of wavelengths from 2 pi to 20,000 pi."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2 - 1))
    angles = times[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ResBlock(nnx.Module):
    """Two convolutions beside a shortcut; the time is added between them."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig, *, rngs: nnx.Rngs):
        self.norm1 = norm(inputs, config, rngs)
        self.conv1 = conv(inputs, outputs, 3, config.dtype, rngs)
        self.time = linear(4 * config.width, outputs, config.dtype, rngs)
        self.norm2 = norm(outputs, config, rngs)
        self.conv2 = conv(outputs, outputs, 3, config.dtype, rngs, kernel_init=zeros)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, config.dtype, rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        y = self.conv1(nnx.swish(self.norm1(x)))
        y = y + self.time(time)[:, None, None]
        y = self.conv2(nnx.swish(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nnx.Module):
    """Self-attention over all positions of the image, beside a shortcut."""

    def __init__(self, channels: int, config: UNetConfig, *, rngs: nnx.Rngs):
        self.norm = norm(channels, config, rngs)
        self.attention = nnx.MultiHeadAttention(
            config.heads,
            channels,
            kernel_init=uniform,
            out_kernel_init=zeros,
            decode=False,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        sequence = self.norm(x).reshape(batch, height * width, channels)
        return x + self.attention(sequence).reshape(x.shape)


class Stage(nnx.Module):
    """A residual block, and attention where this image size has it."""

    def __init__(
        self, inputs: int, outputs: int, config: UNetConfig, *, attends: bool, rngs: nnx.Rngs
    ):
        self.block = ResBlock(inputs, outputs, config, rngs=rngs)
        if attends:
            self.attend = Attention(outputs, config, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        x = self.block(x, time)
        return self.attend(x) if hasattr(self, "attend") else x


class UNet(nnx.Module):
    """Noisy images (B, H, W, C) and their times (B,) to the noise in them (B, H, W, C)."""

    def __init__(self, config: UNetConfig, image_size: int, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, config.dtype
        self.time1 = linear(width, 4 * width, dtype, rngs)
        self.time2 = linear(4 * width, 4 * width, dtype, rngs)
        self.conv_in = conv(config.image_channels, width, 3, dtype, rngs)

        sizes = [image_size >> level for level in range(len(config.multipliers))]
        levels = list(zip(config.level_channels, sizes, strict=True))
        channels = width
        kept = [width]  # channels of what the way up takes from the way down
        down, up = [], []
        for level, (outputs, size) in enumerate(levels):
            if level > 0:
                down.append(conv(channels, channels, 3, dtype, rngs, strides=2))
                kept.append(channels)
            for _ in range(config.blocks):
                attends = size in config.attention_sizes
                down.append(Stage(channels, outputs, config, attends=attends, rngs=rngs))
                channels = outputs
                kept.append(channels)

        self.middle1 = Stage(channels, channels, config, attends=True, rngs=rngs)
        self.middle2 = Stage(channels, channels, config, attends=False, rngs=rngs)

        for level, (outputs, size) in reversed(list(enumerate(levels))):
            for _ in range(config.blocks + 1):
                attends = size in config.attention_sizes
                inputs = channels + kept.pop()
                up.append(Stage(inputs, outputs, config, attends=attends, rngs=rngs))
                channels = outputs
            if level > 0:
                up.append(conv(channels, channels, 3, dtype, rngs))
        self.down, self.up = nnx.List(down), nnx.List(up)

        self.norm_out = norm(channels, config, rngs)
        self.conv_out = conv(channels, config.image_channels, 3, dtype, rngs, kernel_init=zeros)

    def __call__(self, x: jax.Array, times: jax.Array) -> jax.Array:
        time = self.time1(time_embedding(times, self.config.width))
        time = nnx.swish(self.time2(nnx.swish(time)))  # B E

        x = self.conv_in(x)
        kept = [x]
        for layer in self.down:
            x = layer(x, time) if isinstance(layer, Stage) else layer(x)
            kept.append(x)
        x = self.middle2(self.middle1(x, time), time)
        for layer in self.up:
            if isinstance(layer, Stage):
                x = layer(jnp.concatenate([x, kept.pop()], axis=-1), time)
            else:
                x = layer(x.repeat(2, 1).repeat(2, 2))
        return self.conv_out(nnx.swish(self.norm_out(x)))
