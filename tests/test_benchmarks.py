"""The benchmarks of training run and their reports are complete. No time is asserted."""

import gzip
import importlib.util
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import attention, encode, evaluate, profiling, sample, timing, train_step
from benchmarks.timing import peak_memory, reset_peak_memory, run_measured
from benchmarks.training_steps import OurForm, PlainForm, Workload, write_random_weights
from common.errors import InputError
from models.encoders import load_encoders, untrained_encoder
from tests.conftest import ROOT

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
    assert all(low <= row["seconds"] <= high for row in written["rows"] for low, high in [row["seconds_quartiles"]])
    flops = written["rows"][0]["flops_per_image"]
    assert flops["network"] > flops["encoders"] > 0 and written["matrix_flops"]["bf16"] > 0
    table = capsys.readouterr().out
    assert table.count("| SiT-S/8 | 2 | 64 |") == len(written["rows"])


def test_the_price_of_the_class_slot_and_a_profile_are_measured(tmp_path):
    path = tmp_path / "slot.json"
    flags = "--resolution 64 --rounds 1 --steps 1 --matrix-seconds 0 --forms ours --slot-price"
    flags += f" --profile {tmp_path / 'trace.json.gz'}"
    train_step.main([*TINY, *flags.split(), "--encoder", ENCODER, "--json", str(path)])
    result = json.loads(path.read_text())
    slot, none = result["rows"]
    assert slot["class_slot"] and not none["class_slot"]
    assert slot["flops_per_image"]["network"] > none["flops_per_image"]["network"]
    assert slot["gradient_bytes"] > none["gradient_bytes"]
    kinds = {row["kind"]: row["share"] for row in result["profile"]["kinds"]}
    assert kinds[profiling.MATRIX_PRODUCTS] > 0 and sum(kinds.values()) == pytest.approx(1)
    assert result["profile"]["form"] == "train.py" and (tmp_path / "trace.json.gz").stat().st_size > 0


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


def test_memory_of_a_form_does_not_include_the_other_optimizers_state(monkeypatch):
    work = Workload([*TINY, "--encoder-depth", "1"], ENCODER, 64)
    forms = [PlainForm(work), OurForm(work)]
    losses = [[form.step() for _ in range(2)] and form.finish() for form in forms]
    weights = sum(parameter.nbytes for parameter in work.network.parameters() if parameter.requires_grad)
    monkeypatch.setattr(timing, "peak_memory", lambda device: 10.0)
    for form in forms:
        row = train_step.Row("SiT-S/8", 2, 64, "no", class_slot=True, form=form.name)
        train_step.turn(form, row, 1, [])
        assert row.memory_gb == pytest.approx(10 - 2 * weights / 1e9, abs=1e-5)  # two averages of each gradient
    # The states stay in memory, and the first steps after a reset are those from a new start.
    work.reset()
    assert work.optimizer_bytes(False) >= 2 * weights and work.optimizer_bytes(True) >= 2 * weights
    forms[0].run.step = 0
    for _ in range(2):
        forms[0].step()
    assert forms[0].finish() == losses[0]


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
        (train_step, ["--seconds", "0"], "--seconds 0.0: must be greater than 0"),
        (attention, ["--padded", "64"], "--padded 64: must be greater than --head-size 72"),
        (attention, ["--tokens", "0"], "--tokens 0: must be from 1 to 1,000,000"),
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
        (evaluate, ["--threads", "99999"], "--threads 99999: must be from 1 to 1,024"),
    ],
)
def test_bad_settings_are_named(tmp_path, program, flags, text):
    with pytest.raises(InputError, match=text):
        program.main([flag.format(here=tmp_path) for flag in flags])


@pytest.mark.parametrize("program", [attention, encode, evaluate, sample, train_step])
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


def interrupt(*given):
    raise KeyboardInterrupt


def test_the_time_budget_replaces_the_number_of_rounds(monkeypatch):
    now = iter([0.0, 3.0, 3.0, 5.0, 5.0, 9.0])  # start and end of each round
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    assert list(timing.rounds_until(1, until=8.0)) == [0, 1, 2]  # after the second round two seconds seem to suffice
    now = iter([0.0, 3.0])
    assert list(timing.rounds_until(5, until=1.0)) == [0]
    now = itertools.count()
    assert list(timing.rounds_until(5)) == [0, 1, 2, 3, 4]


def test_quartiles_lie_between_the_measured_values():
    assert timing.quartiles([3, 1, 2, 5, 4]) == [2, 3, 4]
    assert timing.quartiles([1, 2]) == [1.25, 1.5, 1.75] and timing.quartiles([7]) == [7, 7, 7]


def test_numbers_that_are_not_finite_do_not_prevent_results(tmp_path):
    timing.write_result(tmp_path / "r.json", {"rows": [{"loss": float("nan")}]}, torch.device("cpu"))
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [{"loss": None}]


