import jax
import jax.numpy as jnp
import optax
import pytest

import optax_adam_mini


@pytest.fixture(autouse=True)
def _docstring_names(doctest_namespace):
    """What the examples in docstrings may use without importing it."""
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax)
    doctest_namespace.update(
        {name: getattr(optax_adam_mini, name) for name in optax_adam_mini.__all__}
    )
