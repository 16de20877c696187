"""The text of `explain`, and arguments that are refused before the model is read."""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from optax_adam_mini import (
    adam_mini,
    block_table,
    explain,
    from_adam_state,
    infer_block_specs,
    infer_muon_dimension_numbers,
)
from tests.partition.dataflow.models.parts import X, shape

LINES = pathlib.Path(__file__).read_text().splitlines()


def line_of(text):
    return 1 + next(i for i, line in enumerate(LINES) if text in line)


def energy(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"]) @ p["u"])  # the energy


def forces(p, x):
    return jnp.sum(jax.grad(energy, argnums=1)(p, x) ** 2)


def tied(p, tokens):
    h = p["e"][tokens]  # rows
    jnp.sort(p["e"])  # a metric that is dropped
    target = jax.lax.stop_gradient(jnp.tanh(h @ p["e"].T))  # the target
    return (jax.nn.log_softmax(h @ p["e"].T) * target).sum()  # the head


def test_explain_names_contracted_axes_and_skipped_derivatives():
    text = explain(forces, {"w": shape(32, 7), "u": shape(7, 1)}, X, parameter="w", v="mean")
    here = line_of("# the energy")
    assert text.splitlines()[0] == "w (32, 7): 1 x 7 blocks"
    assert re.search(
        rf"used in dot_general at \S*test_explain.py:{here}: with \(2, 6, 32\), axis 0 is "
        r"contracted, axis 1 is free\n",
        text,
    )
    assert re.search(
        rf"passed over: dot_general at \S*test_explain.py:{here}, of a derivative", text
    )


def test_explain_names_the_finest_cut_and_uses_without_a_gradient():
    text = explain(tied, {"e": shape(11, 32)}, shape(3, dtype="int32"), parameter="e", v="mean")
    for where, said in {
        "# rows": "used in gather at {}: rows are chosen along axis 0",
        "# the head": "used in dot_general at {}: with (3, 32), axis 1 is contracted, axis 0 is free",
        "# a metric": "passed over: sort at {}, which no output depends on",
        "# the target": "passed over: dot_general at {}, which no gradient passes through",
    }.items():
        pattern = re.escape(said).replace(r"\{\}", rf"\S*test_explain.py:{line_of(where)}")
        assert re.search(pattern, text), (said, text)
    # By neuron (outputs by column), and by row: two cuts, of which the second is finer.
    twice = lambda p, x: (
        jnp.tanh(x @ p["w"]).sum() + (x.mean((0, 1)) @ p["w"].reshape(32, 2, 8)[:, 0])[0]
    )
    lines = explain(twice, {"w": shape(32, 16)}, X, parameter="w", v="mean").splitlines()
    assert [line for line in lines if "(the finest cut)" in line], lines


def test_explain_names_scalars_and_parameters_that_meet_no_data():
    text = explain(lambda p, x: x * p["s"], {"s": shape()}, X, parameter="s", v="mean")
    assert text.startswith("s (): 1 block: a number has one\n  used in mul at ")
    compared = lambda p, x: (x @ p["w"]).sum() + (p["lost"] > 0).sum()  # compared
    params = {"w": shape(32, 5), "lost": shape(4)}
    assert "meets no data in fn" in explain(compared, params, X, parameter="lost", v="mean")
    with pytest.raises(ValueError, match="meets no data in fn") as error:
        infer_block_specs(compared, params, X)
    where = rf"goes into gt at \S*test_explain.py:{line_of('# compared')}\n"
    assert re.search(where, str(error.value))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)


