"""The compiled step: it lowers for every platform, and does per block what is the same in one."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_adam_mini import adam_mini, fused, per_head, per_neuron, per_token

LAYOUTS = {
    "wide": ((2048, 11008), per_neuron()),
    "stacked": ((2, 2048, 8192), per_neuron(stacked=0)),
    "heads": ((4096, 4096), per_head(32)),
    "head grid": ((768, 12, 64), per_neuron(1)),
    "tokens": ((5025, 768), per_token()),
    "fused": ((768, 2304), fused(-1, [(768, per_head(12)), (1536, per_neuron())])),
    "convolution": ((3, 3, 256, 256), per_neuron()),
}
each_layout = pytest.mark.parametrize(("shape", "spec"), LAYOUTS.values(), ids=LAYOUTS)


def jitted_step(shape, spec, dtype=jnp.float32, optimizer=adam_mini):
    options = {"block_specs": {"w": spec}} if optimizer is adam_mini else {}
    tx = optimizer(1e-3, weight_decay=0.1, mu_dtype=dtype, **options)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)), (params, state, params)


@each_layout
@pytest.mark.parametrize("platform", ["cuda", pytest.param("rocm", marks=pytest.mark.slow), "tpu"])
def test_the_step_lowers_without_custom_calls_or_loops(shape, spec, platform):
    step, args = jitted_step(shape, spec)
    module = jax.export.export(step, platforms=[platform])(*args).mlir_module()
    assert "stablehlo.custom_call" not in module
    assert "stablehlo.while" not in module


@each_layout
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_temporaries_of_the_step_are_small(shape, spec, dtype):
    step, args = jitted_step(shape, spec, dtype)
    memory = step.lower(*args).compile().memory_analysis()
    size = args[0]["w"].dtype.itemsize * args[0]["w"].size
    assert memory.temp_size_in_bytes <= 0.01 * size + 4096
    assert memory.alias_size_in_bytes >= 2 * size


@each_layout
def test_square_roots_and_divisions_are_per_block(shape, spec):
    step, args = jitted_step(shape, spec)
    hlo = step.lower(*args).compile().as_text()
    size = args[0]["w"].size
    blocks = args[1][0].nu["w"].size
    found = re.findall(
        r"= f32\[([\d,]*)\]\S* (?:sqrt|rsqrt|divide|power|exponential-minus-one)\(", hlo
    )
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in found]
    assert sizes
    assert max(sizes) == max(blocks, 1) < size


@each_layout
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_step_makes_as_many_passes_over_memory_as_adamw(shape, spec, dtype):
    """Over arrays of the parameters' size: the sum over blocks, mu, and the parameters. AdamW's
    has one for nu in place of the sum."""
    for optimizer in (adam_mini, optax.adamw):
        step, args = jitted_step(shape, spec, dtype, optimizer)
        assert passes(step.lower(*args).compile().as_text(), args[0]["w"].size) == 3


def passes(hlo, size):
    """The instructions that run, and read or write an array of so many numbers."""
    found = []
    large = set()
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        parts = re.match(r" +(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*?)\)", line)
        if not parts:
            continue
        name, result, opcode, operands = parts.groups()
        dims = re.findall(r"\w+\[([\d,]*)\]", result)
        is_large = any(math.prod(int(n) for n in d.split(",") if n) == size for d in dims)
        if is_large:
            large.add(name)
        reads = large & set(re.findall(r"%([\w.-]+)", operands))
        if opcode not in NO_WORK and (is_large or reads):
            found.append(name)
    return len(found)


NO_WORK = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}


def test_long_rows_are_added_in_a_loop_on_cpu():
    for name in ("wide", "stacked"):
        step, args = jitted_step(*LAYOUTS[name])
        assert " while(" in step.lower(*args).compile().as_text()
