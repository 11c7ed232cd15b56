"""The shipped model does what its card says, on avatars drawn here."""

import jax
import numpy as np

from semflow_jax.data.sources import avatars
from semflow_jax.evaluate import segmentation
from semflow_jax.pipeline import SemFlow, shipped

NUM = 6


def test_avatars_both_ways():
    flow = SemFlow.from_pretrained("avatars")
    drawn = [avatars.render(avatars.make_seed("test", 1, i), 64) for i in range(NUM)]
    images = np.stack([image for image, _ in drawn])
    labels = np.stack([label for _, label in drawn])[..., None]

    def miou(prediction: np.ndarray) -> float:
        matrix = segmentation.confusion_matrix(jax.numpy.asarray(labels), jax.numpy.asarray(prediction), 11)
        return segmentation.scores(np.asarray(matrix), flow.info.class_names)["miou"]

    assert miou(flow.segment(images, steps=5)) > 0.85
    samples = flow.synthesize(labels, key=jax.random.key(0), num_samples=2, steps=5)
    assert miou(flow.segment(samples[0], steps=5)) > 0.9
    assert np.abs(samples[0].astype(float) - samples[1]).mean() > 5  # two seeds, two pictures


def test_size():
    folder = shipped()["avatars"]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4 * 2**20
