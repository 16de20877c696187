"""Prompts with their answers: read, split, and cut to the tokens of a model."""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.common import runs, text
from examples.common.cli import ConfigError
from examples.common.text import Document, TextConfig, Tokenizer

ANSWER = "\n=> "
"""Stands between a prompt and its answer."""


class Pair(NamedTuple):
    """A prompt and the answer to learn."""

    prompt: str
    answer: str


class PairData(NamedTuple):
    """Training and held-out pairs; no pair is in both."""

    train: list[Pair]
    held_out: list[Pair]


class Batch(NamedTuple):
    """Pairs as tokens, all filled up to one length."""

    tokens: np.ndarray
    """(B, T + 1): T inputs and, one to the right, their targets."""
    weights: np.ndarray
    """(B, T): 1 for the targets of the answer and for the end after it, 0 for the others."""


def load(path: str | None, folder: Path) -> PairData:
    """The pairs of the file `path`, or those of the standard library. They are kept in `folder`, so
    that a run that goes on reads the pairs it began with."""
    kept = folder / "pairs.json"
    if not kept.exists():
        sources = from_standard_library() if path is None else from_file(Path(path))
        data = split(sources)
        if not data.train or not data.held_out:
            raise ConfigError(
                f"{path or 'the standard library'} has too few pairs to hold some out: give more "
                "different prompts with --pairs."
            )
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_json(kept, data._asdict())
    stored = json.loads(kept.read_text())
    return PairData(*([Pair(*pair) for pair in stored[part]] for part in PairData._fields))


def from_standard_library() -> dict[str, list[Pair]]:
    """By file, the first line of each function's docstring with its signature as the answer."""
    documents = text.documents(TextConfig())
    return {document.name: list(_functions(document)) for document in documents}


def _functions(document: Document) -> Iterator[Pair]:
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):  # the library has files that are meant to be broken
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node) or "").strip()
            if docstring:
                answer = f"{node.name}({ast.unparse(node.args)})"
                yield Pair(docstring.splitlines()[0], answer)


def from_file(path: Path) -> dict[str, list[Pair]]:
    """By prompt, the pairs of a file of JSON lines with "prompt" and "answer"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(
            f"--pairs {path} cannot be read ({reason}): give a file of JSON lines."
        ) from error
    found: dict[str, list[Pair]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        pair = _pair(row)
        if pair is None:
            raise ConfigError(
                f"line {number} of --pairs {path} is no pair: a line such as "
                '{"prompt": "2 + 2", "answer": "4"} was expected.'
            )
        found.setdefault(pair.prompt, []).append(pair)
    return found


def _pair(row: Any) -> Pair | None:
    if isinstance(row, dict):
        pair = Pair(row.get("prompt", ""), row.get("answer", ""))
        if all(isinstance(part, str) and part for part in pair):
            return pair
    return None


def split(sources: Mapping[str, Sequence[Pair]]) -> PairData:
    """Hold out every pair of some sources, as `text.split` chooses them by their names. What the
    other sources have as well is not held out."""
    parts = text.split([Document(name, b"") for name in sources])
    train, held_out = (
        # Each once, in order.
        dict.fromkeys(pair for name, _ in part for pair in sources[name])
        for part in parts
    )
    return PairData(list(train), [pair for pair in held_out if pair not in train])


def prompt_tokens(prompt: str, tokenizer: Tokenizer, context: int) -> list[int]:
    """What the model goes on from: a prompt and `ANSWER`, in at most half a context."""
    marker = tokenizer.encode(ANSWER.encode()).tolist()
    return tokenizer.encode(prompt.encode()).tolist()[: context // 2 - len(marker)] + marker


def answer_tokens(answer: str, tokenizer: Tokenizer) -> list[int]:
    """What the model should write: an answer and the end after it."""
    return [*tokenizer.encode(answer.encode()).tolist(), text.END_OF_DOCUMENT]


def fitting(pairs: Sequence[Pair], tokenizer: Tokenizer, context: int) -> list[Pair]:
    """The pairs whose answers take at most half a context."""
    return [p for p in pairs if len(answer_tokens(p.answer, tokenizer)) <= context // 2]


def encode(pairs: Sequence[Pair], tokenizer: Tokenizer, context: int) -> Batch:
    """The tokens of `fitting` pairs, and which of them count."""
    tokens = np.full((len(pairs), context + 1), text.END_OF_DOCUMENT, np.int32)
    weights = np.zeros((len(pairs), context), np.float32)
    for row, pair in enumerate(pairs):
        prompt = prompt_tokens(pair.prompt, tokenizer, context)
        answer = answer_tokens(pair.answer, tokenizer)
        end = len(prompt) + len(answer)
        tokens[row, :end] = prompt + answer
        weights[row, len(prompt) - 1 : end - 1] = 1  # the first token is no target
    return Batch(tokens, weights)


def batch(train: Batch, seed: int, step: int, size: int) -> Batch:
    """The pairs of training step `step`. A function of its arguments alone, so a run that goes on
    from a checkpoint sees the batches it would have seen."""
    chosen = np.random.default_rng((seed, step)).integers(len(train.tokens), size=size)
    return Batch(*(part[chosen] for part in train))
