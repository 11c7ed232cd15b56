"""main.py in processes of its own: however a run is interrupted, it ends with the same parameters."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from test_folder import make_folder

REPO = pathlib.Path(__file__).resolve().parent.parent
NUM_STEPS = 100

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Raw files, and a cache of prepared data and compiled programs that all runs share."""
    root = tmp_path_factory.mktemp("main")
    make_folder(root / "toys", 20, size=(8, 12))
    return root


def start(root: pathlib.Path, workdir: str, *overrides: str) -> subprocess.Popen:
    """The quickstart, made tiny."""
    flags = {
        "num_steps": NUM_STEPS,
        "batch_size": 4,
        "data.name": "folder",
        "data.source": root / "toys",
        "data.size": (8, 12),
        "data.num_train": 14,
        "data.num_val": 3,
        "model.block_out_channels": (8,),
        "model.attention": (False,),
        "model.num_heads": (2,),
        "model.num_groups": 4,
        "sampling.steps": 2,
        "eval.batch_size": 4,
        "eval.limit": 3,
        "eval.gallery": 2,
        "log_every": 5,
        "eval_every": 50,
        "checkpoint_every": 20,
    }
    for override in overrides:  # a repeated flag of a tuple would add to it
        key, _, value = override.partition("=")
        flags[key] = value
    argv = [f"--config.{key}={str(value).replace(' ', '')}" for key, value in flags.items()]
    return subprocess.Popen(
        [sys.executable, "main.py", "--config=configs/quickstart.py", f"--workdir={root / workdir}", *argv],
        cwd=REPO,
        env=os.environ | {"SEMFLOW_CACHE": str(root / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen, happened) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def read_digest(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("params_sha256 ")]
    return line.split()[1]


def read_rows(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_metrics(workdir: pathlib.Path) -> None:
    rows = read_rows(workdir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(5, NUM_STEPS + 1, 5))
    assert [row["step"] for row in rows if "val/miou" in row] == [50, 100]


@pytest.fixture(scope="module")
def uninterrupted(root) -> str:
    """The digest of the parameters of a run that nothing happened to."""
    code, out, err = finish(start(root, "whole"))
    assert code == 0, err
    check_metrics(root / "whole")
    return read_digest(out)


def test_a_run_leaves_everything(root, uninterrupted):
    workdir = root / "whole"
    result = json.loads((workdir / "report.json").read_text())
    assert result["params_sha256"] == uninterrupted
    assert result["train"]["steps"] == NUM_STEPS
    assert result["segmentation"]["codec_ceiling_miou"] > 0.9
    for name in ("report.html", "gallery.png", "export/config.json", "export/model.safetensors", "export/README.md"):
        assert (workdir / name).stat().st_size > 0


def test_a_stopped_run_goes_on(root, uninterrupted):
    process = start(root, "stopped")
    wait_for(process, lambda: read_rows(root / "stopped"))
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0 and "Traceback" not in err and "params_sha256" not in out
    (line,) = [line for line in err.splitlines() if line.startswith("stopped by a signal, saved step ")]
    assert line.endswith("run the same command to go on")
    step = int(line.split("saved step ")[1].split(":")[0])
    assert 5 <= step < NUM_STEPS and not (root / "stopped" / "report.json").exists()
    code, out, err = finish(start(root, "stopped"))
    assert code == 0 and f"resumed at step {step} of {NUM_STEPS}" in err
    assert read_digest(out) == uninterrupted
    check_metrics(root / "stopped")


@pytest.mark.long
def test_a_killed_run_goes_on_from_its_checkpoint(root, uninterrupted):
    process = start(root, "killed")
    checkpoint = root / "killed" / "checkpoints" / "20"
    wait_for(process, lambda: checkpoint.exists() and read_rows(root / "killed")[-1]["step"] >= 25)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert read_rows(root / "killed")[-1]["step"] < NUM_STEPS
    code, out, err = finish(start(root, "killed"))
    assert code == 0 and "resumed at step " in err
    assert read_digest(out) == uninterrupted
    check_metrics(root / "killed")


def test_a_done_run_says_so(root, uninterrupted):
    before = (root / "whole" / "report.json").read_bytes()
    code, out, err = finish(start(root, "whole"))
    assert code == 0 and read_digest(out) == uninterrupted
    assert "done already: see " in out and "train:" not in err
    assert (root / "whole" / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("workdir", "override", "message"),
    [
        ("fresh", "lrate=3", "got 'lrate'"),
        ("fresh", "optim.lrr=3", "'lrr' Did you mean \"lr\""),
        ("fresh", "data.size=(10,12)", "multiples of 4 (codec 4 x network 1), got 10 x 12"),
        ("fresh", "data.size=(8,12,3)", "size: height and width, or one number for both, got (8, 12, 3)"),
        ("fresh", "data.source=/nowhere", "found no folder /nowhere"),
        ("fresh", "sampling.solver=magic", "solver: one of"),
        ("fresh", "codec.name=vqgan", "codec.name: one of"),
        ("whole", "optim.lr=1.0", "a run goes on with the config it began with, changed: optim"),
    ],
)
def test_mistakes_are_one_line(root, uninterrupted, workdir, override, message):
    code, out, err = finish(start(root, workdir, override))
    assert code == 2 and "params_sha256" not in out
    lines = [line for line in err.splitlines() if line and "%|" not in line]  # without the bars
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (root / "fresh" / "config.json").exists()
