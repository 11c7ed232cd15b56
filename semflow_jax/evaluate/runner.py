"""Runs both directions over a split and gathers figures and pictures. One compiled program per question."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from semflow_jax import parallel
from semflow_jax.data.info import DataInfo
from semflow_jax.data.pipeline import make_eval_batches
from semflow_jax.data.records import count_records
from semflow_jax.evaluate import segmentation, synthesis
from semflow_jax.evaluate.report import Gallery
from semflow_jax.models.build import Params
from semflow_jax.sampling import Frozen, Sampler

NUM_FRAMES = 6  # of the ODE's path in the gallery
NUM_PATHS = 3


class Evaluator:
    """Figures of a flow on a prepared data set; keeps its compiled programs between calls."""

    def __init__(self, sampler: Sampler, data_dir: str, info: DataInfo, mesh: Mesh, c: ConfigDict):
        self.sampler = sampler
        self.data_dir = data_dir
        self.info = info
        self.mesh = mesh
        self.c = c
        self.segment_fn = jax.jit(self._segment)
        self.synthesize_fn = jax.jit(self._synthesize)

    def _batches(self, split: str, limit: int | None, progress: str | None) -> Iterator[dict[str, jax.Array]]:
        size = parallel.local_batch_size(self.c.eval.batch_size, self.mesh)
        shard = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = make_eval_batches(self.data_dir, split, size, limit=limit, **shard)
        num = min(limit or np.inf, count_records(self.data_dir)[split])
        total = int(-(-num // self.c.eval.batch_size))
        for batch in tqdm(batches, desc=progress, total=total, unit="batch", disable=progress is None):
            arrays = {name: batch[name] for name in ("image", "label", "valid")}
            yield parallel.to_global(arrays, self.mesh)

    def _predict(self, params: Params, frozen: Frozen, image):
        s = self.c.sampling
        return self.sampler.segment(params, frozen, image, s.steps, s.solver)

    def _segment(self, params: Params, frozen: Frozen, batch):
        """Confusion matrices of the prediction and of the codec alone, and the prediction."""
        matrix = functools.partial(segmentation.confusion_matrix, num_classes=self.info.num_classes)
        prediction = self._predict(params, frozen, batch["image"])
        ceiling = self.sampler.ceiling(frozen, batch["label"])
        return matrix(batch["label"], prediction), matrix(batch["label"], ceiling), prediction

    def _synthesize(self, params: Params, frozen: Frozen, batch, key):
        """Samples, the confusion matrix of the first of them segmented again, and the diversity of each mask."""
        s = self.c.sampling

        def one(key):
            return self.sampler.synthesize(params, frozen, batch["label"], key, s.steps, s.solver)

        samples = jax.lax.map(one, jax.random.split(key, self.c.eval.num_samples))
        again = self._predict(params, frozen, samples[0])
        matrix = segmentation.confusion_matrix(batch["label"], again, self.info.num_classes)
        return matrix, synthesis.diversity(samples), samples

    def segmentation(self, params: Params, frozen: Frozen, split: str, limit=None, progress=None) -> dict[str, Any]:
        """mIoU, accuracy and IoU by class on (`limit` images of) a split, the codec's ceiling beside them."""
        matrices = np.zeros((2, self.info.num_classes, self.info.num_classes), np.int64)
        for batch in self._batches(split, limit, progress):
            found, ceiling, _ = self.segment_fn(params, frozen, batch)
            matrices += np.stack([found, ceiling])
        ceiling = segmentation.scores(matrices[1], self.info.class_names)
        return segmentation.scores(matrices[0], self.info.class_names) | {
            "codec_ceiling_miou": ceiling["miou"],
            "ceiling_class_iou": ceiling["class_iou"],
        }

    def synthesis(self, params: Params, frozen: Frozen, split: str, limit=None, progress=None) -> dict[str, Any]:
        """Agreement of synthesized images with their mask, and diversity, on (`limit` masks of) a split."""
        matrix = np.zeros((self.info.num_classes, self.info.num_classes), np.int64)
        spreads = []
        for i, batch in enumerate(self._batches(split, limit, progress)):
            key = jax.random.fold_in(jax.random.key(self.c.seed), i)
            found, spread, _ = self.synthesize_fn(params, frozen, batch, key)
            matrix += np.asarray(found)
            spreads.append(np.asarray(spread)[np.asarray(batch["valid"])])
        again = segmentation.scores(matrix, self.info.class_names)
        return {
            "resegmentation_miou": again["miou"],
            "resegmentation_class_iou": again["class_iou"],
            "diversity": float(np.concatenate(spreads).mean()),
            "num_samples": self.c.eval.num_samples,
        }

    def gallery(self, params: Params, frozen: Frozen, split: str) -> Gallery:
        """Images from all over a split with their predictions, synthesized samples and paths."""
        num = min(self.c.eval.gallery, self.c.eval.batch_size, count_records(self.data_dir)[split])
        batch = next(self._batches(split, num, None))
        prediction = self.segment_fn(params, frozen, batch)[2]
        samples = self.synthesize_fn(params, frozen, batch, jax.random.key(self.c.seed))[2]
        pictures, labels = jax.jit(self.sampler.frames, static_argnames=("num_frames", "steps"))(
            params, frozen, batch["image"][: min(NUM_PATHS, num)], num_frames=NUM_FRAMES, steps=self.c.sampling.steps
        )
        masks = self.sampler.code.colours[np.asarray(labels)[..., 0]]
        frames = np.stack([np.asarray(pictures), masks], axis=2)  # [f p 2 h w 3]: every path is seen twice
        pick = {"image": batch["image"], "label": batch["label"], "prediction": prediction}
        return Gallery(
            **{name: np.asarray(x[:num]) for name, x in pick.items()},
            samples=np.asarray(samples[:, :num]),
            frames=frames.reshape(len(frames), -1, *frames.shape[3:]),
        )
