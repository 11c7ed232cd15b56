"""Multi-head attention: softmax(q k^T / sqrt(d)) v, the softmax in float32. One function, a form for each platform.

Short query sequences take the plain form. Long ones never hold the whole score matrix:

    CPU    one head and 128 queries at a time, so that the scores stay in cache
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
    heads = tuple(jnp.moveaxis(x, 2, 0)[..., None, :] for x in (q, k, v))
    return jnp.moveaxis(jax.lax.map(lambda head: _chunked(*head), heads)[..., 0, :], 0, 2)


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
