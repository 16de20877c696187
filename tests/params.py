"""Parameters of tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(*quick: str, of: Iterable[str]) -> list[Any]:
    """Names for `pytest.mark.parametrize`, all marked slow but a few."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in of]
