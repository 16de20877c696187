"""Denoising diffusion (Ho et al., 2020): the noise schedule, noisy images, and the way back.

Times run from 1 to T as in the paper; time 0 is the image itself. `alpha_bars[t]` is the share of
the variance of an image at time t that is the image's own.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

MAX_BETA = 0.999


def make_alpha_bars(schedule: Literal["cosine", "linear"], steps: int) -> np.ndarray:
    """The products of 1 - beta up to each time from 0 to `steps`: Ho et al.'s linear betas, scaled
    to the number of steps, or the cosine schedule of Nichol and Dhariwal (2021)."""
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, steps) * (1000 / steps)
    else:
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    return np.concatenate([[1.0], np.cumprod(1 - np.minimum(betas, MAX_BETA))])


def add_noise(images: jax.Array, noise: jax.Array, alpha_bars: jax.Array) -> jax.Array:
    """Images (B, H, W, C) as they are at times with these `alpha_bars` (B,)."""
    alpha_bars = alpha_bars[:, None, None, None]
    return jnp.sqrt(alpha_bars) * images + jnp.sqrt(1 - alpha_bars) * noise


def sample(
    predict_noise: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    shape: tuple[int, int, int, int],
    alpha_bars: np.ndarray,
    *,
    steps: int,
    eta: float,
    clip: bool = True,
) -> jax.Array:
    """Images from noise, in `steps` of the times (Song et al., 2021: DDIM).

    `eta` is the share of the noise that is drawn anew at each step. With all times and 1, this is
    the ancestral sampling of Ho et al. with the smaller of their two variances; with 0, the images
    are a function of the noise that they start from. `clip` keeps each step's estimate of the image
    within -1 and 1, which images are and the estimates of an early step need not be.
    """
    times = np.round(np.linspace(len(alpha_bars) - 1, 0, steps + 1)).astype(np.int32)
    now, then = alpha_bars[times[:-1]], alpha_bars[times[1:]]
    fresh = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
    kept = np.sqrt(np.maximum(1 - then - fresh**2, 0))
    scales = (np.sqrt(now), np.sqrt(1 - now), np.sqrt(then), kept, fresh)

    def step(carry: tuple, step_of: tuple) -> tuple[tuple, None]:
        x, key = carry
        time, image_now, noise_now, image_then, kept, fresh = step_of
        key, key_now = jax.random.split(key)
        noise = predict_noise(x, jnp.full(shape[0], time))
        image = (x - noise_now * noise) / image_now
        if clip:
            image = jnp.clip(image, -1, 1)
            noise = (x - image_now * image) / noise_now
        x = image_then * image + kept * noise + fresh * jax.random.normal(key_now, shape)
        return (x, key), None

    key, first = jax.random.split(key)
    start = (jax.random.normal(first, shape), key)
    (x, _), _ = jax.lax.scan(step, start, (times[:-1], *map(np.float32, scales)))
    return x
