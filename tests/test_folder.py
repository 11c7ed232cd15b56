"""data/sources/folder.py: what a folder may hold, what it must not, and that pixels and ids arrive unharmed."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from semflow_jax.data.examples import encode_example, fit_pair
from semflow_jax.data.images import read_label
from semflow_jax.data.info import VOID
from semflow_jax.data.source import UNKNOWN, find_flip_pairs
from semflow_jax.data.sources import folder
from semflow_jax.data.sources.folder import find_splits, load_classes
from semflow_jax.errors import UserError

SIZE = (20, 30)


def make_folder(root, num: int = 4, num_classes: int = 3, size: tuple[int, int] = SIZE):
    """Images of noise, labels of noise in range(num_classes)."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for i in range(num):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "images" / f"{i:02}.jpg")
        label = rng.integers(0, num_classes, size).astype(np.uint8)
        label[0, :num_classes] = range(num_classes)
        Image.fromarray(label).save(root / "labels" / f"{i:02}.png")
    return root


def load(root, size=SIZE):
    """The examples of each split."""
    source = folder.find({"name": "folder", "source": str(root), "seed": 0})

    def make(item):
        return encode_example(*fit_pair(*source.read(item), size, "stretch"), item.name)

    return {split: [make(item) for item in items] for split, items in source.splits.items()}


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def write_label(root, label: np.ndarray, name: str = "00"):
    Image.fromarray(label).save(root / "labels" / f"{name}.png")


def test_same_size_is_lossless_and_ids_pass(tmp_path):
    root = make_folder(tmp_path, 1)
    pixels = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
    (root / "images" / "00.jpg").unlink()
    Image.fromarray(pixels).save(root / "images" / "00.PNG")
    (root / "train.txt").write_text("00\n\n")
    (example,) = load(root)["train"]
    np.testing.assert_array_equal(decode(example["image"]), pixels)
    np.testing.assert_array_equal(decode(example["label"]), read_label(root / "labels" / "00.png"))
    assert example["id"] == "00"


