"""Face parsing without annotators: vector avatars whose class map is exact, because the drawing is the annotation.

The style is "Avataaars". Its definition is drawn twice: once as it is, and once with every shape repainted in the grey
level of its class, without anti-aliasing. Part shapes and colours are drawn independently, so one mask has many images.
"""

import copy
import functools
import importlib.resources
import io
import json
import re
from typing import Any

import numpy as np
import resvg_py
from dicebear import Avatar, Style
from jaxtyping import UInt8
from PIL import Image

from semflow_jax.data.source import SPLITS, Item, Pair, Source, find_flip_pairs
from semflow_jax.errors import UserError

STYLE = "avataaars"
LICENSE = "Free for personal and commercial use (https://avataaars.com/)"
ATTRIBUTION = "Remix of 'Avataaars' (https://avataaars.com/) by Pablo Stanley, drawn with DiceBear"

# Names of CelebAMask-HQ where the class is the same; left and right eyes and brows are one class each.
CLASS_NAMES = (
    "background",
    "skin",
    "eyes",
    "eyebrows",
    "nose",
    "mouth",
    "hair",
    "hat",
    "eye_g",
    "facial_hair",
    "cloth",
)

COMPONENT_CLASS = {
    "clothes": "cloth",
    "clothesGraphic": "cloth",
    "mouth": "mouth",
    "nose": "nose",
    "eyes": "eyes",
    "eyebrows": "eyebrows",
    "top": "hair",
    "facialHair": "facial_hair",
    "accessories": "eye_g",
}
HATS = ("hat", "hijab", "turban", "winterHat1", "winterHat02", "winterHat03", "winterHat04")
# Parts that belong to none of the classes: flowers, an earring, a band, an eye patch, and a matter of taste.
LEFT_OUT = {"top": ("frida", "froBand"), "accessories": ("eyepatch",), "mouth": ("vomit",)}

SHARE = {"top": 95, "facialHair": 30, "accessories": 35}  # per cent of the avatars that wear one
HAT_SHARE = 0.2  # of the tops
BACKGROUNDS = (
    "#ffffff",
    "#f4d7c5",
    "#b6e3f4",
    "#c0aede",
    "#d1f4d9",
    "#ffd5dc",
    "#ffdf8e",
    "#6b8fa3",
    "#5b6e5d",
    "#33334d",
)

# Fainter overlays than this are light and shade: they tint a surface and leave its class. The nose is one by nature,
# and so is the stubble of the shaved sides.
SHADE_OPACITY = 0.3
SHADE_IS_SHAPE = ("nose", "shavedSides")

CROP = 224  # of the style's 280 units, from the middle of the upper edge: the face fills more of a small image
OVERSAMPLING = 3  # label samples per pixel, along each axis


def make_seed(split: str, seed: int, index: int) -> int:
    """Avatar seed of example `index` of a split; no two (split, seed, index) share one while index < 2**32."""
    if split not in SPLITS:
        raise UserError(f"split: must be one of {SPLITS}, got {split!r}; choose one of them")
    return ((seed * len(SPLITS) + SPLITS.index(split)) << 32) + index


def render(seed: int, size: int) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]]:
    """Draw avatar `seed`: the image, and the class id of every pixel (the class that covers most of it)."""
    if size < 1:
        raise UserError(f"size: must be at least 1 pixel, got {size}; 64 shows every part")
    style, label_style = _styles()
    image = _raster(style, seed, size)
    fine = _raster(label_style, seed, size * OVERSAMPLING)[..., 0]
    return image, _majority(fine, OVERSAMPLING)


def find(recipe: dict[str, Any]) -> Source:
    """The avatars of each split; they depend on (split, index, size, seed) only.

    Raises:
        UserError: a size that is not square.
    """
    (height, width), seed = recipe["size"], recipe["seed"]
    if height != width:
        raise UserError(f"size: avatars are square, got {height} x {width}; pass one number")
    nums = {"train": recipe["num_train"], "val": recipe["num_val"], "test": recipe["num_val"]}
    return Source(
        name="avatars",
        class_names=CLASS_NAMES,
        splits={
            split: [Item(f"{split}-{i:06d}", detail=(make_seed(split, seed, i), height)) for i in range(num)]
            for split, num in nums.items()
        },
        read=_draw,
        flip_pairs=find_flip_pairs(CLASS_NAMES),
        license=LICENSE,
        attribution=ATTRIBUTION,
        drawn=True,
    )


