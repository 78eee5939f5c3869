"""The Inception network of 2015-12-05, as data: every layer with its name in both published weight files.

This is the graph `classify_image_graph_def.pb` in which the ADM evaluation (arXiv 2105.05233) computes its numbers:
Inception-v3 (arXiv 1512.00567) with 1008 outputs, average pools that leave the padding out of the count, and a MAX pool
in the pool branch of its last block. The network, the names of its weights and the check of a graph file all read this
one table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from common.io import InputError
from evaluations.inception.graphdef import Graph

INPUT_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008  # 1000 of ImageNet and 8 unused ones
BATCH_NORM_EPSILON = 0.001


class Conv(NamedTuple):
    """Convolution without bias, batch norm, ReLU."""

    scope: str  # name in the TensorFlow graph; its ReLU carries the bare name
    port: str  # name in the PyTorch port
    kernel: tuple[int, int]  # height, width
    in_channels: int
    out_channels: int
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """A pool of 3 x 3; `op` is AvgPool or MaxPool."""

    scope: str
    op: str
    stride: int = 1
    padding: str = "SAME"


class Join(NamedTuple):
    """Branches on the same input, concatenated on channels. Without a scope the enclosing join does it."""

    scope: str
    branches: tuple[Chain, ...]


Layer = Conv | Pool | Join
Chain = tuple[Layer, ...]


def convolutions(chain: Chain) -> Iterator[Conv]:
    """Yield every convolution of a chain, in the order of the graph."""
    for layer in chain:
        if isinstance(layer, Conv):
            yield layer
        elif isinstance(layer, Join):
            for branch in layer.branches:
                yield from convolutions(branch)


def _tower(scope: str, port: str, in_channels: int, *specs: tuple) -> Chain:
    """Convolutions in a row: conv, conv_1, ... in the graph, _1, _2, ... in the port. Spec: kernel, width, [halve]."""
    layers = []
    for index, (kernel, width, *halve) in enumerate(specs):
        name = f"{scope}/conv_{index}" if index else f"{scope}/conv"
        layers.append(Conv(name, f"{port}_{index + 1}", kernel, in_channels, width, *(_HALVE if halve else ())))
        in_channels = width
    return tuple(layers)


def _pooled(block: str, port: str, op: str, in_channels: int, width: int) -> Chain:
    conv = Conv(f"{block}/tower_2/conv", f"{port}.branch_pool", (1, 1), in_channels, width)
    return Pool(f"{block}/tower_2/pool", op), conv


def _block_5(block: str, port: str, width: int, pool_width: int) -> Join:
    """35 x 35."""
    return Join(
        block,
        (
            (Conv(f"{block}/conv", f"{port}.branch1x1", (1, 1), width, 64),),
            _tower(f"{block}/tower", f"{port}.branch5x5", width, ((1, 1), 48), ((5, 5), 64)),
            _tower(f"{block}/tower_1", f"{port}.branch3x3dbl", width, ((1, 1), 64), ((3, 3), 96), ((3, 3), 96)),
            _pooled(block, port, "AvgPool", width, pool_width),
        ),
    )


def _block_6(block: str, port: str, mid: int) -> Join:
    """17 x 17, with convolutions of 7 x 7 taken apart into 1 x 7 and 7 x 1."""
    point, wide, tall = ((1, 1), mid), ((1, 7), mid), ((7, 1), mid)
    wide_out, tall_out = ((1, 7), 192), ((7, 1), 192)
    return Join(
        block,
        (
            (Conv(f"{block}/conv", f"{port}.branch1x1", (1, 1), 768, 192),),
            _tower(f"{block}/tower", f"{port}.branch7x7", 768, point, wide, tall_out),
            _tower(f"{block}/tower_1", f"{port}.branch7x7dbl", 768, point, tall, wide, tall, wide_out),
            _pooled(block, port, "AvgPool", 768, 192),
        ),
    )


def _block_7(block: str, port: str, width: int, op: str) -> Join:
    """8 x 8, whose towers end in a fork of 1 x 3 and 3 x 1."""

    def fork(tower: str, name: str) -> Join:
        scope = f"{block}/{tower}/mixed"
        wide = Conv(f"{scope}/conv", f"{port}.{name}a", (1, 3), 384, 384)
        tall = Conv(f"{scope}/conv_1", f"{port}.{name}b", (3, 1), 384, 384)
        return Join("", ((wide,), (tall,)))

    return Join(
        block,
        (
            (Conv(f"{block}/conv", f"{port}.branch1x1", (1, 1), width, 320),),
            (*_tower(f"{block}/tower", f"{port}.branch3x3", width, ((1, 1), 384)), fork("tower", "branch3x3_2")),
            (
                *_tower(f"{block}/tower_1", f"{port}.branch3x3dbl", width, ((1, 1), 448), ((3, 3), 384)),
                fork("tower_1", "branch3x3dbl_3"),
            ),
            _pooled(block, port, op, width, 192),
        ),
    )


_HALVE = (2, "VALID")

# Ends with the block whose first 192 channels are the 1 x 1 branch: ADM's spatial features are the first 7 of them.
TRUNK: Chain = (
    Conv("conv", "Conv2d_1a_3x3", (3, 3), 3, 32, *_HALVE),
    Conv("conv_1", "Conv2d_2a_3x3", (3, 3), 32, 32, 1, "VALID"),
    Conv("conv_2", "Conv2d_2b_3x3", (3, 3), 32, 64),
    Pool("pool", "MaxPool", *_HALVE),
    Conv("conv_3", "Conv2d_3b_1x1", (1, 1), 64, 80, 1, "VALID"),
    Conv("conv_4", "Conv2d_4a_3x3", (3, 3), 80, 192, 1, "VALID"),
    Pool("pool_1", "MaxPool", *_HALVE),
    _block_5("mixed", "Mixed_5b", 192, 32),
    _block_5("mixed_1", "Mixed_5c", 256, 64),
    _block_5("mixed_2", "Mixed_5d", 288, 64),
    Join(
        "mixed_3",
        (
            (Conv("mixed_3/conv", "Mixed_6a.branch3x3", (3, 3), 288, 384, *_HALVE),),
            _tower("mixed_3/tower", "Mixed_6a.branch3x3dbl", 288, ((1, 1), 64), ((3, 3), 96), ((3, 3), 96, "halve")),
            (Pool("mixed_3/pool", "MaxPool", *_HALVE),),
        ),
    ),
    _block_6("mixed_4", "Mixed_6b", 128),
    _block_6("mixed_5", "Mixed_6c", 160),
    _block_6("mixed_6", "Mixed_6d", 160),
)
HEAD: Chain = (
    _block_6("mixed_7", "Mixed_6e", 192),
    Join(
        "mixed_8",
        (
            _tower("mixed_8/tower", "Mixed_7a.branch3x3", 768, ((1, 1), 192), ((3, 3), 320, "halve")),
            _tower(
                "mixed_8/tower_1",
                "Mixed_7a.branch7x7x3",
                768,
                ((1, 1), 192),
                ((1, 7), 192),
                ((7, 1), 192),
                ((3, 3), 192, "halve"),
            ),
            (Pool("mixed_8/pool", "MaxPool", *_HALVE),),
        ),
    ),
    _block_7("mixed_9", "Mixed_7b", 1280, "AvgPool"),
    _block_7("mixed_10", "Mixed_7c", 2048, "MaxPool"),
)


def check_structure(graph: Graph) -> None:
    """Raise InputError, naming the node, unless the graph computes what the table says, from pixels to `pool_3`."""
    _Checker(graph).check()


class _Checker:
    """Compares a graph file with the table, node by node."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def check(self) -> None:
        self._check_node("ResizeBilinear", "ResizeBilinear", align_corners=0, half_pixel_centers=0)
        self._check_constant("ResizeBilinear", 1, [INPUT_SIZE, INPUT_SIZE])
        for name, source, number in (("Sub", "ResizeBilinear", 128.0), ("Mul", "Sub", 1 / 128)):
            self._check_node(name, name)
            self._require(name, "first input", self.graph.data_inputs(name)[:1], [source])
            self._check_constant(name, 1, number)
        sources = self._check_chain(TRUNK + HEAD, ["Mul"])
        self._check_node("pool_3", "AvgPool", sources, ksize=[1, 8, 8, 1], padding=b"VALID")

    def _check_chain(self, chain: Chain, sources: list[str]) -> list[str]:
        """Check a chain whose input is the concatenation of the nodes `sources`; return the nodes of its output."""
        for layer in chain:
            if isinstance(layer, Join):
                sources = self._check_join(layer, sources)
                continue
            if isinstance(layer, Conv):
                self._check_conv(layer, sources)
            else:
                sampling = {"strides": [1, layer.stride, layer.stride, 1], "padding": layer.padding.encode()}
                self._check_node(layer.scope, layer.op, sources, ksize=[1, 3, 3, 1], **sampling)
            sources = [layer.scope]
        return sources

    def _check_join(self, join: Join, sources: list[str]) -> list[str]:
        joined = [name for branch in join.branches for name in self._check_chain(branch, sources)]
        if not join.scope:
            return joined
        name = f"{join.scope}/join"
        self._check_node(name, "Concat")
        self._check_constant(name, 0, 3)  # the axis of channels
        self._require(name, "inputs", self.graph.data_inputs(name)[1:], joined)
        return [name]

    def _check_conv(self, conv: Conv, sources: list[str]) -> None:
        convolution, norm = f"{conv.scope}/Conv2D", f"{conv.scope}/batchnorm"
        inputs = [*sources, f"{conv.scope}/conv2d_params"]
        sampling = {"strides": [1, conv.stride, conv.stride, 1], "padding": conv.padding.encode()}
        self._check_node(convolution, "Conv2D", inputs, **sampling)
        parts = [f"{norm}/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma")]
        self._check_node(norm, "BatchNormWithGlobalNormalization", [convolution, *parts])
        epsilon = self.graph.node(norm).attributes.get("variance_epsilon", 0.0)
        self._require(norm, "variance_epsilon", round(epsilon, 9), BATCH_NORM_EPSILON)
        self._check_node(conv.scope, "Relu", [norm])

    def _check_node(self, name: str, op: str, inputs: list[str] | None = None, **attributes: Any) -> None:
        node = self.graph.node(name)
        self._require(name, "operation", node.op, op)
        if inputs is not None:
            self._require(name, "inputs", self.graph.data_inputs(name), inputs)
        for key, value in attributes.items():
            self._require(name, key, node.attributes.get(key, 0), value)  # a flag that is off may be left out

    def _check_constant(self, name: str, position: int, expected: float | list[int]) -> None:
        inputs = self.graph.data_inputs(name)
        found = self.graph.constant(inputs[position]).tolist() if len(inputs) > position else None
        self._require(name, f"input {position}", found, expected)

    def _require(self, name: str, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            message = f"node {name!r}: {what} {found}, expected {expected}: not the Inception graph of 2015-12-05"
            raise InputError(f"{self.graph.path}: {message}")
