"""cli.py: the `semflow` command, from raw files to pictures, and one line for whoever mistypes."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from test_pipeline_model import CLASS_NAMES, SIZE, make_pictures

from semflow_jax import cli, palette, parallel
from semflow_jax.data.records import count_records, load_info
from semflow_jax.pipeline import SemFlow
from semflow_jax.weights.load import load_safetensors


@pytest.fixture(autouse=True)
def no_settings_of_the_process(monkeypatch):
    """It has other tests to run."""
    monkeypatch.setattr(parallel, "keep_compilations", lambda: None)
    monkeypatch.setattr(parallel, "initialize", lambda: None)


def run(*argv) -> None:
    cli.main([str(arg) for arg in argv])


def fail(capsys, *argv) -> str:
    """Runs a command that must be refused; returns what it says."""
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def fail_in_a_line(capsys, *argv) -> str:
    lines = [line for line in fail(capsys, *argv).splitlines() if line and "%|" not in line]  # without the bars
    assert len(lines) == 1 and lines[0].startswith("semflow: ")
    return lines[0]


@pytest.fixture
def inputs(tmp_path):
    """Three images of the model's size as `images`, their masks as `masks`."""
    for kind, pictures in zip(("images", "masks"), make_pictures(), strict=True):
        (tmp_path / kind).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.squeeze()).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for command in ("prepare", "inspect", "segment", "synthesize", "convert", "evaluate"):
        assert re.search(rf"^ +{command}\b", out, re.MULTILINE)


@pytest.mark.slow
def test_as_a_process(tmp_path):
    def semflow(*argv):
        command = [sys.executable, "-m", "semflow_jax.cli", *argv]
        env = os.environ | {"SEMFLOW_CACHE": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)

    done = semflow("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: semflow")
    done = semflow("inspect", "/nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "semflow: /nowhere: must be a prepared data set, found no such folder; make one with `semflow prepare`"
    ]


def test_prepare_and_inspect_avatars(tmp_path, capsys):
    run("prepare", "avatars", "--out", tmp_path / "data", "--size", 32, "--num-train", 5, "--num-val", 2)
    assert count_records(tmp_path / "data") == {"train": 5, "val": 2, "test": 2}
    capsys.readouterr()
    run("inspect", tmp_path / "data", "--sheet", tmp_path / "sheet.png")
    out = capsys.readouterr().out
    assert "avatars, 32 x 32" in out and "train 5, val 2, test 2" in out
    for name in load_info(tmp_path / "data").class_names:
        assert name in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.ptp(np.asarray(sheet)) > 100


def test_segment_keeps_sizes_and_writes_class_ids(flow, saved, inputs, capsys):
    rng = np.random.default_rng(1)
    sizes = {"0": SIZE, "1": SIZE, "2": SIZE, "tall": (31, 9), "wide": (10, 40)}
    for name, size in list(sizes.items())[3:]:
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(inputs / "images" / f"{name}.jpg")
    (inputs / "images" / "notes.txt").write_text("not an image")
    run("segment", "--checkpoint", saved, "--input", inputs / "images", "--out", inputs / "out", "--batch-size", 2)
    assert sorted(path.name for path in (inputs / "out").iterdir()) == sorted(f"{name}.png" for name in sizes)
    expected = flow.segment(make_pictures()[0])
    for name, size in sizes.items():
        with Image.open(inputs / "out" / f"{name}.png") as mask:
            ids = np.asarray(mask)
            assert mask.mode == "P" and ids.shape == size and ids.max() < 3
            assert mask.getpalette()[:9] == flow.code.colours.ravel().tolist()
        if name.isdigit():
            np.testing.assert_array_equal(ids, expected[int(name), ..., 0])
    out = capsys.readouterr().out
    assert "5 masks" in out and all(f"{i} {name}\n" in out for i, name in enumerate(CLASS_NAMES))


