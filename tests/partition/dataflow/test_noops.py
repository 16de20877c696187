"""Operations that change no value change no block, wherever in a model they are put."""

import functools
import operator
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src import source_info_util
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Literal

from optax_adam_mini import infer_block_specs
from tests.partition.dataflow.models import TABLE_OF_MODELS

# --- operations that do nothing: of an array, and a number that is data ---------------------------


def along(y):
    """An axis that can be cut in two: the last of several indices, else None."""
    return max((axis for axis, size in enumerate(y.shape) if size > 1), default=None)


def on_an_axis(noop):
    """Leaves alone what has no axis of two indices."""
    return lambda y, data: y if along(y) is None else noop(y, along(y))


def ones_of_two_parts(y, axis):
    half = y.shape[axis] // 2
    sizes = [(*y.shape[:axis], n, *y.shape[axis + 1 :]) for n in (half, y.shape[axis] - half)]
    return jnp.concatenate([jnp.ones(size, y.dtype) for size in sizes], axis)


def padded_ones(y, axis):
    widths = [(0, y.shape[axis] // 2) if a == axis else (0, 0) for a in range(y.ndim)]
    size = [n - after for n, (_, after) in zip(y.shape, widths, strict=True)]
    return jnp.pad(jnp.ones(size, y.dtype), widths, constant_values=1)


def counted_ones(y, axis):
    counted = jnp.arange(y.shape[axis], dtype=y.dtype) * 0 + 1
    return counted.reshape([-1 if a == axis else 1 for a in range(y.ndim)])


def merged_and_split(y):
    """Two neighbouring axes become one, and two again."""
    for axis in range(y.ndim - 1):
        if y.shape[axis] > 1 and y.shape[axis + 1] > 1:
            return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :]).reshape(y.shape)
    return y


