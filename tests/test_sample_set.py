"""The folder of a set of samples: whose it is, what of it is missing, what is made of it."""

import errno
import json
import os
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from common.classes import ClassSet
from common.errors import InputError
from generation import sample_set
from generation.sample_set import DIGEST, SampleSet
from tests.conftest import ROOT
from tests.test_locks import LOCKER

SIZE = 4


def pixels(number):
    return np.full((SIZE, SIZE, 3), number, dtype=np.uint8)


def tokens(numbers):
    return np.array([[number, number + 0.5] for number in numbers], dtype=np.float32)


def write(samples, *batches):
    for numbers in batches:
        for number in numbers:
            samples.write_image(number, pixels(number))
        samples.write_cls_tokens(numbers, tokens(numbers))


@pytest.fixture
def samples(tmp_path):
    """A complete set of 7 images, with class tokens."""
    samples = SampleSet(tmp_path / "set", 7, SIZE)
    write(samples, range(4), range(4, 7))
    samples.finish([0] * 7, False, with_cls=True, npz=True)
    return samples


def test_what_is_missing(samples):
    assert samples.missing_batches(2, with_cls=True) == []
    samples.image_path(3).unlink()
    samples.image_path(6).write_bytes(b"")
    assert samples.missing_batches(2, with_cls=True) == [range(2, 4), range(6, 7)]
    more = SampleSet(samples.folder, 9, SIZE)
    for number in range(9):
        more.write_image(number, pixels(number))
    assert more.missing_batches(4, with_cls=False) == []
    assert more.missing_batches(4, with_cls=True) == [range(4, 8), range(8, 9)]


def test_a_set_whose_images_are_compressed_more_is_completed(samples):
    """As versions that compressed images by Pillow's default wrote them."""
    npz = (samples.folder / "samples.npz").read_bytes()
    for number in range(4):
        Image.fromarray(pixels(number)).save(samples.image_path(number))
    samples.image_path(5).unlink()
    assert samples.missing_batches(2, with_cls=True) == [range(4, 6)]
    write(samples, range(4, 6))
    samples.finish([0] * 7, False, with_cls=True, npz=True)
    assert (samples.folder / "samples.npz").read_bytes() == npz


def test_class_tokens_that_are_known_are_never_dropped(samples):
    joined = samples.folder / "cls_tokens.npy"
    fewer, more = SampleSet(samples.folder, 5, SIZE), SampleSet(samples.folder, 9, SIZE)
    fewer.finish([0] * 5, False, with_cls=True, npz=False)
    assert np.array_equal(np.load(joined), tokens(range(7)))
    assert np.array_equal(fewer.read_cls_tokens(), tokens(range(5)))
    write(more, range(8, 9))  # an interrupted set
    fewer.finish([0] * 5, False, with_cls=True, npz=False)
    assert more.missing_batches(1, with_cls=True) == [range(7, 8)]
    write(more, range(7, 8))
    more.finish([0] * 9, False, with_cls=True, npz=False)
    assert np.array_equal(np.load(joined), tokens(range(9))) and not (samples.folder / "cls").exists()


@pytest.mark.parametrize("content", [b"", b"PK", np.zeros(3), np.zeros((2, 2))])
def test_broken_class_tokens_are_named(samples, content):
    part = samples.folder / "cls" / "000007-000010.npy"
    part.parent.mkdir()
    part.write_bytes(content) if isinstance(content, bytes) else np.save(part, content)
    with pytest.raises(InputError, match=r"000007-000010\.npy: broken class tokens, .*; remove it"):
        samples.missing_batches(2, with_cls=True)
    assert samples.missing_batches(2, with_cls=False) == []


def test_the_npz_is_written_only_if_it_is_not_that_of_the_images(samples):
    npz = samples.folder / "samples.npz"

    def written(total=7):
        before = npz.stat().st_ino
        SampleSet(samples.folder, total, SIZE).finish([0] * total, False, with_cls=False, npz=True)
        with np.load(npz) as archive:
            assert np.array_equal(archive["arr_0"], np.stack([pixels(number) for number in range(total)]))
        return npz.stat().st_ino != before

    time.sleep(0.02)  # the clock of a file system may be coarse
    os.utime(npz)
    assert not written()
    assert written(total=5) and written(total=7)
    time.sleep(0.02)
    os.utime(samples.image_path(2), ns=(0, 0))  # as if an old image was copied to its name
    assert written()
    npz.write_bytes(b"cut short")
    assert written()


