"""Results as files: figures as JSON can hold them, and files that are whole or not there."""

import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def write(path: pathlib.Path, data: bytes) -> None:
    """Replaces a file, whose folder is made where there is none, at once: who reads it finds the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)


def write_json(path: pathlib.Path, tree: Any) -> None:
    """The same for what `plain` returned."""
    write(path, (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode())


def plain(tree: Any) -> Any:
    """What JSON can hold: plain numbers for arrays and scalars of any make, None for figures that are not finite."""
    if isinstance(tree, Mapping):
        return {str(k): plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(v) for v in tree]
    if hasattr(tree, "tolist"):
        return plain(tree.tolist())
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    return tree if tree is None or isinstance(tree, bool | int | str) else str(tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; an empty dict is one."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def mean_and_spread(values: Sequence[float], form: str = "{:.4g}") -> str:
    """Mean and standard deviation over runs, as a table shows them; a dash where one of them is no number."""
    if any(map(math.isnan, values)):
        return "-"
    mean = form.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2g}"
