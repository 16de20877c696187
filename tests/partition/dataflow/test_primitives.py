"""Every primitive of JAX, on a parameter or what is made of it: blocks, or an error that says where."""

import functools
import importlib
import inspect
import re
import sys
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import pytest
from jax import lax
from jax._src.interpreters import mlir
from jax._src.lax import lax as lax_internal
from jax._src.lax.windowed_reductions import _select_and_scatter
from jax._src.state.discharge import run_state
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import custom_jvp, custom_vjp, linear_call
from jax.experimental import (
    buffer_callback,
    checkify,
    compute_on,
    io_callback,
    layout,
    xla_metadata,
)
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_adam_mini import explain, infer_block_specs, infer_muon_dimension_numbers, per_element

ROWS, COLUMNS = 4, 6  # of the array that every program is given


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


# --- programs, by the primitive that they are about -----------------------------------------------


def integers(y):
    return lax.bitcast_convert_type(y, jnp.int32)


def indices(y, size=4):
    """One for each row, which depends on the array."""
    return jnp.clip(y[:, 0], 0, size - 1).astype(jnp.int32)


def square(y):
    return y[:, : y.shape[0]]


def mixed(fn):
    """A function of two arrays, of this one and a constant either way round, and of this one twice."""
    return lambda y: (fn(y, jnp.ones_like(y)), fn(jnp.ones_like(y), y), fn(y, y[::-1]))


def mesh(kind):
    return jax.make_mesh((2,), ("i",), axis_types=(kind,))


BY_ROWS = P("i")


def on_devices(body, own=BY_ROWS, out=BY_ROWS, kind=jax.sharding.AxisType.Auto, **options):
    """Each of two devices has a part of the array."""
    return lambda y: jax.shard_map(
        body, mesh=mesh(kind), in_specs=own, out_specs=out, **options
    )(y)  # fmt: skip


def windows(y, init, computation):
    return lax.reduce_window(y, init, computation, (2, 2), (2, 2), "SAME")


def pooled(y):
    return windows(y, -jnp.inf, lax.max)


def gradient(fn):
    return lambda y: jax.grad(lambda y: jnp.sum(jnp.sin(fn(y))))(y)


def tangent(fn):
    return lambda y: jax.jvp(fn, (y,), (jnp.cos(y),))


@custom_jvp
def own_tangent(y):
    return jnp.round(y)


own_tangent.defjvp(lambda primals, tangents: (jnp.round(*primals), tangents[0]))


@custom_vjp
def own_gradient(y):
    return jnp.round(y)


own_gradient.defvjp(lambda y: (jnp.round(y), y), lambda y, g: (g * y,))

remat_gradient = custom_vjp(lambda y: jnp.sin(y))
remat_gradient.defvjp(lambda y: (jnp.sin(y), y), lambda y, g: (g * y,), optimize_remat=True)


@jax.custom_batching.custom_vmap
def own_vmap(y):
    return jnp.sin(y)


@own_vmap.def_vmap
def _(size, in_batched, y):
    return jnp.sin(y), True


@custom_partitioning
def partitioned(y):
    return jnp.sin(y)


partitioned.def_partition(
    partition=lambda *args: None,
    infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding,
    sharding_rule="i j -> i j",
)


def kernel(y_ref, out_ref):
    out_ref[...] = y_ref[...] * 2


def in_pallas(y):
    return pl.pallas_call(kernel, out_shape=shape(*y.shape))(y)


def called_back(y):
    return jax.pure_callback(lambda y: y, shape(*y.shape), y)


def in_a_ref(y):
    ref = jax.new_ref(y)
    ref[0] = ref[1] * 2
    ref[2] += 1
    return ref[...]


def in_an_empty_ref(y):
    ref = jax.empty_ref(shape(*y.shape))
    ref[...] = y
    return jax.freeze(ref)


def count_up(ref):
    ref[...] = ref[...] + 1


def after_a_token(y):
    lax.after_all(lax.create_token(), lax.create_token())
    return y


def by_scaled_matmul(y):
    x = jnp.tile(y, (1, 16)).reshape(1, 4, 96).astype("float8_e4m3fn")
    scales = jnp.ones((1, 4, 3), "float8_e8m0fnu")
    return jax.nn.scaled_matmul(x, x, scales, scales)


def printed(y):
    jax.debug.print("{y}", y=y)
    return y


def watched(y):
    jax.debug.callback(lambda y: None, y)
    return y


def inspected(y):
    jax.debug.inspect_array_sharding(y, callback=lambda sharding: None)
    return y


def checked(y):
    checkify.debug_check(jnp.all(y > 0), "positive")
    return y


def errors(y):
    _, y = checkify.checkify(checked)(y)
    return y * 2


def while_larger(y):
    return lax.while_loop(lambda y: jnp.sum(y) > 1, lambda y: y / 2, y)


def key(y):
    return jax.random.wrap_key_data(lax.bitcast_convert_type(y[0, :2], jnp.uint32))


CUDNN = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"


