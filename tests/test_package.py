"""The package as a whole: light to import, silent, and with the interface it says it has."""

import pathlib
import re
import subprocess
import sys

import optax_adam_mini

ROOT = pathlib.Path(__file__).parent.parent


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
    for name in optax_adam_mini.__all__:
        doc = getattr(optax_adam_mini, name).__doc__
        assert doc, name
        assert len(doc) > 40, name


def test_imports_point_one_way():
    package = ROOT / "optax_adam_mini"
    allowed = {
        "blocks.py": set(),
        "report.py": {"blocks"},
        "convert.py": {"blocks", "transform"},
        "transform.py": {"blocks", "partition.flax_layers"},
    }
    for file in sorted(package.rglob("*.py")):
        if file.name == "__init__.py":
            continue
        found = set(
            re.findall(r"^\s*(?:from|import) optax_adam_mini\.(\S+)", file.read_text(), re.M)
        )
        name = file.relative_to(package).as_posix()
        if name.startswith("partition/dataflow/"):
            found = {module for module in found if not module.startswith("partition.dataflow")}
        assert found <= allowed.get(name, {"blocks"}), name
