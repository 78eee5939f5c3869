"""What a GPU must compute as a CPU does, and what only a GPU does: skipped steps in fp16, pinned copies, full memory.

Most checks are functions of a device and run on the CPU as well, which shows that they work; some of them then compare
the CPU with itself. Other files have further tests that need a GPU: test_sync.py (the host does not wait for the GPU),
test_inference.py (CUDA graphs), test_inception.py, test_distributed.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from common.distributed import largest_batch
from common.errors import InputError, first_line, run_cli
from evaluations.metrics import FeatureSums, InceptionScoreSums, precision_recall
from loss import Draws
from models.autoencoder import LatentFormat, PixelCodec, load_codec
from models.checkpoint import load_checkpoint, save_checkpoint
from models.encoders import Encoder, load_encoder, untrained_encoder
from models.inference import NETWORK_DTYPES, convert
from models.interpolant import Interpolant
from models.sit import Attention
from samplers import Guidance, image_seeds, sample_images
from tests.conftest import DEVICES, ENCODER, RESOLUTION, run_generate, run_training
from tests.test_autoencoder import random_images, save_kl
from tests.test_checkpoint import content
from tests.test_samplers import trained_looking_network
from tests.test_sit import inputs, randomise, small
from tests.test_sync import start
from training.checkpoint_writer import TensorCopies

on_each_device = pytest.mark.parametrize("device", DEVICES)
needs_gpu = pytest.mark.gpu
FP16_SCALE, TOO_LARGE_SCALE = 2.0**10, 2.0**100  # of the loss; fp16 ends at 65504, float32 at 2^128

CONVOLUTION_ERROR = 3e-4  # relative, of some layers in float32: cuDNN may choose Winograd's algorithm


def on_gpu(*values: Any) -> Any:
    """Return a parameter set of a test that needs a GPU: "cuda", then `values`."""
    return pytest.param("cuda", *values, marks=needs_gpu)


@pytest.fixture
def float32() -> Iterator[None]:
    """Compute float32 in float32: TF32, which has 10 bits of precision, is PyTorch's default for convolutions."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> None:
    """Forget compiled code: a function may be compiled 8 times, and each network of another test is one time."""
    if "--compile" in request.node.name:
        torch._dynamo.reset()


def tensors_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dicts and lists by their path."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for inner, item in items for key, tensor in tensors_of(item, f"{name}/{inner}").items()}


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not equal to the bit."""
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name])]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------ training steps


def state_of(run: train.Run) -> dict[str, Tensor]:
    """Return copies of weights, averages, moments and the optimizer's counts of steps."""
    state = {"model": run.model.state_dict(), "ema": run.ema.state_dict(), "opt": run.optimizer.state_dict()["state"]}
    return {name: tensor.clone() for name, tensor in tensors_of(state).items()}


def one_step(run: train.Run, batches: Iterator, factor: float = 1.0) -> None:
    """Do one step whose loss, and therefore its gradient, is multiplied by `factor`."""
    criterion = run.criterion

    def scaled(*given: Any) -> dict[str, Tensor]:
        terms = criterion(*given)
        return {**terms, "loss": terms["loss"] * factor}

    run.criterion = scaled
    train.training_step(run, batches)
    run.criterion = criterion
    run.step += 1
    train.read_reports(run, wait_for_all=True)


def started(flags: list[str]) -> tuple[train.Run, Iterator]:
    """Return a run after its first step, and its batches; the loss scale of fp16 is so small that nothing overflows."""
    run, batches = start(flags, steps=0)
    if scaler := run.accelerator.scaler:
        scaler.load_state_dict({**scaler.state_dict(), "scale": FP16_SCALE})
    one_step(run, batches)
    return run, batches


PRECISIONS = [("cpu", "no"), ("cpu", "bf16"), on_gpu("no"), on_gpu("bf16"), on_gpu("fp16")]


@pytest.mark.parametrize(("device", "precision"), PRECISIONS)
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_step_without_a_finite_gradient_changes_nothing(train_flags, device, precision, factor):
    """Except the loss scale of fp16, which is halved. The next step is an ordinary one."""
    run, batches = started([*train_flags, "--device", device, "--mixed-precision", precision])
    scaler, before = run.accelerator.scaler, state_of(run)
    assert (scaler is not None) == (precision == "fp16")
    one_step(run, batches, factor)
    assert different(state_of(run), before) == []
    assert scaler is None or scaler.get_scale() == FP16_SCALE / 2
    assert run.log.counts == {"bad_steps": 1, "overflow_steps": 0}

    one_step(run, batches)
    after = state_of(run)
    assert all(tensor.isfinite().all() for tensor in after.values())
    changed = different(after, before)
    assert {name.split("/")[1] for name in changed} == {"model", "ema", "opt"}
    steps = [name for name in after if name.endswith("/step")]
    assert steps and all(after[name] == before[name] + 1 for name in steps)


@needs_gpu
def test_an_overflow_of_fp16_is_counted_as_one_and_halves_the_scale(train_flags):
    """The losses are finite, and the scaled gradient is too large for fp16."""
    run, batches = started([*train_flags, "--device", "cuda", "--mixed-precision", "fp16"])
    scaler, before = run.accelerator.scaler, state_of(run)
    scaler.update(TOO_LARGE_SCALE)
    one_step(run, batches)
    assert different(state_of(run), before) == []
    assert scaler.get_scale() == TOO_LARGE_SCALE / 2
    assert run.log.counts == {"bad_steps": 0, "overflow_steps": 1}
    scaler.update(FP16_SCALE)
    one_step(run, batches)
    assert different(state_of(run), before) and scaler.get_scale() == FP16_SCALE