def by_cudnn(y):
    """cuDNN's attention of three projections, for which it need not be installed."""
    x = jnp.stack([y, y + 1, y * 2]).astype("bfloat16").reshape(3, 1, ROWS, 1, COLUMNS)
    x = jnp.pad(x, [(0, 0)] * 4 + [(0, 2)])
    with mock.patch(CUDNN, return_value=91300):
        return jax.nn.dot_product_attention(*x, implementation="cudnn").astype("float32")


def stale_gather(y, **options):
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return lax.gather(y, indices(y)[:, None], numbers, (1, y.shape[1]), **options)


def diagonal(y):
    """Each row's own element: the rows are a batch of the indices."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(), collapsed_slice_dims=(1,), start_index_map=(1,),
        operand_batching_dims=(0,), start_indices_batching_dims=(0,),
    )  # fmt: skip
    return lax.gather(y, jnp.arange(y.shape[0])[:, None], numbers, (1, 1))


def ragged(y, numbers):
    sizes = jnp.asarray([1, y.shape[0] - 1], jnp.int32)
    return lax.ragged_dot_general(y, jnp.cos(y), sizes, numbers)


CONTRACTED = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def conv(y, w, **options):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(y, w, (1,), "SAME", dimension_numbers=numbers, **options)


def exported(y):
    fn = jax.export.export(jax.jit(lambda y: jnp.sin(y) * 2))(shape(*y.shape))
    return fn.call(y)


def polymorphic(y):
    sizes = jax.export.symbolic_shape("n, 6")
    fn = jax.export.export(jax.jit(lambda y: y * y.shape[0]))(shape(*sizes))
    return fn.call(y)


def linear(y):
    return linear_call(lambda r, y: y * r, lambda r, g: g * r, y, jnp.sin(y))


def solved(y):
    a = square(y) + 9 * jnp.eye(ROWS)
    solve = lambda matvec, b: jnp.linalg.solve(a, b)
    return lax.custom_linear_solve(lambda b: a @ b, y, solve, solve)


def rooted(y):
    solve = lambda f, guess: guess - f(guess)
    return lax.custom_root(lambda z: z**3 - y, y, solve, lambda g, b: b / g(jnp.ones_like(b)))


def each(names, make=lambda fn: fn):
    return {name: make(getattr(lax, name)) for name in names.split()}


UNARY = """abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf
erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh
sqrt square tan tanh"""
BINARY = """add atan2 div eq ge gt igamma igamma_grad_a igammac le lt max min mul ne nextafter
polygamma pow rem sub zeta"""
CUMULATIVE = "cumlogsumexp cummax cummin cumprod cumsum"
UNSIGNED = """mulhi shift_left shift_right_arithmetic shift_right_logical"""

PROGRAMS = {
    **{  # of a total order, as in sorting
        name: mixed(getattr(lax_internal, f"{name}_p").bind) for name in ("eq_to", "le_to", "lt_to")
    },
    # Element by element
    **each(UNARY),
    **each(BINARY, mixed),
    **each("clz population_count", lambda fn: lambda y: fn(integers(y))),
    **each(UNSIGNED, lambda fn: mixed(lambda a, b: fn(integers(a), integers(b)))),
    "and": mixed(lambda a, b: integers(a) & integers(b)),
    "or": mixed(lambda a, b: (a > 0) | (b > 0)),
    "xor": mixed(lambda a, b: integers(a) ^ integers(b)),
    "not": lambda y: ~(y > 0),
    "integer_pow": lambda y: y**3,
    "regularized_incomplete_beta": lambda y: lax.betainc(y, jnp.ones_like(y), y * 0.1),
    "clamp": lambda y: (lax.clamp(0.0, y, 1.0), lax.clamp(y, jnp.ones_like(y), y + 1)),
    "clamp: by a scalar of it": lambda y: lax.clamp(y[0, 0], y, y[1, 1]),
    "select_n": lambda y: (jnp.where(y > 0, y, 1), jnp.where(jnp.eye(*y.shape, dtype=bool), y, 0)),
    "select_n: by a scalar of it": lambda y: lax.select_n(y[0, 0] > 0, y, y * 2),
    "select_n: of integers": lambda y: lax.select_n(integers(y) & 1, y, y * 2),
    "reduce_precision": lambda y: lax.reduce_precision(y, 5, 10),
    "convert_element_type": lambda y: (y.astype("bfloat16"), y.astype("int8"), y.astype(bool)),
    "bitcast_convert_type": integers,
    "bitcast_convert_type: to smaller": lambda y: lax.bitcast_convert_type(y, jnp.int8),
    "bitcast_convert_type: to larger": lambda y: lax.bitcast_convert_type(
        y.astype("bfloat16").reshape(ROWS, -1, 2), jnp.int32
    ),
    "stop_gradient": lax.stop_gradient,
    "copy": lambda y: jnp.array(y, copy=True),
    "complex": lambda y: lax.complex(y, y[::-1]),
    "conj": lambda y: lax.conj(lax.complex(y, y)),
    "real": lambda y: lax.real(lax.complex(y, y)),
    "imag": lambda y: lax.imag(lax.complex(y, y)),
    "add_any": gradient(lambda y: y * jnp.exp(y)),
    "name": lambda y: checkpoint_name(y, "y"),
    "optimization_barrier": lambda y: lax.optimization_barrier((y, y[::-1], jnp.ones(3))),
    "tie": lambda y: bound("tie", y[0], y * 2),
    "xla_metadata_value": lambda y: xla_metadata.set_xla_metadata(y, a="b"),
    "dce_sink": lambda y: (lax.dce_sink(y), y)[1],
    # Layout
    "transpose": lambda y: y.T,
    "reshape": lambda y: (y.reshape(2, -1), y.reshape(-1), y.reshape(3, 8)),
    "squeeze": lambda y: y[:, :1].squeeze(1),
    "broadcast_in_dim": lambda y: (
        jnp.broadcast_to(y, (3, *y.shape)), jnp.broadcast_to(y[:, :1], y.shape)
    ),
    "iota": lambda y: y * lax.iota("float32", y.shape[1]),
    "slice": lambda y: (y[1:3], y[:, ::2], y[0:0]),
    "rev": lambda y: y[::-1],
    "pad": lambda y: (
        lax.pad(y, 0.0, [(1, 2, 0), (0, 0, 1)]), lax.pad(y, 0.0, [(-1, 0, 0), (0, -2, 0)])
    ),
    "pad: to nothing": lambda y: lax.pad(y, 0.0, [(-2, -2, 0), (0, 0, 0)]),
    "pad: with itself": lambda y: lax.pad(jnp.ones_like(y), y[0, 0], [(1, 2, 0), (0, 0, 1)]),
    "concatenate": lambda y: (jnp.concatenate([y, y]), jnp.concatenate([y, jnp.ones((2, 6))])),
    "concatenate: with nothing": lambda y: jnp.concatenate([y, jnp.ones((0, 6))]),
    "concatenate: ones times it": lambda y: y * jnp.concatenate([jnp.ones((2, 6))] * 2),
    "split": lambda y: jnp.split(y, [2], axis=1),
    "stack": lambda y: jnp.stack([y, y * 2, jnp.ones_like(y)], 1),
    "unstack": lambda y: lax.unstack(y, axis=1),
    "unstack: iterated over": lambda y: list(y),
    "tile": lambda y: (jnp.tile(y, (2, 3)), jnp.tile(y, (1, 1))),
    "empty": lambda y: y + lax.empty(y.shape, "float32"),
    # Indices
    "gather": lambda y: (y[jnp.asarray([2, 0])], y[:, jnp.asarray([1, 1])]),
    "gather: by it": lambda y: y[indices(y)],
    "gather: of a constant": lambda y: jnp.ones((7, 5))[indices(y)],
    "gather: two indices": lambda y: y[jnp.arange(3), jnp.arange(3)],
    "gather: in batches": diagonal,
    "gather: clip": lambda y: stale_gather(y, mode="clip"),
    "gather: fill": lambda y: stale_gather(y, mode="fill", fill_value=3),
    "gather: promised": lambda y: stale_gather(y, mode="promise_in_bounds"),
    "gather: along an axis": lambda y: jnp.take_along_axis(y, jnp.argsort(y, 1), 1),
    "gather: masked": lambda y: y.at[jnp.asarray([9])].get(mode="fill", fill_value=0),
    "dynamic_slice": lambda y: lax.dynamic_slice(y, (1, 0), (2, 6)),
    "dynamic_slice: by it": lambda y: lax.dynamic_slice(y, (indices(y)[0], 0), (2, 6)),
    "dynamic_update_slice": lambda y: (
        lax.dynamic_update_slice(jnp.ones((8, 6)), y, (1, 0)),
        lax.dynamic_update_slice(y, jnp.ones((2, 2)), (1, 0)),
    ),
    "dynamic_update_slice: by it": lambda y: lax.dynamic_update_slice(
        y, y[:1], (indices(y)[0], 0)
    ),
    "scatter": lambda y: (y.at[1].set(0.0), jnp.ones((9, 6)).at[jnp.asarray([1, 3, 5, 7])].set(y)),
    "scatter: by it": lambda y: jnp.zeros((4, 6)).at[indices(y)].set(y),
    "scatter-add": lambda y: y.at[jnp.asarray([0, 0])].add(y[:2]),
    "scatter-sub": lambda y: y.at[jnp.asarray([0, 0])].subtract(y[:2]),
    "scatter-mul": lambda y: y.at[jnp.asarray([0, 2])].multiply(y[:2], unique_indices=True),
    "scatter-min": lambda y: y.at[:, 1].min(y[:, 0]),
    "scatter-max": lambda y: jnp.zeros(5).at[indices(y)].max(y[:, 0]),
    "scatter: segments": lambda y: jax.ops.segment_sum(y, jnp.asarray([0, 0, 1, 1]), 2),
    # Reductions
    "reduce_sum": lambda y: (y.sum(), y.sum(0), y.sum(1)),
    "reduce_max": lambda y: y.max(1),
    "reduce_min": lambda y: y.min(0),
    "reduce_prod": lambda y: y.prod(1),
    "reduce_and": lambda y: (y > 0).all(1),
    "reduce_or": lambda y: (y > 0).any(0),
    "reduce_xor": lambda y: lax.reduce_xor(integers(y), (1,)),
    "reduce": lambda y: lax.reduce(y, 0.0, lambda a, b: a * b + a, (1,)),
    "reduce: of two": lambda y: lax.reduce(
        (y, y * 2), (0.0, 0.0), lambda a, b: (a[0] + b[0] * b[1], a[1] + b[1]), (0,)
    ),
    "reduce: from it": lambda y: lax.reduce(y, y[0, 0], lambda a, b: a * b + a, (1,)),
    "argmax": lambda y: jnp.argmax(y, 1),
    "argmin": lambda y: (jnp.argmin(y, 0), jnp.argmin(y)),
    "sort": lambda y: (jnp.sort(y, 0), jnp.sort(y, 1)),
    "sort: several": lambda y: lax.sort((y, y * 2, integers(y)), dimension=0, num_keys=2),
    "sort: keys only": lambda y: lax.sort_key_val(y, lax.broadcasted_iota("int32", y.shape, 1)),
    "sort: indices": lambda y: jnp.argsort(y, 1),
    "top_k": lambda y: lax.top_k(y, 2),
    "approx_top_k": lambda y: lax.approx_max_k(y, 2),
    **each(CUMULATIVE, lambda fn: lambda y: (fn(y, axis=0), fn(y, axis=1, reverse=True))),
    "cumsum: associative": lambda y: lax.associative_scan(jnp.add, y, axis=1),
    "reduce_window": lambda y: windows(y, 0.0, lambda a, b: a * b + a),
    "reduce_window_sum": lambda y: windows(y, 0.0, lax.add),
    "reduce_window_max": pooled,
    "reduce_window_min": lambda y: windows(y, jnp.inf, lax.min),
    "reduce_window_sum: of the same size": lambda y: lax.reduce_window(
        y, 0.0, lax.add, (1, 3), (1, 1), "SAME"
    ),
    "select_and_scatter_add": gradient(pooled),
    "select_and_gather_add": tangent(pooled),
    "select_and_scatter": lambda y: _select_and_scatter(
        y, lax.ge, (2, 2), (2, 2), ((0, 0), (0, 0)), y[:2, :3], jnp.float32(0), lax.add
    ),
    # Products
    "dot_general": lambda y: (y.T @ y, y @ y.T, y @ jnp.ones(6), jnp.ones(4) @ y),
    "dot_general: preferred type": lambda y: lax.dot_general(
        y.astype("bfloat16"), y.astype("bfloat16"), (((1,), (1,)), ((), ())),
        preferred_element_type="float32",
    ),
    "dot_general: in batches": lambda y: jnp.einsum("ij,ij->i", y, y),
    "dot_general: outer": lambda y: jnp.einsum("ij,kl->ijkl", y, y),
    "dot_general: of nothing": lambda y: y[:, :0] @ y[:0, :],
    "dot_general: of integers": lambda y: integers(y) @ integers(y).T,
    "ragged_dot_general": lambda y: lax.ragged_dot(
        y, jnp.ones((2, 6, 3)), jnp.asarray([1, 3], "int32")
    ),
    "ragged_dot_general: its groups": lambda y: lax.ragged_dot(
        jnp.ones((5, 2)), y.reshape(3, 2, 4), jnp.asarray([1, 3, 1], "int32")
    ),
    "ragged_dot_general: by it": lambda y: lax.ragged_dot(
        y, jnp.ones((4, 6, 3)), indices(y)
    ),
    "ragged_dot_general: contracted": lambda y: ragged(y, CONTRACTED),
    "scaled_dot": lambda y: lax.scaled_dot(
        *(jnp.tile(y, (1, 16)).reshape(1, 4, 96).astype("float8_e4m3fn"),) * 2,
        lhs_scale=jnp.ones((1, 4, 3), "float8_e8m0fnu"),
        rhs_scale=jnp.ones((1, 4, 3), "float8_e8m0fnu"),
        dimension_numbers=(((2,), (2,)), ((0,), (0,))), preferred_element_type="float32",
    ),
    "conv_general_dilated": lambda y: conv(jnp.ones((2, 5, 2)), y.reshape(3, 2, 4)),
    "conv_general_dilated: the image": lambda y: conv(y[None], jnp.ones((3, 6, 2))),
    "conv_general_dilated: with itself": lambda y: conv(y[None], y.reshape(2, 6, 2)),
    "conv_general_dilated: in groups": lambda y: conv(
        jnp.ones((2, 5, 4)), y.reshape(3, 2, 4), feature_group_count=2
    ),
    "conv_general_dilated: batches": lambda y: conv(
        jnp.ones((2, 5, 2)), y.reshape(3, 2, 4), batch_group_count=2
    ),
    "conv_general_dilated: patches": lambda y: lax.conv_general_dilated_patches(
        y[None, None], (2, 2), (1, 1), "VALID"
    ),
    # Linear algebra
    "cholesky": lambda y: lax.linalg.cholesky(square(y)),
    "cholesky_update": lambda y: lax.linalg.cholesky_update(square(y), y[:, 5]),
    "eig": lambda y: lax.linalg.eig(square(y)),
    "eigh": lambda y: lax.linalg.eigh(square(y)),
    "householder_product": lambda y: lax.linalg.householder_product(square(y), y[:, 5]),
    "hessenberg": lambda y: lax.linalg.hessenberg(square(y)),
    "lu": lambda y: lax.linalg.lu(y),
    "lu_pivots_to_permutation": lambda y: lax.linalg.lu_pivots_to_permutation(indices(y), 4),
    "ormqr": lambda y: lax.linalg.ormqr(square(y), y[:, 5], y),
    "qr": lambda y: (lax.linalg.qr(y), lax.linalg.qr(y, full_matrices=False)),
    "geqrf": lambda y: jnp.linalg.qr(y, mode="raw"),
    "qr: pivoting": lambda y: lax.linalg.qr(y, pivoting=True),
    "schur": lambda y: lax.linalg.schur(square(y)),
    "svd": lambda y: lax.linalg.svd(y, full_matrices=False),
    "svd: values": lambda y: lax.linalg.svd(y, compute_uv=False),
    "symmetric_product": lambda y: lax.linalg.symmetric_product(y, square(y)),
    "triangular_solve": lambda y: lax.linalg.triangular_solve(square(y), y, left_side=True),
    "tridiagonal": lambda y: lax.linalg.tridiagonal(square(y)),
    "tridiagonal_solve": lambda y: lax.linalg.tridiagonal_solve(y[:, 0], y[:, 1], y[:, 2], y),
    "custom_linear_solve": solved,
    "custom_linear_solve: matrices": lambda y: jnp.linalg.solve(square(y), y),
    "fft": lambda y: (jnp.fft.fft(y), jnp.fft.fft2(y)),
    "fft: real": lambda y: jnp.fft.rfft(y),
    "fft: real, back": lambda y: jnp.fft.irfft(y),
    "fft: back": lambda y: jnp.fft.ifft(y),
    # Random
    "random_bits": lambda y: jax.random.bits(key(y), (3,)),
    "random_bits: added": lambda y: y + jax.random.uniform(jax.random.key(0), y.shape),
    "random_bits: dropped": lambda y: y * jax.random.bernoulli(jax.random.key(0), 0.5, y.shape),
    "random_wrap": lambda y: jax.random.normal(key(y), (4, 6)),
    "random_unwrap": lambda y: jax.random.key_data(key(y)),
    "random_split": lambda y: jax.random.key_data(jax.random.split(key(y), 3)),
    "random_fold_in": lambda y: jax.random.key_data(jax.random.fold_in(key(y), 7)),
    "random_fold_in: it": lambda y: jax.random.key_data(
        jax.random.fold_in(jax.random.key(0), indices(y)[0])
    ),
    "random_seed": lambda y: jax.random.key_data(jax.random.key(indices(y)[0])),
    "random_clone": lambda y: jax.random.key_data(jax.random.clone(key(y))),
    "random_gamma": lambda y: jax.random.gamma(jax.random.key(0), y),
    "threefry2x32": lambda y: jax.extend.random.threefry_2x32(
        lax.bitcast_convert_type(y[0, :2], jnp.uint32), lax.bitcast_convert_type(y[1], jnp.uint32)
    ),
    "rng_bit_generator": lambda y: lax.rng_bit_generator(
        lax.bitcast_convert_type(y[0, :4], jnp.uint32), (3, 2)
    ),
    "rng_uniform": lambda y: lax.rng_uniform(y[0, 0], y[1, 0], (3, 2)),
    # Calls, loops and conditions
    "jit": lambda y: jax.jit(lambda y: jnp.sort(y) + y)(y),
    "remat2": lambda y: jax.checkpoint(lambda y: jnp.sort(jnp.sin(y)))(y),
    "remat2: its gradient": gradient(jax.checkpoint(lambda y: jnp.sin(jnp.sin(y)))),
    "custom_jvp_call": own_tangent,
    "custom_jvp_call: its tangent": tangent(own_tangent),
    "custom_jvp_call: root": rooted,
    "custom_vjp_call": own_gradient,
    "custom_vjp_call: its gradient": gradient(own_gradient),
    "custom_vjp_call: of jax": lambda y: jax.nn.relu(jax.scipy.special.logsumexp(y, axis=1)),
    "remat_opt": gradient(remat_gradient),
    "custom_vmap_call": own_vmap,
    "custom_vmap_call: mapped": jax.vmap(own_vmap),
    "linear_call": linear,
    "composite": lambda y: lax.composite(lambda y: jnp.sin(y) * 2, "my.composite")(y),
    "compute_on": lambda y: compute_on.compute_on2(
        lambda y: y * 2, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device
    )(y),
    "call_exported": exported,
    "call_exported: of any size": polymorphic,
    "cond": lambda y: lax.cond(y[0, 0] > 0, lambda y: y * 2, lambda y: jnp.sin(y), y),
    "cond: switch": lambda y: lax.switch(indices(y)[0], [jnp.sin, jnp.cos, lambda y: y[::-1]], y),
    "cond: of another size": lambda y: lax.cond(
        y[0, 0] > 0, lambda y: (y[0], jnp.ones(3)), lambda y: (y[1] * 2, y[2, :3]), y
    ),
    "cond: sorted": lambda y: lax.cond(y[0, 0] > 0, jnp.sort, lambda y: y, y),
    "while": while_larger,
    "while: sorted": lambda y: lax.fori_loop(0, indices(y)[0], lambda _, y: jnp.sort(y), y),
    "while: counted": lambda y: lax.while_loop(
        lambda c: (c[0] < 3) & (c[1][0, 0] > 0), lambda c: (c[0] + 1, jnp.sin(c[1])), (0, y)
    ),
    "scan": lambda y: lax.scan(lambda c, row: (c + row, c * row), jnp.zeros(6), y),
    "scan: carried": lambda y: lax.scan(lambda y, x: (y @ y.T @ y, y[0]), y, jnp.ones(3)),
    "scan: of nothing": lambda y: lax.scan(lambda c, row: (c + row, c), jnp.zeros(6), y[:0]),
    "scan: backwards": lambda y: lax.scan(
        lambda c, row: (c * 2, row * 3), 1.0, y, reverse=True, unroll=2
    ),
    "scan: sorted": lambda y: lax.scan(lambda y, _: (jnp.sort(y, 1), None), y, length=3),
    "scan: its gradient": gradient(
        lambda y: lax.scan(lambda c, row: (c * row, c), jnp.ones(6), y)[1]
    ),
    "scan: map": lambda y: lax.map(jnp.sort, y),
    "platform_index": lambda y: lax.platform_dependent(y, cpu=jnp.sin, default=jnp.cos),
    # What leaves JAX
    "pure_callback": called_back,
    "pure_callback: mapped": jax.vmap(
        lambda y: jax.pure_callback(lambda y: y, shape(6), y, vmap_method="sequential")
    ),
    "io_callback": lambda y: io_callback(lambda y: y, shape(*y.shape), y, ordered=True),
    "buffer_callback": lambda y: buffer_callback.buffer_callback(
        lambda *args: None, shape(*y.shape)
    )(y),
    "debug_callback": watched,
    "debug_print": printed,
    "inspect_sharding": inspected,
    "check": checked,
    "check: as a value": errors,
    "ffi_call": lambda y: jax.ffi.ffi_call("my_kernel", shape(*y.shape))(y),
    "ffi_call: of several": lambda y: jax.ffi.ffi_call("my_kernel", [shape(3), shape(2, 2)])(y, y),
    "pallas_call": in_pallas,
    "custom_partitioning": partitioned,
    "dot_product_attention_fwd_wrapper": by_cudnn,
    "dot_product_attention_bwd_wrapper": gradient(by_cudnn),
    "after_all": after_a_token,
    "scaled_matmul_wrapper": by_scaled_matmul,
    # References
    "new_ref": in_a_ref,
    "empty_ref": in_an_empty_ref,
    "run_state": lambda y: run_state(count_up)(y),
    # Devices
    "device_put": lambda y: jax.device_put(y, jax.devices()[0]),
    "sharding_constraint": lambda y: lax.with_sharding_constraint(
        y, NamedSharding(mesh(jax.sharding.AxisType.Auto), P("i"))
    ),
    "reshard": lambda y: jax.sharding.reshard(
        y, NamedSharding(mesh(jax.sharding.AxisType.Explicit), P("i"))
    ),
    "layout_constraint": lambda y: layout.with_layout_constraint(y, layout.Layout((1, 0))),
    "shard_alike": lambda y: importlib.import_module("jax.experimental.shard_alike").shard_alike(
        y, y[::-1] * 2
    ),
    "shard_map": on_devices(lambda y: y * 2),
    "shard_map: of a sort": on_devices(lambda y: jnp.sort(y)),
    "shard_map: replicated": on_devices(lambda y: y * 2, P(), P()),
    "shard_map: columns": on_devices(lambda y: y * 2, P(None, "i"), P(None, "i")),
    "psum": on_devices(lambda y: lax.psum(y, "i"), out=P(), check_vma=False),
    "psum_invariant": on_devices(lambda y: lax.psum(y, "i"), out=P()),
    "pmax": on_devices(lambda y: lax.pmax(y, "i"), out=P()),
    "pmin": on_devices(lambda y: lax.pmin(y, "i"), out=P()),
    "ppermute": on_devices(lambda y: lax.ppermute(y, "i", [(0, 1), (1, 0)])),
    "pbroadcast": on_devices(lambda y: lax.pbroadcast(y, "i", 0)),
    "all_gather": on_devices(lambda y: lax.all_gather(y, "i", axis=1)),
    "all_gather: tiled": on_devices(lambda y: lax.all_gather(y, "i", axis=1, tiled=True)),
    "all_gather: replicated": on_devices(lambda y: lax.all_gather(y, "i"), P(), P("i")),
    "all_gather_invariant": on_devices(
        lambda y: lax.all_gather(y, "i", axis=0, tiled=True, to="invarying"), out=P()
    ),
    "all_gather_reduced": on_devices(
        lambda y: lax.all_gather(lax.pcast(y, "i", to="varying"), "i", tiled=True, to="reduced"),
        P(), P(reduced={"i"}), kind=jax.sharding.AxisType.Explicit,
    ),
    "reduced_vary_cast_p": on_devices(
        lambda y: lax.pcast(lax.pcast(y, "i", to="reduced"), "i", to="varying"), P(), P("i"),
        kind=jax.sharding.AxisType.Explicit,
    ),
    "unreduced_reduce_scatter": on_devices(
        lambda y: lax.psum_scatter(
            lax.pcast(lax.pcast(y, "i", to="varying"), "i", to="unreduced"), "i", tiled=True
        ),
        P(), P("i"), kind=jax.sharding.AxisType.Explicit,
    ),
    "precv": on_devices(
        lambda y: lax.precv(lax.psend(y, "i", [(0, 1)]), shape(*y.shape), "i", [(0, 1)])
    ),
    "preduced": on_devices(
        lambda y: lax.pcast(y, "i", to="reduced"), P(), P(reduced={"i"}),
        kind=jax.sharding.AxisType.Explicit,
    ),
    "unreduced_psum": on_devices(
        lambda y: lax.psum(
            lax.pcast(lax.pcast(y, "i", to="varying"), "i", to="unreduced"), "i"
        ),
        P(), P(), kind=jax.sharding.AxisType.Explicit,
    ),
    "all_to_all": on_devices(lambda y: lax.all_to_all(y, "i", 1, 0, tiled=True)),
    "all_to_all: one for each": on_devices(lambda y: lax.all_to_all(y, "i", 0, 1)),
    "ragged_all_to_all": on_devices(
        lambda y: lax.ragged_all_to_all(
            y, jnp.zeros_like(y), *(jnp.ones(2, "int32") for _ in range(4)), axis_name="i"
        ),
        check_vma=False,
    ),
    "reduce_scatter": on_devices(lambda y: lax.psum_scatter(y, "i", tiled=True)),
    "reduce_scatter: one for each": on_devices(lambda y: lax.psum_scatter(y, "i")),
    "axis_index": on_devices(lambda y: y * lax.axis_index("i")),
    "pvary": on_devices(lambda y: lax.pcast(y, "i", to="varying"), P(), P("i")),
}  # fmt: skip


# Primitives that are in no function of a user's model.
NEVER = {
    # Of several processes, and known only once they are asked for
    "global_array_to_host_local_array", "host_local_array_to_global_array",
    # What others are lowered to
    "cudnn_fusion", "dot_product_attention_bwd", "dot_product_attention_fwd", "geqp3",
    "iota_2x32_shape", "philox2x32", "philox4x32", "scaled_matmul",
    "threefry4x32", "dot_product_attention_fp8_bwd", "dot_product_attention_fp8_fwd",
    # No public function makes them: asynchronous collectives, kernels' references, fp8
    "all_gather_done", "all_gather_reduced_start", "all_gather_start", "all_to_all_done",
    "all_to_all_start", "broadcast_to", "call", "closed_call", "create_linear", "empty2",
    "from_edtype", "pbroadcast_done", "pbroadcast_start", "pin", "ppermute_done",
    "ppermute_start", "psum_done", "psum_invariant_start", "psum_start", "reduce_scatter_done",
    "reduce_scatter_start", "to_edtype", "unpin", "unreduced_psum_start",
    "unreduced_reduce_scatter_start", "dot_product_attention_fp8_bwd_wrapper",
    "dot_product_attention_fp8_fwd_wrapper",
    # In the middle of a derivative
    "custom_lin", "unreachable",
    # Of shapes that are not known
    "dim_as_value", "dimension_size", "shape_assertion",
    # Its result is its operand in a jaxpr
    "stage",
}  # fmt: skip


def defined(where):
    """The primitives that modules of such names hold."""
    modules = [m for name, m in list(sys.modules.items()) if where(name)]
    return {v for m in modules for v in vars(m).values() if isinstance(v, Primitive)}


def registered():
    """The primitives of JAX that XLA is told how to compute, on any platform."""
    tables = mlir._lowerings, *mlir._platform_specific_lowerings.values()
    is_sparse = lambda name: name.startswith("jax.experimental.sparse")
    of_jax = lambda name: name.split(".")[0] == "jax" and not is_sparse(name)
    # Other packages, and sparse arrays, have primitives of their own, once they are imported.
    others = defined(lambda name: not of_jax(name)) - defined(of_jax)
    return {p for table in tables for p in table} - others


def bound(name, *operands, **params):
    """A primitive that has no function."""
    return next(p for p in registered() if p.name == name).bind(*operands, **params)


def of_kernels():
    """Those that are defined for the kernels of Pallas, and occur in these only."""
    found = {p.name for p in defined(lambda name: name.startswith("jax._src.pallas"))}
    return {name for name in found if not hasattr(lax, f"{name}_p")} - {"pallas_call"}


def primitives(jaxpr):
    """The names of all primitives in a jaxpr."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        params = jax.tree.leaves(list(eqn.params.values()))
        found.update(*(primitives(p) for p in params if isinstance(p, (Jaxpr, ClosedJaxpr))))
    return found


