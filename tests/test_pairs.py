"""data/pairs.py: photos and labels find each other by name, and who is alone is not forgotten."""

import pytest

from semflow_jax.data.pairs import pair_files
from semflow_jax.errors import UserError


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def find(root):
    dirs = {split: (root / "photos" / split, root / "labels" / split) for split in ("train", "val")}
    return pair_files(dirs, "_photo.jpg", ".png")


def test_names_and_files(tmp_path):
    make_files(tmp_path, "photos/train/b/2_photo.jpg", "photos/train/1_photo.jpg", "photos/val/3_photo.jpg")
    make_files(tmp_path, "labels/train/b/2.png", "labels/train/1.png", "labels/val/3.png")
    make_files(
        tmp_path, "photos/train/4.jpg", "photos/train/._1_photo.jpg", "labels/train/1.json", "photos/9_photo.jpg"
    )
    splits = find(tmp_path)
    assert {split: [item.name for item in items] for split, items in splits.items()} == {
        "train": ["1", "b/2"],
        "val": ["3"],
    }
    item = splits["train"][1]
    assert item.image == tmp_path / "photos/train/b/2_photo.jpg" and item.labels == (tmp_path / "labels/train/b/2.png",)


def test_a_file_without_partner_is_an_item(tmp_path):
    make_files(tmp_path, "photos/train/1_photo.jpg", "photos/train/2_photo.jpg", "photos/val/4_photo.jpg")
    make_files(tmp_path, "labels/train/2.png", "labels/train/3.png", "labels/val/4.png")
    assert [item.name for item in find(tmp_path)["train"]] == ["1", "2", "3"]


def test_wrong_trees(tmp_path):
    make_files(tmp_path, "photos/train/1_photo.jpg", "labels/train/1.png", "photos/val/1_photo.jpg")
    with pytest.raises(UserError, match=r"labels/val: must be a folder of \*.png, found none"):
        find(tmp_path)
    make_files(tmp_path, "labels/val/1.json")
    with pytest.raises(UserError, match=r"labels/val: must have files \*.png, found none; download"):
        find(tmp_path)
    make_files(tmp_path, "labels/val/1.png")
    with pytest.raises(UserError, match="photos/val: an image must be in one split, found 1 in another too; remove"):
        find(tmp_path)
