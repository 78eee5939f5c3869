"""Files of weights: what is allowed in them, what is named, and that nothing is executed."""

import argparse
import datetime
import pickle
import types
import zipfile
from collections import OrderedDict
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch

from common.errors import InputError
from models import pickle_outline, weights_file
from models.weights_file import mismatch, read_safetensors, read_weights_file

ALLOWED = {
    "float64": (np.float64(1.5), 1.5),
    "float32": (np.float32(0.1), float(np.float32(0.1))),
    "int64": (np.int64(-3), -3),
    "bool": (np.bool_(True), True),
    "big endian": (np.dtype(">i4").type(7), 7),
    "dtype": (np.dtype("float32"), "f4"),
    "path": (Path("a/b"), "a/b"),
    "path of Windows": (PureWindowsPath("C:/a"), "C:\\a"),
    "namespace": (argparse.Namespace(lr=np.float64(0.5)), argparse.Namespace(lr=0.5)),
    "ordered": (OrderedDict(a=1), OrderedDict(a=1)),
    "size": (torch.Size([2]), torch.Size([2])),
    "torch dtype": (torch.float16, torch.float16),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("value, expected", ALLOWED.values(), ids=ALLOWED)
def test_plain_values_are_read(tmp_path, value, expected, is_zip):
    content = {"ema": {"w": torch.ones(2)}, "args": argparse.Namespace(value=[value])}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    found = read_weights_file(tmp_path / "w.pt")
    assert found["args"].value[0] == expected and not isinstance(found["args"].value[0], np.generic)
    assert torch.equal(found["ema"]["w"], torch.ones(2))


def test_a_simple_namespace_is_a_namespace(tmp_path):
    torch.save({"args": types.SimpleNamespace(depth=3)}, tmp_path / "w.pt")
    found = read_weights_file(tmp_path / "w.pt")["args"]
    assert isinstance(found, argparse.Namespace) and found.depth == 3


NAMED = {
    "date": (datetime.date(2020, 1, 1), "datetime.date"),
    "array": (np.zeros(2), "numpy.ndarray"),
    "function": (print, "builtins.print"),
    "module": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "class": (Path, "pathlib.Path"),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value, name", NAMED.values(), ids=NAMED)
def test_other_types_are_named_with_their_place(tmp_path, value, name, protocol, is_zip):
    content = {"ema": {}, "args": argparse.Namespace(tables=[{"first": value}])}
    torch.save(content, tmp_path / "w.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError) as error:
        read_weights_file(tmp_path / "w.pt")
    assert f"refused, it holds {name} (args.tables[0].first); allowed: tensors, numbers" in str(error.value)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_protocol_is_named(tmp_path, protocol):
    torch.save({"args": argparse.Namespace(a=1), "b": b"x"}, tmp_path / "w.pt", pickle_protocol=protocol)
    with pytest.raises(InputError, match=f"it has pickle protocol {protocol}; allowed: 2, the default of torch.save"):
        read_weights_file(tmp_path / "w.pt")


def test_many_types_are_counted(tmp_path):
    torch.save([datetime.date(2020, 1, day) for day in range(1, 10)], tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"datetime\.date \(\[0\]\), .*\(\[3\]\) and 5 more; allowed: "):
        read_weights_file(tmp_path / "w.pt")


def test_texts_of_pytorch_are_not_passed_on(tmp_path):
    cyclic = []
    cyclic.append(cyclic)
    contents = [b"", b"hello", b"\x80", b"\x80\x02", b"\x80\x04K\x01.", pickle.dumps({"a": 1}), pickle.dumps(cyclic, 2)]
    contents += [pickle.dumps(torch.zeros(2), protocol) for protocol in (2, 4)]
    torch.save({"a": torch.zeros(9), "date": datetime.date(2020, 1, 1)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    contents += [good[:size] for size in range(0, len(good), 50)]
    contents += [good[:at] + b"\xff\x00" + good[at + 2 :] for at in range(0, len(good), 50)]
    for data in contents:
        (tmp_path / "w.pt").write_bytes(data)
        try:
            read_weights_file(tmp_path / "w.pt")
        except InputError as error:
            assert not any(
                word in str(error) for word in ("weights_only", "torch.load(", "\n", "Unsupported", "<class")
            )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_archives_are_named(tmp_path):
    network = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    network.save(str(tmp_path / "program.pt"))
    with pytest.raises(InputError, match=r"TorchScript program, .* torch\.save\(torch\.jit\.load\(\"program\.pt\""):
        read_weights_file(tmp_path / "program.pt")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", b"")
    with pytest.raises(InputError, match=r"images\.zip: a zip without weights"):
        read_weights_file(tmp_path / "images.zip")
    with pytest.raises(InputError, match="is a folder"):
        read_weights_file(tmp_path)


def test_an_outline_executes_nothing_and_changes_nothing(tmp_path):
    """Code in a file may call anything, and may set attributes of classes."""
    hostile = [
        b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00xK\x01sb.",  # BUILD on a class
        b"\x80\x02cargparse\nNamespace\nN}X\x08\x00\x00\x00__init__K\x01s\x86b.",  # its slots
        b"\x80\x02cbuiltins\nsetattr\ncargparse\nNamespace\nX\x01\x00\x00\x00xK\x01\x87R.",
        b"\x80\x02cbuiltins\neval\nX\x10\x00\x00\x00open('ran', 'w') \x85R.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",  # a frame of 2^63 bytes
        b"\x80\x02K\x01r\xff\xff\xff\xff.",  # memo 2^32
        b"(" * 5_000,
        b"]" * 5_000 + b"a" * 4_999 + b".",
    ]
    before = dict(vars(argparse.Namespace))
    for data in hostile:
        (tmp_path / "w.pt").write_bytes(data)
        try:
            read_weights_file(tmp_path / "w.pt")
        except InputError as error:
            assert "\n" not in str(error)
    assert dict(vars(argparse.Namespace)) == before
    assert not any(name in vars(pickle_outline._Placeholder) for name in ("x", "ran"))


def test_a_mismatch_has_the_useful_part_first_and_is_short():
    network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(12)))
    state = {name: value for name, value in network.state_dict().items() if not name.startswith(("3.", "10."))}
    state |= {"0.weight": torch.zeros(3, 2), "head.bias": torch.zeros(1)}
    with pytest.raises(RuntimeError) as error:
        network.load_state_dict(state)
    assert mismatch(error.value) == (
        "missing: 4 (10.bias, 10.weight, 3.bias, 3.weight); unexpected: 1 (head.bias); "
        "of another shape: 1 (0.weight [3, 2] instead of [2, 2])"
    )
    with pytest.raises(RuntimeError) as error:
        network.load_state_dict({})
    assert mismatch(error.value) == "missing: 24 (0.bias, 0.weight, 1.bias, 1.weight and 20 more)"
    assert mismatch(RuntimeError("something else")) is None


def test_expanded_tensors_are_refused(tmp_path):
    """A file of 1 KB that would take 4 TB, and one whose tensors share one memory."""
    torch.save({"ema": {"w": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: the tensors of ema are larger than the file, \d+ bytes"):
        read_weights_file(tmp_path / "w.pt")
    torch.save([torch.zeros(9), {"w": torch.zeros(1).expand(2)}], tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: 1\.w, 2, is an expanded tensor, of which the file has only a part"):
        read_weights_file(tmp_path / "w.pt")
    shared = torch.zeros(1000)
    torch.save({"ema": {f"w{n}": shared for n in range(100)}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: the tensors of ema are larger than the file"):
        read_weights_file(tmp_path / "w.pt")
    torch.save({"ema": {"w": shared}, "model": {"w": shared}}, tmp_path / "w.pt")
    assert torch.equal(read_weights_file(tmp_path / "w.pt")["model"]["w"], shared)


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def test_content_without_end_is_refused(tmp_path, monkeypatch):
    cyclic: dict = {"a": 1}
    cyclic["self"] = [cyclic] * 20
    wide = ["x"]
    for _ in range(30):
        wide = [wide, wide]  # 2^30 values
    for value in (cyclic, wide, nested(200), argparse.Namespace(a=nested(200)), {"x" * 60_000: 1}):
        torch.save(value, tmp_path / "w.pt")
        with pytest.raises(InputError, match=r"w\.pt: (holds too many values, or|a name in it has more than 1000)"):
            read_weights_file(tmp_path / "w.pt")
    monkeypatch.setattr(weights_file, "MOST_VALUES", 100)
    torch.save(list(range(101)), tmp_path / "w.pt")
    with pytest.raises(InputError, match="too many values"):
        read_weights_file(tmp_path / "w.pt")


def rezipped(source: Path, dest: Path, compression: int = zipfile.ZIP_STORED, extra: str = "") -> None:
    """Write a zip again, compressed or with a further entry."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        if extra:
            new.writestr(extra, b"")


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path):
    torch.save({"w": torch.zeros(10_000)}, tmp_path / "w.pt")
    rezipped(tmp_path / "w.pt", tmp_path / "small.pt", zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"small\.pt: its entries are compressed; torch\.save stores them uncompr"):
        read_weights_file(tmp_path / "small.pt")
    for extra in ("other/data.pkl", "other/x"):
        rezipped(tmp_path / "w.pt", tmp_path / "extra.pt", extra=extra)
        with pytest.raises(InputError, match=r"extra\.pt: damaged; its entries are not those that torch\.save writes"):
            read_weights_file(tmp_path / "extra.pt")


def test_a_damaged_zip_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    disks = data.rindex(b"PK\x06\x07") + 16  # in the locator of the zip64 directory, the number of disks
    for at, text in (
        (disks, "not a readable file of weights"),
        (len(data) // 2, r"damaged; the checksum of \S+ in it"),
    ):
        (tmp_path / "w.pt").write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        with pytest.raises(InputError, match=rf"w\.pt: {text}"):
            read_weights_file(tmp_path / "w.pt")


def test_a_zip_of_very_many_entries_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_file, "MOST_ENTRIES", 2)
    torch.save([torch.zeros(1) for _ in range(9)], tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt: has too many entries; allowed: at most 2"):
        read_weights_file(tmp_path / "w.pt")


def test_an_open_file_stays_the_same_file(tmp_path):
    for number in (1, 2):
        torch.save({"w": torch.full((1000,), number)}, tmp_path / f"{number}.pt")
    with open(tmp_path / "1.pt", "rb") as file:
        (tmp_path / "2.pt").replace(tmp_path / "1.pt")
        content = read_weights_file(tmp_path / "1.pt", file)
    assert content["w"].unique().tolist() == [1]  # read after the file was closed and its name replaced


def header(entries: str) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode()


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
ODD_SAFETENSORS = {
    "empty": (b"", "not a readable"),
    "header of 2^63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "not a readable"),
    "large header": ((2**24 + 1).to_bytes(8, "little") + bytes(2**24 + 1), r"its header has 16777217 bytes; allowed"),
    "recursion": (header("[" * 200_000), "not a readable"),
    "name twice": (header(f'{{"a":{ENTRY},"a":{ENTRY}}}') + bytes(4), "damaged; its header names a twice"),
    "long name": (header(f'{{"{"x" * 60_000}":{ENTRY}}}') + bytes(4), "with names of 1000 letters"),
    "offsets": (header(f'{{"a":{ENTRY.replace("[0,4]", "[0,400]")}}}') + bytes(4), "not a readable"),
    "huge shape": (header(f'{{"a":{ENTRY.replace("[1]", "[4611686018427387904,4]")}}}') + bytes(4), "not a readable"),
    "number": (header('{"a":' + "9" * 5000 + "}"), "not a readable"),
}


@pytest.mark.parametrize("data, text", ODD_SAFETENSORS.values(), ids=ODD_SAFETENSORS)
def test_odd_safetensors_are_refused(tmp_path, data, text):
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=rf"w\.safetensors: .*{text}"):
        read_safetensors(tmp_path / "w.safetensors")
