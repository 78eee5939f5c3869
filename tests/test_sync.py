"""Nothing in a training step makes the host wait for the device: it reads no number and copies no value of its own.

On a GPU PyTorch itself finds such waits (its sync debug mode); on the CPU the calls that would wait are watched.
"""

import contextlib
import itertools
from unittest.mock import MagicMock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from common.distributed import to_host
from generate import if_finite
from models import ema
from models.autoencoder import LatentFormat, PixelCodec
from models.inference import CudaGraphs
from models.interpolant import Interpolant
from samplers import Guidance, sample_images
from tests.conftest import DEVICES, reset_accelerate
from tests.test_samplers import trained_looking_network
from training.parallelism import to_device

VARIANTS = [
    "",
    "--gradient-accumulation-steps 2 --qk-norm",
    "--entangle patch-mean --path-type cosine --weighting lognormal",
    "--entangle latent-mean",
    "--entangle learnable",
    "--no-cls-token --enc-type none",
    *["--optimizer muon --warmup-steps 9 --lr-schedule cosine"] * hasattr(torch.optim, "Muon"),
]

AGAINST_THE_STEP = {
    "item": lambda good: good.item(),
    "float": lambda good: float(good),
    "bool": lambda good: 1 if good else 0,
    "tolist": lambda good: good.tolist(),
    "numpy": lambda good: good.numpy(),
    "nonzero": lambda good: good.nonzero(),
    "bool index": lambda good: torch.ones(1)[good.view(1) > 0],
    "host value": lambda good: good * torch.tensor(1.0),
}


class Waits:
    """While it is entered, notes what would make the host wait if the tensors were a GPU's."""

    def __init__(self):
        self.found = found = []
        ops = torch.ops.aten
        reads = {ops._local_scalar_dense, ops.is_nonzero, ops.nonzero, ops.masked_select, ops._unique2, ops.equal}
        methods = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
        copies = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}

        class Dispatched(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                bool_index = function.overloadpacket is ops.index and any(
                    index is not None and index.dtype == torch.bool for index in args[1]
                )
                if function.overloadpacket in reads or bool_index:
                    found.append(str(function))
                return function(*args, **(kwargs or {}))

        class Called(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function in methods or function in copies:
                    found.append(function.__name__)
                return function(*args, **(kwargs or {}))

        self.modes = (Dispatched(), Called())

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


def start(flags: list[str], steps: int = 1):
    """Return a run after its first `steps`, and its batches, on the device already."""
    reset_accelerate()
    run = train.set_up(train.parse_args([*flags, "--exp-name", "run", "--no-check-data"]))
    run.model.train()
    batches = itertools.cycle(list(itertools.islice(train.load_batches(run, range(2)), 2)))
    for _ in range(steps):
        train.training_step(run, batches)  # the first one makes the optimiser's state
        run.step += 1
    return run, batches


@pytest.mark.cpu
@pytest.mark.parametrize("more", ["--mixed-precision bf16", *VARIANTS])
def test_a_step_reads_nothing(train_flags, more):
    run, batches = start([*train_flags, *more.split()])
    with Waits() as waits:
        for _ in range(3):
            train.training_step(run, batches)
            run.step += 1
    assert waits.found == []


@pytest.mark.cpu
@pytest.mark.parametrize("how", AGAINST_THE_STEP)
def test_a_read_that_creeps_in_is_found(train_flags, monkeypatch, how):
    run, batches = start(train_flags)
    update = ema.update

    def careless(average, model, decay, good):
        AGAINST_THE_STEP[how](good)
        update(average, model, decay, good)

    monkeypatch.setattr(ema, "update", careless)
    with Waits() as waits:
        train.training_step(run, batches)
    assert waits.found


@pytest.mark.cpu
def test_reports_are_read_once_a_step_two_steps_late(train_flags):
    run, batches = start(train_flags)
    train.read_reports(run, wait_for_all=True)
    run.reports.lag, reads = 2, []
    for _ in range(5):
        train.training_step(run, batches)
        run.step += 1
        with Waits() as waits:
            train.read_reports(run)
        reads.append(waits.found)
    assert reads == [[], [], ["tolist"], ["tolist"], ["tolist"]]


def test_latents_with_a_scale_for_each_channel_copy_it_to_the_device_once():
    form = LatentFormat("own", 2, 8, scale=(2.0, 3.0), shift=(0.5, -1.0))
    moments, noise = torch.ones(1, 4, 2, 2), torch.ones(1, 2, 2, 2)
    first = form.sample(moments, noise)
    with Waits() as waits:
        form.sample(moments, noise)
    assert waits.found == []
    assert first[0, :, 0, 0].tolist() == [3.0, 9.0]


@contextlib.contextmanager
def waits_are_errors(device):
    """Let PyTorch raise an error where the host would wait for a GPU; on the CPU nothing waits."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


ON_GPU = ["fp16", "no", "bf16 --compile", "bf16 --activation-checkpointing", *(f"bf16 {more}" for more in VARIANTS)]


@pytest.mark.parametrize(
    ("device", "more"),
    [("cpu", "bf16"), *(pytest.param("cuda", more, marks=pytest.mark.gpu) for more in ON_GPU)],
)
def test_a_step_on_a_gpu_never_synchronises(train_flags, device, more):
    """Nor do reading its batch and its row of metrics.jsonl, except that the row waits for the step's numbers."""
    precision, *switches = more.split()
    run, _ = start([*train_flags, "--device", device, "--mixed-precision", precision, *switches])
    train.read_reports(run, wait_for_all=True)
    batches = train.load_batches(run, range(run.step, run.step + 5))
    with waits_are_errors(device):
        for number in range(5):
            train.training_step(run, batches)
            run.step += 1
            train.read_reports(run)
            if number == 3:
                train.after_step(run, 1000, MagicMock())
    assert len(train_rows := (run.folder / "metrics.jsonl").read_text().splitlines()) == 1, train_rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graphs", [False, True])
def test_sampling_never_synchronises(device, graphs):
    """From the noise to the copy of the images, which another thread waits for."""
    if graphs and device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    model, codec = trained_looking_network().to(device), PixelCodec().to(device)
    network = CudaGraphs(model) if graphs else model

    def sample():
        latents, cls_tokens = sample_images(
            model, [0, 1, 4], [7, 8, 9], Interpolant(), Guidance(2.0, 2.0, 0.0, 0.5), num_steps=4, network=network
        )
        images = codec.decode(latents[:, :3].float())
        return [if_finite(cls_tokens, to_host(part), "x") for part in (images, cls_tokens)]

    first = [part() for part in sample()]
    with waits_are_errors(device):
        copies = sample()
    for one, get in zip(first, copies, strict=True):
        assert (get() == one).all() and one.std() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_whole_while_the_device_is_busy(device):
    """The copies are finished before they are read, and their memory is not used again before that."""
    batches = (torch.full((1 << 22,), float(number)) for number in range(8))
    batches = [(batch.pin_memory() if device == "cuda" else batch,) for batch in batches]
    sums = []
    for (copy,) in to_device(batches, torch.device(device)):
        if device == "cuda":
            torch.cuda._sleep(20_000_000)  # clock cycles, about 10 ms, in which the next copies are made
        sums.append(copy.double().sum())
        del copy
    assert [total.item() for total in sums] == [number * float(1 << 22) for number in range(8)]
