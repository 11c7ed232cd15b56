"""A cache of image latents: every training image goes through the frozen codec once, as it is and mirrored.

    z_0 = mean + std * eps                                                      (1)

Kept are mean and, where the codec is a distribution, std, in float16; eps is drawn by the training step, so that every
epoch samples anew, as with pixels. A crop or another colour would be another image: training from latents only flips.
Masks are class ids here too, for their perturbation is drawn anew as well. Of a mask code that leaves most of its work
to the codec, latents are kept beside them: one before the perturbation, or, of colours, which are perturbed before the
codec sees them, some with a perturbation each. `keep` is the machinery: `reflow.py` keeps more with it.
"""

import functools
import hashlib
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from semflow_jax import noise, parallel
from semflow_jax.codec import Codec
from semflow_jax.data.builders import SUFFIX, write_metadata, write_shard
from semflow_jax.data.chunks import Chunks, alone
from semflow_jax.data.examples import encode_label
from semflow_jax.data.records import Records, load_info, open_records
from semflow_jax.data.source import Item
from semflow_jax.data.transforms import mirrored_ids
from semflow_jax.errors import UserError
from semflow_jax.mask_code import MaskCode
from semflow_jax.models.build import Params
from semflow_jax.sampling import to_float

EXAMPLES_PER_SHARD = 512
BATCH_SIZE = 16
SPLIT = "train"  # the others are evaluated from their pixels
SEED = 0  # of the perturbations of all masks

Encode = Callable[[dict[str, np.ndarray]], dict[str, Array]]


def ensure_latents(
    data_dir: str, codec: Codec, progress: bool = True, code: MaskCode | None = None, draws: int = 0
) -> str:
    """The latents of a prepared folder's training images, made where they are missing; where they are.

    They are kept inside of `data_dir`, under a digest of the codec's weights. Of masks nothing is kept, but for a
    `code` whose work is mostly the codec's: then what it embeds, once, or in `draws` perturbations where it perturbs
    before.

    Raises:
        UserError: images whose sizes differ, or that the codec can't encode.
    """
    info = load_info(data_dir)
    codec.latent_shape(info.size)
    digest = parallel.digest(codec.params)
    name, key = f"latents-{codec.config['name']}-{digest[:12]}", f"{codec.name} {digest}"
    num = 0 if code is None else num_kept(code, draws)
    embed = code.embed if code is not None and num else None
    if code is not None and embed is not None:
        amplitudes = [draws, code.config["pixel"], code.config["region"]] if code.perturbs_before else []
        recipe = hashlib.sha256(f"{amplitudes} {code.colours.tolist()}".encode()).hexdigest()
        name, key = f"{name}-masks-{recipe[:12]}", f"{key} {recipe}"
    ids = mirrored_ids(256, info.flip_pairs)

    @jax.jit
    def encode(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
        found = image_moments(codec, params, batch["image"])
        if embed is not None:
            found["mask"] = of_draws(functools.partial(embed, params), batch, ids, SEED, num)[0]
        return found

    return keep(data_dir, name, key, functools.partial(encode, codec.params), progress)


def keep(data_dir: str, name: str, key: str, encode: Encode, progress: bool) -> str:
    """The folder `name` inside of a prepared one: what `encode` finds of every training example; made where missing.

    It appears when it is whole. A stopped call goes on with the next one; other processes wait for it.

    Args:
        key: what the folder depends on besides the data.
        encode: {"image" [b h w 3], "label" [b h w 1], "place" int32 [b] in the split} -> the arrays [b 2 ...] to keep,
            of `info.KEPT`: of each example, and of its mirror image.

    Raises:
        UserError: images of different sizes, which batches can't hold.
    """
    info = load_info(data_dir)
    if info.fit == "cover":
        raise UserError(f"{data_dir}: images of one size expected for latents, found fit cover; prepare it with crop")
    out_dir = pathlib.Path(data_dir, name)
    if out_dir.is_dir():
        return str(out_dir)
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    with alone(partial):
        if out_dir.is_dir():  # made by another process, while this one waited
            return str(out_dir)
        records = open_records(data_dir, SPLIT)
        found = jax.eval_shape(encode, _batch([records[0]], [0])).items()
        latent = {field: {"dtype": x.dtype.name, "shape": list(x.shape[1:])} for field, x in found}
        info = info.replace(latent=latent, pixels={}, skipped=0)

        def write(items: Sequence[Item], path: pathlib.Path) -> dict[str, Any]:
            return write_shard(path, info, _examples(records, [item.detail for item in items], encode))

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


def num_kept(code: MaskCode, draws: int) -> int:
    """How many latents of a mask are kept: `draws` of a code that perturbs before it embeds, else one; 0: none."""
    if code.embed is None:
        return 0
    return draws if code.perturbs_before else 1


def of_draws(
    fn: Callable[[Array, Array], Array], batch: dict[str, Array], ids: UInt8[np.ndarray, " n"], seed: int, num: int
) -> tuple[Array, Array]:
    """`num` latents of each mask and of its mirror image, float16 [b 2 num hz wz c], and the numbers of their draws.

    Args:
        fn: (label, keys, one for each) -> latents of masks.
        batch: of `keep`.
        ids: the class that each is in the mirror.
        seed: from which, with a draw's number, its key is made.
    """
    label = with_mirror(batch["label"], jnp.asarray(ids)[batch["label"][:, :, ::-1]])
    draw = jnp.arange(2 * num).reshape(2, num) + 2 * num * batch["place"][:, None, None]

    def one(draw: Array) -> Array:
        return fn(label, noise.example_keys(jax.random.key(seed), draw))

    found = jax.lax.map(one, draw.reshape(-1, num).T)  # one after another: memory is that of one draw
    return jnp.moveaxis(found, 0, 1).reshape(*draw.shape, *found.shape[2:]).astype(jnp.float16), draw


def image_moments(codec: Codec, params: Params, image: UInt8[Array, "b h w 3"]) -> dict[str, Array]:
    """What is kept of images and of their mirror images, float16 [b 2 hz wz c]."""
    mean, std = codec.moments(params, to_float(with_mirror(image, image[:, :, ::-1])))
    moments = {"mean": mean} if std is None else {"mean": mean, "std": std}
    return {name: x.reshape(-1, 2, *x.shape[1:]).astype(jnp.float16) for name, x in moments.items()}


def with_mirror(x: Array, mirrored: Array) -> Array:
    """Two arrays [b ...] -> [2b ...]: each example, followed by its mirror image."""
    return jnp.stack([x, mirrored], axis=1).reshape(-1, *x.shape[1:])


def _examples(records: Records, places: list[int], encode: Encode) -> Iterator[dict[str, Any]]:
    for start in range(0, len(places), BATCH_SIZE):
        chosen = places[start : start + BATCH_SIZE]
        examples = [records[i] for i in chosen]
        arrays = jax.device_get(encode(_batch(examples, chosen)))
        for i, example in enumerate(examples):
            kept = {name: x[i] for name, x in arrays.items()}
            yield kept | {"label": encode_label(example["label"][..., 0]), "id": example["id"]}


def _batch(examples: list[dict[str, Any]], places: list[int]) -> dict[str, np.ndarray]:
    """Up to BATCH_SIZE examples, and the last of them until there are as many: one shape, one compilation."""
    padded = [*range(len(examples)), *[-1] * (BATCH_SIZE - len(examples))]
    pictures = {name: np.stack([examples[i][name] for i in padded]) for name in ("image", "label")}
    return pictures | {"place": np.array([places[i] for i in padded], np.int32)}
