"""Reading zips that are not trusted: the directory is checked once, then members are read at their position.

Python's `zipfile` reads the directory. It is not used for the members, because its objects cannot be shared by
processes.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.errors import InputError, printable
from common.io import MAX_FILE

MAX_NAME = 1024  # bytes; names are an array with the length of the longest, so a longer one would need gigabytes
MAX_RATIO = 1032  # of deflate, unpacked to packed bytes (zlib's technical details); a larger claimed size is false
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")

MAX_HIDDEN = 1 << 20  # bytes of the settings that a program records in a zip; they have a few hundred
BOMB_BYTES, BOMB_RATIO = 1 << 26, 200  # no image or table of labels this large is packed more than 30 times smaller

SHORT_NAME = MAX_NAME // 4  # characters; they cannot have more than MAX_NAME bytes
# Whatever a plain name of a file that is not hidden cannot contain; most names need no other check.
UNUSUAL = re.compile(rf"[\\\0:]|//|^/|^$|(?:^|/)(?:\.|{'|'.join(map(re.escape, SYSTEM_FOLDERS))})")
# Absolute paths, drives of Windows, and paths with the part "..".
UNSAFE_PATH = re.compile(r"[/\\]|[A-Za-z]:|(?:.*[/\\])?\.\.(?:[/\\]|$)", re.DOTALL)
HEADER_BYTES = 30  # of a member, without its name and extra field
END_BYTES = 22  # of the last record, without the comment
NAME_BYTES = 512  # read in advance for name and extra field; longer ones need a second read
UNICODE_NAME = b"up"  # identifies an extra field that contains another name (APPNOTE.TXT, 4.6.9)
MEMBER = np.dtype(
    [("offset", "u8"), ("compressed", "u8"), ("size", "u8"), ("crc", "u4"), ("method", "u2"), ("encrypted", "?")]
)


def is_hidden(part: str) -> bool:
    """Return whether a file or folder of this name is ignored: hidden, or made by an operating system for itself."""
    return part.startswith(".") or part in SYSTEM_FOLDERS


def encode_name(name: str) -> bytes:
    """Return the bytes of a file name on the disk: UTF-8, and the original bytes of names that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def folders_above(names: Iterable[str]) -> set[str]:
    """Return every folder that contains one of the names, directly or in a folder of it; "" is not among them."""
    folders: set[str] = set()
    for name in names:
        folder = name.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return folders


