"""Labels of a source: which folders are classes, what a dataset.json says, and sources without labels."""

from __future__ import annotations

import json

import pytest

from common.errors import InputError
from common.sources import FileSource
from preprocessing.listing import list_converted, list_images
from tests.test_image_files import make_tree

NO_JSON = object()


def listed(folder, *names, labels="auto", table=NO_JSON):
    """Return the listing of a source of empty files, with a dataset.json of the labels `table`."""
    make_tree(folder, *names)
    if table is not NO_JSON:
        (folder / "dataset.json").write_text(json.dumps({"labels": table}))
    return list_images(FileSource(folder), labels)


def test_class_folders_without_images_keep_their_number(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/n5").symlink_to("/nowhere/n5")
    names = ["train/n1/a.jpg", "train/n2/", "train/n3/n3.tar", "train/n4/b.jpg", "train/n6/x/", "train/n7/c.jpg"]
    listing = listed(tmp_path, *names)
    assert listing.classes == ["n1", "n2", "n3", "n4", "n5", "n6", "n7"] and listing.labels == [0, 3, 6]
    assert list(listing.bare_classes) == ["train/n2", "train/n3", "train/n5", "train/n6"]
    assert "tar -xf" in listing.bare_classes["train/n3"] and "/nowhere/n5" in listing.bare_classes["train/n5"]


def test_a_single_class_with_images_next_to_classes_without(tmp_path):
    listing = listed(tmp_path / "s", "n1/", "n2/a.jpg")
    assert listing.classes == ["n1", "n2"] and listing.labels == [1] and list(listing.bare_classes) == ["n1"]
    listing = listed(tmp_path / "t", "images/a.jpg", "labels/a.txt")  # labels of another kind, no class
    assert listing.classes == ["images"] and listing.labels == [0] and not listing.bare_classes


def test_folders_outside_the_class_folders_are_named(tmp_path):
    listing = listed(tmp_path, "Data/train/n1/a.jpg", "Data/train/n2/a.jpg", "Annotations/n1/a.xml", "Data/val/")
    assert listing.classes == ["n1", "n2"] and not listing.bare_classes
    assert listing.notes[-1].endswith(
        "2 folders without images are outside Data/train/ and ignored (Annotations/n1, Data/val)"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/x/a.jpg", "val/a.jpg"], "contains the parts train and val of a data set"),
        (["train/a.jpg", "val/"], "contains the parts train and val of a data set"),
        (["A/train/x/a.jpg", "A/val/x/a.jpg", "B/train/x/a.jpg", "B/val/x/a.jpg"], "the parts A/train and A/val"),
        (
            ["A/train/x/a.jpg", "A/train/y/a.jpg", "B/train/x/a.jpg", "B/train/y/a.jpg"],
            "both contain folders train/x and",
        ),
        (
            ["holdout/x/a.jpg", "holdout/y/a.jpg", "train/x/a.jpg", "train/y/a.jpg"],
            "train and holdout both contain folders x and y; if these are the classes, use .*/train, otherwise",
        ),
        (["x/a.jpg", "y/sub/b.jpg"], r"x/a\.jpg: is at another depth than .*y/sub/b\.jpg"),
        (["x/s/a.jpg", "y/s/b.jpg", "y/s/deep/c.jpg"], r"x/s/a\.jpg: is at another depth than .*y/s/deep/c\.jpg"),
        (["x/a.jpg", "b.jpg"], r"b\.jpg: is next to class folders, which contain .*x/a\.jpg"),
        (["00000/img00000000.png", "00001/img00001000.png"], "has the layout of convert.py's output"),
    ],
)
def test_unclear_trees_are_refused(names, message, tmp_path):
    with pytest.raises(InputError, match=message):
        listed(tmp_path, *names)


def test_folders_inside_classes_are_named(tmp_path):
    listing = listed(tmp_path, "dog/poodle/a.jpg", "dog/terrier/a.jpg", "cat/siamese/a.jpg")
    assert listing.classes == ["cat", "dog"]
    assert listing.notes == [f"{tmp_path}: dog is a class, and its folders poodle and terrier are not"]


def test_one_folder_inside_every_class_is_normal(tmp_path):
    listing = listed(tmp_path, "cat/images/raw/a.jpg", "dog/images/raw/a.jpg")
    assert listing.classes == ["cat", "dog"] and listing.notes == []


