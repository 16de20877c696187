"""Labelled images: data sets, and batches with augmentation that depend on (seed, step) alone."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from examples.common.cli import ConfigError

# Of each digit, every fourth image is for testing.
DIGITS_TEST_EVERY = 4
CIFAR10_FILES = ([f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"])
CIFAR10_SHAPE = (3, 32, 32)  # as the files have it: channels, height, width
CIFAR10_RECORD = 1 + 3 * 32 * 32  # the label and the pixels, one byte each


class DatasetFacts(NamedTuple):
    """What is known of a data set before it is read."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    num_classes: int
    mean: tuple[float, ...]
    """Of each channel, over the training images, with pixels from 0 to 1."""
    std: tuple[float, ...]
    flip: bool
    """Whether a mirrored image is as good as the image: a mirrored digit is not."""
    hub: tuple[str, str, str] | None = None
    """On the Hugging Face hub: name, test split, column of the images."""


DATASETS = {
    "digits": DatasetFacts((8, 8, 1), 10, (0.305,), (0.376,), flip=False),
    "cifar10": DatasetFacts(
        (32, 32, 3),
        10,
        (0.491, 0.482, 0.447),
        (0.247, 0.243, 0.262),
        flip=True,
        hub=("uoft-cs/cifar10", "test", "img"),
    ),
    "imagenet": DatasetFacts(
        (224, 224, 3),
        1000,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        flip=True,
        hub=("ILSVRC/imagenet-1k", "validation", "image"),
    ),
}


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Where the images come from."""

    dataset: Literal["digits", "cifar10", "imagenet"] | None = None
    """digits: the handwritten digits that come with scikit-learn (8x8). cifar10 and imagenet: from
    the Hugging Face hub. Without it, digits, or cifar10 with --data-dir."""
    data_dir: str | None = None
    """Folder with the files of CIFAR-10's binary version, data_batch_1.bin to data_batch_5.bin and
    test_batch.bin, to be read instead of the hub."""

    @property
    def name(self) -> str:
        """The data set meant."""
        return self.dataset or ("digits" if self.data_dir is None else "cifar10")

    @property
    def facts(self) -> DatasetFacts:
        """What is known of it."""
        return DATASETS[self.name]

    def check(self) -> None:
        """Refuse what cannot work, before anything is read."""
        if self.data_dir is None:
            return
        if self.name != "cifar10":
            raise ConfigError(
                f"--data-dir holds CIFAR-10's binary files, but --dataset is {self.name}: leave "
                "out one of them, or give --dataset cifar10."
            )
        if not Path(self.data_dir).is_dir():
            raise ConfigError(
                f"--data-dir {self.data_dir} is not a folder: give the one that holds "
                "data_batch_1.bin, the first of CIFAR-10's binary files."
            )


class Batch(NamedTuple):
    """Images (B, H, W, C), a byte a pixel and channel, and their labels (B,)."""

    images: np.ndarray
    labels: np.ndarray


class Images(Protocol):
    """The images of one split."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class ArrayImages:
    """Images in memory."""

    batch: Batch

    def __len__(self) -> int:
        return len(self.batch.labels)

    def take(self, indices: np.ndarray) -> Batch:
        return Batch(self.batch.images[indices], self.batch.labels[indices])


@dataclasses.dataclass(frozen=True)
class HubImages:
    """Images on disk as the package datasets keeps them, decoded when they are asked for: ImageNet
    does not fit into memory."""

    rows: Any
    column: str
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: np.ndarray) -> Batch:
        from PIL import ImageOps

        size = self.image_shape[:2][::-1]
        rows = self.rows[indices.tolist()]
        # The middle of the image, scaled; some of ImageNet's are grey.
        fitted = [ImageOps.fit(image.convert("RGB"), size) for image in rows[self.column]]
        images = np.stack([np.asarray(image, np.uint8) for image in fitted])
        # Faces have none.
        labels = rows.get("label", np.zeros(len(images)))
        return Batch(images, np.asarray(labels, np.int32))


class ImageData(NamedTuple):
    """The two splits of a data set."""

    train: Images
    test: Images


