"""evaluate/study.py: `semflow evaluate` from the command line; its protocol, how it goes on, and whom it believes."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_cli import fail, fail_in_a_line, no_settings_of_the_process, run  # noqa: F401
from test_folder import make_folder
from test_pipeline_model import CLASS_NAMES, SIZE

from semflow_jax.data.records import open_records
from semflow_jax.evaluate import runner, tally

NUM = 30  # raw examples, a tenth of them test


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("study")
    source = make_folder(root / "toys", NUM, size=SIZE)
    (source / "classes.json").write_text(json.dumps(CLASS_NAMES))
    run("prepare", "folder", "--source", source, "--out", root / "data", "--size", *SIZE)
    run("prepare", "folder", "--source", source, "--out", root / "large", "--size", 16, 24)
    return root / "data"


@pytest.fixture
def evaluate(saved, data, tmp_path):
    """Runs the command; returns its result."""

    def call(*options):
        run(
            "evaluate", "--checkpoint", saved, "--data", data, "--batch-size", 2, "--out", tmp_path / "r.json", *options
        )
        return json.loads((tmp_path / "r.json").read_text())

    return call


def test_rows_and_protocol(evaluate, data, tmp_path, capsys):
    found = evaluate("--steps", "1", "--mirror", "--time")
    assert [
        row.get("seconds_per_image", 0) > 0 for row in found["segmentation"] + found["synthesis"] + found["flow"]
    ] == [
        True,
        False,  # of averaged views
        True,
        False,
    ]
    heads = [(row["solver"], row["steps"], row["views"]) for row in found["segmentation"]]
    assert heads == [("euler", 1, ["1"]), ("euler", 1, ["1", "1 mirrored"])]
    assert [row["steps"] for row in found["synthesis"]] == [row["steps"] for row in found["flow"]] == [1]
    assert "curvature" not in found["flow"][0]  # one step is always straight
    row = found["segmentation"][0]
    assert 0 <= row["miou"] <= row["codec_ceiling_miou"] == row["ceiling"]["miou"] <= 1
    assert row["class_iou"].keys() == set(CLASS_NAMES) and 0 <= row["calibration_error"] <= 1
    assert found["synthesis"][0]["diversity"] > 0
    assert found["protocol"]["data"]["num_images"] == len(open_records(data, "test"))
    assert found["protocol"]["size"] == list(SIZE) and found["protocol"]["seed"] == 0
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.new"))
    out = capsys.readouterr().out
    assert "segmentation, euler 1, 2 views: miou" in out and "result: " in out


def test_rows_that_are_there_are_not_computed_again(evaluate, monkeypatch):
    first = evaluate("--sections", "segmentation", "--steps", "1")
    done = []
    monkeypatch.setattr(runner, "tally", lambda *args: done.append(args) or tally.tally(*args))
    second = evaluate("--sections", "segmentation", "--steps", "1,2")
    assert second["segmentation"][0] == first["segmentation"][0]
    assert len(done) == 1 and [row["steps"] for row in second["segmentation"]] == [1, 2]
    timed = evaluate("--sections", "segmentation", "--steps", "1,2", "--time")["segmentation"]
    assert len(done) == 1 and all(row.pop("seconds_per_image") > 0 for row in timed) and timed == second["segmentation"]


def test_a_killed_evaluation_goes_on_and_counts_the_same(evaluate, tmp_path, monkeypatch):
    whole = evaluate("--sections", "synthesis")
    (tmp_path / "r.json").unlink()
    monkeypatch.setattr(tally, "KEEP_SECONDS", -1)
    keep = tally._keep

    def keep_and_die(*args):
        keep(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(tally, "_keep", keep_and_die)
    with pytest.raises(KeyboardInterrupt):
        evaluate("--sections", "synthesis")
    assert len(list((tmp_path / "r.json.partial").iterdir())) == 1
    monkeypatch.setattr(tally, "_keep", keep)
    assert evaluate("--sections", "synthesis") == whole


def test_another_protocol_is_not_mixed_in(evaluate, saved, data, tmp_path, capsys):
    evaluate("--sections", "segmentation")
    before = (tmp_path / "r.json").read_bytes()
    options = ("--checkpoint", saved, "--data", data, "--batch-size", 2, "--out", tmp_path / "r.json")
    assert "a result of another protocol, seed differ" in fail(capsys, "evaluate", *options, "--seed", 1)
    assert (tmp_path / "r.json").read_bytes() == before
    (tmp_path / "r.json").write_text("{")
    assert "a result of semflow evaluate expected" in fail(capsys, "evaluate", *options)
    assert (tmp_path / "r.json").read_text() == "{"


def test_batches_do_not_matter(evaluate, tmp_path):
    """The last one is ragged in one and not in the other."""
    two = evaluate("--sections", "segmentation,synthesis")
    (tmp_path / "r.json").unlink()
    three = evaluate("--sections", "segmentation,synthesis", "--batch-size", 3)
    for section, name in (("segmentation", "miou"), ("synthesis", "resegmentation_miou")):
        assert two[section][0][name] == three[section][0][name]
    assert two["synthesis"][0]["diversity"] == pytest.approx(three["synthesis"][0]["diversity"], rel=1e-6)


def test_labels_of_another_resolution(evaluate, data):
    found = evaluate("--sections", "segmentation,synthesis", "--data", data.parent / "large")
    assert found["protocol"]["data"]["label_size"] == [16, 24] and found["protocol"]["size"] == list(SIZE)
    assert found["protocol"]["resize"]["images"] == "lanczos3, antialiased"
    assert found["segmentation"][0]["ceiling"]["miou"] == 1  # for each of its pixels is four of the same class


def test_an_outside_segmenter_is_believed(evaluate, data, tmp_path, capsys):
    """One that knows the answers, but for one pixel of class 0."""
    evaluate("--sections", "synthesis", "--pictures", tmp_path / "pictures")
    records = open_records(data, "test")
    folder = tmp_path / "predictions" / "euler-2"
    folder.mkdir(parents=True)
    for i in range(len(records)):
        label = records[i]["label"][..., 0].copy()
        name = f"{records[i]['id']}-0.png"
        with Image.open(tmp_path / "pictures" / "euler-2" / name) as picture:
            assert picture.size == SIZE[::-1]
        if i == 0:
            label[0, 0] = 1
        Image.fromarray(label).save(folder / name)
    found = evaluate("--sections", "synthesis", "--predictions", tmp_path / "predictions")
    total = len(records) * SIZE[0] * SIZE[1]
    assert found["synthesis"][0]["external"]["pixel_accuracy"] == pytest.approx((total - 1) / total)
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(folder / name)
    with pytest.raises(SystemExit):
        evaluate("--sections", "synthesis", "--predictions", tmp_path / "predictions")
    assert "class ids 0..2 expected, found 7" in capsys.readouterr().err
    (folder / name).unlink()
    with pytest.raises(SystemExit):
        evaluate("--sections", "synthesis", "--predictions", tmp_path / "predictions")
    assert "a PNG of class ids for every first sample expected, found no file" in capsys.readouterr().err


def test_devices_do_not_matter(saved, data, tmp_path):
    """Two virtual devices, in a process of its own, count what one counts."""
    found = []
    for num in (1, 2):
        out = tmp_path / f"{num}.json"
        argv = ["evaluate", "--checkpoint", saved, "--data", data, "--batch-size", 2, "--out", out]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(num), "SEMFLOW_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "semflow_jax.cli", *map(str, argv), "--sections", "segmentation,synthesis"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(out.read_text()))
    one, two = found
    assert one["segmentation"][0]["class_iou"] == two["segmentation"][0]["class_iou"]
    assert one["synthesis"][0]["resegmentation_miou"] == two["synthesis"][0]["resegmentation_miou"]
    assert one["protocol"] == two["protocol"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: invalid list of positive numbers value: '0'"),
        (["--steps", "1,x"], "argument --steps: invalid list of positive numbers value: '1,x'"),
        (["--solver", "euler,magic"], "argument --solver: of euler, adams, heun, midpoint, tsit5, with commas"),
        (["--num-samples", "1"], "--num-samples: at least 2, got 1"),
        (["--limit", "0"], "--limit: at least 1, got 0"),
        (["--features", "inception_fid=/nowhere.pth"], "/nowhere.pth: must be the weights of inception_fid"),
        (["--features", "imagenet=x"], "features: must be one of"),
        (["--lpips", "alex=/nowhere.pth,x"], "/nowhere.pth: must be the weights of LPIPS alex"),
        (["--config", "configs/quickstart.py"], "not allowed with argument --data"),
    ],
)
def test_mistakes_are_told_at_once(saved, data, capsys, options, message):
    error = fail(capsys, "evaluate", "--checkpoint", saved, "--data", data, "--batch-size", 2, *options)
    assert message in error


def test_wants_the_models_classes(saved, tmp_path, capsys):
    source = make_folder(tmp_path / "toys", 20)
    run("prepare", "folder", "--source", source, "--out", tmp_path / "data", "--size", *SIZE)
    capsys.readouterr()
    assert "the model's 3 classes expected" in fail_in_a_line(
        capsys, "evaluate", "--checkpoint", saved, "--data", tmp_path / "data"
    )
