"""CAME against steps computed by hand, with the sums of the paper's Algorithm 2."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.quality.came import scale_by_came

B1, B2, B3, EPS = 0.9, 0.999, 0.9999, (1e-30, 1e-16)


def by_hand(gradients, clip_threshold=1.0):
    """The paper's lines 4 to 16 for one matrix, in float64, with its sums of rows and columns."""
    rows, columns = gradients[0].shape
    r, c, big_r, big_c = np.zeros(rows), np.zeros(columns), np.zeros(rows), np.zeros(columns)
    m = np.zeros((rows, columns))
    steps = []
    for g in np.asarray(gradients, np.float64):
        square = g**2 + EPS[0]
        r = B2 * r + (1 - B2) * square.sum(1)
        c = B2 * c + (1 - B2) * square.sum(0)
        u = g / np.sqrt(np.outer(r, c) / r.sum())
        u = u / max(1.0, np.sqrt((u**2).mean()) / clip_threshold)
        m = B1 * m + (1 - B1) * u
        distance = (u - m) ** 2 + EPS[1]
        big_r = B3 * big_r + (1 - B3) * distance.sum(1)
        big_c = B3 * big_c + (1 - B3) * distance.sum(0)
        steps.append(m / np.sqrt(np.outer(big_r, big_c) / big_r.sum()))
    return steps


def run(gradients, **options):
    tx = scale_by_came(B1, B2, B3, EPS, **options)
    state = tx.init(gradients[0])
    steps = []
    for g in gradients:
        step, state = jax.jit(tx.update)(g, state)
        steps.append(step)
    return steps


@pytest.mark.parametrize("clip_threshold", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_steps_of_a_matrix_equal_the_papers_algorithm(shape, clip_threshold):
    gradients = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    found = run(list(map(jnp.asarray, gradients)), clip_threshold=clip_threshold)
    np.testing.assert_allclose(found, by_hand(gradients, clip_threshold), rtol=2e-4)


def test_first_step_of_one_row_in_closed_form():
    # With one gradient of magnitude a everywhere: u is its sign (clipped to an RMS of 1), m a tenth
    # of that, the distance 0.9 and its average 1e-4 * 0.81; so the step is 0.1 / 0.009.
    (step,) = run([jnp.asarray([[3.0, -3.0], [3.0, 3.0]])])
    np.testing.assert_allclose(step, np.array([[1, -1], [1, 1]]) * 0.1 / 0.009, rtol=1e-4)


def test_vector_keeps_a_full_second_moment_and_is_not_rescaled():
    gradients = np.random.default_rng(1).normal(size=(4, 7))
    found = run([jnp.asarray(g, jnp.float32) for g in gradients])
    v, m = np.zeros(7), np.zeros(7)
    for g, step in zip(gradients, found, strict=True):
        v = B2 * v + (1 - B2) * g**2
        u = g / np.sqrt(v)
        m = B1 * m + (1 - B1) * u / max(1.0, np.sqrt((u**2).mean()))
        np.testing.assert_allclose(step, m, rtol=1e-4)


def test_more_axes_are_a_stack_of_matrices():
    # The two largest axes are the matrix; the others stand apart but for the clipping.
    gradients = [np.random.default_rng(2).normal(size=(5, 2, 3)) for _ in range(3)]
    stacked = run([jnp.asarray(g, jnp.float32) for g in gradients], clip_threshold=1e9)
    for index in range(2):
        alone = by_hand([g[:, index] for g in gradients], clip_threshold=1e9)
        np.testing.assert_allclose([s[:, index] for s in stacked], alone, rtol=2e-4)


def test_state_is_one_momentum_and_factors():
    params = {"kernel": jnp.ones((30, 20)), "bias": jnp.ones(20), "conv": jnp.ones((3, 3, 8, 16))}
    state = scale_by_came().init(params)
    moments = {name: sum(x.size for x in jax.tree.leaves([state.nu[name], state.instability[name]]))
               for name in params}  # fmt: skip
    assert moments == {"kernel": 2 * 50, "bias": 20, "conv": 2 * 9 * 24}
    chex.assert_trees_all_equal_shapes(state.mu, params)


def test_zero_gradients_do_not_move():
    # Rows of 0, as of a dead unit, and a whole matrix of 0: nothing to divide by but eps.
    gradients = [jnp.asarray([[0.0, 0.0, 0.0], [1e-3, 2e-3, -1e-3]])] * 3 + [jnp.zeros((2, 3))] * 3
    steps = run(gradients)
    chex.assert_tree_all_finite(steps)
    assert not np.any([step[0] for step in steps])


def test_came_lowers_the_loss():
    tx = optax.chain(scale_by_came(), optax.scale_by_learning_rate(1e-3))
    target = jax.random.normal(jax.random.key(0), (8, 6))
    params = {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}
    loss = lambda p: jnp.mean((p["kernel"] + p["bias"] - target) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), float(loss(params))
    for _ in range(400):
        params, state = step(params, state)
    assert float(loss(params)) < 0.05 * start
