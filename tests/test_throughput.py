import json

import torch

from models.sit import SiT_models
from tests.conftest import run_training
from training import throughput
from training.throughput import peak_flops, training_flops


def test_flops_of_b2_are_those_of_its_matrix_products():
    """By hand: 257 tokens, 12 blocks of 12 D^2 weights and two T x T x D products of attention, and so on; backward
    costs twice the forward pass, but the first layers need no gradient of their input."""
    with torch.device("meta"):
        network = SiT_models["SiT-B/2"](z_dims=[768], cls_token_dim=768)
    tokens, width = 257, 768
    blocks = 12 * (tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2)
    projectors = tokens * (768 * 2048 + 2048 * 2048 + 2048 * 768)
    ends = 256 * 16 * width * 2 + 768 * width * 2 + (256 + width) * width + 2 * width**2
    assert abs(training_flops(network) / (3 * 2 * (blocks + projectors + ends)) - 1) < 0.01


def test_peaks_follow_name_and_precision():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16", True) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16", True) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no", True) == 156e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no", False) is None
    assert peak_flops("NVIDIA GeForce GTX 1080", "fp16", True) is None


def test_each_start_of_a_run_is_described(train_flags):
    flags = [*train_flags, "--exp-name", "run", "--seed", "5", "--resume", "latest"]
    for steps in ("2", "3"):
        folder = run_training([*flags, "--max-train-steps", steps])
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["seed"], start["processes"]) for start in starts] == [(0, 5, 1), (2, 5, 1)]
    assert all(start["host"] and start["command"] and start["torch"] == torch.__version__ for start in starts)


def test_code_that_git_knows_nothing_of_is_not_called_unchanged(monkeypatch):
    monkeypatch.setattr(throughput, "_git", lambda *command: None)
    described = throughput.describe_code(torch.device("cpu"))
    assert described["commit"] is None and described["uncommitted_changes"] is None
