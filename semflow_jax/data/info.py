"""What a prepared data set says about itself."""

import dataclasses
import os
import pathlib
from typing import Any

VOID = 255  # label of pixels that belong to no class: ignored by losses and metrics
KEPT = ("mean", "std", "mask", "own", "draw")  # what latents are kept as, of an image and of its mirror image


def cache_dir() -> pathlib.Path:
    """Where prepared data and compiled programs are kept: $SEMFLOW_CACHE, by default ~/.cache/semflow_jax."""
    return pathlib.Path(os.environ.get("SEMFLOW_CACHE", "~/.cache/semflow_jax")).expanduser()


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Facts stored beside the records, as the data set's TFDS metadata.

    Attributes:
        name: data set name.
        class_names: one name per class id, in id order; `VOID` is not among them.
        size: (height, width) that examples are used at.
        flip_pairs: class ids that trade places when an image is mirrored (left eye, right eye).
        colours: the colours that the data set's authors show its classes in, for pictures; empty where there are none.
        license: licence of the images and labels, one line.
        attribution: whom to credit, one line.
        fit: how the records came to their size, see `examples.fit_pair`; covering, they are larger than `size`.
        latent: of a cache of latents: type and shape of each array that it keeps, by its name in `KEPT`; else None.
        pixels: of every split, the number of pixels by class id, void's last.
        skipped: how many raw examples were left out, for a file that is not as it should be.
        checksums: sha256 by file name.
        recipe: the arguments that made the records; an equal recipe means that they are current.
    """

    name: str
    class_names: tuple[str, ...]
    size: tuple[int, int]
    flip_pairs: tuple[tuple[int, int], ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    license: str = ""
    attribution: str = ""
    fit: str = "stretch"
    latent: dict[str, Any] | None = None
    pixels: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    checksums: dict[str, str] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def replace(self, **changes: Any) -> "DataInfo":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "DataInfo":
        """The inverse of `to_dict`, also after a journey through JSON, and of older ones that knew fewer fields."""
        known = {field.name for field in dataclasses.fields(cls)}
        rest = {key: value for key, value in fields.items() if key in known}
        pairs = {key: tuple(tuple(entry) for entry in rest.get(key, ())) for key in ("flip_pairs", "colours")}
        fixed = {"class_names": tuple(fields["class_names"]), "size": tuple(fields["size"])}
        return cls(**rest | pairs | fixed)
