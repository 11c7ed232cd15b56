"""evaluate/segmentation.py, synthesis.py and runner.py: figures against loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_folder import make_folder

from semflow_jax import parallel
from semflow_jax.codec import make_patch_codec
from semflow_jax.data.info import VOID
from semflow_jax.data.prepare import prepare
from semflow_jax.data.records import open_records, spread_indices
from semflow_jax.evaluate import segmentation, synthesis
from semflow_jax.evaluate.runner import Evaluator
from semflow_jax.mask_code import make_colour_code
from semflow_jax.palette import colourise, make_palette
from semflow_jax.sampling import Sampler, to_float, to_uint8

NAMES = ("road", "sky", "tree", "dragon")


def make_labels(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted ids; no dragons, some void."""
    rng = np.random.default_rng(seed)
    label, prediction = rng.integers(0, 3, (2, 2, 9, 11, 1)).astype(np.uint8)
    label[0, :4] = VOID
    return label, prediction


def count(label: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    matrix = np.zeros((num_classes, num_classes), int)
    for true, found in zip(label.ravel(), prediction.ravel(), strict=True):
        if true != VOID:
            matrix[true, found] += 1
    return matrix


@pytest.mark.parametrize("seed", range(3))
def test_confusion_matrix_counts(seed):
    label, prediction = make_labels(seed)
    matrix = segmentation.confusion_matrix(jnp.asarray(label), jnp.asarray(prediction), 4)
    np.testing.assert_array_equal(matrix, count(label, prediction, 4))
    assert matrix.sum() == (label != VOID).sum()


def test_confusion_matrix_of_254_classes():
    """Beyond what a byte times a byte holds."""
    label = jnp.full((1, 2, 2, 1), 253, jnp.uint8).at[0, 0, 0].set(VOID)
    matrix = segmentation.confusion_matrix(label, jnp.full_like(label, 252), 254)
    assert matrix[253, 252] == 3 and matrix.sum() == 3


def test_iou_is_intersection_over_union_of_sets():
    label, prediction = make_labels()
    known = label != VOID
    iou = segmentation.class_iou(count(label, prediction, 4))
    for c in range(3):
        true, found = (label == c) & known, (prediction == c) & known
        assert iou[c] == pytest.approx((true & found).sum() / (true | found).sum())
    assert np.isnan(iou[3])


def test_scores():
    label, prediction = make_labels()
    matrix = count(label, prediction, 4)
    found = segmentation.scores(matrix, NAMES)
    iou = segmentation.class_iou(matrix)
    assert found["miou"] == pytest.approx(iou[:3].mean())
    assert found["pixel_accuracy"] == pytest.approx((label == prediction)[label != VOID].mean())
    assert found["class_iou"] == {"road": iou[0], "sky": iou[1], "tree": iou[2], "dragon": None}


def test_scores_at_their_ends():
    assert segmentation.scores(np.diag([5, 1, 1, 0]), NAMES)["miou"] == 1
    imagined = np.array([[0, 4], [0, 0]])
    assert segmentation.scores(imagined, NAMES[:2])["class_iou"] == {"road": 0, "sky": 0}
    assert np.isnan(segmentation.scores(np.zeros((2, 2), int), NAMES[:2])["miou"])


def test_diversity_in_closed_form():
    """Three grey samples: the mean of the pairs' differences. Of uniform noise: sqrt(1/6)."""
    grey = jnp.stack([jnp.full((1, 4, 4, 3), level, jnp.uint8) for level in (0, 51, 255)])
    np.testing.assert_allclose(synthesis.diversity(grey), [(0.2 + 1 + 0.8) / 3], rtol=1e-5)
    assert synthesis.diversity(jnp.concatenate([grey[:1], grey[:1]])) == 0
    noise = jax.random.randint(jax.random.key(0), (3, 2, 64, 64, 3), 0, 256).astype(jnp.uint8)
    np.testing.assert_allclose(synthesis.diversity(noise), [6**-0.5] * 2, rtol=0.01)


def test_diversity_is_each_masks_own():
    same, noise = jnp.zeros((2, 1, 8, 8, 3), jnp.uint8), jnp.arange(384, dtype=jnp.uint8).reshape(2, 1, 8, 8, 3)
    found = synthesis.diversity(jnp.concatenate([same, noise], axis=1))
    assert found[0] == 0 and found[1] > 0.1


CODEC = make_patch_codec(4, {})
COLOURS = make_palette("spread", 3)


def make_evaluator(data_dir, info, field, **changes) -> Evaluator:
    """An evaluator whose network is `field(params, zt, t)`."""
    settings = {"batch_size": 3, "num_samples": 2, "gallery": 2} | changes
    c = ConfigDict({"seed": 0, "sampling": {"solver": "euler", "steps": 2}, "eval": settings})
    code = make_colour_code(CODEC, COLOURS, 0.1, 0.0)
    sampler = Sampler(lambda params, zt, t, context, d: field(params, zt, t), CODEC, code)
    return Evaluator(sampler, str(data_dir), info, parallel.make_mesh(), c)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures that are their own pseudo-masks, void white, so that standing still is the right flow both ways."""
    root = tmp_path_factory.mktemp("evaluate")
    source = make_folder(root / "toys", 50, size=(8, 12))
    for path in sorted((source / "labels").iterdir()):
        label = np.array(Image.open(path))[None, ..., None]
        image = np.asarray(to_uint8(colourise(jnp.asarray(label), COLOURS)))[0]
        (source / "images" / f"{path.stem}.jpg").unlink()
        Image.fromarray(image).save(source / "images" / f"{path.stem}.png")
    return root / "data", prepare("folder", root / "data", source=source, size=(8, 12), progress=False)


def stand_still(params, zt, t):
    return jnp.zeros_like(zt)


def test_the_right_flow_gets_full_marks(data):
    evaluator = make_evaluator(*data, stand_still)
    found = evaluator.segmentation({}, evaluator.sampler.frozen, "test")
    assert found["miou"] == found["pixel_accuracy"] == found["codec_ceiling_miou"] == 1
    assert found["class_iou"] == found["ceiling"]["class_iou"] == dict.fromkeys(data[1].class_names, 1)
    again = evaluator.synthesis({}, evaluator.sampler.frozen, "test")
    assert again["resegmentation_miou"] == 1 and again["num_samples"] == 2
    # Two draws of the perturbation differ by 0.1 / sqrt(6), half of that on the 0..1 scale, less what is clipped.
    assert 0 < again["diversity"] < 0.05 / 6**0.5


def test_a_wrong_flow_is_counted_pixel_by_pixel(data):
    """Everything becomes class 0; padding of the last batch must not count."""

    def to_first_colour(params, zt, t):
        target = CODEC.encode(
            {}, jnp.broadcast_to(colourise(jnp.zeros((1, 8, 12, 1), jnp.uint8), COLOURS), (3, 8, 12, 3)), None
        )
        return (target - zt) / (1 - t)[:, None, None, None]

    evaluator = make_evaluator(*data, to_first_colour)
    found = evaluator.segmentation({}, evaluator.sampler.frozen, "test", limit=4)
    records = open_records(data[0], "test")
    share = np.mean([records[i]["label"] == 0 for i in spread_indices(len(records), 4)])
    assert found["pixel_accuracy"] == pytest.approx(share)
    assert found["miou"] == pytest.approx(share / 3)
    assert found["codec_ceiling_miou"] == 1


def test_gallery_shows_examples_from_all_over(data):
    evaluator = make_evaluator(*data, stand_still)
    gallery = evaluator.gallery({}, evaluator.sampler.frozen, "test")
    records = open_records(data[0], "test")
    for i, place in enumerate((0, len(records) // 2)):
        np.testing.assert_array_equal(gallery.image[i], records[place]["image"])
        np.testing.assert_array_equal(gallery.label[i], records[place]["label"])
    np.testing.assert_array_equal(gallery.prediction, gallery.label)
    assert gallery.samples.shape == (2, 2, 8, 12, 3)
    assert gallery.frames.shape[1:] == (2 * 2, 8, 12, 3)  # every path as pictures and as masks
    np.testing.assert_array_equal(gallery.frames[0, ::2][:2], gallery.image)
    np.testing.assert_array_equal(gallery.frames[-1, 1::2][:2], COLOURS[gallery.prediction[..., 0]])


def test_grey_levels_survive_the_way_to_floats_and_back():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).min() == -1 and to_float(levels).max() == 1
    np.testing.assert_array_equal(to_uint8(jnp.full((1, 1, 1, 3), -9.0)), 0)
    np.testing.assert_array_equal(to_uint8(jnp.full((1, 1, 1, 3), 9.0)), 255)
