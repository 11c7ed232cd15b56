"""data/sources/tfds.py: sets that TFDS's own builders describe and its own writers wrote, and what must not pass."""

import functools
import importlib.resources.abc
import io
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from test_folder import make_folder

from semflow_jax.data import prepare
from semflow_jax.data.info import VOID
from semflow_jax.data.records import count_records, load_info, open_records
from semflow_jax.data.sources import cityscapes
from semflow_jax.data.sources import tfds as source
from semflow_jax.errors import UserError

SIZE = (12, 20)


@pytest.fixture(autouse=True)
def importlib_resources(monkeypatch):
    """A package that TFDS's builders need and TFDS does not bring; Python has it too."""
    monkeypatch.setattr("tensorflow_datasets.core.dataset_builder.importlib_resources", importlib.resources)


def encode(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def make_pictures(num: int, ids: list[int], seed: int, channels: int = 1) -> list[tuple[bytes, bytes]]:
    """A photo of noise as JPEG and a label of `ids` as PNG, `num` times."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num):
        shape = SIZE if channels == 1 else (*SIZE, channels)
        label = rng.choice(np.array(ids, np.uint8), shape)
        pairs.append((encode(rng.integers(0, 256, (*SIZE, 3), np.uint8), "JPEG"), encode(label)))
    return pairs


def write(builder, splits):
    """Has TFDS write examples by split; the folder."""
    examples = {split: list(enumerate(found)) for split, found in splits.items()}
    builder._split_generators = lambda manager: {split: iter(found) for split, found in examples.items()}
    builder.download_and_prepare(file_format="array_record")
    return builder.data_path


def make_known(name: str, root, splits):
    """A set of one of TFDS's own builders."""
    module = importlib.import_module(f"tensorflow_datasets.datasets.{name}.{name}_dataset_builder")
    return write(module.Builder(data_dir=root), splits)


def make_other(root, features: dict, splits, name: str = "toys"):
    """A set of any features."""
    with tfds.core.registered.skip_registration():

        class Toys(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), homepage="https://toys.org"
                )

            def _split_generators(self, dl_manager): ...

            def _generate_examples(self): ...

    Toys.name = name
    return write(Toys(data_dir=root), splits)


