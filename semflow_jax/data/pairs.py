"""Photos and labels in folders of their own, under names that differ in their endings alone."""

import pathlib
from collections.abc import Mapping

from semflow_jax.data.source import Item, require_folder, some
from semflow_jax.errors import UserError


def pair_files(
    dirs: Mapping[str, tuple[pathlib.Path, pathlib.Path]], image_ending: str, label_ending: str
) -> dict[str, list[Item]]:
    """Items of each split, named by the path below the folder without the ending; files of other endings are let lie.

    There is an item for every photo and for every label. Where one has no partner, reading the item says so.

    Args:
        dirs: for each split, the folder of its photos and that of its labels.

    Raises:
        UserError: a folder is missing, has no such files, or shares a name with another split.
    """
    splits: dict[str, list[Item]] = {}
    seen: set[str] = set()
    for split, (image_dir, label_dir) in dirs.items():
        names = _find_names(image_dir, image_ending) | _find_names(label_dir, label_ending)
        if twice := sorted(names & seen):
            rule = "an image must be in one split"
            raise UserError(f"{image_dir}: {rule}, found {some(twice)} in another too; remove it from one of them")
        seen |= names
        splits[split] = [
            Item(name, image_dir / f"{name}{image_ending}", (label_dir / f"{name}{label_ending}",))
            for name in sorted(names)
        ]
    return splits


def _find_names(folder: pathlib.Path, ending: str) -> set[str]:
    require_folder(folder, f"must be a folder of *{ending}")
    paths = [path for path in folder.rglob(f"*{ending}") if not path.name.startswith(".")]
    if not paths:
        raise UserError(f"{folder}: must have files *{ending}, found none; download them again")
    return {path.relative_to(folder).as_posix().removesuffix(ending) for path in paths}
