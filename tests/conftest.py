import atexit
import gc
import os
import shutil
import tempfile

# Before JAX is imported: compiled programs are kept for the length of the run, for all workers and
# for the examples that tests start. Many tests compile what another one has compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import jax
import pytest

# Ordinarily as many examples as a short suite has time for: each compiles programs of its own.
PROFILES = {"ordinary": 6, "thorough": 40, "nightly": 2000}
for name, max_examples in PROFILES.items():
    hypothesis.settings.register_profile(name, max_examples=max_examples, deadline=None)
hypothesis.settings.register_profile(  # for tests that are to fail, and no more than that
    "faults",
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ordinary")
hypothesis.settings.load_profile(PROFILE)

# Traced programs are many small objects: looking for garbage as often as usual takes a fifth of the
# time.
gc.set_threshold(50_000, 20, 50)

# Before any device is asked for: tests of sharding need several.
jax.config.update("jax_num_cpu_devices", 8)

# Tests of compiled programs, of times, and of long computations in small ones.
OPTIMIZED = ("accelerators", "eager", "export", "memory", "primitives", "product", "quantized",
             "sums", "speed")  # fmt: skip


@pytest.fixture(autouse=True)
def _compile_fast(request):
    """Ordinarily without most optimizations: these tests compile more than they run."""
    parts = request.path.parts
    if "examples" in parts:  # these say so themselves
        return
    is_optimized = PROFILE != "ordinary" or any(
        f"test_{name}.py" in parts or name in parts for name in OPTIMIZED
    )
    jax.config.update("jax_disable_most_optimizations", not is_optimized)
