import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """These tests compile many small programs and run each of them a few times."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick_execution():
    """For tests that train: the optimizations that the others go without."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
