import importlib.resources
import json

import numpy as np
import pytest
from dicebear import Avatar
from PIL import ImageColor

from semflow_jax.data.source import SPLITS
from semflow_jax.data.sources import avatars
from semflow_jax.errors import UserError

SIZE = 64
CLASS = {name: k for k, name in enumerate(avatars.CLASS_NAMES)}


def choices(seed):
    return Avatar(avatars._styles()[0], {"seed": str(seed)}).to_json()["options"]


def interior(mask):
    """Pixels whose eight neighbours are in the mask too: no anti-aliasing reaches them."""
    padded = np.pad(mask, 1, mode="edge")
    return np.all([padded[y : y + len(mask), x : x + len(mask)] for y in range(3) for x in range(3)], axis=0)


@pytest.fixture(scope="module")
def drawn():
    return [(choices(seed), *avatars.render(seed, SIZE)) for seed in range(40)]


def test_shapes_and_class_ids(drawn):
    for _, image, label in drawn:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert label.shape == (SIZE, SIZE) and label.dtype == np.uint8
    ids = np.unique([label for _, _, label in drawn])
    assert ids.tolist() == list(range(len(avatars.CLASS_NAMES)))


def test_same_seed_same_avatar(drawn):
    image, label = avatars.render(7, SIZE)
    np.testing.assert_array_equal(image, drawn[7][1])
    np.testing.assert_array_equal(label, drawn[7][2])
    assert not np.array_equal(image, drawn[8][1])


def test_a_class_is_there_exactly_when_its_part_was_chosen(drawn):
    for chosen, _, label in drawn:
        top = chosen.get("topVariant")
        assert (label == CLASS["hat"]).any() == (top in avatars.HATS)
        assert (label == CLASS["hair"]).any() == (top is not None and top not in avatars.HATS)
        assert (label == CLASS["eye_g"]).any() == ("accessoriesVariant" in chosen)
        assert (label == CLASS["facial_hair"]).any() == ("facialHairVariant" in chosen)


def test_no_class_ids_are_blended():
    for seed in range(10):
        fine = avatars._raster(avatars._styles()[1], seed, 128)[..., 0]
        top = choices(seed).get("topVariant")
        assert fine.max() < len(avatars.CLASS_NAMES)
        assert top in avatars.HATS or CLASS["hat"] not in fine  # hair 6 over clothes 10 would blend to 7, 8 and 9


def test_background_is_where_the_background_colour_is(drawn):
    for chosen, image, label in drawn:
        colour = np.array(ImageColor.getrgb(chosen["backgroundColor"][0]))
        same = (image == colour).all(axis=-1)
        assert same[interior(label == CLASS["background"])].mean() > 0.99  # but for lines thinner than a pixel
        if colour.min() < 255:  # teeth and eyes are white as well
            assert (label[same] == CLASS["background"]).all()


def test_skin_has_the_skin_colour_or_its_shade(drawn):
    for chosen, image, label in drawn:
        colour = np.array(ImageColor.getrgb(chosen["skinColor"][0]))
        skin = image[interior(label == CLASS["skin"])].astype(int)
        np.testing.assert_array_equal(np.median(skin, axis=0), colour)
        shaded = np.abs(skin - colour).max(axis=-1) <= 0.2 * colour.max()
        assert shaded.mean() > 0.9  # the rest is blush, and lines thinner than a pixel


def test_majority_takes_the_most_frequent_class_of_a_block():
    fine = np.array([[1, 1, 4, 5], [2, 1, 5, 5], [0, 0, 9, 3], [3, 3, 9, 10]], np.uint8)
    assert avatars._majority(fine, 2).tolist() == [[1, 5], [0, 9]]


def test_seeds_of_splits_and_runs_are_disjoint():
    seeds = [avatars.make_seed(split, seed, i) for split in SPLITS for seed in range(5) for i in range(100)]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(UserError, match="split"):
        avatars.make_seed("training", 0, 0)


def test_items_are_renders_in_order():
    source = avatars.find({"size": [32, 32], "num_train": 2, "num_val": 5, "seed": 3})
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 2, "val": 5, "test": 5}
    assert [item.name for item in source.splits["val"]] == [f"val-{i:06d}" for i in range(5)]
    image, label = avatars.render(avatars.make_seed("val", 3, 4), 32)
    picture, ids = source.read(source.splits["val"][4])
    np.testing.assert_array_equal(np.asarray(picture), image)
    np.testing.assert_array_equal(ids, label)


def test_licence_is_the_styles_own():
    source = importlib.resources.files("dicebear_styles").joinpath(f"{avatars.STYLE}.json")
    meta = json.loads(source.read_text(encoding="utf-8"))["meta"]
    assert meta["license"]["name"] in avatars.LICENSE and meta["license"]["url"] in avatars.LICENSE
    assert meta["source"]["name"] in avatars.ATTRIBUTION and meta["creator"]["name"] in avatars.ATTRIBUTION


def test_size_must_be_positive():
    with pytest.raises(UserError, match="size"):
        avatars.render(0, 0)
