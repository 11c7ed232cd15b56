"""data/prepare.py: sources by name, once; and what `inspect` says."""

import os

import numpy as np
import pytest
from PIL import Image
from test_folder import make_folder

from semflow_jax.data import avatars, prepare
from semflow_jax.data.info import VOID
from semflow_jax.data.records import count_records, load_info, open_records
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
    assert sorted(os.listdir(tmp_path)) == ["toys"]


def test_an_occupied_folder_is_refused_before_the_work(tmp_path):
    root = make_folder(tmp_path / "toys")
    with pytest.raises(UserError, match="new or empty folder"):
        prepare_folder(root, root)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("imagenet", {}, "name: must be one of avatars, camvid, folder, got 'imagenet'"),
        ("folder", {}, "source: folder needs a folder.*none given"),
        ("folder", {"source": "/nowhere"}, "no folder /nowhere"),
        ("avatars", {"source": "/tmp"}, "source: avatars are drawn"),
        ("avatars", {"size": (32, 64)}, "avatars are square"),
        ("avatars", {"num_val": 0}, "num_val: must be at least 1, got 0"),
        ("avatars", {"size": (0, 8)}, "height: must be at least 1"),
    ],
)
def test_bad_arguments(tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_avatars(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # no worker processes for a handful
    info = prepare.prepare("avatars", tmp_path / "out", size=32, num_train=3, num_val=2, seed=5, progress=False)
    assert info.class_names == avatars.CLASS_NAMES and info.license == avatars.LICENSE
    assert count_records(tmp_path / "out") == {"train": 3, "val": 2, "test": 2}
    image, label = avatars.render(avatars.make_seed("val", 5, 1), 32)
    example = open_records(tmp_path / "out", "val")[1]
    np.testing.assert_array_equal(example["image"], image)
    np.testing.assert_array_equal(example["label"][..., 0], label)


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
    prepare.inspect(tmp_path / "out", tmp_path / "sheet.png")
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
