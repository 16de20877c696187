"""examples/diffusion: the U-Net, the noise and the way back, the images, resuming, and refusals."""

import dataclasses
import io
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from examples.common import images, runs
from examples.common.cli import ConfigError
from examples.common.optimizers import OptimizerConfig, decayed
from examples.common.training import measure_held_out
from examples.diffusion.model import (
    CONFIGS,
    Attention,
    ResBlock,
    Stage,
    UNet,
    UNetConfig,
    time_embedding,
)
from examples.diffusion.process import add_noise, make_alpha_bars, sample
from examples.diffusion.train import (
    Batch,
    Config,
    DiffusionImages,
    Training,
    grid,
    load_task,
    main,
    make_predict,
    make_program,
    make_sampler,
)
from tests.examples.running import (
    losses,
    only_run,
    run_command,
    run_killed_at_save,
    run_whole,
)

pytestmark = pytest.mark.slow  # the language models' tests have what is common

# One residual block, and those in the middle, around an attention.
TINY = UNetConfig(width=8, multipliers=(1,), blocks=0, attention_sizes=(), heads=2, groups=4)
TINY_RUN = {
    "batch_size": 4,
    "steps": 8,
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "eval_images": 5,
    "samples": 5,
    "sample_steps": 3,
    "hyper": OptimizerConfig(warmup_steps=2),
}


@pytest.fixture
def tiny(monkeypatch):
    """In place of nano, one level of a few channels."""
    monkeypatch.setitem(CONFIGS, "nano", TINY)


