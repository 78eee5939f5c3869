"""Image batches from .npz, folder and zip; what is not sound is refused by name."""

import io
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.errors import InputError
from evaluations.batches import open_images
from evaluations.npz import NpzFile, write_npz


def some_images(count: int = 5, height: int = 6, width: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    return folder


def read_all(path: Path, size: int) -> np.ndarray:
    images = open_images(path)
    parts = [(first, batch.numpy()) for first, batch in images.batches(0, images.count, size)]
    assert [first for first, _ in parts] == list(range(0, images.count, size))
    return np.concatenate([part for _, part in parts]).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_npz_folder_and_zip_give_the_same_images(tmp_path: Path, size: int) -> None:
    images = some_images()
    np.savez(tmp_path / "stored.npz", images, np.arange(5))
    np.savez_compressed(tmp_path / "packed.npz", images)
    folder = write_folder(tmp_path / "folder", images)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    for name in ("stored.npz", "packed.npz", "folder", "images.zip"):
        assert np.array_equal(read_all(tmp_path / name, size), images), name


def test_a_share_of_the_images_starts_anywhere(tmp_path: Path) -> None:
    images = some_images()
    np.savez_compressed(tmp_path / "packed.npz", images)
    np.savez(tmp_path / "stored.npz", images)
    for name in ("packed.npz", "stored.npz"):
        ((first, batch),) = open_images(tmp_path / name).batches(3, 5, 8)
        assert first == 3 and np.array_equal(batch.permute(0, 2, 3, 1), images[3:])


def test_digest_follows_content_and_names(tmp_path: Path) -> None:
    images = some_images()
    folder, other = write_folder(tmp_path / "a", images), write_folder(tmp_path / "b", images)
    digest = open_images(folder).digest()
    assert open_images(other).digest() == digest and len(digest) == 64
    (other / "000000.png").rename(other / "9.png")
    assert open_images(other).digest() != digest


def test_grey_images_count_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert read_all(tmp_path, 1).tolist() == np.full((1, 4, 4, 3), 7).tolist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (some_images().astype(np.float32), "float32, expected uint8"),
        (some_images().astype(np.int64), "int64, expected uint8"),
        (some_images()[..., :1], r"\(5, 6, 4, 1\), expected \(N, H, W, 3\)"),
        (some_images().transpose(0, 3, 1, 2).copy(), r"expected \(N, H, W, 3\)"),
        (some_images()[0], "expected"),
        (some_images()[:0], "no images"),
        (np.zeros((1, 5000, 1, 3), np.uint8), "1 x 5000 pixels; allowed: 1 to 4096 per side"),
        (np.asfortranarray(some_images()), "Fortran"),
        (np.array([{"pickled": "object"}]), "pickled objects, which are never loaded"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "batch.npz", array)
    with pytest.raises(InputError, match=rf"(?s)batch\.npz.*{message}"):
        open_images(tmp_path / "batch.npz")


def test_missing_array_and_missing_file_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", images=some_images())
    with pytest.raises(InputError, match="no array 'arr_0'; it holds images"):
        open_images(tmp_path / "batch.npz")
    with pytest.raises(InputError, match=r"nowhere\.npz: no such file"):
        open_images(tmp_path / "nowhere.npz")
    with pytest.raises(InputError, match="nowhere"):
        open_images(tmp_path / "nowhere")


def test_empty_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    np.savez(path, some_images())
    complete = path.read_bytes()
    for content in (b"", complete[: len(complete) // 2], b"no zip at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"batch\.npz: not an \.npz file, or cut short"):
            open_images(path)


def write_member(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", content)
    return path


def test_an_array_shorter_than_its_header_says_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, some_images())
    with pytest.raises(InputError, match="cut short"):
        open_images(write_member(tmp_path / "short.npz", buffer.getvalue()[:-10]))
    cut_header = buffer.getvalue().replace(b"3), }", b"3 , }")
    for content in (b"not an array", cut_header, cut_header.replace(b"(5, ", b"(05,")):
        with pytest.raises(InputError, match="not a readable array"):
            open_images(write_member(tmp_path / "garbage.npz", content))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_compressed_array_is_refused(tmp_path: Path, compression: int) -> None:
    buffer = io.BytesIO()
    np.save(buffer, some_images(50, 20, 20))
    path = write_member(tmp_path / "batch.npz", buffer.getvalue(), compression)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|ends early|not a readable array"):
        read_all(path, 8)


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (100, 1024, 1024, 3)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(100):
            member.write(bytes(1024 * 1024 * 3))
    with pytest.raises(InputError, match=r"unpacks .* more than 500 times its size is refused"):
        open_images(path)


def test_statistics_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(8), sigma=np.zeros((8, 8)), text=np.array(["a"], object))
    npz = NpzFile(tmp_path / "ref.npz")
    assert npz.array("mu", (8,), "f").shape == (8,)
    for name, shape, kind in (("mu", (2048,), "f"), ("sigma", (8, 8), "i"), ("text", (1,), "U")):
        with pytest.raises(InputError, match=name):
            npz.array(name, shape, kind)


def test_folders_with_other_sizes_modes_or_damage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no images"):
        open_images(tmp_path)
    folder = write_folder(tmp_path / "folder", some_images(3))
    for number, (content, message) in enumerate(
        [
            (png(Image.new("RGB", (9, 9))), "9 x 9 pixels, but others have 4 x 6; allowed: images of one size"),
            (png(Image.new("RGBA", (4, 6))), "mode RGBA, expected 8-bit RGB or grey"),
            (png(Image.new("RGB", (4, 6)))[:40], "not an image that can be read"),
            (b"", "not an image that can be read"),
            (png(Image.new("RGB", (4, 6)), text="a" * 2**21), "not an image that can be read"),
            (bomb(60_000), "not an image that can be read"),
            (bomb(5_000), "5000 x 5000 pixels; allowed: 1 to 4096 per side"),
        ]
    ):
        (folder / "000001.png").write_bytes(content)
        with pytest.raises(InputError, match=rf"000001\.png: {message}"):
            read_all(folder, 1 + number)


def png(image: Image.Image, text: str = "") -> bytes:
    buffer, texts = io.BytesIO(), PngInfo()
    texts.add_text("comment", text, zip=True)
    image.save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """Return a small PNG that claims to be large (its header is the first chunk, its checksum behind it)."""
    content = png(Image.new("RGB", (4, 6)))
    header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def test_what_is_written_is_read_back_and_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    images, contents = some_images(), []
    for name in ("one.npz", "other.npz"):
        with open(tmp_path / name, "wb") as file:
            write_npz(file, iter(images), images.shape, {"mu": np.arange(3.0), "inception": "name"})
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert np.array_equal(read_all(tmp_path / "one.npz", 2), images)
    with np.load(tmp_path / "one.npz", allow_pickle=False) as archive:
        assert archive.files == ["mu", "inception", "arr_0"]
        assert archive["mu"].tolist() == [0, 1, 2] and archive["inception"] == "name"


def test_a_folder_that_generate_wrote_means_its_images(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:06d}.png")
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "grid.png")
    (tmp_path / "samples.json").write_text("{}")
    assert np.array_equal(open_images(tmp_path).read(0, 3), pixels)
    np.savez(tmp_path / "samples.npz", arr_0=pixels[::-1])
    assert np.array_equal(open_images(tmp_path).read(0, 3), pixels[::-1])
    (tmp_path / "samples.npz").rename(tmp_path / "samples.NPZ")
    assert np.array_equal(open_images(tmp_path / "samples.NPZ").read(0, 3), pixels[::-1])


def test_a_grid_before_the_images_is_the_odd_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", some_images(3))
    Image.new("RGB", (90, 8)).save(folder / "0.png")
    with pytest.raises(InputError, match=r"/0\.png: 90 x 8 pixels, but others have 4 x 6; .*remove it if it is a grid"):
        read_all(folder, 2)


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_sample_set_in_a_folder_or_zip_is_named(tmp_path: Path, as_zip: bool) -> None:
    """Its grid would count as an image."""
    (tmp_path / "sets/a").mkdir(parents=True)
    write_folder(tmp_path / "sets/a/images", some_images(2))
    (tmp_path / "sets/a/samples.json").write_text("{}")
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "sets/a") if as_zip else tmp_path / "sets"
    with pytest.raises(InputError, match=r"samples\.json: a sample set of generate\.py; give its folder"):
        open_images(path)


def test_what_is_not_taken_from_a_folder_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", some_images(3))
    (folder / "note.txt").write_text("")
    (folder / "000001.png").rename(folder / "000001.jfif")
    assert open_images(folder).count == 3
    assert open_images(folder).notes == [f"{folder}: 1 file is not an image: 1 .txt"]
    (folder / "000009.heic").write_bytes(b"")
    (folder / "link.png").symlink_to("/nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"(?s)1 link to a file.*link\.png.*1 image that is not.*heic.*1 folder.*empty"
    ):
        open_images(folder)


def test_other_sources_of_images_are_explained(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_folder(tmp_path / part, some_images(2))
    with pytest.raises(InputError, match="contains the parts train and val of a data set"):
        open_images(tmp_path)
    (tmp_path / "samples.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"samples\.tar: is a tar archive, which is not read"):
        open_images(tmp_path / "samples.tar")


def test_names_of_any_bytes_have_a_digest(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", some_images(1))
    os.rename(folder / "000000.png", os.fsencode(folder) + b"/caf\xe9.png")
    assert len(open_images(folder).digest()) == 64
