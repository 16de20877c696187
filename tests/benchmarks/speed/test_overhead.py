import json

import pytest

from benchmarks.speed.overhead import Options, main
from examples.common.cli import ConfigError


@pytest.mark.slow
def test_both_files_have_a_row_for_each_thing(tmp_path):
    main(Options(quick=True, output=tmp_path))
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [
        *(
            f"trace and compile, {arrays} arrays{kept}"
            for arrays in ("unrolled: 28", "scanned: 16")
            for kept in ("", ", outer", ", outer, 8 bits")
        ),
        "call without jit, nano, unrolled: 28 arrays",
        "call without jit, nano, one layer: 16 arrays",
        "import beyond jax and optax",
    ]
    assert all(row["Adam-mini"] > 0 for row in rows)
    assert all(row["AdamW"] > 0 for row in rows[:-1])
    page = (tmp_path / "overhead.md").read_text()
    assert "| import beyond jax and optax |" in page
    assert "`python -m benchmarks.speed.overhead --rounds 1`." in page


def test_wrong_options_are_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="--rounds is 0, but must be at least 1"):
        main(Options(rounds=0, output=tmp_path / "results"))
    assert not (tmp_path / "results").exists()
