"""data/records.py and data/builders.py: what is written is what is read, by us, by TFDS and in another process."""

import dataclasses
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from semflow_jax.data.builders import write_records
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.records import (
    CorruptRecord,
    Healthy,
    count_records,
    decode_image,
    decode_label,
    load_info,
    open_records,
)
from semflow_jax.errors import UserError

INFO = DataInfo(
    name="some-set",
    class_names=("sky", "l_eye", "r_eye"),
    size=(8, 12),
    flip_pairs=((1, 2),),
    license="CC0",
    attribution="nobody",
    recipe={"name": "folder", "size": [8, 12]},
)


def encode(array: np.ndarray, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, image_format, **options)
    return buffer.getvalue()


def make_arrays(num: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 1, 2, VOID], np.uint8), (num, 8, 12))
    return list(zip(rng.integers(0, 256, (num, 8, 12, 3), np.uint8), labels, strict=True))


def make_examples(num: int, seed: int = 0) -> list[dict]:
    pairs = make_arrays(num, seed)
    return [{"image": encode(x), "label": encode(y), "id": f"é{i}"} for i, (x, y) in enumerate(pairs)]


@pytest.fixture
def data_dir(tmp_path):
    write_records(
        tmp_path / "set", INFO, {"train": make_examples(10), "val": iter(make_examples(2, 1))}, progress=False
    )
    return tmp_path / "set"


def corrupt_shard(data_dir: pathlib.Path, damaged: pathlib.Path, split: str, cut: bool = False) -> pathlib.Path:
    """A copy of a prepared folder with a byte flipped in the middle of a split's file, or with its second half gone."""
    shutil.copytree(data_dir, damaged)
    (path,) = damaged.glob(f"*{split}.array_record*")
    data = bytearray(path.read_bytes())
    # array_record pads its files to 64 KiB and more; the last bytes that are not padding belong to the index.
    middle = len(bytes(data[:65536]).rstrip(b"\0")) // 2
    if cut:
        del data[middle:]
    else:
        data[middle] ^= 1
    path.write_bytes(data)
    return damaged


def test_round_trip_keeps_order_pixels_and_facts(data_dir):
    records = open_records(data_dir, "train")
    assert [example["id"] for example in records] == [f"é{i}" for i in range(10)]
    for example, (image, label) in zip(records, make_arrays(10), strict=True):
        assert example["image"].dtype == example["label"].dtype == np.uint8
        np.testing.assert_array_equal(example["image"], image)
        np.testing.assert_array_equal(example["label"], label[..., None])
    info = load_info(data_dir)
    assert info == INFO.replace(checksums=info.checksums)
    assert info.checksums.keys() == {path.name for path in data_dir.glob("*.array_record*")}
    assert count_records(data_dir) == {"train": 10, "val": 2}


def test_tfds_opens_it_and_sees_the_same(data_dir):
    source = tfds.builder_from_directory(data_dir).as_data_source("train")
    for theirs, ours in zip(source, open_records(data_dir, "train"), strict=True):
        np.testing.assert_array_equal(theirs["image"], ours["image"])
        np.testing.assert_array_equal(theirs["label"], ours["label"])
        assert theirs["id"].decode() == ours["id"]


def test_records_survive_pickling(data_dir):
    records = open_records(data_dir, "val")
    copy = pickle.loads(pickle.dumps(records))
    np.testing.assert_array_equal(copy[1]["image"], records[1]["image"])
    with pytest.raises(IndexError):
        copy[2]


def test_reads_and_writes_without_tensorflow(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from test_records import INFO, make_examples
from semflow_jax.data.builders import write_records
from semflow_jax.data.records import open_records
write_records({str(tmp_path / "set")!r}, INFO, {{"train": make_examples(3)}}, progress=False)
assert open_records({str(tmp_path / "set")!r}, "train")[2]["label"].shape == (8, 12, 1)
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_jpeg_images_are_accepted(tmp_path):
    image, label = make_arrays(1)[0]
    example = {"image": encode(image, "JPEG"), "label": encode(label), "id": "a"}
    write_records(tmp_path / "set", INFO, {"test": [example]}, progress=False)
    assert open_records(tmp_path / "set", "test")[0]["image"].shape == (8, 12, 3)


def test_a_failure_leaves_nothing_behind(tmp_path):
    def broken():
        yield from make_examples(5)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_records(tmp_path / "set", INFO, {"train": broken()}, progress=False)
    with pytest.raises(UserError, match="split val: must have at least one example"):
        write_records(tmp_path / "set", INFO, {"train": make_examples(1), "val": []}, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_has_its_name_only_when_it_is_whole(tmp_path):
    def spy():
        for example in make_examples(3):
            assert not (tmp_path / "set").exists()
            yield example

    write_records(tmp_path / "set", INFO, {"train": spy()}, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_progress_bar_knows_the_length(tmp_path, capsys):
    write_records(tmp_path / "set", INFO, {"train": make_examples(3)})
    assert "3/3" in capsys.readouterr().err


def test_an_occupied_folder_is_left_alone(data_dir):
    with pytest.raises(UserError, match="new or empty folder"):
        write_records(data_dir, INFO, {"train": make_examples(1)}, progress=False)
    assert len(open_records(data_dir, "train")) == 10


def test_clear_errors(data_dir, tmp_path):
    with pytest.raises(UserError, match="no such folder.*semflow prepare"):
        load_info(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="must be a prepared data set"):
        open_records(tmp_path / "other", "train")
    with pytest.raises(UserError, match="split must be one of train, val, got 'test'"):
        open_records(data_dir, "test")
    (data_dir / "metadata.json").write_text(json.dumps({"name": "half"}))
    with pytest.raises(UserError, match="must be a prepared data set"):
        load_info(data_dir)


PHOTO = np.kron(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))[:-3, :-5]


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 95])
def test_jpegs_are_decoded_as_pillow_does(subsampling, progressive, quality):
    data = encode(PHOTO, "JPEG", subsampling=subsampling, progressive=progressive, quality=quality)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode_image(data + b"appended"), decode_image(data))
    grey = encode(PHOTO[..., 0], "JPEG")
    np.testing.assert_array_equal(decode_image(grey), np.asarray(Image.open(io.BytesIO(grey)).convert("RGB")))


