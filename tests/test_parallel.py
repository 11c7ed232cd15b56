"""parallel.py: batches to devices, and a digest that any change of the parameters changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from semflow_jax import parallel
from semflow_jax.errors import UserError


def test_batches_arrive_as_they_are():
    mesh = parallel.make_mesh()
    batch = {"image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "valid": np.array([True, False])}
    found = parallel.to_global(batch, mesh)
    for name, x in batch.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == x.dtype and found[name].sharding == parallel.batch_sharding(mesh)


@pytest.mark.parametrize(("batch_size", "near"), [(15, 16), (2, 8), (33, 32)])
def test_devices_share_a_batch_equally(batch_size, near):
    mesh = Mesh(np.array(jax.devices() * 8), ("data",))  # eight times the same, to count to eight
    assert parallel.local_batch_size(near, mesh) == near
    with pytest.raises(UserError, match=rf"eval.batch_size: .* devices \(8\), got {batch_size}; use {near}"):
        parallel.local_batch_size(batch_size, mesh, "eval.batch_size")


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
