"""Boundary IoU: the IoU of the pixels near a mask's outline, which says how sharp masks are whatever their size.

Cheng, Girshick, Dollár, Berg and Kirillov (2021), "Boundary IoU: improving object-centric image segmentation
evaluation", followed by its reference implementation, bowenc0221/boundary-iou-api: the boundary region of a mask is
what an erosion by `width` pixels takes from it, G_d and G in the paper; beyond the image's border there is no mask.
Regions are counted over all images before the division, as for mIoU.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, UInt8

from semflow_jax.data.info import VOID
from semflow_jax.evaluate import segmentation


def boundary_width(height: int, width: int, ratio: float = 0.02) -> int:
    """Pixels that a boundary region is wide in images of this size: a share of their diagonal, at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundary_counts(
    label: UInt8[Array, "b h w 1"], prediction: UInt8[Array, "b h w 1"], num_classes: int, width: int
) -> Int[Array, "n 2"]:
    """Pixels in the intersection and in the union of the two boundary regions of each class, summed over images.

    Pixels whose label is no class (void) are taken out of both before the masks are eroded, so that it never matters
    what is predicted there, and a prediction that is right everywhere else gets full marks.
    """
    known = label < num_classes
    true, found = (jnp.where(known, ids, VOID)[..., 0].astype(jnp.int32) for ids in (label, prediction))
    true, found = (jnp.where(_inside(ids, width), num_classes, ids) for ids in (true, found))

    def count(ids: Int[Array, "b h w"]) -> Int[Array, " n"]:
        return jnp.bincount(jnp.minimum(ids, num_classes).reshape(-1), length=num_classes + 1)[:-1]

    both = count(jnp.where(true == found, true, num_classes))
    return jnp.stack([both, count(true) + count(found) - both], axis=-1)


def _inside(ids: Int[Array, "b h w"], width: int) -> Bool[Array, "b h w"]:
    """Where the erosion leaves a pixel in its mask: one class fills the square that reaches `width` pixels each way.

    One pass for all classes; a square is two windows, one after the other.
    """
    ring = jnp.pad(ids, ((0, 0), (1, 1), (1, 1)), constant_values=VOID)  # what a square outside the image meets
    side = 2 * width + 1

    def extreme(pick: Any, start: int) -> Int[Array, "b h w"]:
        rows = lax.reduce_window(ring, start, pick, (1, side, 1), (1, 1, 1), "SAME")
        return lax.reduce_window(rows, start, pick, (1, 1, side), (1, 1, 1), "SAME")[:, 1:-1, 1:-1]

    return extreme(lax.max, 0) == extreme(lax.min, VOID)


def boundary_iou(counts: Int[np.ndarray, "n 2"], class_names: tuple[str, ...]) -> dict[str, Any]:
    """`boundary_miou`, the mean of the classes that occur, and `boundary_class_iou`, None where absent."""
    both, either = np.asarray(counts, np.int64).T
    iou = segmentation.ratio(both, either)
    return {"boundary_miou": segmentation.mean(iou), "boundary_class_iou": segmentation.by_name(class_names, iou)}
