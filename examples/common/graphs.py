"""Graphs whose nodes are to be classified: data sets, with their splits of the nodes."""

import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse

from examples.common.cli import ConfigError

# Of digits, as of Planetoid's graphs.
TRAIN_NODES_PER_CLASS = 20
VALIDATION_NODES = 500
# Of each digit; the edge is there if one of the two is among the other's.
DIGITS_NEIGHBOURS = 8
PLANETOID_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
PLANETOID_SOURCE = "https://github.com/kimiyoung/planetoid has it in its folder data"


class DatasetFacts(NamedTuple):
    """What is known of a data set before it is read."""

    num_features: int
    num_classes: int
    is_planetoid: bool = False


DATASETS = {
    "digits": DatasetFacts(64, 10),
    "cora": DatasetFacts(1433, 7, is_planetoid=True),
    "citeseer": DatasetFacts(3703, 6, is_planetoid=True),
    "pubmed": DatasetFacts(500, 3, is_planetoid=True),
    "ogbn-arxiv": DatasetFacts(128, 40),
}


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """Where the graph comes from."""

    dataset: Literal["digits", "cora", "citeseer", "pubmed", "ogbn-arxiv"] | None = None
    """digits: the handwritten digits that come with scikit-learn, each joined to its nearest
    neighbours. cora, citeseer and pubmed: from --data-dir. ogbn-arxiv: through the package ogb.
    Without it, digits, or cora with --data-dir."""
    data_dir: str | None = None
    """Folder with the Planetoid files of the data set, such as ind.cora.x to ind.cora.graph and
    ind.cora.test.index. For ogbn-arxiv, where ogb keeps its copy; without it, dataset."""

    @property
    def name(self) -> str:
        """The data set meant."""
        return self.dataset or ("digits" if self.data_dir is None else "cora")

    @property
    def facts(self) -> DatasetFacts:
        """What is known of it."""
        return DATASETS[self.name]

    def check(self) -> None:
        """Refuse what cannot work, before anything is read."""
        if self.facts.is_planetoid:
            if self.data_dir is None:
                raise ConfigError(
                    f"--dataset {self.name} is read from files: give the folder that holds "
                    f"ind.{self.name}.x and the others with --data-dir."
                )
            if not Path(self.data_dir).is_dir():
                raise ConfigError(
                    f"--data-dir {self.data_dir} is not a folder: give the one that holds "
                    f"ind.{self.name}.x, the first of Planetoid's files."
                )
        elif self.name == "digits" and self.data_dir is not None:
            raise ConfigError(
                "--data-dir holds Planetoid's files, but --dataset is digits: leave out one of "
                "them, or give --dataset cora, citeseer or pubmed."
            )


class Graph(NamedTuple):
    """A graph with N nodes and E edges, and which nodes are for training, validation and test."""

    features: np.ndarray
    """(N, features), float32"""
    labels: np.ndarray
    """(N,)"""
    senders: np.ndarray
    """(E,) An undirected edge is there in both directions, and every node has one edge to
    itself."""
    receivers: np.ndarray
    """(E,), sorted"""
    train: np.ndarray
    """(N,), bool"""
    validation: np.ndarray
    test: np.ndarray


def load(config: GraphConfig) -> Graph:
    """The graph of `config`."""
    if config.facts.is_planetoid:
        return _planetoid(Path(config.data_dir), config.name, config.facts)
    return _digits() if config.name == "digits" else _ogb(config.name, config.data_dir or "dataset")


