"""Runs both directions over a split and gathers figures and pictures. One compiled program per question."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from semflow_jax import noise, parallel
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
        everywhere = parallel.replicated(mesh)  # for the host of every process to read
        self.segment_fn = jax.jit(self._segment, out_shardings=everywhere)
        self.synthesize_fn = jax.jit(self._synthesize, out_shardings=everywhere)
        self.frames_fn = jax.jit(sampler.frames, static_argnames=("num_frames", "steps"), out_shardings=everywhere)

    def _count(self, split: str, limit: int | None) -> int:
        num = count_records(self.data_dir)[split]
        return min(limit or num, num)

    def _batches(self, split: str, limit: int | None, progress: str | None) -> Iterator[dict[str, jax.Array]]:
        size = parallel.local_batch_size(self.c.eval.batch_size, self.mesh)
        part, num_parts = parallel.batch_share(self.mesh)
        batches = make_eval_batches(
            self.data_dir, split, size, limit=limit, process_index=part, process_count=num_parts
        )
        total = -(-self._count(split, limit) // self.c.eval.batch_size)
        for batch in tqdm(
            batches, desc=progress, total=total, unit="batch", disable=progress is None or jax.process_index()
        ):
            arrays = {name: batch[name] for name in ("image", "label", "valid", "index")}
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
        """Samples, the confusion matrix of the first of them segmented again, and the sum of the masks' diversities."""
        s = self.c.sampling

        def one(keys):
            return self.sampler.synthesize(params, frozen, batch["label"], keys, s.steps, s.solver)

        keys = noise.split(noise.example_keys(key, batch["index"]), self.c.eval.num_samples)
        samples = jax.lax.map(one, jnp.stack(keys))
        again = self._predict(params, frozen, samples[0])
        matrix = segmentation.confusion_matrix(batch["label"], again, self.info.num_classes)
        return matrix, jnp.where(batch["valid"], synthesis.diversity(samples), 0).sum(), samples

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
        key, diversity = jax.random.key(self.c.seed), 0.0
        for batch in self._batches(split, limit, progress):
            found, spread, _ = self.synthesize_fn(params, frozen, batch, key)
            matrix += np.asarray(found)
            diversity += float(spread)
        again = segmentation.scores(matrix, self.info.class_names)
        return {
            "resegmentation_miou": again["miou"],
            "resegmentation_class_iou": again["class_iou"],
            "diversity": diversity / self._count(split, limit),
            "num_samples": self.c.eval.num_samples,
        }

    def gallery(self, params: Params, frozen: Frozen, split: str) -> Gallery:
        """Images from all over a split with their predictions, synthesized samples and paths."""
        num = min(self.c.eval.gallery, self.c.eval.batch_size, count_records(self.data_dir)[split])
        batch = next(self._batches(split, num, None))
        prediction = self.segment_fn(params, frozen, batch)[2]
        samples = self.synthesize_fn(params, frozen, batch, jax.random.key(self.c.seed))[2]
        images = parallel.to_host(batch["image"])[: min(NUM_PATHS, num)]
        pictures, labels = self.frames_fn(params, frozen, images, num_frames=NUM_FRAMES, steps=self.c.sampling.steps)
        masks = self.sampler.code.colours[np.asarray(labels)[..., 0]]
        frames = np.stack([np.asarray(pictures), masks], axis=2)  # [f p 2 h w 3]: every path is seen twice
        pick = {"image": batch["image"], "label": batch["label"], "prediction": prediction}
        return Gallery(
            **{name: parallel.to_host(x)[:num] for name, x in pick.items()},
            samples=np.asarray(samples[:, :num]),
            frames=frames.reshape(len(frames), -1, *frames.shape[3:]),
        )
