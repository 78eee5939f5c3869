"""A reader of TensorFlow graph files (GraphDef protobuf messages): nodes and constants, no TensorFlow and no protobuf.

Only the fields that a frozen inference graph of 2015 uses are decoded; see tensorflow/core/framework/graph.proto,
node_def.proto, attr_value.proto, tensor.proto and https://protobuf.dev/programming-guides/encoding for the numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.io import InputError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_PASS_THROUGH = ("Identity", "CheckNumerics")  # operations that hand their input on unchanged
_TENSOR_TYPES = {1: np.dtype("<f4"), 3: np.dtype("<i4")}  # DataType: DT_FLOAT, DT_INT32


@dataclass(frozen=True)
class Node:
    """A NodeDef: operation, names of inputs, attributes as int, float, bytes, list of int, or a tensor's message."""

    op: str
    inputs: list[str]
    attributes: dict[str, Any]


class Graph:
    """A graph file. Raises InputError, naming the file, if it is damaged or lacks what is asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._nodes: dict[str, Node] = {}
        try:
            for field, value in _fields(memoryview(self.path.read_bytes())):
                if field == 1:
                    name, node = _parse_node(value)
                    self._nodes[name] = node
        except (ValueError, TypeError, struct.error) as error:
            raise InputError(f"{path}: not a TensorFlow graph, or damaged ({error})") from error

    def node(self, name: str) -> Node:
        """Return the node of that name."""
        if name not in self._nodes:
            raise InputError(f"{self.path}: the graph has no node {name!r}")
        return self._nodes[name]

    def constant(self, name: str) -> torch.Tensor:
        """Return the value of a Const node, float32 or int32."""
        node = self.node(name)
        if node.op != "Const":
            raise InputError(f"{self.path}: node {name!r} is a {node.op}, expected a Const")
        try:
            return torch.from_numpy(_parse_tensor(node.attributes["value"]))
        except (ValueError, TypeError, KeyError, struct.error) as error:
            raise InputError(f"{self.path}: the constant {name!r} cannot be read ({error})") from error

    def data_inputs(self, name: str) -> list[str]:
        """Return the nodes whose results a node works on, seen through operations that hand their input on."""
        return [self._origin(name) for name in self.node(name).inputs if not name.startswith("^")]

    def _origin(self, name: str) -> str:
        for _ in range(len(self._nodes)):
            name = name.removesuffix(":0")
            node = self.node(name)
            if node.op not in _PASS_THROUGH or not node.inputs:
                return name
            name = node.inputs[0]
        raise InputError(f"{self.path}: the graph runs in a circle at node {name!r}")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a protobuf message; ValueError if it is cut short or no such message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, at = _varint(message, at)
        else:
            if wire_type == _BYTES:
                size, at = _varint(message, at)
            elif wire_type in (_FIXED32, _FIXED64):
                size = 4 if wire_type == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire_type}")
            if at + size > len(message):
                raise ValueError("it ends early")
            value = message[at : at + size]
            at += size
        yield key >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, lowest first, and the position behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if at == len(message):
            raise ValueError("it ends early")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _parse_node(message: memoryview) -> tuple[str, Node]:
    """NodeDef: 1 name, 2 op, 3 input, 5 attr (a map entry: 1 key, 2 value)."""
    name, node = "", Node("", [], {})
    for field, value in _fields(message):
        if field == 1:
            name = _text(value)
        elif field == 2:
            node = Node(_text(value), node.inputs, node.attributes)
        elif field == 3:
            node.inputs.append(_text(value))
        elif field == 5:
            entry = dict(_fields(value))
            node.attributes[_text(entry[1])] = _parse_attribute(entry.get(2, memoryview(b"")))
    return name, node


def _parse_attribute(message: memoryview) -> Any:
    """AttrValue: 1 list (3 i), 2 s, 3 i, 4 f, 5 b, 6 type, 8 tensor. An empty message is a zero."""
    for field, value in _fields(message):
        if field == 1:
            return [number for key, item in _fields(value) if key == 3 for number in _integers(item)]
        if field == 2:
            return bytes(value)
        if field == 4:
            return struct.unpack("<f", value)[0]
        return value
    return 0


def _parse_tensor(message: memoryview) -> np.ndarray:
    """TensorProto: 1 dtype, 2 shape (2 dim (1 size)), 4 raw content, 5 float_val, 7 int_val. One value fills it all."""
    dtype, shape, content, numbers = 0, [], b"", []
    for field, value in _fields(message):
        if field == 1:
            dtype = value
        elif field == 2:
            shape = [dict(_fields(dim)).get(1, 0) for key, dim in _fields(value) if key == 2]
        elif field == 4:
            content = value
        elif field == 5:
            numbers.extend(np.frombuffer(value, "<f4"))
        elif field == 7:
            numbers.extend(_integers(value))
    if dtype not in _TENSOR_TYPES:
        raise ValueError(f"data type {dtype}; allowed are float32 and int32")
    flat = np.frombuffer(content, _TENSOR_TYPES[dtype]) if len(content) else np.array(numbers, _TENSOR_TYPES[dtype])
    if len(flat) == 1:
        return np.full(shape, flat[0])
    return flat.reshape(shape).copy()


def _integers(value: int | memoryview) -> list[int]:
    """Return one number, or the packed numbers of a repeated field."""
    if isinstance(value, int):
        return [value]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def _text(value: int | memoryview) -> str:
    return bytes(value).decode() if isinstance(value, memoryview) else ""
