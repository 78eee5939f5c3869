"""The benchmarks of training run and their reports are complete. No time is asserted."""

import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import encode, evaluate, sample, timing, train_step
from benchmarks.timing import peak_memory, reset_peak_memory, run_measured
from benchmarks.training_steps import OurForm, PlainForm, Workload, write_random_weights
from common.errors import InputError
from models.encoders import load_encoders, untrained_encoder

TINY = ["--model", "SiT-S/8", "--depth", "1", "--batch-size", "2", "--device", "cpu"]
ENCODER = "timm/vit_tiny_patch16_224:input=64:patch_size=64:depth=1:embed_dim=24:num_heads=2"


@pytest.fixture(autouse=True)
def small_matrix_product(monkeypatch):
    monkeypatch.setitem(timing.MATRIX, "cpu", 64)


def test_forms_of_a_training_step_have_the_same_losses(tmp_path, capsys):
    torch._dynamo.reset()
    flags = "--resolution 64 --rounds 1 --steps 1 --matrix-seconds 0 --backend eager --precision no bf16"
    forms = "--forms plain ours compile checkpointing"
    path = tmp_path / "steps.json"
    train_step.main([*TINY, *flags.split(), *forms.split(), "--encoder", ENCODER, "--json", str(path)])
    written = json.loads(path.read_text())
    rows = {
        precision: [row for row in written["rows"] if row["precision"] == precision] for precision in ("no", "bf16")
    }
    assert [row["form"] for row in rows["no"]] == [
        "plain",
        "train.py",
        "train.py --compile",
        "train.py --compile --activation-checkpointing",
    ]
    assert [row["form"] for row in rows["bf16"]][:2] == ["plain, precision no", "plain"]
    for precision, tolerance in (("no", 1e-5), ("bf16", 2e-2)):
        first = rows[precision][0]["losses"]
        assert len(first) == 2 and first[0] != first[1]
        assert all(row["losses"] == pytest.approx(first, rel=tolerance) for row in rows[precision])
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in written["rows"])
    flops = written["rows"][0]["flops_per_image"]
    assert flops["network"] > flops["encoders"] > 0 and written["matrix_flops"]["bf16"] > 0
    table = capsys.readouterr().out
    assert table.count("| SiT-S/8 | 2 | 64 |") == len(written["rows"])


def test_the_price_of_the_class_slot_is_measured(tmp_path):
    path = tmp_path / "slot.json"
    flags = "--resolution 64 --rounds 1 --steps 1 --matrix-seconds 0 --forms ours --slot-price"
    train_step.main([*TINY, *flags.split(), "--encoder", ENCODER, "--json", str(path)])
    slot, none = json.loads(path.read_text())["rows"]
    assert slot["class_slot"] and not none["class_slot"]
    assert slot["flops_per_image"]["network"] > none["flops_per_image"]["network"]
    assert slot["gradient_bytes"] > none["gradient_bytes"]


def test_losses_of_all_forms_stay_together(tmp_path, capsys):
    torch._dynamo.reset()
    path = tmp_path / "losses.json"
    flags = f"--resolution 64 --batches 4 --losses 6 --precision bf16 --backend eager --json {path}"
    train_step.main([*TINY, *flags.split(), "--encoder", ENCODER])
    found = json.loads(path.read_text())["losses"]
    reference = found["plain, float32"]
    assert len(found) == 7 and all(len(values) == 6 for values in found.values())
    for name, values in found.items():
        assert values == pytest.approx(reference, rel=2e-2 if name.endswith("bf16") else 1e-4), name
    assert found["plain, bf16"] != reference
    assert capsys.readouterr().out.count("\n|") >= len(found)


def test_all_forms_report_the_loss_of_a_bad_step():
    work = Workload([*TINY, "--encoder-depth", "1"], ENCODER, 64, batches=2)
    work.pool[0][1][1] = torch.nan  # moments of one image
    for make in (PlainForm, OurForm):
        work.reset()
        form = make(work)
        for _ in range(2):
            form.step()
        first, _ = form.finish()
        assert first != first


def test_random_weights_of_encoders_are_those_that_are_loaded(tmp_path):
    specs = f"{ENCODER},timm/mobilenetv1_100:channel_multiplier=0.5:input=64"
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    loaded = load_encoders(specs, 64, write_random_weights(tmp_path, specs, 64))
    torch.manual_seed(0)
    for spec, encoder in zip(specs.split(","), loaded, strict=True):
        torch.testing.assert_close(encoder(images).patch_tokens, untrained_encoder(spec, 64)(images).patch_tokens)


def test_memory_of_a_program_is_measured_separately():
    ours = bytearray(400_000_000)
    seconds, memory = run_measured([sys.executable, "-S", "-c", "x = bytearray(100_000_000)"])
    assert seconds > 0 and 0.1 < memory < 0.2
    with pytest.raises(InputError, match=r"SystemExit.* failed with status 3"):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"])
    assert peak_memory(torch.device("cpu")) > len(ours) / 1e9


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_memory_is_reset():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    del (held := [bytearray(400_000_000)])[0]
    assert not held and peak_memory(cpu) > before + 0.3
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < before + 0.2


