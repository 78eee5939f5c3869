"""Sets of classes: which labels occur, their names, and how a text selects some of them."""

import pytest

from common.classes import ClassSet, class_names, label_ranges
from common.errors import InputError

SOME = ClassSet((5, 17, 940), ("electric ray", "jay", "spaghetti squash"))


def test_data_decides_the_set():
    assert ClassSet.of_data([17, 5, 940, 5]).labels == (5, 17, 940)
    assert ClassSet.of_data([2, 0], ["a", "b", "c"]) == ClassSet((0, 2), ("a", "c"))
    assert ClassSet.of_data([2, 0], ["a"]).names == ()
    assert ClassSet.of_network(3).labels == (0, 1, 2)
    for count in (0, 10**6 + 1, 10**12):
        with pytest.raises(InputError, match=f"{count} classes; allowed: 1 to 1,000,000"):
            ClassSet.of_network(count)


def test_json_round_trip():
    for classes in (SOME, ClassSet((1, 2))):
        assert ClassSet.from_json(classes.to_json()) == classes


@pytest.mark.parametrize(
    "content",
    [None, [], {"labels": []}, {"labels": [2, 1]}, {"labels": [1, 1]}, {"labels": [True]}, {"labels": ["1"]},
     {"labels": [1, 2], "names": ["a"]}, {"labels": [1], "names": [3]}, {"labels": [1], "names": "a"},
     {"labels": [1], "names": {"a": 1}}, {"labels": [10**6]}, {"labels": [10**9999]}, {"labels": [-1]},
     {"labels": [1], "names": ["x" * 60_000]}],
)  # fmt: skip
def test_other_json_is_refused(content):
    with pytest.raises(InputError, match="class") as caught:
        ClassSet.from_json(content)
    assert len(str(caught.value)) < 300


def test_names():
    assert SOME.name(17) == "jay" and SOME.name(3) == "3"
    assert ClassSet((1,)).name(1) == "1"


def test_selection():
    assert SOME.select("940,5", 1000) == (940, 5)
    assert SOME.select("15-17, jay,electric ray", 1000) == (15, 16, 17, 17, 5)
    assert ClassSet((0, 1), ("tench, Tinca tinca", "jay")).select("tench, Tinca tinca", 2) == (0,)


@pytest.mark.parametrize("text, message", [
    ("1000", "0 .. 999"), ("17-5", "a range starts with its smaller"),
    ("jai", "jay"), ("9" * 9999, "expected labels"), ("0-999999999", "0 .. 999"),
    ("", "expected labels"), ("-1", "expected labels"),
])  # fmt: skip
def test_wrong_selections_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        SOME.select(text, 1000)


def test_captions_are_names_that_a_grid_can_show_or_numbers():
    classes = ClassSet((3, 5, 9), ("Kätzchen", "日本", "tench"))
    assert [classes.caption(label) for label in (3, 5, 9, 7)] == ["Katzchen", "5", "tench", "7"]
    assert ClassSet((3,)).caption(3) == "3"


def test_an_element_that_stands_for_several_labels_is_refused():
    folders = ClassSet((0, 1, 2), ("0", "1", "10"))
    assert folders.select("1", 20) == (1,)
    with pytest.raises(InputError, match="10: is a label, and the name of label 2; write 10-10 or 2-2"):
        folders.select("10", 20)
    assert folders.select("10-10,2-2", 20) == (10, 2)
    with pytest.raises(InputError, match="crane: is the name of labels 134, 517; write the number"):
        ClassSet((134, 517), ("crane", "crane")).select("crane", 1000)


def test_labels_outside_the_set_are_named():
    assert SOME.untrained([5, 940]) == ""
    assert SOME.untrained([5, 6]).startswith("label 6 does not occur in the training data")
    assert SOME.untrained([7, 5, 6, 7, 8]).startswith("labels 6-8 do not occur")


@pytest.mark.parametrize("labels", [(0, 1, 2, 3), (5, 17, 940), (940, 0, 1, 2, 2, 1), (7,)])
def test_ranges_are_what_select_reads(labels):
    assert ClassSet.of_network(1000).select(label_ranges(labels), 1000) == labels
    assert label_ranges((0, 1, 2, 5)) == "0-2,5"


@pytest.mark.parametrize("names", [5, "ab", {"a": 1}, [True], [None], ["a", ["b"]], ["x" * 60_000], [0] * 1_000_001])
def test_class_names_of_another_form_are_refused(names):
    with pytest.raises(InputError, match=r"^a\.json: classes") as caught:
        class_names({"a.json": {"classes": names}})
    assert len(str(caught.value)) < 300
