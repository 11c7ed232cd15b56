"""Stable Diffusion 1.5's UNet from a safetensors file to the device, here and in PyTorch: seconds and memory.

python benchmarks/load_weights.py [--repeats 3] [--json FILE]      needs torch and diffusers; writes 3.4 GB to $TMPDIR

Each load is a process of its own, in the order A B A B. Memory is the peak of anonymous pages, imports taken off: pages
of the mapped file are the system's to drop.
"""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

COMMON = """
import json, sys, threading, time

def anonymous():
    return next(int(line.split()[1]) / 2**20 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def measure(load):
    done, seen, before = threading.Event(), [], anonymous()
    def watch():
        while not done.wait(0.005):
            seen.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    print(json.dumps({"seconds": seconds, "peak_gib": max(seen) - before, "kept": len(kept)}))
"""

OURS = """
import pathlib
import jax, jax.numpy as jnp
from semflow_jax.weights.stable_diffusion import load_unet
jnp.zeros(1).block_until_ready()
measure(lambda: jax.block_until_ready(load_unet(pathlib.Path(sys.argv[1]), put=jnp.asarray)[1]))
"""

TORCH = """
import diffusers, torch
measure(lambda: diffusers.UNet2DConditionModel.from_pretrained(sys.argv[1] + "/unet").state_dict())
"""


def write(folder: pathlib.Path) -> None:
    """A UNet of random numbers, in a process of its own so that its memory is gone afterwards."""
    code = f"""
import pathlib, numpy as np
from semflow_jax.models.build import abstract_unet
from semflow_jax.models.unet_config import UNetConfig
from semflow_jax.weights.stable_diffusion import save_diffusers
rng = np.random.default_rng(0)
params = {{k: rng.standard_normal(x.shape, np.float32) for k, x in abstract_unet(UNetConfig()).items()}}
save_diffusers(pathlib.Path({str(folder)!r}), (UNetConfig(), params))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    found: dict[str, list[dict]] = {"semflow_jax": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder))
        for _ in range(args.repeats + 1):  # the first round fills the page cache
            for name, code in (("semflow_jax", OURS), ("diffusers", TORCH)):
                command = [sys.executable, "-W", "ignore", "-c", COMMON + code, folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {
        name: {key: statistics.median(row[key] for row in rows[1:]) for key in ("seconds", "peak_gib")}
        for name, rows in found.items()
    }
    print(f"860M parameters, float32, 3.20 GiB; {platform.machine()}, medians of {args.repeats}\n")
    print("| | seconds | peak of anonymous memory, GiB |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.1f} | {row['peak_gib']:.2f} |")
    print(f"\nratio of seconds: {rows['semflow_jax']['seconds'] / rows['diffusers']['seconds']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows | {"runs": found}, indent=2))


if __name__ == "__main__":
    main()
