"""Pickles that would take memory or time: refused before anything is built."""

import argparse
import io
import pickle
import struct
import time
from collections import Counter, OrderedDict

import pytest
import torch

from common.errors import InputError
from models import pickle_outline
from models.pickle_outline import not_allowed
from models.weights_file import read_weights_file


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


NESTED = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))  # each tuple has the last twice
HOSTILE = {
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R.",
    "codec": b"\x80\x02c_codecs\nencode\n" + text("x" * 10) + text("idna") + b"\x86R.",
    "key of a dict": b"\x80\x02}K\x01" + NESTED + b"K\x01s.",
    "keys of a dict": b"\x80\x02}(K\x01" + NESTED + b"K\x01u.",
    "element of a set": b"\x80\x02c__builtin__\nset\n]K\x01" + NESTED + b"a\x85R.",
    "key of an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n]K\x01" + NESTED + b"K\x02\x86a\x85R.",
    "large key": b"\x80\x02}(" + b"K\x01" * 1000 + b"tK\x01s.",
    "dtype of a list": b"\x80\x02cnumpy\ndtype\nK\x01" + NESTED + b"\x85R.",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_calls_that_take_memory_or_time_are_refused(tmp_path, data):
    start = time.monotonic()
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"w\.pt: not a readable file of weights"):
        read_weights_file(tmp_path / "w.pt")
    assert time.monotonic() - start < 5


def test_a_pickle_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(pickle_outline, "MOST_BYTES", 1000)
    assert not not_allowed(io.BytesIO(pickle.dumps(list(range(100)), 2)))
    with pytest.raises((EOFError, struct.error)):
        not_allowed(io.BytesIO(pickle.dumps(list(range(1000)), 2)))


def test_what_torch_saves_is_allowed(tmp_path):
    content = {
        "ordered": OrderedDict([("a", torch.ones(2)), ("b", torch.nn.Parameter(torch.ones(2)))]),
        "counter": Counter("aab"), "set": {1, "a"}, "bytes": b"\xff\x00", "array": bytearray(b"ab"),
        "pairs": {(0, ("a", 2)): 1, None: 2, 1.5: 3}, "complex": 1j, "args": argparse.Namespace(a=[1]),
        "dtype": torch.bfloat16, "size": torch.Size([2]), "state": torch.get_rng_state(),
    }  # fmt: skip
    for is_zip in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
        found = read_weights_file(tmp_path / "w.pt")
        assert found.keys() == content.keys() and found["pairs"] == content["pairs"] and found["set"] == {1, "a"}
        assert found["array"] == bytearray(b"ab") and torch.equal(found["state"], content["state"])


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.zeros(2, 2).to_sparse(), "a sparse tensor"),
        (torch.zeros(2, 2).to_sparse_csr(), "a sparse tensor"),
        (torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), "a quantized tensor"),
        (torch.zeros(2, device="meta"), "a tensor without values"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_special_tensors_are_named(tmp_path, value, name):
    torch.save({"ema": {"x": value}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=rf"w\.pt: refused, it holds {name}.* \(ema\.x\); allowed: tensors"):
        read_weights_file(tmp_path / "w.pt")
