"""Small trees in the layout that each raw data set is downloaded in."""

import itertools
import json
import pathlib

import numpy as np
from PIL import Image


def make_celebamask_hq(root: pathlib.Path, num: int) -> pathlib.Path:
    """CelebAMask-HQ: coloured blocks at the set's sizes, all over its folders; parts are boxes that overlap."""
    eyes_and_ears = ("eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "ear_r")
    parts = (*eyes_and_ears, "skin", "nose", "mouth", "u_lip", "l_lip", "hair", "hat", "neck_l", "neck", "cloth")
    rng = np.random.default_rng(0)
    rows = ["idx        orig_idx   orig_file"]
    (root / "CelebA-HQ-img").mkdir(parents=True)
    for i in range(num):
        number = i * (30_000 // num)
        first, step = ((162_769, -1), (162_770, 1), (182_636, -1), (182_637, 1), (0, 1), (202_598, -1))[i % 6]
        index = first + i // 6 * step
        rows.append(f"{number:<10} {index:<10} {index + 1:06}.jpg")
        blocks = rng.integers(0, 256, (16, 16, 3), np.uint8).repeat(64, axis=0).repeat(64, axis=1)
        Image.fromarray(blocks).save(root / "CelebA-HQ-img" / f"{number}.jpg", quality=95)
        folder = root / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        folder.mkdir(parents=True, exist_ok=True)
        for k, part in enumerate(parts):
            if (i + k) % 4:  # the others this face does not have
                mask = np.zeros((512, 512, 3), np.uint8)
                top, left = rng.integers(0, 400, 2)
                mask[top : top + 250, left : left + 150] = 255
                Image.fromarray(mask).save(folder / f"{number:05}_{part}.png", compress_level=1)
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(rows) + "\n")
    return root


COCO_SIZE = (20, 30)
COCO_NO_THINGS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


def make_coco_stuff(root, num: int, maps: str = "annotations", images: str = "images"):
    """COCO-Stuff: `num` images of train and a fifth as many of val, and maps of all ids less 1, with 255."""
    rng = np.random.default_rng(0)
    ids = np.array([i - 1 for i in range(1, 183) if i not in COCO_NO_THINGS] + [255], np.uint8)
    for name, count in (("train2017", num), ("val2017", -(-num // 5))):
        for stem in _make_coco_photos(root / images / name, count, rng):
            path = root / maps / name / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.choice(ids, COCO_SIZE)).save(path)
    return root


def make_coco_panoptic(root, num: int, pngs: str = "annotations"):
    """COCO's panoptic annotations: segments of 5 x 5 pixels, each fifth of them void, of all categories in turn."""
    from semflow_jax.data.sources.coco_stuff import PANOPTIC_NAMES

    rng = np.random.default_rng(0)
    kept = (
        "92 93 95 100 107 109 112 118 119 122 125 128 130 133 138 141 144 145 147 148 149 151 154 155 156 159 161 "
        "166 168 171 175 176 177 178 180 181"
    )
    ids = [i for i in range(1, 91) if i not in COCO_NO_THINGS] + [int(i) for i in kept.split()] + [*range(184, 201)]
    categories = [
        {"supercategory": "any", "isthing": int(i < 92), "id": i, "name": name}
        for i, name in zip(ids, PANOPTIC_NAMES, strict=True)
    ]
    in_turn = itertools.cycle(ids)
    for name, count in (("train2017", num), ("val2017", -(-num // 5))):
        annotations = []
        for stem in _make_coco_photos(root / name, count, rng):
            cells = rng.choice(2**24 - 1, (COCO_SIZE[0] // 5, COCO_SIZE[1] // 5), replace=False) + 1
            cells.ravel()[::5] = 0
            segments = [
                {"area": 25, "category_id": next(in_turn), "iscrowd": 0, "id": int(i), "bbox": [0, 0, 5, 5]}
                for i in cells[cells > 0]
            ]
            annotations.append({"segments_info": segments, "file_name": f"{stem}.png", "image_id": int(stem)})
            path = root / pngs / f"panoptic_{name}" / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.kron(cells, np.ones((5, 5), int))
            Image.fromarray(np.stack([pixels >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)).save(path)
        photos = [{"id": entry["image_id"], "file_name": f"{entry['image_id']:012}.jpg"} for entry in annotations]
        content = {"info": {}, "licenses": [], "images": photos, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"panoptic_{name}.json").write_text(json.dumps(content))
    return root


def _make_coco_photos(folder, num: int, rng: np.random.Generator) -> list[str]:
    """Photos of noise in `folder`; their stems."""
    folder.mkdir(parents=True)
    first = 139 if folder.name == "val2017" else 9
    stems = [f"{first + 1000 * i:012}" for i in range(num)]
    for stem in stems:
        Image.fromarray(rng.integers(0, 256, (*COCO_SIZE, 3), np.uint8)).save(folder / f"{stem}.jpg")
    return stems


def make_cityscapes(root: pathlib.Path, num: int) -> pathlib.Path:
    """`num` photos of train, half as many of val and of test, with all that the two downloads hold beside them."""
    cities = {"train": ("aachen", "hamburg"), "val": ("frankfurt", "munster"), "test": ("berlin", "mainz")}
    for split, names in cities.items():
        for i in range(num if split == "train" else (num + 1) // 2):
            city = names[i % 2]
            image_dir, label_dir = (root / kind / split / city for kind in ("leftImg8bit", "gtFine"))
            image_dir.mkdir(parents=True, exist_ok=True)
            label_dir.mkdir(parents=True, exist_ok=True)
            stem = f"{city}_{i:06}_000019"
            ids = _draw_blocks(34, i)
            _paint(ids, i).save(image_dir / f"{stem}_leftImg8bit.png")
            if split == "test":  # dummies: out of region of interest, but for the car itself
                ids = np.where(np.arange(32)[:, None] < 28, 3, 1).astype(np.uint8).repeat(64, 1)
            Image.fromarray(ids).save(label_dir / f"{stem}_gtFine_labelIds.png")
            Image.fromarray(ids.astype(np.uint16) * 1000).save(label_dir / f"{stem}_gtFine_instanceIds.png")
            _paint(ids, i).convert("RGBA").save(label_dir / f"{stem}_gtFine_color.png")
            (label_dir / f"{stem}_gtFine_polygons.json").write_text('{"imgHeight": 32, "imgWidth": 64, "objects": []}')
    (root / "license.txt").write_text("The Cityscapes Dataset\n")
    return root


def make_ade20k(root: pathlib.Path, num: int) -> pathlib.Path:
    """`num` photos of training and half as many of validation, of different sizes, and one in five of training grey."""
    for split, short in (("training", "train"), ("validation", "val")):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(num if split == "training" else (num + 1) // 2):
            stem = f"ADE_{short}_{i + 1:08}"
            ids = _draw_blocks(151, i, side=8 + i % 3)
            Image.fromarray(ids).save(root / "annotations" / split / f"{stem}.png")
            image = _paint(ids, i)
            if split == "training" and i % 5 == 4:
                image = image.convert("L")
            image.save(root / "images" / split / f"{stem}.jpg", quality=95)
    synonyms = {1: "wall", 2: "edifice, building", 8: "bed ", 21: "car, auto, automobile", 150: "edifice, flag"}
    rows = [f"{i}\t0.1000\t{num}\t{num}\t{synonyms.get(i, f'thing {i}, stuff')}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]))
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def _draw_blocks(num_ids: int, i: int, side: int = 8) -> np.ndarray:
    """Label `i`: 4 x 8 squares in a random order. One label after the other, all ids get their turn."""
    ids = np.arange(32 * i, 32 * i + 32) % num_ids
    blocks = np.random.default_rng(i).permutation(ids).reshape(4, 8).astype(np.uint8)
    return blocks.repeat(side, 0).repeat(side, 1)


def _paint(ids: np.ndarray, i: int) -> Image.Image:
    """A photo of a label: a colour for every id, and some noise."""
    colours = np.random.default_rng(0).integers(20, 236, (256, 3))
    noise = np.random.default_rng(i).integers(-20, 20, (*ids.shape, 3))
    return Image.fromarray((colours[ids] + noise).astype(np.uint8))
