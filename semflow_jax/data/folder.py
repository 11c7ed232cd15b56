"""Any folder of images and labels: checked as a whole first, then resized to examples.

images/NAME.jpg|jpeg|png|webp   of any size
labels/NAME.png                 class ids, as 8-bit grey or palette indices; 255 is void
classes.json                    optional: ids and names of the classes, see `load_classes`; else class_0, class_1, ...
train.txt val.txt test.txt      optional: names, one a line; without any of them the names are dealt 80/10/10
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from semflow_jax.data.builders import Examples
from semflow_jax.data.info import VOID
from semflow_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = ("train", "val", "test")
VOID_NAMES = ("ignore", "void", "unlabelled", "unlabeled")
PNG_UP_TO = 256  # pixels a side; larger images are stored as JPEG
UNKNOWN = -1

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Classes:
    """Class names in id order, and what the ids in the files mean: `ids[file id]` is a class id, VOID or UNKNOWN."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    image: pathlib.Path
    label: pathlib.Path


def load_folder(
    source: str | os.PathLike,
    size: tuple[int, int],
    *,
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[tuple[str, ...], dict[str, Examples]]:
    """Class names and the examples of each split, after a check of every file.

    Args:
        size: (height, width) of the examples; images are stretched to it.
        num_train: at most so many examples of train, `num_val` of val and of test: a random choice by `seed`.
        seed: of that choice, and of the split where there are no lists.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    source = pathlib.Path(source)
    splits = find_splits(source, seed)
    classes_file = source / "classes.json"
    classes = load_classes(classes_file) if classes_file.is_file() else None
    used = check_pairs([pair for pairs in splits.values() for pair in pairs], classes, progress)
    if classes is None:
        num_classes = max((i for i in used if i != VOID), default=-1) + 1
        ids = tuple(i if i < num_classes else VOID if i == VOID else UNKNOWN for i in range(256))
        classes = Classes(tuple(f"class_{i}" for i in range(num_classes)), ids)
    if len(classes.names) < 2:
        found = f"{len(classes.names)} besides void (255)"
        raise UserError(f"{source}: must have at least 2 classes, found {found}; store a binary mask as 0 and 1")
    limits = {"train": num_train, "val": num_val, "test": num_val}
    make_example = functools.partial(_make_example, ids=np.array(classes.ids).astype(np.uint8), size=size)
    examples = {}
    for split, pairs in splits.items():
        chosen = set(_shuffled([pair.name for pair in pairs], seed)[: limits[split]])
        kept = [pair for pair in pairs if pair.name in chosen]
        examples[split] = Examples(len(kept), functools.partial(_threaded, make_example, kept))
    return classes.names, examples


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
    ids = [UNKNOWN] * VOID + [VOID]
    for i, name in names_by_id:
        if not 0 <= i <= VOID or (i == VOID and i not in void):
            raise UserError(f"{path}: ids must be in [0, 254], 255 being void, found {i} for {name!r}; renumber it")
        ids[i] = VOID if i in void else class_names.index(name)
    return Classes(class_names, tuple(ids))


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


def find_splits(source: pathlib.Path, seed: int = 0) -> dict[str, list[Pair]]:
    """Image and label files of each split.

    Raises:
        UserError: a folder is missing, a file has no partner, or a list names what is not there or names it twice.
    """
    images = _find_files(source / "images", IMAGE_SUFFIXES)
    labels = _find_files(source / "labels", (".png",))
    lists = {split: source / f"{split}.txt" for split in SPLITS if (source / f"{split}.txt").is_file()}
    if lists:
        names = {split: [line.strip() for line in path.read_text().splitlines()] for split, path in lists.items()}
        names = {split: [name for name in listed if name] for split, listed in names.items()}
        _check_lists(lists, names)
    else:
        order = _shuffled(sorted(images.keys() | labels.keys()), seed)
        if len(order) < 3:
            raise UserError(f"{source}/images: must have at least 3 images to split, found {len(order)}; add some")
        held = max(1, round(len(order) / 10))
        dealt = {"train": order[2 * held :], "val": order[:held], "test": order[held : 2 * held]}
        names = {split: sorted(chosen) for split, chosen in dealt.items()}
    remedy = "take the names off the lists" if lists else "remove what they would belong to"
    for folder, files, suffix in ((source / "images", images, "image"), (source / "labels", labels, ".png")):
        missing = [name for listed in names.values() for name in listed if name not in files]
        if missing:
            found = f"no {suffix} for {_some(missing)}"
            raise UserError(f"{folder}: must have a file for every name, found {found}; add them or {remedy}")
    return {split: [Pair(name, images[name], labels[name]) for name in listed] for split, listed in names.items()}


def check_pairs(pairs: Sequence[Pair], classes: Classes | None, progress: bool = True) -> set[int]:
    """Read every file; the ids found in the labels.

    Raises:
        UserError: the first problem, and how many files have one.
    """
    used, problems = set(), []
    bar = tqdm(_threaded(_check_pair, pairs), desc="check", total=len(pairs), unit="img", disable=not progress)
    for pair, (ids, problem) in zip(pairs, bar, strict=True):
        strange = [i for i in ids if classes is not None and classes.ids[i] == UNKNOWN]
        if strange:
            remedy = 'add it to classes.json, there with "name": "void" if it is none, or correct the label'
            problem = f"{pair.label}: ids must be in classes.json, found {_some(strange)}; {remedy}"
        used.update(ids)
        problems += [problem] if problem else []
    if problems:
        others = f" ({len(problems) - 1} more files have problems)" if len(problems) > 1 else ""
        raise UserError(problems[0] + others)
    return used


def read_image(path: pathlib.Path) -> Image.Image:
    """An image as RGB, the way viewers show it: upright, and transparent pixels over white.

    Raises:
        UserError: unreadable, truncated, or more than 8 bits per channel.
    """
    image = _load(path)
    if image.mode[0] in "IF":
        raise UserError(f"{path}: must have 8 bits per channel, found mode {image.mode}; convert it to 8-bit RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def read_label(path: pathlib.Path) -> UInt8[np.ndarray, "h w"]:
    """Class ids of a label file: the grey values or palette indices as they are stored.

    Raises:
        UserError: unreadable, truncated, not a PNG, or not one 8-bit channel.
    """
    label = _load(path)
    if label.format != "PNG" or label.mode not in ("1", "L", "P"):
        found = f"{label.format} of mode {label.mode}"
        raise UserError(f"{path}: must be an 8-bit grey or palette PNG of class ids, found {found}; convert it")
    ids = np.asarray(label).astype(np.uint8)
    depth = _png_bit_depth(path)
    # Pillow stretches grey of 2 and 4 bits to 0..255; palette indices and single bits it leaves alone.
    return ids // np.uint8(255 // (2**depth - 1)) if label.mode == "L" and depth < 8 else ids


def _load(path: pathlib.Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: must be a whole image file, found {error}; replace it or leave it out") from error


def _png_bit_depth(path: pathlib.Path) -> int:
    with open(path, "rb") as file:
        return file.read(25)[24]


def _check_pair(pair: Pair) -> tuple[list[int], str | None]:
    """Ids in the label, and the problem, if there is one."""
    try:
        width, height = read_image(pair.image).size
        label = read_label(pair.label)
    except UserError as error:
        return [], str(error)
    if label.shape != (height, width):
        sizes = f"{height}x{width} and {label.shape[0]}x{label.shape[1]}"
        return [], f"{pair.label}: must have the size of its image {pair.image}, found {sizes}; make them equal"
    return np.flatnonzero(np.bincount(label.ravel())).tolist(), None


def _make_example(pair: Pair, ids: UInt8[np.ndarray, "256"], size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    image = read_image(pair.image).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    label = Image.fromarray(ids[read_label(pair.label)]).resize((width, height), Image.Resampling.NEAREST)
    small = max(size) <= PNG_UP_TO
    return {
        "image": _encode(image, "PNG") if small else _encode(image, "JPEG", quality=95),
        "label": _encode(label, "PNG"),
        "id": pair.name,
    }


def _encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _find_files(folder: pathlib.Path, suffixes: Sequence[str]) -> dict[str, pathlib.Path]:
    """Files by name: the path below `folder` without its suffix."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: must be a folder of {'/'.join(suffixes)}, found none; make it or pass another source"
        )
    files: dict[str, pathlib.Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise UserError(f"{path}: names must differ in more than the suffix, found {files[name]}; remove one")
            files[name] = path
    return files


def _check_lists(lists: dict[str, pathlib.Path], names: dict[str, list[str]]) -> None:
    seen: dict[str, str] = {}
    for split, path in lists.items():
        if not names[split]:
            raise UserError(f"{path}: must name at least one image, found none; fill it or remove it")
        for name in names[split]:
            if name in seen:
                raise UserError(f"{path}: must list a name once, found {name!r} in {seen[name]} already; remove one")
            seen[name] = path.name


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The names in an order that depends on `seed` and on each name alone."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def _some(items: Sequence[Any]) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(str(item) for item in items[:5]) + more


def _threaded(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` by threads, in order and a few at a time, so that results do not pile up and an interrupt is prompt."""
    items = list(items)
    num_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(items), 16 * num_threads):
            yield from pool.map(function, items[start : start + 16 * num_threads])
