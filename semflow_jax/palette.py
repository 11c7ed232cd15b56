"""Class ids <-> colours: the pseudo-mask of SemFlow, an RGB picture in [-1, 1] in which a colour stands for a class.

A pseudo-mask is perturbed before it is encoded, which gives synthesis its diversity:

    m = colour[label] + a_pixel (u - 1/2) + a_region (w[label] - 1/2),    u, w ~ U[0, 1),               (1)

u drawn for every pixel and channel (the paper's), w for every class of an image and channel (ours: a region keeps one
tint, so that the flow can turn tint into colour, and a flat region stays flat). Nearest-colour decoding survives while

    sqrt(3) (a_pixel + a_region) < min distance between two colours.                                   (2)
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from semflow_jax import noise
from semflow_jax.errors import UserError

PALETTES = ("grid", "spread")
VOID_COLOUR = (255, 255, 255)


def grid_palette(num_classes: int, side: int = 6, step: int = 50) -> UInt8[np.ndarray, "n 3"]:
    """The paper's colours: class c is the c-th point of a side^3 grid, last channel fastest.

    Raises:
        UserError: more classes than points.
    """
    if num_classes > side**3:
        raise UserError(f"palette 'grid': at most {side**3} classes, got {num_classes}; use palette 'spread'")
    ids = np.arange(num_classes)
    return np.stack([ids // side**2, ids // side % side, ids % side], axis=-1).astype(np.uint8) * np.uint8(step)


@functools.cache
def spread_palette(num_classes: int) -> UInt8[np.ndarray, "n 3"]:
    """Colours far from each other and from void's white: one after the other, the farthest point of a grid.

    Denser packings exist and gain nothing behind a lossy codec, whose blurred borders fall on colours half way between
    others: benchmarks/palettes.py.
    """
    num_levels = 2 if num_classes <= 7 else 5 if num_classes <= 20 else 9
    levels = np.linspace(0, 255, num_levels).round()
    points = np.array(list(itertools.product(levels, repeat=3)))
    chosen = [len(points) - 1]  # white
    for _ in range(num_classes):
        gaps = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(axis=1)
        chosen.append(int(gaps.argmax()))
    return points[chosen[1:]].astype(np.uint8)


def make_palette(name: str, num_classes: int) -> UInt8[np.ndarray, "n 3"]:
    """Colours by name, 'grid' or 'spread'."""
    if name not in PALETTES:
        raise UserError(f"palette: one of {PALETTES}, got {name!r}")
    return grid_palette(num_classes) if name == "grid" else spread_palette(num_classes)


def scale(rgb) -> np.ndarray:
    """uint8 colours -> [-1, 1]."""
    return np.asarray(rgb, np.float32) / 127.5 - 1


def min_distance(palette: UInt8[np.ndarray, "n 3"]) -> float:
    """Smallest Euclidean distance between two colours, on the [-1, 1] scale."""
    colours = scale(palette)
    gaps = np.linalg.norm(colours[:, None] - colours, axis=-1)
    return float(gaps[~np.eye(len(colours), dtype=bool)].min())


def check_amplitudes(palette: UInt8[np.ndarray, "n 3"], pixel: float, region: float) -> None:
    """Refuses perturbations that could change a class: equation (2).

    Raises:
        UserError: naming the bound.
    """
    bound = min_distance(palette) / 3**0.5
    if min(pixel, region) < 0 or pixel + region >= bound:
        raise UserError(
            f"mask_code.pixel + mask_code.region: at least 0 and below {bound:.3f} for this palette, "
            f"got {pixel} + {region}; lower them or use palette 'spread'"
        )


def _lookup(
    label: Int[Array, "b h w 1"] | UInt8[Array, "b h w 1"], table: Float[Array, "*b n 3"]
) -> Float[Array, "b h w 3"]:
    """Row of `table` (shared, or one per image) by class id; rows beyond the table are zero. A one-hot product: a
    gather of this shape is slow on accelerators, and its transpose slower.
    """
    one_hot = jax.nn.one_hot(label[..., 0], table.shape[-2], dtype=table.dtype)
    return jnp.einsum("bhwn,bnc->bhwc" if table.ndim == 3 else "bhwn,nc->bhwc", one_hot, table)


def colourise(
    label: Int[Array, "b h w 1"] | UInt8[Array, "b h w 1"], palette: UInt8[np.ndarray, "n 3"]
) -> Float[Array, "b h w 3"]:
    """Class ids -> pseudo-mask in [-1, 1]; ids outside the palette (void) become white."""
    known = label < len(palette)
    return jnp.where(known, _lookup(label, jnp.asarray(scale(palette))), scale(VOID_COLOUR))


def region_tint(
    key: Key[Array, "..."], label: Int[Array, "b h w 1"] | UInt8[Array, "b h w 1"], num_classes: int
) -> Float[Array, "b h w 3"]:
    """w[label] - 1/2 of equation (1): one random colour per class of each image, 0 where void."""
    return _lookup(label, noise.uniform(key, (label.shape[0], num_classes, 3)) - 0.5)


def perturb(
    key: Key[Array, "..."],
    mask_rgb: Float[Array, "b h w 3"],
    label: Int[Array, "b h w 1"] | UInt8[Array, "b h w 1"],
    num_classes: int,
    pixel: float,
    region: float,
) -> Float[Array, "b h w 3"]:
    """Equation (1)."""
    key_pixel, key_region = noise.split(key, 2)
    if pixel:
        mask_rgb = mask_rgb + pixel * (noise.uniform(key_pixel, mask_rgb.shape) - 0.5)
    if region:
        mask_rgb = mask_rgb + region * region_tint(key_region, label, num_classes)
    return mask_rgb


def logits(mask_rgb: Float[Array, "b h w 3"], palette: UInt8[np.ndarray, "n 3"]) -> Float[Array, "b h w n"]:
    """Pseudo-mask -> log p(class | colour), less what all classes have in common.

    Colours are taken to scatter about their class's as a Gaussian whose standard deviation is a quarter of the smallest
    distance between two of them, so that half way to the nearest other colour is two deviations off:

        log p(c | m) = -|m - colour[c]|^2 / (2 sigma^2) + const.                                       (3)

    The likeliest class is that of the nearest colour.
    """
    colours = jnp.asarray(scale(palette))
    variance = (min_distance(palette) / 4) ** 2 if len(palette) > 1 else 1.0
    # |m|^2 is the same for every colour
    return (mask_rgb @ colours.T - jnp.square(colours).sum(-1) / 2) / variance


def decode(mask_rgb: Float[Array, "b h w 3"], palette: UInt8[np.ndarray, "n 3"]) -> UInt8[Array, "b h w 1"]:
    """Pseudo-mask -> class ids, by nearest colour."""
    return jnp.argmax(logits(mask_rgb, palette), axis=-1, keepdims=True).astype(jnp.uint8)