@functools.cache
def own_primitives(name):
    return primitives(jax.make_jaxpr(PROGRAMS[name])(shape(ROWS, COLUMNS)))


def traces(name):
    try:
        return bool(own_primitives(name))
    except Exception:  # a program of the JAX that the list was made with
        return False


# The JAX whose primitives these are; a newer one may have fewer, and others.
IS_LISTED = jax.__version__.startswith("0.10.")
if not IS_LISTED:
    PROGRAMS = {name: program for name, program in PROGRAMS.items() if traces(name)}


@pytest.mark.skipif(not IS_LISTED, reason="the list is that of another JAX")
def test_every_primitive_has_a_program():
    for name in PROGRAMS:
        assert ":" in name or name in own_primitives(name)
    covered = set().union(*map(own_primitives, PROGRAMS))
    known = {primitive.name for primitive in registered()} - of_kernels()
    assert known - covered - NEVER == set()
    assert covered & NEVER == set()


# --- a parameter that goes into them --------------------------------------------------------------


def loss_of(results, x):
    """Every result meets data, and all of them are one number."""
    total = jnp.float32(0)
    for y in jax.tree.leaves(results):
        y = jnp.real(y).astype("float32")
        if y.ndim:
            y = jnp.tensordot(jnp.broadcast_to(x[0, 0], y.shape[:1]), y, 1)
        total += jnp.sum(jnp.sin(y))
    return total


