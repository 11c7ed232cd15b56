"""data/sources/coco_stuff.py: both layouts, every id of either, and what is refused."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from raw_trees import COCO_NO_THINGS, COCO_SIZE, make_coco_panoptic, make_coco_stuff

from semflow_jax.data import prepare
from semflow_jax.data.info import VOID
from semflow_jax.data.records import count_records, open_records
from semflow_jax.data.sources import coco_stuff
from semflow_jax.errors import UserError


def find(root):
    return coco_stuff.find({"name": "coco_stuff", "source": str(root), "size": [*COCO_SIZE], "seed": 0})


def read_maps(path) -> np.ndarray:
    """Class ids of a pixel map: how many used ids are below, pixel by pixel."""
    with Image.open(path) as image:
        rows = np.asarray(image).tolist()
    below = [sum(i not in COCO_NO_THINGS for i in range(1, value + 1)) for value in range(182)]
    return np.array([[VOID if value == 255 else below[value] for value in row] for row in rows])


def read_panoptic(path, content) -> np.ndarray:
    """Class ids of a panoptic PNG by the names of its categories, pixel by pixel."""
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    (entry,) = (entry for entry in content["annotations"] if entry["file_name"] == path.name)
    ids = {s["id"]: coco_stuff.PANOPTIC_NAMES.index(names[s["category_id"]]) for s in entry["segments_info"]}
    with Image.open(path) as image:
        rows = np.asarray(image).tolist()
    return np.array([[({0: VOID} | ids)[r + 256 * g + 256**2 * b] for r, g, b in row] for row in rows])


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_names_and_ids():
    """As labels.txt of COCO-Stuff has them, and mmsegmentation's table of 164k counts them (id less 1: class)."""
    names = coco_stuff.CLASS_NAMES
    assert len(names) == len(set(names)) == len(coco_stuff.COLOURS) == 171
    assert [names[i] for i in (0, 11, 79, 80, 170)] == ["person", "stop sign", "toothbrush", "banner", "wood"]
    classes = {i - 1: c for c, i in enumerate(coco_stuff.STUFF_IDS)}
    known = {10: 10, 12: 11, 26: 24, 30: 26, 45: 40, 66: 60, 69: 61, 71: 62, 83: 73, 91: 80, 181: 170}
    assert {i: classes[i] for i in known} == known
    removed = "street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush"
    assert ", ".join(coco_stuff.LABELS[i - 1] for i in COCO_NO_THINGS) == removed


def test_panoptic_names_and_ids():
    names = coco_stuff.PANOPTIC_NAMES
    assert len(names) == len(set(names)) == len(set(coco_stuff.PANOPTIC_COLOURS)) == 133
    facts = dict(zip(names, zip(coco_stuff.PANOPTIC_IDS, coco_stuff.PANOPTIC_COLOURS, strict=True), strict=True))
    assert facts["person"] == (1, (220, 20, 60)) and facts["road"] == (149, (128, 64, 128))
    assert facts["tree-merged"] == (184, (107, 142, 35)) and facts["rug-merged"] == (200, (250, 141, 255))


@pytest.mark.parametrize(
    ("maps", "images"),
    [("annotations", "images"), ("stuffthingmaps", ""), ("stuffthingmaps_trainval2017", "images")],
)
def test_maps_pixel_by_pixel(tmp_path, maps, images):
    root = make_coco_stuff(tmp_path, 6, maps, images)
    source = find(root)
    assert source.name == "coco_stuff" and source.class_names == coco_stuff.CLASS_NAMES
    assert {split: [item.name for item in items] for split, items in source.splits.items()} == {
        "train": [f"train2017/{9 + 1000 * i:012}" for i in range(6)],
        "val": ["val2017/000000000139", "val2017/000000001139"],
    }
    read = pickle.loads(pickle.dumps(source.read))
    seen = set()
    for item in source.splits["train"] + source.splits["val"]:
        image, label = read(item)
        assert item.image.parent == root / images / item.name.split("/")[0]
        with Image.open(item.image) as photo:
            np.testing.assert_array_equal(image, photo)
        np.testing.assert_array_equal(label, read_maps(root / maps / f"{item.name}.png"))
        seen |= set(np.unique(label))
    assert seen == {*range(171), VOID}


