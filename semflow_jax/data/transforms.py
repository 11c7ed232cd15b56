"""Augmentations of {"image": uint8 [h w 3], "label": uint8 [h w 1]}: numpy, picklable, random by grain's generator.

OpenCV does the work: it resizes five times as fast as Pillow, and colours eight times as fast.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import cv2
import grain
import numpy as np
from jaxtyping import Float, UInt8

from semflow_jax.data.info import KEPT

Example = dict[str, Any]

cv2.setNumThreads(0)  # examples already are read in parallel
GREY = np.array(3 * [[0.299, 0.587, 0.114]])  # every channel becomes the brightness
TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # the direction in which hues turn
MAX_TURN = math.pi / 10  # of the hue, at strength 1


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain.transforms.RandomMap):
    """Mirror left and right with probability `p`; classes that have a side (left eye, right eye) trade places."""

    p: float = 0.5
    flip_pairs: tuple[tuple[int, int], ...] = ()

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        if rng.random() >= self.p:
            return element
        label = mirror_label(element["label"], self.flip_pairs)
        return element | {"image": cv2.flip(element["image"], 1), "label": label}


@dataclasses.dataclass(frozen=True)
class LatentFlip(grain.transforms.RandomMap):
    """`RandomFlip` of latents: takes those of the mirror image with probability `p`, and those of the image else.

    Of the perturbations that were kept of a mask, it takes one.
    """

    p: float = 0.5
    flip_pairs: tuple[tuple[int, int], ...] = ()

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        mirrored = int(rng.random() < self.p)
        label = mirror_label(element["label"], self.flip_pairs) if mirrored else element["label"]
        kept = {name: element[name][mirrored] for name in KEPT if name in element}
        if "mask" in kept:
            kept["mask"] = kept["mask"][rng.integers(len(kept["mask"]))]
        return element | kept | {"label": label}


@dataclasses.dataclass(frozen=True)
class OwnPair(grain.transforms.RandomMap):
    """Takes one of a flow's own latents, see `reflow.py`, for the image's with probability `share`.

    "draw" becomes the latent's number, and -1 where the image keeps its place.
    """

    share: float

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        own, draw = element["own"], element["draw"]
        rest = {name: x for name, x in element.items() if name != "own"}
        if rng.random() >= self.share:
            return rest | {"draw": np.int32(-1)}
        k = rng.integers(len(draw))
        moments = {"mean": own[k]} | ({"std": np.zeros_like(own[k])} if "std" in element else {})
        return rest | moments | {"draw": draw[k]}


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain.transforms.RandomMap):
    """Cut out a random window and resize it to `size`, the label by nearest.

    Attributes:
        size: (height, width) of the result.
        scale: (smallest, largest) share, in (0, 1], of the area of the largest window of the shape of `size`.
        ratio: how much wider or narrower than `size` the window may be, at least 1.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: float = 1.0

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        height, width = element["image"].shape[:2]
        largest = min(height / self.size[0], width / self.size[1])
        side = largest * math.sqrt(rng.uniform(*self.scale))
        # A window of height side / stretch and width side * stretch, in units of `size`, that fits in.
        stretches = (
            max(self.ratio**-0.5, side * self.size[0] / height),
            min(self.ratio**0.5, width / side / self.size[1]),
        )
        stretch = math.exp(rng.uniform(*np.log(stretches))) if self.ratio > 1 else 1.0
        h = min(max(1, round(side / stretch * self.size[0])), height)
        w = min(max(1, round(side * stretch * self.size[1])), width)
        top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
        return element | {
            name: resize(element[name][top : top + h, left : left + w], self.size) for name in ("image", "label")
        }


@dataclasses.dataclass(frozen=True)
class ColourJitter(grain.transforms.RandomMap):
    """Change brightness, contrast, saturation and, a little, the hue of the image: one affine map of its colours.

    Attributes:
        strength: factors are drawn from 1 - strength to 1 + strength; in [0, 1].
    """

    strength: float = 0.2

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        brightness, contrast, saturation = rng.uniform(1 - self.strength, 1 + self.strength, 3)
        turn = rng.uniform(-MAX_TURN, MAX_TURN) * self.strength
        matrix = brightness * contrast * colour_matrix(saturation, turn)
        offset = brightness * (1 - contrast) * (GREY @ cv2.mean(element["image"])[:3])
        affine = np.column_stack([matrix, offset])
        return element | {"image": cv2.transform(element["image"], affine)}


def mirrored_ids(num: int, flip_pairs: Sequence[tuple[int, int]]) -> UInt8[np.ndarray, " n"]:
    """The class that each of `num` class ids is in the mirror: a left eye is a right eye."""
    ids = np.arange(num, dtype=np.uint8)
    for left, right in flip_pairs:
        ids[[left, right]] = right, left
    return ids


def mirror_label(
    label: UInt8[np.ndarray, "h w 1"], flip_pairs: tuple[tuple[int, int], ...]
) -> UInt8[np.ndarray, "h w 1"]:
    """The mirror image, in which classes that have a side trade places."""
    mirrored = cv2.flip(label[..., 0], 1)
    if flip_pairs:
        mirrored = cv2.LUT(mirrored, mirrored_ids(256, flip_pairs))
    return mirrored[..., None]


def crop_centre(example: Example, size: tuple[int, int]) -> Example:
    """The largest window of the shape of `size` from the middle, at that size."""
    height, width = example["image"].shape[:2]
    largest = min(height / size[0], width / size[1])
    h, w = round(largest * size[0]), round(largest * size[1])
    return example | _cut(example, ((height - h) // 2, (width - w) // 2, h, w), size)


def colour_matrix(saturation: float, turn: float) -> Float[np.ndarray, "3 3"]:
    """Scales colours away from the grey of their brightness, and turns them about the grey axis; greys stay."""
    turned = math.cos(turn) * np.eye(3) + math.sin(turn) * TURN + (1 - math.cos(turn)) / 3
    return GREY + saturation * (np.eye(3) - GREY) @ turned


def _cut(example: Example, window: tuple[int, int, int, int], size: tuple[int, int]) -> Example:
    """Image and label in a window (top, left, height, width), resized."""
    top, left, h, w = window
    return {name: resize(example[name][top : top + h, left : left + w], size) for name in ("image", "label")}


def resize(array: UInt8[np.ndarray, "h w c"], size: tuple[int, int]) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Bilinear, or by area where it gets smaller; the one channel of a label by nearest, centre upon centre alike."""
    height, width, channels = array.shape
    if (height, width) == size:
        return array
    smaller = height > size[0] or width > size[1]
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    resized = cv2.resize(array, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT if channels == 1 else method)
    return resized.reshape(*size, channels)
