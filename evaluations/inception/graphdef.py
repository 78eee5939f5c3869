"""Reads constants from TensorFlow graph files (GraphDef protobuf messages) without TensorFlow and without protobuf.

Field numbers: graph.proto, node_def.proto, attr_value.proto and tensor.proto in tensorflow/core/framework. Encoding:
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError

_VARINT, _BYTES, _FIXED_SIZES = 0, 2, {1: 8, 5: 4}  # wire types; those of fixed size with their number of bytes
_DT_FLOAT = 1
MOST_NODES = 100_000  # the published graph has 1,008
MOST_FIELDS = 1000  # of a message; those of a node are its inputs and attributes
MOST_NUMBERS = 3_000_000  # fields of a tensor, of which the classifier's may have one for each of its 2,064,384 numbers
_DAMAGE = (ValueError, TypeError, KeyError, struct.error)  # raised by the functions below for a damaged file


class Graph:
    """The nodes of a graph file, whose bytes are `data` if they were read already.

    Raises InputError, naming the file, if it is damaged, has more than `MOST_NODES`, or lacks a requested node.
    """

    def __init__(self, path: str | Path, data: bytes | None = None):
        self.path = Path(path)
        try:
            fields = _listed(memoryview(self.path.read_bytes() if data is None else data), MOST_NODES)
            self._nodes = dict(_parse_node(value) for field, value in fields if field == 1)
        except _DAMAGE as error:
            raise InputError(f"{path}: not a TensorFlow graph, or it is damaged or cut short") from error

    def constant(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the value of a float32 Const node, which must have the given shape."""
        attributes = self._attributes(name)
        try:
            # TensorProto: 1 dtype, 2 shape (2 dim (1 size)), 4 raw content, 5 float_val. AttrValue: 8 tensor.
            fields = _listed(dict(_listed(attributes["value"]))[8], MOST_NUMBERS)
            tensor = dict(fields)
            found = tuple(dict(_listed(dim)).get(1, 0) for field, dim in _listed(tensor[2]) if field == 2)
            content = tensor.get(4) or b"".join(value for field, value in fields if field == 5)
            numbers = np.frombuffer(content, "<f4")
        except _DAMAGE as error:
            raise InputError(f"{self.path}: the node {name!r} holds no readable constant") from error
        if tensor.get(1) != _DT_FLOAT or found != shape:
            kind = tensor.get(1)
            raise InputError(f"{self.path}: {name!r} has type {kind} and shape {found}, expected float {shape}")
        if len(numbers) not in (1, math.prod(shape)):
            raise InputError(f"{self.path}: {name!r} holds {len(numbers)} numbers, expected {math.prod(shape)}")
        return torch.from_numpy(np.full(shape, numbers if len(numbers) == 1 else numbers.reshape(shape)))

    def switch(self, name: str, attribute: str) -> bool:
        """Return a boolean attribute of a node; an attribute that is absent is false."""
        attributes = self._attributes(name)
        try:
            return bool(dict(_listed(attributes.get(attribute, b""))).get(5, 0))  # AttrValue: 5 b
        except _DAMAGE as error:
            raise InputError(f"{self.path}: {attribute} of the node {name!r} is damaged") from error

    def _attributes(self, name: str) -> dict[str, memoryview]:
        if name not in self._nodes:
            raise InputError(f"{self.path}: the graph has no node {name!r}")
        return self._nodes[name]


def _parse_node(message: memoryview) -> tuple[str, dict[str, memoryview]]:
    """Return name and attributes of a NodeDef: 1 name, 5 attr (a map entry: 1 key, 2 value)."""
    fields = _listed(message)
    entries = [dict(_listed(value)) for field, value in fields if field == 5]
    return str(dict(fields).get(1, b""), "utf-8"), {str(entry[1], "utf-8"): entry.get(2, b"") for entry in entries}


def _fields(message: memoryview | bytes) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a protobuf message. Raises one of _DAMAGE if it ends early or is not a message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if wire_type == _BYTES else (_FIXED_SIZES[wire_type], at)
            if at + size > len(message):
                raise ValueError("it ends early")
            value = message[at : at + size]
            at += size
        yield key >> 3, value


def _listed(message: memoryview | bytes, most: int = MOST_FIELDS) -> list[tuple[int, int | memoryview]]:
    """Return the fields of a message. Raises ValueError if there are more than `most`."""
    fields = list(itertools.islice(_fields(message), most + 1))
    if len(fields) > most:
        raise ValueError("too many fields")
    return fields


def _varint(message: memoryview | bytes, at: int) -> tuple[int, int]:
    """Return an integer stored as 7 bits per byte, lowest bits first, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        if at == len(message):
            raise ValueError("it ends early")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("an integer of more than 64 bits")
