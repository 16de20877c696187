import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.memory.scale import MODELS, Case, abstract_llama, collectives, measure, row_of
from examples.common.cli import ConfigError
from optax_adam_mini import adam_mini, opt_state_shardings, per_head


def compiled(fn, given, wanted, *shapes):
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    placed = lambda specs: tuple(NamedSharding(mesh, spec) for spec in specs)
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    jitted = jax.jit(fn, in_shardings=placed(given), out_shardings=placed(wanted)[0])
    return jitted.lower(*args).compile().as_text()


def test_collectives_are_counted_with_their_bytes():
    reduced = compiled(lambda x: jnp.sum(x, 0), [P("i")], [P()], (64, 32))
    assert collectives(reduced) == {"all-reduce": (1, 32 * 4)}
    gathered = compiled(lambda x: x.astype(jnp.bfloat16), [P("i")], [P()], (64, 32))
    ((count, size),) = [collectives(gathered)["all-gather"]]
    assert (count, size) in ((1, 64 * 32 * 2), (1, 64 * 32 * 4))  # before or after the cast
    assert collectives(compiled(lambda x: x + 1, [P("i")], [P("i")], (64, 32))) == {}


def test_several_results_of_one_collective_count():
    line = "  %r = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-start(%a, %b), channel_id=1"
    assert collectives(line) == {"all-reduce": (1, 4 * 4 + 6 * 2)}
    assert collectives("  %r = f32[4]{0} all-reduce-done(%a)") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nano:4x2", Case("nano", 4, 2)),
        ("nano:4x2@v5e:2x4", Case("nano", 4, 2, "v5e:2x4")),
    ],
)
def test_cases_on_the_command_line_are_parsed(text, expected):
    assert Case.parse(text) == expected
    for wrong in ("nano", "nano:4", "unknown:4x2", "nano:4x", "nano:4x2@"):
        with pytest.raises(ConfigError, match="MODEL:FSDPxTENSOR"):
            Case.parse(wrong)
    with pytest.raises(ConfigError, match="no topology"):
        Case.parse("nano:4x2@cpu")


@pytest.mark.slow
def test_a_step_that_gathers_a_matrix_is_refused():
    found = measure(Case("nano", 4, 2), "outputs")
    case, mini = Case("nano", 4, 2), found["outer"]
    assert row_of(case, "outer", found)["smallest_matrix_mb"] * 1e6 == mini.smallest_matrix
    with pytest.raises(RuntimeError, match="is one gathered"):
        row_of(case, "outer", {**found, "outer": mini._replace(largest=mini.smallest_matrix)})


def test_models_have_the_published_numbers_of_parameters():
    for name, expected in (("llama3-70b", 70_553_706_496), ("llama3-405b", 405_853_388_800)):
        params, _ = abstract_llama(MODELS[name])
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize(
    ("fsdp", "mesh"), [("outputs", (8, 1)), ("outputs", (4, 2)), ("width", (4, 2))]
)
@pytest.mark.slow
def test_the_update_of_llama2_7b_only_adds_sums_of_blocks(fsdp, mesh):
    found = measure(Case("llama2-7b", *mesh), fsdp)
    adamw, mini = found["AdamW"], found["Adam-mini"]
    assert adamw.collectives == {}
    # Gathered are one number for each head: an axis that the parameter does not have is not sharded.
    assert set(mini.collectives) <= {"all-reduce", "all-gather"}
    assert sum(size for _, size in mini.collectives.values()) <= 1e-4 * mini.param_bytes
    assert mini.state_bytes <= 0.502 * adamw.state_bytes
    assert mini.temporary_bytes <= 0.01 * mini.param_bytes / 8
    outer = found["outer"]  # which sums over inputs and over outputs: over both axes of the mesh
    assert set(outer.collectives) <= {"all-reduce", "all-gather"}
    assert sum(size for _, size in outer.collectives.values()) <= 3e-4 * outer.param_bytes
    assert outer.state_bytes <= 0.503 * adamw.state_bytes


def test_heads_over_the_borders_of_shards_gather_sums_alone():
    """3 heads of 8 features over 8 devices: what is gathered are sums, one for each feature."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    params = jax.ShapeDtypeStruct((64, 24), "float32")
    tx = adam_mini(1e-3, block_specs=per_head(3))
    of_param = NamedSharding(mesh, P(None, "fsdp"))
    of_state = opt_state_shardings(tx, params, of_param)
    update = jax.jit(
        tx.update, in_shardings=(of_param, of_state, of_param), out_shardings=(of_param, of_state)
    )
    hlo = update.lower(params, jax.eval_shape(tx.init, params), params).compile().as_text()
    assert sum(size for _, size in collectives(hlo).values()) <= 2 * 24 * 4
