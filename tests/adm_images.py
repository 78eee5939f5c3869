"""Made-up test images from a seed: numpy and Pillow only.

    python tests/adm_images.py FOLDER [SET ...]     writes FOLDER/SET.npz with arr_0

Colour fields with stripes, blocks or rings, a few shapes, a little noise.  The
shifted kind, for sample sets, has other proportions, fewer shapes, sometimes a
blur, and a contrast and brightness change.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# name: (count, size, seed, shifted).  The first n images of a set do not
# depend on the count.
SETS = {
    "ref256_300": (300, 256, 1, False),
    "sample64_200": (200, 64, 2, True),
}

# sha256 of arr_0's bytes, with Pillow 13.0.0; Pillow resizes and draws, so
# another version of it may give other images
SHA256 = {
    "ref256_300": "90fe1372fe2afd0d529da9f05b789f24ada6bc7371e9332ebc8bfb92a202b80c",
    "sample64_200": "7d0ce4d6de29332ffcba50c30414ee0f1f1ed548a6cded6746807f30b9fc516c",
}

PLAIN, STRIPES, BLOCKS, RINGS, BOTH = range(5)  # BOTH: stripes and blocks
USUAL = [0.2, 0.2, 0.2, 0.2, 0.2]
SHIFTED = [0.3, 0.3, 0.1, 0.2, 0.1]


def image(rng, size, kind, shifted):
    """One image, size x size x 3 uint8.  The order of the draws matters."""
    grid = int(rng.choice([2, 3, 5, 9]))
    field = 0.6 * rng.uniform(0, 255, (grid, grid, 3)) + 0.4 * rng.uniform(0, 255, 3)
    field = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    a = np.asarray(field.resize((size, size), Image.BICUBIC)).astype(np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    y, x = y.astype(np.float64), x.astype(np.float64)  # the same in numpy 1 and 2

    if kind in (STRIPES, BOTH):
        angle, rate = rng.uniform(0, np.pi), rng.uniform(3, 30)
        along = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * rate * along + rng.uniform(0, 6.28))
        a += wave[..., None] * rng.uniform(10, 90, 3)
    if kind in (BLOCKS, BOTH):
        n = int(rng.integers(4, 24))
        sign = rng.integers(0, 2, (n, n)).astype(np.float32) * 2 - 1
        cell = np.ones((size // n + 1, size // n + 1), np.float32)
        a += np.kron(sign, cell)[:size, :size, None] * rng.uniform(5, 70, 3)
    if kind == RINGS:
        cx, cy = rng.uniform(0.2, 0.8, 2)
        rate = rng.uniform(4, 25)
        radius = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
        a += np.sin(2 * np.pi * rate * radius)[..., None] * rng.uniform(10, 90, 3)

    im = Image.fromarray(a.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(im)
    for _ in range(int(rng.integers(0, 4 if shifted else 7))):
        x0, y0 = rng.uniform(-0.1, 0.8, 2) * size
        w, h = rng.uniform(0.08, 0.5, 2) * size
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        shape = int(rng.integers(0, 3))
        if shape == 0:
            draw.ellipse([x0, y0, x0 + w, y0 + h], fill=colour)
        elif shape == 1:
            draw.rectangle([x0, y0, x0 + w, y0 + h], fill=colour)
        else:
            draw.polygon([(x0, y0), (x0 + w, y0 + h / 3), (x0 + w / 3, y0 + h)], fill=colour)
    if shifted and rng.uniform() < 0.6:
        im = im.filter(ImageFilter.GaussianBlur(size / 128))

    a = np.asarray(im).astype(np.float32)
    a += rng.normal(0, rng.uniform(0, 6), a.shape)
    if shifted:
        a = 128 + (a - 128) * rng.uniform(0.7, 1.0) + rng.uniform(-10, 10)
    return a.clip(0, 255).round().astype(np.uint8)


def images(count, size, seed, shifted=False):
    """count x size x size x 3, uint8."""
    rng = np.random.default_rng(seed)
    odds = SHIFTED if shifted else USUAL
    return np.stack([image(rng, size, int(rng.choice(5, p=odds)), shifted) for _ in range(count)])


def digest(a):
    return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or SETS:
        a = images(*SETS[name])
        np.savez(folder / f"{name}.npz", a)
        same = "as recorded" if digest(a) == SHA256.get(name) else "NOT as recorded"
        print(name, a.shape, digest(a), same)
