"""data/sources/cityscapes.py: the downloads as they are, 34 ids to 19 classes, and what must not pass."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from raw_trees import make_cityscapes

from semflow_jax.data import prepare
from semflow_jax.data.info import VOID
from semflow_jax.data.records import count_records, load_info, open_records
from semflow_jax.data.sources import cityscapes
from semflow_jax.errors import UserError

CLASS_BY_ID = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
CLASS_BY_ID |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
STEM = "aachen_000000_000019"


def find(root):
    return cityscapes.find({"name": "cityscapes", "source": str(root), "seed": 0})


def naive(path) -> np.ndarray:
    """Class ids, pixel by pixel."""
    with Image.open(path) as image:
        return np.array([CLASS_BY_ID.get(i, VOID) for i in image.tobytes()], np.uint8).reshape(
            image.height, image.width
        )


def label_path(root, stem=STEM, split="train", ending="labelIds"):
    return root / "gtFine" / split / stem.split("_")[0] / f"{stem}_gtFine_{ending}.png"


def to_train_ids(root):
    """As csCreateTrainIdLabelImgs writes them, in train and val."""
    for split in ("train", "val"):
        for path in (root / "gtFine" / split).rglob("*labelIds.png"):
            Image.fromarray(naive(path)).save(path.with_name(path.name.replace("labelIds", "labelTrainIds")))


def test_facts(tmp_path):
    source = find(make_cityscapes(tmp_path, 4))
    assert source.class_names is not None and len(source.class_names) == len(source.colours) == 19
    looks = dict(zip(source.class_names, source.colours, strict=True))
    assert looks["road"] == (128, 64, 128) and looks["train"] == (0, 80, 100) and looks["bicycle"] == (119, 11, 32)
    assert (source.class_names[0], source.class_names[10], source.class_names[18]) == ("road", "sky", "bicycle")
    assert "non-commercial" in source.license and source.flip_pairs == ()


def test_splits_and_names(tmp_path):
    splits = find(make_cityscapes(tmp_path, 4)).splits
    assert {split: [item.name for item in items] for split, items in splits.items()} == {
        "train": [f"{c}/{c}_{i:06}_000019" for c, i in (("aachen", 0), ("aachen", 2), ("hamburg", 1), ("hamburg", 3))],
        "val": ["frankfurt/frankfurt_000000_000019", "munster/munster_000001_000019"],
    }


def test_ids_pixel_by_pixel(tmp_path):
    source = pickle.loads(pickle.dumps(find(make_cityscapes(tmp_path, 4))))  # as worker processes get it
    seen = set()
    for items in source.splits.values():
        for item in items:
            image, label = source.read(item)
            np.testing.assert_array_equal(label, naive(item.labels[0]))
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(item.image)))
            seen |= set(np.unique(label).tolist())
    assert seen == {*range(19), VOID}


def test_train_ids_are_read_where_there_is_nothing_else(tmp_path):
    root = make_cityscapes(tmp_path, 4)
    to_train_ids(root)
    source = find(root)
    assert all(item.labels[0].name.endswith("labelIds.png") for item in source.splits["val"])
    expected = [source.read(item)[1] for item in source.splits["train"]]
    for split in ("train", "val"):  # test keeps its dummies
        for path in (root / "gtFine" / split).rglob("*labelIds.png"):
            path.unlink()
    source = find(root)
    assert [item.labels[0].name for item in source.splits["train"]][0] == f"{STEM}_gtFine_labelTrainIds.png"
    for item, label in zip(source.splits["train"], expected, strict=True):
        np.testing.assert_array_equal(source.read(item)[1], label)


@pytest.mark.parametrize(
    ("ending", "number", "message"),
    [
        ("labelIds", 34, "ids must be 0 to 33, found 34; download"),
        ("labelIds", 255, "ids must be 0 to 33, found 255; download"),  # train ids under another name
        ("labelTrainIds", 19, "ids must be 0 to 18, or 255 for void, found 19; make it again"),
        ("labelTrainIds", 254, "ids must be .*found 254"),
    ],
)
def test_ids_that_are_none(tmp_path, ending, number, message):
    root = make_cityscapes(tmp_path, 2)
    if ending == "labelTrainIds":
        to_train_ids(root)
        for path in (root / "gtFine").rglob("*labelIds.png"):
            path.unlink()
    path = label_path(root, ending=ending)
    ids = np.array(Image.open(path))
    ids[5, 7] = number
    Image.fromarray(ids).save(path)
    source = find(root)
    with pytest.raises(UserError, match=f"{path.name}: {message}"):
        source.read(source.splits["train"][0])
    source.read(source.splits["train"][1])


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("label", lambda path: path.unlink(), "gtFine_labelIds.png: must be a whole image file, found .*No such file"),
        ("image", lambda path: path.unlink(), "leftImg8bit.png: must be a whole image file, found .*No such file"),
        ("label", lambda path: path.write_bytes(path.read_bytes()[:60]), "labelIds.png: must be a whole image file"),
        ("image", lambda path: path.write_bytes(path.read_bytes()[:900]), "8bit.png: must be a whole image file"),
        ("label", lambda path: Image.new("RGBA", (64, 32)).save(path), "labelIds.png: .*found PNG of mode RGBA"),
        ("label", lambda path: Image.new("L", (32, 16), 7).save(path), "must have the size of its label.*16x32"),
    ],
)
def test_bad_files(tmp_path, kind, damage, message):
    root = make_cityscapes(tmp_path, 2)
    damage(label_path(root) if kind == "label" else root / f"leftImg8bit/train/aachen/{STEM}_leftImg8bit.png")
    source = find(root)
    with pytest.raises(UserError, match=message):
        source.read(source.splits["train"][0])


def test_wrong_trees(tmp_path):
    with pytest.raises(UserError, match=r"leftImg8bit/train: must be a folder of \*_leftImg8bit.png, found none"):
        find(tmp_path)
    root = make_cityscapes(tmp_path, 2)
    for path in (root / "gtFine" / "train").rglob("*labelIds.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"gtFine/train: must have files \*_gtFine_labelIds.png, found none"):
        find(root)


def test_prepared(tmp_path):
    root = make_cityscapes(tmp_path / "raw", 8)
    label_path(root, "munster_000003_000019", "val").unlink()
    options = {"source": root, "size": (32, 64), "max_skipped": 0.1, "progress": False}
    info = prepare.prepare("cityscapes", tmp_path / "out", **options)
    assert info == load_info(tmp_path / "out") and info.skipped == 1
    assert (info.name, info.num_classes, info.colours[13]) == ("cityscapes", 19, (0, 0, 142))
    assert count_records(tmp_path / "out") == {"train": 8, "val": 3}
    skipped = json.loads((tmp_path / "out" / prepare.SKIPPED).read_text())
    assert list(skipped) == ["munster/munster_000003_000019"]
    for split in ("train", "val"):
        for example in open_records(tmp_path / "out", split):
            stem = example["id"].split("/")[1]
            np.testing.assert_array_equal(example["label"][..., 0], naive(label_path(root, stem, split)))


def test_default_size(tmp_path):
    root = make_cityscapes(tmp_path / "raw", 2)
    info = prepare.prepare("cityscapes", tmp_path / "out", source=root, num_train=1, progress=False)
    assert info.size == (512, 1024)
    assert open_records(tmp_path / "out", "train")[0]["label"].shape == (512, 1024, 1)
