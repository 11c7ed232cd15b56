"""The official recipe in PyTorch and ours side by side, with the same seconds of training:

SEMFLOW_SHARED=../shared python benchmarks/peer/run.py --data camvid --seconds 240 --seeds 0,1,2

There are two peers: `official` as it is, `tuned` with a learning rate and a batch that suit a network which begins with
nothing. Two runs are under way at any time, each on one half of the processors; one, where `taskset` leaves one
processor. All models go through the same `semflow evaluate`. The same command goes on where it was stopped.
See README.md.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import pathlib
import queue
import subprocess
import sys

from semflow_jax.arguments import words
from semflow_jax.evaluate.output import mean_and_spread

REPO = pathlib.Path(__file__).resolve().parent.parent.parent
FEATURES = "efficientnet_lite0"
ESPNET = "espnet_p_2_q_8_camvid.safetensors"
PEERS = {"official": ("5e-5", "32"), "tuned": ("1e-3", "16")}  # learning rate and batch size
SIDES = (*PEERS, "ours")
PARTS = ("segmentation", "synthesis")
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
    parser.add_argument("--ours", default="configs/semflow_plus.py:{data}", help="our config; default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our config")
    parser.add_argument("--seconds", type=float, required=True, help="of training, that of our mask code included")
    parser.add_argument("--sides", type=words(SIDES), default=list(SIDES), metavar="A,B", help=", ".join(SIDES))
    parser.add_argument("--seeds", type=numbers(int), default=[0], metavar="N,N")
    parser.add_argument("--steps", type=numbers(int), default=[25], metavar="N,N", help="of Euler, for all")
    parser.add_argument("--adams", type=numbers(int), default=[], metavar="N,N", help="of Adams-Bashforth, for ours")
    parser.add_argument("--limit", type=int, help="test images; default: all")
    parser.add_argument("--num-samples", type=int, default=2, help="images of each mask")
    parser.add_argument("--draws", type=int, default=4, help="perturbations of each mask that the peers learn from")
    parser.add_argument("--warmup", type=int, default=30, help="steps by which our speed is measured")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/peer"))
    return parser.parse_args()


def halves() -> list[list[int]]:
    """The processors, for two runs at a time; one run at a time where there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return [cores[:half], cores[half:]] if half else [cores]