def split_and_merged(y, axis):
    size = y.shape[axis]
    by = next((n for n in range(2, size) if size % n == 0), size)
    return y.reshape(*y.shape[:axis], by, size // by, *y.shape[axis + 1 :]).reshape(y.shape)


def padded_and_sliced(y, axis):
    widths = [(1, 2) if a == axis else (0, 0) for a in range(y.ndim)]
    return lax.slice_in_dim(jnp.pad(y, widths), 1, 1 + y.shape[axis], axis=axis)


def spread_and_taken(y, axis):
    """Zeros between its indices, which are left out again."""
    config = [(0, 0, 1) if a == axis else (0, 0, 0) for a in range(y.ndim)]
    spread = lax.pad(y, jnp.zeros((), y.dtype), config)
    return lax.slice_in_dim(spread, 0, None, stride=2, axis=axis)


def also(use):
    """The value goes into something else as well, on which nothing depends."""

    def noop(y, data):
        use(y)
        return y

    return noop


def in_parts(y, axis):
    half = y.shape[axis] // 2
    return jnp.concatenate(jnp.split(y, [half], axis), axis)


def iterated_and_stacked(y, axis):
    return jnp.stack(list(jnp.moveaxis(y, axis, 0)), axis)


def written_into(y, data):
    zero = (0,) * y.ndim
    return lax.dynamic_update_slice(jnp.zeros_like(y), y, zero)


NOOPS = {
    "times ones": lambda y, data: y * jnp.ones_like(y),
    "ones times": lambda y, data: jnp.ones_like(y) * y,
    "divided by ones": lambda y, data: y / jnp.ones_like(y),
    "times one": lambda y, data: y * jnp.float32(1),
    "times one that is broadcast": (
        lambda y, data: y * jnp.broadcast_to(jnp.ones((), y.dtype), y.shape)
    ),
    "times ones of the last axis": lambda y, data: y * jnp.ones(y.shape[-1:], y.dtype),
    "times a one that is closed over": lambda y, data: y * np.ones((1,) * y.ndim, y.dtype),
    "times ones that are closed over": lambda y, data: y * np.ones(y.shape[-1:], y.dtype),
    "times concatenated ones": on_an_axis(lambda y, axis: y * ones_of_two_parts(y, axis)),
    "times padded ones": on_an_axis(lambda y, axis: y * padded_ones(y, axis)),
    "times counted ones": on_an_axis(lambda y, axis: y * counted_ones(y, axis)),
    "times a one that is data": lambda y, data: y * (data * 0 + 1),
    "times ones that are data": lambda y, data: y * jnp.broadcast_to(data * 0 + 1, y.shape),
    "plus zero": lambda y, data: y + 0,
    "plus zeros": lambda y, data: y + jnp.zeros_like(y),
    "minus concatenated zeros": on_an_axis(lambda y, axis: y - (ones_of_two_parts(y, axis) - 1)),
    "negated twice": lambda y, data: jnp.negative(-y),
    "tile": lambda y, data: jnp.tile(y, (1,) * y.ndim),
    "tile of lax": lambda y, data: getattr(lax, "tile", jnp.tile)(y, (1,) * y.ndim),
    "repeated once": on_an_axis(lambda y, axis: jnp.repeat(y, 1, axis)),
    "concatenated with nothing": (
        lambda y, data: jnp.concatenate([y, jnp.zeros((*y.shape[:-1], 0), y.dtype)], -1)
    ),
    "nothing concatenated with it": (
        lambda y, data: jnp.concatenate([jnp.zeros((0, *y.shape[1:]), y.dtype), y], 0)
    ),
    "padded and sliced": on_an_axis(padded_and_sliced),
    "spread and taken": on_an_axis(spread_and_taken),
    "merged and split": lambda y, data: merged_and_split(y),
    "split and merged": on_an_axis(split_and_merged),
    "flattened": lambda y, data: y.reshape(-1).reshape(y.shape),
    "transposed twice": lambda y, data: y.T.T,
    "rolled": on_an_axis(lambda y, axis: jnp.roll(jnp.roll(y, 1, axis), -1, axis)),
    "reversed twice": on_an_axis(lambda y, axis: jnp.flip(jnp.flip(y, axis), axis)),
    "named": lambda y, data: checkpoint_name(y, "name"),
    "cast": lambda y, data: y.astype("bfloat16").astype(y.dtype),
    "jit": lambda y, data: jax.jit(jnp.transpose)(jax.jit(jnp.transpose)(y)),
    "remat": lambda y, data: jax.checkpoint(lambda y: 2 * (y / 2))(y),
    "vmap": lambda y, data: jax.vmap(lambda y: y * 1)(y),
    "also sorted": also(jnp.sort),
    "also multiplied by itself": also(lambda y: jnp.vdot(y, y)),
    "also called back": also(
        lambda y: jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(y.shape, y.dtype), y)
    ),
    "split and concatenated": on_an_axis(in_parts),
    "iterated over and stacked": on_an_axis(iterated_and_stacked),
    "behind a barrier": lambda y, data: lax.optimization_barrier(y),
    "stopped and not": lambda y, data: y + (y - lax.stop_gradient(y)) * 0,
    "where ones": lambda y, data: jnp.where(jnp.ones(y.shape, bool), y, 0),
    "sliced whole": lambda y, data: lax.dynamic_slice(y, (0,) * y.ndim, y.shape),
    "taken whole": lambda y, data: y[...],
    "written into zeros": written_into,
    "set in zeros": lambda y, data: jnp.zeros_like(y).at[:].set(y),
    "an axis more and less": lambda y, data: jnp.squeeze(y[None, ..., None], (0, y.ndim + 1)),
    "one of a stack": lambda y, data: jnp.stack([y])[0],
    "one of a stack of two": lambda y, data: jnp.stack([y, jnp.zeros_like(y)])[0],
    "summed over one": lambda y, data: jnp.sum(y[None], 0),
    "in a loop of one": lambda y, data: lax.fori_loop(0, 1, lambda _, y: y * 1, y),
    "in a scan of one": lambda y, data: lax.scan(lambda c, y: (c, y), 0, y[None])[1][0],
    "in both branches": lambda y, data: lax.cond(True, lambda y: y * 1, lambda y: y / 1, y),
}

NUMBERS = [
    "times a one that is closed over", "times ones that are closed over",
    "times a one that is data", "times ones that are data",
]  # fmt: skip
# What does nothing, and yet changes the blocks of a model.
KNOWN = {
    # One example, or a factor of a kernel: that it was scaled makes the cut finer.
    "low rank, scanned": NUMBERS,
    "features of one": ["stopped and not", *NUMBERS],
    # A layer of one input whose outputs are scaled one by one looks like a gain.
    "times": NUMBERS,
    # A filter that is no constant any more is a layer of its own.
    "resized convolution": ["rolled", *NUMBERS],
    # The norm of a modulated kernel, scaled, is read as another use of both.
    "convolution modulated, scaled": NUMBERS,
}  # fmt: skip

