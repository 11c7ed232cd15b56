"""data/transforms.py: what changes and what does not; labels keep to the ids that were there."""

import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from semflow_jax.data.info import VOID
from semflow_jax.data.transforms import ColourJitter, RandomFlip, RandomResizedCrop, colour_matrix, crop_centre, resize

SIZE = (48, 64)
FLIP = RandomFlip(1.0, ((1, 2),))
TRANSFORMS = [
    FLIP,
    RandomResizedCrop(SIZE, (0.2, 1.0)),
    RandomResizedCrop(SIZE, (0.2, 1.0), ratio=2.0),
    RandomResizedCrop((20, 30), (0.2, 1.0)),
    ColourJitter(0.5),
]


def make_example(seed: int = 0, size=SIZE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.choice(np.array([0, 1, 2, 7, VOID], np.uint8), (*size, 1))
    return {"image": rng.integers(0, 256, (*size, 3), np.uint8), "label": label}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_ids_are_those_that_were_there(transform):
    example = make_example()
    for seed in range(20):
        out = transform.random_map(example, np.random.default_rng(seed))
        assert out["image"].dtype == out["label"].dtype == np.uint8
        assert out["image"].shape[:2] == out["label"].shape[:2] and out["label"].shape[2] == 1
        assert set(np.unique(out["label"])) == {0, 1, 2, 7, VOID}
    assert_equal(example, make_example())  # the original is left alone


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_generator_decides_also_after_pickling(transform):
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    first, second = (x.random_map(make_example(), np.random.default_rng(4)) for x in (transform, copy))
    assert_equal(first, second)
    # A read-only array, as records have them, and a view that is not contiguous will do.
    views = {name: x[:, ::-1].copy()[:, ::-1] for name, x in make_example().items()}
    for x in views.values():
        x.flags.writeable = False
    assert_equal(transform.random_map(views, np.random.default_rng(4)), first)


def test_flip_mirrors_and_swaps_sides():
    example = make_example()
    flipped = FLIP.random_map(example, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped["image"], example["image"][:, ::-1])
    swapped = np.array([0, 2, 1, *range(3, 256)], np.uint8)[example["label"]]
    np.testing.assert_array_equal(flipped["label"], swapped[:, ::-1])
    unpaired = RandomFlip(1.0).random_map(example, np.random.default_rng(0))
    np.testing.assert_array_equal(unpaired["label"], example["label"][:, ::-1])
    assert_equal(FLIP.random_map(flipped, np.random.default_rng(0)), example)
    assert_equal(RandomFlip(0.0).random_map(example, np.random.default_rng(0)), example)


def test_crop_moves_image_and_label_together():
    label = np.zeros(SIZE, np.uint8)
    label[10:30, 20:50], label[25:, :15] = 90, 200
    example = {"image": np.repeat(label[..., None], 3, -1), "label": label[..., None]}
    crop = RandomResizedCrop(SIZE, (0.2, 1.0), ratio=1.5)
    seen = set()
    for seed in range(30):
        out = crop.random_map(example, np.random.default_rng(seed))
        image, cropped = out["image"], out["label"][..., 0]
        assert image.shape == (*SIZE, 3) and set(np.unique(cropped)) <= {0, 90, 200}
        inner = np.ones(cropped.shape, bool)
        for shift in itertools.product(range(-3, 4), repeat=2):
            inner &= cropped == np.roll(cropped, shift, (0, 1))
        assert inner.mean() > 0.2
        np.testing.assert_array_equal(image[..., 0][inner], cropped[inner])
        seen.add(cropped.tobytes())
    assert len(seen) > 20


def crop_ramp(crop: RandomResizedCrop, seed: int, size=(100, 200)) -> tuple[int, int, int, int]:
    """Top, left, height and width of the window, as ramps tell them."""
    ramp = np.stack(np.meshgrid(np.arange(size[1]), np.arange(size[0])), axis=-1).astype(np.uint8)
    example = {"image": np.dstack([ramp, ramp[..., :1]]), "label": ramp[..., :1]}
    out = crop.random_map(example, np.random.default_rng(seed))["image"].astype(int)
    x, y = out[..., 0], out[..., 1]
    return y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1


def test_crop_share_of_the_area():
    crop = RandomResizedCrop((100, 200), (0.25, 0.25))
    windows = np.array([crop_ramp(crop, seed) for seed in range(40)])
    assert (abs(windows[:, 2:] - (50, 100)) <= 1).all()
    assert windows[:, 0].min() < 8 and windows[:, 0].max() > 42  # from top to bottom
    assert windows[:, 1].min() < 15 and windows[:, 1].max() > 85
    whole = RandomResizedCrop(SIZE, (1.0, 1.0)).random_map(make_example(), np.random.default_rng(0))
    assert_equal(whole, make_example())


def test_crop_ratio_keeps_the_area_and_fits_in():
    crop = RandomResizedCrop((100, 200), (0.2, 1.0), ratio=3.0)
    windows = np.array([crop_ramp(crop, seed) for seed in range(100)])
    assert (windows[:, 2:] <= (100, 200)).all()
    stretches = windows[:, 3] / windows[:, 2] / 2
    assert 0.32 < stretches.min() < 0.6 and 1.7 < stretches.max() < 3.1
    assert 0.19 < (windows[:, 2] * windows[:, 3] / 20000).min() < 0.3


@pytest.mark.parametrize("size", [(50, 50), (100, 40), (30, 100)])
def test_windows_of_larger_records_have_the_shape_that_is_asked_for(size):
    for seed in range(20):
        top, left, height, width = crop_ramp(RandomResizedCrop(size, (1.0, 1.0)), seed)
        largest = min(100 / size[0], 200 / size[1])
        assert abs(height - largest * size[0]) <= 1 + largest and abs(width - largest * size[1]) <= 1 + largest
    example = make_example(0, (100, 200))
    assert crop_centre(example, size)["image"].shape == (*size, 3)
    assert_equal(crop_centre(example, (100, 200)), example)
    middle = crop_centre(example, (100, 40))
    assert_equal(middle, {name: x[:, 80:120] for name, x in example.items()})


def test_enlarging_is_pillows_bilinear():
    image = make_example()["image"]
    window = (10, 5, 50, 35)  # left, top, right, bottom
    found = resize(image[5:35, 10:50], SIZE).astype(int)
    pillow = Image.fromarray(image).crop(window).resize(SIZE[::-1], Image.Resampling.BILINEAR)
    assert abs(found - np.asarray(pillow)).max() <= 1


def test_jitter_changes_images_alone():
    example = make_example()
    images = set()
    for seed in range(10):
        out = ColourJitter(0.4).random_map(example, np.random.default_rng(seed))
        assert out["label"] is example["label"]
        images.add(out["image"].tobytes())
    assert len(images) == 10
    assert_equal(ColourJitter(0.0).random_map(example, np.random.default_rng(0)), example)


def test_jitter_is_of_the_strength_asked_for():
    """Greys stay grey; brightness and contrast scale them about black and about the image's mean."""
    greys = np.repeat(np.arange(60, 140, dtype=np.uint8)[:, None, None], 3, -1).repeat(4, 1)
    example = {"image": greys, "label": np.zeros((80, 4, 1), np.uint8)}
    means, slopes = [], []
    for seed in range(200):
        out = ColourJitter(0.2).random_map(example, np.random.default_rng(seed))["image"].astype(int)
        assert np.ptp(out, axis=-1).max() <= 1
        means.append(out.mean() / greys.mean())
        slopes.append((out[-1].mean() - out[0].mean()) / 79 / means[-1])
    for found in (means, slopes):
        assert 0.79 < min(found) < 0.83 and 1.17 < max(found) < 1.21 and abs(np.mean(found) - 1) < 0.03


def test_jitter_of_colours_keeps_the_brightness_in_a_narrow_band_of_hues():
    colour = np.array([180.0, 90.0, 40.0])
    grey = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(colour_matrix(1.0, 0.0), np.eye(3), atol=1e-12)
    for saturation, turn in itertools.product((0.0, 0.5, 1.5), (-0.2, 0.0, 0.2)):
        found = colour_matrix(saturation, turn) @ colour
        np.testing.assert_allclose(found @ grey, colour @ grey)
    np.testing.assert_allclose(colour_matrix(0.0, 0.1) @ colour, np.full(3, colour @ grey))
    np.testing.assert_allclose(colour_matrix(1.5, 0.2) @ np.ones(3), np.ones(3))
