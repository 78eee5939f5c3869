"""Images of a source are found, and what is not taken is counted and named."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from common.errors import InputError
from common.image_files import (
    check_one_part,
    convert_command,
    find_images,
    has_images,
    stop_if_incomplete,
    suggested_images,
)
from common.sources import FileSource
from tests.test_crops import jpeg


def make_tree(folder, *names, data=b""):
    """Create files; names that end in a slash are empty folders."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(data)
    return folder


def test_images_are_found_by_the_endings_of_their_names(tmp_path):
    names = ["a.JPEG", "b.jfif", "c.jpe", "d.PNG", "x/e.webp", "x/f.pgm"]
    found = find_images(FileSource(make_tree(tmp_path, *names)))
    assert found.images == names and not (found.not_read or found.bare_folders or found.dead_links or found.notes())


def test_images_that_are_not_read_are_named(tmp_path):
    make_tree(tmp_path, "x/a.jpg", "x/b.heic", "x/c.AVIF", "x/empty_file")
    make_tree(tmp_path, "x/no_ending", "x/d.jpg.part", data=jpeg())
    make_tree(tmp_path, "x/e.unknown", data=b"\0\0\0\x1cftypavif")
    found = find_images(FileSource(tmp_path))
    assert set(found.not_read) == {"x/b.heic", "x/c.AVIF", "x/no_ending", "x/d.jpg.part", "x/e.unknown"}
    assert "rename it" in found.not_read["x/no_ending"] and ".heic images are not read" in found.not_read["x/b.heic"]
    with pytest.raises(InputError, match=r"(?s)5 images that are not read:.*x/b\.heic: .*\nADVICE"):
        stop_if_incomplete(found, {}, "ADVICE")


def test_files_that_are_no_images_are_counted_in_one_line(tmp_path):
    make_tree(tmp_path, "a.jpg", "Thumbs.db", "1.txt", "2.TXT", "dataset.json", "LICENSE", "old.tar", ".hidden")
    found = find_images(FileSource(tmp_path))
    assert found.notes() == [f"{tmp_path}: 5 files are not an image: 2 .txt, 1 .db, 1 .tar, 1 without ending"]
    stop_if_incomplete(found, {}, "")


@pytest.mark.parametrize("as_zip", [False, True])
def test_folders_without_images_are_named(as_zip, tmp_path):
    make_tree(tmp_path / "s", "n1/a.jpg", "n2/", "n3/images/", "n4/n4.tar", "n5/Thumbs.db", "n6/a.heic", "__MACOSX/")
    if as_zip:
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
            for path in sorted((tmp_path / "s").rglob("*")):
                archive.write(path, path.relative_to(tmp_path / "s"))
    found = find_images(FileSource(tmp_path / ("s.zip" if as_zip else "s")))
    assert list(found.bare_folders) == ["n2", "n3/images", "n4", "n5", "n6"] and found.other_folders == {"n5"}
    assert found.bare_folders["n2"] == "is empty" and found.bare_folders["n4"].startswith("contains only a tar archive")
    with pytest.raises(InputError, match=r"(?s)5 folders without images:\s+n2: is empty"):
        stop_if_incomplete(found, found.bare_folders, "")


def test_dead_links_are_named(tmp_path):
    make_tree(tmp_path, "n1/a.jpg")
    for name in ("n1/b.jpg", "n2", "n1/readme.txt"):
        (tmp_path / name).symlink_to("/nowhere/target")
    (tmp_path / "n1/loop.jpg").symlink_to("loop.jpg")
    found = find_images(FileSource(tmp_path))
    assert found.images == ["n1/a.jpg", "n1/b.jpg", "n1/loop.jpg"]
    assert set(found.dead_links) == {"n1/b.jpg", "n1/loop.jpg", "n2"} and list(found.bare_folders) == ["n2"]
    with pytest.raises(
        InputError, match=r"(?s)3 links to files that do not exist:.*n1/b\.jpg: is a link to /nowhere/tar"
    ):
        stop_if_incomplete(found, {}, "")
    with pytest.raises(InputError, match=r"b\.jpg: is a link to /nowhere/target, which does not exist"):
        found.source.read("n1/b.jpg")


