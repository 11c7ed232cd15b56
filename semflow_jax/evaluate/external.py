"""Re-segmentation by any other segmenter, given as a folder of what it predicts of the synthesized images."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from semflow_jax.data.images import read_label
from semflow_jax.data.info import DataInfo
from semflow_jax.data.pipeline import make_eval_batches
from semflow_jax.errors import UserError
from semflow_jax.evaluate.judges import sample_name
from semflow_jax.evaluate.segmentation import confusion_matrix, scores
from semflow_jax.evaluate.views import resize_label

BATCH = 16


def score_predictions(
    folder: pathlib.Path, data_dir: str, split: str, info: DataInfo, size: tuple[int, int], limit: int | None = None
) -> dict[str, Any]:
    """mIoU and the rest, of the first sample of every mask against the mask it came from, at the samples' size.

    Args:
        folder: PNGs of class ids, by the names of the samples that `semflow evaluate --pictures` wrote.

    Raises:
        UserError: a prediction is missing, or of another size than its image.
    """
    matrix = np.zeros((info.num_classes, info.num_classes), np.int64)
    for batch in make_eval_batches(data_dir, split, BATCH, limit=limit):
        labels = np.asarray(resize_label(jnp.asarray(batch["label"]), size))
        for id, label in zip(batch["id"], labels, strict=True):
            if id:  # padding has none
                prediction = _read(folder / sample_name(id, 0), size, info.num_classes)
                pair = jnp.asarray(label)[None], jnp.asarray(prediction)[None]
                matrix += np.asarray(confusion_matrix(*pair, info.num_classes))
    return scores(matrix, info.class_names)


def _read(path: pathlib.Path, size: tuple[int, int], num_classes: int) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: a PNG of class ids for every first sample expected, found no file; segment them all")
    label = read_label(path)[..., None]
    if label.shape[:2] != size:
        raise UserError(f"{path}: the size of its image, {size}, expected, found {label.shape[:2]}; don't resize it")
    if label.max() >= num_classes:
        rule = f"class ids 0..{num_classes - 1} expected"
        raise UserError(f"{path}: {rule}, found {label.max()}; map the segmenter's classes to the data set's")
    return label
