"""Models of the literature whose outputs were once joined, or that were refused."""
# ruff: noqa: E741, N806 (sizes have the names of the formulas)

import jax
import jax.numpy as jnp
import optax
import pytest
from equinox.internal import while_loop
from jax import lax
from jax.experimental import sparse

from optax_adam_mini import infer_block_specs, infer_muon_dimension_numbers

S = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)
I = lambda *shape: S(*shape, dtype="int32")


def heteroscedastic_ensemble():
    """An ensemble with a mean and a log-variance (Lakshminarayanan et al. 2017)."""
    B, D, E, N = 6, 5, 3, 7

    def loss(p, x, y):
        def member(u, b, m, s):
            h = jax.nn.relu(x @ u + b)
            return h @ m, h @ s

        mean, log = jax.vmap(member)(p["u"], p["b"], p["m"], p["s"])
        return (jnp.exp(-log) * (y - mean) ** 2 + log).mean()

    return (
        loss,
        {"u": (E, D, N), "b": (E, N), "m": (E, N), "s": (E, N)},
        [S(B, D), S(B)],
        {"u": (E, 1, N), "b": (E, N), "m": (E, 1), "s": (E, 1)},
    )


def task_conditioned_hypernetwork_out_in():
    """A kernel (out, in) that is made once for a task, applied to a batch."""
    B, D, Z, P, I_, O = 9, 6, 5, 11, 7, 4

    def loss(p, x, z):
        w = (jax.nn.relu(z @ p["g1"]) @ p["g2"]).reshape(O, I_)
        h = jax.nn.relu(x @ p["u"])
        return jnp.square(jnp.tanh(h @ w.T) @ p["o"]).mean()

    return (
        loss,
        {"u": (D, I_), "g1": (Z, P), "g2": (P, O * I_), "o": (O, 3)},
        [S(B, D), S(Z)],
        {"u": (1, I_), "g1": (1, P), "g2": (1, O * I_), "o": (1, 3)},
    )


def advantage_weighted_twin_critics():
    """Twin critics, and a log-likelihood weighted by a stopped advantage (AWAC)."""
    B, D, A, N, P, C = 8, 6, 3, 7, 5, 4

    def loss(p, s, act, chosen, target):
        critic = lambda u, c: jax.nn.relu(jnp.concatenate([s, act], -1) @ u) @ c
        q = jax.vmap(critic)(p["u"], p["c"])
        log = jax.nn.log_softmax(jnp.tanh(s @ p["a"]) @ p["h"])
        log = jnp.take_along_axis(log, chosen[:, None], -1)[:, 0]
        weight = jnp.exp(lax.stop_gradient(q.min(0) - target))
        return jnp.square(q - target).mean() - (weight * log).mean()

    return (
        loss,
        {"u": (2, D + A, N), "c": (2, N), "a": (D, P), "h": (P, C)},
        [S(B, D), S(B, A), I(B), S(B)],
        {"u": (2, 1, N), "c": (2, 1), "a": (1, P), "h": (1, C)},
    )


def mixture_of_scalar_experts():
    """Experts of one number each, weighted by a gate (Jacobs et al. 1991)."""
    B, D, E, N = 8, 6, 3, 5

    def loss(p, x, y):
        h = jax.nn.relu(x @ p["w"]).reshape(-1, E, N)
        each = jnp.einsum("ben,en->be", h, p["a"])
        gate = jax.nn.softmax(x @ p["r"])
        return jnp.square((gate * each).sum(-1) - y).mean()

    return (
        loss,
        {"w": (D, E * N), "a": (E, N), "r": (D, E)},
        [S(B, D), S(B)],
        {"w": (1, E * N), "a": (E, 1), "r": [(1, E), (1, 1)]},
    )


def multi_gate_experts_on_sequences():
    """Multi-gate experts on sequences, with one gate for each sequence."""
    B, T, D, F, E = 2, 7, 6, 5, 3

    def loss(p, x):
        each = jax.nn.relu(jnp.einsum("btd,dfe->btfe", x, p["w"]))
        gate = jax.nn.softmax(x.mean(1) @ p["r"])
        return jnp.square(jnp.tanh(jnp.einsum("btfe,be->btf", each, gate)) @ p["o"]).mean()

    return (
        loss,
        {"w": (D, F, E), "r": (D, E), "o": (F, 4)},
        [S(B, T, D)],
        {"w": (1, F, E), "r": (1, E), "o": (1, 4)},
    )


