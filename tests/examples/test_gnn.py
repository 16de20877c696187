"""examples/gnn: the layers, the graphs, resuming, and refusals."""

import dataclasses
import io
import json
import math
import os
import pickle
import pickletools
import struct
import sys
import types
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from scipy.spatial.distance import cdist

from examples.common import graphs
from examples.common.cli import ConfigError
from examples.common.graphs import Graph, GraphConfig
from examples.common.optimizers import OptimizerConfig, decayed
from examples.gnn.model import CONFIGS, GNN, GATLayer, GCNLayer, GNNConfig, segment_softmax
from examples.gnn.train import Config, load_task, main, make_program
from tests.examples.running import losses, only_run, run_command, run_killed_at_save

TINY_RUN = {
    "width": 4,
    "steps": 8,
    "eval_every": 4,
    "checkpoint_every": 2,
    "log_every": 1,
    "hyper": OptimizerConfig(warmup_steps=2),
}
MODELS = [{"model": "gcn"}, {"model": "gat", "heads": 2, "output_heads": 2}]


def tiny_config(root: Path, **options) -> Config:
    return Config(**{**TINY_RUN, "runs": str(root), **options})


def random_graph(num_nodes: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The adjacency matrix of a graph with edges of every node to itself, and its edges; its last
    node is isolated."""
    source = np.random.default_rng(seed)
    pairs = source.integers(num_nodes - 1, size=(2, 2 * num_nodes))
    adjacency = np.eye(num_nodes)
    adjacency[pairs[0], pairs[1]] = adjacency[pairs[1], pairs[0]] = 1
    return adjacency, *graphs.edges(pairs, num_nodes)


def random_weights(params):
    """Weights unlike the initial ones: no bias is zero."""
    source = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(source.normal(size=leaf.shape), jnp.float32), params
    )


def abstract(module, num_features: int, *train):
    """The shapes of the module's parameters."""
    node = jnp.zeros(1, jnp.int32)
    x = jnp.zeros((1, num_features))
    return jax.eval_shape(lambda key: module.init(key, x, node, node, *train), jax.random.key(0))[
        "params"
    ]


def apply(module, params, x, *edges, **options) -> np.ndarray:
    """The module's outputs."""

    @jax.jit
    def outputs(params, x, *edges):
        return module.apply({"params": params}, x, *edges, **options)

    return np.asarray(outputs(params, jnp.asarray(x, jnp.float32), *edges))


def paths(tree) -> dict[str, object]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


# The layers


def gcn_by_hand(adjacency, x, p):
    inverse_roots = np.diag(adjacency.sum(1) ** -0.5)
    return inverse_roots @ adjacency @ inverse_roots @ x @ p["kernel"] + p["bias"]


def gat_by_hand(adjacency, x, p, average):
    outputs = []
    for head in range(p["kernel"].shape[1]):
        values = x @ p["kernel"][:, head]
        scores = (values @ p["attention_target"][head])[:, None] + (
            values @ p["attention_source"][head]
        )
        scores = np.where(scores > 0, scores, 0.2 * scores)
        weights = np.exp(scores) * adjacency
        outputs.append(weights / weights.sum(1, keepdims=True) @ values)
    if average:
        return sum(outputs) / len(outputs) + p["bias"]
    return np.concatenate(outputs, 1) + p["bias"].ravel()


def as_float64(params):
    return jax.tree.map(np.float64, params)


@pytest.mark.parametrize("seed", range(3))
def test_gcn_layer_computes_what_the_formula_says(seed):
    adjacency, *edges = random_graph(seed=seed)
    x = np.random.default_rng(seed).normal(size=(9, 5))
    module = GCNLayer(3)
    params = random_weights(abstract(module, 5))
    actual = apply(module, params, x, *edges)
    expected = gcn_by_hand(adjacency, x, as_float64(params))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gat_layer_computes_what_the_formula_says(seed, average):
    adjacency, *edges = random_graph(seed=seed)
    x = np.random.default_rng(seed).normal(size=(9, 5))
    module = GATLayer(heads=3, features=4, average=average, dropout=0.5)
    params = random_weights(abstract(module, 5, False))
    actual = apply(module, params, x, *edges, train=False)
    expected = gat_by_hand(adjacency, x, as_float64(params), average)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_models_compute_what_the_formulas_say():
    adjacency, *edges = random_graph()
    x = np.random.default_rng(0).normal(size=(9, 5))

    def logits(config):
        module = GNN(config)
        params = random_weights(abstract(module, 5, False))
        actual = apply(module, params, x, *edges, train=False)
        return actual, as_float64(params)

    actual, p = logits(GNNConfig("gcn", layers=3, width=4, num_classes=3))
    y = np.maximum(gcn_by_hand(adjacency, x, p["layer1"]), 0)
    y = np.maximum(gcn_by_hand(adjacency, y, p["layer2"]), 0)
    expected = gcn_by_hand(adjacency, y, p["layer3"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    actual, p = logits(GNNConfig("gat", width=6, heads=2, output_heads=3, num_classes=4))
    y = gat_by_hand(adjacency, x, p["layer1"], average=False)
    y = np.where(y > 0, y, np.expm1(y))
    expected = gat_by_hand(adjacency, y, p["layer2"], average=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_another_order_of_the_nodes_gives_the_same_logits(kind):
    source = np.random.default_rng(0)
    pairs = source.integers(20, size=(2, 40))
    x = source.normal(size=(20, 5)).astype(np.float32)
    module = GNN(dataclasses.replace(CONFIGS[kind], output_heads=2))
    params = random_weights(abstract(module, 5, False))
    order = source.permutation(20)
    place = np.argsort(order)  # of each node in the new order
    before = apply(module, params, x, *graphs.edges(pairs, 20), train=False)
    after = apply(module, params, x[order], *graphs.edges(place[pairs], 20), train=False)
    np.testing.assert_allclose(after, before[order], rtol=1e-4, atol=1e-4)
    assert np.ptp(before, axis=0).min() > 0.1  # and the nodes do differ


def test_segment_softmax_and_its_gradient_are_right():
    scores = np.array([[1e4], [1e4 + 1], [-1e4], [3], [5]], np.float32)
    segments = np.array([0, 0, 2, 2, 3])  # and nothing in 1
    third = 1 / (1 + math.e)
    actual = segment_softmax(jnp.asarray(scores), jnp.asarray(segments), 4)
    np.testing.assert_allclose(actual[:, 0], [third, 1 - third, 0, 1, 1], rtol=1e-6)
    # The gradient of a softmax.
    weights = np.arange(5.0, dtype=np.float32)[:, None]
    gradient = jax.grad(lambda s: (weights * segment_softmax(s, segments, 4)).sum())(scores)
    slope = third * (1 - third)
    np.testing.assert_allclose(gradient[:, 0], [-slope, slope, 0, 0, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [pytest.param(MODELS[0], marks=pytest.mark.slow), MODELS[1]],
    ids=lambda options: options["model"],
)
def test_isolated_nodes_are_no_division_by_zero(options):
    # No edge at all, and two nodes of three without features.
    senders, receivers = graphs.edges(np.zeros((2, 0), int), 3)
    features = np.zeros((3, 64), np.float32)
    features[0] = 1
    only_first = np.array([True, False, False])
    graph = Graph(features, np.arange(3), senders, receivers, only_first, ~only_first, ~only_first)
    program = make_program(Config(**options), "adam_mini")
    state, loss = jax.jit(program.step)(jax.jit(program.init)(), (graph, np.uint32(0)))
    measured = jax.jit(program.evaluate)(state, graph)
    for leaf in jax.tree.leaves((state, loss, measured)):
        assert np.isfinite(leaf).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_dropout_is_for_training_alone(kind):
    _, *edges = random_graph()
    x = jnp.ones((9, 5))
    config = dataclasses.replace(CONFIGS[kind], dropout=0.3)
    module = GNN(config)
    params = random_weights(abstract(module, 5, False))
    whole = apply(module, params, x, *edges, train=False)
    runs = [
        apply(module, params, x, *edges, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.allclose(runs[0], runs[2])
    assert not np.allclose(runs[0], whole)


def test_dropout_of_attention_keeps_its_mean():
    # One node, whose attention to itself is 1, in very many heads.
    module = GATLayer(heads=4000, features=1, average=False, dropout=0.3)
    x, node = jnp.ones((1, 1)), jnp.zeros(1, jnp.int32)
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), abstract(module, 1, False))
    params["kernel"] += 1
    assert (apply(module, params, x, node, node, train=False) == 1).all()
    rngs = {"dropout": jax.random.key(0)}
    dropped = apply(module, params, x, node, node, train=True, rngs=rngs)
    assert set(np.round(np.unique(dropped), 5)) == {0, np.float32(np.round(1 / 0.7, 5))}
    assert np.mean(dropped) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"model": "gcn", "dataset": "cora"}, 23_063),
        ({"model": "gat", "dataset": "cora"}, 92_373),
        # 3703 words, 6 classes.
        ({"model": "gcn", "dataset": "citeseer"}, 3703 * 16 + 16 + 16 * 6 + 6),
        ({"model": "gat", "dataset": "citeseer"}, (3703 + 3) * 64 + (64 + 3) * 6),
        # GAT for PubMed has 8 averaged heads at the end, with one bias.
        ({"model": "gat", "dataset": "pubmed", "output_heads": 8}, 503 * 64 + 8 * 66 * 3 + 3),
        (
            {"model": "gcn", "dataset": "ogbn-arxiv", "layers": 3, "width": 256},
            128 * 256 + 256 + 256 * 256 + 256 + 256 * 40 + 40,
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(options, count):
    options = dict(options)
    data = GraphConfig(options.pop("dataset"))
    config = Config(**options, data=data)
    state = jax.eval_shape(make_program(config, "adamw").init)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == count


@pytest.mark.parametrize("kind", ["gcn", "gat"])
@pytest.mark.slow
def test_initial_weights_have_the_right_distribution(kind):
    module = GNN(dataclasses.replace(CONFIGS[kind], width=64, num_classes=50))
    x, node = jnp.zeros((1, 500)), jnp.zeros(1, jnp.int32)
    init = jax.jit(lambda: module.init(jax.random.key(0), x, node, node, train=False))
    values = paths(init()["params"])
    fans = {
        "gcn": {"layer1/kernel": (500, 64), "layer2/kernel": (64, 50)},
        "gat": {
            "layer1/kernel": (500, 8),  # of each head
            "layer2/kernel": (64, 50),
            "layer1/attention_source": (8, 1),
            "layer1/attention_target": (8, 1),
        },
    }
    # Glorot: a uniform distribution with a variance of 2 / (inputs + outputs).
    for name, (inputs, outputs) in fans[kind].items():
        variance = 2 / (inputs + outputs)
        rtol = 0.05 if values[name].size > 1000 else 0.4
        np.testing.assert_allclose(np.var(values[name]), variance, rtol=rtol)
        assert np.abs(values[name]).max() <= math.sqrt(3 * variance)
    assert not any(values[f"layer{number}/bias"].any() for number in (1, 2))


# The optimizers


def has_nu(value) -> bool:
    return hasattr(value, "nu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"model": "gcn"},
            {
                "layer1/kernel": (1, 16),
                "layer1/bias": (16,),
                "layer2/kernel": (1, 10),
                "layer2/bias": (10,),
            },
        ),
        (
            {"model": "gat", "output_heads": 3},
            {
                "layer1/kernel": (1, 8, 8),  # its outputs are averaged too
                "layer1/attention_source": (8, 1),
                "layer1/attention_target": (8, 1),
                "layer1/bias": (8, 8),
                "layer2/kernel": (1, 3, 10),
                "layer2/attention_source": (3, 1),
                "layer2/attention_target": (3, 1),
                "layer2/bias": (10,),
            },
        ),
    ],
    ids=["gcn", "gat"],
)
def test_gcn_and_gat_have_the_blocks_of_the_page(options, expected):
    state = jax.eval_shape(make_program(Config(**options, v="mean"), "adam_mini").init)
    (nu,) = (leaf.nu for leaf in jax.tree.leaves(state.opt_state, is_leaf=has_nu) if has_nu(leaf))
    assert {path: leaf.shape for path, leaf in paths(nu).items()} == expected


def test_only_kernels_decay():
    state = jax.eval_shape(make_program(Config(model="gat"), "adamw").init)
    for path, value in paths(decayed(state.params)).items():
        assert value == path.endswith("/kernel"), path


# Training


@pytest.mark.slow
def test_losses_are_of_the_right_nodes(tmp_path):
    """The loss of a step, and what is measured, against the logits of the whole graph."""
    config = tiny_config(tmp_path, dropout=0.0)
    task = load_task(config, tmp_path)
    graph = graphs.load(config.data)
    program = task.make_program("adam_mini")
    state = jax.jit(program.init)()
    edges = graph.senders, graph.receivers
    module = GNN(config.architecture)
    logits = np.float64(apply(module, state.params, graph.features, *edges, train=False))
    shifted = logits - logits.max(1, keepdims=True)
    nats = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(logits)), graph.labels]
    correct = logits.argmax(1) == graph.labels
    _, loss = jax.jit(program.step)(state, task.batch(1))
    np.testing.assert_allclose(loss, nats[graph.train].mean(), rtol=1e-4)
    (held_out,) = task.held_out()
    measured = task.measure(jax.tree.map(float, jax.jit(program.evaluate)(state, held_out)))
    expected = {
        "held_out_loss": nats[graph.test].mean(),
        "accuracy": correct[graph.test].mean(),
        "validation_loss": nats[graph.validation].mean(),
        "validation_accuracy": correct[graph.validation].mean(),
    }
    assert measured == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_alone(tmp_path):
    seeds = {}
    for seed in (0, 1):
        tasks = [load_task(tiny_config(tmp_path, seed=seed), tmp_path) for _ in range(2)]
        tasks[1].batch(7)
        for step in (1, 2, 3):
            first, again = (task.batch(step).dropout_seed for task in tasks)
            assert first == again
            seeds[seed, step] = int(first)
    assert len(set(seeds.values())) == 6
    batch = tasks[0].batch(1)
    for field, leaf in batch.graph._asdict().items():
        np.testing.assert_array_equal(leaf, getattr(graphs.load(GraphConfig()), field))


