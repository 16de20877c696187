"""TPUs and GPUs that need not be present: XLA compiles for them and reports what a program needs.

python3 -m venv chips && chips/bin/pip install --editable '.[examples]' 'jax[tpu]'
version=$(chips/bin/python -c 'import jax; print(jax.__version__)')
chips/bin/pip install --no-deps jax-cuda12-{plugin,pjrt}==$version nvidia-cuda-{nvcc,runtime}-cu12

The compiled program is the one that would run there. Its time is unknown: no kernel is run, and GPU
kernels are not autotuned.
"""

import functools
import os
import re
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from examples.common.cli import ConfigError


class Chip(NamedTuple):
    """Published facts about a chip."""

    bandwidth: float
    """Bandwidth of its device memory, bytes per second."""
    memory: float
    """Bytes that a program may use."""
    one: str
    """The smallest topology of this chip."""


# Bandwidths: Cloud TPU documentation, "TPU v5e", "TPU v5p", "TPU v6e"; NVIDIA H100 data sheet, SXM.
# Memory of a TPU: its compiler's "available HBM", less the 258 MiB that it reserves on a v5e.
# Memory of an H100: 80 of its 85 GB; the driver, CUDA and the collectives need the rest.
RESERVED = 258 * 2**20
CHIPS = {
    "v5e": Chip(819e9, 15.75 * 2**30 - RESERVED, "v5e:2x2"),
    "v5p": Chip(2765e9, 95.74 * 2**30 - RESERVED, "v5p:2x2x1"),
    "v6e": Chip(1640e9, 31.25 * 2**30 - RESERVED, "v6e:2x2"),
    "h100": Chip(3350e9, 80e9, "h100:1"),
}
# The description of an H100 SXM that the compiler needs, from its data sheet and from XLA.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
EXAMPLES = "v5e:2x4, v5p:2x2x1, v6e:2x4 or h100:8"


def without_devices() -> None:
    """Lets the compilers run without their devices. Call it before JAX looks for devices."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # several processes may load it: they share no device
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not here can be written to a cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()


def chip_of(topology: str) -> Chip:
    """The chip of a topology CHIP:SHAPE."""
    name = topology.partition(":")[0]
    if name not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)*", topology):
        raise ConfigError(
            f"{topology} is no topology: give CHIP:SHAPE, such as {EXAMPLES}, with a chip of "
            f"{', '.join(CHIPS)}."
        )
    return CHIPS[name]


@functools.cache  # each description has its own devices
def devices(topology: str) -> list[Any]:
    """The devices of a topology, such as v5e:2x4 or h100:8."""
    chip_of(topology)
    name, _, shape = topology.partition(":")
    try:
        if name == "h100":
            return topologies.get_topology_desc(
                platform="cuda", topology_name="", topology=f"1x1x{shape}", target_config=H100
            ).devices
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"there is no compiler for {topology} ({error}): benchmarks/chips.py says what to "
            "install."
        ) from error


def versions() -> dict[str, str]:
    """The versions of the compilers; XLA for GPUs is part of JAX."""
    try:
        return {"jax": jax.__version__, "libtpu": metadata.version("libtpu")}
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            "the compiler for TPUs, libtpu, is not installed: benchmarks/chips.py says how to "
            "install it."
        ) from error