def edges(pairs: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """(senders, receivers) of the undirected graph with the edges `pairs`, shape (2, any number),
    as `Graph` has them: in both directions, none twice, with every node's to itself, sorted by
    receiver."""
    nodes = np.arange(num_nodes)
    ends, others = (
        np.concatenate([pairs[i], pairs[1 - i], nodes]).astype(np.int64) for i in (0, 1)
    )
    receivers, senders = np.divmod(np.unique(ends * num_nodes + others), num_nodes)
    return senders.astype(np.int32), receivers.astype(np.int32)


def _graph(features: Any, labels: Any, pairs: np.ndarray, *splits: np.ndarray) -> Graph:
    """The graph of edges as pairs of nodes, and of splits as the nodes' indices."""
    masks = [np.zeros(len(labels), bool) for _ in splits]
    for mask, indices in zip(masks, splits, strict=True):
        mask[indices] = True
    return Graph(
        np.asarray(features, np.float32),
        np.asarray(labels, np.int32),
        *edges(pairs, len(labels)),
        *masks,
    )


def _digits() -> Graph:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "--dataset digits needs the package scikit-learn, which is not installed: "
            "pip install scikit-learn, or give Planetoid's files with --data-dir."
        ) from error
    digits = load_digits()
    features, labels = digits.data / 16, digits.target
    # Always the same split, whatever the seed of the run.
    order = np.random.default_rng(0).permutation(len(labels))
    train = np.concatenate(
        [order[labels[order] == label][:TRAIN_NODES_PER_CLASS] for label in range(10)]
    )
    rest = order[~np.isin(order, train)]
    pairs = _nearest(digits.data, DIGITS_NEIGHBOURS)
    return _graph(features, labels, pairs, train, rest[:VALIDATION_NODES], rest[VALIDATION_NODES:])


def _nearest(points: np.ndarray, count: int) -> np.ndarray:
    """Pairs of each point and its nearest others, shape (2, points * count). Of points as far, the
    first come first: with coordinates that are whole numbers, as here, the same on every machine.
    """
    norms = (points**2).sum(1)
    distances = norms[:, None] + norms - 2 * points @ points.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return np.stack([np.repeat(np.arange(len(points)), count), nearest.ravel()])


def _ogb(dataset: str, folder: str) -> Graph:
    """A data set of the Open Graph Benchmark; the package keeps a copy on disk."""
    try:
        from ogb.nodeproppred import NodePropPredDataset
    except ImportError as error:
        raise ConfigError(
            f"--dataset {dataset} needs the package ogb, which is not installed: "
            "pip install ogb, or give Planetoid's files with --data-dir."
        ) from error
    try:
        data = NodePropPredDataset(name=dataset, root=folder)
        graph, labels = data[0]
        splits = data.get_idx_split()
    # The library raises errors of many kinds here: its own, the network's, the file format's.
    except Exception as error:
        raise ConfigError(
            f"--dataset {dataset} cannot be loaded ({_reason(error)}): check the network and the "
            f"folder {folder}, or give Planetoid's files with --data-dir."
        ) from error
    return _graph(
        graph["node_feat"],
        labels[:, 0],
        graph["edge_index"],
        *(splits[part] for part in ("train", "valid", "test")),
    )


def _reason(error: Exception) -> str:
    """The first line of what `error` says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _planetoid(folder: Path, dataset: str, facts: DatasetFacts) -> Graph:
    """Planetoid's split of a citation graph. The features and labels of the first nodes are in
    `allx` and `ally`, those with a label for training first of all, and in `x` and `y` again; those
    of the test nodes, which `test.index` lists, in `tx` and `ty`. A node that is in neither has no
    features and no label; CiteSeer has some."""
    paths = {part: folder / f"ind.{dataset}.{part}" for part in PLANETOID_PARTS}
    x, tx, allx = (_features(paths[part], facts.num_features) for part in ("x", "tx", "allx"))
    _, ty, ally = (
        _labels(paths[part], (len(matrix), facts.num_classes))
        for part, matrix in (("y", x), ("ty", tx), ("ally", allx))
    )
    pairs, num_nodes = _parsed(paths["graph"], _pairs)
    test = _test_nodes(paths["test.index"], len(tx), range(len(allx), num_nodes))
    train = np.arange(len(x))
    validation = len(x) + np.arange(VALIDATION_NODES)
    if len(allx) < len(x) + VALIDATION_NODES:
        raise _damaged(
            paths["allx"],
            f"has {len(allx):,} nodes, but must have {len(x):,} for training and "
            f"{VALIDATION_NODES} for validation",
        )

    features = np.zeros((num_nodes, facts.num_features), np.float32)
    labels = np.zeros(num_nodes, np.int32)
    features[: len(allx)], features[test] = allx, tx
    labels[: len(ally)], labels[test] = ally, ty
    # As both papers do: what a document's words weigh, they weigh together.
    totals = features.sum(1, keepdims=True)
    features /= np.where(totals == 0, 1, totals)
    return _graph(features, labels, pairs, train, validation, test)


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path} {what}: it is damaged or no such file; {PLANETOID_SOURCE}.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): {PLANETOID_SOURCE}."
        ) from error


class _Parts:
    """Stands for an object of NumPy or SciPy in a pickle, and keeps what it would be made of."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


