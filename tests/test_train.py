from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from common.errors import InputError
from models.checkpoint import load_checkpoint, load_model
from models.interpolant import Interpolant
from models.sit import SiT, SiTConfig
from samplers import sample_images
from tests.conftest import NUM_CLASSES, read_rows, reset_accelerate, run_program, run_training
from training.config import parse_args
from training.preemption import StopSignal

MODES = {
    "reg": [],
    "repa": ["--no-cls-token"],
    "sit": ["--no-cls-token", "--enc-type", "none"],
    "entangled, not aligned": ["--proj-coeff", "0"],
}


def with_flags(flags: list[str], *more: str) -> list[str]:
    return [*flags, "--max-train-steps", "4", "--exp-name", "run", *more]


def terms(run, *names):
    return [[row[name] for name in names or ("loss", "denoise", "proj", "cls", "grad_norm")] for row in read_rows(run)]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_saves_and_loads(train_flags, mode):
    run = run_training(with_flags(train_flags, *MODES[mode], "--path-type", "cosine"))
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    expected = {"reg": {"proj", "cls"}, "repa": {"proj"}, "sit": set(), "entangled, not aligned": {"cls"}}[mode]
    assert {"proj", "cls"} & rows[0].keys() == expected
    checkpoint = load_checkpoint(run / "checkpoints" / "0000004.pt")
    assert checkpoint["steps"] == 4 and checkpoint["args"].exp_name == "run"
    model = load_model(run / "checkpoints" / "0000004.pt")
    assert (model.cls_token_dim, len(model.projectors)) == (32 if "cls" in expected else None, int("proj" in expected))
    assert model.num_classes == NUM_CLASSES
    assert (run / "loss.png").exists()


ENTANGLED = {"class": (32, 32), "patch-mean": (32, 32), "latent-mean": (3, 3), "learnable": (None, None)}


@pytest.mark.parametrize("kind", ENTANGLED)
@pytest.mark.parametrize("align", [True, False])
def test_each_entangled_signal_trains_saves_loads_and_samples(train_flags, kind, align):
    more = [] if align else ["--proj-coeff", "0"]
    run = run_training(with_flags(train_flags, "--entangle", kind, *more))
    width, _ = ENTANGLED[kind]
    rows = read_rows(run)
    assert ("cls" in rows[0], "proj" in rows[0]) == (width is not None, align)
    path = run / "checkpoints" / "0000004.pt"
    model = load_model(path)
    assert model.cls_token_dim == width and (model.slot_token is not None) == (kind == "learnable")
    assert model.pos_embed.shape[1] == 17
    latents, cls_tokens = sample_images(model, [0, 1], [1, 2], Interpolant(), num_steps=3)
    assert latents.isfinite().all() and (cls_tokens is None if width is None else cls_tokens.shape == (2, width))
    if kind == "learnable":  # it learns, through what the other tokens read from it
        torch.manual_seed(0)
        fresh = SiT(SiTConfig.from_json(load_checkpoint(path)["network"]))
        assert not torch.equal(load_model(path, "model").slot_token, fresh.slot_token)


def test_entangling_nothing_is_repa(train_flags):
    one = run_training(with_flags(train_flags, "--entangle", "none"))
    other = run_training(with_flags(train_flags, "--no-cls-token", "--exp-name", "other"))
    assert terms(one, "loss", "denoise", "proj") == terms(other, "loss", "denoise", "proj")
    resumed = run_training(
        with_flags(train_flags, "--no-cls-token", "--resume", "latest", "--max-train-steps", "5")
    )  # the two flags say the same
    assert len(read_rows(resumed)) == 5


def test_the_methods_start_equally(train_flags):
    """A step's data, times and noise, and the initial weights, are the same with and without slot and projectors."""
    first, weights = {}, {}
    for mode, flags in MODES.items():
        flags = with_flags(
            train_flags, *flags, "--exp-name", mode, "--max-train-steps", "1", "--learning-rate", "1e-30"
        )
        run = run_training(flags)
        first[mode] = terms(run, "denoise")
        torch.manual_seed(0)
        config = SiTConfig.from_json(load_checkpoint(run / "checkpoints" / "0000001.pt")["network"])
        weights[mode] = SiT(config).state_dict()
    assert len({str(value) for value in first.values()}) == 1
    for state in weights.values():
        shared = [key for key in state if key in weights["reg"] and key != "pos_embed"]
        assert len(shared) > 20 and all(torch.equal(state[key], weights["reg"][key]) for key in shared)


