"""Do the findings on GPT-2 nano hold in PyTorch, with the authors' own Adam-mini? Paired seeds.

python -m benchmarks.quality.reference            # on a GPU, or on many cores: minutes
python -m benchmarks.quality.reference --quick    # a minute; shows that it runs

It needs torch and the reference package: pip install torch==2.13.0 adam-mini==1.1.1. The model, the
text, the schedule, the clipping and the decay are those of examples.gpt2, rewritten in PyTorch: no
JAX code takes part in the training. A seed gives every optimizer the same first weights and the
same batches. These are the findings to test, and what would refute them, as stated before the runs:

1. *At AdamW's best rate the reference Adam-mini is two to three per cent behind AdamW, and closer
   at a low rate: it stops gaining from larger rates where AdamW goes on.* Refuted if at AdamW's
   best rate the 95% interval of its distance does not lie above zero, or the mean is under 1%; or
   if the interval of what the distance grows by, from the lowest rate to that one, does not lie
   above zero. That it is two to three per cent is refuted if the interval lies outside of these.
2. *With a row times a column as its second moment, Adam keeps AdamW's loss there.* Refuted if the
   95% interval of its distance lies above zero, or reaches half of Adam-mini's mean distance.

The runs are stored in the JSON file --output, from which the page beside it is made; after an
interruption, the same command continues.
"""

import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from adam_mini import Adam_mini
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from examples.common import text
from examples.common.cli import ConfigError, check_counts, exit_status
from examples.common.interrupts import end_on_interrupt

# Every worker imports this module, so functions of the report import modules that need JAX.

VOCABULARY, CONTEXT, LAYERS, HEADS, WIDTH = 256, 64, 2, 8, 128
BATCH_SIZE, HELD_OUT_WINDOWS = 16, 512
B1, B2, EPS, WEIGHT_DECAY, CLIP_NORM, FINAL_RATE = 0.9, 0.95, 1e-8, 0.1, 1.0, 0.1

TITLES = {
    "adamw": "AdamW",
    "adam_mini": "adam-mini 1.1.1",
    "adam_mini_as_named": "adam-mini 1.1.1, positions in one block",
    "outer": "a row times a column",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare PyTorch's AdamW, the authors' Adam-mini and a row times a column, seed by seed."""

    seeds: int = 8
    """Number of seeds, from 1 on."""
    steps: int = 500
    """Optimizer steps of a training."""
    rates: tuple[float, ...] = (1.33e-3, 4.5e-3)
    """Learning rates."""
    contenders: tuple[Literal["adamw", "adam_mini", "adam_mini_as_named", "outer"], ...] = tuple(
        TITLES
    )
    """Optimizers, AdamW first. The reference package treats the positions as one block unless it is
    given their name; adam_mini gives it, adam_mini_as_named does not."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    workers: int = min(8, os.cpu_count() or 1)
    """Number of simultaneous trainings, each in a process on one core; with cuda, on one GPU."""
    output: str = "docs/results/paired/reference.json"
    """File of the results; the page is beside it."""
    quick: bool = False
    """A few steps, two seeds: numbers without meaning, in a minute."""

    def check(self) -> None:
        """Refuse options that cannot work."""
        check_counts({"seeds": self.seeds, "steps": self.steps, "workers": self.workers})
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise ConfigError(f"--rates is {self.rates}, but must be rates of more than 0.")
        if self.contenders[:1] != ("adamw",):
            raise ConfigError("--contenders must begin with adamw, which the others are held to.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device is cuda, but PyTorch sees no GPU: give --device cpu.")


class Attention(nn.Module):
    """Causal self-attention. Query, key and value are separate layers, since the reference package
    does not know fused ones; it recognises them by these names."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.wq, self.wk, self.wv)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GPT-2's GELU between them."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The model "nano" of examples.gpt2: tokens to logits, with the embedding as head."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[-1]]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    @torch.no_grad()
    def initialize(self, seed: int) -> "GPT2":
        """Draws a seed's first weights by GPT-2's rule, always on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("wo.weight", "c_proj.weight"))
                std = 0.02 / (2 * LAYERS) ** 0.5 if is_residual else 0.02
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
        return self


