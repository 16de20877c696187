"""The package as a whole: light to import, silent, and with the interface it says it has."""

import pathlib
import re
import subprocess
import sys

import optax_adam_mini

PACKAGE = pathlib.Path(optax_adam_mini.__file__).parent


def test_import_is_light_and_silent():
    code = (
        "import sys, jax, optax; config = jax.config.values.copy(); before = set(sys.modules);"
        "import optax_adam_mini; new = set(sys.modules) - before;"
        "assert jax.config.values == config;"
        "assert not new & {'rich', 'jaxtyping', 'flax', 'chex'}, new;"
        "assert all(name.startswith('optax_adam_mini') for name in new), new"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_everything_public_is_documented():
    for name in set(optax_adam_mini.__all__) - {"BlockSpecs"}:  # an alias, which has none
        doc = getattr(optax_adam_mini, name).__doc__
        assert doc, name
        assert len(doc) > 40, name


# Who may import whom, from the bottom up: a module imports those before it alone, and of its own
# layer none. `dataflow` stands for all modules below it.
LAYERS = [
    ["sums_on_cpu", "hyperparams", "boxes"],
    ["sums"],
    ["blocks"],
    ["product"],
    ["labels"],
    ["random_bits", "messages", "dimension_numbers"],
    ["rounding", "quantized"],
    ["momentum"],
    ["partition.by_path", "partition.flax_layers", "partition.logical_axes", "partition.measured",
     "dataflow", "sharding", "hessian"],
    ["transform"],
    ["convert", "muon"],
    ["report"],
]  # fmt: skip
# Within dataflow, module by module.
DATAFLOW = ["kernels", "folding", "program", "indices", "products", "inline", "groups", "axes", "domain", "taps", "members", "rules", "forward", "backward",
            "roles", "interpret", "matrices", "specs", "rows", "explain", "infer"]  # fmt: skip
RULES = ["registry", "elementwise", "layout", "linalg", "inner_products",
         "contractions", "reductions", "indexing",
         "devices", "loops"]  # fmt: skip


def imports():
    """(module, imported module), by their names in the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        if name.endswith("__init__"):
            continue
        for found in re.findall(
            r"^\s*(?:from|import) optax_adam_mini\.(\S+)", file.read_text(), re.M
        ):
            yield name, found


def rank(name, layers):
    return next(i for i, layer in enumerate(layers) if name in layer)


def test_imports_point_one_way():
    flow = "partition.dataflow."
    pairs = list(imports())
    assert len(pairs) > 60  # that they are found at all
    for name, found in pairs:
        if name.startswith(flow + "rules.") and found.startswith(flow + "rules."):
            own, other = (RULES.index(x.removeprefix(flow + "rules.")) for x in (name, found))
        elif name.startswith(flow) and found.startswith(flow):
            own, other = (DATAFLOW.index(x.removeprefix(flow).split(".")[0]) for x in (name, found))
        else:
            whole = ["dataflow" if x.startswith(flow) else x for x in (name, found)]
            own, other = (rank(x, LAYERS) for x in whole)
        assert other < own, f"{name} imports {found}"


def test_no_public_name_appears_or_disappears():
    """Name by name."""
    assert sorted(optax_adam_mini.__all__) == [
        "BlockSpec", "BlockSpecs", "ScaleByAdamMiniState", "StochasticRoundingState", "adam_mini", "block_table", "by_logical_axes",
        "by_path", "explain", "flax_layers", "from_adam_state", "fused", "infer_block_specs",
        "infer_muon_dimension_numbers", "measure_block_specs", "muon_mini", "opt_state_shardings", "outer",
        "per_element", "per_head",
        "per_neuron", "per_tensor", "per_token", "scale_by_adam_mini", "stochastic_rounding",
        "to_adam_state",
    ]  # fmt: skip


def test_an_optimizer_may_be_built_before_the_processes_of_jax_are_joined():
    """As `optax.adamw` may, in a module of configurations: a schedule is not computed."""
    code = (
        "import jax, optax; from optax_adam_mini import adam_mini, muon_mini;"
        "adam_mini(optax.cosine_decay_schedule(1e-3, 10)); muon_mini(1e-3, 'dion');"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
