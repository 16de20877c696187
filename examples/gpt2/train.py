"""Train GPT-2, with AdamW and with Adam-mini on the same batches, and compare."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from flax import nnx
from jax.sharding import PartitionSpec as P

from examples.common.language import LanguageConfig, blocks, load_task, main, make_program
from examples.gpt2.model import CONFIGS, GPT2, GPT2Config
from optax_adam_mini import BlockSpec, per_tensor

__all__ = ["Config", "blocks", "load_task", "main", "make_program"]


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Train GPT-2 with AdamW, with Adam-mini, with Adam-mini whose first moment is kept in 8 bits,
    and with Muon for the matrices beside Adam-mini: same seed, same batches, same
    hyper-parameters. Without arguments it trains a small model
    on the source of Python's standard library, in a few minutes on two CPU cores."""

    title: ClassVar[str] = "GPT-2"
    compared: ClassVar[tuple[str, ...]] = (
        "adamw", "adam_mini", "adam_mini_int8", "muon_mini",
    )  # fmt: skip
    shardings: ClassVar[Sequence[tuple[str, P]]] = (
        ("wpe", P(None, "fsdp")),
        ("wte", P("fsdp", "tensor")),
        # Over outputs, which separate blocks: less to sum over devices than over the width.
        ("(c_attn|c_fc)/kernel", P(None, ("tensor", "fsdp"))),
        ("c_proj/kernel", P("tensor", "fsdp")),
        ("(c_attn|c_fc)/bias", P("tensor")),
    )

    model: Literal["nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "nano"
    """Architecture; the GPT-2 sizes have GPT-2's own parameter counts with
    --tokenizer bpe --vocab-size 50257."""
    context: int | None = None
    """Tokens a sequence, instead of the architecture's (64 for nano, 1024 for GPT-2)."""
    runs: str = "runs/gpt2"
    """Folder in which every run makes its own."""

    @property
    def architecture(self) -> GPT2Config:
        """The model that these options describe."""
        return self.adapt(CONFIGS[self.model])

    def make_model(self, architecture: GPT2Config, rngs: nnx.Rngs) -> GPT2:
        """The model: tokens (B, T) to logits (B, T, V)."""
        return GPT2(architecture, rngs=rngs)

    @property
    def overrides(self) -> Sequence[tuple[str, BlockSpec]]:
        """Each bias is one block: read off the computation it would be cut per coordinate, which
        is 0.1% of the parameters."""
        stacked = [("^h/.*bias$", per_tensor(stacked=0))] if self.scan else []
        return (*stacked, ("bias$", per_tensor()))
