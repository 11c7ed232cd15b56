"""What a prepared data set says about itself."""

import dataclasses
import os
import pathlib
from typing import Any

VOID = 255  # label of pixels that belong to no class: ignored by losses and metrics


def cache_dir() -> pathlib.Path:
    """Where prepared data and compiled programs are kept: $SEMFLOW_CACHE, by default ~/.cache/semflow_jax."""
    return pathlib.Path(os.environ.get("SEMFLOW_CACHE", "~/.cache/semflow_jax")).expanduser()


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Facts stored beside the records, as the data set's TFDS metadata.

    Attributes:
        name: data set name.
        class_names: one name per class id, in id order; `VOID` is not among them.
        size: (height, width) of every record.
        flip_pairs: class ids that trade places when an image is mirrored (left eye, right eye).
        license: licence of the images and labels, one line.
        attribution: whom to credit, one line.
        recipe: the arguments that made the records; an equal recipe means the cached records are current.
    """

    name: str
    class_names: tuple[str, ...]
    size: tuple[int, int]
    flip_pairs: tuple[tuple[int, int], ...] = ()
    license: str = ""
    attribution: str = ""
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "DataInfo":
        return cls(
            name=fields["name"],
            class_names=tuple(fields["class_names"]),
            size=tuple(fields["size"]),
            flip_pairs=tuple(tuple(pair) for pair in fields["flip_pairs"]),
            license=fields["license"],
            attribution=fields["attribution"],
            recipe=dict(fields["recipe"]),
        )
