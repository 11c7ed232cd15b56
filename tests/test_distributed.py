"""main.py in several processes that find each other over loopback: what they compute, and how they end.

Two or four processes of two devices each, on this machine's processor; the parameters are in four shards.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import virtual_devices
from test_folder import make_folder

from semflow_jax import parallel
from semflow_jax.data.records import open_records

REPO = pathlib.Path(__file__).resolve().parent.parent
NUM_STEPS = 8
FLAGS = {
    "num_steps": NUM_STEPS,
    "batch_size": 16,
    "cpu_devices": 2,
    "mesh.fsdp": 4,
    "data.name": "folder",
    "data.size": (8, 16),
    "data.num_train": 20,
    "data.num_val": 5,
    "model.block_out_channels": (48,),  # fewer would be too small to be split
    "model.attention": (False,),
    "model.num_heads": (2,),
    "model.num_groups": 4,
    "optim.flatten": False,
    "optim.warmup": 2,
    "sampling.steps": 1,
    "eval.batch_size": 8,
    "eval.limit": 5,
    "eval.num_samples": 2,
    "eval.gallery": 2,
    "log_every": 1,
    "eval_every": NUM_STEPS,
    "checkpoint_every": 2,
}
ALONE = ("cpu_devices=1", "mesh.fsdp=1")
GONE = 30  # seconds in which the others end when one is lost

pytestmark = pytest.mark.slow


class Job:
    """`main.py` under launch/local.sh, or one process of it without."""

    def __init__(self, workdir: pathlib.Path, num: int, *overrides: str, restarts: int = 0, cluster=None):
        flags = FLAGS | {"data.source": workdir.parent / "toys"} | dict(entry.split("=") for entry in overrides)
        values = [f"--config.{key}={str(value).replace(' ', '')}" for key, value in flags.items()]
        main = [sys.executable, "main.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *values]
        launcher = ["bash", "launch/local.sh", str(num), f"--max-restarts={restarts}", "--"]
        self.workdir = workdir
        self.alone = cluster is not None
        self.log = workdir.parent / f"{workdir.name}-{time.time_ns()}.log"
        env = {"SEMFLOW_CACHE": str(workdir.parent / "cache"), "PYTHON": sys.executable} | (cluster or {})
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                main if self.alone else launcher + main,
                cwd=REPO,
                env=os.environ | env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        while self.process.poll() is None:  # the launcher kills all when it is interrupted twice
            self.process.send_signal(signal.SIGKILL if self.alone else signal.SIGINT)
            time.sleep(0.5)

    def wait_for_checkpoint(self, step: int) -> None:
        """Until a checkpoint is whole and a step was taken after it."""
        path = self.workdir / "checkpoints" / str(step)
        while not (path.exists() and max(losses(self.workdir), default=0) >= step):
            assert self.process.poll() is None, self.text()
            time.sleep(0.005)

    def pid(self, index: int) -> int:
        """Of the process with this number."""
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = f"--workdir={self.workdir}".encode() in (path / "cmdline").read_bytes().split(b"\0")
                if ours and f"JAX_PROCESS_ID={index}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    return int(path.name)
        raise AssertionError(f"no process {index}: {self.text()}")

    def end(self, timeout: float = 600) -> int:
        return self.process.wait(timeout)

    def text(self) -> str:
        return self.log.read_text().replace("\r", "\n")

    def lines(self, part: str) -> list[str]:
        return [line for line in self.text().splitlines() if part in line]


def run(workdir: pathlib.Path, num: int, *overrides: str, code: int = 0, restarts: int = 0) -> Job:
    """A job from its start to its end."""
    with Job(workdir, num, *overrides, restarts=restarts) as job:
        assert job.end() == code, job.text()
    return job


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """By step."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may not be whole yet
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def report(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "report.json").read_text())


