"""Packed data is named, and the commands that are shown for it make image files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from common.errors import InputError
from common.packed import _endings, explain_packed, packed_kind
from common.sources import FileSource
from preprocessing.listing import list_images
from tests.test_crops import jpeg


def write_tar(path, **members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def run_commands(message):
    """Run the lines after the first one of a message as a shell script, without installing packages."""
    lines = [line for line in str(message).splitlines()[1:] if not line.startswith("pip ")]
    script = "\n".join(lines).replace("python -", f"{sys.executable} -")
    subprocess.run(["bash", "-c", script], check=True, capture_output=True)


def test_kinds_are_known_by_their_endings():
    assert packed_kind("a/b.TAR.gz") == "tar archive" and packed_kind("b.parquet") == "Parquet table"
    assert packed_kind("a.jpg") is None and packed_kind("tar") is None


@pytest.mark.parametrize("layout", ["{0}.tar", "{0}/{0}.tar", "{0}.tar.gz"])
def test_tar_archives_of_classes_are_unpacked_to_class_folders(layout, tmp_path):
    source = tmp_path / "my train"
    for name in ("n01", "n02"):
        write_tar(source / layout.format(name), **{f"{name}_1.JPEG": jpeg()})
    with pytest.raises(InputError, match=r"contains 2 tar archives, first n01.*; unpack them first:") as caught:
        list_images(FileSource(source))
    run_commands(caught.value)
    assert list_images(FileSource(source)).names == ["n01/n01_1.JPEG", "n02/n02_1.JPEG"]


def test_a_tar_archive_is_unpacked(tmp_path):
    path = write_tar(tmp_path / "photos.tar", **{"x/1.jpg": jpeg(), "y/1.jpg": jpeg()})
    path.rename(tmp_path / "photos")  # known from its content
    with pytest.raises(InputError, match="photos: is a tar archive, which is not read; unpack it") as caught:
        FileSource(tmp_path / "photos")
    run_commands(caught.value)
    assert list_images(FileSource(tmp_path / "photos-images")).labels == [0, 1]


def test_shards_of_a_webdataset_become_class_folders(tmp_path):
    for number in range(2):
        members = {f"{i}.{ending}": data for i in range(2) for ending, data in (("jpg", jpeg()), ("cls", b"%d" % i))}
        write_tar(tmp_path / "w" / f"train-{number}.tar", **members)
    with pytest.raises(InputError, match="these are shards of a WebDataset") as caught:
        list_images(FileSource(tmp_path / "w"))
    run_commands(caught.value)
    listing = list_images(FileSource(tmp_path / "w-images"))
    assert listing.classes == ["000000", "000001"] and listing.labels == [0, 0, 1, 1]


def test_shards_without_labels_and_folders_of_zips(tmp_path):
    write_tar(tmp_path / "w" / "0.tar", **{"a.jpg": jpeg(), "a.txt": b"a cat"})
    with pytest.raises(InputError, match=r"first \(no labels, KEY.cls: then use convert.py --labels none\)") as caught:
        list_images(FileSource(tmp_path / "w"))
    run_commands(caught.value)
    assert list_images(FileSource(tmp_path / "w"), "none").names == ["0/a.jpg"]
    text = explain_packed(tmp_path / "z", ["a.zip", "b.zip"])
    assert text.endswith(f'for f in {tmp_path}/z/*.zip; do unzip -q "$f" -d "${{f%.zip}}"; done')


def test_only_the_tables_of_the_training_set_are_written():
    for names, pattern in (
        (["data/test-0.parquet", "data/train-0.parquet"], "train*.parquet"),
        (["test/data-0.arrow", "train/data-0.arrow"], "train*/*.arrow"),
        (["a/0.parquet", "b/1.parquet"], "*.parquet"),
    ):
        assert f"rglob({pattern!r})" in explain_packed(Path("x"), names)


def test_tables_become_class_folders(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": jpeg(i), "path": None}, "label": i % 2} for i in range(3)]
    (tmp_path / "p").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p" / "train-0.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p" / "validation-0.parquet")
    (tmp_path / "a").mkdir()
    with arrow.OSFile(str(tmp_path / "a" / "data.arrow"), "wb") as file:
        table = arrow.Table.from_pylist(rows)
        with arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    for name in ("p", "a"):
        with pytest.raises(InputError) as caught:
            list_images(FileSource(tmp_path / name))
        run_commands(caught.value)
        assert list_images(FileSource(tmp_path / f"{name}-images")).labels == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.tfrecord", "is a TFRecord file, which is not read; write its images to files"),
        ("x.parquet", "is a Parquet table"),
        ("x.7z", "7z x "),
    ],
)
def test_a_single_file_is_named(name, text, tmp_path):
    (tmp_path / name).write_bytes(b"data")
    with pytest.raises(InputError, match=rf"{name}: .*{text}|(?s:{name}: .*{text})"):
        FileSource(tmp_path / name)


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
def test_only_the_start_of_an_archive_is_unpacked(opener, tmp_path, monkeypatch):
    """Its members may unpack to any size."""
    monkeypatch.setattr("common.packed.SHARD_HEAD", 1 << 14)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("0.jpg", "0.cls", "large.bin", "1.txt"):
            member = tarfile.TarInfo(name)
            member.size = 10**6 if name == "large.bin" else 9
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    with opener(tmp_path / "a", "wb") as file:
        file.write(content.getvalue())
    assert _endings(tmp_path / "a") == {"jpg", "cls", "bin"}
    assert explain_packed(tmp_path / "a").startswith("is a tar archive")
    for content in (b"", b"text", bytes(10240), b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"):
        (tmp_path / "b").write_bytes(content)
        assert explain_packed(tmp_path / "b") is None