def multi_task_tensor_factorisation():
    """Kernels of tasks that are mixed from bases (Yang and Hospedales 2017)."""
    B, D, T, N, K, O = 8, 6, 3, 5, 2, 4

    def loss(p, x):
        kernels = jnp.einsum("tk,kno->tno", p["c"], p["basis"])
        h = jax.nn.relu(x @ p["u"]).reshape(-1, T, N)
        return jnp.square(jnp.tanh(jnp.einsum("btn,tno->bto", h, kernels))).mean()

    return (
        loss,
        {"u": (D, T * N), "c": (T, K), "basis": (K, N, O)},
        [S(B, D)],
        {"u": (1, T * N), "c": [(T, 1), (T, K)], "basis": [(1, 1, O), (K, 1, O)]},
    )


def low_rank_kernel_of_each_head():
    """A kernel of low rank for each head, on a ReLU layer."""
    B, D, H, N, R, M = 7, 6, 3, 5, 2, 4

    def loss(p, x):
        h = jax.nn.relu(x @ p["u"]).reshape(-1, H, N)
        kernel = p["a"] @ p["b"]
        y = jnp.einsum("bhn,hnm->bhm", h, kernel).reshape(-1, H * M)
        return jnp.square(jnp.tanh(y) @ p["o"]).mean()

    return (
        loss,
        {"u": (D, H * N), "a": (H, N, R), "b": (H, R, M), "o": (H * M, 8)},
        [S(B, D)],
        {"u": (1, H * N), "a": (H, 1, R), "b": (H, 1, M), "o": (1, 8)},
    )


def noisy_clipped_kernel_of_each_head():
    """Noise is added to the kernel of each head, which is then clipped."""
    B, D, H, N, M = 7, 6, 3, 5, 4

    def loss(p, x, noise):
        h = jax.nn.relu(x @ p["u"]).reshape(-1, H, N)
        kernel = jnp.clip(p["w"] + 0.1 * noise, -1.0, 1.0)
        y = jnp.einsum("bhn,hnm->bhm", h, kernel).reshape(-1, H * M)
        return jnp.square(jnp.tanh(y) @ p["o"]).mean()

    return (
        loss,
        {"u": (D, H * N), "w": (H, N, M), "o": (H * M, 8)},
        [S(B, D), S(H, N, M)],
        {"u": (1, H * N), "w": (H, 1, M), "o": (1, 8)},
    )


def kernel_scaled_by_output_then_exp():
    """The exponential of a kernel whose outputs are scaled by a net."""
    B, D, F, Z = 7, 6, 5, 4

    def loss(p, x, z):
        kernel = jnp.exp(p["w"] * (z @ p["s"])[:, None, :])
        h = jnp.tanh(jnp.einsum("bd,bdf->bf", x, kernel))
        return jnp.square(h @ p["o"]).mean()

    return (
        loss,
        {"w": (D, F), "s": (Z, F), "o": (F, 3)},
        [S(B, D), S(B, Z)],
        {"w": (1, F), "s": (1, F), "o": (1, 3)},
    )


def relational_graph_convolution_in_a_loop():
    """A loop over relations, with edges of their own (R-GCN)."""
    N, M, R, D, F = 9, 7, 3, 6, 5

    def loss(p, x, src, dst):
        out = x @ p["s"]
        for r in range(R):
            out = out + jax.ops.segment_sum(x[src[r]] @ p["w"][r], dst[r], N)
        return jnp.square(jax.nn.relu(out) @ p["o"]).mean()

    return (
        loss,
        {"s": (D, F), "w": (R, D, F), "o": (F, 2)},
        [S(N, D), I(R, M), I(R, M)],
        {"s": (1, F), "w": (R, 1, F), "o": (1, 2)},
    )