PLANETOID_NAMES = {
    ("numpy", "dtype"): _Parts,
    ("numpy", "ndarray"): _Parts,
    ("numpy.core.multiarray", "_reconstruct"): _Parts,
    ("scipy.sparse.csr", "csr_matrix"): _Parts,
    ("collections", "defaultdict"): lambda *_: {},
    ("__builtin__", "list"): list,
}


class _Unpickler(pickle.Unpickler):
    """A pickle can have any function called that it names. Planetoid's name these six things; this
    unpickler knows no others, and calls nothing of NumPy and SciPy, where not all is safe."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLANETOID_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return PLANETOID_NAMES[module, name]


def _parsed(path: Path, parse: Callable[[Any], Any]) -> Any:
    """What `parse` makes of the pickle."""
    content = io.BytesIO(_read(path))
    try:
        # Strings of Python 2 hold bytes.
        return parse(_Unpickler(content, encoding="latin1").load())
    # A pickle that is cut short or damaged makes errors of any kind.
    except Exception as error:
        raise _damaged(path, f"cannot be read ({_reason(error)})") from error


def _array(parts: _Parts) -> np.ndarray:
    _, shape, dtype, is_fortran, content = parts.state
    _, byte_order, *_ = dtype.state
    kind = np.dtype(byte_order + dtype.arguments[0])
    return np.frombuffer(content.encode("latin1"), kind).reshape(
        shape, order="F" if is_fortran else "C"
    )


def _matrix(parts: _Parts) -> np.ndarray:
    content = tuple(_array(parts.state[name]) for name in ("data", "indices", "indptr"))
    matrix = scipy.sparse.csr_matrix(content, shape=parts.state["_shape"])
    matrix.check_format(full_check=True)
    return matrix.toarray()


def _features(path: Path, num_features: int) -> np.ndarray:
    features = _parsed(path, _matrix)
    if features.shape[1] != num_features:
        raise _damaged(
            path, f"has {features.shape[1]:,} features a node, but must have {num_features:,}"
        )
    if not (np.isfinite(features).all() and (features >= 0).all()):
        raise _damaged(path, "has features that are not numbers of at least 0")
    return features


def _labels(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The class of each node."""
    one_hot = _parsed(path, _array)
    if one_hot.shape != shape:
        raise _damaged(path, f"has labels of shape {one_hot.shape}, but must have {shape}")
    if not (np.isin(one_hot, (0, 1)).all() and (one_hot.sum(1) == 1).all()):
        raise _damaged(path, "has a label that is not a one among zeros")
    return one_hot.argmax(1)


def _pairs(graph: dict[int, list[int]]) -> tuple[np.ndarray, int]:
    """The edges as pairs of nodes, and how many nodes there are."""
    nodes = range(len(graph))
    if set(graph) != set(nodes):
        raise ValueError("its nodes are not numbered from 0 on")
    ends = [(node, neighbour) for node in nodes for neighbour in graph[node]]
    if not all(neighbour in nodes for _, neighbour in ends):
        raise ValueError(f"it has an edge to a node that is not among its {len(graph):,} nodes")
    return np.array(ends, np.int64).reshape(-1, 2).T, len(graph)


def _test_nodes(path: Path, count: int, allowed: range) -> np.ndarray:
    """The test nodes, in the order of their features and labels."""
    lines = _read(path).split()
    try:
        nodes = [int(line) for line in lines]
    except ValueError as error:
        raise _damaged(path, f"cannot be read ({_reason(error)})") from error
    if not set(nodes) <= set(allowed):
        raise _damaged(
            path,
            f"has nodes from {min(nodes)} to {max(nodes)}, but they must be from {allowed.start} "
            f"to {allowed.stop - 1}",
        )
    if not len(nodes) == len(set(nodes)) == count:
        raise _damaged(
            path,
            f"has {len(set(nodes)):,} nodes in {len(nodes):,} lines, but must have {count:,}, "
            "each once",
        )
    return np.array(nodes)
