"""data/records.py and data/builders.py: what is written is what is read, by us, by TFDS and in another process."""

import io
import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from semflow_jax.data.builders import write_records
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.records import count_records, load_info, open_records
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


def encode(array: np.ndarray, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, image_format)
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
