"""What every raw data set is seen as: items by split, and a function that reads one as image and class ids."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from semflow_jax.data.images import read_image
from semflow_jax.errors import UserError

SPLITS = ("train", "val", "test")
UNKNOWN = -1  # in a table of ids: no such id may occur

Pair = tuple[Image.Image, UInt8[np.ndarray, "h w"]]  # an RGB image, and its class ids or void


@dataclasses.dataclass(frozen=True)
class Item:
    """One example before it is read.

    Attributes:
        name: its id in the prepared set.
        image: its photo, where that is a file.
        labels: the files that its label is made of.
        detail: what else the reader needs.
    """

    name: str
    image: pathlib.Path | None = None
    labels: tuple[pathlib.Path, ...] = ()
    detail: Any = None

    def stamp(self) -> str:
        """Changes when the item or one of its files does."""
        return f"{self.name} {self.detail} {[_stamp(path) for path in (self.image, *self.labels) if path]}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A raw data set.

    Attributes:
        name: data set name.
        class_names: in id order; None where only the labels can tell how many there are.
        splits: items of each split.
        read: item -> image and class ids, of one size; `UserError` where a file is not as it should be. It goes to
            worker processes, so it must be picklable.
        flip_pairs, colours, license, attribution: see `DataInfo`.
        drawn: made here rather than read, so that there is nothing to check.
    """

    name: str
    class_names: tuple[str, ...] | None
    splits: Mapping[str, Sequence[Item]]
    read: Callable[[Item], Pair]
    flip_pairs: tuple[tuple[int, int], ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    license: str = ""
    attribution: str = ""
    drawn: bool = False


def read_pair(item: Item, read_label: Callable[[Item], UInt8[np.ndarray, "h w"]]) -> Pair:
    """The reader of sources whose photos are files.

    Raises:
        UserError: an unreadable file, an id that is none, or different sizes.
    """
    if item.image is None:
        raise TypeError(f"{item.name}: an item with a photo expected")
    label = read_label(item)
    return read_image(item.image, label.shape), label


def make_table(ids: Mapping[int, int]) -> Int[np.ndarray, "256"]:
    """A table for `map_ids`: id in the file -> class id or VOID; all others are UNKNOWN."""
    table = np.full(256, UNKNOWN)
    table[list(ids)] = list(ids.values())
    return table


def map_ids(
    ids: UInt8[np.ndarray, "h w"], table: Int[np.ndarray, "256"], place: object, rule: str
) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a label.

    Args:
        place: file, for the error.
        rule: which ids there may be and what to do about others: "ids must be ..., found {}; remedy".

    Raises:
        UserError: an id that is UNKNOWN.
    """
    found = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
    strange = found[table[found] == UNKNOWN]
    if len(strange):
        raise UserError(f"{place}: {rule.format(some(strange))}")
    return table.astype(np.uint8)[ids]


def find_flip_pairs(class_names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Ids of classes whose names differ in a word left/right or l/r: l_eye and r_eye, left-arm and right-arm."""
    twins = {"left": "right", "l": "r"}
    ids = {name.lower(): i for i, name in enumerate(class_names)}
    pairs = []
    for name, i in ids.items():
        words = re.split(r"([\W_]+)", name)
        twin = ids.get("".join(twins.get(word, word) for word in words), i)
        if twin != i:
            pairs.append((i, twin))
    return tuple(pairs)


def find_files(folder: pathlib.Path, suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """Files by name: the path below `folder` without its suffix.

    Raises:
        UserError: no such folder, or two files of one name.
    """
    require_folder(folder, f"must be a folder of {'/'.join(suffixes)}")
    files: dict[str, pathlib.Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise UserError(f"{path}: names must differ in more than the suffix, found {files[name]}; remove one")
            files[name] = path
    return files


def require_folder(folder: pathlib.Path, rule: str) -> None:
    """Raises `UserError` where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {rule}, found none; download it or pass another --source")


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The names in an order that depends on `seed` and on each name alone."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def some(things: Sequence[Any] | np.ndarray) -> str:
    """The first few, for a message."""
    more = f" and {len(things) - 5} more" if len(things) > 5 else ""
    return ", ".join(str(thing) for thing in things[:5]) + more


def _stamp(path: pathlib.Path) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return f"{path} missing"
    return f"{path} {status.st_size} {status.st_mtime_ns}"
