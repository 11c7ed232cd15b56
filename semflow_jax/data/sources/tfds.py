"""A set of TensorFlow Datasets that is on disk already, as array_record: the folder of its version, the one that holds
dataset_info.json, say ~/tensorflow_datasets/oxford_iiit_pet/4.0.0. TensorFlow is not needed.

oxford_iiit_pet   background and pet. The third value of its trimaps is void: it marks the outline, which the authors
                  left unclassified, so there is nothing to learn from it.
scene_parse150    despite its name the 100 things of the instance task of 2017: TFDS downloads annotations_instance.tar,
                  whose red channel has 1 to 100, and 0 wherever no thing is (walls, sky, all stuff), which is void.
                  For the 150 classes take ADEChallengeData2016.zip, see `sources/ade20k.py`.
cityscapes        raw ids, see `sources/cityscapes.py`; the test split, whose labels are dummies, is left out.
any other         features "image" and one of LABELS, of one channel. Ids are classes and 255 is void. A folder that
                  `semflow prepare` wrote brings its names and colours.

validation becomes val; where there is none, a tenth of train does. All other splits are let lie. Records have no names
here, so items are called SPLIT-INDEX.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from semflow_jax.data.images import read_colours, read_image, read_label
from semflow_jax.data.info import VOID
from semflow_jax.data.records import load_info
from semflow_jax.data.source import Item, Pair, Source, make_table, map_ids, shuffled
from semflow_jax.data.sources import ade20k, cityscapes
from semflow_jax.errors import UserError

LABELS = ("label", "segmentation_mask", "segmentation_label", "mask", "annotation")  # the first that is a picture
SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}

# Of ADE20K's classes, those that the instance task leaves out: CSAILVision/placeschallenge, instanceInfo100_train.txt.
STUFF = (
    "wall, building, sky, floor, tree, ceiling, road, grass, sidewalk, earth, mountain, plant, water, house, sea, rug, "
    "field, rock, base, sand, skyscraper, grandstand, path, runway, stairway, river, bridge, blind, hill, bar, hovel, "
    "tower, dirt track, land, escalator, buffet, poster, stage, conveyer belt, canopy, swimming pool, waterfall, tent, "
    "cradle, tank, lake, blanket, pier, crt screen, shower"
)
THINGS = tuple(i for i, name in enumerate(ade20k.CLASS_NAMES) if name not in STUFF.split(", "))

Table = Int[np.ndarray, "256"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a set keeps its pictures, and what its ids mean.

    Attributes:
        image, label: features.
        table: ids in the file to class ids; None takes them as they are.
        ids: which there may be, for errors.
        channels: of the label; of three the first has the ids.
        facts: fields of `Source`.
        splits: that are taken.
    """

    image: str = "image"
    label: str = "label"
    table: Table | None = None
    ids: str = ""
    channels: int = 1
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    splits: Sequence[str] = tuple(SPLITS)


LAYOUTS = {
    "oxford_iiit_pet": Layout(
        label="segmentation_mask",
        table=make_table({1: 1, 2: 0, 3: VOID}),
        ids="1 to 3",
        facts={
            "class_names": ("background", "pet"),
            "license": "CC BY-SA 4.0 (https://www.robots.ox.ac.uk/~vgg/data/pets/)",
            "attribution": "The Oxford-IIIT Pet Dataset, Parkhi et al., CVPR 2012",
        },
    ),
    "scene_parse150": Layout(
        label="annotation",
        table=make_table({0: VOID} | {i + 1: i for i in range(len(THINGS))}),
        ids="0 to 100",
        channels=3,
        facts={
            "class_names": tuple(ade20k.CLASS_NAMES[i] for i in THINGS),
            "colours": tuple(tuple(ade20k.COLOURS[3 * i : 3 * i + 3]) for i in THINGS),
            "license": ade20k.LICENSE,
            "attribution": ade20k.ATTRIBUTION,
        },
    ),
    "cityscapes": Layout(
        image="image_left",
        label="segmentation_label",
        table=cityscapes.TABLES[cityscapes.LABEL_IDS],
        ids="0 to 33",
        facts={
            "class_names": tuple(name for _, name, _ in cityscapes.CLASSES),
            "colours": tuple(colour for _, _, colour in cityscapes.CLASSES),
            "license": cityscapes.LICENSE,
            "attribution": cityscapes.ATTRIBUTION,
        },
        splits=("train", "validation"),
    ),
}


