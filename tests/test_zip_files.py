"""Zips that are damaged, or made to exhaust memory, are refused before they are unpacked."""

import random
import struct
import zipfile
import zlib

import pytest

from common.errors import InputError
from common.sources import FileSource
from common.zip_files import MAX_NAME, read_hidden, zip_members
from preprocessing.destination import Destination


def write(path, *members, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def raw_zip(path, members, directory):
    """Write local members (name, packed data, method, size, crc), and a directory of (index of the member, name)."""
    body, offsets = b"", []
    for name, data, method, size, crc in members:
        offsets.append(len(body))
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, method, 0, 0, crc, len(data), size, len(name), 0)
        body += name + data
    entries = b""
    for index, name in directory:
        _, data, method, size, crc = members[index]
        entries += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, method, 0, 0, crc, len(data), size, len(name),
                               0, 0, 0, 0, 0, offsets[index]) + name  # fmt: skip
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(directory), len(directory), len(entries), len(body), 0)
    path.write_bytes(body + entries + end)
    return path


def packed(content):
    return zlib.compress(content, wbits=-15)


@pytest.mark.parametrize(
    ("claimed", "content", "message"),
    [
        (10, bytes(10**6), "it is larger than the 10 bytes that the zip states"),
        (2000, bytes(1000), "its checksum does not match"),
        (4_000_000_000, bytes(10), "has 4,000,000,000 bytes; allowed: 1,073,741,824"),
        (900_000_000, bytes(10), "bytes cannot be unpacked to 900,000,000"),
        (90_000_000, random.randbytes(100_000), "bytes cannot be unpacked to 90,000,000"),
    ],
)
def test_a_member_of_another_size_than_the_zip_states(tmp_path, claimed, content, message):
    member = (b"a.png", packed(content), 8, claimed, zlib.crc32(content))
    source = FileSource(raw_zip(tmp_path / "a.zip", [member], [(0, b"a.png")]))
    with pytest.raises(InputError, match=rf"a\.zip:a\.png: .*{message}"):
        source.read("a.png")


def test_a_stream_that_does_not_end(tmp_path):
    content = bytes(range(256)) * 9
    member = (b"a.png", packed(content)[:-4], 8, len(content), zlib.crc32(content))
    with pytest.raises(InputError, match="it cannot be decompressed"):
        FileSource(raw_zip(tmp_path / "a.zip", [member], [(0, b"a.png")])).read("a.png")


def test_members_that_share_their_data(tmp_path):
    member = (b"a", packed(bytes(10**6)), 8, 10**6, zlib.crc32(bytes(10**6)))
    names = [(0, b"%d" % number) for number in range(9)]
    with pytest.raises(InputError, match="overlaps another member or the end of the zip"):
        FileSource(raw_zip(tmp_path / "a.zip", [member], names))
    path = write(tmp_path / "b.zip", ("a", b"1" * 50), kind=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(struct.pack("<II", 50, 50), struct.pack("<II", 5000, 5000)))
    with pytest.raises(InputError, match="overlaps another member or the end of the zip"):
        FileSource(path)


def test_a_directory_with_another_name_than_the_member(tmp_path):
    members = [(name, b"1", 0, 1, zlib.crc32(b"1")) for name in (b"cat/1.png", b"dog/2.png")]
    source = FileSource(raw_zip(tmp_path / "a.zip", members, [(0, b"cat/1.png"), (1, b"dox/2.png")]))
    assert source.read("cat/1.png") == b"1"
    with pytest.raises(InputError, match=r"dox/2\.png: damaged: the zip has a second name for it, dog/2\.png"):
        source.read("dox/2.png")


def test_a_damaged_length_that_hides_a_member(tmp_path):
    path = write(tmp_path / "a.zip", ("a", b"1"), ("b", b"2"))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 32] = 47  # bytes of the first entry's comment, which is then the second entry
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.zip: not a readable zip file"):
        FileSource(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"/etc/a.png", "absolute or parent path"),
        (b"a/../../b.png", "absolute or parent path"),
        (b"C:\\a.png", "absolute or parent path"),
        (b"a\\b.png", "a NUL or a backslash"),
        (b"a.png\0.txt", "a NUL or a backslash"),
        (b"a//b.png", "an empty part or the part . in its path"),
        (b"./a.png", "an empty part or the part . in its path"),
        (b"", "an empty part"),
        (b"x" * 60_000, f"has a name of 60,000 characters; allowed: {MAX_NAME:,} bytes"),
    ],
)
def test_names_that_are_not_plain_relative_paths(tmp_path, name, message):
    path = raw_zip(tmp_path / "a.zip", [(name, b"", 0, 0, 0)], [(0, name)])
    with pytest.raises(InputError, match=message) as caught:
        FileSource(path)
    assert len(str(caught.value)) < 500


def test_damaged_directories_are_no_other_errors(tmp_path):
    path = write(tmp_path / "a.zip", ("a/b.png", b"1" * 30), ("c.txt", b"2"))
    intact = path.read_bytes()
    for position in range(intact.index(b"PK\1\2"), len(intact)):
        for value in (0, 0xFF):
            path.write_bytes(intact[:position] + bytes([value]) + intact[position + 1 :])
            try:
                source = FileSource(path)
                contents = {source.read(name) for name in source.names}
                assert contents <= {b"1" * 30, b"2"}
            except InputError:
                pass


def test_folders_and_hidden_files_are_no_members(tmp_path):
    path = write(tmp_path / "a.zip", ("./", b""), ("e/", b""), ("a/b.png", b"1"), (".x", b""), ("__MACOSX/y.png", b""))
    members, empty = zip_members(path)
    assert list(members) == ["a/b.png"] and empty == ["e"]


def test_a_hidden_file_is_read_on_request(tmp_path):
    path = write(tmp_path / "a.zip", ("b", b"2"), (".a", b"1" * 99))
    assert read_hidden(path, ".a") == b"1" * 99
    with pytest.raises(InputError, match=r"contains no \.c of at most"):
        read_hidden(path, ".c")
    claims = [(b".a", packed(bytes(10**6)), 8, 10, 0)]
    with pytest.raises(InputError, match="it is larger than the 10 bytes"):
        read_hidden(raw_zip(tmp_path / "b.zip", claims, [(0, b".a")]), ".a")


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"9" * 10_000, b"\xff", None])
def test_a_zip_of_another_program_is_no_destination(tmp_path, content):
    name = "other" if content is None else ".convert.json"
    write(tmp_path / "out.zip", (name, content or b""))
    with pytest.raises(InputError, match=r"out\.zip: exists and was not created by this program"):
        Destination(tmp_path / "out.zip", "convert").claim({})
