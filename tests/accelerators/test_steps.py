import pytest

from benchmarks.memory.fits import OPTIMIZERS, Case, compiled
from benchmarks.memory.scale import Case as OnMesh
from benchmarks.memory.scale import measure, row_of
from tests.accelerators.conftest import needs_compiler

pytestmark = pytest.mark.slow
ADAMW, MEAN, OUTER, INT8 = list(OPTIMIZERS)[:4]


@pytest.mark.parametrize("topology", ["v5e:2x4", "h100:2"])
@pytest.mark.parametrize("model", ["gpt2", "tinyllama-1b"])
def test_the_examples_steps_compile_and_half_of_the_state_is_saved(model, topology):
    needs_compiler(topology)
    adamw, outer, int8 = rows = [
        compiled(Case(model, topology, name, 512, 1)) for name in (ADAMW, OUTER, INT8)
    ]
    assert outer["state"] <= 0.51 * adamw["state"]
    assert int8["state"] <= 0.13 * adamw["state"]
    for row in rows:
        assert row["fits"]
        # The gradients at least, of which parts are summed over devices.
        assert row["temporaries"] > 0.5 * row["parameters"]
    # What stands for nothing in 8 bits must not keep an array of zeros. (Those of a TPU are on the
    # chip, too.)
    if topology.startswith("h100"):
        assert int8["temporaries"] <= 1.01 * outer["temporaries"]


def test_llama2_7b_fits_on_eight_v5e_with_adam_mini_alone():
    """The compiler refuses AdamW's step at its ordinary effort; Adam-mini's fits at its least."""
    needs_compiler("v5e:2x4")
    case = Case("llama2-7b", "v5e:2x4", ADAMW, 2048, 1)
    adamw, mini = compiled(case._replace(effort=0.0)), compiled(case._replace(optimizer=MEAN))
    assert not adamw["fits"]
    assert adamw["parameters"] + adamw["state"] < adamw["memory"] < adamw["total"]
    assert mini["fits"]


@pytest.mark.parametrize("case", ["llama2-7b:8x2@v5e:4x4"])
def test_nothing_is_gathered_on_a_mesh(case):
    case = OnMesh.parse(case)
    needs_compiler(case.topology)
    found = measure(case, "outputs")
    assert found["AdamW"].collectives == {}
    rows = {name: row_of(case, name, found) for name in found}  # an error where one is
    assert rows["Adam-mini"]["collective_share"] <= 1e-4
    assert rows["outer"]["collective_share"] <= 3e-4