def test_loss_falls(train_flags):
    run = run_training(with_flags(train_flags, "--max-train-steps", "60", "--learning-rate", "0.003"))
    values = np.array(terms(run, "denoise", "proj", "cls"))
    assert (values[-10:].mean(axis=0) < values[:10].mean(axis=0) - 0.05).all()


def test_a_resumed_run_equals_one_never_stopped(train_flags):
    undisturbed = run_training(
        with_flags(train_flags, "--exp-name", "undisturbed", "--log-steps", "3", "--max-train-steps", "6")
    )
    flags = with_flags(train_flags, "--log-steps", "3", "--checkpointing-steps", "2")
    run_training([*flags, "--max-train-steps", "4"])
    (undisturbed.parent / "run" / "checkpoints" / "0000004.pt").unlink()  # as if the run had died in step 4
    resumed = run_training([*flags, "--max-train-steps", "6", "--resume", "latest"])
    a, b = (load_checkpoint(run / "checkpoints" / "0000006.pt") for run in (undisturbed, resumed))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    for index, state in a["opt"]["state"].items():
        assert all(torch.equal(value, b["opt"]["state"][index][name]) for name, value in state.items())
    assert [row["step"] for row in read_rows(resumed)] == [3, 6]
    assert terms(undisturbed) == terms(resumed)


def test_checkpoints_by_minutes_change_nothing_and_do_not_fill_the_disk(train_flags, said):
    flags = ["--max-train-steps", "6", "--checkpointing-steps", "4", "--no-background-save"]
    runs = [
        run_training(with_flags(train_flags, *flags, "--exp-name", minutes, "--checkpointing-minutes", minutes))
        for minutes in ("0", "1e-9")
    ]
    names = [sorted(path.name for path in (run / "checkpoints").glob("*")) for run in runs]
    assert names == [["0000004.pt", "0000004.pt.sha256", "0000006.pt", "0000006.pt.sha256"]] * 2
    a, b = (load_checkpoint(run / "checkpoints" / "0000006.pt") for run in runs)
    assert all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])
    assert terms(runs[0]) == terms(runs[1])
    assert sum("1e-9/checkpoints" in line and "to be replaced by the next one" in line for line in said) == 4


def test_the_log_of_a_run_can_be_read(train_flags, capsys):
    folder = run_training(with_flags(train_flags, "--log-steps", "2"))
    text = (folder / "log.txt").read_text()
    assert text == capsys.readouterr().out
    messages = [line[21:] for line in text.splitlines()]
    subjects = ["run", "device", "batch", "network", "encoder", "data", "loss", "steps", "files"]
    assert [line.split()[0] for line in messages[:9]] == subjects and all(line[7:9] == "  " for line in messages[:9])
    start = "\n".join(messages[:9])
    expected = """exps/run, new; last step 4|float32|1 process x 8 samples = 8 samples per step|SiT-S/4, 2 blocks
        |24 images of 16 px, 3 classes, latents 3 x 16 x 16, codec pixel|1 denoise + 0.5 proj + 0.03 cls; linear path
        |learning rate 0.001|row every 2 steps, checkpoint every 50,000 steps and 30 min"""
    for part in expected.split("|"):
        assert part.strip() in start
    rows = [line.split("  ") for line in messages if line.startswith("step ")]
    assert [row[0] for row in rows] == ["step 2 / 4", "step 4 / 4"]
    assert rows[0][1].startswith("loss 1.") and rows[0][-1].endswith(" left") and "images/s" in text
    assert messages[-1] == f"next         python generate.py --ckpt {folder}/checkpoints/0000004.pt"
    run_training(with_flags(train_flags, "--resume", "latest", "--max-train-steps", "5"))
    more = (folder / "log.txt").read_text()
    assert more.startswith(text) and f"resumed from step 4 of {folder}/checkpoints/0000004.pt; last step 5" in more


def test_a_run_that_is_stopped_says_how_it_resumes(train_flags, said):
    reset_accelerate()
    signal = StopSignal()
    signal.received = True
    run = train.set_up(train.parse_args(with_flags(train_flags)), signal)
    assert train.train(run) is False
    assert "info: a signal asks the run to stop: it saves a checkpoint and ends" in said
    assert said[-1] == "info: stopped at step 1 of 4; the same command with --resume latest resumes from this step"


