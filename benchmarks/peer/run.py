"""The official recipe in PyTorch (A) and ours (B) in turns, A B A B, with the same seconds of training:

SEMFLOW_SHARED=../shared python benchmarks/peer/run.py --data camvid --seconds 1800 --turns 2 --seeds 0,1,2

One process at a time, each on `--threads` processors. Both models go through the same `semflow evaluate`; compare two
of its results with `semflow compare`. The same command goes on where it was stopped. See README.md.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent.parent
FEATURES = "efficientnet_lite0"
ESPNET = "espnet_p_2_q_8_camvid.safetensors"
COLUMNS = {  # of a row of segmentation and one of synthesis
    "mIoU": lambda seg, syn: seg["miou"],
    "its ceiling": lambda seg, syn: seg["codec_ceiling_miou"],
    "accuracy": lambda seg, syn: seg["pixel_accuracy"],
    "Fréchet": lambda seg, syn: syn["distances"][FEATURES]["frechet"],
    "re-segmented": lambda seg, syn: syn["resegmentation_miou"],
    "diversity": lambda seg, syn: syn["diversity"],
    "ESPNet's mIoU": lambda seg, syn: syn["external"]["miou"] if "external" in syn else math.nan,
}


def numbers(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="of configs/: camvid, ccp_fashion; gives data, codec and width")
    parser.add_argument("--ours", type=pathlib.Path, help="another config of ours for the same data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our config")
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--turns", type=int, default=1, help="times that every seed is run")
    parser.add_argument("--seeds", type=numbers(int), default=[0], metavar="N,N")
    parser.add_argument("--lr", type=float, default=5e-5, help="the peer's")
    parser.add_argument("--batch-size", type=int, default=32, help="the peer's")
    parser.add_argument("--steps", type=numbers(int), default=[25], metavar="N,N", help="of Euler, for both")
    parser.add_argument("--limit", type=int, help="test images; default: all")
    parser.add_argument("--draws", type=int, default=8, help="perturbations of each mask that the peer learns from")
    parser.add_argument("--warmup", type=int, default=50, help="steps by which our speed is measured at first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/peer"))
    return parser.parse_args()


def call(*command: object) -> None:
    """Runs a program of this repository with this Python."""
    line = [sys.executable, *map(str, command)]
    print("$", *line[1:], flush=True)
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(line, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


class Race:
    """Both sides' runs, each in a folder of its own."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.config = REPO / "configs" / f"{args.data}.py"
        self.out = args.out / args.data
        self.latents = self.out / "latents"
        self.weights = pathlib.Path(os.environ["SEMFLOW_SHARED"], "weights").resolve()
        self.images_per_second = 0.0  # of ours, when last seen

    def run(self) -> None:
        args = self.args
        if not (self.latents / "train.npz").is_file():
            call(REPO / "benchmarks/peer/bridge.py", "export", self.config, self.latents, "--draws", args.draws)
        self.images_per_second = self.train_ours(self.out / "warmup", 0, args.warmup)["images_per_second"]
        for turn in range(args.turns):
            for seed in args.seeds:
                name = f"{turn}-{seed}"
                self.peer(self.out / f"peer-{name}", seed)
                self.ours(self.out / f"ours-{name}", seed)
                (self.out / "table.md").write_text(self.table())
        print(self.table())

    def peer(self, folder: pathlib.Path, seed: int) -> None:
        args = self.args
        if not (folder / "train.json").is_file():
            recipe = ["--seconds", args.seconds, "--lr", args.lr, "--batch-size", args.batch_size, "--seed", seed]
            call(REPO / "benchmarks/peer/official.py", self.latents, folder, *recipe, "--threads", args.threads)
        if not (folder / "export").is_dir():
            call(REPO / "benchmarks/peer/bridge.py", "adopt", self.config, self.latents, folder)
        self.evaluate(folder)

    def ours(self, folder: pathlib.Path, seed: int) -> None:
        batch_size = self.config_of(self.out / "warmup")["batch_size"]
        num_steps = max(1, round(self.images_per_second * self.args.seconds / batch_size))
        found = self.train_ours(folder, seed, num_steps)
        self.images_per_second = found["images_per_second"]
        (folder / "train.json").write_text(json.dumps(found, indent=1))
        self.evaluate(folder)

    def train_ours(self, folder: pathlib.Path, seed: int, num_steps: int) -> dict:
        """The schedule ends with the last step, so the budget is one of steps, by the speed of the run before."""
        if not (folder / "report.json").is_file():
            if (folder / "config.json").is_file():  # it was stopped, and goes on
                num_steps = self.config_of(folder)["num_steps"]
            whole = dict.fromkeys(("num_steps", "eval_every", "checkpoint_every"), num_steps)
            few = {"log_every": min(25, num_steps), "eval.limit": 2, "eval.limit_final": 2}
            options = [f"--config.{key}={value}" for key, value in (whole | few | {"seed": seed}).items()]
            options += [f"--config.{text}" for text in self.args.set]
            call(REPO / "main.py", f"--config={self.args.ours or self.config}", f"--workdir={folder}", *options)
        report = json.loads((folder / "report.json").read_text())
        return report["train"] | {"num_params": report["num_params"]}

    def config_of(self, folder: pathlib.Path) -> dict:
        return json.loads((folder / "config.json").read_text())

    def evaluate(self, folder: pathlib.Path) -> None:
        """Writes folder/result.json; with the outside judge's opinion, where it knows the classes."""
        args, data_dir = self.args, json.loads((self.latents / "data.json").read_text())["dir"]
        command = ["-m", "semflow_jax.cli", "evaluate", "--checkpoint", folder, "--data", data_dir, "--solver", "euler"]
        command += ["--steps", ",".join(map(str, args.steps)), "--sections", "segmentation,synthesis"]
        command += ["--features", f"{FEATURES}={self.weights / FEATURES / f'{FEATURES}_fp32.safetensors'}"]
        command += ["--out", folder / "result.json"] + (["--limit", args.limit] if args.limit else [])
        if args.data != "camvid":
            call(*command)
            return
        call(*command, "--pictures", folder / "pictures")
        for steps in args.steps:
            name, judge = f"euler-{steps}", self.weights / "espnet" / ESPNET
            places = folder / "pictures" / name, folder / "predictions" / name
            call(REPO / "benchmarks/espnet_predict.py", *places, "--weights", judge, "--glob", "*-0.png")
        call(*command, "--pictures", folder / "pictures", "--predictions", folder / "predictions")

    def table(self) -> str:
        """Means over the runs of each side, and how far they spread, by the number of steps."""
        lines = ["| | Euler steps | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
        notes = []
        for side in ("peer", "ours"):
            folders = [path.parent for path in sorted(self.out.glob(f"{side}-*/result.json"))]
            results = [json.loads((folder / "result.json").read_text()) for folder in folders]
            for steps in self.args.steps:
                pairs = [[pick(result[part], steps) for part in ("segmentation", "synthesis")] for result in results]
                cells = [mean_and_spread([figure(*pair) for pair in pairs]) for figure in COLUMNS.values()]
                lines.append(f"| {side} | {steps} | " + " | ".join(cells) + " |")
            trained = [json.loads((folder / "train.json").read_text()) for folder in folders]
            figures = {key: mean_and_spread([x[key] for x in trained], "{:.0f}") for key in ("seconds", "steps")}
            notes.append(
                f"{side}: {len(folders)} runs, {trained[0]['num_params']:,} parameters, "
                f"{figures['seconds']} seconds of training, {figures['steps']} steps"
            )
        return "\n".join([*lines, "", *notes]) + "\n"


def pick(rows: list[dict], steps: int) -> dict:
    return next(row for row in rows if row["steps"] == steps)


def mean_and_spread(values: list[float], form: str = "{:.4g}") -> str:
    """Mean and standard deviation of runs."""
    if any(map(math.isnan, values)):
        return "-"
    mean = form.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2g}"


def main() -> None:
    args = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # of what is started from here too
    Race(args).run()


if __name__ == "__main__":
    main()