def test_images_are_read_ahead_by_a_fixed_number(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(SampleSet, "image_path", lambda self, number: started.append(number) or number)
    monkeypatch.setattr(SampleSet, "_read_image", lambda self, path: path)
    reader = SampleSet(tmp_path, 500, SIZE).read_images()
    assert list(islice(reader, 10)) == list(range(10))
    assert len(started) < 10 + sample_set.READ_AHEAD
    assert list(reader) == list(range(10, 500))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not an image that can be read"),
        (b"\x89PNG", "not an image that can be read"),
        (Image.new("RGB", (6, 4)), "6 x 4 pixels; allowed: 1 to 4 per side"),
    ],
)
def test_an_image_that_is_none_is_named(samples, content, text):
    assert len(list(samples.read_images())) == 7
    path = samples.image_path(3)
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    os.utime(path, (2**32, 2**32))  # newer than samples.npz
    for use in (lambda: list(samples.read_images()), lambda: samples.finish([0] * 7, False, with_cls=False, npz=True)):
        with pytest.raises(InputError, match=rf"000003\.png: {text}.*; remove it and run the same command"):
            use()


SETTINGS = {"ckpt": "a.pt", "num_steps": 3, "steps": 2, DIGEST: "abc"}


@pytest.mark.parametrize(
    ("noted", "text"),
    [
        (
            {**SETTINGS, DIGEST: "def"},
            "set contains images made with weights of SHA-256 def, not weights of SHA-256 abc; choose another --name",
        ),
        ({**SETTINGS, "new_flag": 1}, "made with --new-flag 1, not the default of --new-flag"),
        ({"ckpt": "a.pt", "num_steps": 3, "checkpoint_bytes": 9}, "set was started by an earlier version"),
        ([], r"samples\.json: is a list; expected an object with the images' settings"),
        (None, "contains images but no samples.json"),
    ],
)
def test_a_folder_of_other_images_is_refused(samples, noted, text):
    path = samples.folder / "samples.json"
    if noted is not None:
        path.write_text(json.dumps(noted))
    with pytest.raises(InputError, match=text):
        samples.claim(SETTINGS)
    assert noted is None or json.loads(path.read_text()) == noted
    assert not (samples.folder / ".lock").exists()


def test_a_set_belongs_to_its_checkpoint_wherever_that_lies(tmp_path):
    samples = SampleSet(tmp_path, 7, SIZE)
    samples.claim(SETTINGS)
    samples.claim({**SETTINGS, "ckpt": "elsewhere/a.pt", "num_fid_samples": 9})
    assert json.loads((tmp_path / "samples.json").read_text())["ckpt"] == "elsewhere/a.pt"


def test_what_a_killed_program_left_is_removed_when_the_set_is_claimed(samples):
    """Among them samples.npz, of 9.8 GB at 50,000 images. Every image is written without listing the folder."""
    names = (".samples.npz.0123456789abcdef.tmp", "images/.000001.png.0123456789abcdef.tmp", ".samples.npz.12.tmp")
    for name in names:
        (samples.folder / name).write_bytes(b"half")
    samples.write_image(1, pixels(1))
    assert all((samples.folder / name).exists() for name in names)
    (samples.folder / "samples.json").write_text(json.dumps(SETTINGS))
    samples.claim(SETTINGS)
    samples.release()
    assert not list(samples.folder.rglob(".*"))


