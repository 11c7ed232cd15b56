"""`semflow prepare`: a raw data set by name -> a prepared folder, checked first, in parallel, and where it was stopped.

    find (names and files) -> check (every item is read) -> write (shards) -> metadata

Until the last step everything is in OUT.partial, which a later call goes on from.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from semflow_jax.data import beam
from semflow_jax.data.builders import SUFFIX, Shards, check_free, require_examples, write_metadata
from semflow_jax.data.chunks import Chunks, alone
from semflow_jax.data.examples import FITS, check_items, write_items
from semflow_jax.data.info import VOID, DataInfo, cache_dir
from semflow_jax.data.records import load_info
from semflow_jax.data.source import Source, shuffled
from semflow_jax.data.sources import ade20k, avatars, celebamask_hq, cityscapes, coco_stuff, folder, tfds
from semflow_jax.errors import UserError

FIND: dict[str, Callable[[dict[str, Any]], Source]] = {
    "avatars": avatars.find,
    "camvid": folder.find,
    "folder": folder.find,
    "cityscapes": cityscapes.find,
    "ade20k": ade20k.find,
    "coco_stuff": coco_stuff.find,
    "celebamask_hq": celebamask_hq.find,
    "tfds": tfds.find,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "avatars": {"size": 64, "num_train": 8000, "num_val": 500},
    "camvid": {"size": (96, 128)},
    "folder": {"size": 256},
    "cityscapes": {"size": (512, 1024)},
    "ade20k": {"size": 512},
    "coco_stuff": {"size": 512},
    "celebamask_hq": {"size": 512},
    "tfds": {"size": 256},
}
ENGINES = ("pool", "beam")
CHECKED_AT_ONCE = 64  # items of a chunk
EXAMPLES_PER_SHARD = 512
MAX_SKIPPED = 0.01  # share of the items
SKIPPED = "skipped.json"  # what was left out and why, beside the shards


def prepare(
    name: str,
    out_dir: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    fit: str = "stretch",
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    max_skipped: float = MAX_SKIPPED,
    num_workers: int | None = None,
    engine: str = "pool",
    beam_options: str = "",
    progress: bool = True,
) -> DataInfo:
    """Make `out_dir` from a source, unless the same arguments already made it.

    Args:
        name: one of `FIND`; `folder` is for files of your own, see `sources/folder.py`.
        source: folder of files; camvid looks in $SEMFLOW_SHARED/data/camvid, avatars need none.
        size: (height, width), or the side of a square; None is the source's own.
        fit: how images come to that size: stretch | crop | cover, see `examples.fit_pair`.
        num_train: examples of train, and `num_val` of val and of test; None is the source's own, at most all.
        seed: of the avatars, or of the choice and the split of files.
        max_skipped: share of the items that may be left out for a file that is not as it should be.
        num_workers: processes of the pool; None is one for every core.
        engine: pool, processes of this machine, or beam, workers of Apache Beam, see `beam.py`.
        beam_options: Beam's options, as on a command line.

    Returns:
        What the folder says about itself.

    Raises:
        UserError: an unknown name, a bad source, too many bad files, or an `out_dir` made with other arguments.
    """
    if name not in FIND:
        raise UserError(f"name: must be one of {', '.join(FIND)}, got {name!r}; use folder for your own files")
    if fit not in FITS:
        raise UserError(f"fit: must be one of {', '.join(FITS)}, got {fit!r}; choose one of them")
    if not 0 <= max_skipped < 1:
        raise UserError(f"max_skipped: must be a share in [0, 1), got {max_skipped}; 0.01 is usual")
    if engine not in ENGINES:
        raise UserError(f"engine: must be one of {', '.join(ENGINES)}, got {engine!r}; choose one of them")
    if beam_options and engine != "beam":
        raise UserError(f"beam_options: only the engine beam has some, got {beam_options!r}; pass engine beam too")
    recipe = _make_recipe(name, source, size, num_train, num_val, seed) | {"fit": fit}
    out_dir = pathlib.Path(out_dir).resolve()
    if (found := _find_current(out_dir, recipe)) is not None:
        return found
    check_free(out_dir)
    raw = _select(FIND[name](_require_source(recipe)), recipe)
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    with alone(partial):
        if (found := _find_current(out_dir, recipe)) is not None:  # by another process, while this one waited
            return found
        if engine == "beam":
            chunks: Chunks = beam.BeamChunks(partial, beam_options, progress)
        else:
            chunks = Chunks(partial, num_workers or os.cpu_count() or 1, progress)
        with chunks:
            checked, used, problems = (raw, None, []) if raw.drawn else _check(raw, chunks, max_skipped)
            info = _make_info(checked, used, recipe, len(problems))
            return _write(checked, info, problems, chunks, out_dir)


def ensure(c: ConfigDict) -> str:
    """The prepared folder of a config's `data` section, made where it is missing.

    Raises:
        UserError: as `prepare`.
    """
    size = "x".join(str(n) for n in c.size)
    source = None if c.source is None else os.path.expandvars(c.source)
    place = hashlib.sha256(str(pathlib.Path(source).resolve()).encode()).hexdigest()[:8] if source else "built_in"
    fit = "" if c.fit == "stretch" else f"-{c.fit}"
    name = f"{c.name}-{size}{fit}-{c.num_train or 'all'}-{c.num_val or 'all'}-{c.seed}-{place}"
    out_dir = c.dir or str(cache_dir() / "data" / name)
    if c.dir and os.path.exists(os.path.join(c.dir, "metadata.json")):
        return c.dir  # prepared by hand: its own facts count
    options = {"num_train": c.num_train, "num_val": c.num_val, "seed": c.seed, "fit": c.fit}
    prepare(c.name, out_dir, source=source, size=tuple(c.size), **options)
    return out_dir


def _check(raw: Source, chunks: Chunks, max_skipped: float) -> tuple[Source, list[int], list[list[str]]]:
    """The source without what is wrong with it, pixels by class id, and the problems: names and reasons."""
    items = [item for split in raw.splits.values() for item in split]
    found = chunks.map(functools.partial(check_items, read=raw.read), items, CHECKED_AT_ONCE, _key(raw), "check")
    problems = [problem for result, _ in found for problem in result["problems"]]
    if len(problems) > max_skipped * len(items):
        listing = chunks.workdir / "problems.json"
        listing.write_text(json.dumps(dict(problems), indent=1))
        others = f" ({len(problems) - 1} more files have problems, see {listing})" if len(problems) > 1 else ""
        raise UserError(problems[0][1] + others)
    bad = {name for name, _ in problems}
    splits = {split: [item for item in items if item.name not in bad] for split, items in raw.splits.items()}
    return dataclasses.replace(raw, splits=splits), np.sum([r["pixels"] for r, _ in found], axis=0).tolist(), problems


def _write(raw: Source, info: DataInfo, problems: list[list[str]], chunks: Chunks, out_dir: pathlib.Path) -> DataInfo:
    require_examples({split: len(items) for split, items in raw.splits.items()})
    if isinstance(chunks, beam.BeamChunks):
        shards = beam.write_shards(raw, info, chunks)
    else:
        shards = _write_shards(raw, info, chunks)
    pixels = {}
    for split, parts in shards.items():
        counts = np.sum([facts["pixels"] for facts, _ in parts], axis=0)
        pixels[split] = [*counts[: info.num_classes].tolist(), int(counts[VOID])]
    whole = chunks.workdir / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    info = write_metadata(whole, info.replace(pixels=pixels), shards)
    if problems:
        (whole / SKIPPED).write_text(json.dumps(dict(problems), indent=1))
        print(f"skipped {len(problems)} items, see {out_dir / SKIPPED}; the first: {problems[0][1]}")
    whole.rename(out_dir)
    shutil.rmtree(chunks.workdir)
    return info


def _write_shards(raw: Source, info: DataInfo, chunks: Chunks) -> Shards:
    write = functools.partial(write_items, read=raw.read, info=info)
    key = f"{_key(raw)} {info.size} {info.fit}"
    return {
        split: chunks.map(write, items, EXAMPLES_PER_SHARD, key, f"write {split}", SUFFIX)
        for split, items in raw.splits.items()
    }


def _key(raw: Source) -> str:
    """What the results depend on besides the items: the reader, with its tables of ids."""
    return hashlib.sha256(pickle.dumps(raw.read)).hexdigest()


def _select(raw: Source, recipe: dict[str, Any]) -> Source:
    """At most `num_train` items of train and `num_val` of the others, in their order."""
    limits = {"train": recipe["num_train"], "val": recipe["num_val"], "test": recipe["num_val"]}
    splits = {}
    for split, items in raw.splits.items():
        chosen = set(shuffled([item.name for item in items], recipe["seed"])[: limits[split]])
        splits[split] = [item for item in items if item.name in chosen]
    return dataclasses.replace(raw, splits=splits)


def _make_info(raw: Source, used: list[int] | None, recipe: dict[str, Any], skipped: int) -> DataInfo:
    class_names = raw.class_names
    if class_names is None:
        num_classes = max((i for i, num in enumerate((used or [])[:VOID]) if num), default=-1) + 1
        class_names = tuple(f"class_{i}" for i in range(num_classes))
    if len(class_names) < 2:
        found = f"{len(class_names)} besides void (255)"
        rule = "must have at least 2 classes"
        raise UserError(f"{recipe['source']}: {rule}, found {found}; store a binary mask as 0 and 1")
    return DataInfo(
        name=raw.name,
        class_names=class_names,
        size=tuple(recipe["size"]),
        flip_pairs=raw.flip_pairs,
        colours=raw.colours,
        license=raw.license,
        attribution=raw.attribution,
        fit=recipe["fit"],
        skipped=skipped,
        recipe=recipe,
    )


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
        "num_train": DEFAULTS[name].get("num_train") if num_train is None else num_train,
        "num_val": DEFAULTS[name].get("num_val") if num_val is None else num_val,
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


def _require_source(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe, where the folder that it needs is there."""
    name, source = recipe["name"], recipe["source"]
    if name != "avatars" and (source is None or not os.path.isdir(source)):
        found = f"no folder {source}" if source else "none given"
        raise UserError(f"source: {name} needs the folder of its files, found {found}; pass --source DIR")
    return recipe


def _find_current(out_dir: pathlib.Path, recipe: dict[str, Any]) -> DataInfo | None:
    """The facts of `out_dir`, where these arguments made it; None where nothing was made."""
    if not (out_dir / "metadata.json").exists():
        return None
    info = load_info(out_dir)
    made = {"fit": info.fit} | info.recipe
    # Where no source is named, any is right: a prepared folder outlives its files, and travels without them.
    wanted = {key: value for key, value in recipe.items() if not (key == "source" and value is None)}
    found = [f"{key} {made.get(key)}, not {value}" for key, value in wanted.items() if made.get(key) != value]
    if found:
        rule = "must have been made with the arguments given now"
        raise UserError(f"{out_dir}: {rule}, found {'; '.join(found)}; use another --out or delete it")
    print(f"{out_dir}: already prepared with these arguments, nothing to do (delete it to start over)")
    return info
