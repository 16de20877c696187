"""What needs no compiler; tests/accelerators has the rest."""

import pytest

from benchmarks.chips import RESERVED, chip_of
from benchmarks.memory.fits import largest, used
from examples.common.cli import ConfigError


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 13, 400])
@pytest.mark.parametrize(
    "total", [lambda n: 5 + 3 * n, lambda n: 5 + n**1.5, lambda n: 9 * (n // 3)]
)
def test_the_most_that_fits_is_found_in_few_tries(most, total):
    tries = []
    limit = (total(most) + total(most + 1)) / 2
    expected = max(n for n in range(most + 4) if total(n) <= limit)
    assert largest(lambda n: tries.append(n) or total(n), limit) == expected
    assert len(tries) == len(set(tries)) <= 14


def test_the_memory_in_a_compilers_error_is_parsed():
    error = "Used 15.77G of 15.75G hbm.\n\nTotal hbm usage >= 16.03G:\n    reserved        258.00M"
    assert used(error) == pytest.approx(16.03 * 2**30 - RESERVED)
    assert used("required for HLO temporaries (8.00T) exceeds") == 8 * 2**40 - RESERVED
    with pytest.raises(ValueError, match="another"):
        used("another error")


def test_topologies_on_the_command_line_are_parsed():
    assert chip_of("v5p:2x2x1").bandwidth == 2765e9
    for wrong in ("v5e", "v5e:", "cpu:8", "v5e:2x"):
        with pytest.raises(ConfigError, match="CHIP:SHAPE"):
            chip_of(wrong)
