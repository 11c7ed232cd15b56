"""data/prepare.py and data/inspect.py: sources by name, once, where they were stopped; and what is in them."""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_folder import make_folder, write_label

from semflow_jax.data import prepare
from semflow_jax.data.examples import encode_example, fit_pair, write_items
from semflow_jax.data.info import VOID
from semflow_jax.data.inspect import inspect
from semflow_jax.data.records import count_records, load_info, open_records
from semflow_jax.data.sources import avatars, folder
from semflow_jax.errors import UserError


def prepare_folder(root, out_dir, **options):
    return prepare.prepare("folder", out_dir, source=root, size=(16, 24), progress=False, **options)


def test_folder_becomes_records(tmp_path):
    root = make_folder(tmp_path / "toys", 10)
    (root / "ORIGIN.txt").write_text("Ten toys.\nSource: the attic.\nLicence: CC0.\n")
    info = prepare_folder(root, tmp_path / "out")
    assert info == load_info(tmp_path / "out")
    assert (info.name, info.size, info.num_classes) == ("toys", (16, 24), 3)
    assert (info.license, info.attribution) == ("Licence: CC0.", "Source: the attic.")
    assert count_records(tmp_path / "out") == {"train": 8, "val": 1, "test": 1}
    example = open_records(tmp_path / "out", "train")[0]
    assert example["image"].shape == (16, 24, 3) and example["label"].max() == 2


def test_once_is_enough(tmp_path, capsys, monkeypatch):
    root = make_folder(tmp_path / "toys")
    info = prepare_folder(root, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.chdir(tmp_path)
    assert prepare_folder("toys", "out") == info  # another spelling of the same paths
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written


def test_other_arguments_are_refused(tmp_path):
    root = make_folder(tmp_path / "toys")
    prepare_folder(root, tmp_path / "out")
    with pytest.raises(UserError, match="found seed 0, not 1; use another --out"):
        prepare_folder(root, tmp_path / "out", seed=1)
    with pytest.raises(UserError, match=r"found size \[16, 24\], not \[256, 256\]"):
        prepare.prepare("folder", tmp_path / "out", source=root)


def test_prepared_data_outlives_its_source(tmp_path, capsys):
    """On a machine without the files, the prepared folder is still current."""
    root = make_folder(tmp_path / "toys")
    info = prepare_folder(root, tmp_path / "out")
    root.rename(tmp_path / "gone")
    assert prepare_folder(root, tmp_path / "out") == prepare_folder(None, tmp_path / "out") == info


def test_bad_sources_leave_nothing(tmp_path):
    root = make_folder(tmp_path / "toys")
    (root / "labels" / "01.png").write_bytes(b"")
    with pytest.raises(UserError, match="labels/01.png"):
        prepare_folder(root, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "toys"]


def test_an_occupied_folder_is_refused_before_the_work(tmp_path):
    root = make_folder(tmp_path / "toys")
    with pytest.raises(UserError, match="new or empty folder"):
        prepare_folder(root, root)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("imagenet", {}, "name: must be one of avatars, .*, got 'imagenet'"),
        ("folder", {}, "source: folder needs the folder of its files, found none given"),
        ("folder", {"source": "/nowhere"}, "no folder /nowhere"),
        ("avatars", {"source": "/tmp"}, "source: avatars are drawn"),
        ("avatars", {"size": (32, 64)}, "avatars are square"),
        ("avatars", {"num_val": 0}, "num_val: must be at least 1, got 0"),
        ("avatars", {"size": (0, 8)}, "height: must be at least 1"),
        ("avatars", {"fit": "squeeze"}, "fit: must be one of stretch, crop, cover, got 'squeeze'"),
        ("avatars", {"max_skipped": 1.5}, "max_skipped: must be a share"),
    ],
)
def test_bad_arguments(tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_avatars(tmp_path):
    info = prepare.prepare("avatars", tmp_path / "out", size=32, num_train=3, num_val=2, seed=5, progress=False)
    assert info.class_names == avatars.CLASS_NAMES and info.license == avatars.LICENSE
    assert count_records(tmp_path / "out") == {"train": 3, "val": 2, "test": 2}
    image, label = avatars.render(avatars.make_seed("val", 5, 1), 32)
    example = open_records(tmp_path / "out", "val")[1]
    np.testing.assert_array_equal(example["image"], image)
    np.testing.assert_array_equal(example["label"][..., 0], label)


def test_all_files_are_checked_and_problems_counted(tmp_path):
    root = make_folder(tmp_path / "toys", 6)
    for name in ("01", "04", "05"):
        write_label(root, np.zeros((9, 9), np.uint8), name)
    with pytest.raises(UserError, match=r"0[145].jpg: must have the size.*20x30 and 9x9.*\(2 more files") as caught:
        prepare_folder(root, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "out.partial" / "problems.json").read_text()).keys() == {"01", "04", "05"}


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("images", lambda path: path.write_bytes(path.read_bytes()[:300]), "whole image file"),
        ("images", lambda path: Image.new("L", (9000, 10000)).save(path), "pixels"),
        ("labels", lambda path: path.write_bytes(b"<html>"), "whole image file"),
        ("labels", lambda path: path.unlink(), "No such file"),
        ("labels", lambda path: Image.fromarray(np.zeros((20, 30), np.uint16)).save(path), "mode I;16"),
        ("labels", lambda path: Image.new("RGBA", (30, 20)).save(path), "mode RGBA"),
        ("labels", lambda path: Image.new("L", (30, 20), 9).save(path), "found 9; add it"),
        ("labels", lambda path: Image.new("L", (30, 21)).save(path), "size of its label"),
    ],
)
def test_a_bad_file_is_left_out_up_to_a_share(tmp_path, capsys, monkeypatch, kind, damage, message):
    root = make_folder(tmp_path / "toys", 10)
    (root / "classes.json").write_text('["a", "b", "c"]')
    victim = next((root / kind).glob("04.*"))
    found = folder.find({"name": "folder", "source": str(root), "seed": 0})
    damage(victim)
    monkeypatch.setitem(prepare.FIND, "folder", lambda recipe: found)  # listed when it was still there
    with pytest.raises(UserError, match=message):
        prepare_folder(root, tmp_path / "out", max_skipped=0.05)
    info = prepare_folder(root, tmp_path / "out", max_skipped=0.1)
    assert info.skipped == 1 and sum(count_records(tmp_path / "out").values()) == 9
    skipped = json.loads((tmp_path / "out" / prepare.SKIPPED).read_text())
    assert list(skipped) == ["04"] and str(victim.name[:2]) in skipped["04"] and message in skipped["04"]
    assert message in capsys.readouterr().out
    for split in ("train", "val", "test"):
        assert all(example["id"] != "04" for example in open_records(tmp_path / "out", split))


