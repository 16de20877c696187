"""examples/gpt2: the architecture, the training loop, resuming, and refusals."""

import dataclasses
import itertools
import json
import math
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.common import runs, text
from examples.common.cli import ConfigError
from examples.common.mesh import MeshConfig
from examples.common.optimizers import OptimizerConfig, ParameterConfig, decayed
from examples.common.text import Document, TextConfig
from examples.gpt2.model import CONFIGS, GPT2, Block, GPT2Config
from examples.gpt2.train import Config, main, make_program
from tests.examples.language import (
    TINY_OPTIONS,
    TINY_RUN,
    abstract,
    forward,
    random_weights,
    second_moment,
    shapes,
    stack_layers,
    write_corpus,
)
from tests.examples.running import (
    command,
    losses,
    only_run,
    quick_environment,
    run_command,
    run_killed_at_save,
    run_through_kills,
    run_whole,
)

TINY = GPT2Config(vocab_size=256, context=16, layers=3, heads=2, width=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def tiny_config(corpus: Path, root: Path, **options) -> Config:
    options = {**TINY_RUN, "data": TextConfig(text=str(corpus)), "runs": str(root), **options}
    return Config(**options)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run of all optimizers that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    return run_whole(root, lambda: main(tiny_config(corpus, root)))


# The architecture


@pytest.mark.parametrize(
    ("name", "scan", "count"),
    [
        ("gpt2", False, 124_439_808),
        ("gpt2", True, 124_439_808),
        ("gpt2-medium", True, 354_823_168),
        ("gpt2-large", True, 774_030_080),
        ("gpt2-xl", True, 1_557_611_200),
    ],
)
def test_parameter_counts_are_the_published_ones(name, scan, count):
    config = dataclasses.replace(CONFIGS[name], scan=scan)
    _, params = abstract(GPT2, config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


@pytest.mark.slow
def test_initial_weights_have_the_right_distribution():
    config = GPT2Config(vocab_size=512, context=64, layers=2, heads=4, width=128)
    for scan in (False, True):
        scanned = dataclasses.replace(config, scan=scan)
        model = nnx.jit(lambda c=scanned: GPT2(c, rngs=nnx.Rngs(0)))()
        block = model.h if scan else model.h[1]
        for value, std in (
            (model.wte.embedding, 0.02),
            (model.wpe.embedding, 0.02),
            (block.attn.c_attn.kernel, 0.02),
            (block.mlp.c_fc.kernel, 0.02),
            (block.attn.c_proj.kernel, 0.02 / 2),
            (block.mlp.c_proj.kernel, 0.02 / 2),
        ):
            np.testing.assert_allclose(np.std(value[...]), std, rtol=0.05)
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            assert not layer.bias[...].any()
    # Layers stacked for a scan must not start as copies of one another.
    kernel = model.h.mlp.c_fc.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])


def test_scanned_and_unrolled_models_agree():
    tokens = np.random.default_rng(0).integers(256, size=(2, 16))
    graph, params = abstract(GPT2, TINY)
    params = random_weights(params)
    expected = forward(graph, params, tokens)
    for remat in (False, True):
        config = dataclasses.replace(TINY, scan=True, remat=remat)
        graph, _ = abstract(GPT2, config)
        actual = forward(graph, stack_layers(params, "h"), tokens)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits():
    graph, params = abstract(GPT2, TINY)
    params = random_weights(params)
    tokens = np.random.default_rng(0).integers(256, size=(1, 16))
    changed = tokens.copy()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    before, after = (forward(graph, params, t) for t in (tokens, changed))
    np.testing.assert_allclose(after[:, :9], before[:, :9], rtol=0, atol=1e-6)
    for position in range(9, 16):
        assert np.abs(after[0, position] - before[0, position]).max() > 1e-3