def test_labels_in_a_dataset_json_make_an_unclear_tree_clear(tmp_path):
    names = ["train/x/a.jpg", "val/b.jpg"]
    listing = listed(tmp_path, *names, table=[[name, i] for i, name in enumerate(names)])
    assert listing.names == names and listing.labels == [0, 1]


def test_null_labels_of_numbered_folders_mean_no_labels(tmp_path):
    names = ["00000/img00000000.png", "00001/img00001000.png"]
    listing = listed(tmp_path / "a", *names, table=None)
    assert listing.labels == [0, 0] and listing.classes is None and not listing.is_labelled
    assert listing.table({0: "x.png"}) == {"labels": None}
    converted = list_converted(FileSource(tmp_path / "a"))
    assert converted.names == names and converted.labels == [0, 0] and not converted.is_labelled
    assert listed(tmp_path / "b", "a.png", "b.png", table=None).is_labelled is False
    assert listed(tmp_path / "c", "cat/a.png", "dog/b.png", table=None).classes == ["cat", "dog"]
    assert listed(tmp_path / "d", "00042/a.png", "00043/b.png").classes == ["00042", "00043"]  # as in GTSRB


def test_no_labels_on_request(tmp_path):
    listing = listed(tmp_path, "x/a.jpg", "b.jpg", labels="none")
    assert listing.labels == [0, 0] and not listing.is_labelled
    with pytest.raises(InputError, match="the parts train and val"):
        listed(tmp_path / "s", "train/x/a.jpg", "val/x/a.jpg", labels="none")


def test_the_first_images_keep_the_numbers_of_their_classes(tmp_path):
    listing = listed(tmp_path, "x/a.jpg", "x/b.jpg", "y/a.jpg", "z/a.jpg").first(3)
    assert listing.names == ["x/a.jpg", "x/b.jpg", "y/a.jpg"] and listing.labels == [0, 0, 1]
    assert listing.classes == ["x", "y", "z"] and listing.first(None) == listing


@pytest.mark.parametrize("top", [True, False])
def test_a_dataset_json_in_a_folder_is_refused(top, tmp_path):
    make_tree(tmp_path, "other.txt", "images/00000/img00000000.png")
    for folder in (tmp_path, tmp_path / "images")[0 if top else 1 :]:
        (folder / "dataset.json").write_text('{"labels": []}')
    for function in (list_images, list_converted):
        with pytest.raises(InputError, match=r"images/dataset\.json: found.*expected only at the top of"):
            function(FileSource(tmp_path))
    assert list_images(FileSource(tmp_path), "folders").classes == ["00000"]


def test_a_converted_image_without_an_entry_is_named(tmp_path):
    make_tree(tmp_path, "00000/img00000000.png", "00000/img00000001.png", "00000/note.png")
    (tmp_path / "dataset.json").write_text('{"labels": [["00000/img00000000.png", 3]]}')
    with pytest.raises(InputError, match=r"img00000001\.png and 0 other images are not in .*dataset\.json"):
        list_converted(FileSource(tmp_path))


def test_photographs_are_no_converted_data_set(tmp_path):
    command = f"python preprocessing/convert.py --source '{tmp_path}/my photos' --dest"
    with pytest.raises(InputError, match=rf"contains no dataset\.json.*\n{command}"):
        list_converted(FileSource(make_tree(tmp_path / "my photos", "cat/a.jpg", "dog/b.jpg")))
    (tmp_path / "my photos/dataset.json").write_text('{"labels": [["cat/a.jpg", 0]]}')
    with pytest.raises(
        InputError, match=rf"cat/a\.jpg: images are named like 00000/img.* convert them first:\n{command}"
    ):
        list_converted(FileSource(tmp_path / "my photos"))
    with pytest.raises(InputError, match="contains 1 Parquet table"):
        list_converted(FileSource(make_tree(tmp_path / "tables", "train.parquet")))


@pytest.mark.parametrize("classes", [5, {"a": 1}, [True], ["x" * 60_000]])
def test_classes_of_another_form_are_refused(classes, tmp_path):
    """convert.py would copy them into its dataset.json."""
    make_tree(tmp_path, "00000/img00000000.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["00000/img00000000.png", 0]], "classes": classes}))
    for function in (list_images, list_converted):
        with pytest.raises(InputError, match=r"dataset\.json: classes"):
            function(FileSource(tmp_path))
