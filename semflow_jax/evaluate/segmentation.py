"""Segmentation figures from one confusion matrix of exact integer counts."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8


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
    union = matrix.sum(0) + matrix.sum(1) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def scores(matrix: Int[np.ndarray, "n n"], class_names: tuple[str, ...]) -> dict[str, Any]:
    """mIoU over the classes that occur, pixel accuracy, and the IoU of each class (None where absent)."""
    matrix = np.asarray(matrix, np.int64)
    iou = class_iou(matrix)
    return {
        "miou": float(np.nanmean(iou)) if matrix.any() else float("nan"),
        "pixel_accuracy": float(np.trace(matrix) / max(matrix.sum(), 1)),
        "class_iou": {name: None if np.isnan(x) else float(x) for name, x in zip(class_names, iou, strict=True)},
    }
