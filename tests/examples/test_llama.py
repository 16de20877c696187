"""examples/llama: the architecture, Adam-mini's partition of it, training, and refusals."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.common import optimizers
from examples.common.cli import ConfigError
from examples.common.optimizers import OptimizerConfig, ParameterConfig, decayed
from examples.common.text import TextConfig
from examples.llama.model import CONFIGS, Attention, Block, Llama, LlamaConfig, rms_norm, rotate
from examples.llama.train import Config, main, make_program
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
from tests.examples.running import losses, only_run, run_command, run_killed_at_save

TINY = LlamaConfig(
    vocab_size=256, context=16, layers=3, heads=4, kv_heads=2, width=16, mlp_width=24
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def tiny_config(corpus: Path, root: Path, **options) -> Config:
    options = {"kv_heads": 1, "data": TextConfig(text=str(corpus)), "runs": str(root), **options}
    return Config(**{**TINY_RUN, **options})


# The architecture


@pytest.mark.parametrize(
    ("name", "scan", "count"),
    [
        ("tinyllama-1b", False, 1_100_048_384),
        ("tinyllama-1b", True, 1_100_048_384),
        ("llama2-7b", True, 6_738_415_616),
        ("llama2-13b", True, 13_015_864_320),
        ("llama3-8b", True, 8_030_261_248),
    ],
)
def test_parameter_counts_are_the_published_ones(name, scan, count):
    _, params = abstract(Llama, dataclasses.replace(CONFIGS[name], scan=scan))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


@pytest.mark.slow
def test_initial_weights_have_the_right_distribution():
    config = CONFIGS["nano"]
    for scan in (False, True):
        scanned = dataclasses.replace(config, scan=scan)
        model = nnx.jit(lambda c=scanned: Llama(c, rngs=nnx.Rngs(0)))()
        block = model.layers if scan else model.layers[1]
        small = (block.attention.out, block.mlp.down)
        large = (block.attention.query, block.attention.key, block.attention.value, model.head)
        large += (block.mlp.gate, block.mlp.up)
        for layers, std in ((small, 0.02 / 2), (large, 0.02)):
            for layer in layers:
                np.testing.assert_allclose(np.std(layer.kernel[...]), std, rtol=0.05)
        np.testing.assert_allclose(np.std(model.embed.embedding[...]), 0.02, rtol=0.05)
    # Layers stacked for a scan must not start as copies of one another.
    kernel = model.layers.mlp.up.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])


def complex_rotation(x: np.ndarray, base: float) -> np.ndarray:
    """Positions as powers of a complex number, of x (T, heads, features) in float64."""
    half = x.shape[-1] // 2
    points = x[..., :half] + 1j * x[..., half:]
    angles = np.arange(len(x))[:, None, None] / base ** (np.arange(half) * 2 / x.shape[-1])
    points = points * np.exp(1j * angles)
    return np.concatenate([points.real, points.imag], axis=-1)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary_positions_are_complex_rotations(base):
    x = np.random.default_rng(0).normal(size=(300, 3, 8))
    actual = rotate(jnp.asarray(x[None], jnp.float32), base)[0]
    np.testing.assert_allclose(actual, complex_rotation(x, base), atol=1e-4)
    np.testing.assert_array_equal(actual[0], x[0].astype(np.float32))  # the first does not turn


def test_scores_of_rotated_features_depend_on_the_distance_alone():
    source = np.random.default_rng(0)
    query, key = (
        jnp.broadcast_to(jnp.asarray(source.normal(size=8), jnp.float32), (1, 40, 1, 8))
        for _ in range(2)
    )
    query, key = (np.asarray(rotate(x, 100.0))[0, :, 0] for x in (query, key))
    scores = query @ key.T
    distances = np.arange(40)[:, None] - np.arange(40)
    by_distance = {int(d): scores[distances == d] for d in np.unique(distances)}
    for values in by_distance.values():
        np.testing.assert_allclose(values, values[0], atol=1e-5)
    # And they do depend on it, on its sign too.
    assert abs(by_distance[3][0] - by_distance[4][0]) > 1e-2
    assert abs(by_distance[3][0] - by_distance[-3][0]) > 1e-2


def test_late_positions_are_told_apart_in_bfloat16():
    x = jnp.ones((1, 8000, 1, 4), jnp.bfloat16)
    late = np.asarray(rotate(x, 10_000.0), np.float64)[0, -200:, 0]
    np.testing.assert_allclose(
        late, complex_rotation(np.ones((8000, 1, 4)), 1e4)[-200:, 0], atol=0.01
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_computes_what_the_formula_says(dtype):
    config = dataclasses.replace(TINY, dtype=dtype)
    norm = rms_norm(config, nnx.Rngs(0))
    gain = np.random.default_rng(0).normal(size=16)
    norm.scale[...] = jnp.asarray(gain, jnp.float32)
    # A row so small that the epsilon counts, and one with a mean, which stays.
    x = np.random.default_rng(1).normal(size=(3, 16)) * [[1], [1e-3], [1]] + [[0], [0], [50]]
    x = np.asarray(jnp.asarray(x, dtype), np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.asarray(norm(jnp.asarray(x, dtype)), np.float64), expected, tolerance, tolerance
    )


def test_block_computes_what_the_formulas_say():
    graph, params = abstract(Block, TINY)
    params = random_weights(params)
    x = np.random.default_rng(0).normal(size=(16, 16))
    p = jax.tree.map(np.float64, nnx.to_pure_dict(params))

    def norm(x, p):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]

    normed = norm(x, p["attention_norm"])
    query, key, value = (
        (normed @ p["attention"][name]["kernel"]).reshape(16, -1, 4)
        for name in ("query", "key", "value")
    )
    query, key = complex_rotation(query, 1e4), complex_rotation(key, 1e4)
    assert query.shape[1] == 2 * key.shape[1]
    mixed = np.zeros((16, 4, 4))
    for head in range(4):
        for t in range(16):
            scores = key[: t + 1, head // 2] @ query[t, head] / np.sqrt(4)
            weights = np.exp(scores - scores.max())
            mixed[t, head] = weights / weights.sum() @ value[: t + 1, head // 2]
    y = x + mixed.reshape(16, 16) @ p["attention"]["out"]["kernel"]
    normed = norm(y, p["mlp_norm"])
    gate, up = (normed @ p["mlp"][name]["kernel"] for name in ("gate", "up"))
    y = y + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]["kernel"]

    actual = forward(graph, params, jnp.asarray(x[None], jnp.float32))[0]
    np.testing.assert_allclose(actual, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_are_repeated_heads(kv_heads):
    shared = dataclasses.replace(TINY, kv_heads=kv_heads)
    graph, params = abstract(Attention, shared)
    params = random_weights(params)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16)), jnp.float32)
    actual = forward(graph, params, x)

    whole, _ = abstract(Attention, dataclasses.replace(TINY, kv_heads=4))
    for name in ("key", "value"):
        kernel = params[name]["kernel"][...].reshape(16, kv_heads, 4)
        repeated = jnp.repeat(kernel, 4 // kv_heads, axis=1).reshape(16, 16)
        params[name]["kernel"] = params[name]["kernel"].replace(repeated)
    np.testing.assert_allclose(actual, forward(whole, params, x), rtol=1e-4, atol=1e-6)


def test_later_tokens_do_not_change_earlier_logits():
    graph, params = abstract(Llama, TINY)
    params = random_weights(params)
    tokens = np.random.default_rng(0).integers(256, size=(1, 16))
    changed = tokens.copy()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    before, after = (forward(graph, params, t) for t in (tokens, changed))
    np.testing.assert_allclose(after[:, :9], before[:, :9], rtol=0, atol=1e-6)
    for position in range(9, 16):
        assert np.abs(after[0, position] - before[0, position]).max() > 1e-3


def loss_and_gradient(config: LlamaConfig, params: nnx.State, tokens: np.ndarray):
    graph, _ = abstract(Llama, config)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens)
        return jax.nn.logsumexp(logits, axis=-1).mean(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, gradient


@pytest.mark.slow
def test_scan_and_remat_change_neither_logits_nor_gradients():
    tokens = np.random.default_rng(0).integers(256, size=(2, 16))
    _, params = abstract(Llama, TINY)
    params = random_weights(params)
    logits, gradient = loss_and_gradient(TINY, params, tokens)
    for scan, remat in ((False, True), (True, False), (True, True)):
        config = dataclasses.replace(TINY, scan=scan, remat=remat)
        laid_out = (lambda tree: stack_layers(tree, "layers")) if scan else lambda tree: tree
        actual, actual_gradient = loss_and_gradient(config, laid_out(params), tokens)
        np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-5)
        assert shapes(actual_gradient) == shapes(laid_out(gradient))
        for a, b in zip(*map(jax.tree.leaves, (actual_gradient, laid_out(gradient))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


# The optimizers


def tinyllama(**options) -> Config:
    data = TextConfig(tokenizer="bpe", vocab_size=32000)
    return Config(model="tinyllama-1b", data=data, **options)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tinyllama_has_the_blocks_of_the_page(scan):
    state = jax.eval_shape(make_program(tinyllama(scan=scan, v="mean"), "adam_mini").init)
    nu = second_moment(state.opt_state)
    layer, lead = ("layers", (22,)) if scan else ("layers/21", ())
    found = shapes(nu)
    assert found == found | {
        "embed/embedding": (32000, 1),
        f"{layer}/attention/query/kernel": (*lead, 1, 32),
        f"{layer}/attention/key/kernel": (*lead, 1, 4),
        f"{layer}/attention/value/kernel": (*lead, 1, 256),
        f"{layer}/attention/out/kernel": (*lead, 1, 2048),
        f"{layer}/mlp/gate/kernel": (*lead, 1, 5632),
        f"{layer}/mlp/up/kernel": (*lead, 1, 5632),
        f"{layer}/mlp/down/kernel": (*lead, 1, 2048),
        f"{layer}/mlp_norm/scale": (*lead, 1),
        "norm/scale": (1,),
        "head/kernel": (1, 32000),
    }
    per_layer = 32 + 4 + 256 + 2048 + 2 * 5632 + 2048 + 2
    numbers = sum(math.prod(shape) for shape in found.values())
    assert numbers == 2 * 32000 + 1 + 22 * per_layer


def test_tinyllamas_state_takes_half_of_adamws_memory():
    adamw, adam_mini = (
        optimizers.state_bytes(
            jax.eval_shape(make_program(tinyllama(scan=True), name).init).opt_state
        )
        for name in ("adamw", "adam_mini")
    )
    # AdamW: two numbers of 4 bytes a parameter, and the step count of Adam and of the schedule.
    assert adamw == 8 * 1_100_048_384 + 8
    assert adam_mini / adamw == pytest.approx(0.5004, abs=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_only_matrices_and_embeddings_decay(scan):
    _, params = abstract(Llama, dataclasses.replace(TINY, scan=scan))
    for path, value in nnx.to_flat_state(nnx.as_pure(decayed(params))):
        assert value == (path[-1] in ("kernel", "embedding")), path


# Training


def test_options_of_the_architecture():
    assert Config().architecture == CONFIGS["nano"]
    assert Config(width=128).architecture == CONFIGS["nano"]
    # The published widths of the MLP are not those of the rule, and stay.
    assert tinyllama().architecture == CONFIGS["tinyllama-1b"]
    small = Config(layers=3, heads=6, kv_heads=3, width=96, context=32, scan=True, remat=True)
    assert small.architecture == LlamaConfig(
        256, 32, 3, 6, 3, 96, mlp_width=256, scan=True, remat=True
    )
    assert Config(width=96, mlp_width=100).architecture.mlp_width == 100
    assert Config(model="llama3-8b").architecture.rotary_base == 500_000


@pytest.mark.slow
def test_a_step_with_every_option_trains():
    options = {"scan": True, "remat": True, "dtype": "bfloat16", "accumulate": 2}
    options |= {"parameters": ParameterConfig("bfloat16")}
    options |= {"kv_heads": 1, "batch_size": 4, "steps": 10, "hyper": OptimizerConfig(1e-2, 1)}
    config = Config(**TINY_OPTIONS, **options)
    program = make_program(config, "adam_mini")
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
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_comparison_leaves_everything_in_the_run_folder(corpus, tmp_path, capsys):
    main(tiny_config(corpus, tmp_path))
    folder = only_run(tmp_path)
    for name in ("adamw", "adam_mini"):
        records = losses(folder / name)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
        assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    adamw, mini = json.loads((folder / "results.json").read_text())
    assert adamw["numbers_in_v"] > 4 * mini["numbers_in_v"]
    assert mini["optimizer_bytes"] < 0.65 * adamw["optimizer_bytes"]
    output = " ".join(capsys.readouterr().out.split())
    assert "Llama nano, 8 steps of 4 sequences" in output

    main(Config(runs=str(tmp_path), sample="the qu", sample_tokens=20))
    sample = capsys.readouterr().out
    assert "adam_mini, step 8" in sample
    assert "the qu" in sample


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(corpus, tmp_path):
    main(tiny_config(corpus, tmp_path / "whole", optimizer="adam_mini", scan=True))
    killed = tiny_config(corpus, tmp_path / "killed", optimizer="adam_mini", scan=True)
    run_killed_at_save(3, lambda: main(killed))
    folder = only_run(tmp_path / "killed")
    main(Config(runs=str(tmp_path / "killed"), resume=str(folder)))
    assert losses(folder / "adam_mini") == losses(only_run(tmp_path / "whole") / "adam_mini")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 20}, "--width is 20, which 8 heads do not divide: choose"),
        ({"heads": 6, "width": 96}, "--heads is 6, which 4 heads of key and value do not divide"),
        ({"width": 24}, "--width is 24, 3 for each of 8 heads, but rotary positions take features"),
        ({"kv_heads": 0}, "--kv-heads is 0, but must be at least 1"),
        ({"mlp_width": 0}, "--mlp-width is 0, but must be at least 1"),
        (
            {"steps": 5, "hyper": OptimizerConfig(warmup_steps=5)},
            "--warmup-steps is 5, but must be from 0 to --steps - 1 = 4",
        ),
        ({"resume": "x", "steps": 7, "kv_heads": 8}, "leave out --steps, --kv-heads"),
        ({"sample": "x", "mlp_width": 8}, "--sample goes by the options that the run was started"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        main(Config(**{"runs": str(tmp_path / "runs"), **options}))
    assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()  # refused before anything was made


@pytest.mark.slow
def test_the_command_refuses_in_one_line_and_lists_its_options():
    refused = run_command("llama", "--kv-heads=3")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --heads is 8, which 3 heads of key and value do not")
    assert len(refused.stderr.splitlines()) == 1

    shown = run_command("llama", "--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.replace("│", " ").split())
    for field in (*dataclasses.fields(Config), *dataclasses.fields(TextConfig)):
        if field.name not in ("data", "hyper", "devices", "parameters"):
            assert "--" + field.name.replace("_", "-") in words
