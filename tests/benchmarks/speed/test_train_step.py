import jax
import pytest

from benchmarks.speed import train_step
from benchmarks.speed.train_step import batch_in, compiled_step, step_bytes
from examples.common.optimizers import state_bytes


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, 4), (1099, 4), (1100, 5), (1399, 7), (2500, 18), (2555, 19)]
)
def test_the_greatest_batch_that_needs_no_more_is_found(limit, expected, monkeypatch):
    """Where a sequence takes 100 bytes, and 55 more for each 16th."""
    needs = lambda size: 600 + 100 * size + 55 * (size // 16)
    monkeypatch.setattr(train_step, "compiled_step", lambda name, optimizer, size: (0, 0, size))
    monkeypatch.setattr(train_step, "step_bytes", needs)
    assert batch_in("any", "adam_mini", limit, 4) == expected


@pytest.mark.slow
def test_bytes_of_a_step_have_the_state_of_its_optimizer(monkeypatch):
    """What else it needs is the same for both, where activations are most of it."""
    made = {name: compiled_step("GPT-2 nano", name, 16) for name in ("adamw", "adam_mini")}
    states = [
        state_bytes(jax.eval_shape(program.init).opt_state) for program, _, _ in made.values()
    ]
    saved = step_bytes(made["adamw"][2]) - step_bytes(made["adam_mini"][2])
    assert saved == pytest.approx(states[0] - states[1], rel=0.01)
