"""The faults that tests.mutations puts in can still be put in."""

import pytest

from tests.mutations import FAULTS, ROOT


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_replaces_stands_once(name):
    file, old, new = FAULTS[name]
    assert (ROOT / "optax_adam_mini" / file).read_text().count(old) == 1
    assert old != new
