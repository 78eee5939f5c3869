"""The Inception network against features that TensorFlow computed on the stand-in weights, and its weight files."""

import functools
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from evaluations.inception import graphdef
from evaluations.inception.graphdef import Graph
from evaluations.inception.network import Inception, full_precision, load_inception, resize_bilinear_tf1
from evaluations.inception.weights import fetch_graph, load_weights
from tests import adm_images, adm_standin
from tests.conftest import DEVICES

FIRST_TWO = {  # sha256 of the first two images of a set, to which the recorded features belong
    "ref256_300": "6604511ded10f9f73826dd0759e258e314687543ff57a337ec96404f94ce1e88",
    "sample64_200": "38fc78b149c6a7c5e296e4d48e402245b48b25e6bcf020e33848ea42648c3caf",
}


# Largest relative error of the features. On a GPU cuDNN may compute a convolution by Winograd's algorithm, whose
# rounding errors in float32 are some ten times larger.
LARGEST_ERROR = {"cpu": 3e-5, "cuda": 3e-4}


@functools.cache
def network_on(device: str) -> Inception:
    return load_inception(adm_standin.graph_file(), device)


@pytest.fixture
def network() -> Inception:
    return network_on("cpu")


def first_two(name: str) -> torch.Tensor:
    _, *recipe = adm_images.SETS[name]
    images = adm_images.images(2, *recipe)
    if adm_images.digest(images) != FIRST_TWO[name]:
        pytest.skip("this version of Pillow draws other images; the recorded features are not theirs")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def random_images(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def relative_error(found: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    expected = torch.as_tensor(expected)
    return float((found.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FIRST_TWO)
def test_features_equal_tensorflow(name: str, device: str) -> None:
    output, recorded = network_on(device)(first_two(name).to(device)), np.load(adm_standin.DATA)
    assert output.pool.device.type == device
    assert relative_error(output.pool, recorded[f"{name}_pool3"]) < LARGEST_ERROR[device]
    assert relative_error(output.spatial, recorded[f"{name}_spatial"]) < LARGEST_ERROR[device]


def test_output_is_float32_without_gradients_and_does_not_depend_on_the_batch(network: Inception) -> None:
    images = random_images(3, 40)
    together, alone = network(images), network(images[1:2])
    assert [tuple(part.shape) for part in together] == [(3, 2048), (3, 2023), (3, 1008)]
    for part, single in zip(together, alone, strict=True):
        assert part.dtype == torch.float32 and not part.requires_grad
        assert relative_error(part[1:2], single) < 1e-5


def test_logits_are_without_bias(network: Inception) -> None:
    output, weights = network(random_images(2, 40)), adm_standin.weights()
    expected = output.pool.double() @ torch.from_numpy(weights["softmax/weights"]).double()
    # Rounding of float32 sums of 2048 terms is about 2e-5; the bias, which must not be added, is about 0.1.
    torch.testing.assert_close(output.logits.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_training_precision_does_not_reach_the_features(device: str) -> None:
    network, images = network_on(device), random_images(1, 40).to(device)
    before = network(images).pool
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(network(images).pool, before)
        with full_precision(torch.device(device)):
            assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_resize_has_no_half_pixel_and_no_aligned_corners() -> None:
    row = torch.tensor([0, 100], dtype=torch.uint8).view(1, 1, 1, 2)
    assert resize_bilinear_tf1(row.expand(1, 1, 2, 2), 4)[0, 0, 0].tolist() == [0, 50, 100, 100]
    assert resize_bilinear_tf1(row.view(1, 1, 2, 1).expand(1, 1, 2, 2), 4)[0, 0, :, 0].tolist() == [0, 50, 100, 100]
    image = random_images(1, 299)
    assert torch.equal(resize_bilinear_tf1(image, 299), image.float())
    assert resize_bilinear_tf1(torch.arange(8).view(1, 1, 1, 8).expand(1, 1, 8, 8), 4)[0, 0, 0].tolist() == [0, 2, 4, 6]


# ------------------------------------------------------------------------------------------------ weight files


def write_port(path: Path, **changes: torch.Tensor | None) -> Path:
    """Write the stand-in as the PyTorch port stores it; a change of None drops a tensor."""
    state = {}
    for scope, port in adm_standin.Graph().torch_names.items():
        values = {key: torch.from_numpy(value) for key, value in part_of(scope).items()}
        state[f"{port}.conv.weight"] = values["conv2d_params"].permute(3, 2, 0, 1).contiguous()
        state[f"{port}.bn.weight"], state[f"{port}.bn.bias"] = values["gamma"], values["beta"]
        state[f"{port}.bn.running_mean"] = values["moving_mean"]
        state[f"{port}.bn.running_var"] = values["moving_variance"]
        state[f"{port}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.from_numpy(adm_standin.weights()["softmax/weights"]).t().contiguous()
    state["fc.bias"] = torch.zeros(1008)
    for name, value in changes.items():
        del state[name]
        if value is not None:
            state[name] = value
    torch.save(state, path)
    return path


def part_of(scope: str) -> dict[str, np.ndarray]:
    names = [f"{scope}/conv2d_params"]
    names += [f"{scope}/batchnorm/{part}" for part in ("gamma", "beta", "moving_mean", "moving_variance")]
    return {name.rsplit("/", 1)[1]: adm_standin.weights()[name] for name in names}


def test_graph_and_port_are_the_same_network(network: Inception, tmp_path: Path) -> None:
    port = load_inception(write_port(tmp_path / "port.pth"))
    assert port.name == network.name and not port.published
    images = random_images(1, 40)
    assert torch.equal(port(images).pool, network(images).pool)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Mixed_6d.branch1x1.conv.weight", None, "Mixed_6d.branch1x1.conv.weight"),
        ("fc.weight", torch.zeros(1000, 2048), r"\(1000, 2048\), expected \(1008, 2048\)"),
        ("Conv2d_1a_3x3.conv.weight", torch.zeros(32, 3, 5, 5), r"expected \(32, 3, 3, 3\)"),
        ("Mixed_5b.branch1x1.bn.running_var", torch.full((64,), torch.nan), "not finite"),
        ("Mixed_5b.branch1x1.bn.running_var", torch.full((64,), -1.0), "a variance is not negative"),
        ("Mixed_5b.branch1x1.bn.weight", torch.ones(64, dtype=torch.int8), "dtype int8; allowed for weights: float32"),
    ],
)
def test_other_ports_are_refused(tmp_path: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_weights(write_port(tmp_path / "port.pth", **{name: value}))


@pytest.mark.parametrize("name", ["weights.pb", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"text, no weights\n", bytes(range(256)) * 8])
def test_garbage_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_weights(tmp_path / name)


def test_pickled_code_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": Path("anything but a tensor")}, tmp_path / "code.pth")
    for name in ("code.pth", "missing.pb"):
        with pytest.raises(InputError, match=name):
            load_weights(tmp_path / name)


def test_truncated_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pb"
    path.write_bytes(adm_standin.graph_file().read_bytes()[:50_000_000])
    with pytest.raises(InputError, match=r"cut\.pb: not a TensorFlow graph, or it is damaged or cut short"):
        load_weights(path)


def test_graph_without_a_node_or_its_weights_is_refused(tmp_path: Path) -> None:
    nodes = [node for node in adm_standin.Graph().nodes if node[0] != "mixed_7/tower/conv/batchnorm"]
    adm_standin.write_pb(tmp_path / "short.pb", nodes)
    with pytest.raises(InputError, match=r"short\.pb.*no node 'mixed_7/tower/conv/batchnorm'"):
        load_weights(tmp_path / "short.pb")
    adm_standin.write_pb(tmp_path / "empty.pb", values={})
    with pytest.raises(InputError, match=r"empty\.pb.*'conv/conv2d_params' holds no readable constant"):
        load_weights(tmp_path / "empty.pb")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 3, 32, 3), "expected float"), ((864,), "expected float"), ((), "expected float")],
)
def test_graph_with_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    values = {"conv/conv2d_params": np.ones(shape, np.float32)}
    adm_standin.write_pb(tmp_path / "other.pb", values=values)
    with pytest.raises(InputError, match=rf"other\.pb.*'conv/conv2d_params' .*{message} \(3, 3, 3, 32\)"):
        load_weights(tmp_path / "other.pb")