def test_forms_that_were_measured_are_not_lost(monkeypatch, tmp_path):
    path = tmp_path / "steps.json"
    warm_up = train_step.warm_up
    monkeypatch.setattr(
        train_step, "warm_up", lambda form, row: interrupt() if form.name == "train.py" else warm_up(form, row)
    )
    flags = f"--resolution 64 --rounds 1 --steps 1 --matrix-seconds 0 --forms plain ours --json {path}"
    with pytest.raises(KeyboardInterrupt):
        train_step.main([*TINY, *flags.split(), "--encoder", ENCODER])
    plain, ours = json.loads(path.read_text())["rows"]
    assert plain["seconds"] > 0 and len(plain["seconds_quartiles"]) == 2 and plain["utilisation"] > 0
    assert ours["seconds"] is None


def test_a_form_that_stops_fitting_has_no_results(monkeypatch, tmp_path):
    path, turn = tmp_path / "steps.json", train_step.turn

    def full(form, row, steps, turns):
        if form.name == "train.py" and steps == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        turn(form, row, steps, turns)

    monkeypatch.setattr(train_step, "turn", full)
    flags = f"--resolution 64 --rounds 1 --steps 2 --matrix-seconds 0 --forms plain ours --json {path}"
    train_step.main([*TINY, *flags.split(), "--encoder", ENCODER])
    plain, ours = json.loads(path.read_text())["rows"]
    assert plain["seconds"] > 0 and plain["ratio"] == 1
    assert ours["seconds"] is ours["images_per_second"] is ours["utilisation"] is None and not ours["seconds_quartiles"]


def test_the_largest_batch_fits_all_forms_without_compiling_for_each_attempt(monkeypatch):
    tried = []

    def warm_up(form, row):
        tried.append((form, row.batch_size))
        if row.batch_size > {"plain": 4, "ours": 2}[form]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Compiled:
        compiled = True

    class Eager(str):
        compiled = False

    def build_all(config, case, slots):
        return [(form, case) for form in (Eager("plain"), Eager("ours"), Compiled())]

    monkeypatch.setattr(train_step, "warm_up", warm_up)
    monkeypatch.setattr(train_step, "build_all", build_all)
    monkeypatch.setattr(train_step, "release_workloads", lambda: None)
    pairs = train_step.largest_forms(train_step.TrainStep(), train_step.Case("SiT-S/2", 1, 256, "no"), [True])
    assert tried == [("plain", 8), ("plain", 4), ("ours", 4), ("plain", 2), ("ours", 2)]
    assert [case.batch_size for _, case in pairs] == [2, 2, 2]