MLP = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
WRONG = {
    "a string": ({"w": shape(4, 2), "name": "a"}, "name: .*got 'a' of type str"),
    "a whole Equinox model": (MLP, r"activation: (.|\n)*eqx.combine\(p, static\)"),
    "a whole NNX model": (
        nnx.split(Net(nnx.Rngs(0)))[1],
        r"dropout/rngs/key(.|\n)*nnx.merge\(graph, p, r\)",
    ),
    "a number of Python": ({"w": 1.0}, "w: expected an array"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", [infer_block_specs, infer_muon_dimension_numbers])
def test_leaves_that_are_not_arrays_are_refused_with_their_path(name, function):
    params, message = WRONG[name]
    with pytest.raises(TypeError, match=rf"{function.__name__}: {message}"):
        function(lambda p, x: x, params, X)


def test_explain_refuses_leaves_that_are_not_arrays():
    with pytest.raises(TypeError, match=r"explain: name: .*got 'a' of type str"):
        explain(lambda p, x: x, {"w": shape(4, 2), "name": "a"}, X, parameter="w", v="mean")


def test_the_code_that_the_refusal_of_a_whole_model_advises_runs():
    """Both lines, the one for NNX and the one for Equinox."""
    with pytest.raises(TypeError) as error:
        infer_block_specs(lambda p, x: x, MLP, X)
    calls = [line.strip() for line in str(error.value).splitlines() if "fn = " in line]
    for call, is_nnx in zip(calls, (True, False), strict=True):
        model, x = (Net(nnx.Rngs(0)), jnp.ones((2, 4))) if is_nnx else (MLP, jnp.ones(4))
        forward = lambda model, x: model.dense(x) if isinstance(model, Net) else model(x)
        names = {"loss_fn": forward, "nnx": nnx, "eqx": eqx}
        if is_nnx:
            names["graph"], params, rest = nnx.split(model, nnx.Param, ...)
            args = (params, rest, x)
        else:
            params, names["static"] = eqx.partition(model, eqx.is_inexact_array)
            args = (params, x)
        assert call.endswith(f"called with {'params, rest' if is_nnx else 'params'}, *args")
        exec(call.rpartition(", called")[0], names)
        specs = infer_block_specs(names["fn"], *args)
        assert len(jax.tree.leaves(specs)) == len(jax.tree.leaves(params))


def test_explain_refuses_a_misspelt_path_with_the_closest_ones():
    fn, params = (lambda p, x: x @ p["a"]["w"]), {"a": {"w": shape(32, 4)}}
    text = (
        r"explain: parameter='a.w' matches no parameter; the closest paths are a/w \(a path reads"
    )
    with pytest.raises(ValueError, match=text):
        explain(fn, params, X, parameter="a.w", v="mean")


@pytest.mark.parametrize("function", [infer_block_specs, infer_muon_dimension_numbers])
@pytest.mark.parametrize("params", [{"w": jnp.ones(3)}, MLP])
def test_swapped_arguments_are_refused(function, params):
    with pytest.raises(TypeError, match=rf"call {function.__name__}\(fn, params, \*args\)"):
        function(params, lambda p, x: x, X)


def test_unreadable_kernels_have_the_given_dimension_numbers():
    fn = lambda p, x: x @ jnp.sort(p["w"]) @ p["u"] @ p["head"]
    params = {"w": shape(32, 5), "u": shape(5, 3), "head": shape(3, 2)}
    with pytest.raises(ValueError, match="unreadable=None"):
        infer_muon_dimension_numbers(fn, params, X)
    given = optax.contrib.MuonDimensionNumbers((0,), (1,))
    for unreadable in (None, given):
        found = infer_muon_dimension_numbers(fn, params, X, unreadable=unreadable)
        assert found == {"w": unreadable, "u": given, "head": None}
    with pytest.raises(TypeError, match="unreadable must be MuonDimensionNumbers, or None"):
        infer_muon_dimension_numbers(fn, params, X, unreadable="adam")


@pytest.mark.slow
def test_a_callable_tree_of_specs_is_not_called():
    params, static = eqx.partition(MLP, eqx.is_inexact_array)
    loss = lambda p, x: jnp.tanh(jax.vmap(eqx.combine(p, static))(x)).sum()
    x = jnp.ones((3, 4))
    specs = infer_block_specs(loss, params, x, v="mean")
    assert callable(specs)
    tx = adam_mini(1e-3, block_specs=specs)
    state = tx.init(params)
    assert state[0].nu.layers[0].weight.shape == (8, 1)
    tx.update(jax.grad(loss)(params, x), state, params)
    assert "layers/1/weight" in block_table(params, specs).columns[0].cells
    switched = from_adam_state(optax.adamw(1e-3).init(params), params, specs)
    assert switched[0].nu.layers[0].weight.shape == (8, 1)


def test_a_users_folder_may_have_a_librarys_name():
    names = {}
    code = "import jax.numpy as jnp\ndef loss(w, x):\n    return jnp.sort(w @ x).sum()\n"
    exec(compile(code, "/home/me/jax/model.py", "exec"), names)
    text = explain(names["loss"], jnp.ones((4, 4)), jnp.ones(4), parameter="")
    assert "/home/me/jax/model.py:3" in text