def test_random_damage_gives_no_other_error_than_inputerror(tmp_path: Path) -> None:
    path, rng, refused = tmp_path / "damaged.pb", np.random.default_rng(0), 0
    weights = np.ones((3, 3, 3, 32), np.float32)
    adm_standin.write_pb(path, adm_standin.Graph().nodes[:20], {"conv/conv2d_params": weights})
    content = path.read_bytes()
    for start in rng.integers(0, len(content), 100):
        path.write_bytes(content[:start] + rng.bytes(3) + content[start + 3 :])
        try:
            graph = Graph(path)
            graph.constant("conv/conv2d_params", weights.shape)
            graph.switch("conv/batchnorm", "scale_after_normalization")
        except InputError as error:
            assert "damaged.pb" in str(error)
            refused += 1
    assert refused > 6


def test_a_graph_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "many.pb"
    path.write_bytes(b"".join(b"\x0a\x06\x0a\x04%04d" % number for number in range(101)))  # nodes with a name only
    assert len(Graph(path)._nodes) == 101
    monkeypatch.setattr(graphdef, "MOST_NODES", 100)
    with pytest.raises(InputError, match=r"many\.pb: not a TensorFlow graph"):
        Graph(path)
    path.write_bytes(b"\x0a\xd2\x0f" + b"\x20\x01" * 1001)
    with pytest.raises(InputError, match="not a TensorFlow graph"):
        Graph(path)