def tiny_config(root: Path, **options) -> Config:
    return Config(**{**TINY_RUN, "runs": str(root), **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of both optimizers that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "nano", TINY)
        return run_whole(root, lambda: main(tiny_config(root)))


# The architecture


def abstract(config: UNetConfig, size: int):
    return nnx.split(nnx.eval_shape(lambda: UNet(config, size, rngs=nnx.Rngs(0))))


def paths(tree) -> dict[str, object]:
    flat = nnx.to_flat_state(nnx.as_pure(tree))
    return {"/".join(str(part) for part in path): leaf for path, leaf in flat}


# Ho et al. have 35.7 million for CIFAR-10 and 114 million for 256x256: in full, these.
@pytest.mark.parametrize(
    ("config", "size", "count"),
    [
        (CONFIGS["cifar10"], 32, 35_746_307),
        pytest.param(CONFIGS["celeba"], 64, 78_700_803, marks=pytest.mark.slow),
        pytest.param(
            UNetConfig(multipliers=(1, 1, 2, 2, 4, 4)), 256, 113_673_219, marks=pytest.mark.slow
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(config, size, count):
    _, params = abstract(config, size)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_nano_has_fewer_than_a_million_parameters():
    _, params = abstract(Config().architecture, 8)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) < 1_000_000


@pytest.mark.parametrize("name", ["cifar10", pytest.param("celeba", marks=pytest.mark.slow)])
def test_each_level_of_the_unet_has_the_papers_shapes(name):
    """The shape of what every layer of the way down and up gives, as in the paper's appendix B."""
    size, config = {"cifar10": 32, "celeba": 64}[name], CONFIGS[name]
    graph, params = abstract(config, size)
    outputs = []

    def apply(params, x, times):
        with pytest.MonkeyPatch.context() as patch:
            for kind in (Stage, nnx.Conv, Attention):
                patch.setattr(kind, "__call__", noting(kind, kind.__call__))
            return nnx.merge(graph, params)(x, times)

    def noting(kind, call):
        def noted(self, *arguments):
            y = call(self, *arguments)
            outputs.append((kind, y.shape[1:]))
            return y

        return noted

    x = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
    predicted = jax.eval_shape(apply, params, x, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert predicted.shape == (3, size, size, 3)

    levels = [(size >> level, 128 * many) for level, many in enumerate(config.multipliers)]
    down = [(height, height, channels) for height, channels in levels for _ in range(2)]
    up = [(height, height, channels) for height, channels in reversed(levels) for _ in range(3)]
    middle = [down[-1]] * 2
    assert [shape for kind, shape in outputs if kind is Stage] == [*down, *middle, *up]
    # Two on the way down, three on the way up, and one in the middle.
    attended = [shape[0] for kind, shape in outputs if kind is Attention]
    assert attended == [16, 16, levels[-1][0], 16, 16, 16]


def random_weights(abstract_params):
    source = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(source.normal(size=leaf.shape), jnp.float32), abstract_params
    )


class ByHand:
    """A forward pass in float64, from the layers' parameters by path."""

    def __init__(self, params, groups: int):
        self.params = {path: np.float64(value) for path, value in paths(params).items()}
        self.groups = groups

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        each = x.shape[-1] // self.groups
        for image in range(len(x)):
            for start in range(0, x.shape[-1], each):
                part = x[image, :, :, start : start + each]
                normal = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
                y[image, :, :, start : start + each] = normal
        return y * self.params[f"{name}/scale"] + self.params[f"{name}/bias"]

    def conv(self, name: str, x: np.ndarray) -> np.ndarray:
        kernel = self.params[f"{name}/kernel"]
        size = kernel.shape[0]
        edge = size // 2
        padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        y = np.empty((*x.shape[:3], kernel.shape[-1]))
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                window = padded[:, i : i + size, j : j + size]
                y[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
        return y + self.params[f"{name}/bias"]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.params[f"{name}/kernel"] + self.params[f"{name}/bias"]


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("inputs", [8, 4])
def test_residual_block_computes_what_the_formulas_say(inputs):
    graph, params = nnx.split(
        nnx.eval_shape(lambda: ResBlock(inputs, 8, TINY, rngs=nnx.Rngs(0))),
    )
    params = random_weights(params)
    source = np.random.default_rng(0)
    x, time = source.normal(size=(2, 5, 6, inputs)), source.normal(size=(2, 4 * 8))

    hand = ByHand(params, TINY.groups)
    y = hand.conv("conv1", swish(hand.norm("norm1", x)))
    y = y + hand.linear("time", time)[:, None, None, :]
    y = hand.conv("conv2", swish(hand.norm("norm2", y)))
    expected = y + (x if inputs == 8 else hand.conv("conv_shortcut", x))

    actual = nnx.merge(graph, params)(jnp.float32(x), jnp.float32(time))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_attention_computes_what_the_formulas_say():
    graph, params = nnx.split(nnx.eval_shape(lambda: Attention(8, TINY, rngs=nnx.Rngs(0))))
    params = random_weights(params)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8))

    hand = ByHand(params, TINY.groups)
    sequence = hand.norm("norm", x).reshape(2, 12, 8)
    query, key, value = (
        np.einsum("btc,chd->bhtd", sequence, hand.params[f"attention/{name}/kernel"])
        + hand.params[f"attention/{name}/bias"][:, None]
        for name in ("query", "key", "value")
    )
    weights = np.exp(np.einsum("bhtd,bhsd->bhts", query, key) / np.sqrt(8 // 2))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bhsd->bthd", weights, value)
    y = np.einsum("bthd,hdc->btc", mixed, hand.params["attention/out/kernel"])
    expected = x + (y + hand.params["attention/out/bias"]).reshape(x.shape)

    actual = nnx.merge(graph, params)(jnp.float32(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_time_embedding_is_sines_and_cosines():
    times = [0, 1, 37, 1000]
    actual = time_embedding(jnp.array(times), 8)
    for row, time in zip(actual, times, strict=True):
        angles = [time / 10_000 ** (index / 3) for index in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_first_prediction_is_zero_and_depends_on_everything_later(tiny):
    """The last layer starts at zero; with other weights, image and time matter."""
    config = Config()
    predict = jax.jit(make_predict(config))
    params = jax.jit(lambda: nnx.state(UNet(config.architecture, 8, rngs=nnx.Rngs(0))))()
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    assert not predict(params, x, np.array([3, 900])).any()
    params = random_weights(params)
    first = predict(params, x, np.array([3, 900]))
    assert first.shape == x.shape
    later = predict(params, x, np.array([4, 900]))
    assert not np.allclose(first[0], later[0], rtol=1e-3)
    np.testing.assert_allclose(first[1], later[1], rtol=1e-4, atol=1e-4)  # images are on their own


# The noise, and the way back


def test_linear_schedule_is_the_paper_s():
    alpha_bars = make_alpha_bars("linear", 1000)
    assert alpha_bars.shape == (1001,)
    assert alpha_bars[0] == 1
    product = 1.0
    for time in range(1, 1001):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * (time - 1) / 999)
        assert alpha_bars[time] == pytest.approx(product, rel=1e-9)
    # "L_T = D_KL(q(x_T|x_0) || N(0, I)) is about 1e-5 bits per dimension", section 4.
    nats = (alpha_bars[-1] * 0.25 - alpha_bars[-1] - np.log1p(-alpha_bars[-1])) / 2
    assert 1e-6 < nats / np.log(2) < 1e-5


def test_cosine_schedule_is_a_cosine():
    for steps in (50, 1000):
        alpha_bars = make_alpha_bars("cosine", steps)
        f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        # The betas of the last times are cut off.
        np.testing.assert_allclose(alpha_bars[:-1], np.array(f[:-1]) / f[0], rtol=1e-6)
        assert 0 < alpha_bars[-1] < 1e-3


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_every_time_adds_noise(schedule, steps):
    alpha_bars = make_alpha_bars(schedule, steps)
    assert (np.diff(alpha_bars) < 0).all()
    assert alpha_bars[-1] > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_noisy_images_are_those_of_the_chain(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, step by step, from many draws."""
    steps, count = 20, 40_000
    alpha_bars = make_alpha_bars(schedule, steps)
    betas = 1 - alpha_bars[1:] / alpha_bars[:-1]
    source = np.random.default_rng(0)
    clean = np.where(source.random(count) < 0.3, -0.5, 0.8)
    chain = clean
    for time, beta in enumerate(betas, 1):
        chain = np.sqrt(1 - beta) * chain + np.sqrt(beta) * source.normal(size=count)
        if time not in (1, 5, 15):
            continue
        noise = source.normal(size=(count, 1, 1, 1))
        at_once = add_noise(
            jnp.float32(clean[:, None, None, None]),
            jnp.float32(noise),
            jnp.full(count, alpha_bars[time]),
        )
        for value in (-0.5, 0.8):
            here, there = (x[clean == value] for x in (chain, np.ravel(at_once)))
            np.testing.assert_allclose(here.mean(), there.mean(), atol=0.03)
            np.testing.assert_allclose(here.std(), there.std(), rtol=0.03)


def test_images_of_a_batch_have_their_own_times():
    source = np.random.default_rng(0)
    x, noise = source.normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
    noisy = add_noise(x, noise, jnp.array([1.0, 0.0, 0.25]))
    np.testing.assert_allclose(noisy[0], x[0])
    np.testing.assert_allclose(noisy[1], noise[1])
    np.testing.assert_allclose(noisy[2], 0.5 * x[2] + np.sqrt(0.75) * noise[2], rtol=1e-6)


def ancestral(predict, alpha_bars, z: float, clip: bool) -> float:
    """Algorithm 2 of Ho et al. for one pixel, with all its noises z; clipped as section 3.3 of
    Nichol and Dhariwal has it, through the posterior mean of equation 7."""
    x = z
    for time in range(len(alpha_bars) - 1, 0, -1):
        now, then = alpha_bars[time], alpha_bars[time - 1]
        alpha, beta = now / then, 1 - now / then
        noise = predict(x, time)
        if clip:
            image = np.clip((x - np.sqrt(1 - now) * noise) / np.sqrt(now), -1, 1)
            mean = np.sqrt(then) * beta / (1 - now) * image
            mean += np.sqrt(alpha) * (1 - then) / (1 - now) * x
        else:
            mean = (x - beta / np.sqrt(1 - now) * noise) / np.sqrt(alpha)
        x = mean + np.sqrt((1 - then) / (1 - now) * beta) * (z if time > 1 else 0)
    return x


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("clip", [False, True])
def test_sampling_with_eta_1_is_ancestral(monkeypatch, schedule, clip):
    z = 0.3
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.full(shape, z))
    alpha_bars = make_alpha_bars(schedule, 30)

    def predict(x, time):
        return x - time / 60

    (pixel,) = sample(
        lambda x, times: predict(x, times[:, None, None, None]),
        jax.random.key(0),
        (1, 1, 1, 1),
        alpha_bars,
        steps=30,
        eta=1.0,
        clip=clip,
    ).ravel()
    expected, other = (ancestral(predict, alpha_bars, z, clipped) for clipped in (clip, not clip))
    assert abs(expected - other) > 0.03  # some estimates are clipped, the last one is not
    np.testing.assert_allclose(pixel, expected, rtol=2e-3)


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling_gives_back_the_only_training_image(steps, eta):
    """With one training image the exact noise in x is known, and used as the prediction."""
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 1)).astype(np.float32)
    alpha_bars = make_alpha_bars("linear", 100)

    def predict(x, times):
        share = jnp.float32(alpha_bars)[times][:, None, None, None]
        return (x - jnp.sqrt(share) * image) / jnp.sqrt(1 - share)

    drawn = sample(
        predict, jax.random.key(0), (4, 2, 3, 1), alpha_bars, steps=steps, eta=eta, clip=False
    )
    np.testing.assert_allclose(drawn, np.broadcast_to(image, drawn.shape), atol=1e-4)


@pytest.mark.parametrize(("schedule", "eta"), [("cosine", 1.0), ("linear", 0.0)])
def test_gaussian_images_have_their_mean_and_variance(schedule, eta):
    """For Gaussian data, the best prediction of the noise is linear in x."""
    alpha_bars = make_alpha_bars(schedule, 1000)
    mean, std = 0.3, 0.2

    def predict(x, times):
        share = jnp.float32(alpha_bars)[times][:, None, None, None]
        variance = share * std**2 + 1 - share
        return jnp.sqrt(1 - share) * (x - jnp.sqrt(share) * mean) / variance

    drawn = jax.jit(
        lambda key: sample(
            predict, key, (20, 32, 32, 1), alpha_bars, steps=1000, eta=eta, clip=False
        )
    )(jax.random.key(0))
    np.testing.assert_allclose(drawn.mean(), mean, atol=0.01)
    np.testing.assert_allclose(drawn.std(), std, rtol=0.03)
    # The pixels are independent, and normal.
    standard = np.ravel((drawn - drawn.mean()) / drawn.std())
    assert abs(np.mean(standard[1:] * standard[:-1])) < 0.03
    assert abs(np.mean(standard**3)) < 0.1
    np.testing.assert_allclose(np.mean(standard**4), 3, atol=0.2)


def test_samples_stay_within_the_images_range():
    alpha_bars = make_alpha_bars("cosine", 50)
    drawn = sample(
        lambda x, times: jnp.zeros_like(x),
        jax.random.key(0),
        (4, 4, 4, 1),
        alpha_bars,
        steps=50,
        eta=1.0,
    )
    assert jnp.abs(drawn).max() <= 1


# The optimizers


def test_the_cifar10_model_has_the_blocks_of_the_page():
    config = Config(model="cifar10", data=DiffusionImages("cifar10"), v="mean")
    state = jax.eval_shape(make_program(config, "adam_mini").init)
    (nu,) = (leaf.nu for leaf in jax.tree.leaves(state.opt_state, is_leaf=has_nu) if has_nu(leaf))
    shapes = {path: leaf.shape for path, leaf in paths(nu).items()}
    assert shapes == shapes | {
        "time1/kernel": (1, 512),
        "time1/bias": (512,),
        "conv_in/kernel": (1, 1, 1, 128),
        "down/0/block/conv1/kernel": (1, 1, 1, 128),
        "down/0/block/time/kernel": (1, 128),
        "down/0/block/norm1/scale": (1,),
        "down/0/block/norm1/bias": (128,),
        "down/2/kernel": (1, 1, 1, 128),  # halves
        "down/3/block/conv_shortcut/kernel": (1, 1, 1, 256),
        "down/3/attend/attention/query/kernel": (1, 4, 1),
        "down/3/attend/attention/query/bias": (4, 64),
        "down/3/attend/attention/key/kernel": (1, 4, 1),
        "down/3/attend/attention/value/kernel": (1, 4, 64),
        "down/3/attend/attention/out/kernel": (1, 1, 256),
        "conv_out/kernel": (1, 1, 1, 3),
    }
    params = {path: math.prod(leaf.shape) for path, leaf in paths(state.params).items()}
    assert shapes.keys() == params.keys()
    for path, shape in shapes.items():
        is_small = path.endswith(("bias", "scale"))
        assert is_small or math.prod(shape) < params[path] / 20, path
    assert sum(map(math.prod, shapes.values())) < 0.002 * sum(params.values())


def has_nu(value) -> bool:
    return hasattr(value, "nu")


def test_only_kernels_decay():
    _, params = abstract(CONFIGS["nano"], 8)
    mask = paths(decayed(params))
    assert {path.split("/")[-1] for path in mask} == {"kernel", "scale", "bias"}
    for path, value in mask.items():
        assert value == path.endswith("/kernel"), path


# Training


def batch_of(config: Config, step: int = 1) -> Batch:
    return load_task(config, Path()).batch(step)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "schedule": "linear", "diffusion_steps": 50},
        pytest.param({"optimizer": "adamw", "ema_decay": 0.0}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "+".join(options),
)
def test_a_step_with_every_option_trains(tiny, options):
    hyper = OptimizerConfig(1e-2, warmup_steps=0)
    config = Config(**{"steps": 10, "batch_size": 16, "ema_decay": 0.6, "hyper": hyper, **options})
    program = make_program(config, config.optimizer or "adam_mini")
    batch = batch_of(config)
    before = jax.jit(program.init)()
    step = jax.jit(program.step)
    states, seen_losses = [before], []
    for _ in range(6):
        after, loss = step(states[-1], batch)
        states.append(after)
        seen_losses.append(loss)
    # At first it predicts no noise at all.
    np.testing.assert_allclose(seen_losses[0], np.mean(batch.noise**2), rtol=1e-5)
    assert seen_losses[-1] < seen_losses[0] - 0.1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    floats = jax.tree.leaves((after.params, after.average))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}

    # The average after n steps: sum_i (1 - decay) decay^(n-i) p_i + decay^n p_0.
    kernels = [paths(state.params)["conv_out/kernel"] for state in states[:4]]
    for old, new in itertools.pairwise(kernels):
        assert np.abs(new - old).mean() > 1e-3
    p0, p1, p2, p3 = kernels
    decay = config.ema_decay
    expected = (1 - decay) * (p3 + decay * p2 + decay**2 * p1) + decay**3 * p0
    average = paths(states[3].average)["conv_out/kernel"]
    np.testing.assert_allclose(average, expected, atol=1e-6)


def test_loss_is_that_of_the_paper(tiny):
    """Algorithm 1, with the noisy images made by hand."""
    config = Config(batch_size=5, schedule="linear", hyper=OptimizerConfig(warmup_steps=2))
    program = make_program(config, "adamw")
    batch = batch_of(config)
    params = random_weights(abstract(config.architecture, 8)[1])
    shares = make_alpha_bars("linear", 1000)[batch.times]
    noisy = np.stack(
        [
            np.sqrt(share) * (image / 255 * 2 - 1) + np.sqrt(1 - share) * noise
            for share, image, noise in zip(shares, batch.images, batch.noise, strict=True)
        ]
    )
    predicted = jax.jit(make_predict(config))(params, jnp.float32(noisy), batch.times)
    # The average is what is evaluated.
    training = Training(jax.tree.map(jnp.zeros_like, params), params, ())
    total = jax.jit(program.evaluate)(training, batch)
    expected = ((np.float64(predicted) - batch.noise) ** 2).mean((1, 2, 3)).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-3)


def test_another_seed_changes_weights_and_batches(tiny):
    first, other = (
        (paths(jax.jit(program.init)().params)["conv_in/kernel"], batch_of(config))
        for config in (Config(seed=seed) for seed in (3, 4))
        for program in [make_program(config, "adamw")]
    )
    assert not np.array_equal(first[0], other[0])
    for mine, theirs in zip(first[1], other[1], strict=True):
        assert not np.array_equal(mine, theirs)


def test_batches_depend_on_seed_and_step_alone():
    task = load_task(Config(batch_size=8), Path())
    first = task.batch(5)
    task.batch(6)
    list(task.held_out())
    jax.tree.map(np.testing.assert_array_equal, first, task.batch(5))
    for mine, theirs in zip(first, task.batch(6), strict=True):
        assert not np.array_equal(mine, theirs)
    # Digits are neither shifted nor mirrored.
    whole = images.load(DiffusionImages()).train.take(np.arange(1343)).images
    known = {image.tobytes() for image in whole}
    assert all(image.tobytes() in known for image in first.images)


def test_times_and_noises_are_uniform_and_normal():
    config = Config(batch_size=8, diffusion_steps=5)
    task = load_task(config, Path())
    drawn = [task.batch(step) for step in range(1, 201)]
    counts = np.bincount(np.concatenate([batch.times for batch in drawn]), minlength=6)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 320, rtol=0.2)
    assert len(counts) == 6
    noise = np.stack([batch.noise for batch in drawn])
    assert (noise.dtype, noise.shape) == (np.float32, (200, 8, 8, 8, 1))
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)


def test_held_out_batches_are_the_same_for_every_run():
    first, other = (
        list(load_task(Config(seed=seed, batch_size=size), Path()).held_out())
        for seed, size in ((0, 64), (5, 16))
    )
    jax.tree.map(np.testing.assert_array_equal, first, other)
    assert sum(len(batch.times) for batch in first) == 454 * 8
    assert not np.array_equal(first[0].noise, first[1].noise)
    for batch in first:
        # Each image, in each eighth of the times.
        eighths = (batch.times.reshape(-1, 8) - 1) // 125
        np.testing.assert_array_equal(eighths, np.broadcast_to(np.arange(8), eighths.shape))
        same = batch.images.reshape(-1, 8, *batch.images.shape[1:])
        assert (same == same[:, :1]).all()
    test = images.load(DiffusionImages()).test.take(np.arange(454)).images
    shown = np.concatenate([batch.images[::8] for batch in first])
    np.testing.assert_array_equal(shown, test)


def test_the_held_out_loss_is_a_mean_over_all_noises(tiny):
    task = load_task(Config(eval_images=70), Path())
    program = task.make_program("adamw")
    # With weights of zero, no noise is predicted.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), jax.eval_shape(program.init))
    expected = np.mean(np.concatenate([batch.noise for batch in task.held_out()]) ** 2)
    measured = measure_held_out(task, jax.jit(program.evaluate), zeros)
    assert measured["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def test_comparison_leaves_everything_in_the_run_folder(whole):
    for name in ("adamw", "adam_mini"):
        records = losses(whole.folder / name)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
        assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    adamw, mini = json.loads((whole.folder / "results.json").read_text())
    assert (adamw["optimizer"], mini["optimizer"]) == ("adamw", "adam_mini")
    assert adamw["held_out_loss"] == losses(whole.folder / "adamw")[-1]["held_out_loss"]
    assert adamw["numbers_in_v"] > 3 * mini["numbers_in_v"]
    output = " ".join(whole.output.split())
    for expected in (
        "held-out loss",
        "optimizer bytes",
        "numbers in v",
        "ms per step",
        "Samples: ",
    ):
        assert expected in output
    assert "nano on 1,343 training and 454 held-out images of digits" in output
    for name in ("loss.png", "samples.png"):
        with Image.open(whole.folder / name) as picture:
            assert picture.width > picture.height > 100


def test_a_finished_run_can_be_sampled(tiny, whole, tmp_path, capsys):
    shutil.copytree(whole.folder, tmp_path / "run")
    picture = tmp_path / "run" / "samples.png"
    before = picture.read_bytes()
    options = {"runs": str(tmp_path), "sample": True, "samples": 3, "sample_steps": 2}
    main(Config(**options))
    first = picture.read_bytes()
    assert first != before
    # Without --run, the newest run; of one optimizer, if so asked.
    main(Config(**options, seed=1, optimizer="adam_mini", run="run"))
    assert picture.read_bytes() != first
    with Image.open(io.BytesIO(first)) as both, Image.open(picture) as one:
        assert both.width > one.width
    assert capsys.readouterr().out.count("Samples: ") == 2


def test_sampler_draws_from_the_noise_of_its_key(tiny):
    config = Config(samples=3, sample_steps=4, eta=0.0)
    draw = make_sampler(config, config)
    params = random_weights(abstract(config.architecture, 8)[1])
    first, again, other = (draw(params, jax.random.key(seed)) for seed in (0, 0, 1))
    assert first.shape == (3, 8, 8, 1)
    assert first.min() >= 0
    assert first.max() <= 1
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_samples_are_laid_out_in_a_grid():
    panel = np.arange(5 * 2 * 3 * 1).reshape(5, 2, 3, 1) / 30
    drawn = grid(panel)
    assert drawn.shape == (3 * 3 - 1, 3 * 4 - 1, 1)
    for index in range(5):
        row, column = divmod(index, 3)
        part = drawn[3 * row : 3 * row + 2, 4 * column : 4 * column + 3]
        np.testing.assert_array_equal(part, panel[index])
    assert (drawn[2::3] == 0.5).all()
    assert (drawn[:, 3::4] == 0.5).all()
    assert (drawn[3:5, 8:] == 0.5).all()


@pytest.mark.parametrize(
    ("optimizer", "fails_at"),
    [
        ("adam_mini", 3),
        # In the comparison, saves 1 to 4 are of the first optimizer and 5 to 8 of the second.
        *(pytest.param(None, save, marks=pytest.mark.slow) for save in (7,)),
    ],
)
@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(tiny, whole, tmp_path, capsys, optimizer, fails_at):
    run_killed_at_save(fails_at, lambda: main(tiny_config(tmp_path, optimizer=optimizer)))
    folder = only_run(tmp_path)
    assert not (folder / "samples.png").exists()
    main(Config(runs=str(tmp_path), resume=str(folder)))
    for name in (optimizer,) if optimizer else ("adamw", "adam_mini"):
        assert losses(folder / name) == losses(whole.folder / name)
    pictures = [(run / "samples.png").read_bytes() for run in (folder, whole.folder)]
    assert (pictures[0] == pictures[1]) == (optimizer is None)
    if optimizer is None:
        main(Config(runs=str(tmp_path), resume=str(folder)))
        assert "has finished its 8 steps already" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_execution")
def test_both_learn_to_draw_digits():
    """A fifth of the default run: the losses are close, and a classifier of digits takes the
    samples for digits, of every class."""
    data = images.load(DiffusionImages())
    train, test = (part.take(np.arange(len(part))) for part in data)
    classifier = KNeighborsClassifier(1).fit(train.images.reshape(-1, 64) / 255, train.labels)

    def distances(panel: np.ndarray) -> np.ndarray:
        return classifier.kneighbors(panel.reshape(len(panel), 64))[0].ravel()

    usual = np.median(distances(test.images / 255))
    config = Config(steps=300, samples=128, sample_steps=25, eval_images=100)
    task, draw = load_task(config, Path()), make_sampler(config, config)
    batches = [task.batch(step) for step in range(1, config.steps + 1)]
    found = {}
    for name in ("adamw", "adam_mini"):
        program = task.make_program(name)
        step = jax.jit(program.step, donate_argnums=0)
        training = jax.jit(program.init)()
        for batch in batches:
            training, _ = step(training, batch)
        measured = measure_held_out(task, jax.jit(program.evaluate), training)
        found[name] = measured["held_out_loss"]
        drawn = np.asarray(draw(training.average, jax.random.key(0)))
        # Images of independent pixels are more than twice as far.
        assert np.median(distances(drawn)) < 1.6 * usual
        assert set(classifier.predict(drawn.reshape(-1, 64))) == set(range(10))
    assert found["adamw"] < 0.2
    assert found["adam_mini"] < 1.03 * found["adamw"]


# Other images


class FakeHub:
    """Stands for the package datasets."""

    def __init__(self, rows=None):
        self.rows = rows
        self.asked_for = []

    def load_dataset(self, name, *, split):
        self.asked_for.append((name, split))
        if self.rows is None:
            raise ConnectionError("no route to host\nmore lines")
        return self.rows


class FakeFaces:
    """A split of CelebA: portraits of 218x178, and no labels."""

    def __init__(self, count: int):
        pixels = np.random.default_rng(0).integers(256, size=(count, 218, 178, 3))
        self.images = [Image.fromarray(image) for image in pixels.astype(np.uint8)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        return {"image": [self.images[i] for i in indices], "Smiling": [True for _ in indices]}


def test_faces_are_read_from_the_hub(tiny, monkeypatch):
    hub = FakeHub(FakeFaces(3))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    config = Config(batch_size=2, eval_images=1, data=DiffusionImages("celeba"))
    config.check()
    task = load_task(config, Path())
    assert hub.asked_for == [("flwrlabs/celeba", "train"), ("flwrlabs/celeba", "test")]
    batch, (held_out,) = task.batch(1), list(task.held_out())
    assert batch.images.shape == batch.noise.shape == (2, 64, 64, 3)
    assert held_out.images.shape == (8, 64, 64, 3)
    program = task.make_program("adam_mini")
    training = jax.eval_shape(program.init)
    assert jax.eval_shape(program.step, training, batch)[0] == training


def test_faces_are_mirrored_and_not_shifted(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(FakeFaces(2)))
    config = Config(batch_size=2, data=DiffusionImages("celeba"))
    task = load_task(config, Path())
    whole = images.load(config.data).train.take(np.arange(2)).images
    versions = {view.tobytes() for image in whole for view in (image, image[:, ::-1])}
    seen = {image.tobytes() for step in range(1, 20) for image in task.batch(step).images}
    assert seen == versions


def test_refuses_a_hub_out_of_reach(tmp_path, monkeypatch):
    for hub, message in (
        (FakeHub(), r"celeba cannot be loaded \(no route to host\): check the network; or give"),
        (None, "celeba needs the package datasets, which is not installed: pip install"),
    ):
        monkeypatch.setitem(sys.modules, "datasets", hub)
        with pytest.raises(ConfigError, match=message):
            main(tiny_config(tmp_path, data=DiffusionImages("celeba")))
    assert not list(tmp_path.iterdir())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "--width is 0, but must be at least 1"),
        ({"width": 20}, "--width is 20, which GroupNorm's 8 groups do not divide: choose a mult"),
        ({"diffusion_steps": 0}, "--diffusion-steps is 0, but must be at least 1"),
        ({"eval_images": 0}, "--eval-images is 0, but must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0, but must be at least 1"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0, but must be from 0 to less than 1"),
        ({"ema_decay": math.nan}, "--ema-decay is nan, but must be from 0 to less than 1"),
        ({"samples": 0}, "--samples is 0, but must be at least 1"),
        ({"sample_steps": 0}, "--sample-steps is 0, but must be from 1 to the number of times, 10"),
        ({"sample_steps": 1001}, "--sample-steps is 1001, but must be from 1 to the number of"),
        ({"eta": 1.5}, "--eta is 1.5, but must be from 0 to 1"),
        ({"optimizer": "adem"}, "--optimizer is adem, but must be one of adamw, adam_mini"),
        (
            {"steps": 5, "hyper": OptimizerConfig(warmup_steps=5)},
            "--warmup-steps is 5, but must be from 0 to --steps - 1 = 4",
        ),
        ({"seed": -1}, "--seed is -1, but must be at least 0"),
        (
            {"model": "celeba"},
            "--model celeba halves the images 4 times, but those of digits are of 8x8: choose",
        ),
        (
            {"data": DiffusionImages("celeba", data_dir=".")},
            "--data-dir holds CIFAR-10's binary files, but --dataset is celeba: leave out",
        ),
        ({"run": "x"}, "--run names the run of --sample: give --sample, or --resume RUN"),
        ({"sample": True}, "there is no run in"),
        ({"sample": True, "width": 8}, "--sample goes by the options that the run was started"),
        ({"resume": "nowhere"}, "nowhere is not a run, a folder with a config.json: "),
        ({"resume": "x", "eta": 0.5}, "leave out --eta"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        main(Config(**{"runs": str(tmp_path / "runs"), **options}))
    assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()  # refused before anything was made


def test_refuses_to_sample_what_is_not_there(tmp_path):
    runs.new_run(tmp_path, tiny_config(tmp_path, diffusion_steps=10))
    for options, message in (
        ({}, "has no checkpoint of adamw or adam_mini yet: train longer, or choose another --run"),
        ({"optimizer": "adamw"}, "has no checkpoint of adamw yet"),
        ({"sample_steps": 11}, "--sample-steps is 11, but must be from 1 to the number of times"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(Config(runs=str(tmp_path), sample=True, **options))


def test_show_blocks_prints_the_table_and_starts_no_run(tmp_path, capsys):
    main(Config(runs=str(tmp_path / "runs"), show_blocks=True))
    output = capsys.readouterr().out
    assert "rows" in output
    assert "optimizer state: " in output
    assert not (tmp_path / "runs").exists()


def test_the_command_refuses_in_one_line_and_lists_its_options():
    refused = run_command("diffusion", "--width=20")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --width is 20, which GroupNorm's 8 groups")
    assert len(refused.stderr.splitlines()) == 1

    shown = run_command("diffusion", "--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.replace("│", " ").split())
    for field in (*dataclasses.fields(Config), *dataclasses.fields(DiffusionImages)):
        if field.name not in ("data", "hyper"):
            assert "--" + field.name.replace("_", "-") in words
    assert "{None,digits,cifar10,celeba}" in words
