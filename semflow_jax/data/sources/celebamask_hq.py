"""CelebAMask-HQ: 30,000 faces, as https://github.com/switchablenorms/CelebAMask-HQ gives them out.

CelebA-HQ-img/{0..29999}.jpg                           1024 x 1024; copies reduced to 512 x 512 will do
CelebAMask-HQ-mask-anno/{0..14}/{00000}_{part}.png     512 x 512, black and white; 2000 images a folder
CelebA-HQ-to-CelebA-mapping.txt                        idx, orig_idx, orig_file: which image of CelebA each one is

A label is brought to the size of its image by repeating pixels, so neither has lost anything when both are resized.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import Bool

from semflow_jax.data.images import read_colours, read_image, read_label
from semflow_jax.data.source import SPLITS, Item, Pair, Source, find_flip_pairs, require_folder, some
from semflow_jax.errors import UserError

LICENSE = "Non-commercial research and educational purposes only"
ATTRIBUTION = "CelebAMask-HQ (https://github.com/switchablenorms/CelebAMask-HQ) by Lee, Liu, Wu and Luo, CVPR 2020"

# Names and colours in id order, as in the set's g_mask.py and g_color.py. It is also the order in which g_mask.py puts
# the parts over one another. The l of l_lip is for lower, that of neck_l for -lace, and the r of ear_r for -ring.
CLASSES = {
    "background": (0, 0, 0),
    "skin": (204, 0, 0),
    "nose": (76, 153, 0),
    "eye_g": (204, 204, 0),
    "l_eye": (51, 51, 255),
    "r_eye": (204, 0, 204),
    "l_brow": (0, 255, 255),
    "r_brow": (255, 204, 204),
    "l_ear": (102, 51, 0),
    "r_ear": (255, 0, 0),
    "mouth": (102, 204, 0),
    "u_lip": (255, 255, 0),
    "l_lip": (0, 0, 153),
    "hair": (0, 0, 204),
    "hat": (255, 51, 153),
    "ear_r": (0, 204, 204),
    "neck_l": (0, 51, 0),
    "neck": (255, 153, 51),
    "cloth": (0, 204, 0),
}
CLASS_NAMES, COLOURS = tuple(CLASSES), tuple(CLASSES.values())
PARTS = CLASS_NAMES[1:]

# In CelebA's list_eval_partition.txt val begins with 162771.jpg and test with 182638.jpg; orig_idx counts from 0. The
# set's g_partition.py takes these file numbers for indices: that moves no image, as neither file is among the 30,000.
FIRST_VAL, FIRST_TEST = 162770, 182637

IMAGES, ANNOTATIONS, MAPPING = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno", "CelebA-HQ-to-CelebA-mapping.txt"
ROW = re.compile(r"\s*(\d{1,5})\s+(\d{1,6})\s+(\d{6})\.jpg\s*")
PART_FILE = re.compile(rf"(\d{{5}})_({'|'.join(PARTS)})\.png")
IMAGES_PER_FOLDER = 2000
SIDE = 512  # of a part


def find(recipe: dict[str, Any]) -> Source:
    """The images by CelebA's splits: 24,183 of train, 2,993 of val and 2,824 of test.

    Raises:
        UserError: a folder or the mapping is missing, the mapping is wrong, or a file has no place in the set.
    """
    source = pathlib.Path(recipe["source"])
    images, annotations = source / IMAGES, source / ANNOTATIONS
    indices = _load_mapping(source / MAPPING)
    require_folder(images, "must be the folder of the images")
    require_folder(annotations, "must be the folder of the parts")
    strange = sorted({*_list(images)} - {f"{number}.jpg" for number in indices})
    if strange:
        rule = f"must hold the images that {MAPPING} lists and no others"
        raise UserError(f"{images}: {rule}, found {some(strange)}; remove them or download the list again")
    parts = _find_parts(annotations, indices)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for number, index in sorted(indices.items()):
        split = "train" if index < FIRST_VAL else "val" if index < FIRST_TEST else "test"
        ids = sorted(parts[number])
        paths = tuple(parts[number][i] for i in ids)
        splits[split].append(Item(f"{number:05}", images / f"{number}.jpg", paths, detail=tuple(ids)))
    return Source(
        name=recipe["name"],
        class_names=CLASS_NAMES,
        splits=splits,
        read=_read,
        flip_pairs=find_flip_pairs(CLASS_NAMES),
        colours=COLOURS,
        license=LICENSE,
        attribution=ATTRIBUTION,
    )


def _load_mapping(path: pathlib.Path) -> dict[int, int]:
    """Index in CelebA by number of the image."""
    if not path.is_file():
        raise UserError(f"{path}: must list the images, found none; download it or pass another --source")
    indices: dict[int, int] = {}
    for place, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if line.split() in ([], ["idx", "orig_idx", "orig_file"]):
            continue
        row = ROW.fullmatch(line)
        if row is None or int(row[3]) != int(row[2]) + 1 or int(row[1]) in indices:
            rule = "must be a new idx, an orig_idx and its orig_file, such as '0 119613 119614.jpg'"
            raise UserError(f"{path}:{place}: {rule}, found {line.strip()!r}; download the file again")
        indices[int(row[1])] = int(row[2])
    return indices


def _find_parts(folder: pathlib.Path, indices: dict[int, int]) -> dict[int, dict[int, pathlib.Path]]:
    """Part files by class id, by number of the image; hundreds of thousands, so no file is touched."""
    parts: dict[int, dict[int, pathlib.Path]] = {number: {} for number in indices}
    ids = {name: i for i, name in enumerate(CLASS_NAMES)}
    for subfolder in sorted(path for path in map(folder.joinpath, _list(folder)) if path.is_dir()):
        for name in _list(subfolder):
            match = PART_FILE.fullmatch(name)
            if match is None:
                rule = f"must be called NUMBER_PART.png, the parts being {', '.join(PARTS)}"
                raise UserError(f"{subfolder / name}: {rule}, found another name; remove it")
            number = int(match[1])
            if number not in parts or subfolder.name != str(number // IMAGES_PER_FOLDER):
                rule = f"must be of an image that {MAPPING} lists, {IMAGES_PER_FOLDER} images a folder"
                raise UserError(f"{subfolder / name}: {rule}, found image {number}; remove it or download all again")
            parts[number][ids[match[2]]] = subfolder / name
    return parts


def _list(folder: pathlib.Path) -> list[str]:
    """Names but the hidden ones, which file managers leave behind."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def _read(item: Item) -> Pair:
    if item.image is None or not item.labels:
        raise UserError(f"{item.image}: must have a part in {ANNOTATIONS}, found none; download them again")
    label = np.zeros((SIDE, SIDE), np.uint8)
    for path, i in zip(item.labels, item.detail, strict=True):
        label[_read_part(path)] = i
    image = read_image(item.image)
    if image.size not in ((SIDE, SIDE), (2 * SIDE, 2 * SIDE)):
        rule = f"must be {2 * SIDE}x{2 * SIDE} or {SIDE}x{SIDE}"
        raise UserError(f"{item.image}: {rule}, found {image.height}x{image.width}; download it again")
    times = image.width // SIDE
    return image, label.repeat(times, axis=0).repeat(times, axis=1)


def _read_part(path: pathlib.Path) -> Bool[np.ndarray, "h w"]:
    """Where the part is: it is white, in RGB or in grey, where it may also be 1."""
    try:
        pixels = read_colours(path)
    except UserError:
        pixels = read_label(path)[..., None]
    grey, *others = np.moveaxis(pixels, -1, 0)
    if grey.shape != (SIDE, SIDE):
        found = "x".join(str(n) for n in grey.shape)
        raise UserError(f"{path}: must be {SIDE}x{SIDE}, found {found}; download it again")
    white = 1 if grey.max() == 1 else 255
    strange = (grey != 0) & (grey != white)
    for other in others:
        strange |= other != grey
    if strange.any():
        found = some(np.unique(pixels[strange], axis=0).tolist())
        raise UserError(f"{path}: must be black (0) and white (255, or 1), found {found}; download it again")
    return grey == white
