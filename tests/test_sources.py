"""Reading folders and zips; names and labels of data sets; LatentDataset and list_converted name mistakes in them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common.errors import InputError
from common.sources import (
    IMAGE_NAME,
    LATENT_NAME,
    FileSource,
    decode_name,
    encode_name,
    image_name,
    latents_name,
    mirrored_name,
    read_dataset_json,
)
from dataset import LatentDataset
from models.autoencoder import LatentFormat
from preprocessing.listing import list_converted
from tests.conftest import ROOT
from tests.test_crops import header_only_png


@pytest.fixture(params=["folder", "zip"])
def source(tmp_path, request):
    files = {"b/2.txt": b"two", "a.txt": b"one", ".hidden": b"x", ".cache/y": b"y"}
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return FileSource(tmp_path / "files.zip")
    for name, content in files.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    return FileSource(tmp_path / "files")


def test_folder_and_zip_are_read_in_the_same_way(source):
    assert source.names == ["a.txt", "b/2.txt"]
    assert source.read("b/2.txt") == b"two" and source.size("a.txt") == 3 and "b/2.txt" in source
    with pytest.raises(InputError, match=r"nothing\.txt"):
        source.read("nothing.txt")


def test_a_source_can_be_pickled(source):
    source.read("a.txt")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read("a.txt") == b"one" and copy.names == source.names


def test_threads_and_processes_read_a_zip_without_opening_it_again(tmp_path, monkeypatch):
    """With millions of members, reading the directory again would take each worker half a minute and gigabytes."""
    contents = {f"{i % 7}/ä{i:03d}.bin": bytes([i % 251]) * (i * 37 % 1000) for i in range(300)}
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for number, (name, content) in enumerate(contents.items()):
            member = zipfile.ZipInfo(name)
            member.extra = (
                b"\x00\x00" + (number * 5).to_bytes(2, "little") + bytes(number * 5)
            )  # up to longer than ZIP_NAME_BYTES
            kind = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.writestr(member, content, kind)
    source = FileSource(tmp_path / "files.zip")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert source.names == sorted(contents)
    with ThreadPoolExecutor(8) as threads, multiprocessing.get_context("fork").Pool(2) as forks:
        for pool in (threads, forks):
            assert list(pool.map(source.read, contents)) == list(contents.values())
    assert pickle.loads(pickle.dumps(source)).read("0/ä000.bin") == b""


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = tmp_path / "files.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", b"aaaa")
        archive.writestr("b.txt", b"bbbb" * 9, zipfile.ZIP_DEFLATED)
        archive.writestr("c.txt", b"cccc" * 9, zipfile.ZIP_BZIP2)
    intact = path.read_bytes()
    path.write_bytes(intact.replace(b"aaaa", b"abaa"))
    with pytest.raises(InputError, match=r"files\.zip:a\.txt: damaged, its checksum does not match"):
        FileSource(path).read("a.txt")
    path.write_bytes(intact.replace(b"PK\x03\x04", b"PK\x03\x05"))
    with pytest.raises(InputError, match=r"b\.txt: damaged"):
        FileSource(path).read("b.txt")
    with pytest.raises(InputError, match=r"c\.txt: compressed with method 12; allowed: stored, deflated"):
        FileSource(path).read("c.txt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_two_files_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for name in (".hidden", "a.txt", ".hidden", "a.txt"):
            archive.writestr(name, b"")
    with pytest.raises(InputError, match=r"files\.zip: contains 'a.txt' more than once"):
        FileSource(tmp_path / "files.zip")


def test_links_are_followed_and_loops_are_refused(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_bytes(b"one")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "link").symlink_to(tmp_path / "there")
    assert FileSource(tmp_path / "files").names == ["link/a.txt"]
    (tmp_path / "there" / "up").symlink_to(tmp_path / "files")
    with pytest.raises(InputError, match="is a link to a folder that contains it"):
        FileSource(tmp_path / "files")


def test_links_that_make_millions_of_paths_are_refused(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}").mkdir()
        for link in "ab":
            (tmp_path / f"{number}" / link).symlink_to(tmp_path / f"{number + 1}")
    (tmp_path / "40").mkdir()
    with pytest.raises(InputError, match="more than 1,000 paths of links lead to it"):
        FileSource(tmp_path / "0")


def test_deep_folders_and_long_names_are_refused(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    with pytest.raises(InputError, match="is too long; allowed: 1,024 bytes"):
        FileSource(tmp_path)
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # shutil.rmtree is recursive


def test_files_that_are_not_regular_are_names_that_cannot_be_read(tmp_path):
    """Opening a fifo would wait for ever. Ignored, an image would be missing without a word."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    source = FileSource(tmp_path)
    assert source.names == ["a.png", "b.png"]
    for name in source.names:
        assert source.head(name) == b""
        for function in (source.read, lambda name: source.tail(name, 8)):
            with pytest.raises(InputError, match=rf"{name}: is not a regular file"):
                function(name)
    with pytest.raises(InputError, match=r"a\.png: is not a folder or a regular file"):
        FileSource(tmp_path / "a.png")


