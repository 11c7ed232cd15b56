"""Devices: the mesh, and how host arrays become global ones. Models know nothing of this."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from semflow_jax.data.info import cache_dir
from semflow_jax.errors import UserError


def use_cpu_devices(num: int) -> None:
    """Splits the processor into `num` devices, before anything is computed; accelerators are left alone."""
    jax.config.update("jax_num_cpu_devices", num)


def keep_compilations() -> None:
    """Keeps compiled programs in $SEMFLOW_CACHE: a program that was compiled once starts at once."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`.

    The axis is of type Auto: the compiler then places what the code leaves open.
    """
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_batch_size(batch_size: int, mesh: Mesh, key: str = "batch_size") -> int:
    """Examples that each process has to bring to a global batch of `batch_size`; `key` is its name in the config.

    Raises:
        UserError: where the devices can't share the batch equally.
    """
    if batch_size % mesh.size:
        raise UserError(
            f"{key}: a multiple of the number of devices ({mesh.size}), got {batch_size}; "
            f"use {max(1, round(batch_size / mesh.size)) * mesh.size}"
        )
    return batch_size // jax.process_count()


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The processes' slices of a batch -> one global array each, sharded over the devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def digest(flat: dict[str, Any]) -> str:
    """SHA-256 over the sorted parameter paths and their bytes: equal for equal parameters, whatever the machine."""
    sha = hashlib.sha256()
    for path in sorted(flat):
        sha.update(path.encode())
        sha.update(np.ascontiguousarray(jax.device_get(flat[path])).tobytes())
    return sha.hexdigest()
