"""Networks, samples, images, features and metrics of a GPU are those of a CPU, up to rounding; see test_gpu.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import first_line
from evaluations.metrics import FeatureSums, InceptionScoreSums, precision_recall
from models.autoencoder import LatentFormat, PixelCodec, load_codec
from models.checkpoint import save_checkpoint
from models.encoders import Encoder, load_encoder, untrained_encoder
from models.inference import NETWORK_DTYPES, convert
from models.interpolant import Interpolant
from models.sit import Attention
from models.sit_config import SiTConfig
from samplers import Guidance, image_seeds, sample_images
from tests.conftest import ENCODER, RESOLUTION, run_generate
from tests.test_autoencoder import random_images, save_kl
from tests.test_checkpoint import content
from tests.test_gpu import on_each_device, on_gpu, relative_error
from tests.test_samplers import trained_looking_network
from tests.test_sit import inputs, randomise, small

CONVOLUTION_ERROR = 3e-4  # relative, of some layers in float32: cuDNN may choose Winograd's algorithm


@pytest.fixture
def float32() -> Iterator[None]:
    """Compute float32 in float32: TF32, which has 10 bits of precision, is PyTorch's default for convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def has_gradient(name: str) -> bool:
    """Return whether a parameter changes the output: softmax ignores what all keys have in common."""
    return not name.endswith("k_norm.bias")


@on_each_device
@pytest.mark.parametrize("fused_attn", [True, False])
def test_velocities_of_a_gpu_are_those_of_a_cpu(float32, device, fused_attn):
    """Outputs and gradients, up to the order of float32 sums."""
    results = []
    for where in ("cpu", device):
        model = randomise(small(qk_norm=True))
        given = [part.to(where) for part in inputs(model)]
        for block in model.blocks:
            block.attn.fused_attn = fused_attn
        velocity, projected, cls_velocity = model.to(where)(*given)
        (velocity.square().mean() + cls_velocity.square().mean() + projected[0].square().mean()).backward()
        gradients = [p.grad for name, p in model.named_parameters() if p.requires_grad and has_gradient(name)]
        results.append([velocity, cls_velocity, projected[0], *gradients])
    for expected, found in zip(*results, strict=True):
        assert found.device.type == device and relative_error(found, expected) < 1e-4


@on_each_device
@pytest.mark.parametrize(
    ("sampler", "cls_token_dim"),
    [(("sde", "euler"), 6), (("sde", "euler"), None), (("ode", "heun"), None), (("ode", "dopri5"), 6)],
)
def test_samples_of_a_gpu_are_those_of_a_cpu(float32, device, sampler, cls_token_dim):
    """The noise is drawn on the CPU, so both start from the same numbers. Half precision has errors of its own size."""

    def sampled(where: str, dtype: str = "float32") -> list[Tensor]:
        lead = 0.3 if cls_token_dim else 0.0
        model = convert(trained_looking_network(cls_token_dim, cls_lead=lead), NETWORK_DTYPES[dtype]).to(where)
        found = sample_images(
            model, [0, 3, 4], image_seeds(7, range(3)), Interpolant(), Guidance(2.0, 1.5, 0.0, 0.85), *sampler,
            num_steps=5,
        )  # fmt: skip
        assert all(part is None or (part.device.type == where and part.dtype == torch.float64) for part in found)
        return [part for part in found if part is not None]

    for dtype, tolerance in {"float32": 1e-4, "bf16": 0.03, "fp16": 0.01}.items():
        if sampler[1] == "dopri5":
            if dtype != "float32":
                continue  # rounding errors are larger than the solver's tolerance
            tolerance = 1e-3  # the solver may choose other steps
        for found, expected in zip(sampled(device, dtype), sampled("cpu"), strict=True):
            assert relative_error(found, expected) < tolerance, dtype


@pytest.mark.parametrize(
    ("device", "more"),
    [
        ("cpu", "--network-dtype bf16"),
        on_gpu(""),
        on_gpu("--cuda-graphs --per-proc-batch-size auto"),
        on_gpu("--cuda-graphs --compile"),
        on_gpu("--cuda-graphs --network-dtype fp16"),
        on_gpu("--mixed-precision bf16"),
    ],
)
def test_images_of_a_gpu_are_those_of_a_cpu(tmp_path, monkeypatch, device, more):
    """In float32 a value may be rounded to the next level; half precision changes one of 256 levels on average."""
    network = randomise(small(in_channels=3, num_classes=3))
    save_checkpoint(tmp_path / "0000012.pt", content(network, codec=PixelCodec().format.to_json()))
    flags = ["--ckpt", str(tmp_path / "0000012.pt"), "--sample-dir", str(tmp_path), "--num-fid-samples", "5"]
    flags += ["--num-steps", "4", "--cfg-scale", "2", "--guidance-high", "0.6", "--per-proc-batch-size", "3"]
    flags += ["--no-tf32", "--save-cls"]
    for name, *others in (("expected", "--device", "cpu"), ("found", "--device", device, *more.split())):
        run_generate([*flags, "--name", name, *others], monkeypatch)
    half = "16" in more
    for number in range(5):
        a, b = (
            np.array(Image.open(tmp_path / name / "images" / f"{number:06d}.png"), dtype=int)
            for name in ("expected", "found")
        )
        assert a.std() > 50 and (np.abs(a - b).mean() if half else np.abs(a - b).max()) <= 1
    a, b = (torch.from_numpy(np.load(tmp_path / name / "cls_tokens.npy")) for name in ("expected", "found"))
    assert relative_error(b, a) < (0.03 if half else 1e-4)


