"""JSON, rows of JSON, regular files only, and which files a program may replace."""

import os
import socket
from pathlib import Path

import pytest

from common.errors import InputError
from common.io import OwnFile, check_writable, parse_json, read_file, read_json, read_metrics, real_path, write_json
from preprocessing.destination import InputOutput


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b\.json: not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match=r"c\.json: no such file"):
        read_json(tmp_path / "c.json")
    with pytest.raises(InputError, match="is a folder; allowed: a JSON file"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,}', "line 1, column 9"),
        (b"{} x", "line 1, column 4"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b"[" + b"9" * 1_000_000 + b"]", "a number has too many digits"),
        (b'{"a": NaN}', "the number NaN is not finite"),
        (b"[-Infinity]", "the number -Infinity is not finite"),
        (b"[1e999]", "the number 1e999 is not finite"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "the name 'c' occurs twice"),
        (b"", "line 1, column 1"),
    ],
)
def test_bytes_that_are_not_json(data, message):
    with pytest.raises(InputError, match=f"^not valid JSON.*{message}"):
        parse_json(data)


def test_json_in_all_encodings_that_it_allows():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-le"):
        assert parse_json('{"ä": [1, 2.5]}'.encode(encoding)) == {"ä": [1, 2.5]}


def test_files_that_are_not_regular_are_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        server.bind("socket")
        for path in (tmp_path / "fifo", "/dev/zero", "/dev/null"):
            with pytest.raises(InputError, match="is not a regular file, but a fifo, a device or a socket"):
                read_file(path)
        with pytest.raises(InputError, match="socket: cannot be read"):
            read_json(tmp_path / "socket")


def test_a_file_that_is_too_large_or_grows_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a") == b"12345"
    monkeypatch.setattr("common.io.MAX_FILE", 4)
    with pytest.raises(InputError, match="has 5 bytes; allowed: 4"):
        read_file(tmp_path / "a")
    with pytest.raises(InputError, match="its size changed while it was read"):
        read_file("/proc/self/stat")  # states 0 bytes


ROW = '{"step": %d, "loss": 1.5, "proj": null, "notes": ["a\\u2028b"]}'


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    lines = [ROW % 1, '{"step": 2, "lo', "", "[1]", '{"loss": 3}', '{"step": "3"}', '{"step": true}', '{"step": 4.5}']
    content = "\n".join([*lines, "[" * 100_000, ROW % 5]).encode() + b'\n\xff\xfe{"step"\n' + (ROW % 6).encode()
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"step": 7, "loss"')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5, 6]


@pytest.mark.parametrize("place", ["there", "there/file/out.png", "file"])
def test_check_writable_names_the_flag(tmp_path, place):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    if place == "file":
        check_writable(tmp_path / "new" / "file", "--out")
        return
    with pytest.raises(InputError, match=r"--out .*there"):
        check_writable(tmp_path / place, "--out")


@pytest.fixture
def inputs(tmp_path):
    """A folder `data` with a file, a file, and links to both; the working directory is their folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/image.png").write_bytes(b"image")
    (tmp_path / "input.npz").write_bytes(b"input")
    os.link(tmp_path / "input.npz", tmp_path / "hard.npz")
    (tmp_path / "link.npz").symlink_to("input.npz")
    (tmp_path / "linked").symlink_to("data")
    return [tmp_path / "data", tmp_path / "input.npz", None, tmp_path / "missing"]


@pytest.mark.parametrize(
    "output",
    ["input.npz", "./data/../input.npz", "link.npz", "hard.npz", "data/image.png", "data/new.json", "linked/sub/new"],
)
def test_an_output_must_not_be_an_input_or_in_one(tmp_path, monkeypatch, inputs, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--out .*(is read by this program|, which this program reads); choose"):
        check_writable(output, "--out", inputs)


@pytest.mark.parametrize("output", ["other.npz", "database/x", "data.json", "new/input.npz"])
def test_an_output_may_be_next_to_the_inputs(tmp_path, inputs, output):
    check_writable(tmp_path / output, "--out", inputs)


def test_foreign_files_are_kept(tmp_path):
    own = OwnFile("a result", lambda path: path.read_text() == "result")
    (tmp_path / "foreign").write_text("thesis")
    (tmp_path / "result").write_text("result")
    for name in ("result", "new"):
        check_writable(tmp_path / name, "--out", own=own)
    with pytest.raises(InputError, match=r"--out .*foreign: exists and is not a result; choose another name"):
        check_writable(tmp_path / "foreign", "--out", own=own)


def test_a_loop_of_links_has_a_path(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert real_path(tmp_path / "loop") == tmp_path / "loop"
    with pytest.raises(InputError, match="loop"):
        InputOutput(source=tmp_path, dest=tmp_path / "loop").check_combination()


def test_names_that_no_file_can_have_are_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path / ("x" * 60_000), "a name in it has 60,000 bytes; allowed: 255"),
        (tmp_path / ("ä" * 200), "a name in it has 400 bytes"),
        ("x/" * 3000 + "y", "cannot be used|has 3,001 parts; allowed: 200"),
        (loop / "file", "cannot be used|is not a writable folder"),
        (tmp_path / "pipe", "is a device or a pipe"),
        ("/dev/null", "is a device or a pipe"),
    ):
        with pytest.raises(InputError, match=problem) as caught:
            check_writable(path, "--out")
        assert str(caught.value).startswith("--out ") and len(str(caught.value)) < 500


def test_json_never_holds_numbers_that_are_not_finite(tmp_path):
    (tmp_path / "x.json").write_text("before")
    with pytest.raises(InputError, match=r"x\.json is not written: a number is NaN or infinite"):
        write_json(tmp_path / "x.json", {"a": [1, {"b": float("-inf")}]})
    assert (tmp_path / "x.json").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