def test_a_path_that_is_no_folder_or_zip_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder or zip file"):
        FileSource(tmp_path / "none")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"broken\.zip: not a readable zip"):
        FileSource(tmp_path / "broken.zip")


def test_names_match_their_patterns():
    assert image_name(1234) == "00001/img00001234.png"
    assert IMAGE_NAME.fullmatch(image_name(1234))[1] == LATENT_NAME.fullmatch(latents_name(1234))[1] == "00001234"
    assert mirrored_name("img-mean-std-/img-mean-std-00000003.npy") == "img-mean-std-/img-mean-std-flip-00000003.npy"
    assert not LATENT_NAME.fullmatch(mirrored_name(latents_name(1234)))


def describe(data, where, **fields):
    path = data / where / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, "labels is 5; expected a list"),
        ({"00000/img00000000.png": 0}, "labels is {'00000/img"),
        ([5], "label entry 5; expected"),
        ([["00000/img00000000.png", 1, 2]], "label entry .*; expected"),
        ([["00000/img00000000.png", 10**30]], f"has label {10**30}; allowed: integers from 0 to 999,999"),
        ([["00000/img00000000.png", 10**9]], "has label 1000000000; allowed"),
        ([["00000/img00000000.png", True]], "has label True; allowed"),
        ([["00000/img00000000.png", 3_000_000]], "has label 3000000; allowed: integers from 0 to 999,999"),
        ([["00000/img00000000.png", 1.0]], "has label 1.0; allowed"),
        ([["x" * 60_000, 1]], "the name 'xxx.* has 60,000 characters; allowed: 1,024"),
        ([["x", ["y" * 60_000]]], "has label \\['yyy.{,100}; allowed"),
    ],
)
def test_invalid_labels_are_refused(labels, message, data):
    describe(data, "images", labels=labels)
    with pytest.raises(InputError, match=rf"images/dataset\.json: .*{message}"):
        LatentDataset(data)
    with pytest.raises(InputError, match=rf"images/dataset\.json: .*{message}"):
        list_converted(FileSource(data / "images"))


def test_two_labels_of_one_index_are_refused(data):
    describe(data, "vae-sd", labels=[["00000/img-mean-std-00000000.npy", 0], ["00001/img-mean-std-00000000.npy", 1]])
    with pytest.raises(InputError, match=r"index 0 has label 0 in .* and 1 in .*vae-sd/dataset\.json"):
        LatentDataset(data)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[
            ("scale", value, "scale has the value")
            for value in (None, "1", [[1]] * 3, 0, float("nan"), True, [10**400] * 3)
        ],
        *[("shift", value, "shift has the value") for value in (["0"] * 3, None, float("inf"))],
        ("codec", 5, "codec must be a name"),
    ],
)
def test_invalid_latent_formats_are_refused(field, value, message):
    fields = {"codec": "pixel", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}
    with pytest.raises(InputError, match=message):
        LatentFormat.from_json({**fields, field: value})