def test_image_and_label_are_resized_alike(tmp_path):
    """A label painted like its image stays so, away from the borders."""
    root = make_folder(tmp_path, 1)
    label = np.zeros((64, 96), np.uint8)
    label[16:40, 24:72] = 9
    label[40:, 48:] = 25
    write_label(root, label)
    Image.fromarray(np.repeat(label[..., None] * 10, 3, -1)).save(root / "images" / "00.png")
    (root / "images" / "00.jpg").unlink()
    (root / "val.txt").write_text("00")
    (example,) = load(root, (16, 48))["val"]
    image, label = decode(example["image"]), decode(example["label"])
    assert image.shape == (16, 48, 3) and label.shape == (16, 48)
    inner = np.ones((16, 48), bool)
    for axis in (0, 1):
        for shift in (-2, -1, 1, 2):
            inner &= label == np.roll(label, shift, axis)
    assert inner.mean() > 0.4
    np.testing.assert_allclose(image[..., 0][inner], label[inner] * 10.0, atol=12)
    assert set(np.unique(label)) == {0, 9, 25}  # nearest: no ids between ids


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (np.zeros((20, 30), np.uint16), "I;16"),
        (np.zeros((20, 30, 3), np.uint8), "RGB"),
        (np.zeros((20, 30, 4), np.uint8), "RGBA"),
    ],
)
def test_labels_of_other_kinds_are_refused(tmp_path, label, mode):
    root = make_folder(tmp_path)
    write_label(root, label)
    with pytest.raises(UserError, match=f"00.png: must be an 8-bit grey or palette PNG.*mode {mode}"):
        load(root)


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"<html>"])
def test_damaged_files_are_named(tmp_path, kind, damage):
    root = make_folder(tmp_path)
    path = next((root / kind).glob("02.*"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{kind}/02.*: must be a whole image file"):
        load(root)


def test_partners_must_exist(tmp_path):
    root = make_folder(tmp_path, 9)
    for i in range(7):
        (root / "labels" / f"0{i}.png").unlink()
    with pytest.raises(UserError, match="labels: must have a file for every name.* 00, 01, 02, 03, 04 and 2 more"):
        load(root)
    with pytest.raises(UserError, match="images: must be a folder"):
        load(tmp_path / "nowhere")


def test_a_label_without_image_is_reported(tmp_path):
    root = make_folder(tmp_path)
    (root / "images" / "03.jpg").unlink()
    with pytest.raises(UserError, match="images: must have a file for every name, found no image for 03"):
        load(root)


def test_two_images_of_one_name_are_refused(tmp_path):
    root = make_folder(tmp_path)
    Image.new("RGB", (30, 20)).save(root / "images" / "03.png")
    with pytest.raises(UserError, match="names must differ"):
        load(root)


def test_lists_decide_and_are_checked(tmp_path):
    root = make_folder(tmp_path, 5)
    (root / "images" / "04.jpg").unlink()  # on no list, so no matter
    (root / "train.txt").write_text("03\n00\n")
    (root / "test.txt").write_text("02\n")
    splits = load(root)
    assert {split: [e["id"] for e in examples] for split, examples in splits.items()} == {
        "train": ["03", "00"],
        "test": ["02"],
    }
    (root / "val.txt").write_text("00\n")
    with pytest.raises(UserError, match="val.txt: must list a name once, found '00' in train.txt"):
        load(root)
    (root / "val.txt").write_text("\n")
    with pytest.raises(UserError, match="val.txt: must name at least one"):
        load(root)
    (root / "val.txt").write_text("99\n")
    with pytest.raises(UserError, match="for 99.*take the names off the lists"):
        load(root)


def test_split_by_hash_is_a_partition_that_depends_on_the_seed(tmp_path):
    root = tmp_path
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        (root / kind / "nested").mkdir(parents=True)
        for i in range(50):
            (root / kind / "nested" / f"{i}.{suffix}").touch()
    (root / "images" / ".hidden.jpg").touch()
    splits = {split: {pair.name for pair in pairs} for split, pairs in find_splits(root, 0).items()}
    assert {split: len(names) for split, names in splits.items()} == {"train": 40, "val": 5, "test": 5}
    assert set.union(*splits.values()) == {f"nested/{i}" for i in range(50)}
    assert find_splits(root, 0) == find_splits(root, 0)
    assert {pair.name for pair in find_splits(root, 1)["val"]} != splits["val"]


def test_too_few_to_split(tmp_path):
    with pytest.raises(UserError, match="at least 3 images"):
        load(make_folder(tmp_path, 2))


def test_classes_as_a_list(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(["void", "sky", "road"]))
    classes = load_classes(path)
    assert classes.names == ("sky", "road")
    assert classes.ids[:4] == (VOID, 0, 1, UNKNOWN) and classes.ids[VOID] == VOID


def test_classes_with_ids_and_ignore(tmp_path):
    path = tmp_path / "classes.json"
    entries = [{"id": 7, "name": "road"}, {"id": 3, "name": "sky"}, {"id": 9, "name": "other"}]
    path.write_text(json.dumps({"classes": entries, "ignore_index": 9}))
    classes = load_classes(path)
    assert classes.names == ("sky", "road")
    assert {i: c for i, c in enumerate(classes.ids) if c != UNKNOWN} == {3: 0, 7: 1, 9: VOID, 255: VOID}


def test_classes_merged(tmp_path):
    path = tmp_path / "classes.json"
    entries = [{"id": i, "name": name} for i, name in enumerate(["cat", "dog", "oak", "mist"])]
    merged = {"classes": entries, "merged_names": ["animal", "void", "plant"], "merged_map": [0, 0, 2, 1]}
    path.write_text(json.dumps(merged))
    classes = load_classes(path)
    assert classes.names == ("animal", "plant") and classes.ids[:4] == (0, 0, 1, VOID)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a list of names"),
        ('{"names": []}', "must be a list of names"),
        ('{"classes": ["sky"]}', "must be a list of names"),
        ('["sky", "sky"]', "found one twice"),
        ('{"classes": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "found one twice"),
        ('{"classes": [{"id": 300, "name": "a"}]}', "ids must be in"),
        ('{"classes": [{"id": 255, "name": "a"}]}', "ids must be in"),
        ('{"classes": [{"id": 0, "name": "a"}], "merged_names": ["x"], "merged_map": []}', "must be a list of names"),
    ],
)
def test_bad_class_lists(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_classes(tmp_path / "classes.json")


def test_ids_outside_the_list_are_named(tmp_path):
    root = make_folder(tmp_path)
    (root / "classes.json").write_text(json.dumps(["sky", "road", "tree"]))
    label = np.array(read_label(root / "labels" / "02.png"))
    label[3, 3] = VOID
    write_label(root, label, "02")
    load(root)  # void needs no entry
    label[3, 4] = 17
    write_label(root, label, "02")
    with pytest.raises(UserError, match=r'02.png: ids must be in classes.json, found 17; .*"name": "void"'):
        load(root)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("skin", "l_eye", "r_eye", "nose"), ((1, 2),)),
        (("Right-arm", "hair", "Left-arm"), ((2, 0),)),
        (("eye_left", "eye_right", "left x", "right x"), ((0, 1), (2, 3))),
        (("left", "upper_left", "l", "leye", "reye"), ()),
    ],
)
def test_flip_pairs(names, pairs):
    assert find_flip_pairs(names) == pairs


def test_real_camvid_and_ccp(shared_dir):
    data = shared_dir / "data"
    splits = find_splits(data / "camvid")
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 367, "val": 101, "test": 233}
    classes = load_classes(data / "camvid" / "classes.json")
    assert len(classes.names) == 11 and classes.ids[11] == VOID
    source = folder.find({"name": "camvid", "source": str(data / "camvid"), "seed": 0})
    ids = np.concatenate([source.read(item)[1].ravel() for item in splits["val"][:8]])
    assert source.name == "camvid" and set(np.unique(ids)) <= {*range(11), VOID} and VOID in ids
    classes = load_classes(data / "ccp_fashion" / "classes.json")
    assert len(classes.names) == 17 and classes.ids[25] == classes.names.index("pants")
    assert VOID not in classes.ids[:59]