class RowTimesColumn(torch.optim.Optimizer):
    """AdamW, with a matrix's second moment stored as a row times a column over their mean."""

    def __init__(self, params: Any, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                square = p.grad * p.grad
                means = [square]
                if p.ndim == 2:
                    means = [square.mean(1, keepdim=True), square.mean(0, keepdim=True)]
                state = self.state[p]
                if not state:
                    state["step"], state["mu"] = 0, torch.zeros_like(p)
                    state["nu"] = [torch.zeros_like(mean) for mean in means]
                state["step"] += 1
                state["mu"].lerp_(p.grad, 1 - B1)
                for nu, mean in zip(state["nu"], means, strict=True):
                    nu.lerp_(mean, 1 - B2)
                v = state["nu"][0]
                if p.ndim == 2:
                    v = v * (state["nu"][1] / v.mean())
                root = (v / (1 - B2 ** state["step"])).sqrt().add_(EPS)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["mu"], root, value=-group["lr"] / (1 - B1 ** state["step"]))


def make_optimizer(name: str, model: nn.Module, *, verbose: bool = False) -> torch.optim.Optimizer:
    """With every optimizer, matrices and embeddings decay; biases and gains do not."""
    if name.startswith("adam_mini"):
        optimizer = Adam_mini(  # it does not decay parameters named ln or bias
            model.named_parameters(),
            lr=0.0,
            betas=(B1, B2),
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            dim=WIDTH,
            n_heads=HEADS,
            verbose=verbose,
        )
        if name == "adam_mini":
            # Cut by token, as the paper cuts embeddings: the package must be told that it is one.
            optimizer.embd_names.add("wpe")
        return optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if name == "outer":
        return RowTimesColumn(groups, 0.0, 0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=(B1, B2), eps=EPS)


def numbers_in_v(optimizer: torch.optim.Optimizer) -> int:
    """The numbers in the second moment, under each of the names that the optimizers use."""
    kept: list[Tensor] = []
    for state in optimizer.state.values():
        kept += [state[name] for name in ("exp_avg_sq", "v", "vmean") if name in state]
        kept += state.get("nu", [])
    return sum(moment.numel() for moment in kept)


