"""data/sources/ade20k.py: 0 to void and 1..150 to 0..149, names from a file or by heart, and what must not pass."""

import pickle

import numpy as np
import pytest
from PIL import Image
from raw_trees import make_ade20k

from semflow_jax.data import prepare
from semflow_jax.data.images import ORIENTATION
from semflow_jax.data.info import VOID
from semflow_jax.data.records import count_records, load_info, open_records
from semflow_jax.data.sources import ade20k
from semflow_jax.errors import UserError

FIRST = "ADE_train_00000001"


def find(root):
    return ade20k.find({"name": "ade20k", "source": str(root), "seed": 0})


def naive(path) -> np.ndarray:
    """Class ids, pixel by pixel."""
    with Image.open(path) as image:
        ids = [VOID if i == 0 else i - 1 for i in image.tobytes()]
        return np.array(ids, np.uint8).reshape(image.height, image.width)


def test_facts(tmp_path):
    root = make_ade20k(tmp_path, 2)
    (root / "objectInfo150.txt").unlink()
    source = find(root)
    assert source.class_names is not None and len(set(source.class_names)) == len(source.colours) == 150
    numbers = {
        1: "wall",
        13: "person",
        21: "car",
        46: "counter",
        101: "poster",
        131: "screen",
        143: "plate",
        150: "flag",
    }
    assert {i: source.class_names[i - 1] for i in numbers} == numbers
    looks = dict(zip(source.class_names, source.colours, strict=True))
    assert looks["wall"] == (120, 120, 120) and looks["sky"] == (6, 230, 230) and looks["flag"] == (92, 0, 255)
    assert looks["person"] == (150, 5, 61) and looks["television"] == (0, 255, 194)
    assert "non-commercial" in source.license and source.flip_pairs == ()


def test_splits_and_names(tmp_path):
    splits = find(make_ade20k(tmp_path, 3)).splits
    assert {split: [item.name for item in items] for split, items in splits.items()} == {
        "train": [f"ADE_train_0000000{i}" for i in (1, 2, 3)],
        "val": ["ADE_val_00000001", "ADE_val_00000002"],
    }


def test_ids_pixel_by_pixel(tmp_path):
    source = pickle.loads(pickle.dumps(find(make_ade20k(tmp_path, 5))))  # as worker processes get it
    seen = set()
    for items in source.splits.values():
        for item in items:
            image, label = source.read(item)
            np.testing.assert_array_equal(label, naive(item.labels[0]))
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(item.image).convert("RGB")))
            seen |= set(np.unique(label).tolist())
    assert seen == {*range(150), VOID}


def test_names_of_the_file(tmp_path):
    """The first of the synonyms, or the next where another class has it."""
    class_names = find(make_ade20k(tmp_path, 2)).class_names
    assert class_names is not None and class_names[:3] == ("wall", "edifice", "thing 3")
    assert (class_names[7], class_names[20], class_names[149]) == ("bed", "car", "flag")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("21\t", "22\t"), r"found line '22\\t"),
        (lambda text: text.replace("\t", " "), "not enough values"),
        (lambda text: text.replace("edifice, flag", "edifice"), r"found line '150\\t.*edifice'"),
        (lambda text: text.replace("wall", " , "), r"found line '1\\t"),
        (lambda text: text + "151\t0\t0\t0\textra\n", "found 151 of them"),
        (lambda text: "", "found 0 of them"),
    ],
)
def test_bad_lists_of_names(tmp_path, change, message):
    path = make_ade20k(tmp_path, 2) / "objectInfo150.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=f"objectInfo150.txt: must list the classes 1 to 150, .*{message}.*; download"):
        find(tmp_path)


@pytest.mark.parametrize("number", [151, 255])
def test_ids_that_are_none(tmp_path, number):
    path = make_ade20k(tmp_path, 2) / "annotations" / "training" / f"{FIRST}.png"
    ids = np.array(Image.open(path))
    ids[5, 7] = number
    Image.fromarray(ids).save(path)
    source = find(tmp_path)
    with pytest.raises(UserError, match=f"{FIRST}.png: ids must be 0 to 150, found {number}; download"):
        source.read(source.splits["train"][0])


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("annotations", lambda path: path.unlink(), "png: must be a whole image file, found .*No such file"),
        ("images", lambda path: path.unlink(), "jpg: must be a whole image file, found .*No such file"),
        ("images", lambda path: path.write_bytes(path.read_bytes()[:700]), "jpg: must be a whole image file"),
        ("annotations", lambda path: Image.new("RGB", (64, 32)).save(path), "png: .*found PNG of mode RGB"),
        (
            "annotations",
            lambda path: Image.new("L", (32, 64)).save(path),
            "jpg: must have the size of its label.*32x64 and 64x32",
        ),
    ],
)
def test_bad_files(tmp_path, kind, damage, message):
    root = make_ade20k(tmp_path, 2)
    damage(next((root / kind / "training").glob(f"{FIRST}.*")))
    source = find(root)
    with pytest.raises(UserError, match=f"{FIRST}.{message}"):
        source.read(source.splits["train"][0])


def test_turned_photos(tmp_path):
    """Stored on its side, the label upright: it is turned. Upside down, the label can't tell: it is refused."""
    root = make_ade20k(tmp_path, 2)
    source = find(root)
    item = source.splits["train"][0]
    upright, label = source.read(item)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # shown a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(item.image, exif=exif, quality=95)
    image, label_again = source.read(item)
    np.testing.assert_array_equal(label_again, label)
    assert image.size == upright.size and np.abs(np.asarray(image, int) - np.asarray(upright)).mean() < 10
    exif[ORIENTATION] = 3
    upright.save(item.image, exif=exif)
    with pytest.raises(UserError, match="must be stored upright"):
        source.read(item)


def test_wrong_trees(tmp_path):
    root = make_ade20k(tmp_path, 2)
    (root / "annotations" / "validation").rename(root / "annotations" / "val")
    with pytest.raises(UserError, match=r"annotations/validation: must be a folder of \*.png, found none"):
        find(root)


def test_prepared(tmp_path):
    root = make_ade20k(tmp_path / "raw", 10)
    (root / "annotations" / "training" / "ADE_train_00000004.png").unlink()
    options = {"source": root, "size": (32, 64), "max_skipped": 0.1, "progress": False}
    info = prepare.prepare("ade20k", tmp_path / "out", **options)
    assert info == load_info(tmp_path / "out") and info.skipped == 1
    assert (info.name, info.num_classes, len(info.colours)) == ("ade20k", 150, 150)
    assert count_records(tmp_path / "out") == {"train": 9, "val": 5}
    exact = 0
    for split, folder in (("train", "training"), ("val", "validation")):
        for example in open_records(tmp_path / "out", split):
            label = naive(root / "annotations" / folder / f"{example['id']}.png")
            if label.shape == (32, 64):
                np.testing.assert_array_equal(example["label"][..., 0], label)
                exact += 1
            assert set(np.unique(example["label"])) == set(np.unique(label))
    assert exact == 5


def test_default_size(tmp_path):
    root = make_ade20k(tmp_path / "raw", 2)
    info = prepare.prepare("ade20k", tmp_path / "out", source=root, num_train=1, progress=False)
    assert info.size == (512, 512)
    assert open_records(tmp_path / "out", "train")[0]["label"].shape == (512, 512, 1)