def test_segment_one_file_with_other_settings(flow, saved, inputs):
    file = inputs / "images" / "1.png"
    run(
        "segment",
        "--checkpoint",
        saved,
        "--input",
        file,
        "--out",
        inputs / "out",
        "--steps",
        3,
        "--solver",
        "heun",
    )
    expected = flow.segment(make_pictures()[0][1:2], steps=3, solver="heun")
    np.testing.assert_array_equal(np.asarray(Image.open(inputs / "out" / "1.png")), expected[0, ..., 0])


def test_synthesize_draws_samples_of_the_models_size(saved, inputs, capsys):
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(inputs / "masks" / "large.png")

    def synthesize(name: str, seed: int) -> dict[str, np.ndarray]:
        options = ("--num-samples", 2, "--seed", seed, "--batch-size", 3)
        run("synthesize", "--checkpoint", saved, "--input", inputs / "masks", "--out", inputs / name, *options)
        return {path.name: np.asarray(Image.open(path)) for path in (inputs / name).iterdir()}

    images = synthesize("out", 0)
    assert images.keys() == {f"{name}-{k}.png" for name in ("0", "1", "2", "large") for k in range(2)}
    assert {image.shape for image in images.values()} == {(*SIZE, 3)}
    assert len({image.tobytes() for image in images.values()}) == 8
    assert "8 images in" in capsys.readouterr().out
    again, other = synthesize("again", 0), synthesize("other", 1)
    for name, image in images.items():
        np.testing.assert_array_equal(again[name], image)
        assert (other[name] != image).any()


def test_a_mask_made_by_segment_is_an_input_of_synthesize(saved, inputs):
    run("segment", "--checkpoint", saved, "--input", inputs / "images", "--out", inputs / "ids")
    run("synthesize", "--checkpoint", saved, "--input", inputs / "ids", "--out", inputs / "out")
    assert len(list((inputs / "out").iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "/nowhere"], "checkpoint /nowhere: "),
        (["--input", "/nowhere"], "--input /nowhere: a file, or a folder with"),
    ],
)
def test_bad_options_of_segment(saved, inputs, capsys, options, message):
    options = ["--checkpoint", saved, "--input", inputs / "images", "--out", inputs / "out", *options]
    assert message in fail_in_a_line(capsys, "segment", *options)


def test_solvers_are_known(saved, inputs, capsys):
    options = ["--checkpoint", saved, "--input", inputs / "images", "--out", inputs / "out", "--solver", "magic"]
    assert "argument --solver: invalid choice: 'magic'" in fail(capsys, "segment", *options)
    assert not (inputs / "out").exists()


@pytest.mark.parametrize("command", ["segment", "synthesize"])
def test_an_output_that_can_not_be_written(saved, inputs, capsys, command):
    (inputs / "out").write_text("a file")
    kind = {"segment": "images", "synthesize": "masks"}[command]
    options = ["--checkpoint", saved, "--input", inputs / kind, "--out", inputs / "out"]
    assert "File exists" in fail_in_a_line(capsys, command, *options)


@pytest.mark.parametrize("option", ["--steps", "--batch-size"])
def test_numbers_that_count_are_positive(saved, inputs, capsys, option):
    options = ["--checkpoint", saved, "--input", inputs / "images", "--out", inputs / "out", option, "0"]
    assert f"argument {option}: at least 1, got 0" in fail(capsys, "segment", *options)


def test_a_file_that_is_no_image(saved, inputs, capsys):
    (inputs / "images" / "broken.png").write_bytes(b"not a PNG")
    options = ["--checkpoint", saved, "--input", inputs / "images", "--out", inputs / "out"]
    assert "broken.png: must be a whole image file" in fail_in_a_line(capsys, "segment", *options)


def test_results_must_not_overwrite_each_other(saved, inputs, capsys):
    (inputs / "images" / "0.jpg").write_bytes((inputs / "images" / "0.png").read_bytes())
    options = ["--checkpoint", saved, "--input", inputs / "images", "--out", inputs / "out"]
    assert "names must differ in more than the suffix" in fail_in_a_line(capsys, "segment", *options)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full(SIZE, 7, np.uint8), "class ids 0..2 or 255 expected, got 7"),
        (np.zeros((*SIZE, 3), np.uint8), "must be an 8-bit grey or palette PNG of class ids"),
    ],
)
def test_bad_masks(saved, inputs, capsys, mask, message):
    Image.fromarray(mask).save(inputs / "bad.png")
    options = ["--checkpoint", saved, "--input", inputs / "bad.png", "--out", inputs / "out"]
    assert message in fail_in_a_line(capsys, "synthesize", *options)