def routed_linear_experts_in_a_loop():
    """A loop over linear experts, each with tokens of its own."""
    B, C, E, D, F = 12, 4, 3, 6, 5

    def loss(p, x, tokens):
        y = jnp.zeros((B, F))
        for e in range(E):
            y = y.at[tokens[e]].add(x[tokens[e]] @ p["w"][e])
        return jnp.square(jax.nn.relu(y + p["b"]) @ p["o"]).mean()

    return (
        loss,
        {"w": (E, D, F), "b": (F,), "o": (F, 2)},
        [S(B, D), I(E, C)],
        {"w": (E, 1, F), "b": (F,), "o": (1, 2)},
    )


def bilinear_fusion_of_regions_and_question():
    """A bilinear layer of each image region and the question."""
    B, T, D, Q, I_, J, O = 2, 6, 9, 8, 5, 7, 3

    def loss(p, x, y):
        a, q = jnp.tanh(x @ p["a"]), jnp.tanh(y @ p["q"])
        z = jnp.einsum("bti,oij,bj->bto", a, p["w"], q)
        return jnp.square(jax.nn.relu(z) @ p["o"]).mean()

    return (
        loss,
        {"a": (D, I_), "q": (Q, J), "w": (O, I_, J), "o": (O, 4)},
        [S(B, T, D), S(B, Q)],
        {"a": (1, I_), "q": (1, J), "w": [(O, 1, 1), (O, 1, J), (O, I_, 1)], "o": (1, 4)},
    )


def edge_matrices_on_vector_features():
    """An edge network makes a matrix (out, in) for each edge, applied to vectors."""
    N, M, C, I_, O, Q, P = 9, 10, 4, 5, 6, 7, 8

    def loss(p, x, edge, src, dst):
        v = jnp.einsum("ncm,ci->nim", x, p["v"])
        matrix = (jax.nn.relu(edge @ p["e1"]) @ p["e2"]).reshape(M, O, I_)
        message = jnp.einsum("eoi,eim->eom", matrix, v[src])
        out = jax.ops.segment_sum(message, dst, N)
        return jnp.square(jnp.sqrt(jnp.square(out).sum(-1) + 1e-6) @ p["o"]).mean()

    return (
        loss,
        {"v": (C, I_), "e1": (Q, P), "e2": (P, O * I_), "o": (O, 2)},
        [S(N, C, 3), S(M, Q), I(M), I(M)],
        {"v": (1, I_), "e1": (1, P), "e2": (1, O * I_), "o": (1, 2)},
    )


def maxout_on_learned_embeddings():
    """A maxout net on parameters, which makes the bias of each layer."""
    B, L, Z, F, D = 8, 3, 5, 7, 6

    def loss(p, x):
        h = (p["e"] @ p["w1"]).reshape(L, F, 2).max(-1)
        b = h @ p["w2"]
        for i in range(L):
            x = jnp.tanh(x @ p["k"][i] + b[i])
        return jnp.square(x @ p["o"]).mean()

    return (
        loss,
        {"e": (L, Z), "w1": (Z, 2 * F), "w2": (F, D), "k": (L, D, D), "o": (D, 2)},
        [S(B, D)],
        {"e": [(L, 1), (L, Z)], "w1": (1, 2 * F), "w2": (1, D), "k": (L, 1, D), "o": (1, 2)},
    )


def bilinear_gate_on_learned_embeddings():
    """A bilinear gate on parameters, which makes the bias of each layer."""
    B, L, Z, F, D = 8, 3, 5, 7, 6

    def loss(p, x):
        bias = ((p["e"] @ p["a"]) * (p["e"] @ p["b"])) @ p["w"]
        for i in range(L):
            x = jnp.tanh(x @ p["k"][i] + bias[i])
        return jnp.square(x @ p["o"]).mean()

    return (
        loss,
        {"e": (L, Z), "a": (Z, F), "b": (Z, F), "w": (F, D), "k": (L, D, D), "o": (D, 2)},
        [S(B, D)],
        {"e": [(L, 1), (L, Z)], "a": (1, F), "b": (1, F), "w": (1, D), "k": (L, 1, D), "o": (1, 2)},
    )


