"""examples/finetune: pairs, adapters, the loss of the answers, resuming, and refusals."""

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from examples.common import optimizers, runs, text
from examples.common.cli import ConfigError
from examples.common.language import block_specs, make_logits
from examples.common.language import make_program as make_language_program
from examples.common.optimizers import OptimizerConfig, ParameterConfig
from examples.common.text import ByteTokenizer, Document, TextConfig
from examples.common.training import load_config
from examples.finetune import pairs
from examples.finetune.model import (
    Model,
    Pretrained,
    Weights,
    find_pretrained,
    load_pretrained,
)
from examples.finetune.pairs import Batch, Pair
from examples.finetune.train import Config, main, make_program
from examples.gpt2 import train as gpt2
from examples.llama import train as llama
from examples.resnet import train as resnet
from tests.examples.language import TINY_RUN, random_weights, second_moment, shapes, write_corpus
from tests.examples.running import losses, only_run, run_command, run_killed_at_save, run_whole

pytestmark = pytest.mark.slow  # the language models' tests have what is common

LLAMA = llama.Config(layers=2, heads=4, kv_heads=2, width=16, mlp_width=24, context=32)
GPT2 = gpt2.Config(layers=2, heads=2, width=16, context=32)
MODELS = [
    dataclasses.replace(config, scan=scan) for config in (LLAMA, GPT2) for scan in (False, True)
]
all_models = pytest.mark.parametrize(
    "config",
    # In the fast tests each of the two, and each of the layouts.
    [pytest.param(c, marks=[pytest.mark.slow] * (c in MODELS[1:3])) for c in MODELS],
    ids=lambda config: f"{config.title}{'-scan' * config.scan}",
)
TINY_TUNING = {
    "batch_size": 4,
    "steps": 8,
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "hyper": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
}


def pretrained_weights(config) -> nnx.State:
    params = jax.eval_shape(make_language_program(config, "adamw").init).params
    return random_weights(params)


def pretrained(config) -> Pretrained:
    return Pretrained(Path(), config, "adamw", 8, pretrained_weights(config))


def tokens_of(config, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, config.context)).astype(np.int32)


def sums() -> list[dict[str, str]]:
    """Pairs whose answers differ in length."""
    return [
        {"prompt": f"{a} times {b}", "answer": str(a * b)} for a in range(10) for b in range(40)
    ]


@pytest.fixture(scope="module")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums()))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny Llama."""
    folder = tmp_path_factory.mktemp("pretraining")
    options = {
        **TINY_RUN,
        "context": 32,
        "kv_heads": 1,
        "optimizer": "adam_mini",
        "runs": str(folder),
    }
    corpus = TextConfig(text=str(write_corpus(tmp_path_factory.mktemp("corpus"))))
    llama.main(llama.Config(**options, data=corpus))
    return only_run(folder)


def tiny_config(run: Path, sums_file: Path, root: Path, /, **options) -> Config:
    options = {"run": str(run), "pairs": str(sums_file), "runs": str(root), **options}
    return Config(**{**TINY_TUNING, **options})


@pytest.fixture(scope="module")
def whole(run, sums_file, tmp_path_factory):
    """All parameters tuned, with both optimizers, and nothing interrupted it."""
    root = tmp_path_factory.mktemp("whole")
    return run_whole(root, lambda: main(tiny_config(run, sums_file, root)))


@pytest.mark.parametrize("devices", [None, {"mesh": "fsdp=64"}])
def test_old_runs_and_runs_of_more_devices_are_fine_tuned(run, tmp_path, devices):
    """From before there were meshes, and from more devices than there are here."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = json.loads((folder / runs.CONFIG_FILE).read_text())
    del config["devices"]
    runs.write_json(folder / runs.CONFIG_FILE, config | ({"devices": devices} if devices else {}))
    found = load_pretrained(folder, None)
    assert (found.optimizer, found.step) == ("adam_mini", 8)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(found.params))


# The pairs


def test_pairs_are_read_from_a_source_file():
    source = b'''
class Reader:
    """A class has none."""

    async def read(self, size: int = -1, *, strict=False, **options) -> bytes:
        """Read at most size bytes.

        And more.
        """

        def inner(a, /, b): "  Of one   line.  "

    def silent(self): return None

    def blank(self): """   """
'''
    assert list(pairs._functions(Document("a.py", source))) == [
        Pair("Read at most size bytes.", "read(self, size: int=-1, *, strict=False, **options)"),
        Pair("Of one   line.", "inner(a, /, b)"),
    ]
    for broken in (b"def f(:", b"\x00", b"x = '\xff'"):
        assert list(pairs._functions(Document("a.py", broken))) == []


