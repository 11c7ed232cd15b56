"""Augmentations of {"image": uint8 [h w 3], "label": uint8 [h w 1]}: numpy, picklable, random by grain's generator."""

import dataclasses
import math
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8
from PIL import Image

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
    """Mirror left and right with probability `p`; classes that have a side (left eye, right eye) trade places."""

    p: float = 0.5
    flip_pairs: tuple[tuple[int, int], ...] = ()

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        if rng.random() >= self.p:
            return element
        mirrored = np.arange(256, dtype=np.uint8)
        for left, right in self.flip_pairs:
            mirrored[[left, right]] = right, left
        return element | {"image": element["image"][:, ::-1], "label": mirrored[element["label"][:, ::-1]]}


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain.transforms.RandomMap):
    """Enlarge a random window to the full size; the window has the image's shape and a share of its area.

    Attributes:
        scale: (smallest, largest) share of the area, in (0, 1].
    """

    scale: tuple[float, float] = (0.5, 1.0)

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        height, width = element["image"].shape[:2]
        side = math.sqrt(rng.uniform(*self.scale))
        top, left = rng.uniform(0, 1 - side, size=2) * (height, width)
        box = (left, top, min(left + side * width, width), min(top + side * height, height))
        return element | {
            "image": _resize(element["image"], box, Image.Resampling.BILINEAR),
            "label": _resize(element["label"][..., 0], box, Image.Resampling.NEAREST)[..., None],
        }


def _resize(
    array: UInt8[np.ndarray, "h w *c"], box: tuple[float, float, float, float], resampling: Image.Resampling
) -> UInt8[np.ndarray, "h w *c"]:
    height, width = array.shape[:2]
    return np.asarray(Image.fromarray(array).resize((width, height), resampling, box))
