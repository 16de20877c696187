"""GCN (Kipf and Welling, 2017) and GAT (Velickovic et al., 2018) in Flax Linen.

The edges of a graph are two arrays, senders and receivers: an undirected edge is there in both
directions, and every node has one edge to itself.

Shapes in comments: N nodes, E edges, F features, H heads, D units of a head.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

LEAKY_RELU_SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class GNNConfig:
    """Architecture."""

    kind: Literal["gcn", "gat"] = "gcn"
    """Neighbours weighted by their degrees, or by attention."""
    layers: int = 2
    width: int = 16
    """Units of a hidden layer, over all heads."""
    heads: int = 1
    """Attention heads of a hidden layer, side by side."""
    output_heads: int = 1
    """Attention heads of the last layer, averaged."""
    num_classes: int = 7
    dropout: float = 0.5
    """Of every layer's inputs and of attention."""


CONFIGS = {
    "gcn": GNNConfig(),
    "gat": GNNConfig("gat", width=64, heads=8),
}


def segment_softmax(scores: jax.Array, segments: jax.Array, num_segments: int) -> jax.Array:
    """The softmax of `scores` over the entries of each segment; `segments` are sorted."""

    def over(reduce: Any, values: jax.Array) -> jax.Array:
        """A reduction over the segments, for each of their entries."""
        reduced = reduce(values, segments, num_segments, indices_are_sorted=True)
        return reduced[segments]

    # The largest score of each segment, which cancels, keeps the exponentials finite.
    shifted = scores - jax.lax.stop_gradient(over(jax.ops.segment_max, scores))
    exponentials = jnp.exp(shifted)
    return exponentials / over(jax.ops.segment_sum, exponentials)


class GCNLayer(nn.Module):
    """D^-1/2 A D^-1/2 X W + b, for the adjacency matrix A and the degrees D of the graph."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, senders: jax.Array, receivers: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        degrees = jax.ops.segment_sum(
            jnp.ones(len(receivers)), receivers, len(x), indices_are_sorted=True
        )
        scale = jax.lax.rsqrt(degrees)[:, None]
        messages = (scale * (x @ kernel))[senders]
        sums = jax.ops.segment_sum(messages, receivers, len(x), indices_are_sorted=True)
        return scale * sums + bias


class GATLayer(nn.Module):
    """Attention of every node over its neighbours, by several heads: side by side, or averaged."""

    heads: int
    features: int
    """Of each head."""
    average: bool
    dropout: float

    @nn.compact
    def __call__(
        self, x: jax.Array, senders: jax.Array, receivers: jax.Array, train: bool
    ) -> jax.Array:
        # Every head is a matrix of its own, and so is every attention vector.
        by_head = (self.heads, self.features)
        kernel_init = nn.initializers.glorot_uniform(in_axis=0, out_axis=2, batch_axis=1)
        vector_init = nn.initializers.glorot_uniform(in_axis=1, out_axis=(), batch_axis=0)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], *by_head))
        attention_source = self.param("attention_source", vector_init, by_head)
        attention_target = self.param("attention_target", vector_init, by_head)
        bias_shape = by_head[1:] if self.average else by_head
        bias = self.param("bias", nn.initializers.zeros, bias_shape)

        values = jnp.einsum("nf,fhd->nhd", x, kernel)
        of_source = (values * attention_source).sum(-1)  # N H
        of_target = (values * attention_target).sum(-1)
        scores = nn.leaky_relu(of_source[senders] + of_target[receivers], LEAKY_RELU_SLOPE)
        attention = segment_softmax(scores, receivers, len(x))  # E H
        attention = nn.Dropout(self.dropout, deterministic=not train)(attention)
        mixed = jax.ops.segment_sum(
            attention[..., None] * values[senders], receivers, len(x), indices_are_sorted=True
        )
        if self.average:
            return mixed.mean(1) + bias
        return (mixed + bias).reshape(len(x), -1)


class GNN(nn.Module):
    """The classifier of nodes: features (N, F) and edges, sorted by receiver, to logits (N,
    classes)."""

    config: GNNConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, senders: jax.Array, receivers: jax.Array, train: bool
    ) -> jax.Array:
        config = self.config
        for number in range(1, config.layers + 1):
            last, name = number == config.layers, f"layer{number}"
            x = nn.Dropout(config.dropout, deterministic=not train)(x)
            if config.kind == "gcn":
                features = config.num_classes if last else config.width
                x = GCNLayer(features, name=name)(x, senders, receivers)
            else:
                heads = config.output_heads if last else config.heads
                features = config.num_classes if last else config.width // heads
                layer = GATLayer(heads, features, last, config.dropout, name=name)
                x = layer(x, senders, receivers, train)
            if not last:
                x = nn.relu(x) if config.kind == "gcn" else nn.elu(x)
        return x