def test_split_is_that_of_the_text_and_holds_out_nothing_known():
    everywhere = Pair("Close it.", "close(self)")
    sources = {f"{i}.py": [everywhere, Pair(f"Of {i}.", f"f{i}()")] * 2 for i in range(100)}
    train, held_out = pairs.split(sources)
    parts = text.split([Document(name, b"x") for name in sources])
    expected = [{pair for name, _ in part for pair in sources[name]} for part in parts]
    assert set(train) == expected[0]
    assert set(held_out) == expected[1] - {everywhere}
    assert len(train) + len(held_out) == len({*train, *held_out}) == 101
    assert everywhere in train
    assert len(held_out) == 10


def test_only_the_answer_and_its_end_count():
    given = [Pair("Read it.", "read(self)"), Pair("A prompt that is rather long", "f()")]
    tokens, weights = pairs.encode(given, ByteTokenizer(), 32)
    assert (tokens.shape, weights.shape) == ((2, 33), (2, 32))
    for row, (prompt, answer) in enumerate([("Read it.", "read(self)"), ("A prompt tha", "f()")]):
        expected = f"{prompt}\n=> {answer}\0".encode()
        assert bytes(tokens[row].tolist()).rstrip(b"\0") + b"\0" == expected
        targets = tokens[row, 1:][weights[row] == 1]
        assert bytes(targets.tolist()) == answer.encode() + b"\0"
    assert set(weights.ravel().tolist()) == {0, 1}


def test_prompts_and_answers_have_half_a_context_each():
    tokenizer = ByteTokenizer()
    given = [Pair("p" * 99, "a" * length) for length in (14, 15, 16, 99)]
    assert pairs.fitting(given, tokenizer, 32) == given[:2]
    tokens, weights = pairs.encode(given[1:2], tokenizer, 32)
    assert bytes(tokens[0].tolist()) == b"p" * 12 + b"\n=> " + b"a" * 15 + b"\0" * 2
    assert weights[0].sum() == 16
    assert len(pairs.prompt_tokens("p" * 99, tokenizer, 32)) == 16


def test_batches_depend_on_seed_and_step_alone():
    train = Batch(np.arange(50), -np.arange(50))
    first = pairs.batch(train, 0, 5, 8)
    pairs.batch(train, 0, 6, 8)
    np.testing.assert_array_equal(pairs.batch(train, 0, 5, 8), first)
    np.testing.assert_array_equal(first.tokens, -first.weights)
    for seed, step in ((0, 6), (1, 5)):
        assert not np.array_equal(pairs.batch(train, seed, step, 8), first)


@pytest.mark.slow
def test_pairs_of_the_standard_library(tmp_path):
    data = pairs.load(None, tmp_path)
    assert len(data.train) > 10 * len(data.held_out) > 1000
    # textwrap's, in whichever part its file is.
    known = Pair(
        "Wrap a single paragraph of text, returning a list of wrapped lines.",
        "wrap(text, width=70, **kwargs)",
    )
    assert known in data.train + data.held_out
    assert pairs.load(None, tmp_path) == data


# The model


@all_models
def test_adapters_do_not_change_the_model_at_first(config):
    params, tokens = pretrained_weights(config), tokens_of(config)
    expected = jax.jit(make_logits(config))(params, tokens)
    for rank in (0, 2):
        model = Model(config, rank)
        weights = jax.jit(model.init, static_argnums=1)(params, 0)
        for part, abstract_part in zip(weights, model.abstract_weights, strict=True):
            assert shapes(part) == shapes(abstract_part)
        actual = jax.jit(model.logits)(weights, tokens)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@all_models
def test_adapters_add_a_product_to_the_kernels(config):
    params, tokens = pretrained_weights(config), tokens_of(config)
    model = Model(config, 3)
    _, frozen = jax.jit(model.init, static_argnums=1)(params, 0)
    adapters = random_weights(model.abstract_weights.trained)
    actual = jax.jit(model.logits)(Weights(adapters, frozen), tokens)

    merged = dict(nnx.to_flat_state(params))
    flat = dict(nnx.to_flat_state(adapters))
    adapted = {path[:-1] for path in flat}
    for layer in adapted:
        a, b = (np.asarray(flat[(*layer, name)][...]) for name in ("lora_a", "lora_b"))
        kernel = merged[(*layer, "kernel")]
        merged[(*layer, "kernel")] = kernel.replace(kernel[...] + a @ b)
    expected = jax.jit(make_logits(config))(nnx.from_flat_state(list(merged.items())), tokens)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    # Every matrix of the layers has one: of Llama's seven, of GPT-2's four.
    per_layer = 7 if config.title == "Llama" else 4
    assert len(adapted) == per_layer * (1 if config.scan else 2)


