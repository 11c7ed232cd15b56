"""One option changed at a time, from configs/semflow_plus.py, at equal steps of training on one processor:

SEMFLOW_SHARED=../shared taskset -c 0 python benchmarks/ablations.py --data camvid --steps 150 --seeds 0,1,2

Reflow goes on for as long again with the first row's flow. The seconds of training stand in the table, with those of
learning a mask code and without compilation. Every run is a line of OUT/DATA.jsonl, and runs that are in it are not run
again; the table of all lines is printed at the end, and at once with `--seeds ''`.
"""

import argparse
import ast
import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
from typing import Any

import jax
from ml_collections import ConfigDict

from semflow_jax import parallel
from semflow_jax.arguments import words
from semflow_jax.config_file import load_config
from semflow_jax.evaluate.features import load_features
from semflow_jax.evaluate.judges import Judges
from semflow_jax.evaluate.output import mean_and_spread
from semflow_jax.evaluate.runner import Setting
from semflow_jax.pipeline import SemFlow
from semflow_jax.train import loop
from semflow_jax.train.setup import Setup, make_setup
from semflow_jax.train.writer import read_metrics

REPO = pathlib.Path(__file__).resolve().parent.parent
FEATURES = "efficientnet_lite0"
COLOUR = {"mask_code.name": "colour", "mask_code.pixel": 0.1, "data.mask_draws": 2}  # encoding takes minutes
FIRST = "semflow_plus"
NETWORK = {"mask_code.learned.encoder": "network", "mask_code.learned.steps": 300}
ROWS: dict[str, dict[str, Any]] = {
    FIRST: {},
    "mask code: grid colours": COLOUR | {"mask_code.palette": "grid"},
    "mask code: spread colours": COLOUR,
    "mask code: balanced spread colours": COLOUR | {"mask_code.balance": "minmax"},
    "mask code: learned both ways": NETWORK,
    "mask code: learned with noise channels": NETWORK | {"mask_code.learned.noise_channels": 16},
    "perturbation: 0.1": {"mask_code.pixel": 0.1},
    "objective: SymmFlow": {"objective": "symmflow"},
    "times: logit-normal": {"loss.time_sampling": "logit_normal"},
    "times: mode": {"loss.time_sampling": "mode"},
    "times: u-shaped": {"loss.time_sampling": "u_shaped"},
    "loss: pseudo-Huber": {"loss.kind": "huber"},
    "loss: void pixels too": {"loss.mask_void": False},
    "average of weights: none": {"optim.ema": 0.0},
    "few steps: shortcut": {"model.intervals": True, "loss.shortcut_every": 4},
    "few steps: reflow": {"reflow.share": 0.5, "reflow.steps": 8},
    "sampling: class-balanced": {"data.balance": 0.5},
    "network: without skip": {"model.skip": False},
}
STEPS = (1,), (4,)  # Euler's, of segmentation and of synthesis
FEW_STEPS = (1, 25), (1, 2, 4, 25)  # in the rows that are about few steps, and the first


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="camvid", help="of configs/: camvid, ccp_fashion")
    parser.add_argument("--rows", type=words(tuple(ROWS)), default=list(ROWS), metavar="ROW,ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in all rows")
    parser.add_argument("--limit", type=int, default=32, help="test images")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/ablations"))
    return parser.parse_args()


def make_config(args: argparse.Namespace, row: str, seed: int, init: str = "") -> ConfigDict:
    """The config of a run, evaluated by this program alone."""
    c = load_config(REPO / f"configs/semflow_plus.py:{args.data}").unlock()
    whole = dict.fromkeys(("num_steps", "eval_every", "checkpoint_every"), args.steps)
    given = {key: ast.literal_eval(value) for key, value in (text.split("=", 1) for text in args.set)}
    few = {"eval.limit": 2, "eval.num_samples": 2, "sampling.steps": 1}  # the one validation is of no use here
    fixed = {"seed": seed, "init": init, "cpu_devices": 1, "log_every": min(25, args.steps)} | few
    c.update_from_flattened_dict(ROWS[row] | whole | fixed | given)
    return c.lock()


