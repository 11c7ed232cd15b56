"""parallel.py: batches to devices, and a digest that any change of the parameters changes."""

from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from semflow_jax import parallel
from semflow_jax.errors import UserError


def make_fake_mesh(shape: Sequence[int], processes: tuple[int, ...]) -> Mesh:
    """A mesh of devices that belong to these processes."""
    devices = np.array([mock.Mock(process_index=i) for i in processes]).reshape(shape)
    return mock.Mock(spec=Mesh, devices=devices, shape=dict(zip(parallel.AXES, shape, strict=True)))


def test_batches_arrive_as_they_are():
    mesh = parallel.make_mesh()
    batch = {"image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "valid": np.array([True, False])}
    found = parallel.to_global(batch, mesh)
    for name, x in batch.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == x.dtype and found[name].sharding == parallel.batch_sharding(mesh)


@pytest.mark.parametrize(("batch_size", "near"), [(15, 16), (2, 8), (33, 32)])
def test_devices_share_a_batch_equally(batch_size, near):
    mesh = Mesh(np.array(jax.devices() * 8).reshape(4, 2, 1), parallel.AXES)  # eight times the same, to count to eight
    assert parallel.local_batch_size(near, mesh) == near
    with pytest.raises(UserError, match=rf"eval.batch_size: .* devices \(8\), got {batch_size}; use {near}"):
        parallel.local_batch_size(batch_size, mesh, "eval.batch_size")


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (None, (8, 1, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 8)),
    ],
)
def test_a_mesh_takes_all_devices(monkeypatch, shape, sizes):
    monkeypatch.setattr(mesh_utils, "create_device_mesh", lambda sizes, devices, **_: np.reshape(devices, sizes))
    found = parallel.make_mesh(shape, jax.devices() * 8)
    assert found.shape == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


@pytest.mark.parametrize("shape", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": -1, "fsdp": -1}, {"data": 0}])
def test_a_mesh_that_does_not_fit(shape):
    with pytest.raises(UserError, match=r"^mesh: .* number of devices \(8\), .* got "):
        parallel.make_mesh(shape, jax.devices() * 8)


@pytest.mark.parametrize(
    ("shape", "processes", "shares"),
    [
        ((4, 1, 1), (0, 0, 1, 1), [(0, 2), (1, 2)]),
        ((2, 2, 1), (0, 1, 0, 1), [(0, 2), (1, 2)]),  # not neighbours
        ((2, 1, 2), (0, 0, 1, 1), [(0, 2), (1, 2)]),
        ((1, 1, 4), (0, 0, 1, 1), [(0, 1), (0, 1)]),  # layers that span processes: both bring the same
        ((2, 1, 2), (0, 1, 2, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_parts_of_a_batch(monkeypatch, shape, processes, shares):
    mesh = make_fake_mesh(shape, processes)
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert parallel.batch_share(mesh) == share


def test_parts_of_a_batch_that_overlap():
    mesh = make_fake_mesh((3, 1, 2), (0, 0, 0, 1, 1, 1))
    with pytest.raises(UserError, match=r"^mesh.tensor: must divide the devices of a process"):
        parallel.batch_share(mesh)


@pytest.mark.parametrize("given", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}])
def test_half_a_cluster(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"^environment: JAX_COORDINATOR_ADDRESS, .* go together, found .*; set the oth"
    ):
        parallel.initialize()


def test_a_cluster_that_does_not_count(monkeypatch):
    for name, value in {"COORDINATOR_ADDRESS": "localhost:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(UserError, match=r"^environment: .* found localhost:1, two, 0: invalid literal"):
        parallel.initialize()


def make_params() -> dict[str, jax.Array]:
    return {"b": jnp.arange(4.0), "a": jnp.ones((2, 3), jnp.bfloat16)}


def test_digest_of_equal_parameters():
    params = make_params()
    digest = parallel.digest(params)
    assert len(digest) == 64
    assert parallel.digest(dict(reversed(params.items()))) == digest
    assert parallel.digest({name: np.asarray(x) for name, x in params.items()}) == digest


@pytest.mark.parametrize(
    "changed",
    [
        {"b": jnp.arange(4.0).at[3].add(1e-6)},
        {"a": jnp.ones((2, 3), jnp.bfloat16) + 0.01},
        {"c": jnp.zeros(1)},
    ],
)
def test_digest_of_other_parameters(changed):
    assert parallel.digest(make_params() | changed) != parallel.digest(make_params())