@pytest.mark.parametrize("pngs", ["annotations", ""])
def test_segments_pixel_by_pixel(tmp_path, pngs):
    root = make_coco_panoptic(tmp_path, 8, pngs)
    source = find(root)
    assert source.name == "coco_panoptic" and source.class_names == coco_stuff.PANOPTIC_NAMES
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 8, "val": 2}
    read = pickle.loads(pickle.dumps(source.read))
    seen = set()
    for items in source.splits.values():
        for item in items:
            folder, name = item.name.split("/")
            content = json.loads((root / "annotations" / f"panoptic_{folder}.json").read_text())
            truth = read_panoptic(root / pngs / f"panoptic_{folder}" / f"{name}.png", content)
            np.testing.assert_array_equal(read(item)[1], truth)
            assert len(item.detail) == len(np.unique(truth[truth != VOID]))
            seen |= set(np.unique(truth))
    assert seen == {*range(133), VOID}


def test_an_image_may_be_void_alone(tmp_path):
    """Panoptic annotations without any segment exist."""
    root = make_coco_panoptic(tmp_path, 3)
    edit(root / "annotations/panoptic_val2017.json", lambda c: c["annotations"][0].update(segments_info=[]))
    (item,) = find(root).splits["val"]
    Image.new("RGB", COCO_SIZE[::-1]).save(item.labels[0])
    assert (find(root).read(item)[1] == VOID).all()


def test_maps_go_before_segments_and_leave_copies_aside(tmp_path):
    root = make_coco_panoptic(tmp_path, 3)
    assert find(root).name == "coco_panoptic"
    make_coco_stuff(root, 3)
    for path in list(root.glob("annotations/*2017/0*.png")):
        path.with_name(f"{path.stem}_labelTrainIds.png").write_bytes(b"")
    source = find(root)
    assert source.name == "coco_stuff" and len(source.splits["train"]) == 3


@pytest.mark.parametrize("value", [*(i - 1 for i in COCO_NO_THINGS), 182, 254])
def test_ids_that_are_none(tmp_path, value):
    source = find(make_coco_stuff(tmp_path, 1))
    (item,) = source.splits["train"]
    with Image.open(item.labels[0]) as image:
        ids = np.array(image)
    ids[3, 4] = value
    Image.fromarray(ids).save(item.labels[0])
    with pytest.raises(UserError, match=rf"train2017/000000000009.png: ids must be .* found {value}; unpack"):
        source.read(item)


def test_segments_that_are_not_listed(tmp_path):
    root = make_coco_panoptic(tmp_path, 2)
    path = root / "annotations/panoptic_train2017.json"
    gone = json.loads(path.read_text())["annotations"][1]["segments_info"][4]["id"]
    edit(path, lambda content: content["annotations"][1]["segments_info"].pop(4))
    source = find(root)
    first, second = source.splits["train"]
    source.read(first)
    message = (
        rf"panoptic_train2017/000000001009.png: must have the segments that .*_train2017.json lists.* found {gone};"
    )
    with pytest.raises(UserError, match=message):
        source.read(second)
    for ids in ([0, 0, 1], [255, 255, 255]):  # below and above all ids that are listed
        Image.fromarray(np.full((*COCO_SIZE, 3), ids, np.uint8)).save(first.labels[0])
        with pytest.raises(UserError, match=f"found {65536 if ids[0] == 0 else 2**24 - 1};"):
            source.read(first)
    Image.new("L", COCO_SIZE[::-1]).save(first.labels[0])
    with pytest.raises(UserError, match="must be an RGB PNG, found PNG of mode L"):
        source.read(first)


