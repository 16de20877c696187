"""The examples as `benchmarks.quality` trains them: with all their defaults."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from examples.common.training import Task, TrainingConfig
from examples.diffusion import train as diffusion
from examples.gnn import train as gnn
from examples.gpt2 import train as gpt2
from examples.llama import train as llama
from examples.resnet import train as resnet


@dataclasses.dataclass(frozen=True)
class Workload:
    """An example, and what Adam-mini must reach in it."""

    title: str
    config: TrainingConfig
    load_task: Callable[[Any, Path], Task]
    bar: float
    """How far Adam-mini may stay behind AdamW at AdamW's best rate: a fraction of the held-out
    loss, or points of accuracy with `by_accuracy`."""
    by_accuracy: bool = False
    convolutions: bool = False
    """Whether the model consists of convolutions, which are slow for a batch of models."""

    def value(self, run: Mapping[str, Any]) -> float:
        """The accuracy or the loss; NaN if training diverged."""
        found = run["accuracy" if self.by_accuracy else "held_out_loss"]
        return math.nan if found is None else found

    def score(self, run: Mapping[str, Any]) -> tuple[float, float]:
        """A score; smaller is better, and the loss decides among equal accuracies."""
        loss = run["held_out_loss"]
        if loss is None:
            return math.inf, math.inf
        return (-run["accuracy"], loss) if self.by_accuracy else (loss, loss)

    def behind(self, value: float, adamw: float) -> float:
        """How far `value` is behind AdamW's, in the unit of the bar."""
        return 100 * (adamw - value) if self.by_accuracy else value / adamw - 1

    def text(self, value: float) -> str:
        """A value for a table."""
        return f"{value:.2%}" if self.by_accuracy else f"{value:.4f}"

    def difference_text(self, behind: float) -> str:
        """A difference from AdamW for a table, with the sign of the value's own difference."""
        # `or 0.0` avoids -0.0.
        if self.by_accuracy:
            return f"{round(-behind, 2) or 0.0:+.2f} points"
        return f"{round(behind, 4) or 0.0:+.2%}"


# With the paper's blocks; benchmarks.quality.paired compares them with the examples' own.
WORKLOADS = {
    "gpt2": Workload("GPT-2", gpt2.Config(v="mean"), gpt2.load_task, 0.005),
    "llama": Workload("Llama", llama.Config(v="mean"), llama.load_task, 0.005),
    "resnet": Workload("ResNet-18", resnet.Config(v="mean"), resnet.load_task, 0.5, True, True),
    "diffusion": Workload(
        "Diffusion", diffusion.Config(v="mean"), diffusion.load_task, 0.01, False, True
    ),
    "gcn": Workload("GCN", gnn.Config(model="gcn", v="mean"), gnn.load_task, 0.5, True),
    "gat": Workload("GAT", gnn.Config(model="gat", v="mean"), gnn.load_task, 0.5, True),
}
