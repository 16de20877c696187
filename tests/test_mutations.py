"""Every fault that tests.mutations puts into a copy of the package fails the test it names."""

import pytest

from tests.mutations import FAULTS, PACKAGE, Copy


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("copy"))


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_fault_replaces_stands_once(name):
    fault = FAULTS[name]
    assert (PACKAGE / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name, copy):
    assert copy.outcome(FAULTS[name]) == "caught"
