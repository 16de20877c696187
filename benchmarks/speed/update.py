"""How fast is the update? AdamW, other optimizers of Optax and Adam-mini on real parameter trees.

python -m benchmarks.speed.update

Times the jitted and donated step (the optimizer's update and its addition to the parameters) in one
process, in which each optimizer takes turns with AdamW. Writes medians to docs/results/update.json
and update.md. Trees of one matrix are layouts on which a naive reduction is slow.
"""

import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import tyro
from flax import linen as nn
from flax import nnx
from rich.console import Console

from benchmarks.results import Columns, machine, write_rows
from examples.common.cli import ConfigError, comparison_table, exit_status
from examples.common.interrupts import end_on_interrupt
from examples.common.language import abstract_model, block_specs
from examples.common.optimizers import state_bytes
from examples.common.text import TextConfig
from examples.gpt2.train import Config as GPT2Training
from examples.llama.model import Llama, LlamaConfig
from examples.resnet.model import CONFIGS as RESNETS
from examples.resnet.model import ResNet
from optax_adam_mini import (
    BlockSpec,
    adam_mini,
    flax_layers,
    fused,
    infer_block_specs,
    outer,
    per_head,
    per_neuron,
    per_token,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Time the update of several optimizers on real parameter trees."""

    trees: tuple[str, ...] = ()
    """Names of trees; all by default."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Dtypes of parameters and moments."""
    optimizers: tuple[str, ...] = ()
    """Names of optimizers. By default, all of them on models (Muon, a thousand times slower here,
    only on GPT-2 in float32); on layouts AdamW, SGD and Adam-mini with given specs."""
    rounds: int = 20
    """Steps per median, for each optimizer."""
    seconds: float = 30.0
    """Time limit for the rounds of an optimizer; at least two rounds are timed."""
    reference: bool = False
    """Also time PyTorch's AdamW and the reference package on trees of
    matrices, in float32 (needs torch and adam-mini)."""
    quick: bool = False
    """Small trees, three rounds: shows that it runs, not how fast."""
    output: Path = Path("docs/results")
    """Folder for update.json and update.md."""


class Tree(NamedTuple):
    """Shapes of parameters, and Adam-mini's partition of them."""

    params: Any
    specs: Any
    outer: Any
    """The partition with a row and a column in each block."""


def gpt2(name: str, scan: bool, layers: int | None = None) -> Tree:
    data = TextConfig(tokenizer="bpe", vocab_size=50257 if name == "gpt2" else 256)
    config = GPT2Training(model=name, data=data, scan=scan, layers=layers)
    specs = [block_specs(dataclasses.replace(config, v=v)) for v in ("mean", "outer")]
    return Tree(abstract_model(config)[1], *specs)


def inferred(model: Callable[[], nnx.Module], inputs: jax.ShapeDtypeStruct) -> Tree:
    graph, params = nnx.split(nnx.eval_shape(model))
    fn = lambda p, x: nnx.merge(graph, p)(x)
    return Tree(params, *(infer_block_specs(fn, params, inputs, v=v) for v in ("mean", "outer")))


def llama() -> Tree:
    """A Llama of about 300M parameters, with four query heads per key and value head."""
    config = LlamaConfig(layers=18, heads=16, kv_heads=4, width=1024, mlp_width=2816, context=512)
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    return inferred(lambda: Llama(config, rngs=nnx.Rngs(0)), tokens)


def linen(model: nn.Module, **options: Any) -> Tree:
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    init = functools.partial(model.init, **options)
    rest = dict(jax.eval_shape(init, jax.random.key(0), images))
    params = rest.pop("params")

    def logits(p: Any, r: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": p, **r}, x, **options)

    specs = (infer_block_specs(logits, params, rest, images, v=v) for v in ("mean", "outer"))
    return Tree(params, *specs)


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021), by default the base size; no dropout."""

    layers: int = 12
    width: int = 768
    heads: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (16, 16), 16, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(1000)(nn.LayerNorm()(x).mean(1))


def matrix(shape: tuple[int, ...], spec: BlockSpec) -> Tree:
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    rows = per_neuron(axis=range(len(shape) - 1))
    return Tree(params, {"kernel": spec}, {"kernel": outer(rows, per_neuron())})


QKV = fused(-1, [(4096, per_head(32)), (4096, per_head(32)), (4096, per_neuron())])
TREES: dict[str, Callable[[], Tree]] = {
    "GPT-2 124M": lambda: gpt2("gpt2", scan=False),
    "GPT-2 124M, scanned": lambda: gpt2("gpt2", scan=True),
    "ResNet-50": lambda: linen(ResNet(RESNETS["resnet50"]), train=False),
    "Llama 300M": llama,
    "ViT-B/16": lambda: linen(ViT()),
    "neurons, 4096 x 11008": lambda: matrix((4096, 11008), per_neuron()),
    "neurons, 4096 x 28672": lambda: matrix((4096, 28672), per_neuron()),
    "head, 768 x 50257": lambda: matrix((768, 50257), per_neuron()),
    "heads, 4096 x 4096": lambda: matrix((4096, 4096), per_head(32)),
    "heads, 4096 x 32 x 128": lambda: matrix((4096, 32, 128), per_neuron(1)),
    "tokens, 50257 x 768": lambda: matrix((50257, 768), per_token()),
    "stacked, 4 x 4096 x 11008": lambda: matrix((4, 4096, 11008), per_neuron(stacked=0)),
    "fused QKV, 4096 x 12288": lambda: matrix((4096, 12288), QKV),
}
QUICK: dict[str, Callable[[], Tree]] = {
    "GPT-2 nano": lambda: gpt2("nano", scan=False),
    "neurons, 256 x 4096": lambda: matrix((256, 4096), per_neuron()),
}


def optimizers(tree: Tree, dtype: str) -> dict[str, Any]:
    """The optimizers by name, with moments in `dtype`."""
    return {
        "AdamW": optax.adamw(1e-4, mu_dtype=dtype),
        "SGD, momentum": optax.sgd(1e-4, 0.9),
        "Lion": optax.lion(1e-4, mu_dtype=dtype),
        "Adafactor": optax.adafactor(1e-4),
        "SM3": optax.sm3(1e-4),
        "Muon": optax.contrib.muon(1e-4),
        "Adam-mini, default": adam_mini(1e-4, mu_dtype=dtype),
        "Adam-mini, inferred": adam_mini(1e-4, mu_dtype=dtype, block_specs=tree.specs),
        "Adam-mini, outer": adam_mini(1e-4, mu_dtype=dtype, block_specs=tree.outer),
        "Adam-mini, 8 bits": adam_mini(1e-4, mu_dtype=jnp.int8, block_specs=tree.specs),
        "Adam-mini, outer, 8 bits": adam_mini(1e-4, mu_dtype=jnp.int8, block_specs=tree.outer),
    }


class Runner:
    """A compiled step, and the parameters and state that it continues from."""

    def __init__(self, tx: Any, shapes: Any, grads: Any):
        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, shapes)
        clock = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self._step = jitted.lower(shapes, state, shapes).compile()
        self.compile_seconds = time.perf_counter() - clock
        self.temporary_bytes = self._step.memory_analysis().temp_size_in_bytes
        self.state_bytes = state_bytes(state)
        self._grads = grads
        params = jax.tree.map(lambda p: jnp.full(p.shape, 0.02, p.dtype), shapes)
        self._training = (params, tx.init(params))
        self.seconds: list[float] = []

    def __call__(self) -> None:
        clock = time.perf_counter()
        self._training = jax.block_until_ready(self._step(*self._training, self._grads))
        self.seconds.append(time.perf_counter() - clock)


def copy_bandwidth(nbytes: int = 1 << 28) -> float:
    """Bytes per second, read and written, of a program that writes one array's negative over
    another array."""
    x, y = jnp.ones(nbytes // 4), jnp.ones(nbytes // 4)
    # Without keep_unused, y would be dropped, and every copy would go to new memory.
    copy = jax.jit(lambda x, y: -x, donate_argnums=1, keep_unused=True)
    seconds = []
    for _ in range(21):
        clock = time.perf_counter()
        y = jax.block_until_ready(copy(x, y))
        seconds.append(time.perf_counter() - clock)
    return 2 * nbytes / statistics.median(seconds[1:])


TORCH = ("PyTorch AdamW, fused", "PyTorch AdamW, foreach", "adam-mini 1.1.1")


def torch_step(name: str, params: Any) -> "Others":
    """The step of PyTorch's AdamW or of the reference package, on arrays of these shapes."""
    try:
        import torch
        from adam_mini import Adam_mini
    except ImportError as error:
        raise ConfigError(
            f"--reference needs {error.name}: pip install torch==2.13.0 adam-mini==1.1.1."
        ) from error

    torch.set_num_threads(os.cpu_count() or 1)  # as many as XLA has
    named = []
    for index, p in enumerate(jax.tree.leaves(params)):
        # The reference goes by names, and its first axis is the outputs. Under an MLP's name every
        # matrix is cut by neuron, its fastest partition; every other array is one block.
        shape = p.shape[::-1] if p.ndim > 1 else p.shape
        tensor = torch.nn.Parameter(torch.full(shape, 0.02))
        tensor.grad = torch.full(shape, 0.01)
        named.append((f"{index}.{'mlp' if p.ndim > 1 else 'bias'}", tensor))
    if name == "adam-mini 1.1.1":
        options = {"lr": 1e-4, "dim": 768, "n_heads": 12, "n_kv_heads": 12, "verbose": False}
        return Others(Adam_mini(named, **options).step)
    tensors = [tensor for _, tensor in named]
    kind = {"fused": True} if name.endswith("fused") else {"foreach": True}
    return Others(torch.optim.AdamW(tensors, lr=1e-4, **kind).step)


def takes_default(params: Any) -> bool:
    """Whether the default partition knows the blocks. It does not know stacked layers, or
    parameters without Flax's names; these have no row for it."""
    try:
        flax_layers()(params)
    except ValueError:
        return False
    return True


class Others:
    """A step of another library."""

    def __init__(self, step: Callable[[], Any]):
        self._step = step
        self.seconds: list[float] = []

    def __call__(self) -> None:
        clock = time.perf_counter()
        self._step()
        self.seconds.append(time.perf_counter() - clock)


def ordinary(tree: Tree, dtype: str, is_gpt2: bool) -> tuple[str, ...]:
    """The optimizers that a tree is measured with by default."""
    if len(jax.tree.leaves(tree.params)) == 1:
        made = optimizers(tree, dtype)
        return tuple(name for name in made if name in ("AdamW", "SGD, momentum")
                     or (name.startswith("Adam-mini") and "default" not in name))  # fmt: skip
    slow = () if is_gpt2 and dtype == "float32" else ("Muon",)
    return tuple(name for name in optimizers(tree, dtype) if name not in slow)


def measure(
    tree: Tree, dtype: str, rounds: int, seconds: float, chosen: Sequence[str], reference: bool
) -> list[dict[str, Any]]:
    """A row for each optimizer. Each takes turns with AdamW, so that at most two states are in
    memory at a time."""
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree.params)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.01, p.dtype), shapes)
    size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(shapes))
    made = optimizers(tree, dtype)
    make: dict[str, Callable[[], Any]] = {
        name: functools.partial(Runner, made[name], shapes, grads) for name in chosen
    }
    # The reference cannot cut arrays with more than two axes.
    are_matrices = all(p.ndim <= 2 for p in jax.tree.leaves(shapes))
    if reference and dtype == "float32" and are_matrices:
        make |= {name: functools.partial(torch_step, name, shapes) for name in TORCH}
    if not takes_default(tree.params):
        make.pop("Adam-mini, default", None)
    adamw = Runner(made["AdamW"], shapes, grads)
    rows = []
    for name, build in make.items():
        adamw.seconds.clear()
        run = adamw if name == "AdamW" else build()
        clock = time.perf_counter()
        while len(run.seconds) < 3 or (
            len(run.seconds) <= rounds and time.perf_counter() - clock < seconds
        ):
            for turn in {id(adamw): adamw, id(run): run}.values():
                turn()
        low, median, high = statistics.quantiles(run.seconds[1:], n=4)
        row = {
            "optimizer": name,
            "rounds": len(run.seconds) - 1,
            "ms": 1e3 * median,
            "quartiles": [1e3 * low, 1e3 * high],
            "of_adamw": median / statistics.median(adamw.seconds[1:]),
        }
        if isinstance(run, Runner):
            # At least, parameters and state are read and written, and gradients are read.
            moved = 3 * size + 2 * run.state_bytes
            row |= {
                "bytes_moved": moved,
                "gb_per_second": moved / median / 1e9,
                "temporary_bytes": run.temporary_bytes,
                "temporary_share": run.temporary_bytes / size,
                "state_bytes": run.state_bytes,
                "compile_seconds": run.compile_seconds,
            }
        rows.append(row)
    return rows