@all_models
def test_adapters_have_the_blocks_of_the_page(config):
    program = make_program(Config(lora_rank=3, v="mean"), "adam_mini", pretrained(config))
    found = shapes(second_moment(jax.eval_shape(program.init, *program.inputs).opt_state))
    assert all("lora" in path for path in found)
    if config.title == "Llama":
        layer, lead = ("layers", (2,)) if config.scan else ("layers/0", ())
        blocks = {"attention/query": 4, "attention/key": 2, "attention/value": 8}
        blocks |= {"attention/out": 16, "mlp/gate": 24, "mlp/up": 24, "mlp/down": 16}
    else:
        layer, lead = ("h", (2,)) if config.scan else ("h/0", ())
        blocks = {"attn/c_attn": 2 + 2 + 16, "attn/c_proj": 16, "mlp/c_fc": 64, "mlp/c_proj": 16}
    expected = {f"{layer}/{name}/lora_a": (*lead, 1, 3) for name in blocks}
    expected |= {f"{layer}/{name}/lora_b": (*lead, 1, count) for name, count in blocks.items()}
    assert found == found | expected
    assert len(found) == len(expected) * (1 if config.scan else 2)


def test_full_partition_is_that_of_pretraining():
    for config in MODELS:
        for v in ("mean", "outer"):
            of_pretraining = block_specs(dataclasses.replace(config, v=v))
            assert Model(config, 0).block_specs(v) == of_pretraining


# Training


def answers(config, count: int = 4) -> Batch:
    given = [Pair(**row) for row in random.Random(0).sample(sums(), count)]
    batch = pairs.encode(given, ByteTokenizer(), config.context)
    assert len(set(batch.weights.sum(1).tolist())) > 1  # answers of several lengths
    return batch


def test_loss_is_that_of_the_answers():
    start, batch = pretrained(LLAMA), answers(LLAMA)
    program = make_program(Config(hyper=OptimizerConfig(warmup_steps=1)), "adamw", start)
    tuning = jax.jit(program.init)(*program.inputs)
    logits = jax.jit(make_logits(LLAMA))(start.params, batch.tokens[:, :-1])
    logits = np.asarray(logits, np.float64)
    total = count = 0.0
    for row in range(4):
        (ends,) = np.nonzero(batch.tokens[row] == 0)
        content = bytes(batch.tokens[row, : ends[0]].tolist())
        begin = content.index(b"\n=> ") + 4
        for place in range(begin, ends[0] + 1):
            scores = logits[row, place - 1]
            total += math.log(np.exp(scores).sum()) - scores[batch.tokens[row, place]]
            count += 1
    np.testing.assert_allclose(jax.jit(program.evaluate)(tuning, batch), total, rtol=1e-5)
    _, loss = jax.jit(program.step)(tuning, batch)
    np.testing.assert_allclose(loss, total / count, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_only_the_chosen_parameters_train(rank):
    start, batch = pretrained(LLAMA), answers(LLAMA)
    config = Config(lora_rank=rank, steps=10, hyper=OptimizerConfig(3e-2, 1))
    program = make_program(config, "adam_mini", start)
    before = jax.jit(program.init)(*program.inputs)
    step = jax.jit(program.step)
    after, first = step(before, batch)
    for _ in range(9):
        after, last = step(after, batch)
    assert last < first - 0.2
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.weights, after.weights)
    assert all(jax.tree.leaves(changed.trained))
    assert not any(jax.tree.leaves(changed.frozen))
    # What is trained, and what has a first moment, is the adapters or everything.
    trained = sum(leaf.size for leaf in jax.tree.leaves(after.weights.trained))
    model = jax.tree.leaves(start.params)
    layers = 2 * 2 * (16 + 16) + 2 * 2 * (16 + 8) + 3 * 2 * (16 + 24)
    assert trained == (2 * layers if rank else sum(leaf.size for leaf in model))
    numbers = optimizers.numbers_in_v(after.opt_state)
    assert optimizers.state_bytes(after.opt_state) == 4 * (trained + numbers) + 8


