"""The weight files of the Inception network of 2015-12-05: download, check and read them.

Two published files hold the same weights: TensorFlow's `classify_image_graph_def.pb` and its PyTorch port
`pt_inception-2015-12-05`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import WRITE_ERRORS, InputError
from common.io import read_file, sha256_of
from common.temporary import clear_leftovers
from evaluations.inception.graphdef import Graph
from evaluations.inception.layers import NUM_CLASSES, NUM_FEATURES, convolutions, inception_layers
from models.checksums import digest_of
from models.tensor_checks import check_finite, check_weights
from models.weights_file import read_weights_file

GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
GRAPH_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
PUBLISHED_NAME = "inception-2015-12-05"
PORT_NAME = "pt_inception-2015-12-05"
PORT_SHA256_START = "6726825d"  # of the PyTorch port: the part of its hash that is in its published file name

# Tensors of a batch norm in the PyTorch port, and in the graph.
BATCH_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}

# Convolutions in the graph, in the order of torchvision's modules: five, and then those of the blocks.
_BLOCK_A = "conv tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_2/conv"
_BLOCK_B = "conv tower/conv tower/conv_1 tower/conv_2"
_BLOCK_C = (
    "conv tower/conv tower/conv_1 tower/conv_2 "
    "tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_1/conv_3 tower_1/conv_4 tower_2/conv"
)
_BLOCK_D = "tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_1/conv_3"
_BLOCK_E = (
    "conv tower/conv tower/mixed/conv tower/mixed/conv_1 "
    "tower_1/conv tower_1/conv_1 tower_1/mixed/conv tower_1/mixed/conv_1 tower_2/conv"
)
_BLOCKS = [*[_BLOCK_A] * 3, _BLOCK_B, *[_BLOCK_C] * 4, _BLOCK_D, *[_BLOCK_E] * 2]
GRAPH_CONVOLUTIONS = ["conv", "conv_1", "conv_2", "conv_3", "conv_4"] + [
    f"mixed_{number}/{name}" if number else f"mixed/{name}"
    for number, names in enumerate(_BLOCKS)
    for name in names.split()
]


@dataclass(frozen=True)
class InceptionWeights:
    """Tensors, float32, named as in the PyTorch port; the classifier is without bias."""

    tensors: dict[str, torch.Tensor]
    path: str
    sha256: str  # of the file
    published: bool  # the file is one of the two published ones

    @property
    def name(self) -> str:
        """Return the network's name. Scores are comparable only between networks of the same name."""
        if self.published:
            return PUBLISHED_NAME
        parts = ["conv.weight", *(f"bn.{part}" for part in BATCH_NORM)]
        convs = sorted(name.removesuffix(".conv.weight") for name in self.tensors if name.endswith(".conv.weight"))
        digest = hashlib.sha256()  # of the numbers, so that both kinds of file give the same name
        for name in [*(f"{conv}.{part}" for conv in convs for part in parts), "fc.weight"]:
            digest.update(self.tensors[name].contiguous().numpy().tobytes())
        return f"inception-{digest.hexdigest()[:16]}"


def fetch_graph(path: Path | None = None, url: str = GRAPH_URL, sha256: str = GRAPH_SHA256) -> Path:
    """Return the path of the published graph, which is downloaded if it is missing.

    A file appears only when it is complete and has the expected hash. Raises InputError, which says where to download
    the file from and where to put it, if that fails.
    """
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / GRAPH_NAME  # where torch stores downloads (TORCH_HOME)
    if path.exists():
        if (found := sha256_of(path)) != sha256:
            raise InputError(f"{path}: damaged, its sha256 is {found}, not {sha256}; delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            raise
        reason = "it cannot be reached" if isinstance(error, OSError) else f"its SHA-256 is not {sha256}"
        advice = f"download the file on another machine and put it at {path}, or give its path with --inception"
        raise InputError(f"{url}: not downloaded, {reason}; {advice}") from error
    return path


def load_weights(path: str | Path) -> InceptionWeights:
    """Return the weights in a graph (`.pb`) or in the PyTorch port (any other name).

    Raises InputError, naming the file, if it is missing or damaged, if a tensor is missing or has another shape, or if
    a value is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {GRAPH_NAME} or the PyTorch port pt_inception-2015-12-05")
    is_graph = path.suffix == ".pb"
    layers, tensors = inception_layers(), {}
    shapes = {name: tuple(like.shape) for name, like in layers.state_dict().items() if like.ndim}
    shapes["fc.weight"] = (NUM_CLASSES, NUM_FEATURES)
    if is_graph:
        sha256, state = _read_graph(path, convolutions(layers), shapes)
    else:
        sha256, state = _read_port(path)
    for name, shape in shapes.items():
        tensor = state.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path}: not the port of the Inception network of 2015-12-05: no tensor {name}")
        if tuple(tensor.shape) != shape:
            raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        check_weights({name: tensor}, path)
        tensors[name] = tensor.float()
        if name.endswith("running_var") and (tensors[name] < 0).any():
            raise InputError(f"{path}: {name} has negative numbers; a variance is not negative")
    check_finite(tensors, path)
    published = sha256 == GRAPH_SHA256 if is_graph else sha256.startswith(PORT_SHA256_START)
    return InceptionWeights(tensors, str(path), sha256, published)


def _read_graph(
    path: Path, names: list[str], shapes: dict[str, tuple[int, ...]]
) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the SHA-256 of a TensorFlow graph, and its tensors with names and layout of the PyTorch port."""
    try:
        data = read_file(path)
    except InputError as error:
        raise InputError(f"{path}: {error}; expected {GRAPH_NAME}") from error
    graph, tensors = Graph(path, data), {}
    for name, scope in zip(names, GRAPH_CONVOLUTIONS, strict=True):
        width, channels, *kernel = shapes[f"{name}.conv.weight"]
        weight = graph.constant(f"{scope}/conv2d_params", (*kernel, channels, width))
        tensors[f"{name}.conv.weight"] = weight.permute(3, 2, 0, 1)
        for part, node in BATCH_NORM.items():
            tensors[f"{name}.bn.{part}"] = graph.constant(f"{scope}/batchnorm/{node}", (width,))
        if not graph.switch(f"{scope}/batchnorm", "scale_after_normalization"):
            tensors[f"{name}.bn.weight"] = torch.ones(width)  # the operation ignores gamma then
    tensors["fc.weight"] = graph.constant("softmax/weights", (NUM_FEATURES, NUM_CLASSES)).t()
    return hashlib.sha256(data).hexdigest(), tensors


def _read_port(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the SHA-256 of the PyTorch port, and its tensors."""
    with open(path, "rb") as file:
        digest = digest_of(file)
        try:
            state = read_weights_file(path, file)
        except InputError as error:
            raise InputError(f"{error}. Expected a dict of tensors, the PyTorch port {PORT_NAME}") from error
    return digest, state if isinstance(state, dict) else {}