@pytest.mark.parametrize(
    ("make", "gone", "message"),
    [
        (
            make_coco_stuff,
            "images/train2017/000000001009.jpg",
            r"images/train2017: must .* found none for 000000001009",
        ),
        (make_coco_stuff, "annotations/val2017/000000000139.png", r"annotations/val2017: must .* for 000000000139"),
        (make_coco_panoptic, "val2017/000000000139.jpg", r"/val2017: must have a file for every image"),
        (
            make_coco_panoptic,
            "annotations/panoptic_train2017/000000000009.png",
            r"panoptic_train2017: must have a file",
        ),
        (make_coco_panoptic, "annotations/panoptic_val2017.json", r"panoptic_val2017.json: .* FileNotFoundError"),
    ],
)
def test_files_that_are_missing(tmp_path, make, gone, message):
    root = make(tmp_path, 3)
    (root / gone).unlink()
    with pytest.raises(UserError, match=message):
        find(root)


@pytest.mark.parametrize(
    ("make", "folder", "message"),
    [
        (make_coco_stuff, "images/val2017", "images/val2017: must be a folder of .jpg"),
        (make_coco_stuff, "annotations/val2017", "annotations/val2017: must be a folder of .png"),
        (make_coco_stuff, "annotations", r"must have annotations/train2017/\*.png or .*panoptic.*, found neither"),
        (make_coco_panoptic, "train2017", "images/train2017: must be a folder of .jpg"),
        (make_coco_panoptic, "annotations/panoptic_val2017", "annotations/panoptic_val2017: must be a folder of .png"),
    ],
)
def test_folders_that_are_missing(tmp_path, make, folder, message):
    root = make(tmp_path, 3)
    (root / folder).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=message):
        find(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "must be a panoptic JSON of COCO, found KeyError: 'categories'"),
        (lambda c: c.pop("annotations"), "must be a panoptic JSON of COCO, found KeyError: 'annotations'"),
        (lambda c: c["annotations"][0].pop("segments_info"), "found KeyError: 'segments_info'"),
        (lambda c: c["annotations"][0]["segments_info"][2].pop("category_id"), "found KeyError: 'category_id'"),
        (lambda c: c["annotations"][0]["segments_info"][2].update(category_id=183), "000000000009: .* found 183;"),
        (lambda c: c["categories"].pop(), r"COCO's 133 categories, found \(200, 'rug-merged'\) amiss"),
        (lambda c: c["categories"][0].update(name="cat"), r"found \(1, 'cat'\), \(1, 'person'\) amiss"),
    ],
)
def test_jsons_that_are_not_cocos(tmp_path, change, message):
    root = make_coco_panoptic(tmp_path, 2)
    path = root / "annotations/panoptic_train2017.json"
    edit(path, change)
    with pytest.raises(UserError, match=f"panoptic_train2017.json: .*{message}"):
        find(root)


def test_a_json_that_is_cut_off(tmp_path):
    path = make_coco_panoptic(tmp_path, 2) / "annotations/panoptic_val2017.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="panoptic_val2017.json: must be a panoptic JSON.* JSONDecodeError"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("make", "name", "num_classes"),
    [(make_coco_stuff, "coco_stuff", 171), (make_coco_panoptic, "coco_panoptic", 133)],
)
def test_prepared(tmp_path, make, name, num_classes):
    """Through `prepare`, with one bad file of thirty-six."""
    root = make(tmp_path / "raw", 30)
    truth = {item.name: find(root).read(item)[1] for items in find(root).splits.values() for item in items}
    (bad,) = root.glob("**/*train2017/000000003009.png")
    bad.write_bytes(bad.read_bytes()[:50])
    options = {"source": root, "size": COCO_SIZE, "max_skipped": 0.03, "num_workers": 1, "progress": False}
    info = prepare.prepare("coco_stuff", tmp_path / "out", **options)
    assert (info.name, info.num_classes, len(info.colours), info.skipped) == (name, num_classes, num_classes, 1)
    assert "CC BY 4.0" in info.license and "Flickr" in info.license and "COCO" in info.attribution
    assert info.flip_pairs == () and ("Caesar" in info.attribution) == (name == "coco_stuff")
    assert count_records(tmp_path / "out") == {"train": 29, "val": 6}
    del truth["train2017/000000003009"]
    for split in ("train", "val"):
        for example in open_records(tmp_path / "out", split):
            np.testing.assert_array_equal(example["label"][..., 0], truth.pop(example["id"]))
    assert not truth and all(info.pixels["train"])
    assert prepare.DEFAULTS["coco_stuff"] == {"size": 512}
