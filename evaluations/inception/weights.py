"""The weight files of the Inception network of 2015-12-05: found or downloaded, checked, read.

Two files hold the same weights: TensorFlow's `classify_image_graph_def.pb`, read here with a small decoder of our own
for the few protobuf messages needed, and its PyTorch port `pt_inception-2015-12-05`.
"""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.io import InputError, atomic_write, sha256_of
from evaluations.inception.graph import HEAD, NUM_CLASSES, NUM_FEATURES, TRUNK, Conv, check_structure, convolutions
from evaluations.inception.graphdef import Graph

GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
GRAPH_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
GRAPH_BYTES = 95_673_916
PUBLISHED_NAME = "inception-2015-12-05"
PORT_SHA256_START = "6726825d"  # of the PyTorch port: the part of its hash that its published name carries


class ConvWeights(NamedTuple):
    """One convolution (out, in, height, width) and its batch norm (out,), float32."""

    kernel: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


@dataclass(frozen=True)
class InceptionWeights:
    """Weights by name in the PyTorch port, the classifier's matrix (1008, 2048) without bias, and their file."""

    convs: dict[str, ConvWeights]
    classifier: torch.Tensor
    path: str
    sha256: str  # of the file
    published: bool  # the file is one of the two published ones

    @property
    def name(self) -> str:
        """Return what to call the network: scores compare only between networks of the same name."""
        return PUBLISHED_NAME if self.published else f"inception-{self._digest()}"

    def _digest(self) -> str:
        digest = hashlib.sha256()  # of the numbers, so that both kinds of file give the same
        for port_name in sorted(self.convs):
            for tensor in self.convs[port_name]:
                digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(self.classifier.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def default_path() -> Path:
    """Return where the graph is looked for and downloaded to: the folder of torch's own downloads (TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / GRAPH_NAME


def fetch_graph(path: Path | None = None, url: str = GRAPH_URL, sha256: str = GRAPH_SHA256) -> Path:
    """Return the path of the published graph, downloading it if it is not there yet.

    The file appears whole or not at all, and only with the right hash. Raises InputError, saying where to get it and
    where to put it, when that fails.
    """
    path = path or default_path()
    if path.exists():
        if (found := sha256_of(path)) != sha256:
            raise InputError(f"{path}: damaged, its sha256 is {found}, not {sha256}; delete it to download it anew")
        return path
    advice = f"download {url} elsewhere and put it at {path}, or give its place with --inception"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, atomic_write(path) as file:
            digest = hashlib.sha256()
            total = int(response.headers.get("Content-Length") or GRAPH_BYTES)
            with tqdm(desc=f"downloading {path.name}", total=total, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise InputError(
                    f"{url}: the download's sha256 is {digest.hexdigest()}, not {sha256}; nothing was kept. {advice}"
                )
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(f"{url}: cannot be downloaded ({error}); {advice}") from error
    return path


def load_weights(path: str | Path) -> InceptionWeights:
    """Return the weights of a graph (`.pb`) or of the PyTorch port (any other name).

    Raises InputError, naming the file, if it is missing, damaged, of another structure, or holds non-finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {GRAPH_NAME} or the PyTorch port pt_inception-2015-12-05")
    sha256 = sha256_of(path)
    if path.suffix == ".pb":
        published = sha256 == GRAPH_SHA256
        convs, classifier = _read_graph(path, trusted=published)
    else:
        published = sha256.startswith(PORT_SHA256_START)
        convs, classifier = _read_port(path)
    for conv in convolutions(TRUNK + HEAD):
        _check_conv(path, conv, convs[conv.port])
    _check_tensor(path, "the classifier's matrix", classifier, (NUM_CLASSES, NUM_FEATURES))
    return InceptionWeights(convs, classifier, str(path), sha256, published)


def _check_conv(path: Path, conv: Conv, weights: ConvWeights) -> None:
    name, shape = f"{conv.scope} ({conv.port})", (conv.out_channels, conv.in_channels, *conv.kernel)
    _check_tensor(path, name, weights.kernel, shape)
    for part, tensor in zip(weights._fields[1:], weights[1:], strict=True):
        _check_tensor(path, f"batch norm {part} of {name}", tensor, (conv.out_channels,))


def _check_tensor(path: Path, what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{path}: {what} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.isfinite().all():
        raise InputError(f"{path}: {what} has values that are not finite")


# ------------------------------------------------------------------------------------------------ the PyTorch port


def _read_port(path: Path) -> tuple[dict[str, ConvWeights], torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler fail in ways without number
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a PyTorch file of weights ({reason})") from error
    norm_parts = ("weight", "bias", "running_mean", "running_var")  # gamma, beta, mean, variance
    try:
        convs = {
            conv.port: ConvWeights(
                state[f"{conv.port}.conv.weight"].float(),
                *(state[f"{conv.port}.bn.{part}"].float() for part in norm_parts),
            )
            for conv in convolutions(TRUNK + HEAD)
        }
        return convs, state["fc.weight"].float()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not the port of the Inception network of 2015-12-05 (no tensor {error})") from error


# ------------------------------------------------------------------------------------------------ the TensorFlow graph


def _read_graph(path: Path, trusted: bool) -> tuple[dict[str, ConvWeights], torch.Tensor]:
    graph = Graph(path)
    if not trusted:  # the hash vouches for the published file; any other graph has to prove its structure
        check_structure(graph)
    convs = {}
    for conv in convolutions(TRUNK + HEAD):
        norm = f"{conv.scope}/batchnorm"
        beta, gamma, mean, variance = (
            graph.constant(f"{norm}/{part}") for part in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        if not graph.node(norm).attributes.get("scale_after_normalization", 0):
            gamma = torch.ones_like(gamma)  # the operation ignores it then
        kernel = graph.constant(f"{conv.scope}/conv2d_params")  # height, width, in, out
        if kernel.ndim != 4:
            raise InputError(f"{path}: {conv.scope}/conv2d_params has {kernel.ndim} dimensions, expected 4")
        convs[conv.port] = ConvWeights(kernel.permute(3, 2, 0, 1), gamma, beta, mean, variance)
    return convs, graph.constant("softmax/weights").t()
