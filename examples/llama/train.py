"""Train Llama, with AdamW and with Adam-mini on the same batches, and compare."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import tyro
from flax import nnx
from jax.sharding import PartitionSpec as P

from examples.common.cli import ConfigError, check_counts
from examples.common.language import LanguageConfig, blocks, load_task, main, make_program
from examples.common.optimizers import OptimizerConfig
from examples.llama.model import CONFIGS, Llama, LlamaConfig

__all__ = ["Config", "blocks", "load_task", "main", "make_program"]


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """Train Llama with AdamW and then with Adam-mini: same seed, same batches, same
    hyper-parameters. Without arguments it trains a small model on the source of Python's standard
    library, in a few minutes on two CPU cores."""

    title: ClassVar[str] = "Llama"
    shardings: ClassVar[Sequence[tuple[str, P]]] = (
        # Over outputs, which separate blocks: less to sum over devices than over the width.
        ("(out|down)/kernel", P("tensor", "fsdp")),
        ("(query|key|value|gate|up)/kernel", P(None, ("tensor", "fsdp"))),
        ("kernel|embed", P("fsdp", "tensor")),
    )

    model: Literal["nano", "tinyllama-1b", "llama2-7b", "llama2-13b", "llama3-8b"] = "nano"
    """Architecture; the others than nano have the published parameter counts with
    --tokenizer bpe --vocab-size 32000, and llama3-8b with --vocab-size 128256."""
    context: int | None = None
    """Tokens a sequence, instead of the architecture's (64 for nano, 2048 for TinyLlama, 4096 for
    Llama 2, 8192 for Llama 3)."""
    kv_heads: int | None = None
    """Number of heads of key and value, instead of the architecture's."""
    mlp_width: int | None = None
    """Neurons of the MLP, instead of the architecture's; with --width alone, 8/3 of it, rounded up
    to a multiple of 8."""
    runs: str = "runs/llama"
    """Folder in which every run makes its own."""

    hyper: Annotated[OptimizerConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3)
    )

    @property
    def architecture(self) -> LlamaConfig:
        """The model that these options describe."""
        model = CONFIGS[self.model]
        if self.width is not None:
            model = dataclasses.replace(model, mlp_width=8 * -(-self.width // 3))
        return self.adapt(model, "kv_heads", "mlp_width")

    def make_model(self, architecture: LlamaConfig, rngs: nnx.Rngs) -> Llama:
        """The model: tokens (B, T) to logits (B, T, V)."""
        return Llama(architecture, rngs=rngs)

    def check(self) -> None:
        """Refuse what cannot work, before anything is read, written or compiled."""
        super().check()
        model = self.architecture
        check_counts({"kv_heads": model.kv_heads, "mlp_width": model.mlp_width})
        if model.heads % model.kv_heads:
            raise ConfigError(
                f"--heads is {model.heads}, which {model.kv_heads} heads of key and value do not "
                f"divide: choose --kv-heads that divide {model.heads}."
            )
        if model.width // model.heads % 2:
            raise ConfigError(
                f"--width is {model.width}, {model.width // model.heads} for each of "
                f"{model.heads} heads, but rotary positions take features in pairs: choose a "
                f"--width that is a multiple of {2 * model.heads}."
            )
