"""data/images.py: pixels and ids arrive as they are meant, and what is doubtful does not arrive."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from semflow_jax.data.images import ORIENTATION, read_colours, read_image, read_label
from semflow_jax.errors import UserError


def test_palette_indices_are_kept(tmp_path):
    label = Image.fromarray(np.array([[3, 1], [0, 2]], np.uint8)).convert("P")
    for bits in (2, 4, 8):
        label.putpalette(list(range(2**bits))[::-1] * 3)
        label.save(tmp_path / "label.png", bits=bits)
        np.testing.assert_array_equal(read_label(tmp_path / "label.png"), [[3, 1], [0, 2]])


def test_grey_of_few_bits_is_not_stretched(tmp_path):
    """Pillow shows 1-, 2- and 4-bit grey as 0..255; the stored ids count."""
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "label.png")
    np.testing.assert_array_equal(read_label(tmp_path / "label.png"), [[0, 1]])
    palette = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8)).convert("P")
    for bits in (2, 4):
        palette.putpalette([0] * 3 * 2**bits)
        buffer = io.BytesIO()
        palette.save(buffer, "PNG", bits=bits)
        (tmp_path / "label.png").write_bytes(without_palette(buffer.getvalue()))
        with Image.open(tmp_path / "label.png") as shown:
            assert shown.mode == "L" and np.asarray(shown).max() == 255 // (2**bits - 1) * 3
        np.testing.assert_array_equal(read_label(tmp_path / "label.png"), [[0, 1, 2, 3]])


def without_palette(png: bytes) -> bytes:
    """The same PNG as grey: colour type 0 and no PLTE chunk."""
    out, place = png[:8], 8
    while place < len(png):
        length = struct.unpack(">I", png[place : place + 4])[0]
        kind, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            body = body[:9] + b"\0" + body[10:]
        if kind != b"PLTE":
            out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        place += 12 + length
    return out


def test_images_are_upright_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right by the viewer
    Image.new("RGB", (30, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 30)
    grey = Image.fromarray(np.array([[7, 200]], np.uint8))
    grey.save(tmp_path / "grey.png")
    assert np.asarray(read_image(tmp_path / "grey.png")).tolist() == [[[7] * 3, [200] * 3]]
    Image.fromarray(np.array([[[1, 2, 3, 255], [1, 2, 3, 0]]], np.uint8)).save(tmp_path / "alpha.png")
    assert np.asarray(read_image(tmp_path / "alpha.png")).tolist() == [[[1, 2, 3], [255] * 3]]
    palette = grey.convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes([255] * 256))
    assert np.asarray(read_image(tmp_path / "palette.png")).tolist() == [[[7] * 3, [200] * 3]]
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "blue.webp", lossless=True)
    assert read_image(tmp_path / "blue.webp").getpixel((0, 0)) == (0, 0, 255)


def test_sixteen_bit_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="deep.png: must have 8 bits per channel"):
        read_image(tmp_path / "deep.png")


def save_turned(path, turn: int, size: tuple[int, int] = (3, 2)):
    """A photo of (width, height) whose EXIF tag says how to turn it."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


@pytest.mark.parametrize("turn", [6, 8])
def test_a_label_settles_on_which_side_it_was_drawn(tmp_path, turn):
    """Sizes tell whether the label belongs to the photo as it is stored or as it is shown."""
    path = tmp_path / "turned.png"
    pixels = save_turned(path, turn)
    upright = np.rot90(pixels, -1 if turn == 6 else 1)
    np.testing.assert_array_equal(np.asarray(read_image(path)), upright)
    np.testing.assert_array_equal(np.asarray(read_image(path, (3, 2))), upright)
    np.testing.assert_array_equal(np.asarray(read_image(path, (2, 3))), pixels)


@pytest.mark.parametrize(("turn", "size"), [(3, (3, 2)), (2, (3, 2)), (6, (2, 2))])
def test_a_turn_that_no_size_can_tell_is_refused(tmp_path, turn, size):
    path = tmp_path / "turned.png"
    save_turned(path, turn, size)
    with pytest.raises(UserError, match=f"must be stored upright.*found EXIF orientation {turn}"):
        read_image(path, size[::-1])
    read_image(path)  # without a label there is no doubt
    save_turned(path, 1, size)
    assert read_image(path, size[::-1]).size == size


def test_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("L", (30, 20)).save(tmp_path / "bomb.png")
    for limit in (599, 299):  # Pillow warns up to twice the limit, and raises beyond
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for read in (read_image, read_label):
            with pytest.raises(UserError, match=r"bomb.png: must (have at most 599 pixels|be a whole image file)"):
                read(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert read_label(tmp_path / "bomb.png").shape == (20, 30)


def test_colours_are_three_channels(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_colours(tmp_path / "rgb.png"), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    with pytest.raises(UserError, match="grey.png: must be an RGB PNG, found PNG of mode L"):
        read_colours(tmp_path / "grey.png")
