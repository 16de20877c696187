"""Text for language models: documents, tokens, and batches that depend on (seed, step) alone."""

import dataclasses
import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from examples.common.cli import ConfigError

HELD_OUT_FRACTION = 0.1
# A byte that text does not contain ends every document, whatever the tokenizer.
END_OF_DOCUMENT = 0
# Folders of the standard library that many installations lack (its tests), that are not part of it
# (installed packages), or whose files are near copies of one another, so that a held-out file would
# not be held out (the tables of character encodings).
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
HF_SHORTHANDS = {
    "openwebtext": "Skylion007/openwebtext",
    "fineweb": "HuggingFaceFW/fineweb:sample-10BT",
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Where the text comes from and how it is cut into tokens."""

    text: str | None = None
    """Text to train on: a file, or a folder whose files are all read. Without it, the source of
    Python's standard library."""
    hf_dataset: str | None = None
    """Stream the text from the Hugging Face hub instead: openwebtext, fineweb, or any
    NAME or NAME:CONFIG with a column "text"."""
    hf_bytes: int = 100_000_000
    """How much text to stream from --hf-dataset, in bytes."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """bytes: one token a byte. bpe: byte-pair encoding trained on the training text."""
    vocab_size: int = 4096
    """Number of tokens of the bpe tokenizer; bytes always has 256."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens the model must know."""
        return 256 if self.tokenizer == "bytes" else self.vocab_size

    def check(self) -> None:
        """Refuse what cannot work, before anything is read."""
        if self.text is not None and self.hf_dataset is not None:
            raise ConfigError("--text and --hf-dataset were both given: choose one of them.")
        if self.text is not None and not Path(self.text).exists():
            raise ConfigError(f"--text {self.text} does not exist: give a file or a folder.")
        if self.hf_bytes < 1:
            raise ConfigError(f"--hf-bytes is {self.hf_bytes}, but must be at least 1.")
        if self.tokenizer == "bpe" and self.vocab_size <= 256:
            raise ConfigError(
                f"--vocab-size is {self.vocab_size}, but bpe starts from the 256 bytes and adds "
                "to them: give at least 257, or --tokenizer bytes."
            )


class Document(NamedTuple):
    """One text with the name it is split by."""

    name: str
    text: bytes


class Tokenizer(Protocol):
    """What the examples need of a tokenizer."""

    token_bytes: np.ndarray
    """How many bytes of text each token stands for."""

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token a byte."""

    token_bytes = np.ones(256, np.int64)

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-pair encoding, trained by the `tokenizers` library. Bytes that are not UTF-8 are
    replaced by U+FFFD."""

    def __init__(self, path: Path):
        tokenizers = _import_tokenizers()
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        vocabulary = self._tokenizer.get_vocab()
        self.token_bytes = np.zeros(max(vocabulary.values()) + 1, np.int64)
        for token, index in vocabulary.items():
            # The byte-level alphabet has one character a byte.
            self.token_bytes[index] = len(token)

    @staticmethod
    def train(documents: Sequence[Document], vocab_size: int, path: Path) -> None:
        """Train on `documents` and write the result to `path`."""
        tokenizers = _import_tokenizers()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            # The library numbers the alphabet by code point, where byte 0 is not the first.
            special_tokens=[_character_of_byte_0()],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        texts = (document.text.decode("utf-8", errors="replace") for document in documents)
        tokenizer.train_from_iterator(texts, trainer)
        temporary = path.with_name(path.name + ".tmp")
        tokenizer.save(str(temporary))
        os.replace(temporary, path)

    def encode(self, text: bytes) -> np.ndarray:
        tokens = self._tokenizer.encode(text.decode("utf-8", errors="replace")).ids
        return np.asarray(tokens, np.uint16 if len(self.token_bytes) <= 2**16 else np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


def _import_tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "--tokenizer bpe needs the package tokenizers, which is not installed: "
            "pip install tokenizers, or use --tokenizer bytes."
        ) from error
    return tokenizers


def _character_of_byte_0() -> str:
    # GPT-2's byte-level alphabet writes an unprintable byte b as a character from U+0100 on.
    return "\u0100"


class TextData(NamedTuple):
    """Training and held-out tokens, and the tokenizer that made them."""

    train: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer


def load(config: TextConfig, folder: Path) -> TextData:
    """The tokens of `config`'s text. They are kept in `folder`, so that a run that goes on reads
    the tokens it began with even where the text has changed since."""
    train, held_out = folder / "train.npy", folder / "held_out.npy"
    vocabulary = folder / "tokenizer.json"
    if not (train.exists() and held_out.exists()):
        training_documents, held_out_documents = split(documents(config))
        folder.mkdir(parents=True, exist_ok=True)
        if config.tokenizer == "bpe":
            BPETokenizer.train(training_documents, config.vocab_size, vocabulary)
        tokenizer = _tokenizer(config, vocabulary)
        _write_tokens(train, training_documents, tokenizer)
        _write_tokens(held_out, held_out_documents, tokenizer)
    return TextData(
        np.load(train, mmap_mode="r"),
        np.load(held_out, mmap_mode="r"),
        _tokenizer(config, vocabulary),
    )


def load_tokenizer(config: TextConfig, folder: Path) -> Tokenizer:
    """The tokenizer that `load` left in `folder`."""
    return _tokenizer(config, folder / "tokenizer.json")


def _tokenizer(config: TextConfig, vocabulary: Path) -> Tokenizer:
    return ByteTokenizer() if config.tokenizer == "bytes" else BPETokenizer(vocabulary)


def _write_tokens(path: Path, texts: Sequence[Document], tokenizer: Tokenizer) -> None:
    parts = []
    for document in texts:
        tokens = tokenizer.encode(document.text)
        parts += [tokens, np.asarray([END_OF_DOCUMENT], tokens.dtype)]
    # Written aside and renamed: a run killed here leaves no half file behind.
    temporary = path.with_name("writing-" + path.name)
    np.save(temporary, np.concatenate(parts))
    os.replace(temporary, path)


def documents(config: TextConfig) -> list[Document]:
    """The documents of `config`, in an order that does not depend on the file system."""
    if config.hf_dataset is not None:
        return _stream(config.hf_dataset, config.hf_bytes)
    if config.text is None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [
            path
            for path in root.rglob("*.py")
            if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
        ]
    else:
        root = Path(config.text)
        paths = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    try:
        found = [Document(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths]
    except OSError as error:
        raise ConfigError(f"the text in {root} cannot be read: {error}.") from error
    if config.text is not None and root.is_file():
        if why := _why_no_text(found[0]):
            raise ConfigError(
                f"--text {root} is no text{why}: give files of text alone, converted to UTF-8."
            )
    elif config.text is not None:
        passed_over = {document.name: why for document in found if (why := _why_no_text(document))}
        found = [document for document in found if document.name not in passed_over]
        for name, why in sorted(passed_over.items()):
            print(f"passed over: {root / name} is no text{why}", file=sys.stderr)
    found = sorted(document for document in found if document.text)
    if not found:
        raise ConfigError(f"there is no text in {root}: give a --text with files that hold some.")
    return found


def _why_no_text(document: Document) -> str:
    """Why it is something else than text; empty if it is text."""
    try:
        document.text.decode()
    except UnicodeDecodeError as error:
        return f" in UTF-8 (byte {error.start} is 0x{document.text[error.start]:02x})"
    return f" (byte {document.text.index(0)} is 0)" if b"\0" in document.text else ""


def _stream(dataset: str, size: int) -> list[Document]:
    """The first `size` bytes of a data set on the Hugging Face hub."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "--hf-dataset needs the package datasets, which is not installed: "
            "pip install datasets, or train on your own files with --text."
        ) from error
    name, _, configuration = HF_SHORTHANDS.get(dataset, dataset).partition(":")
    found: list[Document] = []
    total = 0
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for index, row in enumerate(rows):
            text = row["text"].encode()
            found.append(Document(f"{index:012d}", text))
            total += len(text)
            if total >= size:
                break
    # The library raises errors of many kinds here: its own, the network's, the file format's.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--hf-dataset {dataset} cannot be streamed ({reason}): check the name and the "
            "network, or train on your own files with --text."
        ) from error
    if not found:
        raise ConfigError(f"--hf-dataset {dataset} holds no text: choose another one.")
    return found


def split(found: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents. A document goes by the hash of its name; one document alone
    is cut, and its end held out."""
    if len(found) == 1:
        name, text = found[0]
        cut = len(text) - int(len(text) * HELD_OUT_FRACTION)
        return [Document(name, text[:cut])], [Document(name, text[cut:])]
    by_hash = sorted(found, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    count = max(1, round(len(found) * HELD_OUT_FRACTION))
    return sorted(by_hash[count:]), sorted(by_hash[:count])


def check_length(data: TextData, context: int) -> None:
    """Refuse a text that has no room for one window."""
    for part, tokens in (("training", data.train), ("held-out", data.held_out)):
        if len(tokens) <= context:
            raise ConfigError(
                f"the {part} text has {len(tokens)} tokens, but one context of {context} and the "
                f"token after it need {context + 1}: give more text or a smaller --context."
            )


def batch(
    tokens: np.ndarray,
    seed: int,
    step: int,
    size: int,
    context: int,
    rows: slice = slice(None),
) -> np.ndarray:
    """The windows of training step `step`, shape (size, context + 1), or these `rows` of them: each
    is `context` inputs and, one to the right, their targets. A function of its arguments alone, so
    a run that goes on from a checkpoint sees the batches it would have seen."""
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - context, size=size)
    return _windows(tokens, starts[rows], context)


def held_out_windows(tokens: np.ndarray, count: int, context: int) -> np.ndarray:
    """At most `count` windows spread evenly over the held-out text, without overlap of targets."""
    count = min(count, (len(tokens) - 1) // context)
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(np.int64)
    return _windows(tokens, starts, context)


def _windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return np.asarray(tokens[starts[:, None] + np.arange(context + 1)], np.int32)
