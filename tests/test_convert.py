"""convert.py: crops bit for bit, broken images, labels, destinations, and killed runs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import InputError
from common.sources import FileSource
from preprocessing import convert
from preprocessing.listing import list_images
from tests.conftest import ROOT, contents
from tests.kills import Case, try_program
from tests.test_crops import animation, encoded, header_only_png, jpeg, plain_adm_crop

ASSETS = os.environ.get("REG_ASSETS")
EVERY = int(os.environ.get("REG_EVERY", "20"))  # every n-th sample photograph; the long form: REG_EVERY=1


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS, reason="REG_ASSETS is not set")
@pytest.mark.parametrize("resolution", [64, 256, 512, 1024])
def test_photographs_are_cropped_bit_for_bit(resolution, tmp_path):
    with zipfile.ZipFile(Path(ASSETS) / "imagenet_samples.zip") as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))[::EVERY]
        for name in names:
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True)
            path.write_bytes(archive.read(name))
    run(tmp_path / "source", tmp_path / "out", resolution)
    for index, name in enumerate(names):
        with Image.open(tmp_path / "source" / name) as photograph:
            expected = plain_adm_crop(np.asarray(photograph.convert("RGB")), resolution)
        written = Image.open(tmp_path / f"out/00000/img{index:08d}.png")
        assert written.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(written), expected, err_msg=name)


BAD_IMAGES = {
    "animated.gif": (animation("GIF"), "2 frames"),
    "animated.webp": (animation("WEBP"), "2 frames"),
    "pages.tiff": (animation("TIFF"), "2 frames"),
    "float.tiff": (encoded(Image.new("F", (4, 4)), "TIFF"), "32-bit"),
    "cut.jpg": (jpeg()[:-200], "truncated"),
    "empty.jpg": (b"", "the file is empty"),
    "text.png": (b"not an image", "not of a format that is read"),
    "huge.png": (header_only_png(30_000, 30_000), "900,000,000 pixels; allowed: 178,956,970"),
    "thread.png": (encoded(Image.new("RGB", (1, 30_000))), "before its crop"),
}


def make_source(folder, classes=("cat", "dog"), each=3):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"{i}.jpg").write_bytes(jpeg(10 * number + i))
    return folder


def run(source, destination, resolution=16, *flags):
    arguments = ["--source", source, "--dest", destination, "--resolution", resolution, "--workers", 1, *flags]
    convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_stops_the_run_by_name(name, tmp_path):
    data, reason = BAD_IMAGES[name]
    source = make_source(tmp_path / "source")
    (source / "dog" / name).write_bytes(data)
    with pytest.raises(InputError, match=f"dog/{name}.*{reason}"):
        run(source, tmp_path / "out", 256)
    assert not (tmp_path / "out/dataset.json").exists()


def test_broken_images_are_skipped_and_listed(tmp_path):
    source = make_source(tmp_path / "source")
    (source / "cat/1.jpg").write_bytes(BAD_IMAGES["cut.jpg"][0])
    run(source, tmp_path / "out", 16, "--on-error", "skip")
    assert (tmp_path / "out/skipped.txt").read_text().startswith("cat/1.jpg\t")
    labels = json.loads((tmp_path / "out/dataset.json").read_text())["labels"]
    assert [label for _, label in labels] == [0, 0, 1, 1, 1]
    assert "00000/img00000001.png" not in dict(labels)
    (source / "cat/1.jpg").write_bytes(jpeg())  # corrected: the same command converts it
    run(source, tmp_path / "out", 16)
    assert not (tmp_path / "out/skipped.txt").exists()
    assert len(json.loads((tmp_path / "out/dataset.json").read_text())["labels"]) == 6


def test_dead_links_and_folders_without_images(tmp_path, capsys):
    """As in a subset made of links while the disk of the photographs is not mounted."""
    source = make_source(tmp_path / "source", ("n1", "n4"), 1)
    (source / "n2").mkdir()
    (source / "n3").symlink_to("/nowhere/n3")
    (source / "n4/b.jpg").symlink_to("/nowhere/b.jpg")
    (source / "n4/c.heic").write_bytes(b"")
    (source / "n4/c.txt").write_text("a caption")
    with pytest.raises(
        InputError, match=r"(?s)2 links to files.*1 image that is.*\.heic.*1 folder without images:\s+n2"
    ):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # before any work
    for _ in range(2):
        run(source, tmp_path / "out", 16, "--on-error", "skip")
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert dataset == {
        "labels": [["00000/img00000000.png", 0], ["00000/img00000001.png", 3]],
        "classes": ["n1", "n2", "n3", "n4"],
    }
    skipped = dict(line.split("\t") for line in (tmp_path / "out/skipped.txt").read_text().splitlines())
    assert list(skipped) == ["n2", "n3", "n4/b.jpg", "n4/c.heic"]
    assert "is a link to /nowhere/b.jpg" in skipped["n4/b.jpg"] and skipped["n2"] == "is empty"
    said = capsys.readouterr().out
    assert "source: 1 file is not an image: 1 .txt" in said and "4 images or class folders skipped" in said


def test_names_that_are_not_utf_8(tmp_path):
    source = os.fsencode(make_source(tmp_path / "source", ("tea",), 1))
    os.mkdir(source + b"/caf\xe9")
    for name, data in ((b"a\n\t.jpg", jpeg()), (b"b\xe9.jpg", b"broken")):
        with open(source + b"/caf\xe9/" + name, "wb") as file:
            file.write(data)
    for _ in range(2):
        run(tmp_path / "source", tmp_path / "out", 16, "--on-error", "skip")
        assert (tmp_path / "out/skipped.txt").read_text().startswith("caf\\udce9/b\\udce9.jpg\tnot an image")
        assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == ["caf\udce9", "tea"]


def test_a_trial_with_few_images(tmp_path):
    run(make_source(tmp_path / "source"), tmp_path / "out", 16, "--max-images", 4)
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [label for _, label in dataset["labels"]] == [0, 0, 0, 1] and dataset["classes"] == ["cat", "dog"]


def test_images_without_labels(tmp_path, capsys):
    run(make_source(tmp_path / "source"), tmp_path / "out", 16, "--labels", "none")
    assert json.loads((tmp_path / "out/dataset.json").read_text()) == {"labels": None}
    assert capsys.readouterr().out.endswith("out: 6 images, no labels\n")
    run(tmp_path / "out", tmp_path / "small", 8)
    assert (tmp_path / "small/dataset.json").read_text() == '{"labels": null}\n'


def test_an_image_of_one_pixel(tmp_path):
    (tmp_path / "source/a").mkdir(parents=True)
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "source/a/dot.png")
    run(tmp_path / "source", tmp_path / "out", 256)
    assert np.unique(np.asarray(Image.open(tmp_path / "out/00000/img00000000.png"))).tolist() == [1, 2, 3]


def test_names_labels_and_classes(tmp_path):
    run(make_source(tmp_path / "source", ("zebra", "ant", "bee"), 2), tmp_path / "out")
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert dataset["classes"] == ["ant", "bee", "zebra"]
    assert dataset["labels"] == [[f"00000/img{i:08d}.png", i // 2] for i in range(6)]


def test_output_does_not_depend_on_workers_or_container(tmp_path):
    source = make_source(tmp_path / "source", each=60)
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for path in sorted(source.rglob("*.jpg"), reverse=True):
            archive.write(path, f"train/{path.relative_to(source)}")
    run(source, tmp_path / "one")
    run(source, tmp_path / "three", 16, "--workers", "3")
    run(tmp_path / "source.zip", tmp_path / "three.zip", 16, "--workers", "3")
    settings = ".convert.json"
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "three") == expected
    with zipfile.ZipFile(tmp_path / "three.zip") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        packed = {name: archive.read(name) for name in archive.namelist()}
    del expected[settings], packed[settings]
    assert packed == expected
    assert not list(tmp_path.glob(".*"))


def test_the_output_can_be_a_source(tmp_path):
    run(make_source(tmp_path / "source"), tmp_path / "large", 32)
    run(tmp_path / "large", tmp_path / "small", 16)
    large, small = (json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("large", "small"))
    assert large == small


def test_folders_around_and_inside_classes(tmp_path):
    def labels(*names):
        for name in names:
            path = tmp_path / str(len(names)) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        listing = list_images(FileSource(tmp_path / str(len(names))))
        return listing.classes, listing.labels

    assert labels("a.png", "b.png") == (["2"], [0, 0])
    assert labels("train/x/a.png", "train/x/b.png", "train/y/a.png") == (["x", "y"], [0, 0, 1])
    assert labels("x/images/0.png", "x/images/1.png", "y/images/0.png", "y/images/1.png") == (["x", "y"], [0, 0, 1, 1])
    with pytest.raises(InputError, match="a and b both contain folders x and y"):
        labels("a/x/0.png", "a/y/0.png", "b/x/0.png", "b/y/0.png", "b/y/1.png")
    with pytest.raises(InputError, match=r"c\.png: is next to class folders"):
        labels("x/0.png", "x/1.png", "x/2.png", "y/0.png", "y/1.png", "c.png")


def describe_labels(source, labels):
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_dataset_json_and_class_folders(tmp_path):
    source = make_source(tmp_path / "source", each=1)
    describe_labels(source, [["cat/0.jpg", 1], ["dog/0.jpg", 0]])
    with pytest.raises(InputError, match=r"cat/0.jpg: has label 1 in dataset.json, .* number 0"):
        list_images(FileSource(source))
    assert list_images(FileSource(source), "json").labels == [1, 0]
    assert list_images(FileSource(source), "folders").labels == [0, 1]
    describe_labels(source, [["cat/0.jpg", 0], ["dog/0.jpg", 1]])
    assert list_images(FileSource(source)).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["cat/0.jpg", 0]], "dog/0.jpg and 0 other images are not in dataset.json"),
        ([["cat/0.jpg", 0], ["dog/0.jpg", 1], ["dog/9.jpg", 1]], "lists dog/9.jpg, which does not exist"),
        ([["cat/0.jpg", 0], ["cat/0.jpg", 1]], "lists cat/0.jpg twice"),
        ([["cat/0.jpg", -1]], "has label -1; allowed"),
        ([["cat/0.jpg", True]], "has label True; allowed"),
        (["cat/0.jpg"], "label entry 'cat/0.jpg'; expected"),
    ],
)
def test_a_wrong_dataset_json_is_named(labels, message, tmp_path):
    source = make_source(tmp_path / "source", each=1)
    describe_labels(source, labels)
    with pytest.raises(InputError, match=message):
        list_images(FileSource(source))


def test_a_source_without_images(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/readme.txt").write_text("nothing here")
    with pytest.raises(InputError, match="contains no images"):
        run(tmp_path / "source", tmp_path / "out")
    with pytest.raises(InputError, match="no such folder or zip"):
        run(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("member", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"])
def test_a_zip_with_unsafe_paths_is_refused(member, tmp_path):
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        archive.writestr("a/good.jpg", jpeg())
        archive.writestr(member, jpeg())
    with pytest.raises(InputError, match="absolute or parent path"):
        run(tmp_path / "source.zip", tmp_path / "out")


def test_a_destination_with_other_files_is_refused(tmp_path):
    source = make_source(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="files that this program did not create"):
        run(source, tmp_path / "out")
    (tmp_path / "out.zip").write_bytes(b"precious")
    with pytest.raises(InputError, match="was not created by this program"):
        run(source, tmp_path / "out.zip")
    with pytest.raises(InputError, match="is not a folder"):
        run(source, tmp_path / "out/thesis.txt")
    with pytest.raises(InputError, match="is inside --source"):
        run(source, source / "out")
    assert (tmp_path / "out/thesis.txt").read_text() == "precious" and (
        tmp_path / "out.zip"
    ).read_bytes() == b"precious"


def test_source_and_destination_do_not_contain_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_source(tmp_path / ".out.zip.parts/source")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset.json").write_text("{}")
    for dest, problem in (
        (source, "is inside --source"),
        ("link/out", "is inside --source"),
        (source.parent, "contains --source"),
        ("out.zip", "contains --source"),  # which is unpacked next to it
        ("data/new", "is inside the data set"),
    ):
        with pytest.raises(InputError, match=f"--dest .*: {problem}"):
            run(source, dest)
    with pytest.raises(InputError, match="a name in it has 60,000 bytes"):
        run(source, tmp_path / ("x" * 60_000))
    assert len(list(source.rglob("*.jpg"))) == 6


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_other_settings_on_the_same_destination(name, tmp_path):
    source, other = make_source(tmp_path / "source"), make_source(tmp_path / "other")
    run(source, tmp_path / name)
    before = contents(tmp_path / name)
    with pytest.raises(InputError, match="resolution was 16, is now 32"):
        run(source, tmp_path / name, 32)
    with pytest.raises(InputError, match=r"source was '.*/source', is now '.*/other'"):
        run(other, tmp_path / name)
    run(source, tmp_path / name)
    assert contents(tmp_path / name) == before


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_a_run_that_wrote_nothing_can_be_repeated_with_other_settings(name, tmp_path):
    source = make_source(tmp_path / "source")
    with pytest.raises(InputError, match="before its crop"):
        run(source, tmp_path / name, 16_384)
    run(source, tmp_path / name)
    with pytest.raises(InputError, match=r"other settings \(other images or labels\)"):
        run(source, tmp_path / name, 16, "--max-images", 1)


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_other_photographs_under_the_same_names(name, tmp_path):
    source = make_source(tmp_path / "source", each=30)
    run(source, tmp_path / name)
    before = contents(tmp_path / name)
    replaced = source / "cat/4.jpg"  # the 24th in sorted order; every third of 60 is compared
    for data in (jpeg(13), b"no image"):
        replaced.write_bytes(data)
        with pytest.raises(
            InputError, match=r"out.*: its 00000/img00000024\.png differs from the result of .*cat/4\.jpg"
        ):
            run(source, tmp_path / name)
    replaced.write_bytes(jpeg(4))
    run(source, tmp_path / name)
    assert contents(tmp_path / name) == before


def test_a_photograph_that_changed_after_it_was_converted(tmp_path):
    """One that is not among those that are compared at each start."""
    source = make_source(tmp_path / "source", each=30)
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    os.utime(source / "cat/6.jpg")  # the 26th
    run(source, tmp_path / "out")
    (source / "cat/6.jpg").write_bytes(jpeg(13))
    with pytest.raises(InputError, match=r"its 00000/img00000026\.png differs from the result of .*cat/6\.jpg"):
        run(source, tmp_path / "out")
    (tmp_path / "out/.lock").unlink()
    assert contents(tmp_path / "out") == before


def test_temporary_files_of_a_kill_while_packing_are_removed(tmp_path):
    (tmp_path / ".out.zip.123.tmp").write_bytes(b"half a zip")
    run(make_source(tmp_path / "source"), tmp_path / "out.zip")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.zip"}


@pytest.mark.parametrize(("flag", "most"), [("--resolution", "16,384"), ("--workers", "1,024")])
@pytest.mark.parametrize("value", [0, -1, 10**9])
def test_numbers_are_bounded(flag, most, value, tmp_path):
    with pytest.raises(InputError, match=f"{flag} {value}: must be from 1 to {most}"):
        run(make_source(tmp_path / "source"), tmp_path / "out", 16, flag, value)


def test_a_full_disk_leaves_only_complete_files(tmp_path):
    source = make_source(tmp_path / "source", each=4)
    for i in range(4):  # of these sizes, the first PNG fits under the limit and the others do not
        Image.new("RGB", (64, 64), (i, i, i)).save(source / f"cat/{i}.png")
    arguments = ["--source", source, "--dest", tmp_path / "out", "--resolution", "64", "--workers", "1"]
    command = [sys.executable, ROOT / "preprocessing/convert.py", *map(str, arguments)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))  # noqa: E731
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 2 and "out: cannot be written (File too large)" in full.stderr, full.stderr
    assert "Traceback" not in full.stderr
    left = contents(tmp_path / "out")
    del left[".lock"]
    assert not [name for name in left if name.endswith(".tmp")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    complete = contents(tmp_path / "out")
    assert left.items() <= complete.items() and "dataset.json" in complete


def test_a_source_without_class_folders_is_one_class(tmp_path, capsys):
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers/a.jpg").write_bytes(jpeg())
    run(tmp_path / "flowers", tmp_path / "out")
    assert capsys.readouterr().out.endswith("out: 1 image, 1 class\n")
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"] == ["flowers"]


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_killed_and_restarted(suffix, tmp_path):
    source = tmp_path / "source"
    for name in ("cat", "dog"):
        (source / name).mkdir(parents=True)
        for i in range(150):
            (source / name / f"{i}.jpg").write_bytes(jpeg(i, (400, 300)))
    command = f"preprocessing/convert.py --source {source} --resolution 128 --workers 2"
    work = tmp_path / "work"
    arguments = [*command.split(), "--dest", str(work / f"images{suffix}")]
    counts = try_program(Case("convert", arguments, work, undisturbed_runs=1), kills=3)
    assert (counts.kills, counts.failures) == (3, [])
