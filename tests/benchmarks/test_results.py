import json

import pytest

from benchmarks.results import Results
from examples.common.cli import ConfigError


def never():
    raise AssertionError("this was found before")


def test_a_result_is_computed_once_and_kept(tmp_path):
    path = tmp_path / "new" / "study.json"
    asked = {"optimizer": "adamw", "seed": 1}
    assert Results(path, {"steps": 3}).get(asked, lambda: {"loss": 0.5}) == {"loss": 0.5}
    again = Results(path, {"steps": 3})
    assert again.get(asked, never) == {"loss": 0.5}
    # More options make another run, and fewer do too.
    assert again.get({**asked, "width": 4}, lambda: {"loss": 0.25}) == {"loss": 0.25}
    assert again.get({"optimizer": "adamw"}, lambda: {"loss": 1.0}) == {"loss": 1.0}
    assert len(Results(path, {"steps": 3}).runs) == 3


def test_an_interrupted_run_keeps_the_earlier_results(tmp_path):
    results = Results(tmp_path / "study.json", {})
    results.get({"seed": 1}, lambda: {"loss": 1.0})

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.get({"seed": 2}, interrupted)
    assert [run["asked"] for run in Results(tmp_path / "study.json", {}).runs] == [{"seed": 1}]


def test_a_diverged_result_is_valid_json(tmp_path):
    found = Results(tmp_path / "study.json", {}).get({}, lambda: {"loss": float("nan")})
    assert found == {"loss": None}
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    assert json.loads((tmp_path / "study.json").read_text(), **strict)["runs"][0]["found"] == found


def test_results_of_other_settings_are_refused(tmp_path):
    Results(tmp_path / "study.json", {"steps": 3}).get({}, lambda: {})
    with pytest.raises(ConfigError, match=r"study\.json has results of other settings.*--output"):
        Results(tmp_path / "study.json", {"steps": 4})


def test_results_of_another_machine_are_refused(tmp_path, monkeypatch):
    Results(tmp_path / "study.json", {}).get({}, lambda: {})
    monkeypatch.setattr("benchmarks.results.machine", lambda: {"jax": "99"})
    with pytest.raises(ConfigError, match="results of other machine"):
        Results(tmp_path / "study.json", {})