def test_block_computes_what_the_formulas_say():
    graph, params = abstract(Block, TINY)
    params = random_weights(params)
    x = np.random.default_rng(0).normal(size=(16, 8))
    p = jax.tree.map(np.float64, nnx.to_pure_dict(params))

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    qkv = dense(norm(x, p["ln_1"]), p["attn"]["c_attn"])
    mixed = np.zeros((16, 8))
    for head in range(2):
        columns = slice(4 * head, 4 * head + 4)
        query, key, value = (qkv[:, 8 * part : 8 * part + 8][:, columns] for part in range(3))
        for t in range(16):
            scores = key[: t + 1] @ query[t] / np.sqrt(4)
            weights = np.exp(scores - scores.max())
            mixed[t, columns] = weights / weights.sum() @ value[: t + 1]
    y = x + dense(mixed, p["attn"]["c_proj"])
    y = y + dense(gelu(dense(norm(y, p["ln_2"]), p["mlp"]["c_fc"])), p["mlp"]["c_proj"])

    actual = forward(graph, params, jnp.asarray(x[None], jnp.float32))[0]
    np.testing.assert_allclose(actual, y, rtol=1e-4, atol=1e-5)


# The optimizers


@pytest.mark.parametrize("scan", [False, True])
def test_gpt2_has_the_blocks_of_the_page(scan):
    data = TextConfig(tokenizer="bpe", vocab_size=50257)
    config = Config(model="gpt2", scan=scan, data=data, v="mean")
    state = jax.eval_shape(make_program(config, "adam_mini").init)
    nu = second_moment(state.opt_state)
    layer, lead = ("h", (12,)) if scan else ("h/0", ())
    found = shapes(nu)
    assert found == found | {
        "wte/embedding": (50257, 1),
        "wpe/embedding": (1024, 1),
        f"{layer}/attn/c_attn/kernel": (*lead, 1, 12 + 12 + 768),
        f"{layer}/attn/c_attn/bias": (*lead, 1),
        f"{layer}/attn/c_proj/kernel": (*lead, 1, 768),
        f"{layer}/mlp/c_fc/kernel": (*lead, 1, 3072),
        f"{layer}/mlp/c_proj/kernel": (*lead, 1, 768),
        f"{layer}/ln_1/scale": (*lead, 1),
        "ln_f/bias": (1,),
    }
    numbers = sum(math.prod(value.shape) for value in jax.tree.leaves(nu))
    per_layer = (12 + 12 + 768) + 768 + 3072 + 768 + 8
    assert numbers == 50257 + 1024 + 12 * per_layer + 2
    assert numbers < 0.001 * 124_439_808


@pytest.mark.parametrize("scan", [False, True])
def test_only_matrices_and_embeddings_decay(scan):
    _, params = abstract(GPT2, dataclasses.replace(TINY, scan=scan))
    for path, value in nnx.to_flat_state(nnx.as_pure(decayed(params))):
        assert value == (path[-1] in ("kernel", "embedding")), path


