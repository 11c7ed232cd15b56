"""`semflow prepare` and `semflow inspect`: sources by name -> a prepared folder, and what is in one."""

import functools
import hashlib
import os
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from semflow_jax.data import avatars
from semflow_jax.data.builders import Examples, check_free, write_records
from semflow_jax.data.folder import find_flip_pairs, load_folder
from semflow_jax.data.info import VOID, DataInfo, cache_dir
from semflow_jax.data.records import Records, count_pixels, count_records, load_info, open_records, spread_indices
from semflow_jax.errors import UserError

DEFAULTS: dict[str, dict[str, Any]] = {
    "avatars": {"size": 64, "num_train": 8000, "num_val": 500},
    "camvid": {"size": (96, 128), "num_train": None, "num_val": None},
    "folder": {"size": 256, "num_train": None, "num_val": None},
}
NUM_INSPECTED = 1000  # examples of a split whose pixels are counted
SHEET_ROWS, SHEET_COLUMNS, SHEET_TILE = 6, 3, 128  # pairs down, pairs across, pixels a tile is at least high


def prepare(
    name: str,
    out_dir: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DataInfo:
    """Make `out_dir` from a source, unless the same arguments already made it.

    Args:
        name: avatars (drawn), camvid, or folder (yours, see `semflow_jax.data.folder`).
        source: folder of files; camvid looks in $SEMFLOW_SHARED/data/camvid, avatars need none.
        size: (height, width), or the side of a square; None is the source's own.
        num_train: examples of train, and `num_val` of val and of test; None is the source's own, at most all.
        seed: of the avatars, or of the choice and the split of files.

    Returns:
        What the folder says about itself.

    Raises:
        UserError: an unknown name, a bad source, or an `out_dir` made with other arguments.
    """
    if name not in DEFAULTS:
        raise UserError(f"name: must be one of {', '.join(DEFAULTS)}, got {name!r}; use folder for your own files")
    recipe = _make_recipe(name, source, size, num_train, num_val, seed)
    if os.path.exists(os.path.join(out_dir, "metadata.json")):
        info = load_info(out_dir)
        _check_current(out_dir, info, recipe)
        print(f"{out_dir}: already prepared with these arguments, nothing to do (delete it to start over)")
        return info
    check_free(out_dir)
    info, splits = _open_avatars(recipe) if name == "avatars" else _open_files(recipe, progress)
    write_records(out_dir, info, splits, progress)
    return info


def ensure(c: ConfigDict) -> str:
    """The prepared folder of a config's `data` section, made where it is missing.

    Raises:
        UserError: as `prepare`.
    """
    size = "x".join(str(n) for n in c.size)
    source = None if c.source is None else os.path.expandvars(c.source)
    place = hashlib.sha256(str(pathlib.Path(source).resolve()).encode()).hexdigest()[:8] if source else "built_in"
    name = f"{c.name}-{size}-{c.num_train or 'all'}-{c.num_val or 'all'}-{c.seed}-{place}"
    out_dir = c.dir or str(cache_dir() / "data" / name)
    if c.dir and os.path.exists(os.path.join(c.dir, "metadata.json")):
        return c.dir  # prepared by hand: its own facts count
    prepare(c.name, out_dir, source=source, size=tuple(c.size), num_train=c.num_train, num_val=c.num_val, seed=c.seed)
    return out_dir


def inspect(data_dir: str | os.PathLike, sheet: str | os.PathLike | None = None) -> None:
    """Print what a prepared folder holds; draw images beside their labels into the PNG file `sheet`."""
    info, lengths = load_info(data_dir), count_records(data_dir)
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
    for left, right in info.flip_pairs:
        print(f"a flip swaps {info.class_names[left]} and {info.class_names[right]}")
    if sheet is not None:
        _draw_sheet(info, next(iter(records.values()))).save(sheet)
        print(f"contact sheet: {sheet}")


def _make_recipe(
    name: str,
    source: str | os.PathLike | None,
    size: int | tuple[int, int] | None,
    num_train: int | None,
    num_val: int | None,
    seed: int,
) -> dict[str, Any]:
    """The arguments with their defaults filled in, as JSON keeps them."""
    size = DEFAULTS[name]["size"] if size is None else size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise UserError(f"size: height and width, or one number for both, got {sides}; correct it")
    height, width = sides
    recipe: dict[str, Any] = {
        "name": name,
        "source": _find_source(name, source),
        "size": [height, width],
        "num_train": DEFAULTS[name]["num_train"] if num_train is None else num_train,
        "num_val": DEFAULTS[name]["num_val"] if num_val is None else num_val,
        "seed": seed,
    }
    for key, value in (("height", height), ("width", width), *((key, recipe[key]) for key in ("num_train", "num_val"))):
        if value is not None and value < 1:
            raise UserError(f"{key}: must be at least 1, got {value}; raise it")
    return recipe


def _find_source(name: str, source: str | os.PathLike | None) -> str | None:
    if name == "avatars" and source is not None:
        raise UserError(f"source: avatars are drawn and have none, got {source}; leave it out")
    if name == "camvid" and source is None and "SEMFLOW_SHARED" in os.environ:
        source = pathlib.Path(os.environ["SEMFLOW_SHARED"], "data", "camvid")
    return None if source is None else str(pathlib.Path(source).resolve())


def _check_current(out_dir: str | os.PathLike, info: DataInfo, recipe: dict[str, Any]) -> None:
    # Where no source is named, any is right: a prepared folder outlives its files, and travels without them.
    wanted = {key: value for key, value in recipe.items() if not (key == "source" and value is None)}
    found = [
        f"{key} {info.recipe.get(key)}, not {value}" for key, value in wanted.items() if info.recipe.get(key) != value
    ]
    if found:
        rule = "must have been made with the arguments given now"
        raise UserError(f"{out_dir}: {rule}, found {'; '.join(found)}; use another --out or delete it")


def _open_avatars(recipe: dict[str, Any]) -> tuple[DataInfo, dict[str, Examples]]:
    (height, width), seed = recipe["size"], recipe["seed"]
    if height != width:
        raise UserError(f"size: avatars are square, got {height} x {width}; pass one number")
    splits = {}
    for split, num in (("train", recipe["num_train"]), ("val", recipe["num_val"]), ("test", recipe["num_val"])):
        splits[split] = Examples(num, functools.partial(avatars.examples, split, num, height, seed))
    info = DataInfo(
        name="avatars",
        class_names=avatars.CLASS_NAMES,
        size=(height, width),
        flip_pairs=find_flip_pairs(avatars.CLASS_NAMES),
        license=avatars.LICENSE,
        attribution=avatars.ATTRIBUTION,
        recipe=recipe,
    )
    return info, splits


def _open_files(recipe: dict[str, Any], progress: bool) -> tuple[DataInfo, dict[str, Examples]]:
    if recipe["source"] is None or not os.path.isdir(recipe["source"]):
        found = f"no folder {recipe['source']}" if recipe["source"] else "none given"
        rule = f"{recipe['name']} needs a folder with images/ and labels/"
        raise UserError(f"source: {rule}, found {found}; pass --source DIR")
    source, size = pathlib.Path(recipe["source"]), (recipe["size"][0], recipe["size"][1])
    limits = {key: recipe[key] for key in ("num_train", "num_val", "seed")}
    class_names, splits = load_folder(source, size, progress=progress, **limits)
    origin = source / "ORIGIN.txt"
    lines = origin.read_text().splitlines() if origin.is_file() else []
    info = DataInfo(
        name="camvid" if recipe["name"] == "camvid" else source.name,
        class_names=class_names,
        size=size,
        flip_pairs=find_flip_pairs(class_names),
        license=next((line for line in lines if "licen" in line.lower()), ""),
        attribution=next((line for line in lines if line.startswith("Source")), ""),
        recipe=recipe,
    )
    return info, splits


def _draw_sheet(info: DataInfo, records: Records) -> Image.Image:
    """Pairs of image and coloured label in rows, and the names of the colours on the right."""
    from semflow_jax.palette import VOID_COLOUR, make_palette  # brings jax, which no worker needs

    colours = np.full((256, 3), VOID_COLOUR, np.uint8)
    colours[: info.num_classes] = make_palette("spread", info.num_classes)
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