def test_two_programs_do_not_mix_in_one_folder(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", LOCKER, str(tmp_path / "set")], cwd=ROOT, **pipes)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match=rf"process {other.pid} on .* is generating there"):
        SampleSet(tmp_path / "set", 7, SIZE).claim(SETTINGS)
    other.communicate("")
    SampleSet(tmp_path / "set", 7, SIZE).claim(SETTINGS)


def test_a_place_that_cannot_be_written_is_told_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--sample-dir .*file is not a writable folder"):
        SampleSet(tmp_path / "file" / "set", 7, SIZE).claim(SETTINGS)


def test_a_link_replaces_only_links_to_sample_sets(samples):
    link = samples.folder.parent / "published.npz"
    assert samples.link_npz("published") == link == samples.link_npz("published")
    assert os.readlink(link) == "set/samples.npz"
    link.unlink()
    link.symlink_to("other/samples.npz")
    assert samples.link_npz("published") == link and link.samefile(samples.folder / "samples.npz")
    link.unlink()
    link.symlink_to("elsewhere.npz")
    assert samples.link_npz("published") is None and os.readlink(link) == "elsewhere.npz"
    link.unlink()
    link.write_bytes(b"mine")
    assert samples.link_npz("published") is None and link.read_bytes() == b"mine"


def test_a_file_that_appears_while_a_link_is_made_is_kept(samples, monkeypatch):
    link = samples.folder.parent / "published.npz"
    link.write_bytes(b"mine")
    monkeypatch.setattr(type(link), "exists", lambda path: False)  # as it was a moment before
    assert samples.link_npz("published") is None and link.read_bytes() == b"mine"


@pytest.mark.parametrize("missing", [["symlink"], ["symlink", "link"]])
def test_without_links_there_is_a_copy(samples, monkeypatch, missing):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    for name in missing:
        monkeypatch.setattr(os, name, refuse)
    for _ in range(2):
        link = samples.link_npz("published")
        assert not link.is_symlink() and link.read_bytes() == (samples.folder / "samples.npz").read_bytes()
    assert sorted(path.name for path in link.parent.iterdir()) == ["published.npz", "set"]


def test_the_number_of_images_of_a_set(tmp_path):
    assert SampleSet.started_with(tmp_path) is None
    for content, count in (('{"num_fid_samples": 9}', 9), ("[]", None), ('{"num_fid_samples": "9"}', None)):
        (tmp_path / "samples.json").write_text(content)
        assert SampleSet.started_with(tmp_path) == count


def test_captions_of_a_grid(samples, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sample_set, "image_grid", lambda images, columns, captions: seen.append(captions) or Image.new("L", (1, 1))
    )
    classes = ClassSet((0, 5, 9), ("tench", "jay", "cr\u00e8me"))
    samples.finish([5, 0, 9, 5, 5, 5, 3], False, False, False, classes)
    samples.finish([0, 5, 9, 0, 5, 9, 0], True, False, False, classes)
    samples.finish([0] * 7, True, False, False, ClassSet((0,)))
    assert seen == [
        ["jay", "tench", "creme", "jay", "jay", "jay", "3"],
        ["tench", "jay", "creme", None, None, None, None],
        None,
    ]


def test_a_set_is_not_written_over_something_else(tmp_path):
    places = {"run": "args.json", "notes": "thesis.txt", "data/images/set": None}
    for name, file in places.items():
        (tmp_path / name).mkdir(parents=True)
        if file:
            (tmp_path / name / file).write_text("precious")
    (tmp_path / "data/images/dataset.json").write_text("{}")
    for name, file in places.items():
        problem = f"contains {file} but no samples.json" if file else "is in the data set .*images"
        with pytest.raises(InputError, match=problem):
            SampleSet(tmp_path / name, 7, SIZE).claim({"checkpoint_sha256": "x"})
        assert [path.name for path in (tmp_path / name).iterdir()] == ([file] if file else [])
    with pytest.raises(InputError, match=r"--sample-dir .*is in .*notes, which this program reads"):
        SampleSet(tmp_path / "notes/new", 7, SIZE).claim({"checkpoint_sha256": "x"}, [tmp_path / "notes"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.lock").write_text("")
    SampleSet(tmp_path / "empty", 7, SIZE).claim({"checkpoint_sha256": "x"})


def test_a_damaged_npz_is_written_again(samples):
    path = samples.folder / "samples.npz"
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    path.write_bytes(damaged)
    samples.finish([0] * 7, False, with_cls=True, npz=True)
    assert path.read_bytes() == content


def test_class_tokens_of_other_kinds_are_named(samples):
    path = samples.folder / "cls_tokens.npy"
    for array in (tokens(range(7)).astype(np.float64), np.full((7, 2), np.nan, np.float32)):
        np.save(path, array)
        with pytest.raises(InputError, match=r"cls_tokens\.npy: broken class tokens"):
            samples.read_cls_tokens()
    np.save(path, tokens(range(3)))
    with pytest.raises(InputError, match=r"cls_tokens\.npy: 3 class tokens of 7 images"):
        samples.read_cls_tokens()


def test_a_set_of_an_earlier_version_had_no_time_shift(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "samples.json").write_text(json.dumps({DIGEST: "abc"}))
    SampleSet(folder, 4, 16).claim({DIGEST: "abc", "time_shift": 1.0})
    SampleSet(folder, 4, 16).release()
    (folder / "samples.json").write_text(json.dumps({DIGEST: "abc"}))
    with pytest.raises(InputError, match=r"made with --time-shift 1\.0, not --time-shift 2\.0; choose another --name"):
        SampleSet(folder, 4, 16).claim({DIGEST: "abc", "time_shift": 2.0})
