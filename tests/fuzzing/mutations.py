"""Seeded damage to the bytes of a file: random damage, and changes that keep a format valid.

Random damage is what a disk or a transfer does; a checksum in the format must find it. Structured changes are what a
program could have written on purpose: checksums fit, and only the content is unusual.
"""

from __future__ import annotations

import binascii
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Change = Callable[[random.Random, bytes], bytes]

STRUCTURED_SHARE = 0.4  # of the inputs, if a format has structured changes
INTEGERS = (0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
BOMB_BYTES = 1 << 28  # unpacked size of a bomb, about 1000 times the packed one
HONEST_BYTES = 1 << 26  # of a member that states its size: a program may unpack it
LONG_NAME = "n" * 60_000
# Values in place of those of a JSON file or a checkpoint's settings.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "a", "0", "nan", "../x", "/etc/passwd", "\x00", "\udcff", "a" * 60_000, [], [0], [None], [[]], {}, {"a": 1},
    [1] * 5000, {"": {}},
)  # fmt: skip


class Mutated(NamedTuple):
    """A changed file; `kind` names the change, `origin` is "random", "odd" or "invalid"."""

    data: bytes
    kind: str
    origin: str


def mutate(
    rng: random.Random, data: bytes, other: bytes, odd: Sequence[Change] = (), invalid: Sequence[Change] = ()
) -> Mutated:
    """Return a changed copy of `data`. `other` is a second valid file of the same format, for splices.

    `odd` are structured changes that may be read with another result; `invalid` are those that must be refused.
    """
    if (odd or invalid) and rng.random() < STRUCTURED_SHARE:
        change = rng.choice((*odd, *invalid))
        return Mutated(change(rng, data), change.__name__, "odd" if change in odd else "invalid")
    change = rng.choice(RANDOM)
    if change is splice:
        return Mutated(splice(rng, data, other), "splice", "odd")  # may be all of the other file
    return Mutated(change(rng, data), change.__name__, "random")


def _block(rng: random.Random, data: bytes) -> tuple[int, int]:
    """Return start and end of a random block, most often a short one."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, 512, len(data))))


def flip_bit(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def set_bytes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.randbytes(1) + data[at + 1 :]
    return data


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 32))))]


def extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0" * 100, rng.randbytes(50), data, b"\n"))


def delete(rng: random.Random, data: bytes) -> bytes:
    start, end = _block(rng, data)
    return data[:start] + data[end:]


def duplicate(rng: random.Random, data: bytes) -> bytes:
    start, end = _block(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 3)) + data[end:]


def swap(rng: random.Random, data: bytes) -> bytes:
    (a, b), (c, d) = sorted((_block(rng, data), _block(rng, data)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def integer(rng: random.Random, data: bytes) -> bytes:
    size, at = rng.choice((1, 2, 4, 8)), rng.randrange(len(data) + 1)
    value = rng.choice((*INTEGERS, len(data), len(data) - at)) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def splice(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


RANDOM = (flip_bit, flip_bit, set_bytes, truncate, extend, delete, duplicate, swap, integer, splice)


def json_value(rng: random.Random, data: bytes) -> bytes:
    """Change one value of a JSON file: another type, a huge number, deep nesting, a key twice, or not there."""
    content = json.loads(data)
    kind = rng.random()
    if kind < 0.05:
        return b"[" * 200_000 if rng.random() < 0.5 else b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    if kind < 0.1 and isinstance(content, dict) and content:
        key = rng.choice(list(content))
        again = f", {json.dumps(key)}: {json.dumps(rng.choice(ODD_VALUES))}}}"
        return json.dumps(content)[:-1].encode() + again.encode("utf-8", "surrogatepass")
    return _dumped(change_value(rng, content))


def _dumped(content: Any) -> bytes:
    return json.dumps(content).encode("utf-8", "surrogatepass")


def json_line(rng: random.Random, data: bytes) -> bytes:
    """Change one value of one line of a file of JSON lines."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_value(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def change_value(rng: random.Random, content: Any, values: Sequence[Any] = ODD_VALUES) -> Any:
    """Return nested dicts and lists with one value replaced, removed, or under another name. `content` is changed."""
    places = list(_places(content))
    if not places:
        return rng.choice(values)
    for _ in range(rng.choice((1, 1, 1, 2))):
        holder, key = rng.choice(places)
        if (key >= len(holder)) if isinstance(holder, list) else (key not in holder):
            continue  # removed by the first change
        action = rng.random()
        if action < 0.65:
            holder[key] = rng.choice(values)
        elif action < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(("x", f"{key}x", str(key).upper(), LONG_NAME))] = holder.pop(key)
        else:
            holder.insert(key, holder[key])
    return content