def start_token_written_into_data():
    """A learned start token, written over the first place of the targets."""
    B, T, D, F = 3, 6, 5, 7

    def loss(p, y):
        start = jnp.broadcast_to(p["s"], (B, 1, D))
        shifted = lax.dynamic_update_slice(jnp.roll(y, 1, axis=1), start, (0, 0, 0))
        out = jnp.tanh(shifted @ p["w"]) @ p["o"]
        return jnp.square(out - y).mean()

    return (
        loss,
        {"s": (D,), "w": (D, F), "o": (F, D)},
        [S(B, T, D)],
        {"s": (D,), "w": (1, F), "o": (1, D)},
    )


def binarised_values_of_a_shared_key():
    """The key is also the value, binarised by a custom_vjp with a comparison."""
    B, T, D, H, N = 2, 6, 9, 3, 4

    @jax.custom_vjp
    def binary(y):
        return jnp.where(y >= 0, 1.0, -1.0)

    binary.defvjp(lambda y: (binary(y), y), lambda y, g: (g * (jnp.abs(y) <= 1),))

    def loss(p, x):
        q, k = ((x @ p[name]).reshape(B, T, H, N) for name in "qk")
        weights = jax.nn.softmax(jnp.einsum("bthn,bshn->bhts", q, k))
        y = jnp.einsum("bhts,bshn->bthn", weights, binary(k)).reshape(B, T, H * N)
        return jnp.square(jnp.tanh(y @ p["o"])).mean()

    return (
        loss,
        {"q": (D, H * N), "k": (D, H * N), "o": (H * N, 5)},
        [S(B, T, D)],
        {"q": (1, H), "k": (1, H * N), "o": (1, 5)},
    )


def missing_inputs_nansum():
    """A linear layer on inputs with missing numbers, by nansum."""
    B, D, F = 8, 6, 5

    def loss(p, x):
        h = jax.nn.leaky_relu(jnp.nansum(x[:, :, None] * p["w"], axis=1))
        return jnp.square(h @ p["o"]).mean()

    return loss, {"w": (D, F), "o": (F, 3)}, [S(B, D)], {"w": (1, F), "o": (1, 3)}


def weight_generator_1x1_oihw():
    """A 1x1 convolution whose kernel (OIHW) is made from a support set."""
    B, C, Z, O, X = 4, 6, 5, 3, 8

    def loss(p, image, z):
        conv = lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        kernel = (z @ p["g"]).reshape(O, C, 1, 1)
        h = jax.nn.relu(conv(image, p["c"]))
        return jnp.square(jax.nn.relu(conv(h, kernel)).mean((2, 3)) @ p["o"]).mean()

    return (
        loss,
        {"c": (C, 2, 3, 3), "g": (Z, O * C), "o": (O, 7)},
        [S(B, 2, X, X), S(Z)],
        {"c": (C, 1, 1, 1), "g": (1, O * C), "o": (1, 7)},
    )


def hypernetwork_of_an_implicit_image():
    """A hypernetwork makes a coordinate net, with kernels (out, in), for many points."""
    B, T, Z, P, O1, O2 = 3, 8, 5, 9, 6, 4

    def loss(p, z, points, image):
        h = jax.nn.relu(z @ p["g1"])
        first, second = (h @ p["g2"]).reshape(B, O1, 2), (h @ p["g3"]).reshape(B, O2, O1)
        y = jnp.sin(jnp.einsum("boi,bti->bto", first, points))
        y = jnp.sin(jnp.einsum("boi,bti->bto", second, y))
        return jnp.square(y @ p["o"] - image).mean()

    return (
        loss,
        {"g1": (Z, P), "g2": (P, O1 * 2), "g3": (P, O2 * O1), "o": (O2, 3)},
        [S(B, Z), S(B, T, 2), S(B, T, 3)],
        {"g1": (1, P), "g2": (1, O1 * 2), "g3": (1, O2 * O1), "o": (1, 3)},
    )


