import pytest

from benchmarks.memory.state import MODELS, memory


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_adamws_memory_is_the_papers_and_adam_minis_half(model):
    _, adamw, mini = memory(model.config)
    assert adamw / 1e9 == pytest.approx(model.paper_adamw, rel=2e-3)
    assert 0.5 < mini / adamw < 0.5005
