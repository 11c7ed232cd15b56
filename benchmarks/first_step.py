"""How long a run takes to its first step, with nothing compiled before and with JAX's cache of compiled programs.

python benchmarks/first_step.py --config=configs/quickstart.py [--config.KEY=VALUE ...]

Runs main.py twice in a process of its own, both times until the first step is logged; the data are prepared before.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

REPO = pathlib.Path(__file__).resolve().parent.parent


def run(argv: list[str], workdir: pathlib.Path, cache: pathlib.Path) -> tuple[float, float]:
    """Seconds until the training step is compiled, and until the first is done."""
    command = [sys.executable, "main.py", *argv, f"--workdir={workdir}", "--config.log_every=1"]
    env = os.environ | {"SEMFLOW_CACHE": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    compiled = next(time.perf_counter() - start for line in process.stderr if "compiled the training step" in line)
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text().strip():
        time.sleep(0.02)
    first = time.perf_counter() - start
    process.send_signal(signal.SIGTERM)
    process.communicate()
    return compiled, first


def main() -> None:
    argv = sys.argv[1:]
    if not any(arg.startswith("--config=") for arg in argv):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (root / "cache").mkdir()
        found = os.environ.get("SEMFLOW_CACHE", "~/.cache/semflow_jax")
        (root / "cache" / "data").symlink_to(pathlib.Path(found).expanduser() / "data")
        rows = {name: run(argv, root / name, root / "cache") for name in ("cold", "cached")}
    print(json.dumps({name: {"compiled": round(a, 1), "first_step": round(b, 1)} for name, (a, b) in rows.items()}))


if __name__ == "__main__":
    main()
