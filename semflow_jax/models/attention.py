"""Multi-head attention: softmax(q k^T / sqrt(d)) v, the softmax in float32. One function, a form for each platform.

Few queries, or few keys, take the plain form. Else the whole score matrix is never held:

    CPU    one head and 256 queries at a time, so that the scores stay in cache
    CUDA   cuDNN's fused kernel, where types and head size allow it
    TPU    JAX's splash attention, in programs that each device runs for itself (`jax.shard_map`): the partitioner,
           which divides other programs, refuses kernels
    else   128 queries of all heads at a time, which matrix units and the partitioner of a mesh like better

The choice falls when a program is lowered, so a program traced on one platform compiles for another. cuDNN alone has
to be there at tracing. Chunks are rematerialised in the backward pass.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.extend import backend
from jax.sharding import AxisType
from jaxtyping import Array, Float

CHUNK = 128  # queries at a time
CPU_CHUNK = 256
LONG = 1024  # from this many queries on they go in chunks on CPU and CUDA
WIDE = 2**19  # from so many scores of a head on they do elsewhere
BLOCKS = (512, 1024)  # queries and keys that the TPU kernel holds at a time


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


def _each_device_alone() -> bool:
    """Whether this is traced inside `jax.shard_map` over all axes of a mesh."""
    types = jax.sharding.get_abstract_mesh().axis_types
    return bool(types) and all(kind == AxisType.Manual for kind in types)


def splash(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"], interpret: bool = False
) -> Float[Array, "b n k d"]:
    """The TPU kernel; n and m are multiples of its blocks."""
    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    block_q, block_kv = min(BLOCKS[0], n), min(BLOCKS[1], m)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((n, m))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)


def _splash_can(n: int, m: int) -> bool:
    """Whether blocks fill both sequences."""
    return _each_device_alone() and all(
        length % min(block, length) == 0 and length % 128 == 0 for length, block in zip((n, m), BLOCKS, strict=True)
    )


def attention(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"]
) -> Float[Array, "b n k d"]:
    """Attends every query to all keys; k heads of size d."""
    n, m = q.shape[1], k.shape[1]
    if n < LONG:
        return _plain(q, k, v)
    forms = {"cpu": _chunked_by_head, "default": _chunked if n * m >= WIDE else _plain}
    if _cudnn_can(q):
        forms["cuda"] = _cudnn
    if n * m >= WIDE and _splash_can(n, m):
        forms["tpu"] = splash
    return jax.lax.platform_dependent(q, k, v, **forms)