KERNELS = {
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": profiling.MATRIX_PRODUCTS,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": profiling.MATRIX_PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>": (
        profiling.MATRIX_PRODUCTS
    ),
    "triton_tem_fused_addmm_3": profiling.MATRIX_PRODUCTS,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 64, 64, 4, cutlass::bfloat16_t>>": "attention",
    "fmha_cutlassB_bf16_aligned_64x64_k96_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x96": "attention",
    "triton_poi_fused__scaled_dot_product_flash_attention_view_1": profiling.ELEMENTWISE,
    "triton_per_fused__to_copy_add_mul_native_layer_norm_2": profiling.ELEMENTWISE,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": (
        "optimizer, averaged weights, clipping"
    ),
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>": profiling.ELEMENTWISE,
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>": profiling.ELEMENTWISE,
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "copies, casts, fills",
    "Memcpy DtoD (Device -> Device)": "copies, casts, fills",
    "aten::addmm": profiling.MATRIX_PRODUCTS,
    "aten::mul": profiling.ELEMENTWISE,
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_assigned_to_kinds(name):
    assert profiling.kind_of(name) == KERNELS[name]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_profile_says_where_the_time_goes(tmp_path, capsys, name):
    kernels = [  # start and duration in microseconds; the copy is hidden up to 10 of its 40
        ("kernel", "gemm", 100, 60), ("gpu_memcpy", "Memcpy HtoD", 130, 40),
        ("kernel", "triton_poi_fused_add", 180, 20), ("kernel", "gemm", 200, 100),
    ]  # fmt: skip
    events = [{"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur} for cat, name, ts, dur in reversed(kernels)]
    events += [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900}, {"ph": "M", "name": "process"}]
    text = json.dumps({"traceEvents": events}).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    found = profiling.shares(profiling.read_kernels(tmp_path / name), steps=2)
    assert found["ms"] == pytest.approx(0.1)
    rows = {row["kind"]: (row["ms"], row["share"], row["kernels"]) for row in found["kinds"]}
    assert rows == {
        profiling.MATRIX_PRODUCTS: pytest.approx((0.08, 0.8, 1)),
        "copies, casts, fills": pytest.approx((0.005, 0.05, 0.5)),
        profiling.IDLE: pytest.approx((0.005, 0.05, 0)),
        profiling.ELEMENTWISE: pytest.approx((0.01, 0.1, 0.5)),
    }
    assert [row["name"] for row in found["longest"]] == ["gemm", "triton_poi_fused_add", "Memcpy HtoD"]
    profiling.show(found)
    assert "| gemm | 0.08 | 80.0% | 1 |" in capsys.readouterr().out
    assert profiling.shares([], steps=2)["kinds"] == [{"kind": profiling.IDLE, "ms": 0, "share": 0, "kernels": 0}]


def test_attention_kernels_are_compared_with_the_definition(tmp_path, capsys):
    path = tmp_path / "attention.json"
    flags = "--device cpu --batch-size 2 --heads 2 --tokens 9 --head-size 12 --padded 16 --repeats 2 --dtype float32"
    attention.main([*flags.split(), "--json", str(path)])
    found = json.loads(path.read_text())
    rows = {(row["kernel"], row["head_size"]): row for row in found["rows"]}
    assert len(rows) == 1 + 4 + 3 and found["chosen"] == "flash"
    measured = [(attention.CHOSEN, 12), ("flash", 12), ("math", 12), ("flash", 16)]
    for key in measured:
        assert rows[key]["rms_deviation"] < 1e-6 and rows[key]["gradient_deviation"] < 1e-6
        assert all(rows[key][name] > 0 for name in ("forward_ms", "backward_ms", "tflops", "ratio"))
    assert {row["refused"] for key, row in rows.items() if key not in measured} == {"not available on this device"}
    assert "PyTorch chooses: flash" in capsys.readouterr().out


def test_the_reason_of_a_refusing_kernel_is_short():
    warned = [
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:851.)",
        "Flash attention has been runtime disabled. (Triggered internally at sdp_utils_cpp.h:558.)",
        "cuDNN attention kernel not used because: (Triggered internally at sdp_utils.cpp:855.)",
        "head_dim should be a\n multiple of 8 (Triggered internally at sdp_utils.cpp:400.)",
    ]
    assert attention.reason(warned, "No available kernel. Aborting execution.") == "head_dim should be a multiple of 8"
    assert attention.reason(warned[:3], "No available kernel. Aborting execution.") == "not available on this device"
    assert attention.reason([], "cuDNN Frontend error: x | y") == "cuDNN Frontend error: x / y"


def test_the_evaluator_is_extrapolated_from_the_samples_that_fit(monkeypatch, tmp_path):
    sizes = []

    def run_measured(command):
        (tmp_path / "out.json").write_text('{"seconds": 6.0}')
        return 10.0, 1.5

    monkeypatch.setattr(timing, "run_measured", run_measured)
    monkeypatch.setattr(evaluate, "write_noise", lambda path, count: sizes.append(count) or path)
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: 0.0)  # writing takes no time
    config = evaluate.Evaluate(evaluate=50_000, references=2_000)
    found = evaluate.run_evaluator(tmp_path, tmp_path / "w.pt", config, rate=500.0, until=evaluate.ASSUMED_START + 8)
    assert sizes == [2_000, 2_000]
    assert found["at_least_seconds"] == 10 + 48_000 / 500 and found["at_most_seconds"] == 10 + 6 * 12
    complete = evaluate.run_evaluator(tmp_path, tmp_path / "w.pt", config, rate=500.0, until=None)
    assert complete["samples"] == 50_000 and "at_most_seconds" not in complete


def test_noise_images_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "RESOLUTION", 8)
    monkeypatch.setattr(evaluate, "NOISE_IMAGES", 4)
    images = np.load(evaluate.write_noise(tmp_path / "noise.npz", 10))["arr_0"]
    assert images.shape == (10, 8, 8, 3) and len(np.unique(images, axis=0)) == 10


def test_no_program_on_a_gpu_needs_optional_packages(tmp_path):
    """Training without grids, the tests and the benchmarks run without diffusers and trackers."""
    modules = "generate benchmarks.sample benchmarks.evaluate benchmarks.attention benchmarks.encode"
    modules += " benchmarks.train_step experiments.convergence tests.conftest evaluations.evaluator"
    flags = f"--resolution 64 --rounds 1 --steps 1 --matrix-seconds 0 --forms ours --encoder {ENCODER}"
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys(["diffusers", "wandb", "tensorboard"]))  # their import fails
for name in {modules!r}.split():
    importlib.import_module(name)
from benchmarks import timing, train_step
timing.MATRIX["cpu"] = 64
train_step.main({[*TINY, *flags.split(), "--json", str(tmp_path / "steps.json")]})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "steps.json").read_text())["rows"][0]["seconds"] > 0
