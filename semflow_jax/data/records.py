"""A prepared folder: its facts, and its examples by index, each of them checked."""

import io
import json
import math
import os
import pathlib
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from grain.sources import RandomAccessDataSource
from jaxtyping import Int, UInt8
from PIL import Image

from semflow_jax.data.info import KEPT, DataInfo
from semflow_jax.errors import UserError

JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class CorruptRecord(UserError):
    """A record that is not as it was written; the message tells which, and what is wrong."""


class Records:
    """Random access to one split: `len(records)`, `records[i]`. Can be pickled, and read from many threads.

    An example is {"image": uint8 [h w 3], "label": uint8 [h w 1] class ids or void, "id": str}, of the data set's size,
    or at least as large where it was prepared to cover that. In a cache of latents "mean" and perhaps "std" take the
    place of "image": float16 [2 hz wz c], of the image and of its mirror image; where a flow's own latents are kept,
    "own" are d of each, float16 [2 d hz wz c], and "draw" their numbers, int32 [2 d]. Arrays may be read-only.

    Raises:
        CorruptRecord: by index: unreadable, not a whole image and label, of another size, or ids that are no class.
    """

    def __init__(self, source: Any, info: DataInfo, place: str):
        self._source = source  # TFDS's, with the bytes left encoded
        self._info = info
        self._place = place

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} records")
        name = "id unknown"
        try:
            example = self._source[index]
            name = example["id"].decode()
            arrays = {"label": decode_label(example["label"])[..., None]}
            if self._info.latent is None:
                arrays["image"] = decode_image(example["image"])
            else:
                arrays |= {kept: example[kept] for kept in KEPT if kept in example}
            self._check(arrays)
        except Exception as error:  # array_record, protobuf, simplejpeg, Pillow and zlib each have their own kinds
            found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CorruptRecord(
                f"{self._place}: record {index} ({name}) must be whole, found {found}; prepare the data again"
            ) from error
        return arrays | {"id": name}

    def classes(self, index: int) -> list[int]:
        """Ids of the classes in an example, none of a corrupt one; its image is not decoded."""
        try:
            label = decode_label(self._source[index]["label"])
        except Exception:  # of many kinds, see above, where it is told of
            return []
        return np.flatnonzero(np.bincount(label.ravel(), minlength=256)[: self._info.num_classes]).tolist()

    def _check(self, arrays: dict[str, np.ndarray]) -> None:
        size, num_classes, label = self._info.size, self._info.num_classes, arrays["label"]
        shape = arrays["image"].shape[:2] if "image" in arrays else size
        larger = self._info.fit == "cover" and shape[0] >= size[0] and shape[1] >= size[1]
        if shape != label.shape[:2] or not (larger or shape == size):
            raise ValueError(f"image {shape} and label {label.shape[:2]} where {size} are expected")
        if not all(np.isfinite(arrays[kept]).all() for kept in KEPT if kept in arrays):
            raise ValueError("latents that are not finite")
        if (label + np.uint8(1)).max() > num_classes:  # void has become 0
            wrong = sorted(set(np.unique(label).tolist()) - {*range(num_classes), 255})
            raise ValueError(f"class ids {wrong} where {num_classes} classes are known")


class Healthy:
    """Records with each corrupt one replaced by the next that is whole: the order and the length stay.

    An example has "corrupt": the messages of the records that were passed over, by line.

    Raises:
        UserError: by index, more than `limit` corrupt ones in a row.
    """

    def __init__(self, records: RandomAccessDataSource, limit: int):
        self._records = records
        self.limit = limit

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        messages: list[str] = []
        while True:
            try:
                example = self._records[(index + len(messages)) % len(self)]
            except CorruptRecord as error:
                messages.append(str(error))
                if len(messages) > self.limit:
                    raise too_many(messages[-1], self.limit) from error
            else:
                return example | {"corrupt": np.array("\n".join(messages))}


def too_many(message: str, limit: int) -> UserError:
    """What is raised at one corrupt record more than `limit`."""
    return UserError(f"{message}, or raise data.max_corrupt, by which {limit} such records are left out")