def _draw(item: Item) -> Pair:
    image, label = render(*item.detail)
    return Image.fromarray(image), label


@functools.cache
def _styles() -> tuple[Style, Style]:
    """The style with this set's choices, and the same with every shape in the grey level of its class."""
    source = importlib.resources.files("dicebear_styles").joinpath(f"{STYLE}.json")
    definition = _choose(json.loads(source.read_text(encoding="utf-8")))
    label = copy.deepcopy(definition)
    for component, body in label["components"].items():
        for variant, content in body["variants"].items():
            name = "hat" if variant in HATS else COMPONENT_CLASS[component]
            shades = component in SHADE_IS_SHAPE or variant in SHADE_IS_SHAPE
            content["elements"] = _repaint(content["elements"], name, shades)
    label["canvas"]["elements"] = _repaint(label["canvas"]["elements"], "skin", shades=False)
    label["attributes"]["shape-rendering"] = "crispEdges"  # a blend of two class ids would be a third
    label["colors"]["background"] = {"values": [_grey("background")]}
    return Style(definition), Style(label)


def _choose(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition with the variants, frequencies, backgrounds and crop of this set."""
    components, canvas = definition["components"], definition["canvas"]
    for component, variants in LEFT_OUT.items():
        for variant in variants:
            del components[component]["variants"][variant]
    for component, share in SHARE.items():
        components[component]["probability"] = share
    tops = components["top"]["variants"]
    for variant in HATS:
        tops[variant]["weight"] = HAT_SHARE / (1 - HAT_SHARE) * (len(tops) - len(HATS)) / len(HATS)
    definition["colors"]["background"] = {"values": list(BACKGROUNDS)}
    shift = {"transform": f"translate({(CROP - canvas['width']) / 2:g} 0)"}
    group = {"type": "element", "name": "g", "attributes": shift, "children": canvas["elements"]}
    definition["canvas"] = {"width": CROP, "height": CROP, "elements": [group]}
    return definition


def _repaint(elements: list[dict[str, Any]], name: str, shades: bool) -> list[dict[str, Any]]:
    """Shapes filled with the opaque grey of class `name`; faint overlays only where they are shapes (`shades`)."""
    painted = []
    for element in elements:
        if element["type"] == "element":
            attributes = element.get("attributes", {})
            faint = float(attributes.get("fill-opacity", 1)) <= SHADE_OPACITY
            if element["name"] == "defs" or (faint and not shades):
                continue
            kept = {k: v for k, v in attributes.items() if k not in ("fill", "fill-opacity", "opacity", "style")}
            element = element | {"attributes": kept | {"fill": _grey(name)}}
            if "children" in element:
                element["children"] = _repaint(element["children"], name, shades)
        painted.append(element)
    return painted


def _grey(name: str) -> str:
    return "#" + 3 * f"{CLASS_NAMES.index(name):02x}"


def _raster(style: Style, seed: int, size: int) -> UInt8[np.ndarray, "s s 3"]:
    # The avatar's clip is the canvas, to which a raster is clipped anyway: without it drawing takes half the time.
    svg = re.sub(r' clip-path="[^"]*"', "", str(Avatar(style, {"seed": str(seed)})))
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)))[..., :3]


def _majority(fine: UInt8[np.ndarray, "S S"], factor: int) -> UInt8[np.ndarray, "s s"]:
    """The most frequent class of every factor x factor block; the lower id among equals."""
    size, num_classes = len(fine) // factor, len(CLASS_NAMES)
    block = np.arange(len(fine)) // factor
    votes = np.bincount(((block[:, None] * size + block) * num_classes + fine).ravel(), minlength=size**2 * num_classes)
    return votes.reshape(size, size, num_classes).argmax(axis=-1).astype(np.uint8)