def check_losses(found: pathlib.Path, expected: pathlib.Path) -> None:
    found, expected = losses(found), losses(expected)
    assert list(found) == list(expected) == list(range(1, NUM_STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def steps_of(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Raw files, and a cache of prepared data and compiled programs, empty at first, that all jobs share."""
    root = tmp_path_factory.mktemp("distributed")
    make_folder(root / "toys", 30, size=(8, 16))
    return root


@pytest.fixture(scope="module")
def two(root):
    """Two processes that nothing happens to; the first job, which also prepares the data."""
    return run(root / "two", 2)


@pytest.fixture(scope="module")
def four(root, two):
    return run(root / "four", 4)


@pytest.fixture(scope="module")
def one(root, two):
    return run(root / "one", 1, *ALONE)


@pytest.fixture(scope="module")
def stopped(root, two):
    """SIGTERM to one of two processes."""
    with Job(root / "stopped", 2, "checkpoint_every=1") as job:  # time to hear it, the others listen once a second
        job.wait_for_checkpoint(1)
        os.kill(job.pid(1), signal.SIGTERM)
        assert job.end() == 0, job.text()
    return job


def test_several_processes_prepare_the_data_once(two):
    assert len(two.lines("write train: 100%")) >= 1
    assert len({line.split()[0] for line in two.lines("write train: 100%")}) == 1
    assert len(two.lines("already prepared with these arguments")) == 1


@pytest.mark.parametrize("name", ["two", pytest.param("four", marks=pytest.mark.long)])
def test_losses_are_those_of_one_process(name, one, request):
    job = request.getfixturevalue(name)
    check_losses(job.workdir, one.workdir)
    assert len(set(losses(job.workdir).values())) == NUM_STEPS
    assert len(job.lines("params_sha256 ")) == len(job.lines("report: ")) == 1
    for path in ("report.html", "gallery.png", "export/model.safetensors", "export/README.md"):
        assert (job.workdir / path).stat().st_size > 0


def continued(job: Job, name: str, num: int, *overrides: str) -> Job:
    """The run of a job goes on, elsewhere, from its last checkpoint."""
    workdir = job.workdir.with_name(name)
    shutil.copytree(job.workdir, workdir, ignore=shutil.ignore_patterns("report.*"))
    return run(workdir, num, *overrides)


@pytest.mark.long
def test_one_process_reads_and_evaluates_what_two_have_trained(two):
    alone = continued(two, "two-alone", 1, *ALONE)
    found, expected = report(alone.workdir), report(two.workdir)
    assert alone.lines(f"resumed at step {NUM_STEPS} of {NUM_STEPS}")
    assert found["params_sha256"] == expected["params_sha256"]
    assert found["segmentation"] == expected["segmentation"]


def read_digests(workdir: str, step: int) -> list[str]:
    """Of the parameters as 1, 2, 4 and 8 devices read them."""
    found = []
    for num in (1, 2, 4, 8):
        mesh = parallel.make_mesh({"fsdp": num}, jax.devices()[:num])
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(pathlib.Path(workdir, "checkpoints"), item_handlers=handlers) as manager:
            shapes = manager.item_metadata(step)["state"]
            layout = parallel.shardings(shapes, mesh)
            state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
            restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))
        found.append(parallel.digest(restored["state"]["params"]))
    return found


@pytest.mark.long
def test_any_number_of_devices_reads_what_processes_have_saved(two, four):
    for job in (two, four):
        saved = report(job.workdir)["params_sha256"]
        assert virtual_devices.run("test_distributed", "read_digests", str(job.workdir), NUM_STEPS) == [saved] * 4


def test_sigterm_to_one_process_saves_and_ends_all(stopped):
    (line,) = {line.split("] ")[1] for line in stopped.lines("saved step ")}
    step = int(re.search(r"saved step (\d+)", line)[1])
    assert 1 <= step < NUM_STEPS and steps_of(stopped.workdir)[-1] == step == max(losses(stopped.workdir))
    assert not (stopped.workdir / "report.json").exists()
    assert not stopped.lines("Traceback") and not stopped.lines("local.sh")


@pytest.mark.parametrize(("num", "overrides"), [(1, ALONE), pytest.param(4, (), marks=pytest.mark.long)])
def test_a_stopped_run_goes_on_with_another_number_of_processes(num, overrides, stopped, two):
    job = continued(stopped, f"stopped-{num}", num, *overrides)
    assert job.lines(f"resumed at step {steps_of(stopped.workdir)[-1]} of {NUM_STEPS}")
    check_losses(job.workdir, two.workdir)


@pytest.mark.long
def test_a_killed_process_ends_the_others_and_the_launcher_starts_again(root, two):
    with Job(root / "killed", 2, restarts=1) as job:
        job.wait_for_checkpoint(2)
        os.kill(job.pid(1), signal.SIGKILL)
        start = time.monotonic()
        while not job.lines("starting again from the last checkpoint, 1 of 1"):
            assert job.process.poll() is None, job.text()
            time.sleep(0.1)
        assert time.monotonic() - start < GONE
        assert job.end() == 0, job.text()
    assert len(job.lines("local.sh: process 1 ended with SIGKILL; the others get SIGTERM")) == 1
    assert job.lines("resumed at step ")
    assert report(job.workdir)["params_sha256"] == report(two.workdir)["params_sha256"]
    check_losses(job.workdir, two.workdir)


@contextlib.contextmanager
def without_launcher(workdir: pathlib.Path, *overrides: tuple[str, ...]) -> Iterator[list[Job]]:
    """A process each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(overrides))}
    with contextlib.ExitStack() as stack:
        clusters = [shared | {"JAX_PROCESS_ID": str(i)} for i in range(len(overrides))]
        jobs = [Job(workdir, 0, *ours, cluster=cluster) for ours, cluster in zip(overrides, clusters, strict=True)]
        yield [stack.enter_context(job) for job in jobs]


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_processes_end_by_themselves_when_one_is_lost(lost, root, two):
    with without_launcher(root / f"lost-{lost}", (), ()) as jobs:
        jobs[lost].wait_for_checkpoint(2)
        jobs[lost].process.kill()
        code = jobs[1 - lost].end(GONE)
    assert code not in (0, 2)
    assert jobs[1 - lost].lines("Connection reset by peer") or jobs[1 - lost].lines("another task died")


@pytest.mark.long
def test_processes_end_by_themselves_when_one_has_an_error_of_its_own(root, two):
    with without_launcher(root / "differ", (), ("optim.schedule=magic",)) as jobs:
        assert jobs[1].end() == 2 and len(jobs[1].lines("error: optim.schedule: one of")) == 1
        assert jobs[0].end(GONE) not in (0, 2)


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_all(root, two):
    workdir = root / "nan"
    job = run(workdir, 2, "optim.lr=1e30", "checkpoint_every=1", code=2, restarts=3)
    messages = {line.split("] ")[1] for line in job.lines("error: ")}
    (message,) = messages
    step = int(re.search(r"error: step (\d+): loss and gradient must be finite", message)[1])
    assert job.lines("local.sh: an error of the user: not started again") and not job.lines("Traceback")
    found = json.loads((workdir / "nonfinite.json").read_text())
    assert found["step"] == step and len(found["ids"]) == 16
    (data_dir,) = (root / "cache" / "data").iterdir()
    records = open_records(data_dir, "train")
    assert set(found["ids"]) <= {records[i]["id"] for i in range(len(records))}
    last = steps_of(workdir)[-1]
    assert last < step
    assert len(set(virtual_devices.run("test_distributed", "read_digests", str(workdir), last))) == 1


@pytest.mark.long
def test_a_hang_ends_all(root, two):
    with Job(root / "hung", 2, "hang_seconds=20") as job:
        job.wait_for_checkpoint(2)
        os.kill(job.pid(1), signal.SIGSTOP)
        code = job.end(3 * GONE)
    assert code not in (0, 2) and job.lines("local.sh: failed 1 times")
    assert job.lines("(most recent call first):") and job.lines("train/loop.py")


@pytest.mark.long
def test_a_done_job_says_so_in_all_processes(root, two):
    before = (two.workdir / "report.json").read_bytes()
    job = run(two.workdir, 2)
    assert len(job.lines("done already: see ")) == 1 and not job.lines("train:")
    assert (two.workdir / "report.json").read_bytes() == before