def test_limits_choose_a_subset_in_order(tmp_path):
    root = make_folder(tmp_path / "toys", 20)
    prepare_folder(root, tmp_path / "all")
    prepare_folder(root, tmp_path / "some", num_train=5, num_val=1)
    everything = [e["id"] for e in open_records(tmp_path / "all", "train")]
    some = [e["id"] for e in open_records(tmp_path / "some", "train")]
    assert len(some) == 5 and some == sorted(some) and set(some) < set(everything) and some != everything[:5]
    assert count_records(tmp_path / "some") == {"train": 5, "val": 1, "test": 1}


def test_binary_masks_of_0_and_255_are_explained(tmp_path):
    root = make_folder(tmp_path / "toys")
    for i in range(4):
        write_label(root, np.where(np.eye(20, 30) > 0, 255, 0).astype(np.uint8), f"{i:02}")
    with pytest.raises(UserError, match="found 1 besides void.*store a binary mask as 0 and 1"):
        prepare_folder(root, tmp_path / "out")


def test_facts_count_what_was_written(tmp_path):
    root = make_folder(tmp_path / "toys", 10)
    info = prepare_folder(root, tmp_path / "out")
    for split, pixels in info.pixels.items():
        labels = np.stack([example["label"] for example in open_records(tmp_path / "out", split)])
        assert pixels == [*np.bincount(labels.ravel(), minlength=256)[:3].tolist(), 0] and sum(pixels) == labels.size
    assert len(info.checksums) == 3


def test_workers_and_shards_change_nothing(tmp_path, monkeypatch):
    """Three shards by two processes are the records of one shard by one."""
    monkeypatch.setattr(prepare, "EXAMPLES_PER_SHARD", 4)
    monkeypatch.setattr(prepare, "CHECKED_AT_ONCE", 3)
    monkeypatch.setattr("semflow_jax.data.chunks.WORTH_WORKERS", 0)
    root = make_folder(tmp_path / "toys", 15)
    prepare_folder(root, tmp_path / "two", num_workers=2)
    monkeypatch.undo()
    prepare_folder(root, tmp_path / "one", num_workers=1)
    assert [len(list((tmp_path / name).glob("*train*"))) for name in ("one", "two")] == [1, 3]
    for left, right in zip(*(open_records(tmp_path / name, "train") for name in ("one", "two")), strict=True):
        assert left["id"] == right["id"]
        np.testing.assert_array_equal(left["image"], right["image"])


def test_a_stopped_preparation_goes_on(tmp_path, monkeypatch):
    """What is there already is not made again, unless its file has changed since."""
    monkeypatch.setattr(prepare, "EXAMPLES_PER_SHARD", 4)
    root = make_folder(tmp_path / "toys", 15)
    calls = []

    def write(items, path, read, info, stop_after):
        calls.append([item.name for item in items])
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return write_items(items, path, read, info)

    for stop_after in (2, 9):
        monkeypatch.setattr(prepare, "write_items", functools.partial(write, stop_after=stop_after))
        if stop_after == 2:
            with pytest.raises(KeyboardInterrupt):
                prepare_folder(root, tmp_path / "out")
            assert not (tmp_path / "out").exists()
            changed = calls[0][0]
            write_label(root, np.zeros((20, 30), np.uint8), changed)
    prepare_folder(root, tmp_path / "out")
    first, second, third, again, *_ = calls
    assert again == first and third in calls[4:] and second not in calls[2:]
    assert not (tmp_path / "out.partial").exists()
    assert sum(count_records(tmp_path / "out").values()) == 15
    examples = {example["id"]: example for example in open_records(tmp_path / "out", "train")}
    assert not examples[changed]["label"].any()


