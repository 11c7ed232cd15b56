"""Examples -> a prepared folder: a TFDS data set in array_record files, written without TensorFlow.

TFDS's generator builders fall back on TensorFlow's file layer once a split outgrows 1 GB; its sequential writer streams
to the shards, so any size is written in constant memory, and in the given order.
"""

import dataclasses
import itertools
import operator
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from semflow_jax.data.info import DataInfo
from semflow_jax.errors import UserError

EXAMPLES_PER_SHARD = 4096
EXAMPLES_PER_WRITE = 64  # every write also rewrites the metadata


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples made while they are read; the length is known beforehand, for the progress bar."""

    num: int
    make_fn: Callable[[], Iterator[dict[str, Any]]]

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.make_fn()


def write_records(
    out_dir: str | os.PathLike,
    info: DataInfo,
    splits: Mapping[str, Iterable[dict[str, Any]]],
    progress: bool = True,
) -> None:
    """Write `splits` to `out_dir`, which appears when it is whole and never before.

    Args:
        out_dir: folder to make; it must not hold anything yet.
        info: stored beside the records, as the data set's metadata.
        splits: for each split name its examples {"image": PNG or JPEG bytes, "label": 8-bit grey PNG bytes, "id": str}.
        progress: show a bar per split.

    Raises:
        UserError: `out_dir` is taken, or a split is empty.
    """
    check_free(out_dir)
    out_dir = pathlib.Path(out_dir).resolve()
    temp_dir = out_dir.with_name(f"{out_dir.name}.tmp-{os.getpid()}")
    shutil.rmtree(temp_dir, ignore_errors=True)
    temp_dir.mkdir(parents=True)
    try:
        _write(temp_dir, info, splits, progress)
        temp_dir.rename(out_dir)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


def check_free(out_dir: str | os.PathLike) -> None:
    """Refuses a place where something is already.

    Raises:
        UserError: a file, or a folder that is not empty.
    """
    out_dir = pathlib.Path(out_dir)
    if out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    if out_dir.exists():
        raise UserError(f"{out_dir}: must be a new or empty folder, found something there; delete it or choose another")


def _write(
    data_dir: pathlib.Path, info: DataInfo, splits: Mapping[str, Iterable[dict[str, Any]]], progress: bool
) -> None:
    writer = tfds.core.SequentialWriter(
        _dataset_info(data_dir, info), max_examples_per_shard=EXAMPLES_PER_SHARD, file_format="array_record"
    )
    writer.initialize_splits(list(splits))
    try:
        for split, examples in splits.items():
            total = operator.length_hint(examples) or None
            bar = tqdm(examples, desc=f"write {split}", total=total, unit="img", disable=not progress)
            remaining = iter(bar)
            num_written = 0
            while chunk := list(itertools.islice(remaining, EXAMPLES_PER_WRITE)):
                writer.add_examples({split: chunk})
                num_written += len(chunk)
            if not num_written:
                raise UserError(f"split {split}: must have at least one example, found none; add some or leave it out")
    finally:
        writer.close_all()


def _dataset_info(data_dir: pathlib.Path, info: DataInfo) -> tfds.core.DatasetInfo:
    height, width = info.size
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(height, width, 3)),
            "label": tfds.features.Image(shape=(height, width, 1), encoding_format="png", use_colormap=True),
            "id": tfds.features.Text(),
        }
    )
    identity = tfds.core.DatasetIdentity(
        name=re.sub(r"\W+", "_", info.name), version=tfds.core.Version("1.0.0"), data_dir=str(data_dir), module_name=""
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        features=features,
        description=info.attribution,
        license=info.license or None,
        metadata=tfds.core.MetadataDict(info.to_dict()),
    )
