"""ResNet (He et al., 2015) in Flax Linen, with torchvision's names for its layers.

Shapes in comments: B images, H height, W width, C channels, K classes.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Architecture, and how it is computed."""

    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3x3 convolutions, or a 3x3 one between two of 1x1."""
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks a stage; every stage but the first halves height and width."""
    width: int = 64
    """Channels of the first stage; every further stage doubles them."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """What comes before the stages: a 7x7 convolution and a pooling, which divide height and width
    by 4, or, for small images, a 3x3 convolution that keeps them."""
    num_classes: int = 1000
    dtype: str = "float32"
    """Type of the computation; the parameters are float32."""


CONFIGS = {
    "nano": ResNetConfig(width=16),
    "resnet18": ResNetConfig(),
    "resnet34": ResNetConfig(stage_sizes=(3, 4, 6, 3)),
    "resnet50": ResNetConfig("bottleneck", stage_sizes=(3, 4, 6, 3)),
}


def conv(channels: int, size: int, stride: int, dtype: str, name: str) -> nn.Conv:
    """A convolution without a bias: the norm after it has one."""
    return nn.Conv(
        channels,
        (size, size),
        stride,
        # Not "SAME", which at a stride of 2 pads even images on one side only.
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=jnp.dtype(dtype),
        name=name,
    )


def batch_norm(train: bool, dtype: str, name: str, zero: bool = False) -> nn.BatchNorm:
    """Normalise by the batch in training and by the running averages of it in evaluation."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=BATCH_NORM_EPSILON,
        scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
        dtype=jnp.dtype(dtype),
        name=name,
    )


class Block(nn.Module):
    """The residual block: convolutions beside a shortcut."""

    kind: Literal["basic", "bottleneck"]
    channels: int
    stride: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv_of = functools.partial(conv, dtype=self.dtype)
        norm_of = functools.partial(batch_norm, train, self.dtype)
        if self.kind == "basic":
            outputs = self.channels
            y = nn.relu(norm_of("bn1")(conv_of(self.channels, 3, self.stride, name="conv1")(x)))
            y = conv_of(outputs, 3, 1, name="conv2")(y)
            last = "bn2"
        else:
            outputs = 4 * self.channels
            y = nn.relu(norm_of("bn1")(conv_of(self.channels, 1, 1, name="conv1")(x)))
            y = nn.relu(norm_of("bn2")(conv_of(self.channels, 3, self.stride, name="conv2")(y)))
            y = conv_of(outputs, 1, 1, name="conv3")(y)
            last = "bn3"
        # With a gain of zero every block starts as its shortcut, which lets deep ones train.
        y = norm_of(last, zero=True)(y)
        if self.stride != 1 or x.shape[-1] != outputs:
            x = conv_of(outputs, 1, self.stride, name="downsample_conv")(x)
            x = norm_of("downsample_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The classifier: images (B, H, W, C) to logits (B, K)."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        config = self.config
        if config.stem == "imagenet":
            x = conv(config.width, 7, 2, config.dtype, "conv1")(x)
            x = nn.relu(batch_norm(train, config.dtype, "bn1")(x))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # B H/4 W/4 C
        else:
            x = conv(config.width, 3, 1, config.dtype, "conv1")(x)
            x = nn.relu(batch_norm(train, config.dtype, "bn1")(x))
        for stage, size in enumerate(config.stage_sizes):
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                channels = config.width * 2**stage
                x = Block(config.block, channels, stride, config.dtype, name=name)(x, train)
        x = x.mean((1, 2))
        return nn.Dense(config.num_classes, dtype=jnp.dtype(config.dtype), name="fc")(x)
