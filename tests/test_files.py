import multiprocessing
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.io import InputError, atomic_write, check_writable, lock_folder, read_json, unlock_folder, write_json
from common.sources import FileSource
from tests.conftest import ROOT


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(RuntimeError, match="power cut"), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("power cut")
    assert list(path.parent.iterdir()) == []
    with atomic_write(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_an_old_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError), atomic_write(path, "w") as file:
        file.write("new")
        raise OSError("no space left on device")
    assert path.read_text() == "old"


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


def test_folder_and_zip_are_read_alike(source):
    assert source.names == ["a.txt", "b/2.txt"]
    assert source.read("b/2.txt") == b"two" and source.size("a.txt") == 3 and "b/2.txt" in source
    with pytest.raises(InputError, match=r"nothing\.txt"):
        source.read("nothing.txt")


def test_a_source_can_be_handed_to_a_worker(source):
    source.read("a.txt")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read("a.txt") == b"one" and copy.names == source.names


def test_a_zip_is_opened_once_and_read_by_many(tmp_path, monkeypatch):
    """Reading its directory again takes a worker process half a minute and gigabytes, with millions of members."""
    contents = {f"{i % 7}/ä{i:03d}.bin": bytes([i % 251]) * (i * 37 % 1000) for i in range(300)}
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for number, (name, content) in enumerate(contents.items()):
            member = zipfile.ZipInfo(name)
            member.extra = b"\x00\x00" + (number * 5).to_bytes(2, "little") + bytes(number * 5)  # longer than the room
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
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"aaaa", b"abaa"))
    with pytest.raises(InputError, match=r"files\.zip:a\.txt: damaged, its checksum does not fit"):
        FileSource(path).read("a.txt")
    path.write_bytes(whole.replace(b"PK\x03\x04", b"PK\x03\x05"))
    with pytest.raises(InputError, match=r"b\.txt: damaged"):
        FileSource(path).read("b.txt")
    with pytest.raises(InputError, match=r"c\.txt: packed by method 12; allowed: stored, deflated"):
        FileSource(path).read("c.txt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_two_files_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        for name in (".hidden", "a.txt", ".hidden", "a.txt"):
            archive.writestr(name, b"")
    with pytest.raises(InputError, match=r"files\.zip: holds 'a.txt' more than once"):
        FileSource(tmp_path / "files.zip")


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_bytes(b"one")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "link").symlink_to(tmp_path / "there")
    assert FileSource(tmp_path / "files").names == ["link/a.txt"]
    (tmp_path / "there" / "up").symlink_to(tmp_path / "files")
    with pytest.raises(InputError, match="a link to a folder that it lies in"):
        FileSource(tmp_path / "files")


def test_what_is_neither_folder_nor_zip_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder or zip file"):
        FileSource(tmp_path / "none")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"broken\.zip: not a readable zip"):
        FileSource(tmp_path / "broken.zip")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b\.json: not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match=r"c\.json: no such file"):
        read_json(tmp_path / "c.json")


LOCKER = """
import sys
from common.io import lock_folder
lock_folder(sys.argv[1], "training")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_process_own_until_it_ends(tmp_path):
    folder = tmp_path / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", LOCKER, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, **pipes)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match=rf"run: process {first.pid} on .* is training there"):
        lock_folder(folder, "training")
    first.kill()
    first.communicate()
    lock_folder(folder, "training")
    lock_folder(folder, "training")  # one's own is no hindrance
    command = [sys.executable, "-c", LOCKER, str(folder)]
    assert "locked" not in subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **pipes).stdout
    unlock_folder(folder)
    assert not list(folder.iterdir())
    assert "locked" in subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **pipes).stdout


@pytest.mark.parametrize("place", ["there", "there/file/out.png", "file"])
def test_where_a_file_cannot_be_written_is_told_before(tmp_path, place):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    if place == "file":
        check_writable(tmp_path / "new" / "file", "--out")
        return
    with pytest.raises(InputError, match=r"--out .*there"):
        check_writable(tmp_path / place, "--out")


ENDS = {
    "raise io.InputError('--flag 1: bad')": (2, "x.py: error: --flag 1: bad"),
    "raise KeyboardInterrupt": (130, "x.py: interrupted"),
    "open('/nowhere/file')": (2, "x.py: error: /nowhere/file: No such file or directory"),
    "raise OSError(28, 'No space left on device')": (2, "x.py: error: No space left on device"),
}


@pytest.mark.parametrize("cause", ENDS)
def test_a_program_ends_with_one_line(cause):
    code = f"import sys\nfrom common import io\nsys.argv = ['a/x.py']\ndef main():\n    {cause}\nio.run_cli(main)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    status, text = ENDS[cause]
    assert result.returncode == status and text in result.stderr and "Traceback" not in result.stderr