def test_bad_options_of_prepare(tmp_path, capsys):
    assert "no folder /nowhere" in fail_in_a_line(
        capsys, "prepare", "folder", "--source", "/nowhere", "--out", tmp_path / "x"
    )
    assert "invalid choice: 'imagenet'" in fail(capsys, "prepare", "imagenet", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_convert_there_and_back(flow, saved, tmp_path, capsys):
    run("convert", saved, tmp_path / "orbax", "--format", "orbax")
    assert (tmp_path / "orbax" / "model.orbax").is_dir() and not (tmp_path / "orbax" / "model.safetensors").exists()
    run("convert", tmp_path / "orbax", tmp_path / "back")
    for path in saved.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    run("convert", saved, tmp_path / "half", "--dtype", "float16")
    assert load_safetensors(tmp_path / "half" / "model.safetensors")["conv_in.weight"].dtype == np.float16
    lines = capsys.readouterr().out.splitlines()
    digest = parallel.digest(flow.params)
    for line, name, kind in zip(lines, ("orbax", "back", "half"), ("orbax", "safetensors", "safetensors"), strict=True):
        assert line.endswith(f"parameters in {tmp_path / name}, {kind}; sha256 {digest}")


def test_convert_writes_nothing_over_something(saved, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder" / "notes.txt", tmp_path / "file"):
        path.write_text("mine")
    for name in ("folder", "file"):
        line = fail_in_a_line(capsys, "convert", "/nowhere", tmp_path / name)  # said before anything is read
        assert f"{tmp_path / name}: a new or empty folder expected, found something in it" in line
    assert (tmp_path / "folder" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    run("convert", saved, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_convert_what_can_not_be(saved, tmp_path, capsys):
    for options, message in (
        ([saved, "--format", "diffusers"], "model.skip: must be false for diffusers"),
        ([saved, "--unet", "x.pt"], "unet, context and class_names are for Stable Diffusion's weights"),
        ([tmp_path], "a folder with unet/config.json expected, found none"),
        ([saved, "--classes", "/nowhere"], "/nowhere: must be a list of names"),
        (["some/one", "--offline"], "checkpoint some/one: a folder, or a repository of the Hugging Face hub"),
    ):
        source, *rest = options
        assert message in fail_in_a_line(capsys, "convert", source, tmp_path / "out", *rest)
        assert not (tmp_path / "out").exists()


def test_convert_stable_diffusion(sd, sd_flow, tmp_path):
    """With the authors' weights and class names to a flow of ours, and that to diffusers."""
    import torch

    state = {f"module.{key}": tensor + 1 for key, tensor in sd.unet.state_dict().items()}
    torch.save(state, tmp_path / "face.pt")
    (tmp_path / "classes.json").write_text(json.dumps(["skin", "nose", "hat"]))
    options = ["--unet", tmp_path / "face.pt", "--classes", tmp_path / "classes.json"]
    run("convert", sd.path, tmp_path / "flow", *options)
    flow = SemFlow.from_pretrained(tmp_path / "flow")
    assert flow.info.class_names == ("skin", "nose", "hat") and flow.info.name == sd.path.name
    np.testing.assert_array_equal(flow.code.colours, palette.grid_palette(3))
    np.testing.assert_array_equal(flow.context, sd_flow.context)
    jax.tree.map(np.testing.assert_array_equal, flow.params, {key: x + 1 for key, x in sd_flow.params.items()})

    run("convert", tmp_path / "flow", tmp_path / "diffusers", "--format", "diffusers")
    found = load_safetensors(tmp_path / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = {key.removeprefix("module."): tensor.numpy() for key, tensor in state.items()}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    found = load_safetensors(tmp_path / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, {key: x.numpy() for key, x in sd.vae.state_dict().items()})