COLUMNS: Columns = {
    "tree": lambda r: r["tree"],
    "dtype": lambda r: r["dtype"],
    "optimizer": lambda r: r["optimizer"],
    "rounds": lambda r: str(r["rounds"]),
    "ms": lambda r: f"{r['ms']:.1f}",
    "quartiles": lambda r: "{:.1f} to {:.1f}".format(*r["quartiles"]),
    "of AdamW's": lambda r: f"{r['of_adamw']:.3f}",
    "GB moved": lambda r: f"{r['bytes_moved'] / 1e9:.2f}" if "bytes_moved" in r else "",
    "GB/s": lambda r: f"{r['gb_per_second']:.0f}" if "bytes_moved" in r else "",
    "temporaries": lambda r: f"{r['temporary_share']:.2%}" if "bytes_moved" in r else "",
    "state MB": lambda r: f"{r['state_bytes'] / 1e6:.1f}" if "bytes_moved" in r else "",
    "trace + compile s": lambda r: f"{r['compile_seconds']:.2f}" if "bytes_moved" in r else "",
}


def known(option: str, given: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The given names, after a check; all names if none are given."""
    if unknown := set(given) - set(names):
        raise ConfigError(
            f"--{option} got {', '.join(sorted(unknown))}, but must be of {'; '.join(names)}."
        )
    return tuple(given or names)


def rows_of_before(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier call on the same machine, so that rows of trees that are not measured
    again stay as they are."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    varies = {"copy_gb_per_second": 0.0}
    return found["rows"] if {**found["machine"], **varies} == {**facts, **varies} else []


def main(options: Options) -> None:
    rounds = 3 if options.quick else options.rounds
    if rounds < 2:
        raise ConfigError(f"--rounds is {rounds}, but quartiles need at least 2.")
    trees = QUICK if options.quick else TREES
    names = known("trees", options.trees, trees)
    known("optimizers", options.optimizers, optimizers(Tree(None, None, None), "float32"))
    console = Console(width=160)
    bandwidth = copy_bandwidth(1 << 24 if options.quick else 1 << 28)
    facts = {**machine(), "platform": jax.default_backend(), "devices": jax.device_count(),
             "rounds": rounds, "copy_gb_per_second": bandwidth / 1e9}  # fmt: skip
    title = (
        f"On {facts['platform']} ({facts['device']}), JAX {facts['jax']}; medians of {rounds} "
        f"interleaved rounds (fewer of what takes long); a copy moves {bandwidth / 1e9:.0f} GB/s."
    )
    rows = rows_of_before(options.output / "update.json", facts)
    for name in names:
        tree = trees[name]()
        for dtype in options.dtypes:
            chosen = options.optimizers or ordinary(tree, dtype, name == "GPT-2 124M")
            with console.status(f"{name}, {dtype}"):
                found = measure(tree, dtype, rounds, options.seconds, chosen, options.reference)
            rows = [row for row in rows if (row["tree"], row["dtype"]) != (name, dtype)]
            rows += [{"tree": name, "dtype": dtype, **row} for row in found]
            rows.sort(key=lambda row: list(trees).index(row["tree"]))  # keeps the order in a tree
            content = {"machine": facts, "rows": rows}
            command = "python -m benchmarks.speed.update" + " --reference" * options.reference
            write_rows(options.output, "update", "The update", command, title, COLUMNS, content)
    console.print(comparison_table(title, COLUMNS, rows))


if __name__ == "__main__":
    parsed = tyro.cli(
        Options, prog="python -m benchmarks.speed.update", description=Options.__doc__
    )
    end_on_interrupt()
    sys.exit(exit_status(lambda: main(parsed)))