@pytest.mark.slow
@pytest.mark.parametrize("options", MODELS, ids=lambda options: options["model"])
def test_comparison_leaves_everything_in_the_run_folder(options, tmp_path, capsys):
    main(tiny_config(tmp_path, **options))
    folder = only_run(tmp_path)
    for name in ("adamw", "adam_mini"):
        records = losses(folder / name)
        assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
        assert [r["step"] for r in records if "accuracy" in r] == [4, 8]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    adamw, mini = json.loads((folder / "results.json").read_text())
    assert (adamw["optimizer"], mini["optimizer"]) == ("adamw", "adam_mini")
    assert adamw["accuracy"] == losses(folder / "adamw")[-1]["accuracy"]
    assert adamw["numbers_in_v"] > 2 * mini["numbers_in_v"]
    assert mini["optimizer_bytes"] < 0.75 * adamw["optimizer_bytes"]
    output = " ".join(capsys.readouterr().out.split())
    for name in ("adamw", "adam_mini"):
        assert f"{name}: step 8, validation accuracy " in output
    assert "test accuracy" in output
    assert "numbers in" in output
    model = options["model"]
    assert f"{model} on digits, 1,797 nodes and 9,929 edges: 200 nodes for training" in output

    main(Config(runs=str(tmp_path), resume=folder.name))
    assert "has finished its 8 steps already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "optimizer", "fails_at"),
    [
        (MODELS[0], "adam_mini", 3),
        pytest.param(MODELS[1], "adam_mini", 3, marks=pytest.mark.slow),
        # In the comparison, saves 1 to 4 are of the first optimizer and 5 to 8 of the second.
        *(pytest.param(MODELS[0], None, save, marks=pytest.mark.slow) for save in (4, 5)),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, options, optimizer, fails_at):
    main(tiny_config(tmp_path / "whole", **options, optimizer=optimizer))
    killed = tiny_config(tmp_path / "killed", **options, optimizer=optimizer)
    run_killed_at_save(fails_at, lambda: main(killed))
    folder = only_run(tmp_path / "killed")
    main(Config(runs=str(tmp_path / "killed"), resume=str(folder)))
    for name in (optimizer,) if optimizer else ("adamw", "adam_mini"):
        assert losses(folder / name) == losses(only_run(tmp_path / "whole") / name)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_execution")