def make_pets(root, num: int = 20, damage: bool = False):
    """The folder, and its photos and trimaps; of two records of train one picture is cut short."""

    def record(photo, trimap):
        box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        rest = {"label": 3, "species": 0, "file_name": "Bengal_1.jpg", "head_bbox": box}
        return {"image": photo, "segmentation_mask": trimap} | rest

    pairs = {split: make_pictures(n, [1, 2, 3], i) for i, (split, n) in enumerate((("train", num), ("test", 4)))}
    records = {split: [record(*pair) for pair in found] for split, found in pairs.items()}
    if damage:
        for example, name in zip(records["train"], ("image", "segmentation_mask"), strict=False):
            example[name] = example[name][: len(example[name]) // 2]
    return make_known("oxford_iiit_pet", root, records), pairs


def find(folder, seed: int = 0):
    return source.find({"name": "tfds", "source": str(folder), "seed": seed})


def check(raw, pairs, expected, numbers=None):
    """That the source reads what was written, `expected` being a function of the stored label's pixels."""
    stored = {split: {(photo, label) for photo, label in found} for split, found in pairs.items()}
    for items in raw.splits.values():
        for item in items:
            image, ids = raw.read(item)
            theirs = item.detail[0]
            match = [(p, q) for p, q in stored[theirs] if np.array_equal(decode(p), np.asarray(image))]
            assert len(match) == 1, item.name
            np.testing.assert_array_equal(ids, expected(decode(match[0][1])))
            stored[theirs].remove(match[0])
    return {split for split, left in stored.items() if left}


def test_oxford_iiit_pet(tmp_path):
    folder, pairs = make_pets(tmp_path)
    raw = find(folder)
    assert (raw.name, raw.class_names) == ("oxford_iiit_pet", ("background", "pet")) and "CC BY-SA" in raw.license
    assert {split: len(items) for split, items in raw.splits.items()} == {"train": 18, "val": 2, "test": 4}
    naive = np.vectorize({1: 1, 2: 0, 3: VOID}.get)
    assert check(raw, pairs, naive) == set()
    names = [item.name for items in raw.splits.values() for item in items]
    assert len(set(names)) == 24 and "test-000003" in names
    assert {item.name for item in find(folder, seed=1).splits["val"]} != {item.name for item in raw.splits["val"]}


def test_scene_parse150(tmp_path):
    """The classes are the 100 things, in the red channel; green numbers the instances."""
    pairs = {split: make_pictures(3, [*range(101)], i, 3) for i, split in enumerate(("train", "test"))}
    records = {split: [{"image": p, "annotation": q} for p, q in found] for split, found in pairs.items()}
    raw = find(make_known("scene_parse150", tmp_path, records))
    assert check(raw, pairs, lambda pixels: pixels[..., 0] - np.uint8(1)) == set()
    assert raw.class_names is not None and len(raw.class_names) == len(raw.colours) == len(set(raw.colours)) == 100
    some = {1: "bed", 4: "person", 6: "table", 31: "stairs", 58: "television", 85: "screen", 95: "monitor", 100: "flag"}
    assert {i: raw.class_names[i - 1] for i in some} == some
    assert dict(zip(raw.class_names, raw.colours, strict=True))["person"] == (150, 5, 61)


def test_cityscapes(tmp_path):
    pairs = {s: make_pictures(2, [*range(34)], i) for i, s in enumerate(("train", "validation", "test"))}
    records = {
        split: [{"image_id": str(i), "image_left": p, "segmentation_label": q} for i, (p, q) in enumerate(found)]
        for split, found in pairs.items()
    }
    raw = find(make_known("cityscapes", tmp_path, records))
    classes = {row[0]: i for i, row in enumerate(cityscapes.CLASSES)}
    assert check(raw, pairs, np.vectorize(lambda i: classes.get(i, VOID))) == {"test"}
    assert {split: len(items) for split, items in raw.splits.items()} == {"train": 2, "val": 2}
    assert raw.class_names is not None and raw.class_names[13] == "car" and raw.colours[13] == (0, 0, 142)


def make_toys(root, label="label", rest=(), splits=("train", "validation", "test", "extra")):
    """A set with a label of that name, and `rest`: numbers by name."""
    pairs = {split: make_pictures(3, [0, 1, 2, VOID], i) for i, split in enumerate(splits)}
    features = {"image": tfds.features.Image(), label: tfds.features.Image(shape=(None, None, 1))}
    features |= {name: tfds.features.Scalar(np.float32) for name in rest}
    numbers = dict.fromkeys(rest, 0.5)
    records = {split: [{"image": p, label: q} | numbers for p, q in found] for split, found in pairs.items()}
    return make_other(root, features, records), pairs


@pytest.mark.parametrize(("label", "rest"), [("label", ()), ("segmentation_mask", ("label",)), ("mask", ("weight",))])
def test_any_set_with_a_label_of_one_channel(tmp_path, label, rest):
    folder, pairs = make_toys(tmp_path, label, rest)
    raw = find(folder)
    assert (raw.name, raw.class_names, raw.attribution) == ("toys", None, "https://toys.org")
    assert check(raw, pairs, lambda pixels: pixels) == {"extra"}
    info = prepare.prepare("tfds", tmp_path / "out", source=folder, size=SIZE, progress=False)
    assert info.class_names == ("class_0", "class_1", "class_2")


def test_labeled_images_have_names(tmp_path):
    pairs = {"train": make_pictures(3, [0, 1, VOID], 0)}
    label = tfds.features.LabeledImage(labels=["sky", "road"], shape=(None, None, 1))
    records = {"train": [{"image": p, "label": q} for p, q in pairs["train"]]}
    raw = find(make_other(tmp_path / "two", {"image": tfds.features.Image(), "label": label}, records))
    assert raw.class_names == ("sky", "road") and check(raw, pairs, lambda pixels: pixels) == set()
    label = tfds.features.LabeledImage(labels=["sky"], shape=(None, None, 1))
    raw = find(make_other(tmp_path / "one", {"image": tfds.features.Image(), "label": label}, records))
    with pytest.raises(UserError, match="1.0.0: train .: ids must be 0 to 0 or 255, found 1; make"):
        raw.read(raw.splits["train"][0])


def test_prepared_sets_are_tfds_sets(tmp_path):
    """Found by name and by folder, and prepared again, with all that they know of themselves."""
    root = make_folder(tmp_path / "toys", 10)
    (root / "classes.json").write_text('["l_eye", "r_eye", "nose"]')
    (root / "ORIGIN.txt").write_text("Source: the attic.\nLicence: CC0.\n")
    first = tmp_path / "data" / "toys" / "1.0.0"
    info = prepare.prepare("folder", first, source=root, size=(20, 30), progress=False)
    for builder in (tfds.builder("toys", data_dir=tmp_path / "data"), tfds.builder_from_directory(first)):
        assert builder.info.full_name == "toys/1.0.0" and builder.info.metadata["class_names"] == list(info.class_names)
        encoded = {name: tfds.decode.SkipDecoding() for name in ("image", "label")}
        records = builder.as_data_source("train", decoders=encoded)
        assert len(records) == 8 and decode(records[0]["label"]).shape == (20, 30)
    again = prepare.prepare("tfds", tmp_path / "again", source=first, size=(20, 30), progress=False)
    for field in ("name", "class_names", "flip_pairs", "license", "attribution"):
        assert getattr(again, field) == getattr(info, field)
    assert again.flip_pairs == ((0, 1),) and count_records(tmp_path / "again") == count_records(first)
    for left, right in zip(open_records(first, "train"), open_records(tmp_path / "again", "train"), strict=True):
        np.testing.assert_array_equal(left["image"], right["image"])
        np.testing.assert_array_equal(left["label"], right["label"])


def test_from_end_to_end_with_bad_records(tmp_path):
    folder, pairs = make_pets(tmp_path, num=6, damage=True)
    options = {"source": folder, "size": SIZE, "progress": False}
    with pytest.raises(UserError, match=r"4.0.0: train \d: must be a whole image file.*\(1 more files"):
        prepare.prepare("tfds", tmp_path / "out", **options)
    info = prepare.prepare("tfds", tmp_path / "out", **options, max_skipped=0.2)
    assert info == load_info(tmp_path / "out") and info.class_names == ("background", "pet") and info.skipped == 2
    counts = count_records(tmp_path / "out")
    assert counts["test"] == 4 and counts["train"] + counts["val"] == 4
    naive = np.vectorize({1: 1, 2: 0, 3: VOID}.get)
    labels = {naive(decode(trimap)).astype(np.uint8).tobytes() for found in pairs.values() for _, trimap in found}
    for split in counts:
        for example in open_records(tmp_path / "out", split):
            assert example["id"].rsplit("-")[0] in ("train", "test") and example["label"].tobytes() in labels


def test_a_shard_that_is_no_shard(tmp_path):
    folder, _ = make_pets(tmp_path, 4)
    shard = next(folder.glob("*test*record*"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    raw = find(folder)
    with pytest.raises(UserError, match="4.0.0: test 0: must be a whole record, found .*; make") as caught:
        raw.read(raw.splits["test"][0])
    assert "\n" not in str(caught.value)


def test_readers_go_to_other_processes(tmp_path):
    raw = find(make_pets(tmp_path, 4)[0])
    item = raw.splits["test"][1]
    read = pickle.loads(pickle.dumps(raw.read))
    np.testing.assert_array_equal(read(item)[1], raw.read(item)[1])


def as_tfrecord(folder):
    path = folder / "dataset_info.json"
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))


def without_shard(folder):
    next(folder.glob("*test*record*")).unlink()


def without_version(folder):
    folder.rename(folder.with_name("moved"))
    folder.mkdir()
    folder.with_name("moved").rename(folder / "1.2.3")


def with_other_pictures(folder):
    path = folder / "features.json"
    content = json.loads(path.read_text())
    del content["featuresDict"]["features"]["segmentation_mask"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (as_tfrecord, "4.0.0: must be stored as array_record.*found tfrecord; .*download_and_prepare"),
        (without_shard, "test.array_record-00000-of-00001: must be there"),
        (without_version, "must be the folder of a set's version, found no dataset_info.json; pass .*/1.2.3"),
        (lambda folder: (folder / "dataset_info.json").write_text("{"), "4.0.0: must be a whole TFDS set, found"),
        (with_other_pictures, r"feature segmentation_mask must be a picture of 1 8-bit channels, found .*image \("),
    ],
)
def test_bad_folders(tmp_path, damage, message):
    folder, _ = make_pets(tmp_path, 3)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        find(folder)
    assert "\n" not in str(caught.value)


def test_sets_without_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="must be the folder of a set's version.*; pass DATA_DIR/NAME/VERSION"):
        find(tmp_path)
    with pytest.raises(UserError, match="must have a split train, found test"):
        find(make_toys(tmp_path / "a", splits=("test",))[0])
    picture = functools.partial(tfds.features.Image, shape=(None, None, 1))
    records = {"train": [{"image": p, "depth": q} for p, q in make_pictures(2, [0, 1], 0)]}
    folder = make_other(tmp_path / "b", {"image": tfds.features.Image(), "depth": picture()}, records)
    with pytest.raises(UserError, match=r"one 8-bit channel as one of label, .*found .*depth \(None, None, 1\)"):
        find(folder)


def test_unknown_ids_are_named(tmp_path):
    records = {"train": [{"image": p, "annotation": q} for p, q in make_pictures(2, [101], 0, 3)]}
    raw = find(make_known("scene_parse150", tmp_path, records))
    with pytest.raises(UserError, match="1.0.0: train .: ids must be 0 to 100, found 101; make the set again"):
        raw.read(raw.splits["train"][0])