def children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_preparation_goes_on(tmp_path):
    """SIGKILL at any time leaves no data set, and the next call one that is whole."""
    command = [sys.executable, "-m", "semflow_jax.cli", "prepare", "avatars", "--out", str(tmp_path / "out")]
    command += ["--size", "16", "--num-train", "1600", "--num-val", "8", "--num-workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 120
    while len(list(partial.glob("*.json"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 2 and time.monotonic() < deadline  # they end with their parent
    kept = {path: path.stat().st_mtime_ns for path in partial.glob("*.array_record")}
    assert kept and not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(re.search(r"write train: .*?(\d+)/1600", done.stderr)[1]) == 512 * len(kept)  # where the bar begins
    inspect(tmp_path / "out", verify=True)
    ids = [example["id"] for example in open_records(tmp_path / "out", "train")]
    assert ids == [f"train-{i:06d}" for i in range(1600)]


def test_damaged_shards_do_not_verify(tmp_path, capsys):
    prepare_folder(make_folder(tmp_path / "toys"), tmp_path / "out")
    inspect(tmp_path / "out", verify=True)
    assert "all 3 files are as they were written" in capsys.readouterr().out
    path = next((tmp_path / "out").glob("*val*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name}: sha256 must be"):
        inspect(tmp_path / "out", verify=True)


def test_fits(tmp_path):
    """Where a picture of another shape goes: a cross in its middle stays in the middle."""
    label = np.zeros((40, 100), np.uint8)
    label[16:24, 44:56] = 1
    image = Image.fromarray(np.repeat(label[..., None] * 255, 3, -1))
    for fit, shape in (("stretch", (20, 20)), ("crop", (20, 20)), ("cover", (20, 50))):
        picture, ids = fit_pair(image, label, (20, 20), fit)
        assert ids.shape == shape and picture.size == shape[::-1]
        rows, columns = np.nonzero(ids)
        assert (rows.mean(), columns.mean()) == pytest.approx(((shape[0] - 1) / 2, (shape[1] - 1) / 2), abs=0.5)
        assert np.asarray(picture)[ids == 1].mean() > 120
        assert np.count_nonzero(ids) == (8 if fit == "stretch" else 24)


def test_inspect_counts_pixels_and_draws(tmp_path, capsys):
    root = make_folder(tmp_path / "toys", 4)
    label = np.zeros((16, 24), np.uint8)
    label[:4] = 1
    label[4:6] = VOID
    for i in range(4):
        Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(root / "images" / f"0{i}.jpg")
        Image.fromarray(label).save(root / "labels" / f"0{i}.png")
    (root / "classes.json").write_text('["left_eye", "right_eye"]')
    prepare_folder(root, tmp_path / "out")
    inspect(tmp_path / "out", tmp_path / "sheet.png")
    out = capsys.readouterr().out
    assert "toys, 16 x 24, 2 classes" in out and "train 2, val 1, test 1" in out
    rows = {line.split()[1]: line.split()[2:] for line in out.splitlines() if line[:3].strip().isdigit()}
    assert rows == {"left_eye": ["62.50"] * 3, "right_eye": ["25.00"] * 3, "void": ["12.50"] * 3}
    assert "a flip swaps left_eye and right_eye" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        tile = np.asarray(sheet)[:128, 192:384]  # the first label, 8 times as large
    for row, i in ((0, 1), (40, VOID), (127, 0)):
        assert len(np.unique(tile[row], axis=0)) == 1, i
    assert tile[40, 0].tolist() == [255, 255, 255]
    assert len(np.unique(tile.reshape(-1, 3), axis=0)) == 3


@pytest.mark.slow
def test_real_camvid(tmp_path, shared_dir, monkeypatch):
    monkeypatch.setenv("SEMFLOW_SHARED", str(shared_dir))
    info = prepare.prepare("camvid", tmp_path / "out", num_train=40, num_val=10, progress=False)
    assert info.num_classes == 11 and "personal and research use" in info.license
    assert count_records(tmp_path / "out") == {"train": 40, "val": 10, "test": 10}
    labels = np.stack([example["label"] for example in open_records(tmp_path / "out", "train")])
    assert labels.shape == (40, 96, 128, 1) and set(np.unique(labels)) == {*range(11), VOID}
    assert 0.2 < (labels == info.class_names.index("road")).mean() < 0.45


def test_large_images_are_jpeg_and_small_ones_png():
    image, label = Image.new("RGB", (257, 16)), np.zeros((16, 257), np.uint8)
    for width, magic in ((256, b"\x89PNG"), (257, b"\xff\xd8")):
        example = encode_example(*fit_pair(image, label, (16, width), "stretch"), "name")
        assert example["image"].startswith(magic) and example["label"].startswith(b"\x89PNG")