X = shape(ROWS, 5)
# What the program is given: a parameter, a layer's outputs, rows of a parameter chosen by data.
GIVEN = {
    "parameter": (lambda p, x, tokens: p["w"], shape(ROWS, COLUMNS)),
    "outputs": (lambda p, x, tokens: x @ p["w"], shape(5, COLUMNS)),
    "rows": (lambda p, x, tokens: p["w"][tokens], shape(9, COLUMNS)),
}
# Nothing of the array is left in what these give.
NOTHING_LEFT = {
    "slice", "pad: to nothing", "scan: of nothing", "dot_general: of nothing", "empty",
}  # fmt: skip
# Under which name a step of what a primitive calls is reported.
STEPS = {"shard_map": {"shard", "unshard"}, "scan": {"scan_slice"}}


def results(fn, params, *args):
    """What each function gives, or says in its error."""

    def of(function, **options):
        try:
            return function(fn, params, *args, **options)
        except ValueError as error:
            return str(error)

    return (
        of(infer_block_specs, v="mean"),
        of(infer_block_specs, v="mean", unreadable=per_element()),
        of(infer_muon_dimension_numbers),
        of(explain, parameter="w", v="mean"),
    )


def check(name, fn, w, *args):
    """That nothing but blocks, or a clear error, comes out."""
    found, forced, muon, why = results(fn, {"w": w}, *args)
    assert not isinstance(forced, str), forced
    grid = forced["w"].grid(w.shape)
    assert len(grid) == len(w.shape)
    if isinstance(found, str):
        assert f"w {w.shape}: " in found
        assert isinstance(muon, str)
        for message in (found, muon, why):
            # Where it goes all the same is said by the errors.
            if not (message is why and "meets no data" in why):
                clear(name, message)
    else:
        assert found["w"].grid(w.shape) == grid
        assert not isinstance(muon, str), muon
        assert why.startswith(f"w {w.shape}: ")
        assert "not read in" not in why


