"""`semflow inspect`: what a prepared folder holds, in words, numbers and pictures."""

import os
import pathlib

import numpy as np
from PIL import Image, ImageDraw

from semflow_jax.data.builders import digest_file
from semflow_jax.data.info import VOID, DataInfo
from semflow_jax.data.records import Records, count_pixels, count_records, load_info, open_records, spread_indices
from semflow_jax.errors import UserError

NUM_INSPECTED = 1000  # examples of a split whose pixels are counted
SHEET_ROWS, SHEET_COLUMNS, SHEET_TILE = 6, 3, 128  # pairs down, pairs across, pixels a tile is at least high


def inspect(data_dir: str | os.PathLike, sheet: str | os.PathLike | None = None, verify: bool = False) -> None:
    """Print what a prepared folder holds; draw images beside their labels into the PNG file `sheet`.

    Raises:
        UserError: not a prepared folder; with `verify`, a file that is missing or not as it was written.
    """
    info = load_info(data_dir)
    if verify:
        _verify(pathlib.Path(data_dir), info)
        print(f"all {len(info.checksums)} files are as they were written")
    lengths = count_records(data_dir)
    records = {split: open_records(data_dir, split) for split in lengths}
    print(f"{data_dir}: {info.name}, {info.size[0]} x {info.size[1]}, {info.num_classes} classes")
    for key, value in (("licence", info.license), ("credit", info.attribution)):
        if value:
            print(f"{key}: {value}")
    print("examples: " + ", ".join(f"{split} {num}" for split, num in lengths.items()))
    counts = {split: count_pixels(source, 256, NUM_INSPECTED) for split, source in records.items()}
    shares = {split: pixels / pixels.sum() for split, pixels in counts.items()}
    width = max(len(name) for name in (*info.class_names, "void"))
    print(f"share of the pixels, %, in up to {NUM_INSPECTED} examples of a split")
    print(f"{'id':>3}  {'class':{width}}" + "".join(f"{split:>8}" for split in shares))
    for i, name in (*enumerate(info.class_names), (VOID, "void")):
        print(f"{i:3}  {name:{width}}" + "".join(f"{100 * share[i]:8.2f}" for share in shares.values()))
    if info.skipped:
        print(f"{info.skipped} raw examples were left out, see skipped.json")
    for left, right in info.flip_pairs:
        print(f"a flip swaps {info.class_names[left]} and {info.class_names[right]}")
    if sheet is not None:
        _draw_sheet(info, next(iter(records.values()))).save(sheet)
        print(f"contact sheet: {sheet}")


def _verify(data_dir: pathlib.Path, info: DataInfo) -> None:
    if not info.checksums:
        raise UserError(f"{data_dir}: must have checksums, found none; an older version made it, prepare it again")
    for name, expected in info.checksums.items():
        path = data_dir / name
        found = digest_file(path) if path.is_file() else "no such file"
        if found != expected:
            raise UserError(f"{path}: sha256 must be {expected}, found {found}; copy it again or prepare the set anew")


def _draw_sheet(info: DataInfo, records: Records) -> Image.Image:
    """Pairs of image and coloured label in rows, and the names of the colours on the right."""
    from semflow_jax.palette import VOID_COLOUR, make_palette  # brings jax, which no worker needs

    colours = np.full((256, 3), VOID_COLOUR, np.uint8)
    colours[: info.num_classes] = info.colours or make_palette("spread", info.num_classes)
    height, width = (side * -(-SHEET_TILE // info.size[0]) for side in info.size)
    legend = 14 * (info.num_classes + 2)
    chosen = spread_indices(len(records), SHEET_ROWS * SHEET_COLUMNS)
    num_rows = -(-len(chosen) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (2 * SHEET_COLUMNS * width + 160, max(num_rows * height, legend)), "white")
    for place, i in enumerate(chosen):
        row, column = divmod(place, SHEET_COLUMNS)
        for side, picture in enumerate((records[i]["image"], colours[records[i]["label"][..., 0]])):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, ((2 * column + side) * width, row * height))
    draw = ImageDraw.Draw(sheet)
    for line, (i, name) in enumerate((*enumerate(info.class_names), (VOID, "void"))):
        left, top = 2 * SHEET_COLUMNS * width + 10, 14 * line + 7
        draw.rectangle((left, top, left + 10, top + 10), tuple(colours[i].tolist()), "black")
        draw.text((left + 16, top), f"{i} {name}", "black")
    return sheet
