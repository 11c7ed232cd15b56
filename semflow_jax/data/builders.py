"""Examples -> a prepared folder: a TFDS data set in array_record files, written without TensorFlow.

TFDS's own builders fall back on TensorFlow's file layer once a split outgrows 1 GB. Here a shard is written by whoever
has its examples, and the shards become a data set when TFDS's metadata are laid beside them.
"""

import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from semflow_jax.data.info import DataInfo
from semflow_jax.errors import UserError

SUFFIX = ".array_record"

Shards = Mapping[str, Sequence[tuple[Mapping[str, Any], pathlib.Path]]]  # of each split: facts and the file


def write_shard(path: pathlib.Path, info: DataInfo, examples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Writes one array_record file.

    Args:
        examples: {"image": PNG or JPEG bytes, "label": 8-bit grey PNG bytes, "id": str}.

    Returns:
        Number of examples and bytes, and the file's sha256.
    """
    features = make_features(info)
    serializer = ExampleSerializer(features.get_serialized_info())
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")  # read one by one
    num, num_bytes = 0, 0
    try:
        for example in examples:
            record = serializer.serialize_example(features.encode_example(example))
            writer.write(record)
            num, num_bytes = num + 1, num_bytes + len(record)
    finally:
        writer.close()
    return {"num": num, "num_bytes": num_bytes, "sha256": digest_file(path)}


def write_metadata(data_dir: pathlib.Path, info: DataInfo, shards: Shards) -> DataInfo:
    """Moves shards into `data_dir`, under the names that TFDS gives them, and writes the metadata.

    Args:
        shards: the facts are what `write_shard` returns.

    Returns:
        `info` with the checksums.
    """
    splits, checksums = [], {}
    for split, parts in shards.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir, dataset_name=_name(info), split=split, filetype_suffix="array_record"
        )
        for i, (facts, path) in enumerate(parts):
            target = template.sharded_filepath(shard_index=i, num_shards=len(parts))
            os.replace(path, target)
            checksums[target.name] = facts["sha256"]
        lengths, num_bytes = [facts["num"] for facts, _ in parts], sum(facts["num_bytes"] for facts, _ in parts)
        splits.append(tfds.core.SplitInfo(split, lengths, num_bytes, template))
    info = info.replace(checksums=checksums)
    dataset_info = _dataset_info(data_dir, info)
    dataset_info.set_file_format("array_record")
    dataset_info.set_splits(tfds.core.SplitDict(splits))
    dataset_info.write_to_directory(data_dir)
    return info


def write_records(
    out_dir: str | os.PathLike, info: DataInfo, splits: Mapping[str, Iterable[dict[str, Any]]], progress: bool = True
) -> DataInfo:
    """Writes examples of one's own to `out_dir`, one shard a split; it appears when it is whole and never before.

    Args:
        splits: for each split its examples, see `write_shard`.
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
        shards = {}
        for split, examples in splits.items():
            path = temp_dir / split
            bar = tqdm(examples, desc=f"write {split}", unit="img", disable=not progress)
            shards[split] = [(write_shard(path, info, iter(bar)), path)]
        require_examples({split: parts[0][0]["num"] for split, parts in shards.items()})
        info = write_metadata(temp_dir, info, shards)
        temp_dir.rename(out_dir)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)
    return info


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


def require_examples(counts: Mapping[str, int]) -> None:
    """Raises `UserError` for a split without examples."""
    for split, num in counts.items():
        if not num:
            raise UserError(f"split {split}: must have at least one example, found none; add some or leave it out")


def digest_file(path: pathlib.Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_features(info: DataInfo) -> tfds.features.FeaturesDict:
    """What a record holds; pictures of different sizes where the set was prepared to cover its size."""
    height, width = (None, None) if info.fit == "cover" else info.size
    if info.latent is None:
        image = {"image": tfds.features.Image(shape=(height, width, 3))}
    else:
        image = {
            name: tfds.features.Tensor(shape=tuple(x["shape"]), dtype=np.dtype(x["dtype"]), encoding="bytes")
            for name, x in info.latent.items()
        }
    return tfds.features.FeaturesDict(
        image
        | {
            "label": tfds.features.Image(shape=(height, width, 1), encoding_format="png", use_colormap=True),
            "id": tfds.features.Text(),
        }
    )


def _name(info: DataInfo) -> str:
    return re.sub(r"\W+", "_", info.name)


def _dataset_info(data_dir: pathlib.Path, info: DataInfo) -> tfds.core.DatasetInfo:
    identity = tfds.core.DatasetIdentity(
        name=_name(info), version=tfds.core.Version("1.0.0"), data_dir=str(data_dir), module_name=""
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        features=make_features(info),
        description=info.attribution,
        license=info.license or None,
        metadata=tfds.core.MetadataDict(info.to_dict()),
    )
