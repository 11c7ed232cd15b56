"""Multi-head attention: softmax(q k^T / sqrt(d)) v, the softmax in float32.

Long query sequences go through in chunks, so that the score matrix of a chunk stays in cache and the whole one never
exists; each chunk is rematerialised in the backward pass for the same reason.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK = 128  # queries at a time; short sequences are one chunk
WHOLE = 1024  # up to this many queries the plain form is as fast


def _attend(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]
) -> Float[Array, "b n k d"]:
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def attention(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]
) -> Float[Array, "b n k d"]:
    """Attends every query to all keys; k heads of size d."""
    b, n, heads, d = q.shape
    if n <= WHOLE or n % CHUNK:
        return _attend(q, k, v)
    chunks = jnp.moveaxis(q.reshape(b, n // CHUNK, CHUNK, heads, d), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda chunk: _attend(chunk, k, v)), chunks)
    return jnp.moveaxis(out, 0, 1).reshape(b, n, heads, d)