def equinox_while_loop():
    """A neural ODE in Equinox's while loop, which diffrax uses."""
    B, D, N, F = 4, 6, 5, 7

    def loss(p, x):
        field = lambda y: jnp.tanh(y @ p["u"] + p["b"]) @ p["w"]
        step = lambda carry: (carry[0] + 0.1, carry[1] + 0.1 * field(carry[1]))
        first = jnp.array(0.0), jnp.tanh(x @ p["in"])
        _, y = while_loop(
            lambda carry: carry[0] < 1.0, step, first, max_steps=16, kind="checkpointed"
        )
        return jnp.square(y @ p["o"]).mean()

    return (
        loss,
        {"in": (D, N), "u": (N, F), "b": (F,), "w": (F, N), "o": (N, 3)},
        [S(B, D)],
        {"in": (1, N), "u": (1, F), "b": (F,), "w": (1, N), "o": (1, 3)},
    )


def dirichlet_autoencoder():
    """An autoencoder with Dirichlet latents, which JAX reparametrises."""
    B, D, F, K = 4, 8, 6, 5

    def loss(p, x):
        alpha = jax.nn.softplus(jax.nn.relu(x @ p["u"]) @ p["w"]) + 1e-3
        z = jax.random.dirichlet(jax.random.key(0), alpha)
        return -(x * jax.nn.log_softmax(z @ p["topics"])).sum(-1).mean() + jnp.square(alpha).mean()

    return (
        loss,
        {"u": (D, F), "w": (F, K), "topics": (K, D)},
        [S(B, D)],
        {"u": (1, F), "w": (1, K), "topics": (1, D)},
    )


def graph_convolution_by_bcoo():
    """A graph convolution with a sparse adjacency matrix."""
    N, M, D, F = 9, 13, 6, 5

    def loss(p, x, data, indices):
        adjacency = sparse.BCOO((data, indices), shape=(N, N))
        h = jax.nn.relu(adjacency @ (x @ p["w"]) + p["b"])
        return jnp.square(adjacency @ (h @ p["u"])).mean()

    return (
        loss,
        {"w": (D, F), "b": (F,), "u": (F, 3)},
        [S(N, D), S(M), I(M, 2)],
        {"w": (1, F), "b": (F,), "u": (1, 3)},
    )


def binary_kernel_by_custom_vjp():
    """A binary kernel with a straight-through gradient (BinaryConnect)."""
    B, D, F = 8, 6, 5

    @jax.custom_vjp
    def binary(w):
        return jnp.where(w >= 0, 1.0, -1.0)

    binary.defvjp(lambda w: (binary(w), w), lambda w, g: (g * (jnp.abs(w) <= 1),))

    def loss(p, x):
        return jnp.square(jax.nn.relu(x @ binary(p["w"]) + p["b"]) @ p["o"]).mean()

    return (
        loss,
        {"w": (D, F), "b": (F,), "o": (F, 3)},
        [S(B, D)],
        {"w": (1, F), "b": (F,), "o": (1, 3)},
    )


def scores_of_a_supermask():
    """Frozen kernels, and scores that choose among their weights (Ramanujan et al. 2020)."""
    B, D, F = 8, 6, 5

    @jax.custom_vjp
    def kept(scores):
        return (scores > 0).astype(scores.dtype)

    kept.defvjp(lambda s: (kept(s), None), lambda _, g: (g,))

    def loss(p, x, w, o):
        h = jax.nn.relu(x @ (w * kept(p["s"])))
        return jnp.square(h @ (o * kept(p["t"]))).mean()

    return loss, {"s": (D, F), "t": (F, 3)}, [S(B, D), S(D, F), S(F, 3)], {"s": (1, F), "t": (1, 3)}


def nonnegative_matrix_factorisation():
    """Non-negative factors: softplus of rows of two tables."""
    B, U, V, N = 6, 11, 13, 5

    def loss(p, i, j, rating):
        u, v = jax.nn.softplus(p["u"][i]), jax.nn.softplus(p["v"][j])
        return jnp.square((u * v).sum(-1) - rating).mean()

    return loss, {"u": (U, N), "v": (V, N)}, [I(B), I(B), S(B)], {"u": (U, 1), "v": (V, 1)}