def _places(content: Any) -> Any:
    """Yield (container, key) of every value; of long lists only some."""
    keys: list[Any] = []
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = sorted({*range(len(content))[:3], *range(len(content))[-2:]})
    for key in keys:
        yield content, key
        yield from _places(content[key])


def npy_header(rng: random.Random, data: bytes) -> bytes:
    """Change the header of an .npy file, with a length that fits."""
    version, size = data[6:8], int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + size].decode("latin1"), data[10 + size :]
    huge = (f"({2**62},)", "(1000000, 1000000)", "9" * 99)
    shapes = ("()", "(0,)", "(-1,)", "(2, 3)", "None", "(True,)", "('a',)", *huge)
    kinds = ("|O", "<f8", "<f2", ">f4", "<c8", "|b1", "<U9", "|V4", "<M8[s]", "<i8", "|S3", "x", "<f16", "3<f4")
    shape, dtype = re.search(r"\(.*?\)", header)[0], re.search("'descr': '(.*?)'", header)[1]
    fields = "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,)}"
    header, version = rng.choice((
        (header.replace(shape, rng.choice(shapes)), version),
        (header.replace(dtype, rng.choice(kinds)), version),
        (header.replace("False", rng.choice(("True", "None", "2", "'a'"))), version),
        (rng.choice(("{}", "[" * 3000, "1", fields)), version),
        (header, bytes(rng.choice(((2, 0), (3, 0), (9, 9), (0, 0))))),
    ))  # fmt: skip
    encoded = header.encode("latin1") + b"\n"
    return data[:6] + version + len(encoded).to_bytes(2, "little") + encoded + body


def png_chunk(rng: random.Random, data: bytes) -> bytes:
    """Change a PNG's chunk, with a checksum that fits: sizes, pixels, order, a text that unpacks to 256 MiB."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    number = rng.randrange(len(chunks))
    name, body = chunks[number]
    change = rng.randrange(5)
    if change == 0:
        width, height = rng.choice(((0, 4), (2**31 - 1, 1), (60_000, 60_000), (1, 200_000), (25, 24)))
        chunks[0] = (b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:])
    elif change == 1:
        chunks[number] = (name, flip_bit(rng, body))
    elif change == 2:
        chunks.pop(number)
    elif change == 3:
        chunks.insert(number, rng.choice(chunks))
    else:
        kind = rng.choice((b"zTXt", b"iCCP", b"tEXt", b"iTXt"))
        chunks.insert(1, (kind, b"a\0\0" + (bomb() if rng.random() < 0.5 else rng.randbytes(40))))
    packed = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", binascii.crc32(n + b)) for n, b in chunks)
    return data[:8] + b"".join(packed)


@cache
def bomb(size: int = BOMB_BYTES) -> bytes:
    """Return zeros packed by zlib."""
    return zlib.compress(bytes(size), 9)


def zip_field(rng: random.Random, data: bytes) -> bytes:
    """Set one field of a zip's directory or of a member's header: method, flags, checksum, sizes, names, offsets."""
    signature = b"PK\1\2" if rng.random() < 0.7 else b"PK\3\4"
    fields = {  # offset and size
        b"PK\1\2": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
        b"PK\3\4": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    }[signature]
    starts = [at for at in range(len(data) - 30) if data.startswith(signature, at)]
    if not starts:
        return data
    at, (offset, size) = rng.choice(starts), rng.choice(fields)
    place = at + offset
    now = int.from_bytes(data[place : place + size], "little")
    value = rng.choice((*INTEGERS, now + 1, now - 1, now * 2)) % (1 << 8 * size)
    return data[:place] + value.to_bytes(size, "little") + data[place + size :]


def zip_members(rng: random.Random, data: bytes) -> bytes:
    """Write a zip again with one member changed: its content, name, a second one of its name, or one that is a bomb."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    number, change = rng.randrange(len(members)), rng.randrange(6)
    name, content, method = members[number]
    names = ("../x", "/etc/x", "C:\\x", "a\\..\\x", "", "x" * 60_000, "\0a", "é\n", ".hidden", "a/", "__MACOSX/a", name)
    if change == 0:
        return _zip_with_bomb(members, number, rng.random() < 0.5)
    other, method_now = rng.choice(names), rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED))
    damaged = rng.choice(RANDOM)(rng, content)
    members[number : number + 1] = (
        [(name, damaged, method)],
        [(other, content, method)],
        [(other, content, method), members[number]],
        [],
        [(name, content, method_now)],
    )[change - 1]
    return _zip_of(members)


