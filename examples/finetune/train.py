"""Fine-tune a language model on prompts and answers, with AdamW and with Adam-mini on the same
batches, and compare."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.common import optimizers, runs, text
from examples.common.cli import ConfigError, check_counts
from examples.common.language import check_accumulate, generate, sum_over_micro_batches
from examples.common.optimizers import OptimizerConfig, ParameterConfig
from examples.common.text import Tokenizer
from examples.common.training import Program, Task, TrainingConfig, compare
from examples.finetune import pairs
from examples.finetune.model import (
    Model,
    Pretrained,
    Weights,
    find_pretrained,
    load_pretrained,
    load_pretrained_config,
)
from examples.finetune.pairs import Batch, PairData
from optax_adam_mini import block_table

SHORTEST_CONTEXT = 16
SHOWN_ANSWERS = 3


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Fine-tune a language model that examples.llama or examples.gpt2 has trained, with AdamW and
    then with Adam-mini: same weights to start from, same batches, same hyper-parameters. Without
    arguments it takes the newest run, and teaches it to answer the first line of a docstring with
    the signature of the function."""

    run: str | None = None
    """The run to start from, a folder. Without it, the newest in runs/llama and runs/gpt2."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Start from what this optimizer has trained: adamw or adam_mini. Without it, from the last one
    trained."""
    lora_rank: int = 0
    """Train adapters of this rank beside the linear layers, and freeze everything else. 0 trains
    all parameters."""
    pairs: str | None = None
    """File of JSON lines with "prompt" and "answer". Without it, the docstrings and signatures of
    Python's standard library."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 16
    """Pairs a step."""
    accumulate: int = 1
    """Micro-batches a step: their gradients are added up, with the memory of one of them."""
    seed: int = 0
    """Seed of the adapters and of the batches."""
    eval_pairs: int = 512
    """Held-out pairs, the same at every evaluation."""
    runs: str = "runs/finetune"
    """Folder in which every run makes its own."""

    parameters: Annotated[ParameterConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ParameterConfig
    )
    hyper: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: OptimizerConfig(warmup_share=0.1)
    )

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        check_counts({"accumulate": self.accumulate, "eval_pairs": self.eval_pairs})
        check_accumulate(self.batch_size, self.accumulate)
        if self.lora_rank < 0:
            raise ConfigError(
                f"--lora-rank is {self.lora_rank}, but must be at least 1, or 0 to train all "
                "parameters."
            )
        if self.from_ is not None:
            optimizers.check_name(self.from_, option="from")
        if self.pairs is not None and not Path(self.pairs).is_file():
            raise ConfigError(f"--pairs {self.pairs} is no file: give one of JSON lines.")
        super().check()


class Tuning(NamedTuple):
    """What changes from step to step, and the frozen weights, so that a checkpoint stands alone."""

    weights: Weights
    opt_state: optax.OptState


def total_loss(model: Model, weights: Weights, batch: Batch) -> jax.Array:
    """In nats, of what the weights of the batch count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.logits(weights, batch.tokens[:, :-1]), batch.tokens[:, 1:]
    )
    return (batch.weights * losses).sum()


def make_program(config: Config, optimizer: str, pretrained: Pretrained) -> Program:
    """Model, loss, gradient and update as plain functions of arrays."""
    model = Model(pretrained.config, config.lora_rank)
    tx = optimizers.make_optimizer(
        optimizer,
        config.hyper,
        config.steps,
        model.block_specs(config.v),
        model.matrices,
        rounds_at_random=config.parameters.rounds_at_random,
    )

    def init(params: Any) -> Tuning:
        weights = config.parameters.cast(model.init(params, config.seed))
        return Tuning(weights, tx.init(weights.trained))

    def step(tuning: Tuning, batch: Batch) -> tuple[Tuning, jax.Array]:
        trained, frozen = tuning.weights
        # Every token of an answer counts alike, in whichever micro-batch it is.
        batch = Batch(batch.tokens, batch.weights / batch.weights.sum())
        loss, gradient = sum_over_micro_batches(
            lambda trained, part: total_loss(model, Weights(trained, frozen), part),
            trained,
            batch,
            config.accumulate,
        )
        updates, opt_state = tx.update(gradient, tuning.opt_state, trained)
        return Tuning(Weights(optax.apply_updates(trained, updates), frozen), opt_state), loss

    def evaluate(tuning: Tuning, batch: Batch) -> jax.Array:
        """The total loss in nats."""
        return total_loss(model, tuning.weights, batch)

    return Program(init, step, evaluate, inputs=(pretrained.params,))


