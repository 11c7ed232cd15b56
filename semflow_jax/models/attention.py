"""Multi-head attention: softmax(q k^T / sqrt(d)) v, the softmax in float32. One function, a form for each platform.

Short query sequences take the plain form. Long ones never hold the whole score matrix:

    CPU    one head and 256 queries at a time, so that the scores stay in cache
    CUDA   cuDNN's fused kernel, where types and head size allow it
    else   128 queries of all heads at a time, which matrix units and the partitioner of a mesh like better

The choice falls when a program is lowered, so a program traced on one platform compiles for another. cuDNN alone has
to be there at tracing. TPU kernels written in Pallas are left out: the partitioner refuses them on more than one chip.
Chunks are rematerialised in the backward pass.
"""

import jax
import jax.numpy as jnp
from jax.extend import backend
from jaxtyping import Array, Float

CHUNK = 128  # queries at a time
CPU_CHUNK = 256
LONG = 1024  # from this many queries on they go in chunks


def _plain(q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]):
    scores = jnp.einsum("bnkd,bmkd->bknm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def _chunked(q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]):
    b, n, heads, d = q.shape
    padded = jnp.pad(q, ((0, 0), (0, -n % CHUNK), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(b, -1, CHUNK, heads, d), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda chunk: _plain(chunk, k, v)), chunks)
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :n]


def _chunked_by_head(q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]):
    b, n, heads, d = q.shape

    def attend(head):
        # Scaling the queries, and dividing by the softmax's sum at the end, spares two passes over the scores.
        q, k, v = head
        queries = jnp.pad(q * d**-0.5, ((0, -n % CPU_CHUNK), (0, 0))).reshape(-1, CPU_CHUNK, d)

        def chunk(q):
            scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
            weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
            out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)

        return jax.lax.map(jax.checkpoint(chunk), queries).reshape(-1, d)[:n]

    out = jax.lax.map(attend, tuple(jnp.moveaxis(x, 2, 1).reshape(b * heads, -1, d) for x in (q, k, v)))
    return jnp.moveaxis(out.reshape(b, heads, n, d), 1, 2)


def _cudnn(q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _cudnn_can(q: Float[Array, "b n k d"]) -> bool:
    """Whether cuDNN is there and takes this type and head size, on every GPU it supports."""
    d = q.shape[-1]
    return q.dtype.itemsize == 2 and d % 8 == 0 and d <= 128 and "cuda" in backend.get_backend().platform_version


def attention(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]
) -> Float[Array, "b n k d"]:
    """Attends every query to all keys; k heads of size d."""
    if q.shape[1] < LONG:
        return _plain(q, k, v)
    forms = {"cpu": _chunked_by_head, "default": _chunked} | ({"cuda": _cudnn} if _cudnn_can(q) else {})
    return jax.lax.platform_dependent(q, k, v, **forms)
