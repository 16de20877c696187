"""Writes codes.npz: codes of the first moment in 8 bits, and what they stand for.

python -m tests.golden.codes makes it anew, which a test then compares with: do so only for a new
format, which says of the old one that it is another (`quantized.unpack_mu`).
"""

import pathlib

import jax.numpy as jnp
import numpy as np

from optax_adam_mini import per_tensor
from optax_adam_mini.random_bits import rounding_seed
from tests.test_quantized import ALL_CODES, GOLDEN, POSITIVE, decode, encode

if __name__ == "__main__":
    found = {}
    for name, spec in GOLDEN.items():
        codes = np.resize(ALL_CODES, (16, 16))
        rng = np.random.default_rng(0)
        nu = spec.block_mean(rng.normal(size=(16, 16)).astype(np.float32) ** 2)
        for i, x in enumerate(nu if isinstance(nu, tuple) else [nu]):
            found[f"{name}/nu{i}"] = np.asarray(x)
        found |= {f"{name}/codes": codes, f"{name}/m": np.asarray(decode(spec, codes, nu))}
    m = jnp.full((4, 4), 0.5 * (POSITIVE[50] + POSITIVE[51]))
    seed = rounding_seed(7, 841920579)
    found["coins"] = np.asarray(encode(per_tensor(), m, jnp.ones((1, 1)) / 1.25**2, seed))
    np.savez(pathlib.Path(__file__).parent / "codes.npz", **found)
