"""Optax's own tests of its optimizers, from the installed wheel, with adam_mini under test.

The files are read where Optax installed them, the tables of optimizers in them are filled with
ours, and the test classes they define are collected here.
"""

import ast
import functools
import inspect
import pathlib
import types
import unittest
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_adam_mini import adam_mini, per_element, per_neuron, per_tensor
from optax_adam_mini.product import Spec

SPECS: dict[str, Spec | None] = {
    "default": None,
    "per_tensor": per_tensor(),
    "per_neuron": per_neuron(),
    "per_element": per_element(),
}


def cases(learning_rate: float) -> list[dict]:
    """Rows of Optax's tables: a name and keyword arguments."""
    kwargs = {"learning_rate": learning_rate}
    return [{"opt_name": "adam_mini", "opt_kwargs": kwargs}]


def other_cases(learning_rate: float) -> list[dict]:
    """The same of each spec, and in 8 bits."""
    kwargs = {"learning_rate": learning_rate}
    return [
        {"opt_name": "adam_mini", "opt_kwargs": kwargs | {"block_specs": spec}}
        for spec in SPECS.values()
        if spec
    ] + [{"opt_name": "adam_mini_int8", "opt_kwargs": kwargs}]


def factory(*args: object) -> object:
    """What Optax's tests look an optimizer up with (the name is the last argument)."""
    ours = {"adam_mini": resolved(adam_mini), "adam_mini_int8": resolved(in_8_bits)}
    name = str(args[-1])
    return ours[name] if name in ours else getattr(optax, name)


def resolved(build: Any) -> Any:
    """The same with `learning_rate`'s annotation as an object: Optax's tests look for schedules by it."""
    own = functools.wraps(build)(lambda *args, **kwargs: build(*args, **kwargs))
    signature = inspect.signature(build)
    rate = signature.parameters["learning_rate"].replace(annotation=optax.ScalarOrSchedule)
    others = [p for name, p in signature.parameters.items() if name != "learning_rate"]
    own.__signature__ = signature.replace(parameters=[rate, *others])
    return own


@functools.wraps(adam_mini)
def in_8_bits(**kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """Adam-mini with the first moment in 8 bits; complex parameters, which it refuses, are passed
    over."""
    tx = adam_mini(**{**kwargs, "mu_dtype": "int8"})

    def init(params: Any) -> Any:
        if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params)):
            with pytest.raises(TypeError, match="keeps real numbers"):
                tx.init(params)
            raise unittest.SkipTest("complex parameters are refused with 8 bits")
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


class _NoVersionChecks(ast.NodeTransformer):
    def visit_Compare(self, node):
        return ast.Constant(False) if "jax.__version__" in ast.unparse(node) else node


def installed(path: str, test_class: str, tables: dict[str, str], **names: object) -> type:
    """A test class of Optax's, with the value of each variable in `tables` replaced."""
    file = pathlib.Path(optax.__file__).parent / path
    tree = ast.parse(file.read_text())
    # They compare versions as strings, and so skip what JAX 0.10 has had since 0.7.
    tree = _NoVersionChecks().visit(tree)
    body, replaced = [], set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name != test_class:
            continue
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            if name in tables and name not in replaced:
                node.value = ast.parse(tables[name], mode="eval").body
                replaced.add(name)
        body.append(node)
    assert replaced == tables.keys(), "Optax has changed the tables of its tests"
    module = types.ModuleType(f"installed_{file.stem}")
    module.__dict__.update(cases=cases, other_cases=other_cases, SPECS=SPECS, adam_mini=adam_mini)
    module_node = ast.fix_missing_locations(ast.Module(body, type_ignores=[]))
    code = compile(module_node, str(file), "exec")
    exec(code, module.__dict__)
    module.__dict__.update(names)
    return getattr(module, test_class)


def contrib(rows: str) -> type:
    tables = {"_MAIN_OPTIMIZERS_UNDER_TEST": f"{rows}(1e-2)", "_BASE_OPTIMIZERS": f"{rows}(1.0)"}
    return installed("contrib/_common_test.py", "ContribTest", tables, _get_opt_factory=factory)


def alias(rows: str) -> type:
    tables = {"_OPTIMIZERS_UNDER_TEST": f"{rows}(1e-1)"}
    return installed("_src/alias_test.py", "AliasTest", tables, _get_opt=factory)


ContribTest = contrib("cases")
AliasTest = pytest.mark.slow(alias("cases"))  # ContribTest has nearly the same tests
OtherContribTest = pytest.mark.slow(contrib("other_cases"))
OtherAliasTest = pytest.mark.slow(alias("other_cases"))
ShardingTest = installed(
    "_src/sharding_test.py",
    "ShardingTest",
    {
        "OPTIMIZERS": "{k: adam_mini(1.0, block_specs=spec) for k, spec in SPECS.items()}"
        " | {'int8': adam_mini(1.0, mu_dtype='int8')}"
    },
)
for name in [name for name in vars(ShardingTest) if name.startswith("test_microbatch")]:
    delattr(ShardingTest, name)  # has no optimizer in it, and fails on JAX 0.10