def test_gamma_is_ignored_where_the_graph_ignores_it(tmp_path: Path) -> None:
    nodes = [
        (name, op, inputs, {**attributes, "scale_after_normalization": ("b", name != "mixed/conv/batchnorm")})
        for name, op, inputs, attributes in adm_standin.Graph().nodes
    ]
    adm_standin.write_pb(tmp_path / "unscaled.pb", nodes)
    weights = load_weights(tmp_path / "unscaled.pb")
    assert torch.equal(weights.tensors["Mixed_5b.branch1x1.bn.weight"], torch.ones(64))
    assert not torch.equal(weights.tensors["Mixed_5c.branch1x1.bn.weight"], torch.ones(64))


def test_download_is_checked_and_only_a_complete_file_is_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "cache" / "graph.pb"
    source.write_bytes(b"weights")
    right, url = hashlib.sha256(b"weights").hexdigest(), source.as_uri()
    with pytest.raises(InputError, match=f"not downloaded, its SHA-256 is not {'0' * 64}; .*--inception"):
        fetch_graph(target, url, "0" * 64)
    assert not list(target.parent.iterdir())
    leftover = target.with_name(f"graph.pb.{'0' * 32}.partial")  # of a download that was killed two days ago
    leftover.touch()
    os.utime(leftover, (time.time() - 2 * 24 * 3600,) * 2)
    assert fetch_graph(target, url, right).read_bytes() == b"weights"
    assert list(target.parent.iterdir()) == [target]
    source.unlink()
    assert fetch_graph(target, url, right) == target  # no second download
    target.write_bytes(b"weightz")
    with pytest.raises(InputError, match="damaged"):
        fetch_graph(target, url, right)


def test_without_network_the_error_says_where_from_and_where_to(tmp_path: Path) -> None:
    url = (tmp_path / "nowhere.pb").as_uri()
    with pytest.raises(InputError, match=r"nowhere\.pb: not downloaded, it cannot be reached; .*put it at .*graph\.pb"):
        fetch_graph(tmp_path / "graph.pb", url)
