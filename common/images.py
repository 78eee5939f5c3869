"""The pictures that the programs leave for people who would rather look than read."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.io import InputError, atomic_write

# Named, so that no file is handed to one of Pillow's decoders that start other programs (EPS). JPEG includes MPO.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Exceptions of Pillow on damaged files, found by trials with random damage.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MIN_TILE = 64  # px: smaller images are shown enlarged


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Return images (N, H, W, 3), uint8, as one picture, row by row; small ones are enlarged in whole steps."""
    images = np.asarray(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    zoom = max(1, MIN_TILE // images.shape[1])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1] + gap, images.shape[2] + gap
    canvas = np.full((rows * height - gap, columns * width - gap, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height, number % columns * width
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Write a picture as PNG, atomically."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def open_image(data: bytes, formats: Sequence[str] = IMAGE_FORMATS, max_side: int | None = None) -> Image.Image:
    """Return the decoded image in a file's bytes, in its own mode.

    Raises InputError if the bytes are not a complete image of one of `formats`, or if a side is longer than `max_side`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if max_side is not None and max(image.size) > max_side:
            raise InputError(f"{image.width} x {image.height} pixels; allowed: 1 to {max_side} per side")
        image.load()
    except InputError:
        raise
    except DECODING_ERRORS as error:
        raise InputError(f"broken image ({error})") from error
    return image


def decode_rgb(data: bytes, resolution: int | None = None) -> np.ndarray:
    """Return an image of a converted data set, (R, R, 3) uint8.

    Raises InputError if it is broken, is not RGB, or is not `resolution` x `resolution` (None: any square).
    """
    image = open_image(data, ("PNG",))
    pixels = np.array(image)
    side = resolution or pixels.shape[0]
    if pixels.dtype != np.uint8 or pixels.shape != (side, side, 3):
        raise InputError(f"{image.width} x {image.height} pixels of mode {image.mode}, not RGB {side} x {side}")
    return pixels