# Training


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remat": True, "dtype": "bfloat16"},
        {"scan": True, "accumulate": 2},
        {"scan": True, "remat": True, "dtype": "bfloat16", "accumulate": 2},
        {"parameters": ParameterConfig("bfloat16"), "accumulate": 2},
        {"parameters": ParameterConfig("bfloat16", "nearest"), "optimizer": "adamw"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_a_step_with_every_option_trains(options):
    options = {"optimizer": "adam_mini", **options}
    config = Config(
        **TINY_OPTIONS, batch_size=4, steps=10, hyper=OptimizerConfig(1e-2, 1), **options
    )
    program = make_program(config, options["optimizer"])
    windows = np.random.default_rng(0).integers(256, size=(4, 17)).astype(np.int32)
    before = jax.jit(program.init)()
    step = jax.jit(program.step)
    after, loss = step(before, windows)
    np.testing.assert_allclose(loss, math.log(256), rtol=0.02)
    for _ in range(4):
        after, last_loss = step(after, windows)
    assert last_loss < loss - 0.1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    dtype = config.parameters.param_dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_two_half_batches_are_one_batch():
    windows = np.random.default_rng(0).integers(256, size=(4, 17)).astype(np.int32)
    start, results = None, []
    for accumulate in (1, 2):
        # Plain Adam divides by the root of v; a large eps keeps rounding from being magnified.
        hyper = OptimizerConfig(1e-2, 0, eps=1e-3)
        config = Config(**TINY_OPTIONS, scan=True, batch_size=4, accumulate=accumulate, hyper=hyper)
        program = make_program(config, "adam_mini")
        start = start or jax.jit(program.init)()
        training, loss = jax.jit(program.step)(start, windows)
        results.append((loss, jax.tree.leaves(training)))
    (loss, whole), (half_loss, halves) = results
    np.testing.assert_allclose(half_loss, loss, rtol=1e-6)
    for a, b in zip(whole, halves, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_comparison_leaves_everything_in_the_run_folder(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    for name in ("adamw", "adam_mini", "adam_mini_int8", "muon_mini"):
        records = losses(folder / name)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
        assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    adamw, mini, small, muon = json.loads((folder / "results.json").read_text())
    assert adamw["numbers_in_v"] > 4 * mini["numbers_in_v"] > 4 * muon["numbers_in_v"]
    assert mini["optimizer_bytes"] < 0.65 * adamw["optimizer_bytes"]
    assert small["optimizer_bytes"] < 0.30 * adamw["optimizer_bytes"]
    assert muon["optimizer_bytes"] < 0.65 * adamw["optimizer_bytes"]
    output = " ".join(whole.output.split())
    for expected in ("held-out nats", "optimizer", "bytes", "numbers", "ms per"):
        assert expected in output

    main(Config(runs=str(tmp_path), resume=folder.name))
    assert "has finished its 8 steps already" in capsys.readouterr().out

    main(Config(runs=str(tmp_path), sample="the qu", sample_tokens=20))
    sample = " ".join(capsys.readouterr().out.split())
    assert "muon_mini, step 8" in sample
    assert "the qu" in sample


@pytest.mark.slow
def test_byte_pairs_train_and_report_nats_per_byte(corpus, tmp_path):
    data = TextConfig(text=str(corpus), tokenizer="bpe", vocab_size=300)
    main(tiny_config(corpus, tmp_path, data=data, optimizer="adam_mini"))
    folder = only_run(tmp_path)
    last = losses(folder / "adam_mini")[-1]
    tokens = text.load(data, folder / "data")
    windows = text.held_out_windows(tokens.held_out, 8, 16)[:, 1:]
    per_token = tokens.tokenizer.token_bytes[windows].mean()
    assert per_token > 1.5
    np.testing.assert_allclose(last["nats_per_byte"], last["held_out_loss"] / per_token)


@pytest.mark.parametrize(
    ("optimizer", "fails_at"),
    [
        ("adam_mini", 3),
        # In the comparison, saves 1 to 4 are of the first optimizer and 5 to 8 of the second.
        *((None, save) for save in (1, 4, 5, 7)),
    ],
)
@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(
    corpus, whole, tmp_path, monkeypatch, optimizer, fails_at
):
    monkeypatch.setattr(Config, "compared", ("adamw", "adam_mini"))  # no save is of the others
    run_killed_at_save(fails_at, lambda: main(tiny_config(corpus, tmp_path, optimizer=optimizer)))
    folder = only_run(tmp_path)
    main(Config(runs=str(tmp_path), resume=str(folder)))
    for name in (optimizer,) if optimizer else ("adamw", "adam_mini"):
        assert losses(folder / name) == losses(whole.folder / name)


@pytest.mark.slow
def test_parameters_in_bfloat16_resume_bit_for_bit_and_write_samples(corpus, tmp_path, capsys):
    options = {"optimizer": "adam_mini_int8", "parameters": ParameterConfig("bfloat16")}
    main(tiny_config(corpus, tmp_path / "whole", **options))
    run_killed_at_save(3, lambda: main(tiny_config(corpus, tmp_path / "killed", **options)))
    folder = only_run(tmp_path / "killed")
    main(Config(runs=str(tmp_path / "killed"), resume=str(folder)))
    whole = losses(only_run(tmp_path / "whole") / "adam_mini_int8")
    assert losses(folder / "adam_mini_int8") == whole
    assert whole[-1]["held_out_loss"] < whole[0]["loss"] - 0.05
    capsys.readouterr()
    main(Config(runs=str(tmp_path / "killed"), sample="the qu", sample_tokens=4))
    assert "adam_mini_int8, step 8" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_in_bfloat16_begin_with_the_same_weights_rounded(corpus):
    options = {**TINY_OPTIONS, "seed": 3}
    narrow = Config(**options, parameters=ParameterConfig("bfloat16"))
    wide = jax.jit(make_program(Config(**options), "adam_mini").init)()
    found = jax.jit(make_program(narrow, "adam_mini").init)()
    expected = jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected)
    moments = {leaf.dtype.name for leaf in jax.tree.leaves(found.opt_state)}
    assert moments == {"float32", "int32"}


def test_resume_drops_half_a_line_and_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    with runs.Metrics(path, 2) as metrics:
        metrics.write([{"step": 3, "loss": 0.5}])
    assert runs.read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


@pytest.mark.slow
def test_resume_after_sigkill_at_random_moments(corpus, tmp_path):
    environment = quick_environment()
    tiny = ["--layers=1", "--heads=2", "--width=16", "--context=16", "--batch-size=4"]
    tiny += ["--steps=12", "--warmup-steps=2", "--eval-windows=8", "--eval-every=6"]
    tiny += ["--log-every=1", f"--text={corpus}"]
    runs_of_whole = f"--runs={tmp_path / 'whole'}"
    whole = run_command("gpt2", *tiny, runs_of_whole, environment=environment)
    assert whole.returncode == 0, whole.stderr

    # So many checkpoints that many a kill falls into one.
    tiny += ["--checkpoint-every=1"]
    root = tmp_path / "killed"
    log = tmp_path / "log.txt"
    assert run_through_kills(command("gpt2"), tiny, root, 0, log, environment, within=0.4) == 4
    for name in ("adamw", "adam_mini"):
        assert losses(only_run(root) / name) == losses(only_run(tmp_path / "whole") / name)


# The text


def test_no_document_is_both_trained_on_and_held_out_whatever_their_order():
    found = [Document(f"{index}.py", b"x") for index in range(100)]
    training, held_out = text.split(found)
    assert len(held_out) == 10
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(found)
    random.Random(0).shuffle(found)
    assert text.split(found) == (training, held_out)
    assert text.split([Document("a", bytes(range(100)))]) == (
        [Document("a", bytes(range(90)))],
        [Document("a", bytes(range(90, 100)))],
    )


def test_text_of_the_standard_library_is_read():
    found = text.documents(TextConfig())
    names = {document.name for document in found}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("site-packages/", "test/")) for name in names)
    assert sum(len(document.text) for document in found) > 5_000_000


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    first = text.batch(tokens, 0, 5, 4, 16)
    text.batch(tokens, 0, 6, 4, 16)
    np.testing.assert_array_equal(text.batch(tokens, 0, 5, 4, 16), first)
    assert first.shape == (4, 17)
    assert (np.diff(first, axis=1) == 1).all()
    assert not np.array_equal(text.batch(tokens, 0, 6, 4, 16), first)
    assert not np.array_equal(text.batch(tokens, 1, 5, 4, 16), first)
    # The shortest text that has a window has one.
    assert text.batch(tokens[:17], 0, 1, 2, 16).tolist() == [list(range(17))] * 2


