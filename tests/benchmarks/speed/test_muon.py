import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from benchmarks.speed.muon import Model, layers_apart, newton_schulz_flops

SHAPES = {"stack": (3, 64, 200), "kernel": (256, 96), "bias": (96,)}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
NUMBERS = {
    "stack": MuonDimensionNumbers(1, 2),
    "kernel": MuonDimensionNumbers(0, 1),
    "bias": None,
}
MODEL = Model(PARAMS, None, NUMBERS)


def test_flops_by_hand_are_those_of_the_compiler():
    matrices = {name: PARAMS[name] for name in ("stack", "kernel")}
    tx = scale_by_muon(weight_dimension_numbers={name: NUMBERS[name] for name in matrices})
    state = jax.eval_shape(tx.init, matrices)
    program = jax.jit(tx.update).lower(matrices, state).compile()
    flops = program.cost_analysis()["flops"]
    # Beside the products there are some for each entry.
    assert newton_schulz_flops(MODEL) == pytest.approx(flops, rel=0.03)
    assert newton_schulz_flops(MODEL) < flops


def test_stacks_are_sharded_by_layers_alone():
    mesh = jax.make_mesh((8, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    last = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    of_params = {"stack": last, "kernel": last, "bias": NamedSharding(mesh, PartitionSpec())}
    model = MODEL._replace(matrices={**NUMBERS, "kernel": None})
    assert layers_apart(model, of_params) == {
        **of_params,
        "stack": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