def decode_image(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of a JPEG (pixel for pixel as Pillow decodes it, in less than half the time) or a PNG.

    Raises:
        Exception: of some kind, where it is not whole. A flipped bit inside a JPEG may go unnoticed; JPEG has no sums.
    """
    if data.startswith(JPEG_SIGNATURE):
        return simplejpeg.decode_jpeg(data, strict=True)
    with _open_png(data) as image:
        return np.asarray(image.convert("RGB"))


def decode_label(data: bytes) -> UInt8[np.ndarray, "h w"]:
    """Grey values or palette indices of a PNG.

    Raises:
        Exception: of some kind, where it is not whole, or not one channel of 8 bits.
    """
    with _open_png(data) as label:
        if label.mode not in ("L", "P"):
            raise ValueError(f"a label of mode {label.mode}")
        return np.asarray(label)


def _open_png(data: bytes) -> Image.Image:
    """Opens a PNG whose chunks all have the sums they say; Pillow looks at none of the pixels' sums."""
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("neither JPEG nor PNG" if data else "nothing")
    view, start, kind = memoryview(data), len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        end = start + 8 + int.from_bytes(view[start : start + 4])
        kind = bytes(view[start + 4 : start + 8])
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4]) or end + 4 > len(data):
            raise ValueError(f"a PNG that is broken at byte {start}")
        start = end + 4
    return Image.open(io.BytesIO(data), formats=["PNG"])


def load_info(data_dir: str | os.PathLike) -> DataInfo:
    """Facts of a prepared folder.

    Raises:
        UserError: no such folder, or it is not a prepared one.
    """
    data_dir = pathlib.Path(data_dir)
    remedy = "make one with `semflow prepare`"
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: must be a prepared data set, found no such folder; {remedy}")
    try:
        fields = json.loads((data_dir / "metadata.json").read_text())
        if not (data_dir / "dataset_info.json").is_file():
            raise FileNotFoundError("dataset_info.json")
        return DataInfo.from_dict(fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"unreadable metadata.json or dataset_info.json ({type(error).__name__})"
        raise UserError(f"{data_dir}: must be a prepared data set, found {found}; {remedy}") from error


def open_records(data_dir: str | os.PathLike, split: str) -> Records:
    """Examples of a split.

    Raises:
        UserError: not a prepared folder, or it has no such split.
    """
    info, builder = load_info(data_dir), _open_builder(data_dir)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{data_dir}: split must be one of {known}, got {split!r}; choose one of them")
    pictures = ("image", "label") if info.latent is None else ("label",)
    encoded = {name: tfds.decode.SkipDecoding() for name in pictures}
    return Records(builder.as_data_source(split, decoders=encoded), info, f"{data_dir}: {split}")


def open_healthy(data_dir: str | os.PathLike, split: str, max_corrupt: float) -> Healthy:
    """Examples of a split, of which a share may be corrupt: rounded up to one record, and 0 is none.

    Raises:
        UserError: as `open_records`, or a share out of range.
    """
    if not 0 <= max_corrupt <= 1:
        raise UserError(f"max_corrupt: must be a share in [0, 1], got {max_corrupt}; 0.001 is usual")
    records = open_records(data_dir, split)
    return Healthy(records, math.ceil(max_corrupt * len(records)))


def count_records(data_dir: str | os.PathLike) -> dict[str, int]:
    """Number of examples by split."""
    return {split: facts.num_examples for split, facts in _open_builder(data_dir).info.splits.items()}


def final_split(splits: Collection[str]) -> str:
    """The split of a data set that its final figures are of: val where the labels of test are not public."""
    return "test" if "test" in splits else "val"


def spread_indices(num: int, limit: int) -> list[int]:
    """Up to `limit` indices, evenly over range(num)."""
    return [i * num // min(num, limit) for i in range(min(num, limit))]


def count_pixels(records: RandomAccessDataSource, num_ids: int, limit: int = 1000) -> Int[np.ndarray, " n"]:
    """Pixels by class id below `num_ids`, in up to `limit` examples, evenly chosen."""
    labels = (records[i]["label"] for i in spread_indices(len(records), limit))
    return np.sum([np.bincount(label.ravel(), minlength=256) for label in labels], axis=0)[:num_ids]


def _open_builder(data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    load_info(data_dir)  # speaks clearly where TFDS would not
    return tfds.builder_from_directory(data_dir)
