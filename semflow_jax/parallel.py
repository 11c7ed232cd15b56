"""Devices and processes: the mesh, which part of an array each device holds, how host arrays become global ones.

A mesh has three axes. Examples are split over `data` and `fsdp`; parameters, their moving average and the optimizer's
moments over `fsdp` (Rajbhandari et al. 2020, ZeRO) and, inside layers, over `tensor` (Shoeybi et al. 2019):

    layer          weight [in out]      activations between the two
    q, k, v        [in out/tensor]      heads
    out            [in/tensor out]
    conv1, proj    [in out/tensor]      channels
    conv2, net.2   [in/tensor out]

Models know nothing of this: the compiler places what lies between.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from orbax.checkpoint import multihost

from semflow_jax.data.info import cache_dir
from semflow_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
EXAMPLES = ("data", "fsdp")  # the axes that examples are split over
HEARTBEAT_SECONDS = 15  # a process that is silent for so long is lost, and the others end
USER_ERROR = 2  # exit code: to start again won't help
SMALL = 2**14  # arrays of fewer numbers are kept whole on every device

COLUMNS = re.compile(r"\.(to_[qkv]|conv1|time_emb_proj|proj)\.(weight|bias)$")  # tensor splits the last axis
ROWS = re.compile(r"\.(to_out\.0|conv2|net\.2)\.weight$")  # tensor splits the last but one


def initialize() -> None:
    """Joins the other processes of a cluster, before anything is computed; on a single machine does nothing.

    JAX finds Cloud TPU, Slurm and Open MPI itself. Elsewhere the environment says JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: some of the three and not all, or no number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    try:
        if len(found) == len(names):
            address, num, index = found.values()
            jax.distributed.initialize(address, int(num), int(index), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        elif "JAX_NUM_PROCESSES" in found or "JAX_PROCESS_ID" in found:
            raise UserError(f"environment: {', '.join(names)} go together, found {', '.join(found)}; set the others")
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        if found:
            raise UserError(f"environment: {', '.join(names)}, found {', '.join(found.values())}: {error}") from error
        # There is no cluster.


def wait_for_all(name: str, timeout: int = 24 * 3600) -> None:
    """Lets all processes come to the same place, each of which has a name of its own, however long it takes.

    Collectives of the devices wouldn't do: gloo's wait for 30 seconds, and one process may prepare data for an hour.
    """
    if jax.process_count() > 1:
        multihost.sync_global_processes(name, timeout=timeout, processes=set(range(jax.process_count())))


def leave(code: int) -> NoReturn:
    """Ends a process that failed. At a usual exit JAX waits five minutes for the others, and they for its part.

    An error of the user is one in all processes, as a rule: each may tell it before process 0, whose end ends them all.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        sys.exit(code)
    if code == USER_ERROR:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # they didn't come
            wait_for_all("an error of the user", timeout=5)
            time.sleep(0 if jax.process_index() else 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def use_cpu_devices(num: int) -> None:
    """Splits the processor into `num` devices, before anything is computed; accelerators are left alone."""
    jax.config.update("jax_num_cpu_devices", num)


def keep_compilations() -> None:
    """Keeps compiled programs in $SEMFLOW_CACHE: a program that was compiled once starts at once."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_mesh(shape: Mapping[str, int] | ConfigDict | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes, along three axes of type Auto: the compiler places what the code leaves open.

    Args:
        shape: sizes of `data`, `fsdp` and `tensor`; one of them may be -1, the rest. By default all are `data`.
        devices: others than those that are there.

    Raises:
        UserError: sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [(shape or {"data": -1}).get(axis, 1) for axis in AXES]
    known = int(np.prod([n for n in sizes if n != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes = [len(devices) // known if n == -1 else n for n in sizes]
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: data x fsdp x tensor must be the number of devices ({len(devices)}), and one of them may be -1 for "
            f"the rest, got {' x '.join(map(str, sizes))}; change one of them"
        )
    # `jax.make_mesh` would not divide a side of a torus between two axes.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices, except where they share a layer."""
    return NamedSharding(mesh, PartitionSpec(EXAMPLES))


def num_batch_shards(mesh: Mesh) -> int:
    """Parts that a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh, fsdp: bool = True) -> PartitionSpec:
    """Which axes of a parameter are split: by `tensor` as its layer wants it, by `fsdp` the longest other one.

    Args:
        path: the checkpoint's key.
        fsdp: False for a copy that is whole but for `tensor`.
    """
    spec: list[str | None] = [None] * len(shape)
    if int(np.prod(shape)) < SMALL:
        return PartitionSpec()
    axis = len(shape) - 1 if COLUMNS.search(path) else len(shape) - 2 if ROWS.search(path) else -1
    if axis >= 0 and mesh.shape["tensor"] > 1 and shape[axis] % mesh.shape["tensor"] == 0:
        spec[axis] = "tensor"
    if fsdp and mesh.shape["fsdp"] > 1:
        free = [i for i, n in enumerate(shape) if spec[i] is None and n % mesh.shape["fsdp"] == 0]
        if free:
            spec[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    return PartitionSpec(*spec)


def shardings(tree: Any, mesh: Mesh, fsdp: bool = True) -> Any:
    """The sharding of each array of a tree whose last keys are checkpoint keys: parameters, averages, moments."""

    def find(keys: tuple[Any, ...], x: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(str(getattr(keys[-1], "key", "")), x.shape, mesh, fsdp))

    return jax.tree_util.tree_map_with_path(find, tree)


def place(tree: Any, target: Any) -> Any:
    """Host arrays, equal in all processes -> global ones of the shardings `target`; a device is given its part only."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        host = jax.device_get(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(one, tree, target)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, equal in all processes -> global ones, whole on every device."""
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def of_first(tree: Any, name: str) -> Any:
    """Process 0's host arrays in all processes, which come to this place, see `wait_for_all`, with shapes like them."""
    if jax.process_count() == 1:
        return tree
    wait_for_all(name)
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch this process brings, and how many parts there are.

    Processes whose devices share layers bring the same part.

    Raises:
        UserError: where the devices of two processes overlap in part.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(num_batch_shards(mesh), -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != num_batch_shards(mesh) or len({len(part) for part in parts}) != 1:
        raise UserError(
            f"mesh.tensor: must divide the devices of a process or be a multiple of them, got {mesh.shape['tensor']} "
            f"with {jax.local_device_count()} devices; change it"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def local_batch_size(batch_size: int, mesh: Mesh, key: str = "batch_size") -> int:
    """Examples that each process has to bring to a global batch of `batch_size`; `key` is its name in the config.

    Raises:
        UserError: where the devices can't share the batch equally.
    """
    shards = num_batch_shards(mesh)
    if batch_size % shards:
        raise UserError(
            f"{key}: a multiple of the number of devices ({shards}), got {batch_size}; "
            f"use {max(1, round(batch_size / shards)) * shards}"
        )
    return batch_size // batch_share(mesh)[1]


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The processes' parts of a batch -> one global array each, sharded over the devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def to_host(x: Any) -> np.ndarray:
    """A global array, whole, in every process; all of them have to ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def digest(flat: dict[str, Any]) -> str:
    """SHA-256 over the sorted parameter paths and their bytes: equal for equal parameters, whatever the machine."""
    sha = hashlib.sha256()
    for path in sorted(flat):
        sha.update(path.encode())
        sha.update(np.ascontiguousarray(to_host(flat[path])).tobytes())
    return sha.hexdigest()
