"""Items of a source -> what is wrong with them, or the examples of a shard. Both run in worker processes."""

import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from semflow_jax.data.builders import write_shard
from semflow_jax.data.info import DataInfo
from semflow_jax.data.source import Item, Pair
from semflow_jax.errors import UserError

Reader = Callable[[Item], Pair]

FITS = ("stretch", "crop", "cover")
PNG_UP_TO = 256  # pixels a side; larger images are stored as JPEG


def check_items(items: Sequence[Item], path: pathlib.Path, read: Reader) -> dict[str, Any]:
    """Reads every item: `pixels` by class id, and `problems`, pairs of a name and what is wrong."""
    pixels = np.zeros(256, np.int64)
    problems = []
    for item in items:
        try:
            pixels += count_ids(read(item)[1])
        except UserError as error:
            problems.append((item.name, str(error)))
    return {"pixels": pixels.tolist(), "problems": problems}


def write_items(items: Sequence[Item], path: pathlib.Path, read: Reader, info: DataInfo) -> dict[str, Any]:
    """Writes a shard of examples; `pixels` by class id, and the shard's facts."""
    pixels = np.zeros(256, np.int64)

    def examples() -> Iterator[dict[str, Any]]:
        for item in items:
            image, label = fit_pair(*read(item), info.size, info.fit)
            pixels[:] += count_ids(label)
            yield encode_example(image, label, item.name)

    return write_shard(path, info, examples()) | {"pixels": pixels.tolist()}


def fit_pair(image: Image.Image, label: UInt8[np.ndarray, "H W"], size: tuple[int, int], fit: str) -> Pair:
    """Both resized, the label by nearest.

    Args:
        size: (height, width).
        fit: stretch: to `size` as it is; crop: the largest window of the shape of `size` from the middle; cover: the
            whole picture, at the scale at which `size` just fits into it.
    """
    (height, width), (h, w) = size, label.shape
    box = (0.0, 0.0, float(w), float(h))
    if fit == "crop":
        scale = min(h / height, w / width)
        left, top = (w - scale * width) / 2, (h - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
    if fit == "cover":
        scale = min(h / height, w / width)
        height, width = max(height, round(h / scale)), max(width, round(w / scale))
    image = image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    ids = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST, box)
    return image, np.asarray(ids)


def encode_example(image: Image.Image, label: UInt8[np.ndarray, "h w"], name: str) -> dict[str, Any]:
    """The bytes of a record: the image as PNG or, where it is large, JPEG; the label as grey PNG."""
    small = max(image.size) <= PNG_UP_TO
    return {
        "image": _encode(image, "PNG") if small else _encode(image, "JPEG", quality=95),
        "label": encode_label(label),
        "id": name,
    }


def encode_label(label: UInt8[np.ndarray, "h w"]) -> bytes:
    """Class ids as a grey PNG."""
    return _encode(Image.fromarray(label), "PNG")


def count_ids(label: UInt8[np.ndarray, "..."]) -> Int[np.ndarray, "256"]:
    """Pixels by class id."""
    return np.bincount(label.ravel(), minlength=256)


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
