"""Cityscapes with fine annotations: 2975 + 500 street scenes of 1024 x 2048, 19 classes.

leftImg8bit/{train,val}/CITY/CITY_SEQ_FRAME_leftImg8bit.png
gtFine/{train,val}/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png         ids 0 to 33
gtFine/{train,val}/CITY/CITY_SEQ_FRAME_gtFine_labelTrainIds.png    where train has no labelIds: 0 to 18, 255 is void

All else that the downloads hold is let lie. The labels of the test split are not public, and its files are dummies, so
it is left out. Ids, names and colours are those of cityscapesScripts (helpers/labels.py), whose tools draw number
plates, -1 there, into no label file: no id stands for them.
"""

import functools
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from semflow_jax.data.images import read_label
from semflow_jax.data.info import VOID
from semflow_jax.data.pairs import pair_files
from semflow_jax.data.source import Item, Source, make_table, map_ids, read_pair

LICENSE = "Cityscapes terms: non-commercial use, no redistribution (https://www.cityscapes-dataset.com/license/)"
ATTRIBUTION = "Cityscapes (https://www.cityscapes-dataset.com), Cordts et al., CVPR 2016"

CLASSES = (  # id, name, colour
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
NUM_IDS = 34

LABEL_IDS, TRAIN_IDS = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
TABLES = {
    LABEL_IDS: make_table(dict.fromkeys(range(NUM_IDS), VOID) | {row[0]: i for i, row in enumerate(CLASSES)}),
    TRAIN_IDS: make_table({i: i for i in range(len(CLASSES))} | {VOID: VOID}),
}
RULES = {
    LABEL_IDS: "ids must be 0 to 33, found {}; download gtFine_trainvaltest.zip again",
    TRAIN_IDS: "ids must be 0 to 18, or 255 for void, found {}; make it again with csCreateTrainIdLabelImgs",
}


def find(recipe: dict[str, Any]) -> Source:
    """The items of leftImg8bit and gtFine; their names are CITY/CITY_SEQ_FRAME.

    Raises:
        UserError: as `pair_files`.
    """
    images, labels = (pathlib.Path(recipe["source"], kind) for kind in ("leftImg8bit", "gtFine"))
    ending = next((ending for ending in TABLES if any((labels / "train").rglob(f"*{ending}"))), LABEL_IDS)
    read_ids = functools.partial(_read_ids, table=TABLES[ending], rule=RULES[ending])
    return Source(
        name=recipe["name"],
        class_names=tuple(name for _, name, _ in CLASSES),
        splits=pair_files({k: (images / k, labels / k) for k in ("train", "val")}, "_leftImg8bit.png", ending),
        read=functools.partial(read_pair, read_label=read_ids),
        colours=tuple(colour for _, _, colour in CLASSES),
        license=LICENSE,
        attribution=ATTRIBUTION,
    )


def _read_ids(item: Item, table: Int[np.ndarray, "256"], rule: str) -> UInt8[np.ndarray, "h w"]:
    (path,) = item.labels
    return map_ids(read_label(path), table, path, rule)
