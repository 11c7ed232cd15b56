"""A cache of image latents: every training image goes through the frozen codec once, as it is and mirrored.

    z_0 = mean + std * eps                                                      (1)

Kept are mean and, where the codec is a distribution, std, in float16; eps is drawn by the training step, so that every
epoch samples anew, as with pixels. A crop or another colour would be another image: training from latents only flips.
Masks are class ids here too, for their perturbation is drawn anew as well.
"""

import functools
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from semflow_jax import parallel
from semflow_jax.codec import Codec
from semflow_jax.data.builders import SUFFIX, write_metadata, write_shard
from semflow_jax.data.chunks import Chunks, alone
from semflow_jax.data.examples import encode_label
from semflow_jax.data.records import Records, load_info, open_records
from semflow_jax.data.source import Item
from semflow_jax.errors import UserError
from semflow_jax.models.build import Params
from semflow_jax.sampling import to_float

EXAMPLES_PER_SHARD = 512
BATCH_SIZE = 16
SPLIT = "train"  # the others are evaluated from their pixels


def ensure_latents(data_dir: str, codec: Codec, progress: bool = True) -> str:
    """The latents of a prepared folder's training images, made where they are missing; where they are.

    They are kept inside of `data_dir`, under a digest of the codec's weights. A stopped call goes on with the next one.

    Raises:
        UserError: images of different sizes, which batches can't hold.
    """
    info = load_info(data_dir)
    if info.fit == "cover":
        raise UserError(f"{data_dir}: images of one size expected for latents, found fit cover; prepare it with crop")
    key = f"{codec.name} {parallel.digest(codec.params)}"
    out_dir = pathlib.Path(data_dir, f"latents-{codec.config['name']}-{parallel.digest(codec.params)[:12]}")
    if out_dir.is_dir():
        return str(out_dir)
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    with alone(partial):
        if out_dir.is_dir():  # made by another process, while this one waited
            return str(out_dir)
        records = open_records(data_dir, SPLIT)
        encode = jax.jit(functools.partial(_encode, codec))
        mean, std = jax.eval_shape(encode, codec.params, np.zeros((BATCH_SIZE, *info.size, 3), np.uint8))
        latent = {"codec": codec.name, "shape": list(mean.shape[2:]), "std": std is not None}
        info = info.replace(latent=latent, pixels={}, skipped=0)

        def write(items: Sequence[Item], path: pathlib.Path) -> dict[str, Any]:
            indices = [item.detail for item in items]
            return write_shard(path, info, _examples(records, indices, encode, codec.params))

        items = [Item(str(i), detail=i) for i in range(len(records))]
        with Chunks(partial, 1, progress) as chunks:
            shards = chunks.map(write, items, EXAMPLES_PER_SHARD, key, "encode", SUFFIX)
        whole = partial / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        write_metadata(whole, info, {SPLIT: shards})
        whole.rename(out_dir)
        shutil.rmtree(partial)
    return str(out_dir)


def _encode(
    codec: Codec, params: Params, image: UInt8[Array, "b h w 3"]
) -> tuple[Float[Array, "b 2 hz wz c"], Float[Array, "b 2 hz wz c"] | None]:
    """Moments of images and of their mirror images."""
    both = jnp.stack([image, image[:, :, ::-1]], axis=1).reshape(-1, *image.shape[1:])
    mean, std = codec.moments(params, to_float(both))

    def stored(x: Float[Array, "n hz wz c"]) -> Float[Array, "b 2 hz wz c"]:
        return x.reshape(-1, 2, *x.shape[1:]).astype(jnp.float16)

    return stored(mean), None if std is None else stored(std)


def _examples(records: Records, indices: list[int], encode: Any, params: Params) -> Iterator[dict[str, Any]]:
    for start in range(0, len(indices), BATCH_SIZE):
        chosen = [records[i] for i in indices[start : start + BATCH_SIZE]]
        images = [example["image"] for example in chosen]
        batch = np.stack(images + [images[-1]] * (BATCH_SIZE - len(images)))  # one shape, one compilation
        mean, std = jax.device_get(encode(params, batch))
        for i, example in enumerate(chosen):
            moments = {"mean": mean[i]} if std is None else {"mean": mean[i], "std": std[i]}
            yield moments | {"label": encode_label(example["label"][..., 0]), "id": example["id"]}
