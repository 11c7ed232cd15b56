"""Training batches per second, here and in PyTorch: python benchmarks/input_pipeline.py --source DIR... --workdir DIR

Decode (JPEG of quality 95, PNG labels), random flip, random resized crop, colour jitter, batch; 512 x 512. Photos and
labels of DIR/images and DIR/labels are scaled to that once, and both sides read the same bytes: ours prepared records,
PyTorch's, in the usual way (a Dataset over files, Pillow, DataLoader), the same records written out as files. They take
turns (A B A B ...). Processor seconds are of all processes together; other programs disturb them less than wall time.
"""

import argparse
import io
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Iterator

import numpy as np
import psutil
import torch
from PIL import Image, ImageEnhance

from semflow_jax.data.builders import write_records
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.pipeline import make_train_iterator
from semflow_jax.data.records import open_records

SIZE, SCALE, RATIO, JITTER = 512, (0.3, 1.0), 4 / 3, 0.3


def prepare(sources: list[pathlib.Path], workdir: pathlib.Path, num: int) -> None:
    """Photos of all sources in turn -> `workdir/records`, and the same bytes as `workdir/files`."""
    (workdir / "files").mkdir(parents=True)
    examples = []
    for photos in zip(*(sorted((source / "images").iterdir())[:num] for source in sources), strict=False):
        for photo in photos:
            image, label = io.BytesIO(), io.BytesIO()
            scaled = Image.open(photo).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            scaled.save(image, "JPEG", quality=95)
            ids = Image.open(photo.parent.with_name("labels") / f"{photo.stem}.png")
            Image.fromarray(np.asarray(ids)).resize((SIZE, SIZE), Image.Resampling.NEAREST).save(label, "PNG")
            examples.append({"image": image.getvalue(), "label": label.getvalue(), "id": photo.stem})
    examples = examples[:num]
    for i, example in enumerate(examples):
        (workdir / "files" / f"{i:06}.jpg").write_bytes(example["image"])
        (workdir / "files" / f"{i:06}.png").write_bytes(example["label"])
    info = DataInfo("photos", class_names=tuple(str(i) for i in range(VOID)), size=(SIZE, SIZE))
    write_records(workdir / "records", info, {"train": examples})


class Files(torch.utils.data.Dataset):
    """As torchvision does it: RandomResizedCrop, RandomHorizontalFlip, ColorJitter and PILToTensor."""

    def __init__(self, folder: pathlib.Path):
        self.photos = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        photo = self.photos[index]
        image, label = Image.open(photo).convert("RGB"), Image.open(photo.with_suffix(".png"))

        def draw(low: float, high: float) -> float:
            return low + (high - low) * torch.rand(()).item()

        area, stretch = draw(*SCALE) * SIZE * SIZE, math.exp(draw(-math.log(RATIO), math.log(RATIO)))
        width, height = (min(SIZE, round(math.sqrt(area * x))) for x in (stretch, 1 / stretch))
        left, top = round(draw(0, SIZE - width)), round(draw(0, SIZE - height))
        box = (left, top, left + width, top + height)
        image = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        label = label.crop(box).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        if draw(0, 1) < 0.5:
            image, label = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, label))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(draw(1 - JITTER, 1 + JITTER))
        return {"image": torch.from_numpy(np.array(image)), "label": torch.from_numpy(np.array(label))[..., None]}


def read_torch(workdir: pathlib.Path, batch_size: int, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    loader = torch.utils.data.DataLoader(
        Files(workdir / "files"),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def read_ours(workdir: pathlib.Path, batch_size: int, workers: int) -> Iterator[dict[str, np.ndarray]]:
    options = {"crop_scale": SCALE, "crop_ratio": RATIO, "jitter": JITTER, "num_workers": workers}
    with make_train_iterator(workdir / "records", batch_size, **options) as batches:
        yield from batches


def processor_seconds() -> float:
    """Of this process and its workers."""
    main = psutil.Process()
    return sum(x.cpu_times().user + x.cpu_times().system for x in (main, *main.children(recursive=True)))


def measure(batches: Iterator, num: int, batch_size: int) -> dict[str, float]:
    """Images per second of wall time and of processor time, once the buffers are full."""
    for _ in range(4):
        next(batches)
    start, start_processor = time.perf_counter(), processor_seconds()
    for _ in range(num):
        batch = next(batches)
        assert batch["image"].shape == (batch_size, SIZE, SIZE, 3) and batch["label"].shape[:3] == (
            batch_size,
            SIZE,
            SIZE,
        )
    images = num * batch_size
    return {
        "wall": images / (time.perf_counter() - start),
        "processor": images / (processor_seconds() - start_processor),
    }


def check_pixels(workdir: pathlib.Path, num: int = 20) -> None:
    """Both sides decode the same pixels."""
    records = open_records(workdir / "records", "train")
    for i in range(num):
        for kind, suffix in (("image", "jpg"), ("label", "png")):
            pixels = np.asarray(Image.open(workdir / "files" / f"{i:06}.{suffix}"))
            assert np.array_equal(records[i][kind].squeeze(), pixels), f"{kind} {i}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, nargs="+", required=True, help="folders of photos and labels")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=16, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=pathlib.Path, help="file for the figures, json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.workdir.exists():
        prepare(args.source, args.workdir, args.images)
    check_pixels(args.workdir)
    sides = {"semflow_jax": read_ours, "torch": read_torch}
    rows = []
    for workers in args.workers:
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(args.turns):
            for name, read in sides.items():
                batches = read(args.workdir, args.batch, workers)
                turns[name].append(measure(batches, args.batches, args.batch))
                del batches  # ends the workers
        row: dict[str, object] = {"workers": workers, "turns": turns}
        for clock in ("wall", "processor"):
            ours, theirs = ([turn[clock] for turn in turns[name]] for name in sides)
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            row[clock] = [statistics.median(ours), statistics.median(theirs), ratio]
        rows.append(row)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {SIZE} x {SIZE}, medians of {args.turns} turns, images/s\n")
    print("| workers | clock | semflow_jax | torch | ratio |\n|---|---|---|---|---|")
    for row in rows:
        for clock in ("wall", "processor"):
            print("| {} | {} | {:.0f} | {:.0f} | {:.2f} |".format(row["workers"], clock, *row[clock]))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