def _zip_of(members: Sequence[tuple[str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, method in members:
            info = zipfile.ZipInfo()  # its constructor would correct the name
            info.filename, info.compress_type = name or "empty", method
            archive.writestr(info, content)
    return buffer.getvalue()


def _zip_with_bomb(members: Sequence[tuple[str, bytes, int]], number: int, lies: bool) -> bytes:
    """Return a zip with zeros as one member. If it `lies`, the stated size is that of the member before."""
    marker, (name, content, _) = b"BOMB" * 4, members[number]
    packed = bomb(BOMB_BYTES if lies else HONEST_BYTES)[2:-4]  # without the header and checksum of zlib
    data = _zip_of([*members[:number], *members[number + 1 :], (name, marker, zipfile.ZIP_STORED)])
    start = data.index(marker)
    header = data.rindex(b"PK\3\4", 0, start)
    local, directory = bytearray(data[header:start]), bytearray(data[start + len(marker) :])
    for block, at in ((local, 8), (directory, directory.rindex(b"PK\1\2") + 10)):
        block[at : at + 2] = zipfile.ZIP_DEFLATED.to_bytes(2, "little")
        block[at + 10 : at + 18] = struct.pack("<II", len(packed), len(content) if lies else HONEST_BYTES)
    end = directory.rindex(b"PK\5\6")
    directory[end + 16 : end + 20] = struct.pack("<I", start + len(packed))
    return data[:header] + bytes(local) + packed + bytes(directory)


def safetensors_header(rng: random.Random, data: bytes) -> bytes:
    """Change a value of a safetensors header; entries of the configuration in it are JSON inside JSON."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    facts = header.get("__metadata__") or {}
    if "config" in facts and rng.random() < 0.6:
        facts["config"] = json_value(rng, facts["config"].encode()).decode("utf-8", "replace")
    else:
        kinds = ("F64", "F16", "BF16", "I8", "BOOL", "U8", "F8_E4M3", "C64", "X")
        header = change_value(rng, header, (*ODD_VALUES, *kinds))
    encoded = _dumped(header)
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


def safetensors_values(rng: random.Random, data: bytes) -> bytes:
    """Give a tensor values that are not finite, whole numbers, or another shape."""
    from safetensors.numpy import load, save

    size = int.from_bytes(data[:8], "little")
    facts = json.loads(data[8 : 8 + size]).get("__metadata__")
    tensors = dict(load(data))
    name = rng.choice(sorted(tensors))
    kind = rng.randrange(3)
    if kind == 0:
        tensors[name] = np.full_like(tensors[name], rng.choice((np.nan, np.inf, -np.inf)))
    elif kind == 1:
        tensors[name] = tensors[name].astype(rng.choice(("int8", "bool", "uint8")))
    else:
        tensors[name] = np.repeat(tensors[name][None], 2, 0)
    return save(tensors, facts)
