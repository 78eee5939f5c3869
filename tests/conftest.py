"""What the tests share: a small data set, a small encoder with random weights, and training runs inside the process.

REG_TEST_DEVICE=cuda runs the programs in most tests on a GPU; without it they run on the CPU. Tests that compare with
numbers of the CPU, or start several processes, run on the CPU in any case. Tests with the marker `gpu` use the GPU
without this variable.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.messages import logger
from training.preemption import SIGNALS

ROOT = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("REG_TEST_DEVICE", "cpu")  # of the programs that the tests run; also a value of --device
#: Parameters of a test with an argument `device`: the CPU, and a GPU where there is one.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_CLASSES = 3
RESOLUTION = 16
ENCODER_OPTIONS = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
#: 16 tokens of width 32 for images of 16 px.
ENCODER = f"timm/vit_tiny_patch16_224:input={RESOLUTION}:" + ":".join(f"{k}={v}" for k, v in ENCODER_OPTIONS.items())


def pytest_configure(config: pytest.Config) -> None:
    """Give child processes the default action of SIGHUP, also if this process ignores it, as under nohup.

    A handler does so: it keeps this process alive, and child processes do not inherit it.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or os.environ.get("PYTEST_XDIST_WORKER"):
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("assets") and not os.environ.get("REG_ASSETS"):
            item.add_marker(pytest.mark.skip(reason="REG_ASSETS names no folder"))


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """Restore PyTorch's settings of TF32, which programs set for their process and never change."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """Restore the handlers of the signals that a training program handles: child processes inherit them."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> None:
    """Forget compiled code before a test with --compile among its parameters: PyTorch compiles a
    function at most 8 times, and each network is one time.
    """
    if "--compile" in request.node.name:
        torch._dynamo.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape bytes that are not UTF-8 in captured output, which pytest-xdist cannot send to the main process."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def assets() -> Path:
    return Path(os.environ["REG_ASSETS"])


def write_data(
    folder: Path, num: int = 24, classes: int = NUM_CLASSES, resolution: int = RESOLUTION, seed: int = 0
) -> Path:
    """Write a data set with the pixel codec: coloured squares, one colour a class, with a little noise."""
    rng = np.random.default_rng(seed)
    labels = [i % classes for i in range(num)]
    image_labels, latent_labels = [], []
    for i, label in enumerate(labels):
        pixels = rng.integers(0, 60, (resolution, resolution, 3), dtype=np.uint8)
        pixels[..., label % 3] += 150
        image_name, latent_name = f"00000/img{i:08d}.png", f"00000/img-mean-std-{i:08d}.npy"
        for path in (folder / "images" / image_name, folder / "vae-sd" / latent_name):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / image_name)
        mean = pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        np.save(folder / "vae-sd" / latent_name, np.concatenate([mean, np.zeros_like(mean)]))
        image_labels.append([image_name, label])
        latent_labels.append([latent_name, label])
    codec = {"codec": "pixel", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}
    (folder / "images" / "dataset.json").write_text(json.dumps({"labels": image_labels}))
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": latent_labels, "codec": codec}))
    return folder


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set to be read only."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set to be damaged at will."""
    return write_data(tmp_path / "data")


def write_encoder(path: Path, resolution: int = RESOLUTION, **options: int) -> Path:
    """Write random weights for ENCODER, or for one with other options, in timm's layout."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    options = ENCODER_OPTIONS | options
    network = timm.create_model("vit_tiny_patch16_224", img_size=resolution, num_classes=0, **options)
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def encoder_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for ENCODER."""
    return write_encoder(tmp_path_factory.mktemp("encoder") / "encoder.safetensors")


@pytest.fixture
def train_flags(shared_data: Path, encoder_weights: Path, tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    """Flags of a run that takes seconds: a network of two narrow blocks. On a GPU it computes in float32 as well."""
    device = "cpu" if request.node.get_closest_marker("cpu") else DEVICE
    precision = "--mixed-precision no --no-allow-tf32" if device == "cuda" else ""
    flags = f"""--output-dir {tmp_path / "exps"} --data-dir {shared_data} --device {device} {precision}
        --enc-type {ENCODER} --enc-weights {encoder_weights}
        --model SiT-S/4 --depth 2 --hidden-size 32 --num-heads 2 --encoder-depth 1 --projector-dim 16
        --batch-size 8 --num-workers 0 --log-steps 1 --sampling-steps 0 --ema-decay 0.9 --learning-rate 0.001"""
    return flags.split()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What training says, each with its level: "warning: ..."."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.levelname.lower()}: {record.getMessage()}")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def reset_accelerate() -> None:
    """Forget accelerate's process-wide state, so that the next run in this process sets its own."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_training(flags: list[str]) -> Path:
    """Run train.py inside this process and return the run's folder."""
    import train

    reset_accelerate()
    run = train.set_up(train.parse_args(flags))
    train.train(run)
    return run.folder


def run_generate(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run generate.py inside this process."""
    import generate

    reset_accelerate()
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    generate.main()


def run_program(*command: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a program of the repository in processes of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def contents(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder, including hidden ones, by name; for a file, its bytes under ""."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def read_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
