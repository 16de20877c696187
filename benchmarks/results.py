"""Results of benchmarks: JSON with a page of Markdown. Long benchmarks write their JSON file run by
run, so that they can be interrupted and continued."""

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from examples.common import runs
from examples.common.cli import ConfigError

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""Heading -> text of its cell."""


def machine() -> dict[str, str]:
    """The versions and the device that the numbers depend on."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def markdown(columns: Columns, rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_rows(
    folder: Path,
    name: str,
    heading: str,
    command: str,
    facts: str,
    columns: Columns,
    content: Mapping[str, Any],
) -> None:
    """Writes `content` to name.json, and its `rows` to the page name.md.

    The page names the command that wrote it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / f"{name}.json", content)
    text = f"# {heading}\n\n`{command}`. {facts}\n\n{markdown(columns, content['rows'])}"
    (folder / f"{name}.md").write_text(text)


class Results:
    """The runs of one study, in the file `path`. Each has `asked`, its settings, and `found`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Begins the file, or continues it if its settings are the same."""
        self._path = path
        self._content: dict[str, Any] = {
            "settings": json.loads(json.dumps(settings)),  # tuples become lists, as in the file
            "machine": machine(),
            "runs": [],
        }
        if path.exists():
            found = json.loads(path.read_text())
            differing = [
                part for part in ("settings", "machine") if found[part] != self._content[part]
            ]
            if differing:
                raise ConfigError(
                    f"{path} has results of other {' and '.join(differing)}, which cannot stand "
                    "beside new ones: move it away, or give another --output."
                )
            self._content = found

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All runs so far."""
        return self._content["runs"]

    def get(
        self, asked: Mapping[str, Any], find: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What was found for `asked`; calls `find` if there is no such run yet."""
        for run in self.runs:
            if run["asked"] == asked:
                return run["found"]
        found = {name: _finite(value) for name, value in find().items()}
        self.runs.append({"asked": dict(asked), "found": found})
        self._write()
        return found

    def conclude(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Stores the rows of the table beside the runs that they were made from."""
        self._content["rows"] = rows
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(self._path, self._content)


def _finite(value: Any) -> Any:
    """The value, or None for numbers that JSON cannot write: NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