@pytest.mark.parametrize("bit", [1, 128])
def test_a_label_with_a_flipped_bit_is_never_taken_for_another(bit):
    """Pillow itself notices most of them, but not all."""
    label = np.kron(np.random.default_rng(0).integers(0, 11, (6, 6), np.uint8), np.ones((4, 4), np.uint8))
    data = encode(label)
    np.testing.assert_array_equal(decode_label(data), label)
    for i in range(len(data)):
        with pytest.raises(ValueError, match="neither JPEG nor PNG" if i < 8 else "broken at byte"):
            decode_label(data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :])
        with pytest.raises(ValueError):
            decode_label(data[:i])


@pytest.mark.parametrize("length", [0, 1, 50, 300, -30, -1])
def test_an_image_cut_short_is_noticed(length):
    for image_format in ("JPEG", "PNG"):
        with pytest.raises(ValueError):
            decode_image(encode(PHOTO, image_format)[:length])


IMAGE, LABEL = make_arrays(1)[0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"image": encode(IMAGE, "JPEG")[:-20]}, "found ValueError: .*[Pp]remature end of JPEG"),
        ({"image": encode(IMAGE)[:-20]}, "found ValueError: a PNG that is broken at byte"),
        ({"image": b"GIF89a"}, "found ValueError: neither JPEG nor PNG"),
        ({"image": encode(IMAGE[:, :6])}, r"image \(8, 6\) and label \(8, 12\) where \(8, 12\) are expected"),
        ({"label": encode(LABEL[:4])}, r"image \(8, 12\) and label \(4, 12\) where \(8, 12\) are expected"),
        ({"image": encode(IMAGE[:4]), "label": encode(LABEL[:4])}, r"image \(4, 12\) and label \(4, 12\) where"),
        ({"label": encode(IMAGE)}, "a label of mode RGB"),
        ({"label": encode(LABEL.astype(np.uint16))}, "a label of mode I;16"),
        ({"label": encode(LABEL > 1)}, "a label of mode 1"),
        ({"label": encode(LABEL % 200 + 1)}, r"class ids \[3, 56\] where 3 classes are known"),
        ({"label": encode(np.where(LABEL == VOID, 254, LABEL).astype(np.uint8))}, r"class ids \[254\] where 3 classes"),
    ],
)
def test_a_bad_example_in_a_whole_file(tmp_path, change, found):
    examples = [{"image": encode(IMAGE), "label": encode(LABEL), "id": f"n{i}"} for i in range(3)]
    examples[1] |= change
    write_records(tmp_path / "set", INFO, {"train": examples}, progress=False)
    records = open_records(tmp_path / "set", "train")
    with pytest.raises(CorruptRecord, match=found) as caught:
        records[1]
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'set'}: train: record 1 (n1) must be whole, found ") and "\n" not in message
    healthy = Healthy(records, 1)
    assert [healthy[i]["id"] for i in range(3)] == ["n0", "n2", "n2"]
    assert [str(healthy[i]["corrupt"]) for i in range(3)] == ["", message, ""]


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory):
    """Records of noise, which fill several of a file's blocks of 64 KiB."""
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (80, 100, 3), np.uint8), np.zeros((80, 100), np.uint8)
    examples = [{"image": encode(image ^ np.uint8(i)), "label": encode(label), "id": str(i)} for i in range(8)]
    path = tmp_path_factory.mktemp("large") / "set"
    write_records(path, dataclasses.replace(INFO, size=(80, 100)), {"train": examples}, progress=False)
    return path


@pytest.mark.parametrize("damage", ["flip", "zeros", "cut"])
def test_a_damaged_file_is_never_taken_for_a_whole_one(large_dir, tmp_path, damage):
    (path,) = large_dir.glob("*array_record*")
    whole, data = list(open_records(large_dir, "train")), path.read_bytes()
    shutil.copytree(large_dir, tmp_path / "set")
    noticed = 0
    for start in (65535, 65536, 65541, *range(500, len(data), len(data) // 8)):
        changed = {
            "flip": data[:start] + bytes([data[start] ^ 0x5A]) + data[start + 1 :],
            "zeros": data[:start] + bytes(64) + data[start + 64 :],
            "cut": data[:start],
        }[damage]
        (tmp_path / "set" / path.name).write_bytes(changed)
        records = open_records(tmp_path / "set", "train")
        for i, example in enumerate(whole):
            try:
                found = records[i]
            except CorruptRecord:
                noticed += 1
            else:
                np.testing.assert_array_equal(found["image"], example["image"])
                np.testing.assert_array_equal(found["label"], example["label"])
    assert noticed >= 5 if damage != "cut" else noticed == 8 * 11


def test_a_file_that_is_gone(large_dir, tmp_path):
    shutil.copytree(large_dir, tmp_path / "set")
    next((tmp_path / "set").glob("*array_record*")).unlink()
    with pytest.raises(CorruptRecord, match=r"record 2 \(id unknown\) must be whole, found .*No such file"):
        open_records(tmp_path / "set", "train")[2]
