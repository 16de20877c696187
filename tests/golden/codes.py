"""Writes codes.npz: codes of the first moment in 8 bits, and what they stand for.

python -m tests.golden.codes makes it anew, which a test then compares with: do so only for a new
format, which says of the old one that it is another (`quantized.of_state`).
"""

import pathlib

import numpy as np

from optax_adam_mini.quantized import read
from tests.test_quantized import ALL_CODES, GOLDEN

if __name__ == "__main__":
    found = {}
    for name, spec in GOLDEN.items():
        codes = np.resize(ALL_CODES, (16, 16))
        rng = np.random.default_rng(0)
        nu = spec.block_mean(rng.normal(size=(16, 16)).astype(np.float32) ** 2)
        for i, x in enumerate(nu if isinstance(nu, tuple) else [nu]):
            found[f"{name}/nu{i}"] = np.asarray(x)
        found |= {f"{name}/codes": codes, f"{name}/m": np.asarray(read(spec, codes, nu))}
    np.savez(pathlib.Path(__file__).parent / "codes.npz", **found)