def test_held_out_windows_do_not_score_a_token_twice():
    windows = text.held_out_windows(np.arange(1000), 50, 16)
    targets = windows[:, 1:].ravel()
    assert len(set(targets.tolist())) == targets.size == 50 * 16
    assert len(text.held_out_windows(np.arange(50), 50, 16)) == 3


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_tokenizers_round_trip(tokenizer, tmp_path):
    # A file with a zero is refused as no text; what is encoded may have one.
    (tmp_path / "text.txt").write_text("def café(naïve):\n\treturn '→ 日本'\n" * 200)
    content = "def café(naïve):\n\treturn '→ 日本'\x00\n" * 20
    config = TextConfig(text=str(tmp_path), tokenizer=tokenizer, vocab_size=280)
    data = text.load(config, tmp_path / "data")
    tokens = data.tokenizer.encode(content.encode())
    assert data.tokenizer.decode(tokens.tolist()) == content
    assert data.tokenizer.token_bytes[tokens].sum() == len(content.encode())
    assert data.tokenizer.decode([text.END_OF_DOCUMENT]) == "\x00"
    assert data.train[-1] == data.held_out[-1] == text.END_OF_DOCUMENT
    assert tokens.max() < config.vocabulary


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 3}, "--width is 10, which 3 heads do not divide: choose"),
        ({"heads": 0}, "--heads is 0, but must be at least 1"),
        ({"batch_size": 5, "accumulate": 2}, "which 2 micro-batches do not divide: choose"),
        ({"optimizer": "adem"}, "--optimizer is adem, but must be one of adamw, adam_mini"),
        (
            {"steps": 5, "hyper": OptimizerConfig(warmup_steps=5)},
            "--warmup-steps is 5, but must be from 0 to --steps - 1 = 4",
        ),
        ({"hyper": OptimizerConfig(b2=1.0)}, "--b2 is 1.0, but must be from 0 to less than 1"),
        ({"hyper": OptimizerConfig(learning_rate=0)}, "--learning-rate is 0, but must be more"),
        ({"data": TextConfig(text="/no/such")}, "--text /no/such does not exist: give a file"),
        ({"data": TextConfig(text=".", hf_dataset="x")}, "were both given: choose one"),
        (
            {"data": TextConfig(tokenizer="bpe", vocab_size=256)},
            "--vocab-size is 256, but bpe starts from the 256 bytes and adds to them: give at",
        ),
        ({"resume": "nowhere"}, "nowhere is not a run, a folder with a config.json: "),
        ({"seed": -1}, "--seed is -1, but must be at least 0"),
        ({"run": "x"}, "--run names the run of --sample: give --sample, or --resume RUN"),
        ({"sample": "x"}, "there is no run in"),
        ({"sample": "x", "temperature": -1.0}, "--temperature is -1.0, but must be at least 0"),
        ({"sample": "x", "context": 8}, "--sample goes by the options that the run was started"),
        ({"resume": "x", "steps": 7, "width": 8}, "leave out --steps, --width"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        main(Config(**{"runs": str(tmp_path / "runs"), **options}))
    assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()  # refused before anything was made


def test_refuses_short_and_empty_text(tmp_path):
    (tmp_path / "short.txt").write_text("a" * 1000)
    config = tiny_config(tmp_path / "short.txt", tmp_path / "runs", context=128)
    with pytest.raises(ConfigError, match=r"held-out text has 101 tokens, but one context of 128"):
        main(config)
    assert not list((tmp_path / "runs").iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"there is no text in .*: give a --text with files"):
        main(tiny_config(tmp_path / "empty", tmp_path / "runs"))


def test_refuses_a_run_without_checkpoints(corpus, tmp_path):
    runs.new_run(tmp_path, tiny_config(corpus, tmp_path))
    with pytest.raises(
        ConfigError,
        match="has no checkpoint of adamw or adam_mini or adam_mini_int8 or muon_mini yet",
    ):
        main(Config(runs=str(tmp_path), sample="x"))


def test_divergence_ends_the_run_with_advice(corpus, tmp_path):
    hyper = OptimizerConfig(learning_rate=1e30, warmup_steps=1)
    with pytest.raises(
        ConfigError, match=r"loss of adamw is no longer a number at step .* smaller"
    ):
        main(tiny_config(corpus, tmp_path, hyper=hyper))


class FakeHub:
    """Stands for the package datasets."""

    def __init__(self, rows=None):
        self.rows = rows

    def load_dataset(self, name, configuration, *, split, streaming):
        assert (split, streaming) == ("train", True)
        self.asked_for = (name, configuration)
        if self.rows is None:
            raise ConnectionError("no route to host\nmore lines")
        return iter(self.rows)


def test_streamed_text_is_read(monkeypatch):
    hub = FakeHub({"text": "é" * 50} for _ in range(10**9))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = text.documents(TextConfig(hf_dataset="fineweb", hf_bytes=950))
    assert hub.asked_for == ("HuggingFaceFW/fineweb", "sample-10BT")
    assert [len(document.text) for document in found] == [100] * 10

    monkeypatch.setitem(sys.modules, "datasets", FakeHub())
    with pytest.raises(
        ConfigError, match=r"cannot be streamed \(no route to host\): check the name"
    ):
        text.documents(TextConfig(hf_dataset="openwebtext"))
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([]))
    with pytest.raises(ConfigError, match="holds no text"):
        text.documents(TextConfig(hf_dataset="openwebtext"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets, which is not installed"):
        text.documents(TextConfig(hf_dataset="openwebtext"))


def test_refuses_an_unwritable_folder(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\): give another"):
        main(tiny_config(corpus, tmp_path / "file" / "runs"))


def test_the_command_refuses_in_one_line_and_lists_its_options():
    refused = run_command("gpt2", "--heads=5")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --width is ")
    assert len(refused.stderr.splitlines()) == 1

    shown = run_command("gpt2", "--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.replace("│", " ").split())
    groups = map(dataclasses.fields, (Config, TextConfig, MeshConfig, ParameterConfig))
    for field in itertools.chain(*groups):
        if field.name not in ("data", "hyper", "devices", "parameters"):
            assert "--" + field.name.replace("_", "-") in words
    assert "Highest learning rate, reached after the warmup; with Muon, that of" in words
