"""Where numbers go: `metrics.jsonl` always, TensorBoard event files where tensorboardX is installed.

clu's own metric writers need TensorFlow; tensorboardX writes the same event files without it.
"""

import json
import pathlib

import numpy as np


class Writer:
    """Scalars and pictures by step. A resumed run first forgets what lies beyond its step."""

    def __init__(self, workdir: pathlib.Path, step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """image: uint8 [h w 3]."""
        if self.board is not None:
            self.board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, int | float]]:
    """Rows of `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
