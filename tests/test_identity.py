"""Files that change while they are read are noticed, and programs know their own files."""

import os
from pathlib import Path

import pytest
from PIL import Image

from common.errors import InputError
from common.identity import OWN_PNG, Unchanged, files_of, own_file, own_json


def test_a_file_that_is_replaced_or_changed_is_noticed(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"abc")
    opened = Unchanged([path, tmp_path / "missing"])
    opened.check()
    other.write_bytes(b"abc")  # the same bytes: only that it is another file shows
    os.replace(other, path)
    with pytest.raises(InputError, match="file: was replaced or changed while it was read"):
        opened.check()
    opened = Unchanged([path])
    path.write_bytes(b"abcd")
    with pytest.raises(InputError, match="was replaced or changed"):
        opened.check()
    opened = Unchanged([path])
    path.unlink()
    with pytest.raises(InputError, match="was replaced or changed"):
        opened.check()


def test_files_of_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/x", "a/y"):
        (tmp_path / name).write_text("")
    assert files_of(tmp_path / "a") == [tmp_path / "a/b/x", tmp_path / "a/y"]
    assert files_of(tmp_path / "a/y") == [tmp_path / "a/y"] and files_of("nowhere") == [Path("nowhere")]


def test_own_files_are_known_by_their_content(tmp_path: Path) -> None:
    result, picture, text = tmp_path / "r.json", tmp_path / "p.png", tmp_path / "t"
    result.write_text('{"a": 1, "b": 2}')
    Image.new("RGB", (2, 2)).save(picture)
    text.write_text("text")
    assert own_json("a result", "a", "b").matches(result) and not own_json("a result", "a", "c").matches(result)
    assert OWN_PNG.matches(picture) and not OWN_PNG.matches(text)
    assert own_file("a text", contains=b"ex").matches(text) and not own_file("a text", start=b"ex").matches(text)
    for content in (b"", b"[1]", b"\xff", b"[" * 100_000):
        result.write_bytes(content)
        assert not own_json("a result").matches(result)
