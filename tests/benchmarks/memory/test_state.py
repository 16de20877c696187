import pytest

from benchmarks.memory.state import MODELS, memory


@pytest.mark.parametrize(
    "model",
    [*MODELS[:3], *(pytest.param(model, marks=pytest.mark.slow) for model in MODELS[3:])],
    ids=lambda model: model.name,
)
def test_adamws_memory_is_the_papers_and_adam_minis_half(model):
    _, adamw, mean, outer, mean_int8, outer_int8, muon, muon_int8 = memory(model.config)
    if model.paper_adamw is not None:
        assert adamw / 1e9 == pytest.approx(model.paper_adamw, rel=2e-3)
    assert 0.5 < mean / adamw < 0.5006
    assert mean < outer < 0.503 * adamw
    assert 0.125 < mean_int8 / adamw < outer_int8 / adamw < 0.128
    assert 0.5 < muon / adamw < 0.503
    assert 0.125 < muon_int8 / adamw < 0.128
    if "7B" in model.name:
        assert outer < 0.501 * adamw
