"""Sets of classes: which labels occur, their names, and how a text selects some of them."""

import pytest

from common.classes import ClassSet
from common.io import InputError

SOME = ClassSet((5, 17, 940), ("electric ray", "jay", "spaghetti squash"))


def test_data_decides_the_set():
    assert ClassSet.of_data([17, 5, 940, 5]).labels == (5, 17, 940)
    assert ClassSet.of_data([2, 0], ["a", "b", "c"]) == ClassSet((0, 2), ("a", "c"))
    assert ClassSet.of_data([2, 0], ["a"]).names == ()
    assert ClassSet.of_network(3).labels == (0, 1, 2)


def test_json_round_trip():
    for classes in (SOME, ClassSet((1, 2))):
        assert ClassSet.from_json(classes.to_json()) == classes


@pytest.mark.parametrize(
    "content",
    [None, [], {"labels": []}, {"labels": [2, 1]}, {"labels": [1, 1]}, {"labels": [True]}, {"labels": ["1"]},
     {"labels": [1, 2], "names": ["a"]}, {"labels": [1], "names": [3]}],
)  # fmt: skip
def test_other_json_is_refused(content):
    with pytest.raises(InputError, match="class"):
        ClassSet.from_json(content)


def test_names():
    assert SOME.name(17) == "jay" and SOME.name(3) == "3"
    assert ClassSet((1,)).name(1) == "1"


def test_selection():
    assert SOME.select("940,5", 1000) == (940, 5)
    assert SOME.select("15-17, jay,electric ray", 1000) == (15, 16, 17, 17, 5)
    assert ClassSet((0, 1), ("tench, Tinca tinca", "jay")).select("tench, Tinca tinca", 2) == (0,)


@pytest.mark.parametrize("text, message", [
    ("1000", "0 .. 999"), ("17-5", "17-5"), ("jai", "jay"), ("", "expected labels"), ("-1", "expected labels"),
])  # fmt: skip
def test_wrong_selections_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        SOME.select(text, 1000)


def test_captions_are_names_that_a_grid_can_show_or_numbers():
    classes = ClassSet((3, 5, 9), ("Kätzchen", "日本", "tench"))
    assert [classes.caption(label) for label in (3, 5, 9, 7)] == ["Katzchen", "5", "tench", "7"]
    assert ClassSet((3,)).caption(3) == "3"