@pytest.mark.parametrize("model", ["gcn", "gat"])
def test_adam_mini_is_as_accurate_as_adamw(tmp_path, model):
    main(Config(model=model, runs=str(tmp_path)))
    adamw, mini = json.loads((only_run(tmp_path) / "results.json").read_text())
    assert mini["accuracy"] >= adamw["accuracy"] - 0.005
    # Without the graph, logistic regression on the same nodes gets 93%.
    assert mini["accuracy"] >= 0.965


# The graphs


def test_edges_go_both_ways_once_and_to_the_node_itself():
    # An edge in one direction, one in both, one twice, one to itself.
    senders, receivers = graphs.edges(np.array([[0, 1, 2, 3, 3, 2], [1, 2, 1, 0, 0, 2]]), 5)
    adjacency = np.zeros((5, 5), int)
    np.add.at(adjacency, (receivers, senders), 1)
    assert adjacency.tolist() == [
        [1, 1, 0, 1, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert (np.diff(receivers) >= 0).all()
    assert senders.dtype == receivers.dtype == np.int32


def test_edges_of_many_nodes_do_not_overflow():
    most = 70_000
    senders, receivers = graphs.edges(np.array([[most - 1], [most - 2]], np.int32), most)
    assert len(senders) == most + 2
    assert senders[-2:].tolist() == [most - 2, most - 1]
    assert receivers[-2:].tolist() == [most - 1, most - 1]


def test_digits_are_split_as_planetoid_splits():
    graph = graphs.load(GraphConfig())
    assert np.bincount(graph.labels[graph.train]).tolist() == [20] * 10
    assert (graph.validation.sum(), graph.test.sum()) == (500, 1097)
    both = graph.train.astype(int) + graph.validation + graph.test
    assert (both == 1).all()
    assert (graph.features.shape, graph.features.dtype) == ((1797, 64), np.float32)
    assert (graph.features.min(), graph.features.max()) == (0, 1)
    # The file goes from writer to writer; the split does not.
    assert 700 < np.flatnonzero(graph.train).mean() < 1100


def test_digits_are_joined_to_their_nearest_neighbours():
    graph = graphs.load(GraphConfig())
    distances = cdist(graph.features, graph.features)
    np.fill_diagonal(distances, np.inf)
    ranked = np.sort(distances, 1)
    adjacency = np.zeros((1797, 1797), bool)
    adjacency[graph.receivers, graph.senders] = True
    assert adjacency.diagonal().all()
    assert (adjacency == adjacency.T).all()
    # Ties aside, an edge is there exactly if one is among the eight nearest of the other.
    inside = distances < ranked[:, 7:8] - 1e-5
    outside = distances > ranked[:, 7:8] + 1e-5
    np.fill_diagonal(adjacency, False)
    assert adjacency[inside | inside.T].all()
    assert not adjacency[outside & outside.T].any()
    assert (adjacency.sum(1) >= 8).all()


class Python2Pickler(pickle._Pickler):
    """Writes pickles as Python 2 wrote Planetoid's: strings of bytes, and the old names."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, value, name=None):
        module = {
            "numpy._core.multiarray": "numpy.core.multiarray",
            "scipy.sparse._csr": "scipy.sparse.csr",
            "builtins": "__builtin__",
        }.get(value.__module__, value.__module__)
        self.write(pickle.GLOBAL + f"{module}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[type] = dispatch[types.FunctionType] = save_global


def write_pickle(path: Path, value) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)


class Planetoid:
    """A small data set in Planetoid's format, and what must be read from it."""

    training, first, test = 14, 520, 30

    def __init__(self, folder: Path, dataset: str = "cora", missing: int = 0):
        self.folder, self.dataset = folder, dataset
        facts = graphs.DATASETS[dataset]
        source = np.random.default_rng(0)
        self.num_nodes = self.first + self.test + missing
        self.labels = source.integers(facts.num_classes, size=self.num_nodes)
        # Each class has words of its own, so that there is something to learn.
        columns = np.arange(facts.num_features) % facts.num_classes == self.labels[:, None]
        self.features = (columns & (source.random(columns.shape) < 0.1)).astype(np.float32)
        self.features[:, 0] = 1
        self.features[5] = 0  # a document without a word
        self.neighbours = defaultdict(list, {node: [] for node in range(self.num_nodes)})
        for node in range(self.num_nodes):
            for other in source.integers(self.num_nodes, size=2).tolist():
                self.neighbours[node].append(other)
        later = source.permutation(np.arange(self.first, self.num_nodes))
        self.test_nodes, self.missing = later[missing:], later[:missing]

        folder.mkdir(exist_ok=True)
        one_hot = np.eye(facts.num_classes, dtype=np.int32)[self.labels]
        for suffix, nodes in (
            ("", slice(self.training)),
            ("all", slice(self.first)),
            ("t", self.test_nodes),
        ):
            x, y = ("allx", "ally") if suffix == "all" else (f"{suffix}x", f"{suffix}y")
            self.write(x, scipy.sparse.csr_matrix(self.features[nodes]))
            self.write(y, np.array(one_hot[nodes], order="F" if suffix else "C"))
        self.write("graph", self.neighbours)
        self.path("test.index").write_text("".join(f"{node}\n" for node in self.test_nodes))

    def path(self, part: str) -> Path:
        return self.folder / f"ind.{self.dataset}.{part}"

    def write(self, part: str, value) -> None:
        write_pickle(self.path(part), value)

    @property
    def config(self) -> GraphConfig:
        return GraphConfig(self.dataset, str(self.folder))


def test_planetoid_files_are_as_python_2_wrote_them(tmp_path):
    """The same operations and names as in the published files."""
    data = Planetoid(tmp_path / "cora")
    expected = {
        "x": {
            "numpy dtype",
            "numpy ndarray",
            "numpy.core.multiarray _reconstruct",
            "scipy.sparse.csr csr_matrix",
        },
        "y": {"numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct"},
        "graph": {"collections defaultdict", "__builtin__ list"},
    }
    for part, names in expected.items():
        operations = list(pickletools.genops(data.path(part).read_bytes()))
        assert {value for code, value, _ in operations if code.name == "GLOBAL"} == names
        assert "BINUNICODE" not in {code.name for code, *_ in operations}


@pytest.mark.parametrize(("dataset", "missing"), [("cora", 0), ("citeseer", 3)])
def test_planetoid_files_are_read(tmp_path, dataset, missing):
    data = Planetoid(tmp_path / "files", dataset, missing)
    data.config.check()
    graph = graphs.load(data.config)
    known = np.setdiff1d(np.arange(data.num_nodes), data.missing)
    np.testing.assert_array_equal(graph.labels[known], data.labels[known])
    totals = data.features.sum(1, keepdims=True)
    normalized = data.features / np.maximum(totals, 1)
    np.testing.assert_allclose(graph.features[known], normalized[known], rtol=1e-6)
    assert not graph.features[data.missing].any()
    assert not graph.features[5].any()
    assert np.flatnonzero(graph.train).tolist() == list(range(14))
    assert np.flatnonzero(graph.validation).tolist() == list(range(14, 514))
    assert np.flatnonzero(graph.test).tolist() == sorted(data.test_nodes.tolist())
    expected = {(node, node) for node in range(data.num_nodes)}
    for node, others in data.neighbours.items():
        expected |= {(node, other) for other in others} | {(other, node) for other in others}
    assert list(zip(graph.receivers, graph.senders, strict=True)) == sorted(expected)


@pytest.mark.slow
def test_trains_on_planetoid_files(tmp_path):
    data = Planetoid(tmp_path / "cora")
    options = {"optimizer": "adam_mini", "steps": 4}
    # The name of the data set is not needed.
    main(tiny_config(tmp_path / "runs", data=GraphConfig(data_dir=str(data.folder)), **options))
    records = losses(only_run(tmp_path / "runs") / "adam_mini")
    assert len(records) == 5
    assert all(np.isfinite(list(record.values())).all() for record in records)


@pytest.mark.parametrize("part", graphs.PLANETOID_PARTS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "cannot be read (No such file or directory): https://github.com/kimiyoung"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), ""),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>"), "cannot be read ("),
        (lambda path: write_pickle(path, [1, 2]), "cannot be read ("),
    ],
    ids=["missing", "truncated", "empty", "html", "other"],
)
def test_refuses_damaged_planetoid_files(tmp_path, part, damage, message):
    data = Planetoid(tmp_path / "cora")
    damage(data.path(part))
    config = tiny_config(tmp_path / "runs", data=data.config)
    with pytest.raises(ConfigError) as refusal:
        main(config)
    assert str(refusal.value).startswith(f"{data.path(part)} {message}")
    assert str(refusal.value).endswith("has it in its folder data.")
    assert not list((tmp_path / "runs").iterdir())  # it never was a run


