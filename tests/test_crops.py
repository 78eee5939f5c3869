"""Crops against an independent resampler, and images that are not plain RGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.errors import InputError
from preprocessing.crops import TRANSFORMS, decode

FIXED_POINT = 22  # bits after the point in Pillow's 8-bit resampling


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x):
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resample_rows(pixels, size, kernel, support):
    """Resample axis 0 with the fixed-point arithmetic of Pillow, implemented in numpy."""
    old = len(pixels)
    scale = old / size
    spread = max(scale, 1.0)
    result = np.empty((size, *pixels.shape[1:]), dtype=np.uint8)
    for position in range(size):
        center = (position + 0.5) * scale
        first = max(int(center - support * spread + 0.5), 0)
        last = min(int(center + support * spread + 0.5), old)
        weights = kernel((np.arange(first, last) - center + 0.5) / spread)
        weights = weights / weights.sum()
        fixed = np.trunc(weights * 2**FIXED_POINT + np.copysign(0.5, weights)).astype(np.int64)
        total = np.tensordot(fixed, pixels[first:last].astype(np.int64), axes=1) + 2 ** (FIXED_POINT - 1)
        result[position] = np.clip(total >> FIXED_POINT, 0, 255)
    return result


def resample(pixels, width, height, kernel, support):
    across = resample_rows(pixels.swapaxes(0, 1), width, kernel, support).swapaxes(0, 1)
    return resample_rows(across, height, kernel, support)


def plain_adm_crop(pixels, resolution):
    """ADM: while the shorter side >= 2R, halve with BOX; resize the shorter side to R with BICUBIC; crop the centre."""
    while min(pixels.shape[:2]) >= 2 * resolution:
        pixels = resample(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, box, 0.5)
    scale = resolution / min(pixels.shape[:2])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    pixels = resample(pixels, width, height, bicubic, 2.0)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution]


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (70, 33), (301, 257), (40, 129), (1, 1), (5, 3)])
@pytest.mark.parametrize("resolution", [16, 31, 64])
def test_crop_is_adms_bit_for_bit(size, resolution):
    pixels = noise(*size)
    ours = TRANSFORMS["center-crop-dhariwal"](Image.fromarray(pixels), resolution)
    np.testing.assert_array_equal(np.asarray(ours), plain_adm_crop(pixels, resolution))


def test_other_crops():
    left_black = np.zeros((20, 60, 3), np.uint8)
    left_black[:, 30:] = 255
    squeezed = np.asarray(TRANSFORMS["resize"](Image.fromarray(left_black), 10))
    assert squeezed.shape == (10, 10, 3) and squeezed[:, 0].max() == 0 and squeezed[:, -1].min() == 255
    marked = np.zeros((20, 60, 3), np.uint8)
    marked[:, 20:40] = 255
    assert np.asarray(TRANSFORMS["center-crop"](Image.fromarray(marked), 10)).min() == 255


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def value_of(data):
    pixels = np.asarray(decode(data).pixels)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    return tuple(int(v) for v in pixels[0, 0])


def test_other_modes_are_converted_to_rgb():
    assert value_of(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert value_of(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    grey16 = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    assert value_of(encoded(grey16)) == (100, 100, 100)
    assert value_of(encoded(grey16, "TIFF")) == (100, 100, 100)
    assert value_of(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    red, green, blue = value_of(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red > 240 and green < 15 and blue < 15
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)
    assert value_of(encoded(palette)) == (10, 200, 30)


def test_transparent_images_get_a_white_background():
    assert value_of(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert value_of(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == (255, 0, 0)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert value_of(encoded(palette, transparency=1)) == (255, 255, 255)


def oriented_jpeg():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left; orientation 6 rotates it clockwise, so white moves to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(pixels), "JPEG", exif=exif.tobytes(), quality=100)


def test_exif_orientation():
    upright, lying = decode(oriented_jpeg()), decode(oriented_jpeg(), upright=False)
    assert upright.rotated and lying.rotated
    assert upright.pixels.size == (16, 32) and np.asarray(upright.pixels)[0].min() > 250
    assert lying.pixels.size == (32, 16)
    assert not decode(encoded(Image.new("RGB", (4, 4)), "JPEG")).rotated


def animation(form):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def header_only_png(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg(seed=0, size=(40, 30)):
    return encoded(Image.fromarray(noise(*size, seed)), "JPEG")


def test_an_image_that_would_be_too_large_is_refused_before_it_is_resized():
    image = Image.new("RGB", (1, 200_000))
    for name, transform in TRANSFORMS.items():
        if name != "center-crop":  # of 1 x 1 pixel
            with pytest.raises(InputError, match=r"would have .* pixels"):
                transform(image, 1000)
        with pytest.raises(InputError, match=r"would have .* pixels"):
            transform(image, 10**8)


def test_modes_that_pillow_cannot_convert_are_refused(monkeypatch):
    def refuse(image, mode):
        raise ValueError("conversion not supported")

    data = encoded(Image.new("L", (4, 4)))
    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(InputError, match="its mode L cannot be converted to RGB"):
        decode(data)