def find(recipe: dict[str, Any]) -> Source:
    """The records of a folder.

    Raises:
        UserError: not the folder of a set's version, not array_record, a shard missing, no split train, or no picture
            with a label of one channel among the features.
    """
    folder = pathlib.Path(recipe["source"])
    info = _load(folder)
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        remedy = f'tfds.builder("{info.name}").download_and_prepare(file_format="array_record")'
        found = getattr(info.file_format, "value", None)
        rule = "must be stored as array_record, all else takes TensorFlow to read"
        raise UserError(f"{folder}: {rule}, found {found}; make it again, into another data_dir, with {remedy}")
    layout = LAYOUTS.get(info.name) or _guess_layout(folder, info)
    for name, channels in ((layout.image, 3), (layout.label, layout.channels)):
        if not _is_picture(info.features, name, channels):
            rule = f"feature {name} must be a picture of {channels} 8-bit channels"
            raise UserError(f"{folder}: {rule}, found {_listing(info)}; choose another set or configuration")
    facts = {"name": info.name, "class_names": None} | layout.facts
    read = functools.partial(_read, folder=os.fspath(folder), layout=dataclasses.replace(layout, facts={}))
    return Source(splits=_find_splits(folder, info, layout, recipe["seed"]), read=read, **facts)


def _load(folder: pathlib.Path) -> tfds.core.DatasetInfo:
    if not (folder / "dataset_info.json").is_file():
        versions = sorted(str(path.parent) for path in folder.rglob("dataset_info.json"))
        remedy = f"pass {versions[0]}" if versions else "pass DATA_DIR/NAME/VERSION"
        raise UserError(f"{folder}: must be the folder of a set's version, found no dataset_info.json; {remedy}")
    try:
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # JSON's, protobuf's and TFDS's own
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{folder}: must be a whole TFDS set, found {found}; make it again") from error


def _guess_layout(folder: pathlib.Path, info: tfds.core.DatasetInfo) -> Layout:
    """The layout of a set that is in no table."""
    label = next((name for name in LABELS if _is_picture(info.features, name, 1)), None)
    if label is None:
        rule = f"must have a picture of one 8-bit channel as one of {', '.join(LABELS)}"
        raise UserError(f"{folder}: {rule}, found {_listing(info)}; choose another set")
    if (folder / "metadata.json").is_file() and "class_names" in info.metadata:
        own = load_info(folder)
        facts = {
            key: getattr(own, key) for key in ("name", "class_names", "flip_pairs", "colours", "license", "attribution")
        }
    else:
        names = getattr(info.features[label], "names", None)  # LabeledImage has them
        facts = {"class_names": tuple(names)} if names else {}
        facts["attribution"] = info.homepage or ""
    num_classes = len(facts.get("class_names", ()))
    table = make_table({i: i for i in (*range(num_classes), VOID)}) if num_classes else None
    return Layout(label=label, table=table, ids=f"0 to {num_classes - 1} or 255", facts=facts)


def _is_picture(features: tfds.features.FeaturesDict, name: str, channels: int) -> bool:
    feature = dict(features.items()).get(name)
    if not isinstance(feature, tfds.features.Image):
        return False
    return feature.shape[-1] == channels and np.dtype(feature.np_dtype) == np.uint8


def _listing(info: tfds.core.DatasetInfo) -> str:
    return ", ".join(f"{name} {feature.shape}" for name, feature in info.features.items())


def _find_splits(folder: pathlib.Path, info: tfds.core.DatasetInfo, layout: Layout, seed: int) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {}
    for name, split in info.splits.items():
        if name in layout.splits:
            shards = zip(info.splits[name].filepaths, split.shard_lengths, strict=True)
            paths = [pathlib.Path(path) for path, length in shards for _ in range(length)]
            splits[SPLITS[name]] = [
                Item(f"{name}-{i:06d}", labels=(path,), detail=(name, i)) for i, path in enumerate(paths)
            ]
    missing = sorted(
        {path for items in splits.values() for item in items for path in item.labels if not path.is_file()}
    )
    if missing:
        raise UserError(f"{missing[0]}: must be there, for dataset_info.json counts it; make the set again")
    if "train" not in splits:
        raise UserError(f"{folder}: must have a split train, found {', '.join(info.splits)}; choose another set")
    if "val" not in splits:
        items = splits["train"]
        chosen = set(shuffled([item.name for item in items], seed)[: round(len(items) / 10) or 1])
        splits["val"] = [item for item in items if item.name in chosen]
        splits["train"] = [item for item in items if item.name not in chosen]
    return splits


def _read(item: Item, folder: str, layout: Layout) -> Pair:
    split, index = item.detail
    place = f"{folder}: {split} {index}"
    try:
        record = _open(folder, split)[index]
    except Exception as error:  # array_record's and protobuf's
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{place}: must be a whole record, found {found}; make the set again") from error
    data = record[layout.label]
    ids = read_label(place, data) if layout.channels == 1 else read_colours(place, data)[..., 0]
    if layout.table is not None:
        ids = map_ids(ids, layout.table, place, f"ids must be {layout.ids}, found {{}}; make the set again")
    return read_image(place, ids.shape, record[layout.image]), ids


@functools.cache
def _open(folder: str, split: str) -> Sequence[Any]:
    """The split's records, opened once in every process, with pictures as the bytes they are stored in."""
    builder = tfds.builder_from_directory(folder)
    pictures = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    return builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in pictures})