class Race:
    """The runs of all sides, each in a folder of its own."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.config = REPO / "configs" / f"{args.data}.py"
        self.ours_config = str(REPO / args.ours.format(data=args.data))
        self.out = args.out.resolve() / args.data
        self.latents = self.out / "latents"
        self.weights = pathlib.Path(os.environ["SEMFLOW_SHARED"], "weights").resolve()

    def run(self) -> None:
        if not (self.latents / "train.npz").is_file():
            self.call(
                None, "benchmarks/peer/bridge.py", "export", self.config, self.latents, "--draws", self.args.draws
            )
        free: queue.Queue[list[int]] = queue.Queue()
        for cores in halves():
            free.put(cores)

        def run(seed: int, side: str) -> None:
            cores = free.get()
            try:
                getattr(self, "ours" if side == "ours" else "peer")(side, self.out / f"{side}-{seed}", seed, cores)
            finally:
                free.put(cores)

        with concurrent.futures.ThreadPoolExecutor(len(halves())) as pool:
            jobs = [pool.submit(run, *job) for job in itertools.product(self.args.seeds, self.args.sides)]
            for job in concurrent.futures.as_completed(jobs):
                job.result()
                (self.out / "table.md").write_text(self.table())
        print(self.table())

    def call(self, cores: list[int] | None, *command: object) -> None:
        """Runs a program of this repository with this Python, on these processors only."""
        line = [sys.executable, *map(str, command)]
        print("$", *line[1:], flush=True)
        paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
        running = subprocess.Popen(line, cwd=REPO, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        if cores is not None:
            os.sched_setaffinity(running.pid, cores)
        if running.wait():
            raise subprocess.CalledProcessError(running.returncode, line)

    def peer(self, side: str, folder: pathlib.Path, seed: int, cores: list[int]) -> None:
        args = self.args
        if not (folder / "train.json").is_file():
            lr, batch_size = PEERS[side]
            recipe = ["--seconds", args.seconds, "--lr", lr, "--batch-size", batch_size, "--seed", seed]
            self.call(cores, "benchmarks/peer/official.py", self.latents, folder, *recipe, "--threads", len(cores))
        if not (folder / "export").is_dir():
            self.call(cores, "benchmarks/peer/bridge.py", "adopt", self.config, self.latents, folder)
        self.evaluate(side, folder, cores)

    def ours(self, side: str, folder: pathlib.Path, seed: int, cores: list[int]) -> None:
        if not (folder / "train.json").is_file():
            found = self.train_ours(folder, seed, self.num_steps(folder, seed, cores), cores)
            found["seconds"] += found["code_seconds"]
            (folder / "train.json").write_text(json.dumps(found, indent=1))
        self.evaluate(side, folder, cores)

    def num_steps(self, folder: pathlib.Path, seed: int, cores: list[int]) -> int:
        """Those of another seed's run; for the first, as many as a short run says that the budget has time for."""
        if known := sorted(self.out.glob("ours-*/train.json")):
            return json.loads(known[0].read_text())["steps"]
        warm = folder.with_name(f"warm-{folder.name}")
        found = self.train_ours(warm, seed, self.args.warmup, cores)
        left = self.args.seconds - found["code_seconds"]
        return max(1, round(found["images_per_second"] * left / self.config_of(warm)["batch_size"]))

    def train_ours(self, folder: pathlib.Path, seed: int, num_steps: int, cores: list[int]) -> dict:
        """The schedule ends with the last step, so the budget is one of steps."""
        if not (folder / "report.json").is_file():
            if (folder / "config.json").is_file():  # it was stopped, and goes on
                num_steps = self.config_of(folder)["num_steps"]
            whole = dict.fromkeys(("num_steps", "eval_every", "checkpoint_every"), num_steps)
            own = {"seed": seed, "cpu_devices": len(cores)}
            few = {"log_every": min(25, num_steps), "eval.limit": 2, "eval.limit_final": 2}
            options = [f"--config.{key}={value}" for key, value in (whole | few | own).items()]
            options += [f"--config.{text}" for text in self.args.set]
            self.call(cores, "main.py", f"--config={self.ours_config}", f"--workdir={folder}", *options)
        report = json.loads((folder / "report.json").read_text())
        return report["train"] | {"num_params": report["num_params"]}

    def config_of(self, folder: pathlib.Path) -> dict:
        return json.loads((folder / "config.json").read_text())

    def solvers(self, side: str) -> dict[str, list[int]]:
        """Each with its numbers of steps. The official recipe has Euler alone."""
        adams = {"adams": self.args.adams} if side == "ours" and self.args.adams else {}
        return {"euler": self.args.steps} | adams

    def rows(self, side: str) -> list[tuple[str, int]]:
        """Solver and steps of each row of a result."""
        return [(solver, steps) for solver, many in self.solvers(side).items() for steps in many]

    def evaluate(self, side: str, folder: pathlib.Path, cores: list[int]) -> None:
        """Writes folder/result.json; with the outside judge's opinion, where it knows the classes."""
        args, data_dir = self.args, json.loads((self.latents / "data.json").read_text())["dir"]
        command = ["-m", "semflow_jax.cli", "evaluate", "--checkpoint", folder, "--data", data_dir]
        command += ["--sections", ",".join(PARTS)]
        command += ["--features", f"{FEATURES}={self.weights / FEATURES / f'{FEATURES}_fp32.safetensors'}"]
        command += ["--time", "--num-samples", args.num_samples, "--out", folder / "result.json"]
        command += ["--limit", args.limit] if args.limit else []
        judged = args.data == "camvid"
        command += ["--pictures", folder / "pictures"] if judged else []
        commands = [
            [*command, "--solver", solver, "--steps", ",".join(map(str, steps))]
            for solver, steps in self.solvers(side).items()
        ]
        for command in commands:
            self.call(cores, *command)
        if not judged:
            return
        for solver, steps in self.rows(side):
            name, judge = f"{solver}-{steps}", self.weights / "espnet" / ESPNET
            places = folder / "pictures" / name, folder / "predictions" / name
            if not places[1].is_dir():
                self.call(cores, "benchmarks/espnet_predict.py", *places, "--weights", judge, "--glob", "*-0.png")
        self.call(cores, *commands[-1], "--predictions", folder / "predictions")

    def is_whole(self, side: str, result: dict) -> bool:
        """Rows are written as they are done, and another run may be under way."""
        return all(pick(result[part], *row) for part in PARTS for row in self.rows(side))

    def table(self) -> str:
        """Means over the runs of each side, and how far they spread, by the number of steps."""
        lines = ["| | steps | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
        notes = []
        for side in SIDES:
            found = {
                path.parent: json.loads(path.read_text()) for path in sorted(self.out.glob(f"{side}-*/result.json"))
            }
            runs = {folder: result for folder, result in found.items() if self.is_whole(side, result)}
            if not runs:
                continue
            for row in self.rows(side):
                pairs = [[pick(result[part], *row) for part in PARTS] for result in runs.values()]
                cells = [mean_and_spread([figure(*pair) for pair in pairs]) for figure in COLUMNS.values()]
                lines.append(f"| {side} | {row[0].capitalize()}, {row[1]} | " + " | ".join(cells) + " |")
            trained = [json.loads((folder / "train.json").read_text()) for folder in runs]
            figures = {key: mean_and_spread([x[key] for x in trained], "{:.0f}") for key in ("seconds", "steps")}
            notes.append(
                f"{side}: {len(runs)} runs, {trained[0]['num_params']:,} parameters, "
                f"{figures['seconds']} seconds of training, {figures['steps']} steps"
            )
        return "\n".join([*lines, "", *notes]) + "\n"


def pick(rows: list[dict], solver: str, steps: int) -> dict:
    return next((row for row in rows if (row["solver"], row["steps"]) == (solver, steps)), {})


def main() -> None:
    Race(parse()).run()


if __name__ == "__main__":
    main()