def clear(name, message):
    """That a message names a primitive of the program, and where it is called."""
    if "meets no data" in message and name in NOTHING_LEFT:
        return
    lines = [line for line in message.splitlines() if re.search("goes into|not read in", line)]
    places = [place for line in lines for place in re.findall(r"([\w-]+) at (\S+?):(\d+)", line)]
    assert places, message
    own = own_primitives(name)
    own = own.union(*(STEPS.get(primitive, ()) for primitive in own))
    source, start = inspect.getsourcelines(loss_of)
    for primitive, file, line in places:
        assert primitive in own, message
        assert file.endswith("test_primitives.py"), message
        assert int(line) not in range(start, start + len(source)), message


FIRST, *MORE = GIVEN


@pytest.mark.parametrize(
    "given", [FIRST, *(pytest.param(given, marks=pytest.mark.slow) for given in MORE)]
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_primitive_gives_blocks_or_a_clear_error(name, given):
    make, w = GIVEN[given]
    fn = lambda p, x, tokens: loss_of(PROGRAMS[name](make(p, x, tokens)), x)
    check(name, fn, w, X, shape(ROWS, dtype="int32"))


@pytest.mark.parametrize(
    "size",
    [(), *(pytest.param(size, marks=pytest.mark.slow) for size in [(0,), (1,), (0, 6), (4, 0)])],
)
def test_each_primitive_takes_scalars_and_empty_arrays(size):
    """Scalars, and arrays without any element: in each program that takes them."""
    taken, wrong = 0, []
    for name, program in PROGRAMS.items():
        fn = lambda p, x, program=program: loss_of(program(p["w"]), x)
        try:
            jax.eval_shape(fn, {"w": shape(*size)}, X)
        except Exception:  # JAX's own: this program is of arrays of another rank or size
            continue
        taken += 1
        try:
            found, forced, muon, why = results(fn, {"w": shape(*size)}, X)
        except Exception as error:  # all of them in one message
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            continue
        messages = [message for message in (found, muon, why) if isinstance(message, str)]
        wrong += [f"{name}: {message}" for message in messages if f"w {size}: " not in message]
        if isinstance(forced, str):
            wrong.append(f"{name}: {forced}")
        else:
            forced["w"].grid(size)
    assert not wrong, "\n".join(wrong)
    assert taken > 50
