"""Runs a function of a test file in a process of its own, where the processor is eight devices."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any


def run(module: str, function: str, *args: Any, num: int = 8, timeout: int = 900) -> Any:
    """What `function` of tests/`module`.py returns, by way of JSON."""
    here = pathlib.Path(__file__).parent
    call = f"{module}.{function}(*json.loads({json.dumps(args)!r}))"
    script = f"import json, {module}; print(json.dumps({call}))"
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num}",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
