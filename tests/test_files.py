import pickle
import zipfile

import pytest

from files import InputError, atomic_write, open_source, read_json, write_json


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
        return open_source(tmp_path / "files.zip")
    for name, content in files.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    return open_source(tmp_path / "files")


def test_folder_and_zip_are_read_alike(source):
    assert source.names == ["a.txt", "b/2.txt"]
    assert source.read("b/2.txt") == b"two" and source.size("a.txt") == 3 and "b/2.txt" in source
    with pytest.raises(InputError, match=r"nothing\.txt"):
        source.read("nothing.txt")


def test_a_source_can_be_handed_to_a_worker(source):
    source.read("a.txt")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read("a.txt") == b"one" and copy.names == source.names


def test_what_is_neither_folder_nor_zip_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder or zip file"):
        open_source(tmp_path / "none")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"broken\.zip: not a readable zip"):
        open_source(tmp_path / "broken.zip")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b\.json: not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match=r"c\.json: no such file"):
        read_json(tmp_path / "c.json")
