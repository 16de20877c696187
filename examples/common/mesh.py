"""Training on a mesh of devices, in one process or in several.

The axes of every mesh: `data` (each device has its own examples), `fsdp` (as data, and parameters
are cut over it too) and `tensor` (parameters are cut over it, along what they compute).
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.common.cli import ConfigError
from optax_adam_mini.boxes import leaves_with_path
from optax_adam_mini.labels import path_str

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
ONE_DAY_MS = 24 * 3600 * 1000

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Where to train. A run may go on elsewhere than where it began."""

    mesh: str | None = None
    """Train on all devices of all processes, as a mesh of these axes: data=2,fsdp=2,tensor=2, each
    of them 1 where it is left out. A batch is split over data and fsdp, parameters and optimizer
    state over fsdp and tensor (an axis of a parameter that these do not divide stays whole).
    Without it, train on one device."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, the same for all of them. --runs must then be on
    a file system that all of them see."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0 on."""
    distributed: bool = False
    """One of several processes that a cluster has started which JAX knows (Slurm, Open MPI,
    Kubernetes, TPU pods): it says where the coordinator is."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis of the mesh."""
        sizes: dict[str, int] = {}
        for part in ("data=1" if self.mesh is None else self.mesh).split(","):
            found = re.fullmatch(r"\s*(\w+)=(\d+)\s*", part)
            if not found or found[1] not in AXES or found[1] in sizes or int(found[2]) < 1:
                raise ConfigError(
                    f"--mesh is {self.mesh}, but must be sizes of {', '.join(AXES)}, each at most "
                    "once and at least 1, such as data=2,fsdp=2,tensor=2."
                )
            sizes[found[1]] = int(found[2])
        return {name: sizes.get(name, 1) for name in AXES}

    @property
    def batch_parts(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.sizes[name] for name in BATCH_AXES)

    def check(self) -> None:
        """Refuse what cannot work, before a device is looked at."""
        _ = self.sizes
        process = (self.coordinator, self.num_processes, self.process_id)
        several = process != (None, None, None)
        if several and None in process:
            raise ConfigError(
                "--coordinator, --num-processes and --process-id go together: give all three, or "
                "--distributed where a cluster has started the processes."
            )
        if several and self.distributed:
            raise ConfigError(
                "--distributed takes from the cluster what --coordinator, --num-processes and "
                "--process-id say: leave these out, or --distributed."
            )
        if several and not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"--process-id is {self.process_id}, but must be from 0 to --num-processes - 1 = "
                f"{self.num_processes - 1}."
            )
        if (several or self.distributed) and self.mesh is None:
            raise ConfigError(
                "several processes train together on a mesh of all their devices: give its axes, "
                "such as --mesh fsdp=8."
            )

    def start(self) -> None:
        """Join the other processes, and refuse a mesh that is not of the devices there are. To be
        called before anything else makes JAX look for devices."""
        self.check()
        if self.distributed:
            try:
                jax.distributed.initialize()
            except ValueError as error:
                raise ConfigError(
                    f"--distributed found no cluster ({error}): give --coordinator, "
                    "--num-processes and --process-id."
                ) from error
        elif self.coordinator is not None:
            jax.distributed.initialize(self.coordinator, self.num_processes, self.process_id)
        devices = math.prod(self.sizes.values())
        if self.mesh is not None and devices != jax.device_count():
            raise ConfigError(
                f"--mesh {self.mesh} is of {devices} devices, but there are {jax.device_count()}: "
                f"give sizes whose product is {jax.device_count()}."
            )

    def make_mesh(self) -> Mesh | None:
        """The mesh; None for one device."""
        if self.mesh is None:
            return None
        sizes = self.sizes
        return jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
        )


def is_first() -> bool:
    """Whether this process is the one that writes what only one may write."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Until all processes have come here. Not by a collective of the devices: the first process may
    have much text to read, for which these have not the patience."""
    ocp.multihost.get_barrier_sync_fn()(key="wait_for_all", timeout_ms=ONE_DAY_MS)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process (something that JSON can hold), in every process, when
    all have come here; the others do not call it. Its ConfigError is raised in all of them."""
    if jax.process_count() == 1:
        return make()
    wait_for_all()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome["value"] = make()
        except ConfigError as error:
            outcome["error"] = str(error)
    wait_for_all()
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, length)
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
    if "error" in outcome:
        raise ConfigError(outcome["error"])
    return outcome["value"]


def first_then_others(make: Callable[[], T]) -> T:
    """What `make` gives, called in the first process before the others, which find on the disk what
    it left there. A ConfigError of one of them is raised in all."""
    made: list[T] = []
    from_first(lambda: made.append(make()))
    if jax.process_count() == 1:
        return made[0]
    refusal = None
    if not made:
        try:
            made.append(make())
        except ConfigError as error:
            refusal = error
    refused = np.flatnonzero(multihost_utils.process_allgather(np.array(refusal is not None)))
    if refusal is not None:
        raise refusal
    if len(refused):
        raise ConfigError(f"process {', '.join(map(str, refused))} cannot go on: it says why.")
    return made[0]


def axes_size(mesh: Mesh | AbstractMesh, names: str | tuple[str, ...] | None) -> int:
    """Over how many devices these axes of the mesh are."""
    return math.prod(
        mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ())
    )


def param_shardings(params: Any, rules: Sequence[tuple[str, P]], mesh: Mesh) -> Any:
    """The sharding of every parameter: of the first rule (a regular expression over its path) that
    matches, else whole. The specs are of the last axes, after those of stacked layers; of several
    axes of the mesh, the last ones are left out that do not divide the parameter's."""

    def of_param(keys: Any, param: Any) -> NamedSharding:
        path = path_str(keys)
        spec = next((spec for pattern, spec in rules if re.search(pattern, path)), P())
        spec = [None] * (param.ndim - len(spec)) + list(spec)
        return NamedSharding(mesh, P(*map(dividing, param.shape, spec)))

    def dividing(size: int, names: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (names,) if isinstance(names, str) else names or ()
        while size % axes_size(mesh, names):
            names = names[:-1]
        return names or None

    found = [of_param(keys, param) for keys, param in leaves_with_path(params)]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def split_batch(mesh: Mesh, shape: tuple[int, ...], rows: Callable[[slice], np.ndarray]) -> Any:
    """A batch of this shape over the devices; `rows` gives some of its rows, and every process asks
    for those of its own devices only. A batch that cannot be split evenly goes whole to each."""
    spec = P(BATCH_AXES) if shape[0] % axes_size(mesh, BATCH_AXES) == 0 else P()
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(shape, sharding, lambda index: rows(index[0]))


def inside(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Where `over_batch` knows the mesh, in a function that is traced."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def over_batch(x: jax.Array) -> jax.Array:
    """Activations, the batch first, over the devices as the batch is: left to itself the compiler
    may rather cut them as the parameters are."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % axes_size(mesh, BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))