def zip_members(path: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the files of a zip by name, as elements of MEMBER, and the empty folders. Hidden files are ignored.

    Raises BadZipFile if the file is not a zip, and InputError for names that are not plain relative paths, for two
    files of one name, and for members that overlap or are not inside of the file, as in zip bombs.
    """
    members: dict[str, tuple[int, ...]] = {}
    folders: set[str] = set()
    infos, end = _directory(path)
    for info in infos:
        name = info.filename
        if UNUSUAL.search(info.orig_filename) or len(name) > SHORT_NAME:
            if problem := _name_problem(info):
                raise InputError(f"{path}: member {info.orig_filename!r:.100} {problem}; create the zip again")
            if any(map(is_hidden, name.split("/"))):
                continue
        if name.endswith("/"):
            folders.add(name.rstrip("/"))
            continue
        if name in members:
            raise InputError(f"{path}: contains {name!r} more than once; create the zip again")
        members[name] = _fields(info)
    _check_positions(path, members, end)
    return members, sorted(folders - folders_above([*members, *folders])) if folders else []


def read_hidden(path: Path, name: str) -> bytes:
    """Return the bytes of a small hidden file in a zip. Raises BadZipFile, OSError, or the errors of `read_member`."""
    infos, end = _directory(path)
    found = {info.filename: _fields(info) for info in infos if info.filename == name}
    if not found or found[name][2] > MAX_HIDDEN:
        raise InputError(f"contains no {name} of at most {MAX_HIDDEN:,} bytes")
    _check_positions(path, found, end)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return read_member(descriptor, np.array(found[name], MEMBER)[()], encode_name(name))
    finally:
        os.close(descriptor)


def _fields(info: zipfile.ZipInfo) -> tuple[int, ...]:
    """Return an entry of a zip's directory as an element of MEMBER."""
    sizes, encrypted = (info.compress_size, info.file_size), info.flag_bits & 1
    return (info.header_offset, *sizes, info.CRC, info.compress_type, encrypted)


def _directory(path: Path) -> tuple[list[zipfile.ZipInfo], int]:
    """Return the entries of a zip's directory, and the directory's position. Raises BadZipFile or OSError."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            infos, start = complete_directory(archive), archive.start_dir
    except (OSError, MemoryError, zipfile.BadZipFile):
        raise
    except Exception as error:  # of damaged directories
        raise zipfile.BadZipFile(str(error)) from error
    return infos, start


def complete_directory(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the entries of an open zip's directory. Raises BadZipFile if they are not as many as the zip states.

    A damaged length in one entry can hide the entries after it. Zips of more than 65,534 files state 65,535.
    """
    infos = archive.infolist()
    archive.fp.seek(-END_BYTES - len(archive.comment), os.SEEK_END)
    end = archive.fp.read(END_BYTES)
    count = int.from_bytes(end[10:12], "little")
    if end.startswith(b"PK\5\6") and count not in (0xFFFF, len(infos) % 0x10000):
        raise zipfile.BadZipFile("another number of members than it states")
    return infos


def _name_problem(info: zipfile.ZipInfo) -> str | None:
    """Return why the name of a member is not allowed, None if it is."""
    name = info.orig_filename
    if UNSAFE_PATH.match(name):
        return "is an absolute or parent path"
    if "\0" in name or "\\" in name:
        return "has a NUL or a backslash in its name; allowed: folders separated by /"
    if len(encode_name(name)) > MAX_NAME:
        return f"has a name of {len(name):,} characters; allowed: {MAX_NAME:,} bytes"
    if not name.endswith("/") and not {"", "."}.isdisjoint(name.split("/")):
        return "has an empty part or the part . in its path"
    return None


def _check_positions(path: Path, members: dict[str, tuple[int, ...]], end: int) -> None:
    """Raise InputError if a member overlaps another one, or ends behind `end`."""
    names = sorted(members, key=members.__getitem__)  # by offset
    problem = "overlaps another member or the end of the zip, which is damaged or a zip bomb; create the zip again"
    following = end
    for name in reversed(names):
        offset, length, *_ = members[name]
        if offset < 0 or offset + HEADER_BYTES + length > following:
            raise InputError(f"{path}: member {name!r:.100} {problem}")
        following = offset


def read_member(descriptor: int, member: np.void, name: bytes) -> bytes:
    """Return the bytes of the member `name` of an open zip (APPNOTE.TXT, 4.3.7: header, name, extra field, data).

    Raises InputError, without the path, if it is damaged, larger than MAX_FILE, encrypted, or compressed with another
    method than deflate.
    """
    if member["encrypted"] or member["method"] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        kind = "encrypted" if member["encrypted"] else f"compressed with method {member['method']}"
        raise InputError(f"{kind}; allowed: stored, deflated")
    offset, length, size = (int(member[field]) for field in ("offset", "compressed", "size"))
    if max(length, size) > MAX_FILE:
        raise InputError(f"has {max(length, size):,} bytes; allowed: {MAX_FILE:,}")
    if size > MAX_RATIO * length + MAX_RATIO or size > max(BOMB_BYTES, BOMB_RATIO * length):
        raise InputError(f"damaged: {length:,} bytes cannot be unpacked to {size:,}")
    block = os.pread(descriptor, HEADER_BYTES + NAME_BYTES + length, offset)
    name_end = HEADER_BYTES + int.from_bytes(block[26:28], "little")
    start = name_end + int.from_bytes(block[28:30], "little")
    data = block[start : start + length]
    if len(data) < length:
        data += os.pread(descriptor, length - len(data), offset + start + len(data))
    if member["method"] == zipfile.ZIP_DEFLATED:
        data = _inflate(data, size)
    if block[:4] != b"PK\3\4" or len(data) != size or zlib.crc32(data) != member["crc"]:
        raise InputError("damaged, its checksum does not match")
    own_name = block[HEADER_BYTES:name_end]
    if own_name != name and own_name.isascii() and len(block) >= start and UNICODE_NAME not in block[name_end:start]:
        raise InputError(f"damaged: the zip has a second name for it, {printable(own_name.decode('ascii')):.100}")
    return data


def _inflate(data: bytes, size: int) -> bytes:
    """Return the unpacked bytes, at most `size` + 1. Raises InputError if the stream is damaged or not complete."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise InputError("damaged, it cannot be decompressed") from error
    if len(unpacked) > size:
        raise InputError(f"damaged: it is larger than the {size:,} bytes that the zip states")
    if not unpacker.eof:
        raise InputError("damaged, it cannot be decompressed")
    return unpacked
