"""COCO-Stuff 164k as pixel maps, or else COCO's panoptic annotations. The labels of the test images are not public.

images/train2017/*.jpg, val2017/*.jpg       or train2017/, val2017/: the photos of COCO
annotations/train2017/*.png, val2017/*.png  or in stuffthingmaps/ or stuffthingmaps_trainval2017/: 171 classes; grey is
                                            an id of COCO-Stuff less 1, or 255, which is void
Without such maps:
annotations/panoptic_train2017.json, panoptic_val2017.json
annotations/panoptic_train2017/*.png, ...   or panoptic_train2017/, ...: 133 classes; R + 256 G + 65536 B is the id of a
                                            segment, whose category is in the JSON, or 0, which is void
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from semflow_jax.data.images import read_colours, read_label
from semflow_jax.data.info import VOID
from semflow_jax.data.source import Item, Source, find_files, make_table, map_ids, read_pair, some
from semflow_jax.errors import UserError

FOLDERS = {"train": "train2017", "val": "val2017"}
MAP_PLACES = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")
TRAIN_IDS = "_labelTrainIds"  # mmsegmentation leaves converted copies under such names beside the maps

LICENSE = "Annotations: CC BY 4.0; images: Flickr terms of use (https://cocodataset.org/#termsofuse)"
ATTRIBUTION = "COCO (Lin et al., ECCV 2014), https://cocodataset.org/"
STUFF_ATTRIBUTION = "COCO-Stuff (Caesar, Uijlings and Ferrari, CVPR 2018), https://github.com/nightrome/cocostuff; "

Colours = tuple[tuple[int, int, int], ...]
Segments = tuple[tuple[int, int], ...]  # ids of an image's segments, ascending, and their class ids


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


def _colours(text: str) -> Colours:
    return tuple((r, g, b) for r, g, b in map(bytes.fromhex, text.split()))


# labels.txt of https://github.com/nightrome/cocostuff, ids 1 to 182: 91 things, then 91 kinds of stuff.
LABELS = _names("""
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign, stop
sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack,
umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl,
banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush,
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other,
hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other,
towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood,
water-other, waterdrops, window-blind, window-other, wood
""")
# Things that COCO has no masks of, by labels.md of the same place.
REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
STUFF_IDS = tuple(i for i in range(1, len(LABELS) + 1) if i not in REMOVED)
CLASS_NAMES = tuple(LABELS[i - 1] for i in STUFF_IDS)

# The palette of mmsegmentation's COCOStuffDataset, in which a few classes share a colour.
COLOURS = _colours("""
00c040 00c040 004060 80c0c0 004040 00c0e0 00c0c0 80c040 00c060 80c040 8020c0 0000e0 000040 00a0c0 800060 8000c0 0020c0
8080e0 0000c0 80a0c0 808000 800020 802000 800080 408020 00a000 000000 c080a0 002000 008080 4080a0 80a000 008000 c08020
806080 000080 400020 00e080 800000 c000a0 006080 808080 4000a0 80e080 808040 c00020 806000 8000c0 008020 40e000 000040
8080a0 406000 0080c0 0080a0 c0e000 008040 808020 c02080 0040c0 000020 40a080 804040 8000a0 402080 80c0c0 0000a0 c0a080
80c000 800060 c02000 804080 408060 40a000 004000 c080e0 402000 00c080 4080e0 c0a000 00c000 c08060 c06080 004080 400060
40e080 804000 c000e0 406080 80c080 4000e0 c0e080 80c040 c00060 c06000 8040c0 008060 00e000 404040 8080e0 006000 40c0c0
0080e0 80e000 40c040 808060 802080 4000c0 004060 00a080 c00040 8040e0 002080 c080c0 0040e0 80a080 c08000 804020 802040
c00080 40c020 00a040 400000 c0c0a0 002040 408080 40c0a0 80a040 408000 c0c020 8060c0 400080 404020 00e0c0 c00000 c040a0
0060c0 c08080 4040a0 80e0c0 c08040 c04020 806040 c000c0 00c020 40e040 400040 80c0a0 406040 4080c0 00c0a0 c0e040 408040
80c020 c020c0 4040c0 004020 40a0c0 c04040 8040a0 4020c0 c0c0c0 0040a0 c0a0c0 c0c000 804060 c02040 c04080 40c060 40a040
404000
""")

# panoptic_coco_categories.json of https://github.com/cocodataset/panopticapi: the things, 36 kinds of stuff under their
# ids of above, and 17 that were merged of several, with ids from 184 on.
PANOPTIC_STUFF = _names("""
banner, blanket, bridge, cardboard, counter, curtain, door-stuff, floor-wood, flower, fruit, gravel, house, light,
mirror-stuff, net, pillow, platform, playingfield, railroad, river, road, roof, sand, sea, shelf, snow, stairs, tent,
towel, wall-brick, wall-stone, wall-tile, wall-wood, water-other, window-blind, window-other, tree-merged,
fence-merged, ceiling-merged, sky-other-merged, cabinet-merged, table-merged, floor-other-merged, pavement-merged,
mountain-merged, grass-merged, dirt-merged, paper-merged, food-other-merged, building-other-merged, rock-merged,
wall-other-merged, rug-merged
""")
MERGED_FROM = 184
PANOPTIC_NAMES = CLASS_NAMES[:80] + PANOPTIC_STUFF
PANOPTIC_IDS = STUFF_IDS[:80] + tuple(
    LABELS.index(name) + 1 if name in LABELS else MERGED_FROM + i - PANOPTIC_STUFF.index("tree-merged")
    for i, name in enumerate(PANOPTIC_STUFF)
)
PANOPTIC_COLOURS = _colours("""
dc143c 770b20 00008e 0000e6 6a00e4 003c64 005064 000046 0000c0 faaa1e 64aa1e dcdc00 af74af fa001e a52a2a ff4dff 00e2fc
b6b6ff 005200 78a69d 6e4c00 ae39ff c76400 480076 ffb3f0 007d5c d10097 bcd0b6 00dcb0 ff63a4 5c0049 8581ff 4eb4ff 00e400
aefff3 2d59ff 868667 9194ae ffd0ba c5e2ff ab8601 6d3f36 cf8aff 97005f 09503d 546933 4a4169 a6c466 d0c3d2 ff6d41 008f95
b300c2 d1636a 057900 e3ffcd 93bad0 994501 035fa1 a3ff00 7700aa 00b6c7 00a578 b78258 5f2000 827287 6e8185 a64a76 db8eb9
4fd272 b25a3e 41460f 7fa773 3b696a 8e6c2d c4ac00 5f3650 804cff c93901 f6007a bfa2d0 ffff80 93d3cb 966464 a8abac 9270c6
d2aa64 5c8859 da58b8 f18100 d911ff 7c4ab5 464646 ffe4ff 9ad000 c1005c 4c5b71 ffb4c3 6a9ab0 e6968c 3c8fff 804080 5c5237
fed47c 494dae ffa062 ffffff 68546d a9a483 e1c7ff 89364a 879edf 07f6e7 6bffc8 3a2995 b7798e ff4961 6b8e23 be9999 928b8d
4682b4 86c79c d1e28c 60246c 606060 40aa40 98fb98 d0e5e4 cebaab 98a140 747000 00728f 66669c fa8dff
""")

MAP_RULE = "ids must be 0 to 181 but for 11 unused ones, or 255, found {}; unpack stuffthingmaps_trainval2017.zip again"


def find(recipe: dict[str, Any]) -> Source:
    """The items of the pixel maps, `coco_stuff`, or of the panoptic annotations, `coco_panoptic`.

    Raises:
        UserError: neither is there, a file has no partner, or a JSON is not COCO's.
    """
    root = pathlib.Path(recipe["source"])
    maps = [root / place for place in MAP_PLACES if any((root / place / name).is_dir() for name in FOLDERS.values())]
    if maps:
        table = make_table({i - 1: c for c, i in enumerate(STUFF_IDS)} | {VOID: VOID})
        return Source(
            name="coco_stuff",
            class_names=CLASS_NAMES,
            splits={split: _find_maps(root, name, maps[0] / name) for split, name in FOLDERS.items()},
            read=functools.partial(read_pair, read_label=functools.partial(_read_map, table=table)),
            colours=COLOURS,
            license=LICENSE,
            attribution=STUFF_ATTRIBUTION + ATTRIBUTION,
        )
    if not any((root / "annotations" / f"panoptic_{name}.json").is_file() for name in FOLDERS.values()):
        rule = "must have annotations/train2017/*.png or annotations/panoptic_train2017.json"
        raise UserError(f"{root}: {rule}, found neither; unpack stuffthingmaps_trainval2017.zip in annotations/")
    return Source(
        name="coco_panoptic",
        class_names=PANOPTIC_NAMES,
        splits={split: _find_panoptic(root, name) for split, name in FOLDERS.items()},
        read=functools.partial(read_pair, read_label=_read_segments),
        colours=PANOPTIC_COLOURS,
        license=LICENSE,
        attribution=ATTRIBUTION,
    )


def _find_maps(root: pathlib.Path, name: str, folder: pathlib.Path) -> list[Item]:
    labels = {stem: path for stem, path in find_files(folder, (".png",)).items() if TRAIN_IDS not in stem}
    images_dir, images = _find_images(root, name)
    details = dict.fromkeys(sorted(images.keys() | labels.keys()))
    return _pair(name, details, {images_dir: images, folder: labels})


def _find_panoptic(root: pathlib.Path, name: str) -> list[Item]:
    details = load_segments(root / "annotations" / f"panoptic_{name}.json")
    folder = _first(root / "annotations" / f"panoptic_{name}", root / f"panoptic_{name}")
    images_dir, images = _find_images(root, name)
    return _pair(name, details, {images_dir: images, folder: find_files(folder, (".png",))})


def _find_images(root: pathlib.Path, name: str) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    folder = _first(root / "images" / name, root / name)
    return folder, find_files(folder, (".jpg",))


def _first(*folders: pathlib.Path) -> pathlib.Path:
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _pair(
    name: str, details: Mapping[str, Any], found: Mapping[pathlib.Path, Mapping[str, pathlib.Path]]
) -> list[Item]:
    """An item for each of `details`, of the images and the labels that were found in their folders."""
    for folder, files in found.items():
        missing = [stem for stem in details if stem not in files]
        if missing:
            rule = "must have a file for every image of the set"
            raise UserError(f"{folder}: {rule}, found none for {some(missing)}; unpack its archive again")
    images, labels = found.values()
    return [Item(f"{name}/{stem}", images[stem], (labels[stem],), detail) for stem, detail in details.items()]


def load_segments(path: pathlib.Path) -> dict[str, Segments]:
    """The segments of each image of a panoptic JSON, by the stem of its file.

    Raises:
        UserError: unreadable, or of other categories.
    """
    try:
        content = json.loads(path.read_bytes(), object_hook=_keep_ids)
        found = {entry["id"]: entry["name"] for entry in content["categories"]}
        listed = {pathlib.PurePath(e["file_name"]).stem: e["segments_info"] for e in content["annotations"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = "must be a panoptic JSON of COCO"
        raise UserError(f"{path}: {rule}, found {type(error).__name__}: {error}; download it again") from error
    strange = sorted(found.items() ^ zip(PANOPTIC_IDS, PANOPTIC_NAMES, strict=True), key=str)
    if strange:
        raise UserError(f"{path}: must have COCO's 133 categories, found {some(strange)} amiss; download it again")
    class_ids = {i: c for c, i in enumerate(PANOPTIC_IDS)}
    for stem, segments in listed.items():
        strange = [category for _, category in segments if category not in class_ids]
        if strange:
            raise UserError(f"{path}: {stem}: must be of its categories, found {some(strange)}; download it again")
    return {stem: tuple((i, class_ids[category]) for i, category in segments) for stem, segments in listed.items()}


def _keep_ids(entry: dict[str, Any]) -> dict[str, Any]:
    """An annotation with no more than ids and categories of its segments: a million boxes would only fill memory."""
    if "segments_info" in entry:
        pairs = ((int(segment["id"]), segment["category_id"]) for segment in entry["segments_info"])
        entry["segments_info"] = tuple(sorted(pairs))
    return entry


def _read_map(item: Item, table: Int[np.ndarray, "256"]) -> UInt8[np.ndarray, "h w"]:
    (path,) = item.labels
    return map_ids(read_label(path), table, path, MAP_RULE)


def _read_segments(item: Item) -> UInt8[np.ndarray, "h w"]:
    (path,) = item.labels
    ids = read_colours(path) @ np.array([1, 256, 65536])
    known, class_ids = np.array([(0, VOID), *item.detail]).T
    places = np.searchsorted(known, ids).clip(max=len(known) - 1)
    strange = np.unique(ids[known[places] != ids])
    if len(strange):
        rule = f"must have the segments that {path.parent.name}.json lists, or 0"
        raise UserError(f"{path}: {rule}, found {some(strange)}; unpack both of the same archive")
    return class_ids.astype(np.uint8)[places]
