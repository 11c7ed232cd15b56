"""Any folder of images and labels.

images/NAME.jpg|jpeg|png|webp   of any size
labels/NAME.png                 class ids, as 8-bit grey or palette indices; 255 is void
classes.json                    optional: ids and names of the classes, see `load_classes`; else class_0, class_1, ...
train.txt val.txt test.txt      optional: names, one a line; without any of them the names are dealt 80/10/10
ORIGIN.txt                      optional: a line with "licence" and one that begins with "Source" go into the facts
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from semflow_jax.data.images import IMAGE_SUFFIXES, read_label
from semflow_jax.data.info import VOID
from semflow_jax.data.source import (
    SPLITS,
    Item,
    Source,
    find_files,
    find_flip_pairs,
    make_table,
    map_ids,
    read_pair,
    shuffled,
    some,
)
from semflow_jax.errors import UserError

VOID_NAMES = ("ignore", "void", "unlabelled", "unlabeled")
RULE = 'ids must be in classes.json, found {}; add it there, with "name": "void" if it is none, or correct the label'


@dataclasses.dataclass(frozen=True)
class Classes:
    """Class names in id order, and what the ids in the files mean: `ids[file id]` is a class id, VOID or UNKNOWN."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


def find(recipe: dict[str, Any]) -> Source:
    """The items of a folder.

    Raises:
        UserError: a folder is missing, a file has no partner, a list is wrong, or so is classes.json.
    """
    source = pathlib.Path(recipe["source"])
    classes_file = source / "classes.json"
    classes = load_classes(classes_file) if classes_file.is_file() else None
    table = None if classes is None else np.array(classes.ids)
    origin = source / "ORIGIN.txt"
    lines = origin.read_text().splitlines() if origin.is_file() else []
    return Source(
        name=source.name if recipe["name"] == "folder" else recipe["name"],
        class_names=classes.names if classes else None,
        splits=find_splits(source, recipe["seed"]),
        read=functools.partial(read_pair, read_label=functools.partial(_read_ids, table=table)),
        flip_pairs=find_flip_pairs(classes.names) if classes else (),
        license=next((line for line in lines if "licen" in line.lower()), ""),
        attribution=next((line for line in lines if line.startswith("Source")), ""),
    )


def load_classes(path: str | os.PathLike) -> Classes:
    """Read a classes.json: a list of names, or {"classes": [{"id", "name"}, ...]} with, optionally, "ignore_index": id,
    and "merged_names": names with "merged_map": the index of the merged name for each id.

    Classes called ignore, void or unlabelled become VOID, and the others close the gap.

    Raises:
        UserError: unreadable, an id outside [0, 255], or a name or id twice.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
        if isinstance(content, list):
            content = {"classes": [{"id": i, "name": name} for i, name in enumerate(content)]}
        names_by_id = [(int(entry["id"]), str(entry["name"])) for entry in content["classes"]]
        names = [name for _, name in sorted(names_by_id)]
        if len(set(names)) < len(names) or len(dict(names_by_id)) < len(names_by_id):
            raise UserError(f"{path}: every class must have an id and a name of its own, found one twice; rename it")
        if "merged_map" in content:
            names = [str(name) for name in content["merged_names"]]
            names_by_id = [(i, names[content["merged_map"][i]]) for i, _ in names_by_id]
        ignored = content.get("ignore_index")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        rule = 'must be a list of names or {"classes": [{"id": 0, "name": "sky"}, ...]}'
        raise UserError(f"{path}: {rule}, found {type(error).__name__}: {error}; correct the file") from error
    void = {i for i, name in names_by_id if i == ignored or name.lower() in VOID_NAMES}
    kept = {name for i, name in names_by_id if i not in void}
    class_names = tuple(name for name in names if name in kept)
    ids = {VOID: VOID}
    for i, name in names_by_id:
        if not 0 <= i <= VOID or (i == VOID and i not in void):
            raise UserError(f"{path}: ids must be in [0, 254], 255 being void, found {i} for {name!r}; renumber it")
        ids[i] = VOID if i in void else class_names.index(name)
    return Classes(class_names, tuple(make_table(ids).tolist()))


def find_splits(source: pathlib.Path, seed: int = 0) -> dict[str, list[Item]]:
    """Image and label files of each split.

    Raises:
        UserError: a folder is missing, a file has no partner, or a list names what is not there or names it twice.
    """
    images = find_files(source / "images", IMAGE_SUFFIXES)
    labels = find_files(source / "labels", (".png",))
    lists = {split: source / f"{split}.txt" for split in SPLITS if (source / f"{split}.txt").is_file()}
    if lists:
        names = {split: [line.strip() for line in path.read_text().splitlines()] for split, path in lists.items()}
        names = {split: [name for name in listed if name] for split, listed in names.items()}
        _check_lists(lists, names)
    else:
        order = shuffled(sorted(images.keys() | labels.keys()), seed)
        if len(order) < 3:
            raise UserError(f"{source}/images: must have at least 3 images to split, found {len(order)}; add some")
        held = max(1, round(len(order) / 10))
        dealt = {"train": order[2 * held :], "val": order[:held], "test": order[held : 2 * held]}
        names = {split: sorted(chosen) for split, chosen in dealt.items()}
    remedy = "take the names off the lists" if lists else "remove what they would belong to"
    for folder, files, suffix in ((source / "images", images, "image"), (source / "labels", labels, ".png")):
        missing = [name for listed in names.values() for name in listed if name not in files]
        if missing:
            found = f"no {suffix} for {some(missing)}"
            raise UserError(f"{folder}: must have a file for every name, found {found}; add them or {remedy}")
    return {split: [Item(name, images[name], (labels[name],)) for name in listed] for split, listed in names.items()}


def _read_ids(item: Item, table: Int[np.ndarray, "256"] | None) -> UInt8[np.ndarray, "h w"]:
    (path,) = item.labels
    ids = read_label(path)
    return ids if table is None else map_ids(ids, table, path, RULE)


def _check_lists(lists: dict[str, pathlib.Path], names: dict[str, list[str]]) -> None:
    seen: dict[str, str] = {}
    for split, path in lists.items():
        if not names[split]:
            raise UserError(f"{path}: must name at least one image, found none; fill it or remove it")
        for name in names[split]:
            if name in seen:
                raise UserError(f"{path}: must list a name once, found {name!r} in {seen[name]} already; remove one")
            seen[name] = path.name