def test_a_source_without_images_says_what_it_contains(tmp_path):
    with pytest.raises(InputError, match=r"contains no images \(\.jpg, .*its files: 2 \.txt, 1 without ending"):
        find_images(FileSource(make_tree(tmp_path / "a", "x/1.txt", "2.txt", "LICENSE")))
    with pytest.raises(InputError, match=r"no images that are read; x/a\.heic: \.heic images are not read"):
        find_images(FileSource(make_tree(tmp_path / "b", "x/a.heic")))
    with pytest.raises(InputError, match=r"contains 2 Parquet tables, first data/train-0\.parquet"):
        find_images(FileSource(make_tree(tmp_path / "c", "data/train-0.parquet", "data/val-0.parquet")))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["train/x/a.jpg", "val/x/a.jpg"], "train and val"),
        (["TRAIN/x/a.jpg", "Validation/a.jpg"], "TRAIN and Validation"),
        (["training/a.jpg", "Test/a.jpg"], "training and Test"),
        (["I/Data/CLS-LOC/train/n1/a.jpg", "I/Data/CLS-LOC/val/a.jpg"], "I/Data/CLS-LOC/train and I/Data/CLS-LOC/val"),
        (["ILSVRC2012_img_train/a.jpg", "ILSVRC2012_img_val/a.jpg"], "ILSVRC2012_img_train and ILSVRC2012_img_val"),
        (["val/a.jpg", "test/a.jpg", "x/a.jpg"], "val and test"),
        (["train2017/a.jpg", "val2017/a.jpg"], "train2017 and val2017"),
        (["seg_pred/a.jpg", "seg_test/x/a.jpg", "seg_train/x/a.jpg"], "seg_train and seg_test"),
        (["mnist-test/a.jpg", "mnist-train/a.jpg"], "mnist-train and mnist-test"),
        (["train.X1/n1/a.jpg", "train.X2/n2/a.jpg", "val.X/n1/a.jpg"], "train.X1 and val.X"),
    ],
)
def test_parts_of_a_data_set_are_refused(names, parts, tmp_path):
    first = tmp_path / parts.split(" and ")[0]
    with pytest.raises(
        InputError, match=f"contains the parts {parts} of a data set, not classes; use {first} as the source$"
    ):
        check_one_part(FileSource(make_tree(tmp_path, *names)), sorted(names))


@pytest.mark.parametrize(
    "names",
    [
        ["train/x/a.jpg", "train/y/a.jpg"],
        ["train/a.jpg", "tram/a.jpg"],
        ["test_tube/a.jpg", "train_station/a.jpg"],
        ["bullet_train/a.jpg", "crash_test/a.jpg"],
    ],
)
def test_classes_with_such_names_are_allowed(names, tmp_path):
    check_one_part(FileSource(make_tree(tmp_path, *names)), names)


def test_the_command_has_the_paths_of_the_user(tmp_path):
    make_tree(tmp_path, "a b/x/1.JPG", "c/x/1.txt", "c/.cache/1.jpg")
    assert has_images(FileSource(tmp_path / "a b").names) and not has_images(FileSource(tmp_path / "c").names)
    expected = f"--source '{tmp_path}/a b' --dest '{tmp_path}/a b-256/images' --resolution 256"
    assert convert_command(tmp_path / "a b") == f"python preprocessing/convert.py {expected}"


@pytest.mark.parametrize("path", [".", "..", "/", "photos.zip"])
def test_any_source_has_a_suggested_place(path):
    assert suggested_images(Path(path)).parts[-2:] != ("-256", "images") and "--dest" in convert_command(Path(path))
    assert suggested_images(Path("a/photos.zip")) == Path("a/photos-256/images")


def test_images_behind_links_to_folders_are_found(tmp_path):
    make_tree(tmp_path / "far/cat", "1.jpg")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/cat").symlink_to(tmp_path / "far/cat")
    assert has_images(FileSource(tmp_path / "links").names)