def pixelcnn_mask_by_set():
    """A causal filter whose later taps are set to 0."""

    def loss(p, x):
        masked = p["w"].at[1, 2:].set(0.0).at[2:].set(0.0)
        dims = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, masked, (1, 1), "SAME", dimension_numbers=dims)
        return jnp.square(jax.nn.relu(y) @ p["o"]).mean()

    shapes = {"w": (3, 3, 4, 7), "o": (7, 3)}
    return loss, shapes, [S(2, 8, 8, 4)], {"w": (1, 1, 1, 7), "o": (1, 3)}


def item_model_without_self_connections():
    loss = lambda p, x: jnp.square(x @ jnp.fill_diagonal(p["w"], 0.0, inplace=False) - x).mean()
    return loss, {"w": (6, 6)}, [S(4, 6)], {"w": (1, 6)}


def gaussian_likelihood():
    """Summed over the outputs: a term for each."""

    def loss(p, x, y):
        mean, log_var = jnp.split(jax.nn.relu(x @ p["w"]) @ p["o"], 2, -1)
        return (jnp.exp(-log_var) * jnp.square(y - mean) + log_var).sum(-1).mean()

    return loss, {"w": (6, 7), "o": (7, 10)}, [S(4, 6), S(4, 5)], {"w": (1, 7), "o": (1, 10)}


def divergence_of_two_gaussians():
    """Posterior and prior are both learned, as in Dreamer."""

    def loss(p, x, y):
        m1, s1, m2, s2 = x @ p["m1"], x @ p["s1"], y @ p["m2"], y @ p["s2"]
        kl = s2 - s1 + (jnp.exp(2 * s1) + jnp.square(m1 - m2)) * jnp.exp(-2 * s2) / 2
        return kl.sum(-1).mean()

    names = ("m1", "s1", "m2", "s2")
    return loss, dict.fromkeys(names, (6, 5)), [S(4, 6), S(4, 6)], dict.fromkeys(names, (1, 5))


def experts_with_gated_errors():
    """Jacobs et al., 1991."""

    def loss(p, x, y):
        gate = jax.nn.softmax(x @ p["r"])
        mean = jnp.einsum("bd,edk->bek", x, p["w"])
        return (gate * jnp.square(y[:, None] - mean).sum(-1)).sum(-1).mean()

    shapes = {"r": (6, 3), "w": (3, 6, 5)}
    return loss, shapes, [S(4, 6), S(4, 5)], {"r": (1, 3), "w": (3, 1, 5)}


def losses_of_tasks_weighted_by_a_net():
    def loss(p, x, y):
        out = jnp.einsum("bd,tdk->btk", jax.nn.relu(x @ p["w"]), p["t"])
        weights = jax.nn.softmax((x @ p["g"]).mean(0))
        return (weights * jnp.square(out - y).mean((0, 2))).sum()

    shapes = {"w": (6, 7), "t": (3, 7, 5), "g": (6, 3)}
    return loss, shapes, [S(4, 6), S(4, 3, 5)], {"w": (1, 7), "t": (3, 1, 5), "g": (1, 3)}