def learning_rate(done: int, steps: int, highest: float) -> float:
    """The rate after `done` of `steps` steps: a warmup from zero, then a cosine to a tenth."""
    warmup = min(steps // 5, 100)
    if done < warmup:
        return highest * done / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup)))
    return highest * ((1 - FINAL_RATE) * cosine + FINAL_RATE)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross-entropy of windows of tokens: targets are inputs, shifted by one."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: nn.Module, name: str, rate: float, batches: Tensor, held_out: Tensor
) -> dict[str, Any]:
    """Trains on the batches in order; returns the held-out loss before and after."""
    optimizer = make_optimizer(name, model)

    def measure() -> float:
        with torch.no_grad():
            loss = loss_of(model, held_out).item()
        return loss if math.isfinite(loss) else math.nan

    clock, first = time.perf_counter(), measure()
    for done, windows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, len(batches), rate)
        optimizer.zero_grad()
        loss_of(model, windows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
    return {
        "held_out_loss": measure(),
        "first_held_out_loss": first,
        "numbers_in_v": numbers_in_v(optimizer),
        "seconds": round(time.perf_counter() - clock, 1),
    }


class Asked(NamedTuple):
    """One training."""

    contender: str
    learning_rate: float
    seed: int


@functools.cache
def read_text(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens and held-out windows of the example's text."""
    data = text.load(text.TextConfig(), Path(folder))
    return data.train, text.held_out_windows(data.held_out, HELD_OUT_WINDOWS, CONTEXT)


def run(asked: Asked, steps: int, device: str, folder: str) -> tuple[Asked, dict[str, Any]]:
    """Runs one training, in a worker."""
    tokens, held_out = read_text(folder)
    numbers = range(1, 1 + steps)
    batches = np.stack([text.batch(tokens, asked.seed, n, BATCH_SIZE, CONTEXT) for n in numbers])
    model = GPT2().initialize(asked.seed).to(device)
    on_device = [torch.from_numpy(x.astype(np.int64)).to(device) for x in (batches, held_out)]
    return asked, train(model, asked.contender, asked.learning_rate, *on_device)


def start_worker() -> None:
    """Gives a worker one core."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


def train_all(missing: Sequence[Asked], options: Options) -> Iterator[tuple[Asked, dict[str, Any]]]:
    """Trains missing runs, several at a time; yields them in the order in which they end."""
    # The reference package would talk to all GPUs that it sees: show it one, or none on the CPU.
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = one if options.device == "cuda" else ""
    with tempfile.TemporaryDirectory() as folder:
        read_text(folder)
        work = functools.partial(run, steps=options.steps, device=options.device, folder=folder)
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(options.workers, len(missing)), start_worker) as pool:
            yield from pool.imap_unordered(work, missing)


def machine(device: str) -> dict[str, str]:
    """The versions and the device that the numbers depend on."""
    is_cuda = device == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
    }


def begin(path: Path, options: Options) -> dict[str, Any]:
    """The content of the file, or the content that a new file begins with."""
    settings = {
        name: globals()[name.upper()]
        for name in ("context", "layers", "heads", "width", "batch_size", "held_out_windows", "b1",
                     "b2", "eps", "weight_decay", "clip_norm", "final_rate")
    } | {"steps": options.steps}  # fmt: skip
    if not path.exists():
        return {"settings": settings, "machine": machine(options.device), "runs": []}
    content = json.loads(path.read_text())
    if content["settings"] != settings:
        raise ConfigError(
            f"{path} has results of other settings, which cannot stand beside new ones: move it "
            "away, or give another --output."
        )
    return content


def compare(path: Path, options: Options) -> dict[str, Any]:
    """Trains the missing runs; returns all runs and the rows of the table."""
    from examples.common.runs import write_json

    content = begin(path, options)
    seeds = range(1, 1 + options.seeds)
    asked = [
        Asked(contender, rate, seed)
        for seed, rate, contender in itertools.product(seeds, options.rates, options.contenders)
    ]
    found = {Asked(**one["asked"]): one["found"] for one in content["runs"]}
    missing = [one for one in asked if one not in found]
    if missing and content["machine"] != machine(options.device):
        raise ConfigError(f"{path} has results of another machine: give another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    for done, (one, result) in enumerate(train_all(missing, options) if missing else [], 1):
        found[one] = result
        content["runs"].append({"asked": one._asdict(), "found": result})
        write_json(path, content)
        print(f"{done} of {len(missing)}: {one}: {result}", flush=True)
    content["rows"] = [
        {
            "contender": contender,
            "learning_rate": rate,
            "values": [found[Asked(contender, rate, seed)]["held_out_loss"] for seed in seeds],
            "numbers_in_v": found[Asked(contender, rate, 1)]["numbers_in_v"],
        }
        for rate, contender in itertools.product(options.rates, options.contenders)
    ]
    write_json(path, content)
    return content


def page(content: Mapping[str, Any]) -> str:
    """The page: the table, and the verdicts on the two findings."""
    from benchmarks.quality.intervals import behind, interval_text
    from benchmarks.quality.workloads import WORKLOADS
    from benchmarks.results import Columns, markdown

    workload, rows = WORKLOADS["gpt2"], content["rows"]
    values = {(row["contender"], row["learning_rate"]): row["values"] for row in rows}

    def against_adamw(row: Mapping[str, Any]) -> str:
        if row["contender"] == "adamw":
            return ""
        adamw = values["adamw", row["learning_rate"]]
        return interval_text(workload, behind(workload, row["values"], adamw))

    columns: Columns = {
        "optimizer": lambda row: TITLES[row["contender"]],
        "learning rate": lambda row: f"{row['learning_rate']:g}",
        "held-out loss, mean": lambda row: workload.text(float(np.mean(row["values"]))),
        "against AdamW at this rate, 95% interval": against_adamw,
        "seeds": lambda row: str(len(row["values"])),
        "numbers in v": lambda row: f"{row['numbers_in_v']:,}",
    }
    steps, where = content["settings"]["steps"], content["machine"]
    rates = " ".join(f"{rate:g}" for rate in dict.fromkeys(row["learning_rate"] for row in rows))
    options = f"--seeds {len(rows[0]['values'])} --steps {steps} --rates {rates}"
    return (
        f"# GPT-2 in PyTorch, {steps} steps\n\n"
        "The model, text and schedule of `examples.gpt2`, written anew in PyTorch, with the "
        "authors' own package; seeds from 1, differences are taken seed by seed.\n\n"
        f"`python -m benchmarks.quality.reference {options}`, with Python {where['python']} and "
        f"PyTorch {where['torch']} on {where['device']}:\n\n{markdown(columns, rows)}"
        f"\nWhat was said before the runs is in the command's first lines.\n\n"
        + "".join(f"- {line}\n" for line in verdicts(values))
    )


def verdicts(values: Mapping[tuple[str, float], Sequence[float]]) -> Iterator[str]:
    """For each criterion of the module's docstring, whether it refutes the finding."""
    from benchmarks.quality.intervals import paired

    rates = sorted(rate for contender, rate in values if contender == "adamw")
    best = min(rates, key=lambda rate: np.mean(values["adamw", rate]))

    def distances(contender: str, rate: float) -> np.ndarray:
        return np.array(values[contender, rate]) / np.array(values["adamw", rate]) - 1

    def said(claim: str, holds: bool) -> str:
        return f"{claim}: {'not refuted' if holds else 'refuted'}."

    yield f"AdamW's best of these rates is {best:g}."
    for name in ("adam_mini", "adam_mini_as_named"):
        if (name, best) in values:
            title, found = TITLES[name], paired(distances(name, best).tolist())
            yield said(f"{title} is behind AdamW at {best:g}", found.low > 0 and found.mean >= 0.01)
            yield said(
                f"{title} is two to three per cent behind", found.low <= 0.03 and found.high >= 0.02
            )
            growth = paired((distances(name, best) - distances(name, rates[0])).tolist())
            span = f"by {growth.mean:+.2%} [{growth.low:+.2%}, {growth.high:+.2%}]"
            yield said(f"Its distance grows from {rates[0]:g} to {best:g}, {span}", growth.low > 0)
    if ("outer", best) in values and ("adam_mini", best) in values:
        found = paired(distances("outer", best).tolist())
        bound = distances("adam_mini", best).mean() / 2
        yield said(
            f"{TITLES['outer'].capitalize()} keeps AdamW's loss at {best:g}",
            found.low <= 0 and found.high < bound,
        )


def main(options: Options) -> None:
    if options.quick:
        options = dataclasses.replace(
            options, seeds=2, steps=8, output="runs/reference_quick/reference.json"
        )
    options.check()
    path = Path(options.output)
    content = compare(path, options)
    written = page(content)
    path.with_suffix(".md").write_text(written)
    print(written)


if __name__ == "__main__":
    options = tyro.cli(Options, prog="python -m benchmarks.quality.reference", description=__doc__)
    end_on_interrupt(lambda: "the same command goes on from here.")
    sys.exit(exit_status(lambda: main(options)))
