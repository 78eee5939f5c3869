import json
import shutil
import subprocess

import pytest
import torch

from models.sit import SiT_models
from tests.conftest import ROOT, run_training
from training import throughput
from training.throughput import peak_flops, training_flops


def test_flops_of_b2_are_those_of_its_matrix_products():
    """By hand: 257 tokens; 12 blocks with 12 D^2 weights and two T x T x D products of attention; the other layers. The
    backward pass costs twice the forward pass, but the first layers need no gradient of their input."""
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


def test_code_outside_git_is_not_reported_as_unchanged(monkeypatch):
    monkeypatch.setattr(throughput, "_git", lambda *command: None)
    described = throughput.describe_code(torch.device("cpu"))
    assert described["commit"] is None and described["uncommitted_changes"] is None


def git(folder, *command):
    identity = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_only_changed_code_counts_as_changed(monkeypatch, tmp_path):
    for name in ("train.py", "train.sh", "training/throughput.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("#")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    monkeypatch.setattr(throughput, "__file__", str(tmp_path / "training" / "throughput.py"))

    def changed():
        return throughput.describe_code(torch.device("cpu"))["uncommitted_changes"]

    (tmp_path / "reg-xl").mkdir()
    (tmp_path / "reg-xl" / "config.json").write_text("{}")
    (tmp_path / "0400000.pt").write_text("")
    assert changed() is False
    for name in ("train.sh", "models/new.py", "new.sh"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / name).write_text("# changed")
        assert changed() is True, name
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-m", "x")
        assert changed() is False


@pytest.mark.skipif(throughput._git("rev-parse", "HEAD") is None, reason="the code is not in a git repository")
def test_git_ignores_outputs_of_the_readmes_commands_and_no_tracked_file():
    assert not git(ROOT, "ls-files", "--ignored", "--cached", "--exclude-standard")
    left = """ILSVRC2012/train/n01440764/x.JPEG data/images/dataset.json exps/run/args.json samples/run/samples.npz
        0400000.pt reference.npz reg-xl/config.json reg-xl.safetensors gpu/xl2.json fid.png sample.json"""
    assert git(ROOT, "check-ignore", *left.split()).split() == left.split()
