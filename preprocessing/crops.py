"""Decoding photographs to 8-bit RGB, the crops to a square, and encoding as PNG.

`center-crop-dhariwal` is the crop of ADM (Dhariwal & Nichol, arXiv 2105.05233), bit for bit. All published results on
ImageNet 256 x 256 use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.errors import InputError
from common.images import MAX_PIXELS, open_image, to_mode

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation: what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Photograph(NamedTuple):
    """A decoded image: `pixels` in mode RGB, and whether its EXIF orientation is other than upright."""

    pixels: Image.Image
    rotated: bool


def decode(data: bytes, upright: bool = True) -> Photograph:
    """Return the image in a file's bytes as 8-bit RGB.

    16-bit grey is scaled to 8 bits. Transparent images get a white background. Pillow converts CMYK and palettes, as in
    ADM. With `upright` the EXIF orientation is applied, otherwise it is only reported.
    Raises InputError if the image is broken, animated, or has 32-bit pixels, whose range is not defined.
    """
    image = open_image(data)
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # ImageNet contains valid photographs with broken EXIF data
        orientation = 1
    pixels = _to_rgb(image)
    if upright and orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    return Photograph(pixels, orientation in _UPRIGHT)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(f"has 32-bit pixels (mode {image.mode}) of unknown range; convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = to_mode(image, "RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_mode(image, "RGB")


def center_crop_dhariwal(image: Image.Image, resolution: int) -> Image.Image:
    """Return ADM's crop: halve with BOX while the image is twice too large, resize with BICUBIC, crop the centre."""
    while min(image.size) >= 2 * resolution:
        image = _resample(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise InputError(f"would have {width} x {height} pixels before its crop; allowed: {MAX_PIXELS:,} pixels")
    image = _resample(image, width, height, Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Return the largest centred square, resized with LANCZOS in one step."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), resolution)


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Return the full image, resized with LANCZOS to a square; this changes its aspect ratio."""
    return _resample(image, resolution, resolution, Image.Resampling.LANCZOS)


def center_crop_wide(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the published `center-crop-wide`: a width x height picture, centred on a black square of side `width`.

    The rows of the full width that have the aspect ratio of a `width` wide picture are resized with Lanczos. Raises
    InputError for an image that is too small.
    """
    rows = round(width * image.height / image.width)
    if image.width < width or rows < height:
        raise InputError(
            f"{image.width} x {image.height} pixels are too few for center-crop-wide to {width} x {height}"
        )
    top, bottom = (image.height - rows) // 2, (image.height + rows) // 2
    picture = _resample(image.crop((0, top, image.width, bottom)), width, height, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (width, width))
    square.paste(picture, (0, (width - height) // 2))
    return square


def _resample(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    if width * max(height, image.height) > MAX_PIXELS:
        raise InputError(f"would have {width} x {max(height, image.height)} pixels; allowed: {MAX_PIXELS:,} pixels")
    # Pillow rounds to 8 bits after each pass, so the order of the passes changes the result. ADM's Pillow, like all
    # versions up to 12, resized the width first. Pillow 13 resizes the height of tall images first, so values differ.
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


TRANSFORMS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center-crop-dhariwal": center_crop_dhariwal,
    "center-crop": center_crop,
    "resize": resize,
}