SHAPE = (2, 257, 288)  # images, tokens, width: 4 heads of size 72, as in SiT-XL


@pytest.mark.parametrize(
    ("device", "backend", "dtype"),
    [
        ("cpu", None, torch.bfloat16),
        on_gpu(None, torch.bfloat16),
        on_gpu(None, torch.float16),
        on_gpu("FLASH_ATTENTION", torch.bfloat16),
        on_gpu("EFFICIENT_ATTENTION", torch.bfloat16),
        on_gpu("CUDNN_ATTENTION", torch.bfloat16),
    ],
)
def test_attention_of_head_size_72_equals_the_plain_form(float32, device, backend, dtype):
    """Outputs and gradients in half precision, whose errors are at most a few times those of the plain form.

    `backend` None: the kernel that PyTorch chooses. One that PyTorch cannot run here is skipped.
    """

    def results(fused: bool, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        attention = Attention(SiTConfig(hidden_size=SHAPE[2], num_heads=4), fused, is_first=True)
        with torch.no_grad():
            attention.qkv.weight.mul_(2)  # so that the weights of the attention are not uniform
        attention = attention.to(device, dtype)
        x = torch.randn(SHAPE).to(device, dtype).requires_grad_()
        out, _ = attention(x, None, None)
        out.float().square().sum().backward()
        return [out, x.grad, *(parameter.grad for parameter in attention.parameters())]

    exact, plain = results(False, torch.float32), results(False, dtype)
    try:
        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
            found = results(True, dtype)
    except RuntimeError as error:
        if backend is None:
            raise
        pytest.skip(f"{backend}: {first_line(error)}")
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.isfinite().all() and ours.dtype == dtype
        assert relative_error(ours, right) < 3 * relative_error(theirs, right) + torch.finfo(dtype).eps


def encoder_of(name: str, weights: Any, device: str) -> Encoder:
    if weights is not None:
        return load_encoder(name, RESOLUTION, weights, device)
    torch.manual_seed(0)
    return untrained_encoder(name, 64, device)


@on_each_device
@pytest.mark.parametrize("name", [ENCODER, f"{ENCODER}:tokens=before-norm", "timm/resnet10t:input=64"])
def test_encoder_outputs_of_a_gpu_are_those_of_a_cpu(float32, device, name, encoder_weights):
    weights = encoder_weights if name.startswith(ENCODER) else None
    images = random_images(3, RESOLUTION if weights else 48)  # the second size is resized
    expected, found = (encoder_of(name, weights, where)(images.to(where)) for where in ("cpu", device))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == device and ours.dtype == torch.float32
        assert relative_error(ours, theirs) < CONVOLUTION_ERROR


@on_each_device
def test_latents_and_decoded_images_of_a_gpu_are_those_of_a_cpu(float32, device, tmp_path):
    """On a GPU the weights of a codec have another memory format."""
    pytest.importorskip("diffusers")
    folder, images = str(save_kl(tmp_path / "codec")), random_images()
    expected, found = (load_codec(folder, where) for where in ("cpu", device))
    moments = expected.encode(images)
    assert relative_error(found.encode(images.to(device)), moments) < CONVOLUTION_ERROR
    latents = moments[:, :4]
    decoded = [codec.decode(latents.to(codec.device)).cpu().int() for codec in (expected, found)]
    assert (decoded[0] - decoded[1]).abs().max() <= 1 and decoded[0].float().std() > 1


@on_each_device
def test_channels_with_a_scale_of_their_own_are_scaled_on_the_device(device):
    form = LatentFormat("own", 2, 8, scale=(2.0, 3.0), shift=(0.5, -1.0))
    latents = form.sample(torch.ones(1, 4, 2, 2, device=device), torch.ones(1, 2, 2, 2, device=device))
    assert latents.device.type == device and latents[0, :, 0, 0].tolist() == [3.0, 9.0]
    assert torch.allclose(form.unscale(latents).cpu(), torch.full((1, 2, 2, 2), 2.0))


@on_each_device
def test_sums_and_metrics_of_a_gpu_are_those_of_a_cpu(float32, device):
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for where in ("cpu", device):
        sums, score = FeatureSums(16, where), InceptionScoreSums(40, 16, where)
        for first in (0, 25):
            part = features[first : first + 25].to(where)
            sums.update(part)
            score.update(part, first)
        statistics = sums.statistics()
        assert statistics.mean.device.type == statistics.covariance.device.type == "cpu"
        shares = precision_recall(features.to(where), features.to(where) * 0.7 + 0.1)
        results.append([statistics.mean, statistics.covariance, torch.tensor([score.score(), *shares])])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-6
