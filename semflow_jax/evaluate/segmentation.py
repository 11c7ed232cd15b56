"""Segmentation figures from one confusion matrix of exact integer counts.

The definitions are those of Long, Shelhamer and Darrell (2015), "Fully convolutional networks for semantic
segmentation", with classes that do not occur left out of means, as scikit-learn and torchmetrics do.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8


def confusion_matrix(
    label: UInt8[Array, "b h w 1"], prediction: UInt8[Array, "b h w 1"], num_classes: int
) -> Int[Array, "n n"]:
    """Pixels by (true class, predicted class); pixels whose label is no class (void) do not count."""
    true = label.reshape(-1).astype(jnp.int32)
    cell = true * num_classes + prediction.reshape(-1).astype(jnp.int32)
    cell = jnp.where(true < num_classes, cell, num_classes**2)  # void falls into one cell beyond the matrix
    return jnp.bincount(cell, length=num_classes**2 + 1)[:-1].reshape(num_classes, num_classes)


def class_iou(matrix: Int[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """Intersection over union by class; nan where a class is in neither labels nor predictions."""
    matrix = np.asarray(matrix, np.int64)
    hit = np.diag(matrix)
    return ratio(hit, matrix.sum(0) + matrix.sum(1) - hit)


def scores(
    matrix: Int[np.ndarray, "n n"], class_names: tuple[str, ...], background: int | None = None
) -> dict[str, Any]:
    """Figures of all classes, and the IoU of each class (None where absent).

    `miou` is the mean IoU of the classes in labels or predictions; `pixel_accuracy` the share of pixels whose class is
    found; `mean_accuracy` the mean of that share by true class, of the classes in the labels; and
    `frequency_weighted_iou` the mean IoU with classes weighted by their share of the labels' pixels. What there is
    nothing to compute from is nan.

    Args:
        matrix: pixels by (true class, predicted class).
        class_names: by id.
        background: id of a class that is also to be left out: `foreground_miou` and so on are the same means without
            it, over the other classes and (`foreground_pixel_accuracy`, weights) over the pixels whose label is one of
            them. The matrix stays whole: background taken for a class lowers that class's IoU, and a class taken for
            background both its IoU and its accuracy.
    """
    matrix = np.asarray(matrix, np.int64)
    every = np.ones(len(class_names), bool)
    found = _means(matrix, every)
    if background is not None:
        found |= {
            f"foreground_{k}": x for k, x in _means(matrix, every & (np.arange(every.size) != background)).items()
        }
    return found | {"class_iou": by_name(class_names, class_iou(matrix))}


def _means(matrix: Int[np.ndarray, "n n"], chosen: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """The figures over the chosen classes."""
    iou, hit, true = class_iou(matrix)[chosen], np.diag(matrix)[chosen], matrix.sum(1)[chosen]
    return {
        "miou": mean(iou),
        "pixel_accuracy": float(ratio(hit.sum(), true.sum())),
        "mean_accuracy": mean(ratio(hit, true)),
        "frequency_weighted_iou": float(ratio(np.nansum(true * iou), true.sum())),
    }


def ratio(part: Any, whole: Any) -> np.ndarray:
    """Quotients of counts; nan where there is nothing."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def mean(values: Float[np.ndarray, " n"]) -> float:
    """Of what is not nan; nan where nothing is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")


def by_name(class_names: Iterable[str], values: Float[np.ndarray, " n"]) -> dict[str, float | None]:
    """Figures by class name, None for nan."""
    return {name: None if np.isnan(x) else float(x) for name, x in zip(class_names, values, strict=True)}
