import json

import pytest

from benchmarks.speed.update import Options, main
from examples.common.cli import ConfigError


@pytest.fixture
def quick(tmp_path):
    def run(**options):
        main(Options(quick=True, output=tmp_path, dtypes=("float32",), **options))
        return json.loads((tmp_path / "update.json").read_text()), (
            tmp_path / "update.md"
        ).read_text()

    return run


@pytest.mark.slow
def test_both_files_have_a_row_for_each_optimizer(quick):
    names = ("AdamW", "Adam-mini, inferred")
    content, markdown = quick(optimizers=names)
    assert content["machine"]["platform"] == "cpu"
    assert content["machine"]["copy_gb_per_second"] > 0
    assert [row["optimizer"] for row in content["rows"]] == 2 * list(names)
    for adamw, mini in zip(content["rows"][::2], content["rows"][1::2], strict=True):
        assert adamw["of_adamw"] == 1
        assert mini["ms"] > 0
        assert mini["state_bytes"] < 0.51 * adamw["state_bytes"]
    assert markdown.count("| Adam-mini, inferred |") == 2
    assert "`python -m benchmarks.speed.update`." in markdown


@pytest.mark.slow
def test_trees_that_are_not_measured_again_keep_their_rows(quick):
    first, _ = quick(optimizers=("AdamW",))
    again, _ = quick(optimizers=("SGD, momentum",), trees=("GPT-2 nano",))
    assert [row["optimizer"] for row in again["rows"]] == ["SGD, momentum", "AdamW"]
    assert again["rows"][1] == first["rows"][1]


@pytest.mark.parametrize("option", ["trees", "optimizers"])
def test_unknown_names_are_refused(quick, option):
    with pytest.raises(ConfigError, match=f"--{option} got nothing like it, but must be of"):
        quick(**{option: ("nothing like it",)})