def csr(indices, *, columns: int = 1433) -> scipy.sparse.csr_matrix:
    """14 rows with one word each."""
    matrix = scipy.sparse.csr_matrix(np.eye(14, columns, dtype=np.float32))
    matrix.indices[:] = indices
    return matrix


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("x", csr(0, columns=12), "has 12 features a node, but must have 1,433"),
        ("x", csr(1433), "cannot be read ("),
        ("x", csr(-1), "cannot be read ("),
        ("x", csr(0) * np.float32(np.nan), "has features that are not numbers of at least 0"),
        ("x", csr(0) * np.float32(-1), "has features that are not numbers of at least 0"),
        ("x", np.zeros((14, 1433)), "cannot be read ("),
        ("y", np.eye(14, 6), "has labels of shape (14, 6), but must have (14, 7)"),
        ("ty", np.eye(14, 7), "has labels of shape (14, 7), but must have (30, 7)"),
        ("y", np.ones((14, 7)), "has a label that is not a one among zeros"),
        ("y", np.zeros((14, 7)), "has a label that is not a one among zeros"),
        ("y", np.array([[object()] * 7] * 14), "cannot be read ("),
        ("graph", {0: [1], 2: [0]}, "cannot be read (its nodes are not numbered from 0 on)"),
        ("graph", {0: [1], 1: [2]}, "cannot be read (it has an edge to a node that is not among"),
        ("graph", {0: [-1]}, "cannot be read (it has an edge to a node that is not among its 1"),
        ("graph", {0: ["1"], 1: [0]}, "cannot be read (it has an edge to a node that is not"),
        ("graph", {0: 1, 1: 0}, "cannot be read ('int' object is not iterable)"),
    ],
)
def test_refuses_wrong_planetoid_files(tmp_path, part, value, message):
    data = Planetoid(tmp_path / "cora")
    data.write(part, value)
    with pytest.raises(ConfigError) as refusal:
        graphs.load(data.config)
    assert str(refusal.value).startswith(f"{data.path(part)} {message}")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([519, *range(521, 550)], "has nodes from 519 to 549, but they must be from 520 to 549"),
        ([550, *range(521, 550)], "has nodes from 521 to 550, but they must be from 520 to 549"),
        ([521, *range(521, 550)], "has 29 nodes in 30 lines, but must have 30, each once"),
        ([*range(520, 550), 549], "has 30 nodes in 31 lines, but must have 30, each once"),
        (range(521, 550), "has 29 nodes in 29 lines, but must have 30, each once"),
    ],
)
def test_refuses_wrong_test_nodes(tmp_path, nodes, message):
    data = Planetoid(tmp_path / "cora")
    data.path("test.index").write_text("\n".join(map(str, nodes)))
    with pytest.raises(ConfigError) as refusal:
        graphs.load(data.config)
    assert str(refusal.value).startswith(f"{data.path('test.index')} {message}")


