"""Every block of Python in README and docs runs as it is pasted, alone."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks():
    """(page, its blocks of Python at their own line numbers)."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^( *)```python\n((?:.*\n)*?)\1```", text, re.M):
            code = "".join(
                line.removeprefix(found[1]) for line in found[2].splitlines(keepends=True)
            )
            line = text.count("\n", 0, found.start(2))
            name = f"{page.relative_to(ROOT)}:{line + 1}"
            yield pytest.param(page, "\n" * line + code, id=name)


def test_python_blocks_of_the_docs_are_found():
    assert len(list(blocks())) >= 15


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), list(blocks()))
def test_a_python_block_of_the_docs_runs_alone(page, code):
    if needs := re.match(r"\n*# Needs (\w+)", code):
        pytest.importorskip(needs[1], reason=f"{needs[1]} is not installed")
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