MODELS = [
    gaussian_likelihood,
    divergence_of_two_gaussians,
    experts_with_gated_errors,
    losses_of_tasks_weighted_by_a_net,
    pixelcnn_mask_by_set,
    item_model_without_self_connections,
    heteroscedastic_ensemble,
    task_conditioned_hypernetwork_out_in,
    advantage_weighted_twin_critics,
    mixture_of_scalar_experts,
    multi_gate_experts_on_sequences,
    multi_task_tensor_factorisation,
    low_rank_kernel_of_each_head,
    noisy_clipped_kernel_of_each_head,
    kernel_scaled_by_output_then_exp,
    relational_graph_convolution_in_a_loop,
    routed_linear_experts_in_a_loop,
    bilinear_fusion_of_regions_and_question,
    edge_matrices_on_vector_features,
    maxout_on_learned_embeddings,
    bilinear_gate_on_learned_embeddings,
    start_token_written_into_data,
    binarised_values_of_a_shared_key,
    missing_inputs_nansum,
    weight_generator_1x1_oihw,
    hypernetwork_of_an_implicit_image,
    equinox_while_loop,
    dirichlet_autoencoder,
    graph_convolution_by_bcoo,
    binary_kernel_by_custom_vjp,
    scores_of_a_supermask,
    nonnegative_matrix_factorisation,
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_outputs_that_act_apart_are_not_joined(model):
    """Where an expected grid is a list, any of them is right."""
    loss, shapes, args, expected = model()
    params = {name: S(*shape) for name, shape in shapes.items()}
    specs = infer_block_specs(loss, params, *args, v="mean")
    found = {name: specs[name].grid(shape) for name, shape in shapes.items()}
    either = lambda grids: grids if isinstance(grids, list) else [grids]
    assert not {
        n: (found[n], grids) for n, grids in expected.items() if found[n] not in either(grids)
    }


def test_an_index_makes_no_matrix_of_an_output_head():
    """The best logits choose tokens for a second pass, and no gradient comes back through them."""

    def loss(p, x, y):
        logits = jnp.tanh(x @ p["a"]) @ p["head"]
        again = jnp.tanh(p["e"][lax.top_k(logits, 2)[1]].mean(1) @ p["w"]) @ p["o"]
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1)
        return jnp.square(again).mean() - own.mean()

    shapes = {"a": (6, 7), "head": (7, 11), "e": (11, 5), "w": (5, 8), "o": (8, 3)}
    params = {name: S(*shape) for name, shape in shapes.items()}
    found = infer_muon_dimension_numbers(loss, params, S(4, 6), I(4))
    assert [name for name, numbers in found.items() if numbers] == ["a", "w"]


@pytest.mark.parametrize("square", [jnp.square, lambda x: x * x])
def test_a_squared_sum_is_an_inner_product(square):
    """The score of two towers, of which the loss is no sum."""
    loss = lambda p, x: square(((x @ p["a"]) * (x @ p["b"])).sum(-1)).mean()
    params = {name: S(6, 5) for name in "ab"}
    specs = infer_block_specs(loss, params, S(4, 6), v="mean")
    assert [specs[name].grid((6, 5)) for name in "ab"] == [(1, 1)] * 2


def gated(score):
    return jnp.where(1 - score > 0, 1 - score, 0.0)


@pytest.mark.parametrize("act", [gated, jax.nn.leaky_relu, lambda score: jnp.maximum(1 - score, 0)])
def test_a_gate_of_a_score_is_not_a_sum(act):
    loss = lambda p, x: act((jnp.tanh(x @ p["a"]) * jnp.tanh(x @ p["b"])).sum(-1)).mean()
    params = {name: S(6, 5) for name in "ab"}
    specs = infer_block_specs(loss, params, S(4, 6), v="mean")
    assert [specs[name].grid((6, 5)) for name in "ab"] == [(1, 1)] * 2


def test_a_score_whose_derivative_is_used_is_an_inner_product():
    """A projection critic with a gradient penalty."""

    def loss(p, x, y):
        critic = lambda x, y: (jnp.tanh(x @ p["a"]) * jnp.tanh(y @ p["b"])).sum()
        slope = jnp.linalg.norm(jax.vmap(jax.grad(critic))(x, y), axis=-1)
        return jax.vmap(critic)(x, y).mean() + jnp.square(slope - 1).mean()

    params = {name: S(6, 5) for name in "ab"}
    specs = infer_block_specs(loss, params, S(4, 6), S(4, 6), v="mean")
    assert [specs[name].grid((6, 5)) for name in "ab"] == [(1, 1)] * 2


def test_a_cosine_similarity_that_the_loss_sums_joins_nothing():
    """BYOL and SimSiam."""
    cosine = optax.losses.cosine_similarity
    loss = lambda p, x: -cosine(jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"]), epsilon=1e-6).mean()
    params = {name: S(6, 5) for name in "ab"}
    specs = infer_block_specs(loss, params, S(4, 6), v="mean")
    assert [specs[name].grid((6, 5)) for name in "ab"] == [(1, 5)] * 2