def test_two_half_batches_are_one_batch():
    start, batch = pretrained(LLAMA), answers(LLAMA)
    results = []
    for accumulate in (1, 2):
        # A large eps keeps rounding from being magnified.
        hyper = OptimizerConfig(1e-2, 0, eps=1e-3)
        config = Config(accumulate=accumulate, batch_size=4, hyper=hyper)
        program = make_program(config, "adam_mini", start)
        tuning, loss = jax.jit(program.step)(jax.jit(program.init)(*program.inputs), batch)
        results.append((loss, jax.tree.leaves(tuning)))
    (loss, whole), (half_loss, halves) = results
    np.testing.assert_allclose(half_loss, loss, rtol=1e-6)
    for a, b in zip(whole, halves, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6)


def test_comparison_leaves_everything_in_the_run_folder(run, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    adamw, mini = json.loads((folder / "results.json").read_text())
    for name, result in (("adamw", adamw), ("adam_mini", mini)):
        records = losses(folder / name)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
        assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
        assert result["nats_per_byte"] < result["nats_per_byte_before"]
        assert result["held_out_loss"] == result["nats_per_byte"]  # one token a byte
    assert adamw["nats_per_byte_before"] == mini["nats_per_byte_before"]
    # Both start from the same weights, on the same batches.
    firsts = [losses(folder / name)[0]["loss"] for name in ("adamw", "adam_mini")]
    np.testing.assert_allclose(*firsts, rtol=1e-6)
    assert mini["optimizer_bytes"] < 0.65 * adamw["optimizer_bytes"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    output = " ".join(whole.output.split())
    assert f"{run}, adam_mini, step 8".replace(" ", "") in output.replace(" ", "")
    assert "Llama nano, all parameters, 8 steps of 4 pairs" in output
    assert "Answers to held-out prompts" in output
    assert output.count("times") == 3

    main(Config(runs=str(tmp_path), resume=folder.name))
    assert "has finished its 8 steps already" in capsys.readouterr().out


@pytest.mark.parametrize("lora_rank", [2, 0])
def test_bfloat16_parameters_are_trained_resumed_and_evaluated(run, sums_file, tmp_path, lora_rank):
    """Those that are frozen too; resumed, and evaluated."""
    options = {
        "lora_rank": lora_rank,
        "parameters": ParameterConfig("bfloat16"),
        "optimizer": "adam_mini",
    }
    main(tiny_config(run, sums_file, tmp_path / "whole", **options))
    whole = losses(only_run(tmp_path / "whole") / "adam_mini")
    run_killed_at_save(3, lambda: main(tiny_config(run, sums_file, tmp_path / "killed", **options)))
    folder = only_run(tmp_path / "killed")
    main(Config(runs=str(tmp_path / "killed"), resume=str(folder)))
    assert losses(folder / "adam_mini") == whole
    assert whole[-1]["nats_per_byte"] < whole[-1]["nats_per_byte_before"]
    config = load_config(Config, folder)
    pretrained = load_pretrained(Path(config.run), None)
    state = make_program(config, "adam_mini", pretrained).abstract_state()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.weights)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}


@pytest.mark.slow
@pytest.mark.parametrize(("lora_rank", "fails_at"), [(2, 3), (0, 7)])
def test_a_resumed_run_is_the_same_bit_for_bit(
    run, whole, sums_file, tmp_path, lora_rank, fails_at
):
    options = {"lora_rank": lora_rank, "optimizer": "adam_mini" if fails_at < 5 else None}
    expected = whole.folder
    if lora_rank:
        main(tiny_config(run, sums_file, tmp_path / "whole", **options))
        expected = only_run(tmp_path / "whole")
    killed = tiny_config(run, sums_file, tmp_path / "killed", **options)
    run_killed_at_save(fails_at, lambda: main(killed))
    folder = only_run(tmp_path / "killed")
    main(Config(runs=str(tmp_path / "killed"), resume=str(folder)))
    for name in killed.optimizer_names:
        assert losses(folder / name) == losses(expected / name)


