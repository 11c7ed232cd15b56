"""Few steps by learning where longer ones lead (shortcut models, Frans et al. 2024), in both directions.

The network is told the interval d that its velocity will be followed for, a share of the way, with a sign:
s(z_t, t, d) is the mean velocity between t and t + d, and s(z_t, t, 0) the velocity itself, learned as ever. A jump
must end where two jumps of half its length end,

    s(z_t, t, d) = [ s(z_t, t, d/2) + s(z', t + d/2, d/2) ] / 2,    z' = z_t + d/2 s(z_t, t, d/2),         (1)

whose right side is taken as given. Lengths are |d| = 1, 1/2, ..., 1/32, t lies on the grid of whole jumps, and half of
the shortest is no interval, d = 0. d > 0 leads to the mask, d < 0 to the image.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from semflow_jax import noise

NUM_LENGTHS = 6
JumpFn = Callable[[Float[Array, "b h w c"], Float[Array, " b"], Float[Array, " b"]], Float[Array, "b h w c"]]


def sample_jump(key: Key[Array, "..."], num: int) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """t and d: length, direction and place on the grid, all alike likely."""
    key_length, key_place, key_sign = noise.split(key, 3)
    count = 2.0 ** jnp.floor(NUM_LENGTHS * noise.uniform(key_length, (num,)))  # jumps of this length on the whole way
    start = jnp.floor(count * noise.uniform(key_place, (num,))) / count
    back = noise.uniform(key_sign, (num,)) < 0.5
    return jnp.where(back, 1 - start, start), jnp.where(back, -1 / count, 1 / count)


def target(
    jump_fn: JumpFn, zt: Float[Array, "b h w c"], t: Float[Array, " b"], d: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """The right side of equation (1), with s = jump_fn; no gradient passes through it."""
    half = d / 2
    told = jnp.where(jnp.abs(d) > 2.0 ** (1 - NUM_LENGTHS), half, 0.0)
    first = jump_fn(zt, t, told)
    second = jump_fn(zt + half[:, None, None, None] * first, t + half, told)
    return jax.lax.stop_gradient((first + second) / 2)


def put(every: int, jumps: Float[Array, "n *shape"], rest: Float[Array, "b *shape"]) -> Float[Array, "b *shape"]:
    """`rest`, with each `every`-th example, from the first on, replaced by one of `jumps`."""
    chosen = jnp.arange(len(rest)) % every == 0
    spread = jnp.repeat(jumps, every, axis=0)
    return jnp.where(chosen.reshape(-1, *[1] * (rest.ndim - 1)), spread, rest)


def take(every: int, x: Array) -> Array:
    """Each `every`-th example, from the first on. A slice of a reshaped array: devices keep to their own examples."""
    return x.reshape(len(x) // every, every, *x.shape[1:])[:, 0]
