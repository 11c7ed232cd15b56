"""ADE20K as the MIT scene parsing challenge cut it, ADEChallengeData2016.zip: 20210 + 2000 scenes, 150 classes.

images/{training,validation}/NAME.jpg         of any size
annotations/{training,validation}/NAME.png    8-bit grey: 0 is none of the classes, 1 to 150 are
objectInfo150.txt                             optional: names of the classes, see `load_names`

training becomes train and validation val; the labels of the test split are not public. Names and colours are those of
github.com/CSAILVision/sceneparsing (objectInfo150.txt, visualizationCode/color150.mat).
"""

import functools
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import UInt8

from semflow_jax.data.images import read_label
from semflow_jax.data.info import VOID
from semflow_jax.data.pairs import pair_files
from semflow_jax.data.source import Item, Source, make_table, map_ids, read_pair
from semflow_jax.errors import UserError

TERMS = "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/"
LICENSE = f"images for non-commercial research and education, annotations under BSD-3-Clause ({TERMS})"
ATTRIBUTION = "ADE20K (https://groups.csail.mit.edu/vision/datasets/ADE20K/), Zhou et al., CVPR 2017"

FOLDERS = {"train": "training", "val": "validation"}
NUM_CLASSES = 150
TABLE = make_table({0: VOID} | {i + 1: i for i in range(NUM_CLASSES)})
RULE = "ids must be 0 to 150, found {}; download ADEChallengeData2016.zip again"

NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, "
    "door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, "
    "field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, "
    "signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, "
    "stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee "
    "table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, "
    "boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, "
    "television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, "
    "poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, "
    "basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, "
    "animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, "
    "ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"
)
CLASS_NAMES = tuple(NAMES.split(", "))
# Red, green and blue of every class; road and skyscraper share one.
COLOURS = bytes.fromhex(
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)


def find(recipe: dict[str, Any]) -> Source:
    """The items of images and annotations.

    Raises:
        UserError: as `pair_files` and `load_names`.
    """
    source = pathlib.Path(recipe["source"])
    names_file = source / "objectInfo150.txt"
    dirs = {split: (source / "images" / name, source / "annotations" / name) for split, name in FOLDERS.items()}
    return Source(
        name=recipe["name"],
        class_names=load_names(names_file) if names_file.is_file() else CLASS_NAMES,
        splits=pair_files(dirs, ".jpg", ".png"),
        read=functools.partial(read_pair, read_label=_read_ids),
        colours=tuple(zip(COLOURS[::3], COLOURS[1::3], COLOURS[2::3], strict=True)),
        license=LICENSE,
        attribution=ATTRIBUTION,
    )


def load_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Read an objectInfo150.txt: a line of titles, then Idx, Ratio, Train, Val and Name between tabs, 1 to 150.

    Returns:
        Of each class the first of its names, which commas part, that no class before it has.

    Raises:
        UserError: unreadable, other classes, or a class without a name of its own.
    """
    names: list[str] = []
    try:
        for line in pathlib.Path(path).read_text().splitlines()[1:]:
            index, _, _, _, synonyms = line.split("\t")
            own = [name for name in map(str.strip, synonyms.split(",")) if name and name not in names]
            if int(index) != len(names) + 1 or not own:
                raise ValueError(f"line {line!r}")
            names.append(own[0])
        if len(names) != NUM_CLASSES:
            raise ValueError(f"{len(names)} of them")
    except (OSError, ValueError) as error:
        rule = "must list the classes 1 to 150, each with a name of its own"
        raise UserError(f"{path}: {rule}, found {error}; download it again or remove it") from error
    return tuple(names)


def _read_ids(item: Item) -> UInt8[np.ndarray, "h w"]:
    (path,) = item.labels
    return map_ids(read_label(path), TABLE, path, RULE)
