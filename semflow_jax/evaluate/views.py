"""Test-time averaging: an image is segmented at several scales, and mirrored, and the class probabilities are averaged.

Off by default. The published figures of many segmenters are of several views and those of SemFlow of one: a result says
which.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from semflow_jax.errors import UserError
from semflow_jax.models.build import Params
from semflow_jax.sampling import Frozen, Sampler, to_float, to_uint8


@dataclasses.dataclass(frozen=True)
class Views:
    """Attributes:
    scales: of the size that the model works at.
    mirror: whether each scale is also seen mirrored.
    """

    scales: tuple[float, ...] = (1.0,)
    mirror: bool = False

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales: positive numbers, at least one, got {list(self.scales)}")

    def names(self) -> list[str]:
        """One for each view, for reports: ["1", "1 mirrored"]."""
        return [f"{scale:g}{side}" for scale in self.scales for side in ("", " mirrored")[: 1 + self.mirror]]


def resize_image(image: UInt8[Array, "b h w 3"], size: tuple[int, int]) -> UInt8[Array, "b h2 w2 3"]:
    """By Lanczos' filter of radius 3, widened where the image gets smaller."""
    if image.shape[1:3] == size:
        return image
    shape = (image.shape[0], *size, image.shape[-1])
    return to_uint8(jax.image.resize(to_float(image), shape, "lanczos3"))


def resize_label(label: UInt8[Array, "b h w 1"], size: tuple[int, int]) -> UInt8[Array, "b h2 w2 1"]:
    """By the nearest pixel."""
    return jax.image.resize(label, (label.shape[0], *size, 1), "nearest")


def view_sizes(size: tuple[int, int], views: Views, factor: int) -> list[tuple[int, int]]:
    """The size of every scale, in whole multiples of `factor`, the pixels of the network's coarsest cell."""

    def side(length: int, scale: float) -> int:
        return max(1, round(scale * length / factor)) * factor

    return [(side(size[0], scale), side(size[1], scale)) for scale in views.scales]


def probabilities(
    sampler: Sampler,
    params: Params,
    frozen: Frozen,
    image: UInt8[Array, "b h w 3"],
    label_size: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    mirror: UInt8[np.ndarray, " n"] | None,
    steps: int,
    solver: str,
) -> Float[Array, "b h2 w2 n"]:
    """p(class) of every pixel at `label_size`, the mean over the views.

    Args:
        sizes: that the image is segmented at.
        mirror: the classes in the mirror, see `transforms.mirrored_ids`; None for no mirrored views.
    """

    def one(picture):
        z1 = sampler.to_mask(params, frozen, sampler.encode_image(frozen, picture), steps, solver)
        p = jax.nn.softmax(sampler.mask_logits(frozen, z1))
        return jax.image.resize(p, (p.shape[0], *label_size, p.shape[-1]), "linear", antialias=False)

    found = []
    for size in sizes:
        picture = resize_image(image, size)
        found.append(one(picture))
        if mirror is not None:
            found.append(one(picture[:, :, ::-1])[:, :, ::-1, mirror])
    return jnp.stack(found).mean(0) if len(found) > 1 else found[0]
