"""noise.py: what an example draws is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semflow_jax import noise


@pytest.mark.parametrize("draw", [noise.uniform, noise.normal])
def test_examples_draw_alone_what_they_draw_together(draw):
    keys = noise.example_keys(jax.random.key(0), jnp.arange(5))
    together = draw(keys, (5, 2, 3))
    assert together.shape == (5, 2, 3) and together.dtype == jnp.float32
    assert len(np.unique(together)) == 30
    some = jnp.array([4, 1])
    np.testing.assert_array_equal(draw(noise.example_keys(jax.random.key(0), some), (2, 2, 3)), together[some])


def test_one_key_for_a_batch():
    np.testing.assert_array_equal(
        noise.uniform(jax.random.key(1), (4, 2)), jax.random.uniform(jax.random.key(1), (4, 2))
    )


@pytest.mark.parametrize("shape", [(), (4,)])
def test_split_gives_different_keys_of_the_same_shape(shape):
    key = jax.random.key(2)
    key = key if shape == () else noise.example_keys(key, jnp.arange(4))
    parts = noise.split(key, 3)
    assert len(parts) == 3 and all(part.shape == shape for part in parts)
    assert len(np.unique(np.stack([jax.random.key_data(part) for part in parts]).reshape(-1, 2), axis=0)) == 3 * max(
        1, key.size
    )