def test_other_files_under_the_names_of_images_and_latents_are_refused(data):
    def save_npz(path):
        np.savez(path.with_suffix(".npz"), np.zeros((6, 16, 16), np.float32))
        path.with_suffix(".npz").rename(path)

    def break_header(path):
        path.write_bytes(path.read_bytes().replace(b"'shape': (6,", b"'shape': ((,"))  # numpy: TokenError

    for spoil in (save_npz, break_header):
        spoil(data / "vae-sd" / latents_name(5))
        with pytest.raises(InputError, match=r"img-mean-std-00000005\.npy: broken latents"):
            LatentDataset(data)[5]
        np.save(data / "vae-sd" / latents_name(5), np.zeros((6, 16, 16), np.float32))
    (data / "images" / image_name(5)).write_bytes(header_only_png(30_000, 30_000))
    with pytest.raises(InputError, match=r"img00000005\.png: not an image that can be read: 900,000,000 pixels"):
        LatentDataset(data)[5]


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("others", [(), ("a.txt",), ("dataset.json",), ("x/b.txt", "x/y/dataset.json")])
def test_a_dataset_json_below_the_top_is_refused(tmp_path, as_zip, others):
    """Its labels and its codec would be ignored silently."""
    folder = tmp_path / "outer"
    for name in ("vae-sd/00000/img-mean-std-00000000.npy", "vae-sd/dataset.json", *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"labels": null}')
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", folder) if as_zip else folder
    advice = "pack the content of vae-sd without" if as_zip else f"use {path}/vae-sd, move its content to {path}"
    with pytest.raises(InputError, match=rf"vae-sd/dataset\.json: found.*; expected only at the top of .*; {advice}"):
        read_dataset_json(FileSource(path))


def test_a_dataset_json_of_other_bytes_is_refused_by_position(tmp_path):
    for content, message in (
        (b'{"labels": [', "line 1, column 13"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "JSON object"),
    ):
        (tmp_path / "dataset.json").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_dataset_json(FileSource(tmp_path))


def test_names_of_any_bytes_are_found_and_read(tmp_path):
    names = [b"\xff.txt", "\U0001f600.txt".encode(), b"caf\xe9/a\n.txt", "\u9999.txt".encode()]
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"%d" % number)
    source = FileSource(tmp_path)
    assert sorted(map(encode_name, source.names)) == sorted(names)
    for number, name in enumerate(map(decode_name, names)):
        assert name in source and source.read(name) == b"%d" % number and source.head(name) == b"%d" % number
        assert source.describe(name).isprintable()
    assert "\ud800" not in source  # a name that no file can have, from a dataset.json


LOCALE = """
import sys
from common.sources import FileSource
source = FileSource(sys.argv[1])
assert sys.getfilesystemencoding() == "ascii"
assert "\\u00e9.txt" in source and source.read("\\u00e9.txt") == b"1"
"""


def test_names_do_not_depend_on_the_locale(tmp_path):
    (tmp_path / "é.txt").write_bytes(b"1")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", LOCALE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_empty_folders_dead_links_and_system_folders(tmp_path):
    for name in ("a/b", "c", "__MACOSX", ".cache"):
        (tmp_path / "s" / name).mkdir(parents=True)
    (tmp_path / "s/c/.hidden").write_text("")
    (tmp_path / "s/__MACOSX/x.jpg").write_text("")
    (tmp_path / "s/d").symlink_to("nowhere")
    source = FileSource(tmp_path / "s")
    assert source.empty_folders == ["a/b", "c"] and source.dead_links == ["d"] and source.names == ["d"]
    for function in (source.read, source.size):
        with pytest.raises(InputError, match="s/d: is a link to nowhere, which does not exist or cannot be reached"):
            function("d")
    (tmp_path / "s/d").unlink()
    source = FileSource(shutil.make_archive(str(tmp_path / "s"), "zip", tmp_path / "s"))
    assert source.empty_folders == ["a/b", "c"] and source.names == []
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match="link: is a link to nowhere"):
        FileSource(tmp_path / "link")
