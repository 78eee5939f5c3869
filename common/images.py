"""Decoding images, and writing images and image grids as PNG."""

from __future__ import annotations

import io
import logging
import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFile, ImageFont, UnidentifiedImageError

from common.errors import InputError
from common.temporary import atomic_write
from common.zip_files import MAX_RATIO

# Listed, so that Pillow does not use decoders that start other programs (EPS). JPEG includes MPO.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 2 * 89_478_485  # Pillow's own limit; a larger image would take gigabytes of memory
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNREADABLE = "not an image that can be read"
MIN_TILE = 64  # px; a grid shows smaller images enlarged
MIN_FONT_SIZE = 11  # of captions
HEAD = 100  # bytes in which a web page is recognised

# Pillow warns about unusual but readable files. Files that cannot be read raise errors.
warnings.filterwarnings("ignore", module=r"PIL\b")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def open_image(data: bytes, formats: Sequence[str] = IMAGE_FORMATS, max_side: int | None = None) -> Image.Image:
    """Return the image in a file's bytes, decoded, in its own mode.

    The checksums of a PNG are checked. Other formats have none for their pixels.
    Raises InputError if the bytes are not a complete image of one of `formats`, if they contain several images, if the
    image has more than MAX_PIXELS, or if a side is longer than `max_side` px.
    """
    # Other libraries change these settings of the process. MAX_PIXELS replaces Pillow's limit.
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    try:
        packed = _check_png(data) if data.startswith(PNG_SIGNATURE) else None
        image = Image.open(io.BytesIO(data), formats=formats)
        _check_size(image.size, max_side, packed)
        if image.format == "TIFF" and _covered(image) not in (image.size, image.size[::-1]):
            raise InputError(f"{UNREADABLE}: its data is damaged (it does not contain all pixels)")
        image.load()  # libtiff, a C library, prints about damage to stderr; Pillow has no switch for it
        frames = getattr(image, "n_frames", 1)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise InputError(f"{UNREADABLE}: {_why(data, formats, error)}") from error
    if frames > 1 and image.format != "MPO":  # a phone's MPO contains the photograph first, then previews of it
        raise InputError(f"is an animation or has several pages ({frames} frames); allowed: one image per file")
    return image


def _check_png(data: bytes) -> int:
    """Return the number of bytes of a PNG's compressed pixels (PNG specification, section 5.3).

    Raises InputError unless all chunks are complete and have the right checksums. Pillow does not check those of the
    pixels (IDAT).
    """
    view, start, kind, packed = memoryview(data), len(PNG_SIGNATURE), b"", 0
    while kind != b"IEND":
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")  # after length, type and content
        if end + 4 > len(data):
            raise InputError(f"{UNREADABLE}: the file is truncated")
        kind = view[start + 4 : start + 8]
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise InputError(f"{UNREADABLE}: its data is damaged (a checksum of the PNG does not match)")
        packed += end - start if kind == b"IDAT" else 0
        start = end + 4
    return packed


def _check_size(size: tuple[int, int], max_side: int | None, packed: int | None) -> None:
    """Raise InputError for an image that is too large to decode, or larger than `packed` bytes of a PNG can contain."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(f"{UNREADABLE}: {width * height:,} pixels; allowed: {MAX_PIXELS:,}")
    if max_side is not None and max(size) > max_side:
        raise InputError(f"{width} x {height} pixels; allowed: 1 to {max_side} per side")
    if packed is not None and width * height > 8 * MAX_RATIO * packed:  # a pixel has one bit or more
        raise InputError(f"{UNREADABLE}: {width} x {height} pixels, but its {packed:,} bytes cannot contain as many")


def _covered(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that the data of a TIFF covers, before its orientation is applied.

    Pillow leaves the other pixels black.
    """
    return tuple(max((tile[1][side] for tile in image.tile), default=0) for side in (2, 3))


