"""examples/resnet: the architecture, batch statistics, the images, resuming, and refusals."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.resnet_blocks import accuracies
from examples.common import images
from examples.common.cli import ConfigError
from examples.common.images import ArrayImages, Batch, ImageConfig
from examples.common.optimizers import OptimizerConfig, decayed
from examples.resnet.model import CONFIGS, Block, ResNet, ResNetConfig
from examples.resnet.train import Config, load_task, main, make_program
from tests.examples.running import (
    losses,
    only_run,
    quick_environment,
    run_command,
    run_killed_at_save,
    run_program,
    run_through_kills,
    run_whole,
)

# One block a stage of a few channels.
TINY = ResNetConfig(width=4, stage_sizes=(1, 1))
# The command line, with it in place of nano.
TINY_PROGRAM = [
    sys.executable,
    "-c",
    "import runpy\n"
    "from examples.resnet.model import CONFIGS, ResNetConfig\n"
    f"CONFIGS['nano'] = {TINY!r}\n"
    "runpy.run_module('examples.resnet', run_name='__main__', alter_sys=True)",
]

TINY_RUN = {
    "batch_size": 8,
    "steps": 8,
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "eval_images": 20,
    "hyper": OptimizerConfig(warmup_steps=2),
}


@pytest.fixture
def tiny(monkeypatch):
    """In place of nano, one block a stage of a few channels."""
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


def abstract(module, image_shape: tuple[int, ...]):
    """The shapes of the module's variables."""
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), x)


def paths(tree) -> dict[str, object]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)],
)
def test_parameter_counts_are_the_published_ones(name, count):
    params = abstract(ResNet(CONFIGS[name]), (224, 224, 3))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    ("name", "stem", "size", "sizes", "channels"),
    [
        ("resnet18", "imagenet", 224, (56, 28, 14, 7), (64, 128, 256, 512)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("resnet34", "cifar", 32, (32, 16, 8, 4), (64, 128, 256, 512)),
                ("resnet50", "imagenet", 224, (56, 28, 14, 7), (256, 512, 1024, 2048)),
            ]
        ),
        ("nano", "cifar", 8, (8, 4, 2, 1), (16, 32, 64, 128)),
        ("nano", "imagenet", 33, (9, 5, 3, 2), (16, 32, 64, 128)),
    ],
)
def test_stages_have_these_shapes(name, stem, size, sizes, channels):
    module = ResNet(dataclasses.replace(CONFIGS[name], stem=stem, num_classes=7))
    variables = abstract(module, (size, size, 3))

    def apply(variables, x):
        return module.apply(
            variables, x, train=False, capture_intermediates=True, mutable=["intermediates"]
        )

    x = jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32)
    logits, captured = jax.eval_shape(apply, variables, x)
    assert logits.shape == (5, 7)
    for stage, (height, width) in enumerate(zip(sizes, channels, strict=True)):
        blocks = CONFIGS[name].stage_sizes[stage]
        for index in range(blocks):
            (output,) = captured["intermediates"][f"layer{stage + 1}_{index}"]["__call__"]
            assert output.shape == (5, height, height, width)
        assert f"layer{stage + 1}_{blocks}" not in captured["intermediates"]


def test_bottleneck_strides_in_its_3x3_convolution():
    module = Block("bottleneck", 4, 2)
    _, captured = jax.eval_shape(
        lambda x: module.init_with_output(
            jax.random.key(0), x, train=False, capture_intermediates=True
        ),
        jnp.zeros((1, 8, 8, 16)),
    )
    outputs = captured["intermediates"]
    sizes = {name: outputs[name]["__call__"][0].shape[1] for name in ("conv1", "conv2", "conv3")}
    assert sizes == {"conv1": 8, "conv2": 4, "conv3": 4}