# --- a model with one of them put in --------------------------------------------------------------

INPUTS = "jaxpr", "call_jaxpr", "fun_jaxpr"
CALLS = {"jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call",
         "custom_vjp_call"}  # fmt: skip


def called(eqn):
    """The jaxprs in an equation."""
    if eqn.primitive.name in CALLS:
        return [next(eqn.params[name] for name in INPUTS if name in eqn.params)]
    names = {"scan": ["jaxpr"], "while": ["cond_jaxpr", "body_jaxpr"]}
    found = [eqn.params[name] for name in names.get(eqn.primitive.name, [])]
    return found + list(eqn.params.get("branches", ()))


def opened(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def takes_a_noop(var):
    return jnp.issubdtype(getattr(var.aval, "dtype", int), np.floating) and var.aval.ndim > 0


def equations(jaxpr):
    """Those that give an array of floats, of loops and branches too, each once."""
    found = {}
    for eqn in opened(jaxpr).eqns:
        for inner in called(eqn):
            found |= dict.fromkeys(equations(inner))
        if any(map(takes_a_noop, eqn.outvars)):
            found[eqn] = None
    return list(found)


def as_called(eqn):
    """To trace under the names that an equation has, which say that it is of a derivative."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def evaluate(jaxpr, put, *operands):
    """`jaxpr` of its operands, with `put(eqn, result)` for each result of an equation."""
    jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for eqn in jaxpr.eqns:
        with as_called(eqn):
            results = evaluate_eqn(eqn, put, [read(atom) for atom in eqn.invars])
            for var, result in zip(eqn.outvars, results, strict=True):
                values[var] = put(eqn, result) if takes_a_noop(var) else result
    return [read(atom) for atom in jaxpr.outvars]


def evaluate_eqn(eqn, put, operands):
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return evaluate(*called(eqn), put, *operands)
    if name == "cond":
        branches = [functools.partial(evaluate, branch, put) for branch in params["branches"]]
        return lax.switch(operands[0], branches, *operands[1:])
    if name == "while":
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        holds = lambda carry: evaluate(params["cond_jaxpr"], put, *operands[:first], *carry)[0]
        body = lambda carry: evaluate(params["body_jaxpr"], put, *operands[first:second], *carry)
        return lax.while_loop(holds, body, operands[second:])
    if name == "scan":
        inside = opened(params["jaxpr"])
        # What the loop runs over, and what it collects, has an axis less inside.
        pairs = zip(eqn.invars, inside.invars, strict=True)
        stacks = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in pairs)
        pairs = zip(eqn.outvars, inside.outvars, strict=True)
        carries = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in pairs)
        consts = len(operands) - carries - stacks

        def body(carry, slices):
            found = evaluate(params["jaxpr"], put, *operands[:consts], *carry, *slices)
            return found[:carries], found[carries:]

        options = {"length": params["length"], "reverse": params["reverse"]}
        carry = operands[consts : consts + carries]
        carry, stacked = lax.scan(body, carry, operands[consts + carries :], **options)
        return [*carry, *stacked]
    results = eqn.primitive.bind(*operands, **params)
    return results if eqn.primitive.multiple_results else [results]


@functools.cache
def traced(model):
    fn, params, args, _ = TABLE_OF_MODELS[model]
    jaxpr = jax.make_jaxpr(lambda params, args: jax.tree.leaves(fn(params, *args)))(params, args)
    return jaxpr, equations(jaxpr)


def with_noop(model, noop, here):
    """The model with a no-op on what `here(eqn)`, or `here(name)` of a parameter, says."""

    def forward(params, *args):
        data = args[0].ravel()[0].astype("float32")
        own = {name: noop(y, data) if y.ndim and here(name) else y for name, y in params.items()}
        put = lambda eqn, result: noop(result, data) if here(eqn) else result
        return evaluate(traced(model)[0], put, *jax.tree.leaves((own, list(args))))

    return forward


def finer(found, grid):
    return all(map(operator.ge, found, grid))


# Coordinates that are taken out one by one may be read as apart, which is finer.
TAKEN_APART = {"iterated over and stacked"}


def trouble(model, name, here, where):
    """What is wrong with the blocks of a model that has a no-op in it; empty if nothing is."""
    _, params, args, expected = TABLE_OF_MODELS[model]
    if name in KNOWN.get(model, ()):
        return ""
    fn = with_noop(model, NOOPS[name], here)
    try:
        specs = infer_block_specs(fn, params, *args, v="mean")
    except Exception as error:  # whatever it is, it has to say where it comes from
        return f"{model}, {name} on {where}: {type(error).__name__}: {error}"
    found = {path: specs[path].grid(params[path].shape) for path in params}
    wrong = [
        f"{path} is cut {found[path]} instead of {grid}"
        for path, grid in expected.items()
        if found[path] != grid and not (name in TAKEN_APART and finer(found[path], grid))
    ]
    return f"{model}, {name} on {where}: {', '.join(wrong)}" if wrong else ""


def on_equation(model, name, number):
    eqn = traced(model)[1][number]
    where = f"equation {number}, {eqn.primitive.name} of {eqn.outvars[0].aval.str_short()}"
    return trouble(model, name, lambda place: place is eqn, where)


def on_parameter(model, name, parameter):
    return trouble(model, name, lambda place: place == parameter, f"parameter {parameter}")


def number_of(*names):
    """A number that is the same in every process."""
    return zlib.crc32(" ".join(map(str, names)).encode())


def chosen(count, choices, *names):
    """As many of the choices, others for other names."""
    return sorted(choices, key=lambda choice: number_of(choice, *names))[:count]


# Of a parameter that is taken apart index by index, each index is a layer of its own.
ON_PARAMETERS = [name for name in NOOPS if name != "iterated over and stacked"]
EACH = 1  # no-ops of each model, which are others at an equation and on a parameter
AT_EQUATIONS = [
    (model, name) for model in TABLE_OF_MODELS for name in chosen(EACH, NOOPS, model, "equation")
]
AT_PARAMETERS = [
    (model, name)
    for model in TABLE_OF_MODELS
    for name in chosen(EACH, ON_PARAMETERS, model, "parameter")
]


def test_every_noop_is_tried():
    assert {name for _, name in AT_EQUATIONS} == set(NOOPS)
    assert {name for _, name in AT_PARAMETERS} == set(ON_PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("model", TABLE_OF_MODELS)
def test_models_that_are_evaluated_equation_by_equation_have_the_same_blocks(model):
    assert not trouble(model, "times one", lambda place: False, "nothing")


@pytest.mark.parametrize(("model", "name"), AT_EQUATIONS)
def test_a_no_op_after_an_equation_does_not_change_the_blocks(model, name):
    (number,) = chosen(1, range(len(traced(model)[1])), model, name)
    wrong = on_equation(model, name, number)
    assert not wrong, wrong


@pytest.mark.parametrize(("model", "name"), AT_PARAMETERS)
def test_a_no_op_on_a_parameter_does_not_change_the_blocks(model, name):
    arrays = [path for path, leaf in TABLE_OF_MODELS[model][1].items() if leaf.ndim]
    (path,) = chosen(1, arrays, model, name)
    wrong = on_parameter(model, name, path)
    assert not wrong, wrong


MANY = 20  # equations and no-ops of each model: some minutes, with the next test


@pytest.mark.slow
@pytest.mark.parametrize("model", TABLE_OF_MODELS)
def test_a_no_op_after_any_equation_does_not_change_the_blocks(model):
    pairs = [(name, number) for name in NOOPS for number in range(len(traced(model)[1]))]
    wrong = [on_equation(model, *pair) for pair in chosen(MANY, pairs, model)]
    wrong = list(filter(None, wrong))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("model", TABLE_OF_MODELS)
def test_no_ops_after_all_equations_do_not_change_the_blocks(model):
    names = chosen(EACH, ON_PARAMETERS, model, "everything")
    wrong = [trouble(model, name, lambda place: True, "everything") for name in names]
    wrong = list(filter(None, wrong))
    assert not wrong, "\n".join(wrong)
