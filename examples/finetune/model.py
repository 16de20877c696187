"""A pretrained model, whole or with adapters, cut into what is trained and what is frozen."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common import runs, text
from examples.common.cli import ConfigError
from examples.common.language import LanguageConfig, abstract_tokens, load_trained, overrides
from examples.common.text import Tokenizer
from examples.common.training import load_config, read_config
from examples.gpt2 import train as gpt2
from examples.llama import train as llama
from optax_adam_mini import infer_block_specs, infer_muon_dimension_numbers

FAMILIES: tuple[type[LanguageConfig], ...] = (llama.Config, gpt2.Config)


class Pretrained(NamedTuple):
    """A run of an example of language models, and the checkpoint to start from."""

    folder: Path
    config: LanguageConfig
    optimizer: str
    step: int
    params: Any

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own."""
        return text.load_tokenizer(self.config.data, self.folder / "data")


def find_pretrained(run: str | None) -> Path:
    """The folder of `run`; the newest one of all families where it is None."""
    if run is not None:
        return runs.find_run(Path(FAMILIES[0]().runs), run)
    roots = [family().runs for family in FAMILIES]
    found = [path.parent for root in roots for path in Path(root).glob(f"*/{runs.CONFIG_FILE}")]
    if not found:
        raise ConfigError(
            f"there is no run to fine-tune in {' or '.join(roots)}: make one with "
            "`python -m examples.llama`, or give the folder of one with --run."
        )
    return max(found, key=lambda folder: folder.name)  # named by their times


def load_pretrained_config(folder: Path) -> LanguageConfig:
    """The configuration of a run, which tells the family by the options that it has, those left out
    that say where it is trained."""
    for family in FAMILIES:
        stored = read_config(family, folder)
        fields = {field.name for field in dataclasses.fields(family)}
        if stored.keys() - set(family.where) == fields - set(family.where):
            return load_config(family, folder)
    raise ConfigError(
        f"{folder} is no run of a language model: give one of `python -m examples.llama` or "
        "`python -m examples.gpt2` with --run."
    )


def load_pretrained(folder: Path, optimizer: str | None) -> Pretrained:
    """The newest checkpoint of the run in `folder`, or the newest of those by `optimizer`."""
    config = load_pretrained_config(folder)
    names = config.optimizer_names if optimizer is None else (optimizer,)
    trained = load_trained(config, folder, names)
    if trained is None:
        raise ConfigError(
            f"{folder} has no checkpoint of {' or '.join(names)}: train longer, or choose another "
            "--run or --from."
        )
    return Pretrained(folder, config, *trained)


class Weights(NamedTuple):
    """The parameters of a model."""

    trained: nnx.State
    """All of them, or those of the adapters."""
    frozen: nnx.State
    """The others."""


class Model:
    """A pretrained model's architecture with adapters of `lora_rank`, or without any where it is
    0."""

    def __init__(self, pretrained: LanguageConfig, lora_rank: int):
        self.pretrained = pretrained
        self.architecture = dataclasses.replace(pretrained.architecture, lora_rank=lora_rank)
        model = nnx.eval_shape(lambda: self._make(0))
        self._graph, *weights = nnx.split(model, nnx.LoRAParam if lora_rank else nnx.Param, ...)
        self.abstract_weights = Weights(*weights)

    def _make(self, seed: int) -> nnx.Module:
        return self.pretrained.make_model(self.architecture, nnx.Rngs(seed))

    def init(self, params: Any, seed: int) -> Weights:
        """The weights that compute what the pretrained `params` do."""
        given = dict(nnx.to_flat_state(params))

        def pretrained(state: nnx.State) -> nnx.State:
            # The layer beside an adapter lies one level deeper than it did.
            paths = [path for path, _ in nnx.to_flat_state(state)]
            without = [tuple(part for part in path if part != "base_module") for path in paths]
            return nnx.from_flat_state([(p, given[w]) for p, w in zip(paths, without, strict=True)])

        trained, frozen = self.abstract_weights
        if self.architecture.lora_rank:
            return Weights(nnx.state(self._make(seed), nnx.LoRAParam), pretrained(frozen))
        return Weights(pretrained(trained), frozen)

    def logits(self, weights: Weights, tokens: jax.Array) -> jax.Array:
        """Of the tokens that come next."""
        return nnx.merge(self._graph, *weights)(tokens).astype(jnp.float32)

    def block_specs(self, v: Literal["mean", "outer"]) -> Any:
        """Adam-mini's partition of what is trained, read off what the model computes. Of an
        adapter's two matrices, the second has its layer's outputs and is cut as its kernel is."""
        return infer_block_specs(
            *self._predicted(),
            overrides=() if self.architecture.lora_rank else overrides(self.pretrained, v),
            v=v,
        )

    def matrices(self) -> Any:
        """Muon's dimension numbers, read off in the same way."""
        return infer_muon_dimension_numbers(*self._predicted())

    def _predicted(self) -> tuple[Any, ...]:
        """What the model computes: a function, and shapes of its arguments."""
        logits = lambda trained, frozen, tokens: self.logits(Weights(trained, frozen), tokens)
        return logits, *self.abstract_weights, abstract_tokens(self.pretrained)