@pytest.mark.slow
def test_initial_weights_have_the_right_distribution():
    config = dataclasses.replace(CONFIGS["resnet18"], width=32, num_classes=10)
    init = jax.jit(lambda: ResNet(config).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), False))
    params = init()["params"]
    for block, name in (
        ("layer2_0", "conv1"),
        ("layer2_0", "downsample_conv"),
        ("layer2_1", "conv2"),
    ):
        kernel = params[block][name]["kernel"]
        outputs = math.prod(kernel.shape[:2]) * kernel.shape[-1]
        np.testing.assert_allclose(np.std(kernel), math.sqrt(2 / outputs), rtol=0.03)
    assert (params["layer2_0"]["bn1"]["scale"] == 1).all()
    assert (params["layer2_0"]["downsample_bn"]["scale"] == 1).all()
    # The last norm's gain is zero, so that the block starts as its shortcut.
    assert (params["layer2_0"]["bn2"]["scale"] == 0).all()


def random_weights(variables):
    """Weights and averages unlike the initial ones; variances stay positive."""
    source = np.random.default_rng(1)

    def draw(path, leaf):
        values = source.normal(size=leaf.shape)
        return jnp.asarray(np.abs(values) if path[-1].key == "var" else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, variables)


class ByHand:
    """A forward pass in float64, one output at a time, from the layers' variables by name."""

    def __init__(self, variables, train: bool):
        variables = jax.tree.map(np.float64, variables)
        self.params, self.averages = variables["params"], variables["batch_stats"]
        self.train = train
        self.updated = {}

    def conv(self, name: str, x: np.ndarray, stride: int) -> np.ndarray:
        kernel = self.params[name]["kernel"]
        size = kernel.shape[0]
        edge = size // 2
        x = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        height, width = ((length - size) // stride + 1 for length in x.shape[1:3])
        y = np.empty((len(x), height, width, kernel.shape[-1]))
        for i in range(height):
            for j in range(width):
                window = x[:, i * stride :, j * stride :][:, :size, :size]
                y[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
        return y

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        averages = self.averages[name]
        mean, variance = averages["mean"], averages["var"]
        if self.train:
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.updated[name] = {
                "mean": 0.9 * averages["mean"] + 0.1 * mean,
                "var": 0.9 * averages["var"] + 0.1 * variance,
            }
        p = self.params[name]
        return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("kind", "stride", "inputs"),
    [
        ("basic", 1, 4),
        ("basic", 2, 4),
        ("basic", 1, 3),
        ("bottleneck", 1, 16),
        ("bottleneck", 2, 8),
    ],
)
def test_block_computes_what_the_formulas_say(kind, stride, inputs, train):
    module = Block(kind, 4, stride)
    variables = random_weights(abstract(module, (5, 6, inputs)))
    x = np.random.default_rng(0).normal(size=(3, 5, 6, inputs))

    hand = ByHand(variables, train)
    if kind == "basic":
        y = relu(hand.norm("bn1", hand.conv("conv1", x, stride)))
        y = hand.norm("bn2", hand.conv("conv2", y, 1))
    else:
        y = relu(hand.norm("bn1", hand.conv("conv1", x, 1)))
        y = relu(hand.norm("bn2", hand.conv("conv2", y, stride)))
        y = hand.norm("bn3", hand.conv("conv3", y, 1))
    has_projection = (stride, inputs) != (1, y.shape[-1])
    assert ("downsample_conv" in variables["params"]) == has_projection
    shortcut = x
    if has_projection:
        shortcut = hand.norm("downsample_bn", hand.conv("downsample_conv", x, stride))
    expected = relu(shortcut + y)

    actual, updated = jax.jit(
        lambda variables, x: module.apply(variables, x, train, mutable=["batch_stats"])
    )(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    averages = hand.updated if train else variables["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        updated["batch_stats"],
        averages,
    )


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_stem_and_head_compute_what_the_formulas_say(stem):
    module = ResNet(ResNetConfig(stage_sizes=(), width=3, stem=stem, num_classes=4))
    variables = random_weights(abstract(module, (9, 10, 2)))
    x = np.random.default_rng(0).normal(size=(2, 9, 10, 2))
    hand = ByHand(variables, train=False)
    y = relu(hand.norm("bn1", hand.conv("conv1", x, 2 if stem == "imagenet" else 1)))
    if stem == "imagenet":
        padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        rows, columns = (range(0, length, 2) for length in y.shape[1:3])
        windows = [[padded[:, i : i + 3, j : j + 3] for j in columns] for i in rows]
        y = np.stack([np.stack([w.max((1, 2)) for w in row], 1) for row in windows], 1)
    expected = y.mean((1, 2)) @ hand.params["fc"]["kernel"] + hand.params["fc"]["bias"]
    actual = module.apply(variables, jnp.asarray(x, jnp.float32), train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


# The optimizers


@pytest.mark.parametrize("cut", ["channel", "tensor"])
def test_resnet18_has_the_blocks_of_the_page(cut):
    config = Config(model="resnet18", conv=cut, data=ImageConfig("imagenet"), v="mean")
    state = jax.eval_shape(make_program(config, "adam_mini").init)
    (nu,) = (leaf.nu for leaf in jax.tree.leaves(state.opt_state, is_leaf=has_nu) if has_nu(leaf))
    blocks = {"channel": lambda channels: channels, "tensor": lambda channels: 1}[cut]
    shapes = {path: leaf.shape for path, leaf in paths(nu).items()}
    assert shapes == shapes | {
        "conv1/kernel": (1, 1, 1, blocks(64)),
        "bn1/scale": (1,),
        "bn1/bias": (64,),
        "layer4_0/conv1/kernel": (1, 1, 1, blocks(512)),
        "layer4_0/downsample_conv/kernel": (1, 1, 1, blocks(512)),
        "fc/kernel": (1, 1000),
        "fc/bias": (1000,),
    }
    # Every convolution has a norm of as many channels.
    stages = [(64, 4), (128, 5), (256, 5), (512, 5)]
    norms = [64, *(channels for channels, count in stages for _ in range(count))]
    numbers = sum(math.prod(shape) for shape in shapes.values())
    assert numbers == sum(blocks(channels) + 1 + channels for channels in norms) + 1000 + 1000
    assert numbers < 0.001 * 11_689_512


def has_nu(value) -> bool:
    return hasattr(value, "nu")


def test_only_kernels_decay():
    params = abstract(ResNet(CONFIGS["resnet50"]), (32, 32, 3))["params"]
    mask = paths(decayed(params))
    assert {path.split("/")[-1] for path in mask} == {"kernel", "scale", "bias"}
    for path, value in mask.items():
        assert value == path.endswith("/kernel"), path


# Training


def digits(count: int = 8) -> Batch:
    return images.load(ImageConfig()).train.take(np.arange(count))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16", "conv": "tensor"}, {"model": "resnet50", "width": 2}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_a_step_with_every_option_trains(tiny, monkeypatch, options):
    shallow = dataclasses.replace(CONFIGS["resnet50"], stage_sizes=(1, 1))
    monkeypatch.setitem(CONFIGS, "resnet50", shallow)
    config = Config(steps=10, hyper=OptimizerConfig(1e-2, 1), **options)
    program = make_program(config, "adam_mini")
    batch = digits(16)
    before = jax.jit(program.init)()
    step = jax.jit(program.step)
    after, loss = step(before, batch)
    np.testing.assert_allclose(loss, math.log(10), rtol=0.2)
    for _ in range(9):
        after, last_loss = step(after, batch)
    assert last_loss < loss - 0.1
    assert after.step == 10
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    floats = (after.params, after.batch_stats)
    assert {leaf.dtype for leaf in jax.tree.leaves(floats)} == {jnp.dtype("float32")}


def test_bfloat16_computes_in_bfloat16(tiny):
    module = ResNet(Config(dtype="bfloat16").architecture)
    _, captured = jax.eval_shape(
        lambda x: module.init_with_output(
            jax.random.key(0), x, train=True, capture_intermediates=True
        ),
        jnp.zeros((2, 8, 8, 1)),
    )
    outputs = jax.tree.leaves(captured["intermediates"])
    assert len(outputs) > 10
    assert {output.dtype for output in outputs} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_another_seed_changes_weights_and_batches(tiny, tmp_path):
    kernels, labels = [], []
    for seed in (0, 0, 1):
        task = load_task(Config(seed=seed), tmp_path)
        kernels.append(jax.jit(task.make_program("adamw").init)().params["fc"]["kernel"])
        labels.append(task.batch(1).labels)
    for first, same, other in (kernels, labels):
        np.testing.assert_array_equal(same, first)
        assert not np.array_equal(other, first)


@pytest.mark.slow
def test_training_moves_the_averages_and_evaluation_uses_them(tiny):
    program = make_program(Config(hyper=OptimizerConfig(1e-2, 1)), "adamw")
    batch = digits()
    before = jax.jit(program.init)()
    after, _ = jax.jit(program.step)(before, batch)
    for path, mean in paths(after.batch_stats).items():
        assert not np.allclose(mean, paths(before.batch_stats)[path], rtol=1e-4), path

    evaluate = jax.jit(program.evaluate)
    loss, _ = evaluate(after, batch)
    other, _ = evaluate(after.replace(batch_stats=before.batch_stats), batch)
    assert abs(loss - other) > 1e-3
    # An image's loss does not depend on the images beside it.
    halves = [evaluate(after, Batch(*(part[half] for part in batch)))[0] for half in HALVES]
    np.testing.assert_allclose(sum(halves), loss, rtol=1e-5)


HALVES = (slice(None, 4), slice(4, None))


@pytest.mark.slow
def test_loss_with_label_smoothing(tiny):
    program = make_program(Config(label_smoothing=0.3), "adamw")
    state = jax.jit(program.init)()
    # A head without weights gives its bias for every image.
    logits = np.random.default_rng(0).normal(size=10)
    head = {"kernel": jnp.zeros_like(state.params["fc"]["kernel"]), "bias": jnp.asarray(logits)}
    state = state.replace(params={**state.params, "fc": head})
    batch = digits(3)  # all ten classes would have the same mean loss at every smoothing
    log_p = logits - np.log(np.exp(logits).sum())
    expected = -(0.7 * log_p[batch.labels] + 0.3 * log_p.mean())
    loss, correct = jax.jit(program.evaluate)(state, batch)
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
    assert correct == (batch.labels == logits.argmax()).sum()
    _, training_loss = jax.jit(program.step)(state, batch)
    np.testing.assert_allclose(training_loss, expected.mean(), rtol=1e-5)


@pytest.mark.slow
def test_the_model_sees_normalised_pixels(tiny):
    data = images.load(ImageConfig()).train
    pixels = data.take(np.arange(len(data))).images / 255
    facts = images.DATASETS["digits"]
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (facts.mean[0], facts.std[0]), 0.005)

    config = Config(label_smoothing=0.0)
    program = make_program(config, "adamw")
    state = jax.jit(program.init)()
    batch = digits()
    x = (batch.images / 255 - facts.mean[0]) / facts.std[0]

    def loss(train: bool) -> np.ndarray:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits, _ = jax.jit(
            lambda x: ResNet(config.architecture).apply(
                variables, x, train, mutable=["batch_stats"]
            )
        )(jnp.asarray(x, jnp.float32))
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -log_p[np.arange(8), batch.labels]

    evaluated, _ = jax.jit(program.evaluate)(state, batch)
    np.testing.assert_allclose(evaluated, loss(False).sum(), rtol=1e-4)
    _, trained = jax.jit(program.step)(state, batch)
    np.testing.assert_allclose(trained, loss(True).mean(), rtol=1e-4)


@pytest.mark.slow
def test_comparison_leaves_everything_in_the_run_folder(tiny, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    for name in ("adamw", "adam_mini"):
        records = losses(folder / name)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
        assert [r["step"] for r in records if "accuracy" in r] == [4, 8]
        # 20 images are evaluated.
        assert all((20 * r["accuracy"]) % 1 == 0 for r in records if "accuracy" in r)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    adamw, mini = json.loads((folder / "results.json").read_text())
    assert (adamw["optimizer"], mini["optimizer"]) == ("adamw", "adam_mini")
    assert adamw["accuracy"] == losses(folder / "adamw")[-1]["accuracy"]
    assert adamw["numbers_in_v"] > 4 * mini["numbers_in_v"]
    assert mini["optimizer_bytes"] < 0.7 * adamw["optimizer_bytes"]
    output = " ".join(whole.output.split())
    for expected in ("test accuracy", "optimizer bytes", "numbers in v", "ms per step"):
        assert expected in output
    assert "nano on 1,343 training and 454 test images of digits" in output

    main(Config(runs=str(tmp_path), resume=folder.name))
    assert "has finished its 8 steps already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "fails_at"),
    [
        ("adam_mini", 3),
        # In the comparison, saves 1 to 4 are of the first optimizer and 5 to 8 of the second.
        *(pytest.param(None, save, marks=pytest.mark.slow) for save in (1, 4, 5, 7)),
    ],
)
@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(tiny, whole, tmp_path, optimizer, fails_at):
    run_killed_at_save(fails_at, lambda: main(tiny_config(tmp_path, optimizer=optimizer)))
    folder = only_run(tmp_path)
    main(Config(runs=str(tmp_path), resume=str(folder)))
    for name in (optimizer,) if optimizer else ("adamw", "adam_mini"):
        assert losses(folder / name) == losses(whole.folder / name)


@pytest.mark.slow
def test_resume_after_sigkill_at_random_moments(tmp_path):
    environment = quick_environment()
    options = ["--batch-size=16", "--steps=20", "--warmup-steps=2", "--eval-every=5"]
    options += ["--log-every=1"]
    whole = run_program([*TINY_PROGRAM, *options, f"--runs={tmp_path / 'whole'}"], environment)
    assert whole.returncode == 0, whole.stderr
    # So many checkpoints that many a kill falls into one.
    options += ["--checkpoint-every=1"]
    root, log = tmp_path / "killed", tmp_path / "log.txt"
    assert run_through_kills(TINY_PROGRAM, options, root, 0, log, environment, most=3) >= 2
    for name in ("adamw", "adam_mini"):
        assert losses(only_run(root) / name) == losses(only_run(tmp_path / "whole") / name)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_execution")
def test_adam_mini_is_as_accurate_as_adamw():
    adamw, adam_mini = (
        np.mean(accuracies(title, range(1), steps=400)[0])
        for title in ("AdamW", "Adam-mini, channel")
    )
    assert adam_mini >= adamw - 0.005
    assert adam_mini >= 0.97


# The images


def test_digits_are_split_by_class():
    data = images.load(ImageConfig())
    train, test = (part.take(np.arange(len(part))) for part in data)
    assert (len(train.labels), len(test.labels)) == (1343, 454)
    for label in range(10):
        here, there = ((part.labels == label).sum() for part in (train, test))
        assert here // 3 <= there <= here // 3 + 1
    both = np.concatenate([train.images, test.images])
    assert (both.shape, both.dtype) == ((1797, 8, 8, 1), np.uint8)
    assert (both.min(), both.max()) == (0, 255)
    # scikit-learn's first image is a zero; it is for testing, with every fourth zero after it.
    assert test.labels[0] == 0
    assert test.images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def labelled(count: int, size: int = 8) -> ArrayImages:
    """Images that tell their label: its number at one pixel, the others black."""
    pixels = np.zeros((count, size, size, 1), np.uint8)
    pixels[:, size // 2, size // 2, 0] = np.arange(1, count + 1)
    return ArrayImages(Batch(pixels, np.arange(1, count + 1)))


def test_batches_depend_on_seed_and_step_alone():
    train, facts = labelled(100), images.DATASETS["cifar10"]
    first = images.batch(train, facts, 0, 5, 16)
    images.batch(train, facts, 0, 30, 16)
    images.batch(train, facts, 1, 5, 16)
    again = images.batch(train, facts, 0, 5, 16)
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.labels, first.labels)
    for seed, step in ((0, 6), (1, 5)):
        other = images.batch(train, facts, seed, step, 16)
        assert not np.array_equal(other.labels, first.labels)


def test_an_epoch_has_every_image_once():
    train, facts = labelled(40), images.DATASETS["digits"]
    batches = [images.batch(train, facts, 0, step, 16) for step in range(1, 6)]
    for part in batches:
        # Images and labels stay together, through every shift.
        np.testing.assert_array_equal(part.images.max((1, 2, 3)), part.labels)
    labels = np.concatenate([part.labels for part in batches])
    assert sorted(labels[:40]) == sorted(labels[40:]) == list(range(1, 41))
    assert not np.array_equal(labels[:40], labels[40:])
    # The same image is shifted anew.
    flat = {label: set() for label in range(1, 41)}
    for part in batches:
        for image, label in zip(*part, strict=True):
            flat[int(label)].add(image.tobytes())
    assert sum(len(versions) == 2 for versions in flat.values()) > 25


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_shifts_and_mirrors(flip):
    size, most = 16, 2
    image = np.random.default_rng(0).integers(1, 256, (size, size, 3)).astype(np.uint8)
    batch = np.repeat(image[None], 600, 0)
    augmented = images.augment(batch, np.random.default_rng(1), flip=flip)
    assert augmented.dtype == np.uint8
    padded = np.pad(image, ((most, most), (most, most), (0, 0)))
    crops = {}
    for down in range(2 * most + 1):
        for right in range(2 * most + 1):
            crop = padded[down : down + size, right : right + size]
            crops[crop.tobytes()] = (down, right, False)
            if flip:
                crops[crop[:, ::-1].tobytes()] = (down, right, True)
    found = [crops[image.tobytes()] for image in augmented]
    assert set(found) == set(crops.values())  # all of them, and nothing else
    assert sum(mirrored for *_, mirrored in found) == pytest.approx(300 * flip, abs=60)


def test_digits_are_not_mirrored():
    assert {name: facts.flip for name, facts in images.DATASETS.items()} == {
        "digits": False,
        "cifar10": True,
        "imagenet": True,
    }


def test_evaluated_images_are_spread_evenly():
    assert images.evenly(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert images.evenly(3, 5).tolist() == [0, 1, 2]
    assert len(set(images.evenly(50_000, 9_999).tolist())) == 9_999


CIFAR10_NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """CIFAR-10's files with three records each."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    for index, name in enumerate(CIFAR10_NAMES):
        records = np.random.default_rng(index).integers(256, size=(3, 3073)).astype(np.uint8)
        records[:, 0] = (3 * index + np.arange(3)) % 10
        records.tofile(folder / name)
    return folder


def test_cifar10_files_are_read(cifar10):
    config = ImageConfig(data_dir=str(cifar10))
    config.check()
    data = images.load(config)
    train, test = (part.take(np.arange(len(part))) for part in data)
    assert train.images.shape == (15, 32, 32, 3)
    assert train.labels.tolist() == [*range(10), *range(5)]
    assert test.labels.tolist() == [5, 6, 7]
    record = (cifar10 / "data_batch_2.bin").read_bytes()[3073 : 2 * 3073]
    assert train.labels[4] == record[0]
    for channel in range(3):
        for row, column in ((0, 0), (0, 5), (7, 0), (31, 30)):
            pixel = record[1 + 1024 * channel + 32 * row + column]
            assert train.images[4, row, column, channel] == pixel


@pytest.mark.slow
def test_trains_on_cifar10_files(tiny, cifar10, tmp_path):
    options = {"data": ImageConfig(data_dir=str(cifar10)), "optimizer": "adam_mini", "steps": 4}
    main(tiny_config(tmp_path / "runs", **options))
    assert len(losses(only_run(tmp_path / "runs") / "adam_mini")) == 5


def label_10(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2 * 3073] = 10
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "cannot be read (No such file or directory): the binary version"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "has 9,218 bytes, but must have whole records of 3,073 bytes",
        ),
        (lambda path: path.write_bytes(b""), "has 0 bytes, but must have whole records"),
        (label_10, "has the label 10 in record 2, but CIFAR-10's are from 0 to 9"),
    ],
    ids=["missing", "truncated", "empty", "label"],
)
def test_refuses_damaged_cifar10_files(cifar10, tmp_path, name, damage, message):
    damage(cifar10 / name)
    config = tiny_config(tmp_path / "runs", data=ImageConfig(data_dir=str(cifar10)))
    with pytest.raises(ConfigError) as refusal:
        main(config)
    assert str(refusal.value).startswith(f"{cifar10 / name} {message}")
    assert not list((tmp_path / "runs").iterdir())  # it never was a run


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


class FakeRows:
    """A split: rows by their indices, as columns."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["label"])

    def __getitem__(self, indices):
        return {name: [column[i] for i in indices] for name, column in self.columns.items()}


def test_images_are_read_from_the_hub(monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3)).astype(np.uint8)
    hub = FakeHub(FakeRows(img=[Image.fromarray(image) for image in pixels], label=[4, 0, 9]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = images.load(ImageConfig("cifar10"))
    assert hub.asked_for == [("uoft-cs/cifar10", "train"), ("uoft-cs/cifar10", "test")]
    taken = data.test.take(np.array([2, 0]))
    np.testing.assert_array_equal(taken.images, pixels[[2, 0]])
    assert taken.labels.tolist() == [9, 4]

    # Of ImageNet's, of any size and some of them grey, the middle, scaled.
    wide = np.zeros((448, 1000), np.uint8)
    wide[:, 300:700] = 200
    hub = FakeHub(FakeRows(image=[Image.fromarray(wide)], label=[999]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = images.load(ImageConfig("imagenet"))
    assert hub.asked_for[1] == ("ILSVRC/imagenet-1k", "validation")
    (image,), _ = data.train.take(np.array([0]))
    assert image.shape == (224, 224, 3)
    assert (image[100, [0, 5, -6, -1]] == 0).all()
    assert (image[:, 20:-20] == 200).all()


def test_refuses_a_hub_out_of_reach(tmp_path, monkeypatch):
    for hub, message in (
        (FakeHub(), r"imagenet cannot be loaded \(no route to host\): check the network"),
        (None, "imagenet needs the package datasets, which is not installed: pip install"),
    ):
        monkeypatch.setitem(sys.modules, "datasets", hub)
        with pytest.raises(ConfigError, match=message):
            main(tiny_config(tmp_path, data=ImageConfig("imagenet")))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="digits needs the package scikit-learn, which is not"):
        main(tiny_config(tmp_path))
    assert not list(tmp_path.iterdir())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "--width is 0, but must be at least 1"),
        ({"eval_images": 0}, "--eval-images is 0, but must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0, but must be at least 1"),
        ({"batch_size": 1}, "--batch-size is 1, but batch norm compares the images of a batch"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1.0, but must be from 0 to less than 1"),
        ({"label_smoothing": math.nan}, "--label-smoothing is nan, but must be from 0 to less"),
        ({"optimizer": "adem"}, "--optimizer is adem, but must be one of adamw, adam_mini"),
        (
            {"steps": 5, "hyper": OptimizerConfig(warmup_steps=5)},
            "--warmup-steps is 5, but must be from 0 to --steps - 1 = 4",
        ),
        ({"hyper": OptimizerConfig(b2=1.0)}, "--b2 is 1.0, but must be from 0 to less than 1"),
        ({"data": ImageConfig(data_dir="/no/such")}, "--data-dir /no/such is not a folder: give"),
        (
            {"data": ImageConfig("imagenet", data_dir=".")},
            "--data-dir holds CIFAR-10's binary files, but --dataset is imagenet: leave out",
        ),
        ({"data": ImageConfig("digits", data_dir=".")}, "but --dataset is digits: leave out"),
        ({"seed": -1}, "--seed is -1, but must be at least 0"),
        ({"resume": "nowhere"}, "nowhere is not a run, a folder with a config.json: "),
        (
            {"resume": "x", "width": 8, "data": ImageConfig("cifar10")},
            "--resume goes by the options that the run was started with: leave out --width, "
            "--dataset.",
        ),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        main(Config(**{"runs": str(tmp_path / "runs"), **options}))
    assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()  # refused before anything was made


def test_show_blocks_prints_the_table_and_starts_no_run(tmp_path, capsys):
    main(Config(runs=str(tmp_path / "runs"), show_blocks=True, conv="tensor", v="mean"))
    output = capsys.readouterr().out
    assert "layer4_*/conv*/kernel" in output
    assert output.count("neurons") == 1  # the head's
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow  # test_gpt2.py has a quick one
def test_the_command_refuses_in_one_line_and_lists_its_options():
    refused = run_command("resnet", "--data-dir=/no/such")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --data-dir /no/such is not a folder")
    assert len(refused.stderr.splitlines()) == 1

    shown = run_command("resnet", "--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.replace("│", " ").split())
    for field in (*dataclasses.fields(Config), *dataclasses.fields(ImageConfig)):
        if field.name not in ("data", "hyper"):
            assert "--" + field.name.replace("_", "-") in words
    assert "Images a step. (default: " in words
