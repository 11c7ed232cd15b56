"""Random numbers of a batch: from one key [] for all of it, or from keys [b], one for each example.

With a key for each example, what is drawn for it depends neither on the others nor on the number of devices, processes
or slices that a batch is divided among.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def example_keys(key: Key[Array, ""], index: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key for each example, by its number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def split(key: Key[Array, "..."], num: int) -> list[Key[Array, "..."]]:
    """`num` keys for each key."""
    keys = jax.vmap(lambda one: jax.random.split(one, num), out_axes=1)(key) if key.ndim else jax.random.split(key, num)
    return list(keys)


def uniform(key: Key[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """U[0, 1) in float32, examples along the first axis."""
    return _draw(jax.random.uniform, key, shape)


def normal(key: Key[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """N(0, 1) in float32, examples along the first axis."""
    return _draw(jax.random.normal, key, shape)


def _draw(fn: Callable[..., Array], key: Array, shape: tuple[int, ...]) -> Array:
    if not key.ndim:
        return fn(key, shape, jnp.float32)
    return jax.vmap(lambda one: fn(one, shape[1:], jnp.float32))(key)