def train(c: ConfigDict, workdir: pathlib.Path) -> tuple[Setup, Any, float]:
    """A run that is not kept: the setup, its averaged parameters, and the seconds that it took."""
    shutil.rmtree(workdir, ignore_errors=True)
    setup = make_setup(c, workdir)
    state = loop.train(setup, workdir)
    return setup, state["ema"], loop.summarize(read_metrics(workdir))["seconds"] + setup.code_seconds


def run(args: argparse.Namespace, row: str, seed: int, workdir: pathlib.Path) -> dict[str, float]:
    """Trains and evaluates."""
    teacher = ""
    if "reflow.share" in ROWS[row]:
        setup, params, _ = train(make_config(args, FIRST, seed), workdir)
        teacher = str(workdir.with_name(f"{workdir.name}-teacher"))
        SemFlow(setup.model, params, setup.sampler.codec, setup.sampler.code).save_pretrained(teacher)
    setup, params, seconds = train(make_config(args, row, seed, teacher), workdir)
    judges = Judges([load_features(FEATURES, weights(f"{FEATURES}/{FEATURES}_fp32.safetensors"))], None, setup.mesh)
    inputs = params, setup.sampler.frozen, setup.final_split, args.limit
    figures: dict[str, float] = {"seconds": seconds}
    for_segmentation, for_synthesis = FEW_STEPS if row == FIRST or row.startswith("few steps") else STEPS
    for steps in for_segmentation:
        seen = setup.evaluator.segmentation(*inputs, setting=Setting("euler", steps))
        figures |= {f"miou_{steps}": seen["miou"], f"calibration_{steps}": seen["calibration_error"]}
        figures["ceiling"] = seen["codec_ceiling_miou"]
    for steps in for_synthesis:
        made = setup.evaluator.synthesis(*inputs, setting=Setting("euler", steps), judge=judges.look)
        figures[f"frechet_{steps}"] = judges.figures(made["judged"])["distances"][FEATURES]["frechet"]
        figures |= {f"resegmentation_{steps}": made["resegmentation_miou"], f"diversity_{steps}": made["diversity"]}
    return figures


def weights(name: str) -> pathlib.Path:
    return pathlib.Path(os.environ["SEMFLOW_SHARED"], "weights", name)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of each row."""
    columns = {
        "mIoU, 1 step": "miou_1",
        "25 steps": "miou_25",
        "ceiling": "ceiling",
        "calibration error": "calibration_1",
        "Fréchet, 1 step": "frechet_1",
        "2 steps": "frechet_2",
        "4 steps": "frechet_4",
        "25 steps ": "frechet_25",
        "re-segmented, 4 steps": "resegmentation_4",
        "diversity, 4 steps": "diversity_4",
        "seconds": "seconds",
    }
    text = [f"| | {' | '.join(columns)} | runs |", "|---" * (len(columns) + 2) + "|"]
    for row in ROWS:
        found = [line for line in lines if line["row"] == row]
        if found:
            cells = [mean_and_spread([line.get(key, math.nan) for line in found]) for key in columns.values()]
            text.append(f"| {row} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(text)


def main() -> None:
    args = parse()
    parallel.keep_compilations()
    logging.getLogger("absl").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.data}.jsonl"
    kind = {"steps": args.steps, "limit": args.limit, "set": args.set}
    for seed in [int(text) for text in args.seeds.split(",") if text]:
        for row in args.rows:
            key = {"row": row, "seed": seed} | kind
            if any(key.items() <= line.items() for line in read(path)):
                continue
            with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
                found = run(args, row, seed, args.out / f"{args.data}-{os.getpid()}")
            with path.open("a") as file:
                file.write(json.dumps(key | found) + "\n")
            print(row, seed, {name: round(x, 4) for name, x in found.items() if isinstance(x, float)}, flush=True)
            jax.clear_caches()
    print(table(read(path)))


if __name__ == "__main__":
    main()