class DrawnOnTheCPU:
    """The draws of a step from the CPU's generator: that of a GPU draws other numbers from the same seed."""

    def __init__(self, run: train.Run):
        self.source, self.device = replace(run.randomness, device="cpu"), run.accelerator.device

    def draw(self, step: int) -> Draws:
        return Draws(*(None if part is None else part.to(self.device) for part in self.source.draw(step)))


def step_means(flags: list[str], device: str, steps: int = 4) -> list[dict[str, float]]:
    """Return the losses of the first steps of a run in float32, with the draws of the CPU's generator."""
    run, batches = start([*flags, "--device", device, "--mixed-precision", "no", "--no-allow-tf32"], steps=0)
    run.randomness = DrawnOnTheCPU(run)
    for step in range(steps):
        train.training_step(run, batches)
        run.step = step + 1
    return [report.means for report in run.reports.receive(wait_for_all=True)]


@pytest.mark.parametrize(
    ("device", "more"),
    [
        ("cpu", "--qk-norm"),
        on_gpu(""),
        on_gpu("--entangle patch-mean --qk-norm"),
        on_gpu("--entangle learnable --no-fused-attn"),
        on_gpu("--no-cls-token --path-type cosine --gradient-accumulation-steps 2"),
    ],
)
def test_losses_of_a_gpu_are_those_of_a_cpu(train_flags, device, more):
    """In the first step they differ by the order of float32 sums only, some 1e-7 per operation.

    AdamW then moves each weight by the learning rate in the direction of its gradient, however small the gradient is.
    Where it is a rounding error, the directions differ, so the losses of later steps are less equal.
    """
    expected, found = (step_means([*train_flags, *more.split()], where) for where in ("cpu", device))
    assert len(found) == 4 and len({means["loss"] for means in found}) == 4
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        relative, absolute = (1e-4, 1e-6) if number == 0 else (1e-3, 1e-4)  # a mean cosine can be near 0
        assert ours == pytest.approx(theirs, rel=relative, abs=absolute), number


def checkpoint_tensors(folder: Any, step: int = 4) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, and the loss scaler's numbers as tensors."""
    found = load_checkpoint(folder / "checkpoints" / f"{step:07d}.pt")
    scaler = {name: torch.tensor(float(value)) for name, value in (found["scaler"] or {}).items()}
    return tensors_of({**{name: found[name] for name in ("model", "ema", "opt")}, "scaler": scaler})


@pytest.mark.parametrize(
    ("device", "more"),
    [
        ("cpu", "no"),
        on_gpu("no"),
        on_gpu("bf16"),
        on_gpu("fp16"),
        on_gpu("bf16 --compile"),
        on_gpu("bf16 --gradient-accumulation-steps 2 --activation-checkpointing"),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(train_flags, device, more):
    precision, *switches = more.split()
    flags = [*train_flags, "--device", device, "--mixed-precision", precision, *switches]
    flags += ["--checkpointing-steps", "2", "--max-train-steps", "4", "--exp-name"]
    undisturbed = checkpoint_tensors(run_training([*flags, "undisturbed"]))
    run_training([*flags, "resumed", "--max-train-steps", "2"])
    resumed = checkpoint_tensors(run_training([*flags, "resumed", "--resume", "latest"]))
    if found := different(resumed, undisturbed):
        again = different(checkpoint_tensors(run_training([*flags, "again"])), undisturbed)
        reason = f"also in a second run without a stop: {again}" if again else "a second run without a stop is equal"
        pytest.fail(f"resumed, these tensors differ: {found}; {reason}")


@on_each_device
def test_a_copy_for_a_checkpoint_holds_the_values_at_the_time_of_the_call(device):
    copies, given = TensorCopies(), {"a": [torch.ones(1 << 20, device=device)], "step": 3}
    for value in (1.0, 2.0):
        taken = copies.take(given)
        given["a"][0].add_(1)  # queued after the copy
        copies.wait()
        assert taken["a"][0].device.type == "cpu" and (taken["a"][0] == value).all() and taken["step"] == 3


# ------------------------------------------------------------------------------------------------ networks


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
        model = convert(trained_looking_network(cls_token_dim), NETWORK_DTYPES[dtype]).to(where)
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
        attention = Attention(SHAPE[2], 4, qk_norm=False, fused_attn=fused)
        with torch.no_grad():
            attention.qkv.weight.mul_(2)  # so that the weights of the attention are not uniform
        attention = attention.to(device, dtype)
        x = torch.randn(SHAPE).to(device, dtype).requires_grad_()
        out = attention(x)
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


# ------------------------------------------------------------------------------------------------ memory


@needs_gpu
def test_the_largest_batch_of_a_gpu_is_found():
    """Each image takes 30 % of the memory: two fit, four do not."""
    share = torch.cuda.get_device_properties("cuda").total_memory * 3 // 10
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        torch.empty(count * share, dtype=torch.uint8, device="cuda")

    assert largest_batch(attempt, 8) == 2 and tried == [8, 4, 2]
    with pytest.raises(InputError, match=r"^the memory of GPU \d+ \(.* GiB\) is full, .* more were needed: it is too"):
        largest_batch(lambda count: torch.empty(4 * share, dtype=torch.uint8, device="cuda"), 2)


FULL = {
    "cpu": "the memory of this machine is full",
    "cuda": "the memory of GPU 0 (",
}


@on_each_device
def test_a_full_memory_is_one_line_with_advice(device, capsys):
    def too_much() -> None:
        torch.empty(2**50, device=device)

    with pytest.raises(SystemExit) as exit_:
        run_cli(too_much, memory_advice="give it a smaller --batch-size")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and FULL[device] in error and "Traceback" not in error
    assert "; give it a smaller --batch-size, or end other programs that use this memory" in error
    assert error.count("\n") == 1