def test_the_newest_run_is_taken_and_written_down(run, sums_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no run to fine-tune in runs/llama or runs/gpt2: make one with `python"
    ):
        main(Config(pairs=str(sums_file)))
    for name, config in (
        ("runs/llama/2025-01-01_12-00-00", LLAMA),
        ("runs/gpt2/2025-01-02_12-00-00", GPT2),
        ("runs/llama/2024-01-03_12-00-00", LLAMA),
    ):
        Path(name).mkdir(parents=True)
        runs.write_json(Path(name) / "config.json", dataclasses.asdict(config))
    assert find_pretrained(None) == Path("runs/gpt2/2025-01-02_12-00-00")
    with pytest.raises(ConfigError, match="2025-01-02_12-00-00 has no checkpoint of adamw or"):
        main(Config(pairs=str(sums_file)))
    assert not list(Path("runs/finetune").iterdir())

    newest = Path("runs/llama/2999-01-01_12-00-00")
    newest.symlink_to(run)
    killed = tiny_config(run, sums_file, Path("runs/finetune"), run=None)
    run_killed_at_save(2, lambda: main(killed))
    stored = json.loads((only_run(Path("runs/finetune")) / "config.json").read_text())
    assert stored["run"] == str(newest)


def test_a_run_is_loaded_as_the_model_it_trained(tmp_path, capsys):
    for index, config in enumerate(MODELS):
        folder = tmp_path / str(index)
        folder.mkdir()
        runs.write_json(folder / "config.json", dataclasses.asdict(config))
        main(Config(run=str(folder), lora_rank=2, show_blocks=True))
        output = capsys.readouterr().out
        assert "lora_a" in output
        assert ("c_attn" in output) == (config.title == "GPT-2")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, "--lora-rank is -1, but must be at least 1, or 0 to train all"),
        ({"from_": "adem"}, "--from is adem, but must be one of adamw, adam_mini"),
        ({"from_": "adamw"}, "has no checkpoint of adamw: train longer, or choose another --run"),
        ({"batch_size": 5, "accumulate": 2}, "which 2 micro-batches do not divide: choose"),
        ({"eval_pairs": 0}, "--eval-pairs is 0, but must be at least 1"),
        ({"pairs": "/no/such"}, "--pairs /no/such is no file: give one of JSON lines"),
        ({"run": "nowhere"}, "nowhere is not a run, a folder with a config.json: "),
        ({"resume": "x", "from_": "adamw", "lora_rank": 4}, "leave out --from, --lora-rank."),
    ],
)
def test_wrong_options_are_refused(run, sums_file, options, message, tmp_path):
    root = tmp_path / "runs"
    if "resume" in options:
        config = Config(runs=str(root), **options)
    else:
        config = tiny_config(run, sums_file, root, **options)
    with pytest.raises(ConfigError) as refusal:
        main(config)
    assert message in str(refusal.value)
    assert not root.exists() or not list(root.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "answer": "b"}\nb\n',
            "line 2 of --pairs PATH is no pair: a line such as",
        ),
        ('{"prompt": "a"}\n', "line 1 of --pairs PATH is no pair"),
        ('{"prompt": "a", "answer": 4}\n', "line 1 of --pairs PATH is no pair"),
        ('["a", "b"]\n', "line 1 of --pairs PATH is no pair"),
        (b"\xff\n", "--pairs PATH cannot be read (it is not UTF-8): give a file of JSON lines"),
        ('{"prompt": "a", "answer": "b"}\n' * 3, "PATH has too few pairs to hold some out"),
        ("", "PATH has too few pairs to hold some out"),
        (
            "".join(f'{{"prompt": "{i}", "answer": "{"b" * 16}"}}\n' for i in range(9)),
            "no training pair has an answer of less than 16 tokens, half the context: choose",
        ),
    ],
)
def test_refuses_wrong_pairs(run, tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as refusal:
        main(tiny_config(run, path, tmp_path / "runs"))
    assert message.replace("PATH", str(path)) in str(refusal.value)
    assert not list((tmp_path / "runs").iterdir())


def test_refuses_other_runs_and_short_contexts(sums_file, tmp_path):
    other = runs.new_run(tmp_path / "resnet", resnet.Config())
    with pytest.raises(ConfigError, match="is no run of a language model: give one of `python -m"):
        main(tiny_config(other, sums_file, tmp_path / "runs"))
    short = dataclasses.replace(LLAMA, context=8, optimizer="adamw")
    folder = runs.new_run(tmp_path / "llama", short)
    program = make_language_program(short, "adamw")
    with runs.open_checkpoints(folder / "adamw" / "checkpoints", to_write=True) as checkpoints:
        runs.save_checkpoint(checkpoints, 1, jax.jit(program.init)())
    with pytest.raises(ConfigError, match="has a context of 8 tokens, which has no room for a"):
        main(tiny_config(folder, sums_file, tmp_path / "runs"))


@pytest.mark.slow  # test_gpt2.py has a quick one
def test_the_command_refuses_in_one_line_and_lists_its_options(tmp_path):
    refused = run_command("finetune", f"--run={tmp_path}", f"--runs={tmp_path}")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {tmp_path} is not a run, a folder with a config.json")
    assert len(refused.stderr.splitlines()) == 1

    shown = run_command("finetune", "--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        if field.name not in ("hyper", "parameters"):
            assert "--" + field.name.strip("_").replace("_", "-") in words