def test_an_exception_ends_the_log(train_flags, monkeypatch):
    monkeypatch.setattr(train, "training_step", lambda run, batches: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_training(with_flags(train_flags))
    folder = Path(train_flags[train_flags.index("--output-dir") + 1]) / "run"
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert last.endswith("  error: ZeroDivisionError: division by zero")


def test_resume_step_and_published_optimizer_layout(train_flags):
    flags = with_flags(train_flags, "--checkpointing-steps", "2")
    run_training(flags)
    run = run_training([*flags, "--max-train-steps", "5", "--resume-step", "2"])
    assert [row["step"] for row in read_rows(run)] == [1, 2, 3, 4, 5]
    parameters = load_checkpoint(run / "checkpoints" / "0000005.pt")["opt"]["param_groups"][0]["params"]
    assert parameters == list(range(len(parameters)))


@pytest.mark.parametrize("more", [["--gradient-accumulation-steps", "2"], ["--mixed-precision", "bf16"]])
def test_accumulation_and_bf16_change_rounding_only(train_flags, more):
    plain = run_training(with_flags(train_flags, "--exp-name", "plain"))
    other = run_training(with_flags(train_flags, *more))
    tolerance = 1e-5 if "bf16" not in more else 0.02
    np.testing.assert_allclose(terms(plain), terms(other), rtol=tolerance, atol=tolerance)


@pytest.mark.cpu
def test_two_processes_give_the_losses_of_one(train_flags):
    one = run_training(with_flags(train_flags, "--exp-name", "one"))
    more = ["--exp-name", "two", "--checkpointing-minutes", "1e-9"]  # all processes save at the same steps
    more += [] if torch.cuda.is_available() else ["--device", "auto"]  # without GPUs the processes join as well
    result = run_program("train.py", *with_flags(train_flags, *more), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    np.testing.assert_allclose(terms(one), terms(one.parent / "two"), rtol=1e-5, atol=1e-6)
    a, b = (load_checkpoint(one.parent / name / "checkpoints" / "0000004.pt")["ema"] for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    text = (one.parent / "two" / "log.txt").read_text()
    assert text == result.stdout and "2 processes x 4 samples = 8 samples per step" in text
    assert [text.count(f"  step {step} / 4  loss ") for step in range(1, 5)] == [1, 1, 1, 1]
    assert ", to be replaced by the next one" in text
    assert [path.name for path in (one.parent / "two" / "checkpoints").glob("*.pt")] == ["0000004.pt"]


@pytest.mark.cpu
def test_an_indivisible_batch_is_refused_by_all_processes(train_flags):
    result = run_program("train.py", *with_flags(train_flags, "--batch-size", "9"), processes=2)
    assert result.returncode != 0
    assert "--batch-size 9 (global) is not divisible by 2 processes x 1" in result.stderr


def test_grids_and_tracker(train_flags):
    pytest.importorskip("wandb")
    flags = ["--sampling-steps", "2", "--grid-samples", "4", "--grid-num-steps", "2", "--grid-cfg-scale", "1.5"]
    run = run_training(with_flags(train_flags, *flags))
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == ["0000002.png", "0000004.png", "reconstructions.png"]
    grid = np.array(Image.open(run / "samples" / "reconstructions.png"))
    line = (grid.shape[0] - 2 * 64 - 2) // 2  # of captions
    assert 10 < line < 20 and grid.shape[1:] == (2 * 64 + 2, 3)
    first = np.array(Image.open(train_flags_data(train_flags) / "images/00000/img00000000.png"))
    assert np.array_equal(grid[line : line + 64 : 4, :64:4], first)  # enlarged four times


def train_flags_data(flags):
    return Path(flags[flags.index("--data-dir") + 1])


def test_defaults_are_the_papers_recipe():
    flags = ["--exp-name", "x", "--device", "cpu"]
    args = parse_args(flags)
    found = (args.model, args.batch_size, args.cls, args.proj_coeff, args.ema_decay)
    assert found == ("SiT-XL/2", 256, 0.03, 0.5, 0.9999)
    assert (args.learning_rate, args.max_grad_norm, args.cfg_prob, args.enc_type) == (1e-4, 1.0, 0.1, "dinov2-vit-b")


def test_every_flag_of_the_published_script_is_taken():
    line = """--output-dir=exps --exp-name=x --logging-dir=logs --report-to=none --sampling-steps=10000 --resume-step=0
        --model=SiT-B/2 --num-classes=1000 --encoder-depth=4 --fused-attn --no-qk-norm --data-dir=data/imagenet
        --resolution=256 --batch-size=256 --allow-tf32 --mixed-precision=no --epochs=1400 --max-train-steps=1000000
        --checkpointing-steps=50000 --gradient-accumulation-steps=1 --learning-rate=1e-4 --adam-beta1=0.9
        --adam-beta2=0.999 --adam-weight-decay=0. --adam-epsilon=1e-08 --max-grad-norm=1.0 --seed=0 --num-workers=4
        --path-type=linear --prediction=v --cfg-prob=0.1 --enc-type=dinov2-vit-b --proj-coeff=0.5 --weighting=uniform
        --no-legacy --cls=0.03"""
    args = parse_args(line.split())
    assert args.encoder_depth == 4 and args.adam_weight_decay == 0.0


BAD = {
    "unknown model": (["--model", "SiT-H/2"], "--model SiT-H/2: must be one of SiT-S/1"),
    "classes": (["--num-classes", "2"], "--num-classes 2: the data in .* have 3"),
    "resolution": (["--resolution", "32"], "--resolution 32: the data in .* have 16"),
    "grid scale": (["--grid-cfg-scale", "0"], r"--grid-cfg-scale 0\.0: must be 1 \(no guidance\) or greater"),
    "batch": (["--gradient-accumulation-steps", "3"], r"--batch-size 8 \(global\) is not divisible"),
    "cuda": (["--device", "cuda"], "--device cuda: no CUDA device is available"),
    "fp16": (["--mixed-precision", "fp16"], "--mixed-precision fp16, by this flag or .*, needs a CUDA device"),
    "tokens": (["--model", "SiT-S/2"], "16 tokens .* 64 latent tokens"),
    "slot": (["--enc-type", "none"], "--enc-type none: the class slot needs an encoder"),
    "patch mean": (
        ["--enc-type", "none", "--entangle", "patch-mean"],
        "--enc-type none: the class slot needs an encoder",
    ),
    "slot twice": (["--entangle", "class", "--no-cls-token"], "--entangle class contradicts --no-cls-token"),
    "no slot": (["--entangle", "none", "--cls-token"], "--entangle none contradicts --cls-token"),
    "depth": (["--encoder-depth", "3"], r"encoder_depth 3 is outside 1 \.\. 2"),
    "no blocks": (["--depth", "0"], "--depth 0: must be from 1 to 1,000"),
    "seed": (["--seed", str(2**64)], r"--seed \d+: must be from 0 to 2\^63 - 1"),
    "no name": (["--exp-name", "."], r"--exp-name \.: must be the name of a folder"),
    "no weights": (["--init-from", "nothing.pt"], r"nothing\.pt: no such file or folder"),
    "negative": (["--cls", "-1"], "--cls -1.0: must be 0 or greater"),
    "share": (["--cfg-prob", "1.1"], r"--cfg-prob 1\.1: must be from 0 to 1"),
    "guided grid": (["--cfg-prob", "1", "--grid-cfg-scale", "2"], "--grid-cfg-scale 2: --cfg-prob 1 trains without l"),
    "no checkpoint": (["--resume-step", "7"], r"--resume-step 7: .*0000007\.pt does not exist; existing steps: none"),
    "no file to resume": (["--resume", "newest"], r"--resume newest: no such file or folder; allowed: latest, or a"),
    "both": (["--resume-step", "7", "--resume", "x.pt"], "give one of them"),
    "encoder": (["--enc-type", "dinov2-vit-x"], "dinov2-vit-x"),
    "codec": (["--sampling-steps", "1", "--vae", "no/such/folder/here"], "no/such/folder/here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named_before_anything_is_written(train_flags, case, tmp_path):
    flags, text = BAD[case]
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(InputError, match=text):
        run_training(with_flags(train_flags, *flags))
    assert not list((tmp_path / "exps").rglob("*.pt")) and not list((tmp_path / "exps").rglob("metrics.jsonl"))


def test_a_run_is_never_overwritten_or_mixed_with_another(train_flags):
    flags = with_flags(train_flags)
    run = run_training(flags)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="already holds a run; resume it with --resume latest"):
        run_training(flags)
    with pytest.raises(InputError, match=r"--adam-beta1 is 0\.5, but .* was started with 0\.9"):
        run_training([*flags, "--resume", "latest", "--adam-beta1", "0.5"])
    with pytest.raises(InputError, match=r"--seed is 3, but .* was started with 0"):
        run_training([*flags, "--resume", "latest", "--seed", "3"])
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_starts_from_the_weights_of_another(train_flags, data, capsys):
    """With a learning rate near zero these weights are unchanged after a step."""
    first = run_training(with_flags(train_flags, "--exp-name", "first")) / "checkpoints" / "0000004.pt"
    given = load_checkpoint(first)["ema"]
    more = ["--max-train-steps", "1", "--learning-rate", "1e-30", "--num-classes", "9", "--init-from", str(first)]
    run = run_training(with_flags(train_flags, *more))
    assert f"weights of {first}; newly initialized: y_embedder.embedding_table.weight\n" in capsys.readouterr().out
    for part in ("model", "ema"):
        initial = load_checkpoint(run / "checkpoints" / "0000001.pt")[part]
        assert initial.keys() == given.keys() and initial["y_embedder.embedding_table.weight"].shape[0] == 10
        same = [name for name in given if torch.equal(initial[name], given[name])]
        assert len(same) == len(given) - 1
    with pytest.raises(InputError, match=r"--init-from .*0000004\.pt: holds another network than .*; blocks\.1\."):
        run_training(with_flags(train_flags, *more, "--exp-name", "shallow", "--depth", "1", "--encoder-depth", "1"))


@pytest.mark.parametrize(("name", "value"), [("--proj-coeff", "nan"), ("--learning-rate", "inf"), ("--cls", "much")])
def test_values_that_are_no_numbers_are_refused(train_flags, name, value):
    with pytest.raises(InputError, match=f"{name}: '{value}' is not a finite number"):
        parse_args([*train_flags, "--exp-name", "run", name, value])


def test_epochs_end_a_run_only_if_given(train_flags):
    run = run_training(with_flags(train_flags, "--epochs", "1", "--max-train-steps", "100"))
    assert [row["step"] for row in read_rows(run)] == [1, 2, 3]  # 24 images in batches of 8


def test_another_optimizer_is_one_edit(train_flags, data, monkeypatch, capsys):
    """Its bad steps are skipped, with a note at the start, and its state is restored."""
    path = data / "vae-sd" / "00000" / "img-mean-std-00000007.npy"
    np.save(path, np.full_like(np.load(path), np.nan))
    monkeypatch.setattr(
        "training.state.make_optimizer",
        lambda network, config: torch.optim.NAdam(network.parameters(), config.learning_rate),
    )
    flags = with_flags(train_flags, "--data-dir", str(data), "--checkpointing-steps", "2", "--max-train-steps", "6")
    undisturbed = run_training([*flags, "--exp-name", "undisturbed"])
    assert capsys.readouterr().out.count("note: NAdam does not honour found_inf") == 1
    run_training([*flags, "--max-train-steps", "4"])
    resumed = run_training([*flags, "--resume", "latest"])
    a, b = (load_checkpoint(run / "checkpoints" / "0000006.pt") for run in (undisturbed, resumed))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) and a[part][key].isfinite().all() for key in a[part])
    assert sum(row.get("bad_steps", 0) for row in read_rows(undisturbed)) == 2


def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(train_flags, data):
    path = data / "images" / "00000" / "img00000007.png"
    undisturbed = path.read_bytes()
    path.write_bytes(
        undisturbed[:60] + bytes(len(undisturbed) - 72) + undisturbed[-12:]
    )  # its end is intact, so --check-data does not detect it
    flags = with_flags(train_flags, "--data-dir", str(data), "--num-workers", "1")
    with pytest.raises(InputError) as caught:
        run_training(flags)
    assert "img00000007.png: not an image that can be read: its data is damaged" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_encoder_of_another_width_does_not_fit_the_checkpoint(train_flags, tmp_path):
    import timm
    from safetensors.torch import save_file

    run_training(with_flags(train_flags))
    options = {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **options)
    save_file(network.state_dict(), tmp_path / "wide.safetensors")
    spec = "timm/vit_tiny_patch16_224:input=16:patch_size=4:embed_dim=48:depth=1:num_heads=2"
    more = ["--resume", "latest", "--enc-type", spec, "--enc-weights", str(tmp_path / "wide.safetensors")]
    with pytest.raises(InputError, match=r"--enc-type is .*embed_dim=48.* was started with .*embed_dim=32"):
        run_training(with_flags(train_flags, *more))


def test_errors_reach_the_user_as_one_line(train_flags):
    result = run_program("train.py", *with_flags(train_flags, "--num-classes", "2"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("train.py: error: --num-classes 2")
