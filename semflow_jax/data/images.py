"""Image and label files -> pixels and class ids, exactly as they are meant; what is doubtful is refused by name."""

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from semflow_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # its values that exchange height and width


def read_image(path: str | os.PathLike, shape: tuple[int, int] | None = None, data: bytes | None = None) -> Image.Image:
    """An image as RGB, the way viewers show it: upright, and transparent pixels over white.

    Args:
        shape: (height, width) of its label. It settles whether the label was drawn on the upright photo or on the
            pixels as they are stored; None is the upright one.
        data: what is in the file, where there is none; `path` then is what errors call it. So too below.

    Raises:
        UserError: unreadable, truncated, too large, more than 8 bits per channel, or not of `shape`; a photo whose EXIF
            tag says it is mirrored or turned in a way that `shape` can't tell.
    """
    image = _load(path, data)
    if image.mode[0] in "IF":
        raise UserError(f"{path}: must have 8 bits per channel, found mode {image.mode}; convert it to 8-bit RGB")
    turn = image.getexif().get(ORIENTATION, 1)
    upright = image.size if turn in SIDEWAYS else image.size[::-1]  # (height, width)
    if shape is not None and shape not in (upright, image.size[::-1]):
        sizes = f"{upright[0]}x{upright[1]} and {shape[0]}x{shape[1]}"
        raise UserError(f"{path}: must have the size of its label, found {sizes}; make them equal")
    if shape is not None and turn not in (0, 1) and upright == image.size[::-1]:
        rule = "must be stored upright, for its label may be drawn on either side"
        raise UserError(f"{path}: {rule}, found EXIF orientation {turn}; turn the pixels or remove the tag")
    if shape in (None, upright):
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def read_label(path: str | os.PathLike, data: bytes | None = None) -> UInt8[np.ndarray, "h w"]:
    """Ids of a label file: the grey values or palette indices as they are stored.

    Raises:
        UserError: unreadable, truncated, too large, not a PNG, or not one 8-bit channel.
    """
    label = _load(path, data)
    if label.format != "PNG" or label.mode not in ("1", "L", "P"):
        found = f"{label.format} of mode {label.mode}"
        raise UserError(f"{path}: must be an 8-bit grey or palette PNG of class ids, found {found}; convert it")
    ids = np.asarray(label).astype(np.uint8)
    depth = _png_bit_depth(path, data)
    # Pillow stretches grey of 2 and 4 bits to 0..255; palette indices and single bits it leaves alone.
    return ids // np.uint8(255 // (2**depth - 1)) if label.mode == "L" and depth < 8 else ids


def read_colours(path: str | os.PathLike, data: bytes | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of a label file whose ids are coded in three channels.

    Raises:
        UserError: unreadable, truncated, too large, not a PNG, or not RGB.
    """
    label = _load(path, data)
    if label.format != "PNG" or label.mode != "RGB":
        raise UserError(f"{path}: must be an RGB PNG, found {label.format} of mode {label.mode}; download it again")
    return np.asarray(label)


def _load(path: str | os.PathLike, data: bytes | None) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            # Pillow itself only warns of images up to twice the limit.
            if limit is not None and image.width * image.height > limit:
                raise UserError(
                    f"{path}: must have at most {limit} pixels, found {image.width} x {image.height}; scale it down"
                )
            image.load()
            return image
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: must be a whole image file, found {error}; replace it or leave it out") from error


def _png_bit_depth(path: str | os.PathLike, data: bytes | None) -> int:
    if data is not None:
        return data[24]
    with open(path, "rb") as file:
        return file.read(25)[24]
