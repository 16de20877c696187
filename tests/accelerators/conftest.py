"""What XLA's compilers for TPUs and GPUs say; no such device is needed.

`.ci/run` makes an environment that has the compilers (benchmarks/chips.py says what to install).
"""

import pytest

from benchmarks.chips import without_devices


@pytest.fixture(autouse=True, scope="session")
def _no_devices():
    without_devices()


def needs_compiler(topology: str) -> None:
    """Skips the test where there is none for such a chip."""
    if topology.startswith("h100"):
        why = "XLA's compiler for NVIDIA GPUs is not installed (jax-cuda12-plugin and others)"
        for module in ("jax_cuda12_plugin", "nvidia.cuda_nvcc"):
            pytest.importorskip(module, reason=why)
    else:
        pytest.importorskip("libtpu", reason="XLA's compiler for TPUs is not installed (jax[tpu])")
