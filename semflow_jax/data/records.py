"""A prepared folder: its facts, and its examples by index."""

import io
import json
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from PIL import Image

from semflow_jax.data.info import DataInfo
from semflow_jax.errors import UserError


class Records:
    """Random access to one split: `len(records)`, `records[i]`. Can be pickled, and read from many threads.

    An example is {"image": uint8 [h w 3], "label": uint8 [h w 1] class ids or void, "id": str}.
    """

    def __init__(self, source: Any):
        self._source = source  # TFDS's, with the bytes left encoded

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} records")
        example = self._source[index]
        # Pillow rather than TFDS's own decoding: the same arrays whether or not OpenCV is installed.
        with Image.open(io.BytesIO(example["image"])) as image, Image.open(io.BytesIO(example["label"])) as label:
            return {
                "image": np.array(image.convert("RGB")),
                "label": np.array(label)[..., None],
                "id": example["id"].decode(),
            }


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
    builder = _open_builder(data_dir)
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"{data_dir}: split must be one of {known}, got {split!r}; choose one of them")
    encoded = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
    return Records(builder.as_data_source(split, decoders=encoded))


def count_records(data_dir: str | os.PathLike) -> dict[str, int]:
    """Number of examples by split."""
    return {split: facts.num_examples for split, facts in _open_builder(data_dir).info.splits.items()}


def spread_indices(num: int, limit: int) -> list[int]:
    """Up to `limit` indices, evenly over range(num)."""
    return [i * num // min(num, limit) for i in range(min(num, limit))]


def count_pixels(records: Records, num_ids: int, limit: int = 1000) -> Int[np.ndarray, " n"]:
    """Pixels by class id below `num_ids`, in up to `limit` examples, evenly chosen."""
    labels = (records[i]["label"] for i in spread_indices(len(records), limit))
    return np.sum([np.bincount(label.ravel(), minlength=256) for label in labels], axis=0)[:num_ids]


def _open_builder(data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    load_info(data_dir)  # speaks clearly where TFDS would not
    return tfds.builder_from_directory(data_dir)
