"""Runs both directions over a split and gathers figures and pictures. One compiled program per question and setting."""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
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
from semflow_jax.data.transforms import mirrored_ids
from semflow_jax.evaluate import boundary, calibration, geometry, segmentation, synthesis
from semflow_jax.evaluate.report import Gallery
from semflow_jax.evaluate.tally import Counts, tally
from semflow_jax.evaluate.views import Views, probabilities, resize_image, resize_label, view_sizes
from semflow_jax.models.build import Params
from semflow_jax.sampling import Frozen, Sampler

NUM_FRAMES = 6  # of the ODE's path in the gallery
NUM_PATHS = 3
NUM_TIMINGS = 3
FINE = 10  # steps that it takes to see how a path bends: one step is always straight
# (real images, samples [s b h w 3], which of them are no padding, this process's ids) -> what is kept of every example
Judge = Callable[[jax.Array, jax.Array, np.ndarray, list[str]], Counts]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the ODE is solved and how an image is looked at."""

    solver: str
    steps: int
    views: Views = Views()


class Evaluator:
    """Figures of a flow on a prepared data set; keeps its compiled programs between calls.

    Args:
        size: that the model works at; where the data are of another, images are resized to it (Lanczos), and class
            probabilities to the data's (bilinear): figures of segmentation are always at the labels' resolution.
        factor: pixels of the network's coarsest cell, which other scales must be a multiple of.
    """

    def __init__(
        self,
        sampler: Sampler,
        data_dir: str,
        info: DataInfo,
        mesh: Mesh,
        c: ConfigDict,
        size: tuple[int, int] | None = None,
        factor: int = 1,
    ):
        self.sampler = sampler
        self.data_dir = data_dir
        self.info = info
        self.mesh = mesh
        self.c = c
        self.size = info.size if size is None else size
        self.factor = factor
        self.setting = Setting(c.sampling.solver, c.sampling.steps)
        jit = functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))  # for every process's host to read
        self.segment_fn = jit(self._segment, static_argnames="setting")
        self.synthesize_fn = jit(self._synthesize, static_argnames="setting")
        self.geometry_fn = jit(self._geometry, static_argnames="setting")
        self.frames_fn = jit(sampler.frames, static_argnames=("num_frames", "steps"))
        self.timed_fns = {
            "segmentation": jit(sampler.segment, static_argnames=("steps", "solver")),
            "synthesis": jit(sampler.synthesize, static_argnames=("steps", "solver")),
        }

    def count(self, split: str, limit: int | None) -> int:
        """The examples that a figure of a split is of."""
        num = count_records(self.data_dir)[split]
        return min(limit or num, num)

    def _batches(
        self, split: str, limit: int | None, progress: str | None, first: int = 0
    ) -> Iterator[tuple[dict[str, jax.Array], list[str]]]:
        """Global batches with this process's ids."""
        size = parallel.local_batch_size(self.c.eval.batch_size, self.mesh)
        part, num_parts = parallel.batch_share(self.mesh)
        batches = make_eval_batches(
            self.data_dir, split, size, limit=limit, process_index=part, process_count=num_parts, first=first
        )
        total = -(-self.count(split, limit) // self.c.eval.batch_size)
        hidden = progress is None or jax.process_index() != 0
        for batch in tqdm(batches, desc=progress, total=total, initial=first, unit="batch", disable=hidden):
            arrays = {name: batch[name] for name in ("image", "label", "valid", "index")}
            yield parallel.to_global(arrays, self.mesh), batch["id"]

    def _matrix(self, label, prediction):
        return segmentation.confusion_matrix(label, prediction, self.info.num_classes)

    def _predict(self, params: Params, frozen: Frozen, image, size: tuple[int, int], setting: Setting):
        """Class probabilities at a size."""
        mirror = mirrored_ids(self.info.num_classes, self.info.flip_pairs) if setting.views.mirror else None
        sizes = view_sizes(self.size, setting.views, self.factor)
        return probabilities(self.sampler, params, frozen, image, size, sizes, mirror, setting.steps, setting.solver)

    def _segment(self, params: Params, frozen: Frozen, batch, setting: Setting):
        """What is counted of the prediction and of the codec alone, and the prediction."""
        label = batch["label"]
        size = label.shape[1:3]
        p = self._predict(params, frozen, batch["image"], size, setting)
        prediction = jnp.argmax(p, axis=-1, keepdims=True).astype(jnp.uint8)
        ceiling = resize_label(self.sampler.ceiling(frozen, resize_label(label, self.size)), size)
        edges = functools.partial(
            boundary.boundary_counts, num_classes=self.info.num_classes, width=boundary.boundary_width(*size)
        )
        found = {
            "matrix": self._matrix(label, prediction),
            "boundary": edges(label, prediction),
            "ceiling_matrix": self._matrix(label, ceiling),
            "ceiling_boundary": edges(label, ceiling),
        }
        bins = calibration.calibration_counts(p, label)._asdict()
        return found | {f"calibration_{name}": x for name, x in bins.items()}, prediction

    def _synthesize(self, params: Params, frozen: Frozen, batch, key, setting: Setting):
        """What is counted of the first sample segmented again, the diversity of each mask, the samples."""
        label = resize_label(batch["label"], self.size)

        def one(keys):
            return self.sampler.synthesize(params, frozen, label, keys, setting.steps, setting.solver)

        keys = noise.split(noise.example_keys(key, batch["index"]), self.c.eval.num_samples)
        samples = jax.lax.map(one, jnp.stack(keys))
        again = self.sampler.segment(params, frozen, samples[0], setting.steps, setting.solver)
        return {"matrix": self._matrix(label, again)}, {"diversity": synthesis.diversity(samples)}, samples

    def _geometry(self, params: Params, frozen: Frozen, batch, key, setting: Setting):
        """How straight the paths are, and what is lost on the way there and back."""
        s, sampler = setting, self.sampler
        image, label = resize_image(batch["image"], self.size), resize_label(batch["label"], self.size)
        z0 = sampler.encode_image(frozen, image)
        z1 = sampler.encode_mask(frozen, label, noise.example_keys(key, batch["index"]))
        path = sampler.path_to_mask(params, frozen, z0, s.steps + 1, s.steps, s.solver)
        back = sampler.to_image(params, frozen, path[-1], s.steps, s.solver)
        there = sampler.to_image(params, frozen, z1, s.steps, s.solver)
        again = sampler.decode_mask(frozen, sampler.to_mask(params, frozen, there, s.steps, s.solver))
        seen, shown = sampler.decode_image(frozen, z0), sampler.decode_image(frozen, back)
        each = {
            "round_trip_latent": geometry.round_trip(z0, back),
            "round_trip_image": geometry.round_trip(seen, shown),
        }
        if s.steps >= FINE:
            each["straightness"], each["relative_straightness"] = geometry.straightness(path)
            each["curvature"] = geometry.curvature(path)
        return {"matrix": self._matrix(label, again)}, each

    def segmentation(
        self,
        params: Params,
        frozen: Frozen,
        split: str,
        limit: int | None = None,
        progress: str | None = None,
        setting: Setting | None = None,
        keep: pathlib.Path | None = None,
    ) -> dict[str, Any]:
        """Figures on (`limit` images of) a split, at the labels' resolution, the codec's ceiling beside them.

        Args:
            progress: title of a progress bar; None shows none.
            setting: other than the config's.
            keep: file of the counts so far, to go on from.
        """

        def count(found):
            return self.segment_fn(params, frozen, found[0], setting=setting or self.setting)[0], {}

        counts = tally(functools.partial(self._batches, split, limit, progress), count, keep)
        bins: Any = (counts[f"calibration_{name}"] for name in calibration.Counts._fields)
        ceiling = self._scores(counts["ceiling_matrix"], counts["ceiling_boundary"])
        return self._scores(counts["matrix"], counts["boundary"]) | {
            "calibration_error": calibration.expected_calibration_error(calibration.Counts(*bins)),
            "codec_ceiling_miou": ceiling["miou"],
            "ceiling": ceiling,
        }

    def _scores(self, matrix: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
        names = self.info.class_names
        background = names.index("background") if "background" in names else None
        return segmentation.scores(matrix, names, background) | boundary.boundary_iou(edges, names)

    def synthesis(
        self,
        params: Params,
        frozen: Frozen,
        split: str,
        limit: int | None = None,
        progress: str | None = None,
        setting: Setting | None = None,
        keep: pathlib.Path | None = None,
        judge: Judge | None = None,
    ) -> dict[str, Any]:
        """Agreement of synthesized images with their mask, and diversity, on (`limit` masks of) a split.

        Args:
            judge: what other networks see in an image; what it keeps of every example comes back as "judged".
        """
        key = jax.random.key(self.c.seed)

        def count(found):
            batch, ids = found
            sums, each, samples = self.synthesize_fn(params, frozen, batch, key, setting=setting or self.setting)
            valid = parallel.to_host(batch["valid"])
            kept = {name: np.asarray(x)[valid] for name, x in each.items()}
            if judge is None:
                return sums, kept
            more = judge(resize_image(batch["image"], self.size), samples, valid, ids)
            return sums, kept | more

        counts = tally(functools.partial(self._batches, split, limit, progress), count, keep)
        again = segmentation.scores(counts.pop("matrix"), self.info.class_names)
        found = {
            "resegmentation_miou": again["miou"],
            "resegmentation_class_iou": again["class_iou"],
            "diversity": float(counts.pop("diversity").mean(dtype=np.float64)),
            "num_samples": self.c.eval.num_samples,
        }
        return found if judge is None else found | {"judged": counts}

    def geometry(
        self,
        params: Params,
        frozen: Frozen,
        split: str,
        limit: int | None = None,
        progress: str | None = None,
        setting: Setting | None = None,
        keep: pathlib.Path | None = None,
    ) -> dict[str, Any]:
        """Means over (`limit` images of) a split: how paths bend, seen from `FINE` steps on, what a way back loses.

        An image's way to a mask and back is measured in latents and in pixels (of 0..1, the codec's loss apart), a
        mask's way to an image and back by the classes that come back; no image is decoded and encoded on the way.
        """
        key = jax.random.key(self.c.seed)

        def count(found):
            batch, _ = found
            sums, each = self.geometry_fn(params, frozen, batch, key, setting=setting or self.setting)
            valid = parallel.to_host(batch["valid"])
            return sums, {name: np.asarray(x)[valid] for name, x in each.items()}

        counts = tally(functools.partial(self._batches, split, limit, progress), count, keep)
        again = segmentation.scores(counts.pop("matrix"), self.info.class_names)
        found = {name: float(x.mean(dtype=np.float64)) for name, x in counts.items()}
        return found | {"round_trip_mask_miou": again["miou"]}

    def seconds_per_image(self, section: str, params: Params, frozen: Frozen, split: str, setting: Setting) -> float:
        """Time from pixels to class ids ("segmentation") or back ("synthesis"): the median of a few full batches."""
        batch, _ = next(self._batches(split, None, None))
        inputs: tuple[jax.Array, ...]
        if section == "segmentation":
            inputs = (resize_image(batch["image"], self.size),)
        else:
            inputs = resize_label(batch["label"], self.size), noise.example_keys(jax.random.key(0), batch["index"])
        seconds = []
        for _ in range(1 + NUM_TIMINGS):  # the first one compiles
            start = time.perf_counter()
            run = self.timed_fns[section](params, frozen, *inputs, steps=setting.steps, solver=setting.solver)
            jax.block_until_ready(run)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:]) / len(batch["image"])

    def gallery(self, params: Params, frozen: Frozen, split: str) -> Gallery:
        """Images from all over a split with their predictions, synthesized samples and paths."""
        num = min(self.c.eval.gallery, self.c.eval.batch_size, count_records(self.data_dir)[split])
        batch, _ = next(self._batches(split, num, None))
        prediction = self.segment_fn(params, frozen, batch, setting=self.setting)[1]
        key = jax.random.key(self.c.seed)
        samples = self.synthesize_fn(params, frozen, batch, key, setting=self.setting)[2]
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
