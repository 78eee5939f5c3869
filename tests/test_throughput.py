import json
import shutil
import subprocess

import pytest
import torch

import train
from models.sit import SiT_models
from tests.conftest import ROOT, read_rows, reset_accelerate, run_training
from training import throughput
from training.throughput import StepClock, peak_flops, training_flops


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
    assert training_flops(network) - training_flops(network, project=False) == 3 * 2 * projectors


def test_peaks_follow_name_and_precision():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16", True) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16", True) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no", True) == 156e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no", False) is None
    assert peak_flops("NVIDIA GeForce GTX 1080", "fp16", True) is None


class Time:
    """Stands still until it is moved."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def passes(self, seconds: float):
        self.seconds += seconds


def steps(clock: StepClock, time: Time, *durations: float) -> None:
    for duration in durations:
        with clock.waiting_for_data():
            time.passes(duration / 4)
        time.passes(duration * 3 / 4)
        clock.end_step()


def test_the_clock_stands_still_during_other_work():
    time = Time()
    clock = StepClock(time)
    steps(clock, time, 600.0)  # compiles
    clock.end_first_step()
    steps(clock, time, 1.0, 2.0)
    with clock.stopped():
        time.passes(1000)
    steps(clock, time, 3.0)
    lap = clock.end_lap()
    assert (lap.steps, lap.seconds, lap.seconds_per_step, lap.data_wait) == (3, 6.0, 2.0, 0.25)
    assert clock.seconds_left(10) == 20.0
    with pytest.raises(KeyError), clock.stopped():
        time.passes(5)
        raise KeyError
    steps(clock, time, 4.0)
    assert clock.end_lap().seconds_per_step == 4.0 and clock.seconds_left(10) == 25.0


def test_the_first_step_is_reported_only_if_there_is_no_other():
    time = Time()
    clock = StepClock(time)
    assert clock.in_first_step
    steps(clock, time, 600.0)
    clock.end_first_step()
    assert not clock.in_first_step and clock.seconds_left(10) is None
    assert clock.end_lap().seconds_per_step == 600.0 and clock.seconds_left(10) is None
    steps(clock, time, 2.0)
    assert clock.end_lap().seconds_per_step == 2.0 and clock.seconds_left(10) == 20.0


def test_the_time_left_follows_the_recent_speed():
    time = Time()
    clock = StepClock(time)
    for duration in [100.0] * 20 + [1.0] * 10:
        steps(clock, time, duration)
        clock.end_lap()
    assert clock.seconds_left(10) == 10.0


def test_rows_of_a_run_have_the_speed_of_its_steps_only(train_flags, monkeypatch):
    """A grid of 1000 seconds, a checkpoint of 500 and a first step of 600 do not change images per second."""
    time, first = Time(), [600.0]
    flags = """--exp-name run --max-train-steps 9 --log-steps 2 --sampling-steps 3 --checkpointing-steps 3
        --grid-samples 2 --grid-num-steps 1"""
    reset_accelerate()
    run = train.set_up(train.parse_args([*train_flags, *flags.split()]))
    run.log.clock = StepClock(time)

    def slow(name, seconds):
        work = getattr(train, name)

        def slow_work(*given, **more):
            work(*given, **more)
            time.passes(first.pop() if name == "training_step" and first else seconds)

        monkeypatch.setattr(train, name, slow_work)

    slow("training_step", 2.0)
    slow("write_samples", 1000.0)
    slow("save", 500.0)
    train.train(run)
    rows = read_rows(run.folder)
    assert [(row["step"], row["images_per_second"]) for row in rows] == [(step, 4.0) for step in (2, 4, 6, 8, 9)]
    text = (run.folder / "log.txt").read_text()
    assert "4.0 images/s  0:00:14 left" in text and "600" not in text


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