def load(config: ImageConfig) -> ImageData:
    """The images of `config`."""
    if config.data_dir is not None:
        return _cifar10(Path(config.data_dir))
    return _digits() if config.name == "digits" else _hub(config.name, config.facts)


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "--dataset digits needs the package scikit-learn, which is not installed: "
            "pip install scikit-learn, or give CIFAR-10's binary files with --data-dir."
        ) from error
    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[::DIGITS_TEST_EVERY]] = True
    return ImageData(
        *(ArrayImages(Batch(images[part], labels[part])) for part in (~is_test, is_test))
    )


def _cifar10(folder: Path) -> ImageData:
    return ImageData(*(ArrayImages(_cifar10_split(folder, names)) for names in CIFAR10_FILES))


def _cifar10_split(folder: Path, names: Sequence[str]) -> Batch:
    records = np.concatenate([_cifar10_records(folder / name) for name in names])
    pixels = records[:, 1:].reshape(-1, *CIFAR10_SHAPE)
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return Batch(images, records[:, 0].astype(np.int32))


def _cifar10_records(path: Path) -> np.ndarray:
    """The records of one of CIFAR-10's files, shape (records, CIFAR10_RECORD)."""
    source = (
        "the binary version of CIFAR-10 has it, from https://www.cs.toronto.edu/~kriz/cifar.html"
    )
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): {source}.") from error
    if len(content) == 0 or len(content) % CIFAR10_RECORD:
        raise ConfigError(
            f"{path} has {len(content):,} bytes, but must have whole records of "
            f"{CIFAR10_RECORD:,} bytes, and at least one: it is cut short or no such file; "
            f"{source}."
        )
    records = content.reshape(-1, CIFAR10_RECORD)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if len(wrong):
        raise ConfigError(
            f"{path} has the label {records[wrong[0], 0]} in record {wrong[0]}, but CIFAR-10's "
            f"are from 0 to 9: it is damaged or no such file; {source}."
        )
    return records


def _hub(dataset: str, facts: DatasetFacts) -> ImageData:
    """A data set on the Hugging Face hub; the package keeps a copy on disk."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"--dataset {dataset} needs the package datasets, which is not installed: "
            "pip install datasets, or give CIFAR-10's binary files with --data-dir."
        ) from error
    name, test_split, column = facts.hub
    try:
        splits = [datasets.load_dataset(name, split=split) for split in ("train", test_split)]
    # The library raises errors of many kinds here: its own, the network's, the file format's.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        terms = ", and that your account on the hub has accepted its terms"
        raise ConfigError(
            f"--dataset {dataset} cannot be loaded ({reason}): check the network"
            f"{terms if dataset == 'imagenet' else ''}; or give CIFAR-10's binary files with "
            "--data-dir."
        ) from error
    return ImageData(*(HubImages(rows, column, facts.image_shape) for rows in splits))


def batch(
    train: Images, facts: DatasetFacts, seed: int, step: int, size: int, *, shift: bool = True
) -> Batch:
    """The augmented images of training step `step`, from 1 on: every image once an epoch, in an
    order of the epoch's own. A function of its arguments alone, so a run that goes on from a
    checkpoint sees the batches it would have seen."""
    positions = np.arange((step - 1) * size, step * size)
    epochs, places = np.divmod(positions, len(train))
    indices = np.empty(size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _order(len(train), seed, int(epoch))[places[here]]
    images, labels = train.take(indices)
    random = np.random.default_rng((seed, 1, step))
    return Batch(augment(images, random, flip=facts.flip, shift=shift), labels)


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def augment(
    images: np.ndarray, random: np.random.Generator, *, flip: bool, shift: bool = True
) -> np.ndarray:
    """Each image shifted by up to an eighth of its size each way (padded with black and cropped)
    where `shift`, and one in two mirrored where `flip`."""
    count, height, width, _ = images.shape
    edges = [size // 8 if shift else 0 for size in (height, width)]
    down, right = (random.integers(2 * edge + 1, size=count)[:, None] for edge in edges)
    rows, columns = down + np.arange(height), right + np.arange(width)
    if flip:
        mirrored = random.random(count) < 0.5
        columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    padded = np.pad(images, ((0, 0), *((edge, edge) for edge in edges), (0, 0)))
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def evenly(count: int, wanted: int) -> np.ndarray:
    """Indices of at most `wanted` of `count` images, the same each time, spread evenly."""
    wanted = min(wanted, count)
    return np.arange(wanted) * count // wanted