def _why(data: bytes, formats: Sequence[str], error: Exception) -> str:
    """Return in one phrase why Pillow cannot decode a file. Pillow's texts contain addresses of objects in memory."""
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file by git lfs pull"
    if data[:HEAD].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    if isinstance(error, UnidentifiedImageError):
        return f"its content is not of a format that is read ({', '.join(formats)}), or damaged"
    is_truncated = isinstance(error, EOFError) or "truncated" in str(error)
    return "the file is truncated" if is_truncated else "its data is damaged"


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in another mode, as Pillow converts it. Raises InputError if it cannot (damaged palettes)."""
    try:
        return image if image.mode == mode else image.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types of errors
        raise InputError(f"{UNREADABLE}: its mode {image.mode} cannot be converted to {mode}") from error


def decode_rgb(data: bytes, resolution: int | None = None) -> np.ndarray:
    """Return the pixels (R, R, 3) uint8 of an RGB PNG, with R = `resolution` (None: any); InputError for others."""
    image = open_image(data, ("PNG",), max_side=resolution)
    pixels = np.array(image)
    side = resolution or pixels.shape[0]
    if pixels.dtype != np.uint8 or pixels.shape != (side, side, 3):
        raise InputError(f"{image.width} x {image.height} pixels of mode {image.mode}, not RGB {side} x {side}")
    return pixels


def image_grid(
    images: np.ndarray, columns: int | None = None, gap: int = 2, captions: Sequence[str | None] | None = None
) -> Image.Image:
    """Return one picture of images (N, H, W, 3) uint8, row by row with `gap` white pixels between them.

    Images smaller than MIN_TILE are enlarged by an integer factor. The default for `columns` gives a square grid.
    `captions` holds an ASCII text or None for each image, drawn above it; long texts are shortened.
    """
    import torch  # imported here: convert.py uses this module without torch
    from torchvision.utils import make_grid

    images = np.asarray(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    zoom = max(1, MIN_TILE // images.shape[1])
    tiles = torch.from_numpy(images.repeat(zoom, axis=1).repeat(zoom, axis=2)).permute(0, 3, 1, 2)
    grid = make_grid(tiles, nrow=columns, padding=gap, pad_value=255)
    if len(tiles) > 1:  # make_grid adds a margin around all other grids
        grid = grid[:, gap : grid.shape[1] - gap, gap : grid.shape[2] - gap]
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    return picture if captions is None else _with_captions(picture, columns, tiles.shape[2:], gap, captions)


def _with_captions(
    grid: Image.Image, columns: int, tile: tuple[int, int], gap: int, captions: Sequence[str | None]
) -> Image.Image:
    """Return a grid of tiles (height, width) with a line of captions above each row that has one."""
    height, width = tile
    font = ImageFont.load_default(max(MIN_FONT_SIZE, width // 16))
    line = sum(font.getmetrics()) + 2
    rows = [captions[first : first + columns] for first in range(0, len(captions), columns)]
    picture = Image.new("RGB", (grid.width, grid.height + line * sum(map(any, rows))), "white")
    draw, top = ImageDraw.Draw(picture), 0
    for number, row in enumerate(rows):
        for column, text in enumerate(row):
            centre = (column * (width + gap) + width // 2, top + line // 2)
            draw.text(centre, _shortened(text or "", font, width), "black", font, anchor="mm")
        top += line * any(row)
        above = number * (height + gap)
        band = grid.crop((0, above, grid.width, min(above + height + gap, grid.height)))
        picture.paste(band, (0, top))
        top += band.height
    return picture


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text in one line, with an ellipsis at its end if it would be wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1].rstrip()
    return f"{text}…"


def to_png(image: Image.Image) -> bytes:
    """Return an image as a PNG without metadata.

    Run-length compression at level 1 takes a quarter of the default's time, and files are about 1 % larger (photographs
    and images of a codec, 256 px).
    """
    image.info.clear()  # Pillow would write colour profile and transparency into the PNG
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Write a picture as PNG, atomically."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG")