def load_task(config: Config, folder: Path) -> Task:
    """What the training loop needs, with the pretrained model and the pairs read; the pairs are
    kept in `folder`."""
    pretrained = load_pretrained(find_pretrained(config.run), config.from_)
    context = pretrained.config.architecture.context
    if context < SHORTEST_CONTEXT:
        raise ConfigError(
            f"{pretrained.folder} has a context of {context} tokens, which has no room for a "
            f"prompt and an answer: choose a --run with one of at least {SHORTEST_CONTEXT}."
        )
    tokenizer = pretrained.tokenizer
    data = PairData(
        *(
            pairs.fitting(part, tokenizer, context)
            for part in pairs.load(config.pairs, folder / "data")
        )
    )
    for name, part in zip(("training", "held-out"), data, strict=True):
        if not part:
            raise ConfigError(
                f"no {name} pair has an answer of less than {context // 2} tokens, half the "
                "context: choose a --run with a longer one, or give shorter answers with --pairs."
            )
    train = pairs.encode(data.train, tokenizer, context)
    held_out = pairs.encode(data.held_out[: config.eval_pairs], tokenizer, context)
    held_out_tokens = float(held_out.weights.sum())
    sizes = tokenizer.token_bytes[held_out.tokens[:, 1:]]
    held_out_bytes = float((held_out.weights * sizes).sum())
    count = -(-len(held_out.tokens) // (config.batch_size // config.accumulate))
    held_out_batches = list(map(Batch, *(np.array_split(part, count) for part in held_out)))

    model = Model(pretrained.config, lora_rank=0)
    weights = model.init(pretrained.params, config.seed)
    loss = jax.jit(functools.partial(total_loss, model))
    nats_before = sum(float(loss(weights, batch)) for batch in held_out_batches)

    def measure(nats: float) -> dict[str, float]:
        return {
            "held_out_loss": nats / held_out_tokens,
            "nats_per_byte": nats / held_out_bytes,
            "nats_per_byte_before": nats_before / held_out_bytes,
        }

    kind = f"adapters of rank {config.lora_rank}" if config.lora_rank else "all parameters"
    return Task(
        title=(
            f"{pretrained.config.title} {pretrained.config.model}, {kind}, {config.steps} steps "
            f"of {config.batch_size} pairs"
        ),
        description=(
            f"{pretrained.folder}, {pretrained.optimizer}, step {pretrained.step}, on "
            f"{len(data.train):,} training and {len(data.held_out):,} held-out pairs"
        ),
        make_program=lambda optimizer: make_program(config, optimizer, pretrained),
        batch=lambda step: pairs.batch(train, config.seed, step, config.batch_size),
        held_out=lambda: held_out_batches,
        measure=measure,
        columns={
            "held-out nats per byte": lambda row: f"{row['nats_per_byte']:.4f}",
            "before": lambda row: f"{row['nats_per_byte_before']:.4f}",
        },
        unit="pairs",
        units_per_step=config.batch_size,
        loss_unit="nats per token of answers",
    )


def blocks(config: Config) -> Table:
    """How Adam-mini cuts what is trained."""
    pretrained = load_pretrained_config(find_pretrained(config.run))
    model = Model(pretrained, config.lora_rank)
    trained = jax.eval_shape(config.parameters.cast, model.abstract_weights.trained)
    specs = model.block_specs(config.v)
    return block_table(trained, specs, mu_dtype=config.parameters.mu_dtype)


def answer(model: Model, weights: Weights, prompt: str, tokenizer: Tokenizer) -> str:
    """What the model finds the likeliest, token by token."""
    context = model.architecture.context
    given = pairs.prompt_tokens(prompt, tokenizer, context)
    tokens = generate(
        model.logits,
        weights,
        given,
        context=context,
        count=context // 2,
        temperature=0,
        seed=0,
    )[len(given) :]
    end = (*tokens, text.END_OF_DOCUMENT).index(text.END_OF_DOCUMENT)
    return tokenizer.decode(tokens[:end])


def show_answers(config: Config, folder: Path, console: Console) -> None:
    """Print how the trained models answer some held-out prompts."""
    pretrained = load_pretrained(find_pretrained(config.run), config.from_)
    model = Model(pretrained.config, config.lora_rank)
    context, tokenizer = model.architecture.context, pretrained.tokenizer
    held_out = pairs.fitting(pairs.load(config.pairs, folder / "data").held_out, tokenizer, context)
    spread = np.linspace(0, len(held_out) - 1, SHOWN_ANSWERS).astype(int)
    shown = dict.fromkeys(held_out[index] for index in spread)
    table = Table(title="Answers to held-out prompts", show_lines=True)
    weights = {"before": model.init(pretrained.params, config.seed)}
    for optimizer in config.optimizer_names:
        program = make_program(config, optimizer, pretrained)
        abstract_state = program.abstract_state()
        with runs.open_checkpoints(
            folder / optimizer / "checkpoints", to_write=False
        ) as checkpoints:
            weights[optimizer] = runs.restore_checkpoint(checkpoints, abstract_state).weights
    for heading in ("prompt", "answer", *weights):
        table.add_column(heading, overflow="fold")
    for pair in shown:
        given = [answer(model, part, pair.prompt, tokenizer) for part in weights.values()]
        # What is written as it stands in source shows blanks and line ends too.
        table.add_row(*(escape(repr(part)) for part in (pair.prompt, pair.answer, *given)))
    console.print(table)


def main(config: Config) -> None:
    """What the command line asks for."""
    if config.resume is None:
        # Written down, because when this run goes on another one may be the newest.
        config = dataclasses.replace(config, run=str(find_pretrained(config.run)))
    compare(config, load_task, blocks, show_answers)