@pytest.mark.parametrize(
    ("program", "flags", "text"),
    [
        (train_step, ["--encoder", "none"], "--encoder none: the class slot needs an encoder"),
        (train_step, ["--rounds", "0"], "--rounds 0: must be greater than 0"),
        (train_step, ["--batch-size", "8", "0"], "--batch-size 0: must be greater than 0"),
        (train_step, ["--forms", "plain", "other"], "--forms other: allowed: "),
        (train_step, ["--device", "cpu", "--largest-batch"], "--largest-batch: needs a CUDA device"),
        (train_step, ["--steps", "0"], "--steps 0: must be greater than 0"),
        (train_step, ["--losses", "2", "--resolution", "64", "128"], "--losses: compares forms of one --model"),
        (train_step, ["--profile", "{here}"], "--profile .*: is a folder; allowed: the name of a file"),
        (train_step, ["--saves", "{here}/none"], "--saves .*none: no such folder"),
        (encode, ["--images", "0"], "--images 0: must be greater than 0"),
        (encode, ["--vae", "pixel"], "--vae pixel: it computes nothing"),
        (encode, ["--work", "loader"], "--work loader: needs --data"),
        (encode, ["--work", "programs", "--vae", "pixel"], "--work programs: needs --source"),
        (
            encode,
            ["--work", "programs", "--vae", "x", "--source", "x", "--workers", "0"],
            "--workers 0: must be greater",
        ),
        (evaluate, ["--images", "0"], "--images 0: must be greater than 0"),
    ],
)
def test_bad_settings_are_named(tmp_path, program, flags, text):
    with pytest.raises(InputError, match=text):
        program.main([flag.format(here=tmp_path) for flag in flags])


@pytest.mark.parametrize("program", [encode, evaluate, sample, train_step])
def test_the_file_of_results_is_checked_before_measuring(tmp_path, program):
    with pytest.raises(InputError, match=r"--json .*: is a folder; allowed: the name of a file"):
        program.main(["--json", str(tmp_path)])


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find_spec(name))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="measuring a codec: needs the package diffusers"):
        encode.main([])


def test_preprocessing_and_the_loader_are_measured(monkeypatch, tmp_path, data, capsys):
    monkeypatch.setattr(encode, "LOADER_BATCH", 8)
    path = tmp_path / "encode.json"
    flags = f"--work programs loader --source {data / 'images'} --vae pixel --resolution 16 --images 6"
    encode.main([*flags.split(), *f"--workers 1 --batch-size 2 --data {data} --batches 2 --pack --json {path}".split()])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["work"], row["setting"], row.get("images")) for row in rows] == [
        ("convert.py", "1 workers", 6),
        ("encode.py", "batch 1, 1 threads", 6),
        ("encode.py", "batch 2, 1 threads", 6),
        ("loader", "folder, 1 workers", None),
        ("loader", "zip, 1 workers", None),
    ]
    assert all(row["startup_s"] > 0 and row["memory_gb"] > 0 for row in rows[:3])
    assert all(row["images_per_s"] > 0 for row in rows[3:]) and rows[3]["ratio"] == 1
    assert "| loader | zip, 1 workers | 8 |" in capsys.readouterr().out


def test_no_rate_if_the_images_take_no_longer_than_the_start(monkeypatch):
    seconds = iter([3.0, 1.0, 1.0, 1.1])
    monkeypatch.setattr(encode, "run_program", lambda *given: (next(seconds), 0.5))
    rows = [encode.measure_program("convert.py", "1 workers", [], 4, 1) for _ in range(2)]
    assert [row["images_per_s"] for row in rows] == [2.0, None]
    assert (
        timing.markdown_table(encode.COLUMNS, rows[1:])
        .splitlines()[-1]
        .startswith("| convert.py | 1 workers | - | - | - | 0.50 | 1.1 |")
    )


def test_the_cost_of_saving_is_measured(tmp_path, capsys):
    path = tmp_path / "saves.json"
    flags = (
        f"--resolution 64 --rounds 1 --steps 1 --matrix-seconds 0 --forms plain ours --saves {tmp_path} --json {path}"
    )
    train_step.main([*TINY, *flags.split(), "--encoder", ENCODER])
    plain, ours = json.loads(path.read_text())["rows"]
    saves = ours["saves"]
    assert not plain["saves"] and 0 < saves["stall"] <= saves["write"] and saves["gb"] > 0
    assert json.loads(path.read_text())["command"].startswith("python")
    assert "| stall of a save, s |" in capsys.readouterr().out and list(tmp_path.iterdir()) == [path]
