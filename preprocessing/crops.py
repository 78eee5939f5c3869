"""From a photograph's bytes to a square RGB crop and its PNG: decoding without silent errors, and the three crops.

`center-crop-dhariwal` is the crop of ADM (Dhariwal & Nichol, arXiv 2105.05233), pixel for pixel; everything published
on ImageNet 256 x 256 uses it.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.images import IMAGE_FORMATS
from common.io import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 2 * 89_478_485  # where Pillow refuses to decode; also the limit of an enlarged image before its crop

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # the EXIF standard's eight orientations, and what turns them upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Photograph(NamedTuple):
    """A decoded image: `pixels` in mode RGB, and whether an EXIF orientation other than upright was found."""

    pixels: Image.Image
    tilted: bool


def decode(data: bytes, upright: bool = True) -> Photograph:
    """Return the image in a file's bytes as 8-bit RGB.

    16-bit grey is scaled to 8 bits; transparency is laid on white; CMYK and palettes are converted as Pillow does, as
    ADM did. With `upright` the EXIF orientation is applied, else only reported. Raises InputError for animations and
    for 32-bit pixels, which have no defined range, and Pillow's many exceptions for broken data.
    """
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        # A phone's MPO holds the photograph first and previews after it; other formats' frames are equals.
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise InputError(f"is animated or has pages ({frames} frames); give one image a file")
        image.load()
        orientation = _orientation(image)
        pixels = _to_rgb(image)
    if upright and orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    return Photograph(pixels, orientation in _UPRIGHT)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 -> 255
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"has 32-bit pixels (mode {image.mode}), whose range is not defined; convert it to 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # ImageNet has photographs with broken EXIF and sound pixels; such a block says nothing
        return 1


def center_crop_dhariwal(image: Image.Image, resolution: int) -> Image.Image:
    """Return ADM's crop: halve by BOX while twice too large, BICUBIC to the size, cut out the centre."""
    while min(image.size) >= 2 * resolution:
        image = _resample(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise InputError(f"would be {width} x {height} before its crop, more than {MAX_PIXELS:,} pixels")
    image = _resample(image, width, height, Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Return the largest centred square, resampled by LANCZOS in one step."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return resize(image.crop((left, top, left + side, top + side)), resolution)


def resize(image: Image.Image, resolution: int) -> Image.Image:
    """Return the whole image, resampled by LANCZOS; its proportions change if it is not square."""
    return _resample(image, resolution, resolution, Image.Resampling.LANCZOS)


def _resample(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    # Rounded to 8 bits between the passes, so their order shows. ADM's Pillow, like all up to 12, resampled along the
    # rows first; Pillow 13 begins with the columns of tall images, which moves values by a level or more.
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


TRANSFORMS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center-crop-dhariwal": center_crop_dhariwal,
    "center-crop": center_crop,
    "resize": resize,
}


def to_png(image: Image.Image) -> bytes:
    """Return an image as a PNG without metadata.

    Run-length compression at level 1 gives files as small as the default does for photographs, in a quarter of its
    time.
    """
    image.info.clear()  # Pillow would copy colour profile and transparency into the PNG
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()