def test_refuses_too_few_nodes_for_validation(tmp_path, monkeypatch):
    data = Planetoid(tmp_path / "cora")
    monkeypatch.setattr(graphs, "VALIDATION_NODES", 507)
    with pytest.raises(ConfigError) as refusal:
        graphs.load(data.config)
    assert "allx has 520 nodes, but must have 14 for training and 507 for" in str(refusal.value)


class Call:
    """Its pickle calls `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("part", graphs.PLANETOID_PARTS[:-1])
def test_pickles_run_no_code(tmp_path, part):
    data = Planetoid(tmp_path / "cora")
    made = tmp_path / "made"
    for function, arguments in (
        (os.mkdir, (str(made),)),
        (eval, ("1",)),
        (np.fromfile, (str(data.path("x")),)),
        (np.lib.npyio.DataSource, ()),
        (getattr, ([], "append")),
    ):
        data.write(part, Call(function, *arguments))
        with pytest.raises(ConfigError, match=r"cannot be read \(.* has no place in it\): it is"):
            graphs.load(data.config)
    assert not made.exists()


def test_pickles_make_no_array_of_objects():
    """NumPy itself is not safe: its arrays take whatever the file holds for the addresses of
    objects."""
    addresses = struct.pack("P", id(None))
    content = pickle.dumps(Call(np.ndarray, (1,), Call(np.dtype, "O"), addresses))
    assert pickle.loads(content).tolist() == [None]
    read = graphs._Unpickler(io.BytesIO(content), encoding="latin1").load()
    assert not isinstance(read, np.ndarray)


class FakeOgb:
    """Stands for the package ogb."""

    def __init__(self, fails: bool = False):
        self.asked_for = []
        self.fails = fails

    def install(self, monkeypatch):
        module = types.ModuleType("ogb.nodeproppred")
        module.NodePropPredDataset = self.load
        monkeypatch.setitem(sys.modules, "ogb", types.ModuleType("ogb"))
        monkeypatch.setitem(sys.modules, "ogb.nodeproppred", module)

    def load(self, name, root):
        self.asked_for.append((name, root))
        if self.fails:
            raise ConnectionError("no route to host\nmore lines")
        return self

    def __getitem__(self, index):
        assert index == 0
        features = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
        edge_index = np.array([[0, 1, 2], [1, 2, 0]])
        return {"edge_index": edge_index, "node_feat": features}, np.arange(30, 36)[:, None]

    def get_idx_split(self):
        return {"train": np.array([3, 1]), "valid": np.array([0]), "test": np.array([2, 5])}


def test_ogbn_arxiv_is_read_and_its_edges_go_both_ways(monkeypatch):
    ogb = FakeOgb()
    ogb.install(monkeypatch)
    graph = graphs.load(GraphConfig("ogbn-arxiv"))
    graphs.load(GraphConfig("ogbn-arxiv", data_dir="elsewhere"))
    assert ogb.asked_for == [("ogbn-arxiv", "dataset"), ("ogbn-arxiv", "elsewhere")]
    np.testing.assert_array_equal(graph.features, ogb[0][0]["node_feat"])
    assert graph.labels.tolist() == list(range(30, 36))
    # A citation goes both ways.
    assert graph.senders.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert graph.receivers.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5]
    splits = [graph.train, graph.validation, graph.test]
    assert [np.flatnonzero(part).tolist() for part in splits] == [[1, 3], [0], [2, 5]]


def test_refuses_data_out_of_reach(monkeypatch, tmp_path):
    config = tiny_config(tmp_path, data=GraphConfig("ogbn-arxiv"))
    monkeypatch.setitem(sys.modules, "ogb", None)
    with pytest.raises(ConfigError, match="ogbn-arxiv needs the package ogb, which is not inst"):
        main(config)
    FakeOgb(fails=True).install(monkeypatch)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(no route to host\): check the net"):
        main(config)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="digits needs the package scikit-learn, which is not"):
        main(tiny_config(tmp_path))
    assert not list(tmp_path.iterdir())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "--width is 0, but must be at least 1"),
        ({"layers": 0}, "--layers is 0, but must be at least 1"),
        ({"model": "gat", "heads": 0}, "--heads is 0, but must be at least 1"),
        ({"model": "gat", "output_heads": 0}, "--output-heads is 0, but must be at least 1"),
        ({"model": "gat", "heads": 7}, "--width is 64, which 7 heads do not divide: choose a"),
        ({"heads": 2}, "--heads is for attention, which gcn has not: leave it out, or give"),
        ({"output_heads": 1}, "--output-heads is for attention, which gcn has not: leave it"),
        ({"dropout": 1.0}, "--dropout is 1.0, but must be from 0 to less than 1"),
        ({"dropout": math.nan}, "--dropout is nan, but must be from 0 to less than 1"),
        ({"batch_size": 2}, "--batch-size is 2, but must be 1: a step sees the whole graph"),
        ({"optimizer": "adem"}, "--optimizer is adem, but must be one of adamw, adam_mini"),
        (
            {"steps": 5, "hyper": OptimizerConfig(warmup_steps=5)},
            "--warmup-steps is 5, but must be from 0 to --steps - 1 = 4",
        ),
        ({"hyper": OptimizerConfig(b2=1.0)}, "--b2 is 1.0, but must be from 0 to less than 1"),
        ({"data": GraphConfig("cora")}, "--dataset cora is read from files: give the folder that"),
        ({"data": GraphConfig(data_dir="/no/such")}, "--data-dir /no/such is not a folder: give"),
        ({"data": GraphConfig("digits", data_dir=".")}, "but --dataset is digits: leave out"),
        ({"seed": -1}, "--seed is -1, but must be at least 0"),
        ({"resume": "nowhere"}, "nowhere is not a run, a folder with a config.json: "),
        (
            {"resume": "x", "width": 8, "data": GraphConfig("cora")},
            "--resume goes by the options that the run was started with: leave out --width, "
            "--dataset.",
        ),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        main(Config(**{"runs": str(tmp_path / "runs"), **options}))
    assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()  # refused before anything was made


def test_show_blocks_prints_the_table_and_starts_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    # The files are not looked at.
    data = GraphConfig("citeseer", data_dir=str(tmp_path))
    main(Config(runs=str(tmp_path / "runs"), show_blocks=True, model="gat", data=data))
    output = " ".join(capsys.readouterr().out.split())
    assert "layer1/kernel │ (3703, 8, 8)" in output
    assert "3,703 rows +" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow  # test_gpt2.py has a quick one
def test_the_command_refuses_in_one_line_and_lists_its_options():
    refused = run_command("gnn", "--heads=2")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --heads is for attention, which gcn has not")
    assert len(refused.stderr.splitlines()) == 1

    shown = run_command("gnn", "--help")
    assert shown.returncode == 0
    words = " ".join(shown.stdout.replace("│", " ").split())
    for field in (*dataclasses.fields(Config), *dataclasses.fields(GraphConfig)):
        if field.name not in ("data", "hyper", "batch_size"):
            assert "--" + field.name.replace("_", "-") in words
    assert "--batch-size" not in words
    assert "Optimizer steps; each sees the whole graph. (default: " in words
