"""Images are decoded or refused by name, and grids show them in order."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageFont

from common.errors import InputError
from common.images import MIN_TILE, PNG_SIGNATURE, _shortened, decode_rgb, image_grid, open_image, to_png
from tests.test_crops import animation, encoded, header_only_png, noise


def test_an_image_keeps_its_mode_and_pixels():
    pixels = noise(5, 4)
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(pixels)))), pixels)
    assert open_image(encoded(Image.new("CMYK", (4, 4)), "TIFF")).mode == "CMYK"


@pytest.mark.parametrize(
    "data", [b"", b"text", encoded(Image.fromarray(noise(9, 9)))[:-60], header_only_png(30_000, 30_000)]
)
def test_incomplete_images_are_refused(data):
    with pytest.raises(InputError, match="not an image that can be read: "):
        open_image(data)


BROKEN = {
    "the file is empty": b"",
    "it is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "it is a web page": b"\n<!DOCTYPE html><html>",
    "its content is not of a format that is read": b"text",
    "the file is truncated": encoded(Image.fromarray(noise(40, 40)), "JPEG")[:-200],
    "its data is damaged": encoded(Image.fromarray(noise(9, 9)))[:-20] + bytes(20),
    "900,000,000 pixels; allowed: 178,956,970": header_only_png(30_000, 30_000),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_the_reason_is_stated_without_addresses_in_memory(reason):
    texts = set()
    for _ in range(2):
        with pytest.raises(InputError, match=f"^not an image that can be read: {reason}") as caught:
            open_image(bytes(bytearray(BROKEN[reason])))
        texts.add(str(caught.value))
    assert len(texts) == 1 and "0x" not in texts.pop()


def test_several_images_in_a_file_are_refused():
    for form in ("GIF", "WEBP", "TIFF", "PNG"):
        with pytest.raises(InputError, match=r"an animation or has several pages \(2 frames\)"):
            open_image(animation(form))


def test_a_side_that_is_too_long_is_refused():
    data = encoded(Image.new("RGB", (9, 4)))
    assert open_image(data, max_side=9).size == (9, 4)
    with pytest.raises(InputError, match="9 x 4 pixels; allowed: 1 to 8 per side"):
        open_image(data, max_side=8)


def test_only_listed_formats_are_decoded():
    for form in ("JPEG", "EPS"):
        data = encoded(Image.new("RGB", (8, 8)), form)
        with pytest.raises(InputError, match="not of a format that is read"):
            open_image(data, ("PNG",) if form == "JPEG" else ("JPEG", "PNG"))


def test_every_changed_bit_of_a_png_is_noticed():
    data = encoded(Image.fromarray(noise(6, 6)))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match="not an image that can be read"):
            open_image(bytes(damaged))


def test_what_follows_a_png_and_how_its_pixels_are_split_does_not_matter():
    pixels = noise(6, 6)
    data = encoded(Image.fromarray(pixels))
    assert np.array_equal(open_image(data + b"more"), pixels)
    start = data.index(b"IDAT")
    content = data[start + 4 : -16]
    split = b"".join(chunk(b"IDAT", content[i : i + 1]) for i in range(len(content)))
    assert np.array_equal(open_image(data[: start - 4] + split + data[-12:]), pixels)


def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_a_png_that_states_more_pixels_than_its_data_can_contain_is_refused_before_it_is_decoded(monkeypatch):
    header = chunk(b"IHDR", (9000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    data = PNG_SIGNATURE + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(InputError, match=r"9000 x 9000 pixels, but its \d+ bytes cannot contain as many"):
        open_image(data)


def test_a_tiff_whose_data_does_not_cover_the_image_is_refused():
    data = encoded(Image.fromarray(noise(24, 24)), "TIFF")
    entry = data.index(struct.pack("<HHI", 257, 4, 1) + struct.pack("<I", 24))  # ImageLength
    with pytest.raises(InputError, match="it does not contain all pixels"):
        open_image(data[: entry + 8] + struct.pack("<I", 240) + data[entry + 12 :])
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for options in ({}, {"compression": "tiff_lzw"}):
            file = io.BytesIO()
            Image.fromarray(noise(24, 9)).save(file, "TIFF", exif=exif, **options)
            assert sorted(open_image(file.getvalue()).size) == [9, 24]


def test_settings_that_other_libraries_changed_do_not_matter(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(InputError, match="the file is truncated"):
        open_image(encoded(Image.fromarray(noise(40, 40)), "JPEG")[:-200])
    for limit in (None, 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_image(encoded(Image.new("RGB", (9, 4)))).size == (9, 4)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="900,000,000 pixels; allowed: 178,956,970"):
            open_image(header_only_png(30_000, 30_000))


def test_images_of_a_data_set_are_square_rgb():
    pixels = noise(8, 8)
    assert np.array_equal(decode_rgb(encoded(Image.fromarray(pixels)), 8), pixels)
    for image, text in ((Image.new("L", (8, 8)), "mode L, not RGB"), (Image.new("RGB", (8, 6)), "8 x 6 pixels")):
        with pytest.raises(InputError, match=text):
            decode_rgb(encoded(image))
    with pytest.raises(InputError, match="8 x 8 pixels of mode RGB, not RGB 16 x 16"):
        decode_rgb(encoded(Image.fromarray(pixels)), 16)


@pytest.mark.parametrize(("count", "columns", "shape"), [(1, None, (1, 1)), (5, None, (2, 3)), (6, 2, (3, 2))])
@pytest.mark.parametrize("side", [8, 100])
def test_a_grid_shows_images_in_order_with_white_between(count, columns, shape, side):
    images = np.stack([np.full((side, side, 3), 10 + i, np.uint8) for i in range(count)])
    shown = max(side, MIN_TILE)
    picture = np.asarray(image_grid(images, columns))
    rows, across = shape
    assert picture.shape == (rows * (shown + 2) - 2, across * (shown + 2) - 2, 3)
    expected = np.full(rows * across, 255)
    expected[:count] = 10 + np.arange(count)
    for offset in (0, shown - 1):  # the corners of each tile
        corners = picture[offset :: shown + 2, offset :: shown + 2, 0]
        assert np.array_equal(corners.flatten(), expected)
    between = np.ones(picture.shape[:2], bool)
    between[np.ix_(*(np.arange(size) % (shown + 2) < shown for size in picture.shape[:2]))] = False
    assert (picture[between] == 255).all()


def test_captions_stand_above_their_images_and_change_no_pixel_of_the_grid():
    images = np.stack([np.full((70, 70, 3), 10 + i, np.uint8) for i in range(5)])
    plain = np.asarray(image_grid(images, 2))
    assert np.array_equal(np.asarray(image_grid(images, 2, captions=[None] * 5)), plain)
    assert np.array_equal(np.asarray(image_grid(images[:1], captions=[""])), images[0])
    captions = ["tench", "a very long name of a class", None, "", "x\ny"]
    picture = np.asarray(image_grid(images, 2, captions=captions))
    line = (len(picture) - len(plain)) // 2  # rows 1 and 3 have captions
    assert 13 <= line <= 20 and picture.shape[1:] == plain.shape[1:]
    bands = [slice(0, line), slice(line + 72 * 2, 2 * line + 72 * 2)]
    assert np.array_equal(np.delete(picture, np.r_[tuple(bands)], axis=0), plain)
    drawn = [(picture[band, column] < 128).any() for band in bands for column in (slice(0, 70), slice(72, 142))]
    assert drawn == [True, True, True, False]
    assert (picture[bands[0], 70:72] == 255).all()  # the long name does not reach the next tile


@pytest.mark.parametrize(("text", "shown"), [("tench", "tench"), ("a b\nc", "a b c"), ("", "")])
def test_captions_that_fit_are_not_shortened(text, shown):
    assert _shortened(text, ImageFont.load_default(11), 64) == shown


def test_a_png_has_the_pixels_and_no_metadata():
    image = Image.fromarray(noise(9, 5))
    image.info = {"icc_profile": b"profile", "dpi": (72, 72)}
    read = open_image(to_png(image))
    assert np.array_equal(np.asarray(read), noise(9, 5)) and not read.info


def test_long_captions_are_shortened_with_an_ellipsis():
    font = ImageFont.load_default(11)
    assert _shortened("American black bear", font, 64) == "American…"
    assert font.getlength(_shortened("W" * 100, font, 64)) <= 64
