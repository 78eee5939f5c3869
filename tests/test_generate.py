import hashlib
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from common.classes import ClassSet
from common.errors import InputError
from evaluations import evaluator
from evaluations.batches import open_images
from generation.config import DEFAULT_COUNT
from models.autoencoder import PixelCodec
from models.checkpoint import load_checkpoint, save_checkpoint
from models.encoders import load_encoder
from tests.conftest import DEVICE, NUM_CLASSES, ROOT, run_generate, run_program, run_training
from tests.test_checkpoint import content
from tests.test_sit import randomise, small
from tests.test_train import MODES, with_flags


@pytest.fixture
def checkpoint(train_flags):
    run = run_training(with_flags(train_flags, "--max-train-steps", "2", "--qk-norm"))
    return run / "checkpoints" / "0000002.pt"


def flags(checkpoint, tmp_path, name, *more):
    line = ["--ckpt", str(checkpoint), "--sample-dir", str(tmp_path / "samples"), "--name", name, "--device", DEVICE]
    return [*line, "--num-fid-samples", "7", "--num-steps", "3", "--per-proc-batch-size", "2", *more]


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "images").glob("*.png")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampler", [[], ["--mode", "ode", "--heun"], ["--mode", "ode", "--solver", "dopri5"]])
def test_each_mode_generates(train_flags, tmp_path, monkeypatch, mode, sampler):
    run = run_training(with_flags(train_flags, *MODES[mode], "--max-train-steps", "1"))
    run_generate(flags(run / "checkpoints" / "0000001.pt", tmp_path, "a", "--cfg-scale", "1.5", *sampler), monkeypatch)
    assert len(hashes(tmp_path / "samples" / "a")) == 7


def test_what_a_set_holds(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--save-cls", "--label-sampling", "balanced"), monkeypatch)
    folder = tmp_path / "samples" / "a"
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        images = archive["arr_0"]
    assert images.shape == (7, 16, 16, 3) and images.dtype == np.uint8
    for number in range(7):
        assert np.array_equal(images[number], np.array(Image.open(folder / "images" / f"{number:06d}.png")))
    cls_tokens = np.load(folder / "cls_tokens.npy")
    assert cls_tokens.shape == (7, 32) and np.isfinite(cls_tokens).all() and cls_tokens.std() > 0
    labels = json.loads((folder / "images" / "dataset.json").read_text())["labels"]
    assert labels == [[f"{n:06d}.png", n % NUM_CLASSES] for n in range(7)]
    settings = json.loads((folder / "samples.json").read_text())
    assert settings["label_sampling"] == "balanced" and settings["steps"] == 2 and settings["vae"] == "pixel"
    assert Image.open(folder / "grid.png").size[0] > 16
    assert sorted(path.name for path in folder.iterdir()) == [
        "cls_tokens.npy", "grid.png", "images", "samples.json", "samples.npz",
    ]  # fmt: skip


@pytest.mark.cpu
def test_files_do_not_depend_on_processes_and_an_interrupted_set_is_completed(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "one", "--save-cls", "--device", "cpu"), monkeypatch)
    one = tmp_path / "samples" / "one"
    automatic = flags(checkpoint, tmp_path, "two", "--save-cls", "--device", "auto")  # the last one counts
    with monkeypatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        result = run_program("generate.py", *automatic, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("samples.npz") == 1  # the two processes have joined
    two = tmp_path / "samples" / "two"
    assert hashes(one) == hashes(two)
    assert (one / "samples.npz").read_bytes() == (two / "samples.npz").read_bytes()
    assert np.array_equal(np.load(one / "cls_tokens.npy"), np.load(two / "cls_tokens.npy"))

    kept = one / "images" / "000000.png"
    before, stamp = hashes(one), kept.stat().st_mtime_ns
    for number in (2, 3, 6):
        (one / "images" / f"{number:06d}.png").unlink()
    run_generate(flags(checkpoint, tmp_path, "one", "--save-cls", "--device", "cpu"), monkeypatch)
    assert hashes(one) == before and kept.stat().st_mtime_ns == stamp


def test_another_batch_size_and_more_images_leave_images_as_they_are(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a"), monkeypatch)
    run_generate(flags(checkpoint, tmp_path, "b", "--per-proc-batch-size", "5", "--num-fid-samples", "9"), monkeypatch)
    for number in range(7):
        a, b = (
            np.array(Image.open(tmp_path / "samples" / name / "images" / f"{number:06d}.png")).astype(int)
            for name in "ab"
        )
        assert abs(a - b).max() <= 1  # one level, where rounding falls on the other side


def test_chosen_classes(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--classes", "2,0"), monkeypatch)
    labels = json.loads((tmp_path / "samples/a/images/dataset.json").read_text())["labels"]
    assert {label for _, label in labels} == {0, 2}


def with_classes(untrained, classes):
    """Give a checkpoint the classes of its training data."""
    save_checkpoint(untrained, {**load_checkpoint(untrained), "classes": classes.to_json()})


def test_a_set_records_its_classes_and_is_completed_with_them(untrained, tmp_path, monkeypatch, capsys):
    with_classes(untrained, ClassSet((0, 2), ("tench", "jay")))
    run_generate(flags(untrained, tmp_path, "a"), monkeypatch)
    labels = json.loads((tmp_path / "samples/a/images/dataset.json").read_text())["labels"]
    assert {label for _, label in labels} == {0, 2}
    assert json.loads((tmp_path / "samples/a/samples.json").read_text())["drawn_labels"] == "0,2"
    assert "warning" not in capsys.readouterr().err

    run_generate(flags(untrained, tmp_path, "b", "--classes", "jay,0-1"), monkeypatch)
    labels = json.loads((tmp_path / "samples/b/images/dataset.json").read_text())["labels"]
    assert {label for _, label in labels} == {0, 1, 2}
    assert json.loads((tmp_path / "samples/b/samples.json").read_text())["drawn_labels"] == "2,0-1"
    warning = "--classes jay,0-1: label 1 does not occur in the training data; the network was never trained on it"
    assert f"warning: {warning}\n" in capsys.readouterr().err

    note = tmp_path / "samples/a/samples.json"  # as an earlier version wrote it
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "drawn_labels"}))
    run_generate(flags(untrained, tmp_path, "a"), monkeypatch)


def test_a_contradiction_without_effect_is_a_warning(untrained, tmp_path, monkeypatch, capsys):
    run_generate(flags(untrained, tmp_path, "a", "--encoder-depth", "8", "--legacy"), monkeypatch)
    error = capsys.readouterr().err
    for text in ("--encoder-depth is 8, but", "--legacy is True, but"):
        line = next(line for line in error.splitlines() if text in line)
        assert line.startswith("warning: ") and line.endswith("without effect on the images")


def test_the_number_of_images_is_small_unless_given_or_started_with(untrained, tmp_path, monkeypatch, capsys):
    line = ["--ckpt", str(untrained), "--sample-dir", str(tmp_path), "--device", DEVICE, "--num-steps", "1"]
    run_generate([*line, "--name", "new"], monkeypatch)
    assert len(hashes(tmp_path / "new")) == DEFAULT_COUNT == 64
    assert "64 images; for FID: --num-fid-samples 50000" in capsys.readouterr().err
    run_generate([*line, "--name", "a", "--num-fid-samples", "5"], monkeypatch)
    (tmp_path / "a" / "images" / "000003.png").unlink()
    assert "for FID" not in capsys.readouterr().err
    run_generate([*line, "--name", "a"], monkeypatch)
    assert len(hashes(tmp_path / "a")) == 5 and "5 images; for FID" in capsys.readouterr().err
    with pytest.raises(InputError, match="--num-fid-samples 10000000001: must be from 1 to 10,000,000"):
        run_generate([*line, "--num-fid-samples", "10000000001"], monkeypatch)


def test_the_gpu_of_an_old_launcher(untrained, monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr(generate, "start_processes", lambda *given, **more: None)
    for device, rank in (("auto", 1), ("cpu", 7)):  # the CPU has no numbers
        generate.start_accelerator(generate.GenerateConfig(ckpt=str(untrained), device=device, local_rank=rank))
    assert chosen == [1]
    with pytest.raises(InputError, match=r"^--local-rank 2: PyTorch finds 2 GPUs; allowed: 0 \.\. 1$"):
        generate.start_accelerator(generate.GenerateConfig(ckpt=str(untrained), local_rank=2))


def test_the_published_script_finds_the_npz(untrained, tmp_path, monkeypatch, capsys):
    line = ["--ckpt", str(untrained), "--sample-dir", str(tmp_path / "samples"), "--device", DEVICE]
    line += ["--num-fid-samples", "2", "--cfg-scale", "2.3", "--guidance-high", "0.85"]
    run_generate([*line, "--num-steps", "1"], monkeypatch)
    said = capsys.readouterr().out.splitlines()
    name = "SiT-0000012-size-8-vae-pixel-cfg-2.3-seed-0-sde-0.85-2.3.npz"
    link = tmp_path / "samples" / name
    assert link.is_symlink() and not os.readlink(link).startswith("/")
    assert said[-2].startswith(f"{link}: ") and link.samefile(said[-1])
    assert evaluator.read_sampling(open_images(link).path)["num_steps"] == 1
    run_generate([*line, "--num-steps", "2"], monkeypatch)  # the latest set has the name
    assert link.resolve().parent.name.startswith("x-0000012-ema-sde-2-cfg")
    run_generate([*line, "--num-steps", "2", "--name", "named", "--global-seed", "1"], monkeypatch)
    assert len(list((tmp_path / "samples").glob("*.npz"))) == 1


def test_the_bar_moves_with_the_sampling_steps(untrained, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setenv("TQDM_DISABLE", "1")  # tqdm's own bar, hidden
    monkeypatch.setattr(generate.tqdm, "update", lambda self, count: moved.append(count))
    run_generate(flags(untrained, tmp_path, "a"), monkeypatch)  # 7 images, 2 at a time, 3 steps
    # After a batch, the bar is set to the images that are done; it has not moved, because `update` is replaced.
    batches = ((2, 2), (2, 4), (2, 6), (1, 7))
    assert moved == pytest.approx([count for images, done in batches for count in (*[images / 3] * 3, done)])


def test_known_settings_may_be_repeated(checkpoint, tmp_path, monkeypatch):
    known = "--num-classes 3 --encoder-depth 1 --resolution 16 --qk-norm --projector-embed-dims 32 --cls 32"
    known += " --path-type linear --no-legacy --vae pixel --heun --mode ode --no-npz"
    run_generate(flags(checkpoint, tmp_path, "a", *known.split()), monkeypatch)
    assert not (tmp_path / "samples" / "a" / "samples.npz").exists()


def read_images(folder):
    return np.stack([np.array(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]).astype(int)


def test_half_precision_changes_images_little_and_is_part_of_the_settings(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "full"), monkeypatch)
    run_generate(flags(checkpoint, tmp_path, "half", "--network-dtype", "bf16"), monkeypatch)
    full, half = (read_images(tmp_path / "samples" / name) for name in ("full", "half"))
    assert 0 < abs(full - half).mean() < 2  # levels of 255
    assert json.loads((tmp_path / "samples/half/samples.json").read_text())["network_dtype"] == "bf16"
    with pytest.raises(InputError, match="made with --network-dtype bf16, not --network-dtype float32"):
        run_generate(flags(checkpoint, tmp_path, "half"), monkeypatch)


def test_the_last_batch_is_filled_up_for_a_compiled_network(checkpoint, tmp_path, monkeypatch):
    sizes = set()

    def record_sizes(model):
        model.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))

    monkeypatch.setattr("models.inference.compile_blocks", record_sizes)
    run_generate(flags(checkpoint, tmp_path, "plain", "--save-cls"), monkeypatch)
    assert not sizes
    more = ["--compile", "--save-cls", "--cfg-scale", "1.0"]
    run_generate(flags(checkpoint, tmp_path, "filled", *more), monkeypatch)  # 7 images, 2 at a time
    assert sizes == {2}
    plain, filled = (tmp_path / "samples" / name for name in ("plain", "filled"))
    assert abs(read_images(plain) - read_images(filled)).max() <= 1
    np.testing.assert_allclose(np.load(plain / "cls_tokens.npy"), np.load(filled / "cls_tokens.npy"), atol=1e-5)


def test_the_batch_size_is_found(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--per-proc-batch-size", "auto"), monkeypatch)
    assert json.loads((tmp_path / "samples/a/samples.json").read_text())["per_proc_batch_size"] == 8


BAD = {
    "model": (["--model", "SiT-XL/2"], "--model is SiT-XL/2, but .* has SiT-S/4"),
    "classes": (["--num-classes", "1000"], "--num-classes is 1000, but .* has 3"),
    "resolution": (["--resolution", "256"], "--resolution is 256, but .* has 16"),
    "qk norm": (["--no-qk-norm"], "--qk-norm is none, but .* has layer"),
    "projectors": (["--projector-embed-dims", "768"], "--projector-embed-dims is 768, but .* has 32"),
    "cls": (["--cls", "768"], "--cls is 768, but .* has 32"),
    "path": (["--path-type", "cosine"], "--path-type is cosine, but .* has linear"),
    "class": (["--classes", "5"], r"--classes 5: the network has classes 0 \.\. 2"),
    "class names": (["--classes", "cat"], "--classes 'cat': expected labels .*no names here"),
    "no class": (["--classes", ""], "--classes '': expected labels"),
    "sde solver": (["--heun"], "--solver heun is a solver of the ODE"),
    "steps": (["--num-steps", "0"], "--num-steps 0: must be from 1 to 100,000"),
    "interval": (["--guidance-low", "0.9", "--guidance-high", "0.5"], "--guidance-low 0.9 is above"),
    "scale": (["--cfg-scale", "0.5"], r"--cfg-scale 0\.5: must be 1 \(no guidance\) or greater"),
    "time": (["--guidance-high", "85"], r"--guidance-high 85\.0: must be from 0 to 1"),
    "steps of days": (["--num-steps", "1000000000"], "--num-steps 1000000000: must be from 1 to 100,000"),
    "count": (["--num-fid-samples", str(10**15)], "must be from 1 to 10,000,000"),
    "large batch": (["--per-proc-batch-size", str(10**9)], "must be from 1 to 100,000, or auto"),
    "batch": (["--per-proc-batch-size", "0"], "--per-proc-batch-size 0: must be from 1 to 100,000, or auto"),
    "half": (["--network-dtype", "fp16"], "--network-dtype fp16 needs a CUDA device"),
    "graphs": (["--cuda-graphs"], "--cuda-graphs needs a CUDA device"),
    "two precisions": (
        ["--mixed-precision", "bf16", "--network-dtype", "bf16"],
        "--mixed-precision bf16 excludes --network-dtype bf16",
    ),
    "unknown": (["--cfg-scal", "2"], "--cfg-scal: unknown argument; did you mean --cfg-scale?"),
    "checkpoint": (["--ckpt", "nowhere.pt"], r"nowhere\.pt: no such file or folder"),
    "codec": (["--vae", "nowhere"], "nowhere"),
}


def test_contradictions_are_named(checkpoint, tmp_path, monkeypatch):
    for more, text in BAD.values():
        with pytest.raises(InputError, match=text):
            run_generate(flags(checkpoint, tmp_path, "bad", *more), monkeypatch)
    assert not (tmp_path / "samples").exists()


@pytest.fixture
def untrained(tmp_path):
    """The checkpoint of a network of 3 classes on 8 x 8 pixels."""
    saved = content(randomise(small(in_channels=3, num_classes=3)), codec=PixelCodec().format.to_json())
    save_checkpoint(tmp_path / "0000012.pt", saved)
    return tmp_path / "0000012.pt"


def test_a_set_is_completed_with_its_own_checkpoint_only(untrained, tmp_path, monkeypatch):
    run_generate(flags(untrained, tmp_path, "a"), monkeypatch)
    moved = untrained.rename(tmp_path / "moved.pt")
    run_generate(flags(moved, tmp_path, "a", "--num-fid-samples", "8"), monkeypatch)
    saved, size = load_checkpoint(moved), moved.stat().st_size
    saved["ema"]["final_layer.linear.bias"] = saved["ema"]["final_layer.linear.bias"] + 1
    save_checkpoint(moved, saved)
    assert moved.stat().st_size == size
    with pytest.raises(InputError, match="made with weights of SHA-256"):
        run_generate(flags(moved, tmp_path, "a"), monkeypatch)


def test_samples_that_are_not_finite_are_no_images(untrained, tmp_path, monkeypatch):
    saved = load_checkpoint(untrained)
    saved["ema"]["pos_embed"] = torch.full_like(saved["ema"]["pos_embed"], 3e38)  # its variance is not finite
    saved["ema"]["final_layer.linear.weight"] = torch.ones_like(saved["ema"]["final_layer.linear.weight"])
    save_checkpoint(untrained, saved)
    with pytest.raises(InputError, match=r"0000012\.pt: its samples are not finite"):
        run_generate(flags(untrained, tmp_path, "a", "--save-cls"), monkeypatch)
    assert not (tmp_path / "samples" / "a" / "images").exists()


@pytest.mark.parametrize("missing", ["REF_BATCH", "INCEPTION"])
def test_a_missing_file_is_told_before_images_are_made(tmp_path, missing):
    (tmp_path / "there").write_text("")
    files = {name: str(tmp_path / "there") for name in ("CKPT", "REF_BATCH", "INCEPTION")}
    environment = {**os.environ, **files, missing: "nowhere.npz", "NUM_GPUS": "0"}
    result = subprocess.run(["bash", "eval.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "eval.sh: error: nowhere.npz: no such file\n")


@pytest.mark.parametrize(
    ("given", "ckpt", "name"),
    [
        ("exps/reg/checkpoints/0000100.pt", "exps/reg/checkpoints/0000100.pt", "reg-0000100-"),
        ("exps/reg", "exps/reg/checkpoints/0000200.pt", "reg-0000200-"),
        ("exps/reg/checkpoints", "exps/reg/checkpoints/0000200.pt", "reg-0000200-"),
        ("owner/name", "owner/name", "owner-name-"),
        ("owner/name/file.pt", "owner/name/file.pt", "owner-name-file-"),
    ],
)
def test_eval_sh_names_the_set_by_its_checkpoint(tmp_path, given, ckpt, name):
    folder = tmp_path / "exps" / "reg" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (100, 200):
        (folder / f"{step:07d}.pt").write_text("")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "launch.sh").write_text('launch() { echo "$@"; exit; }')
    shutil.copy(ROOT / "launch" / "recipe.sh", tmp_path / "launch")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "eval.sh", tmp_path)
    environment = {**os.environ, "CKPT": given, "REF_BATCH": "exps", "SAMPLE_DIR": "samples"}
    result = subprocess.run(["bash", "eval.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"generate.py --ckpt {ckpt} --sample-dir samples --name {name}250-cfg-1.0" in result.stdout, result.stderr


def test_coherence_of_samples(checkpoint, shared_data, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--coherence", str(shared_data)), monkeypatch)
    scores = json.loads((tmp_path / "samples/a/coherence.json").read_text())
    tokens = np.load(tmp_path / "samples/a/cls_tokens.npy")
    args = load_checkpoint(checkpoint)["args"]
    encoder = load_encoder(args.enc_type, 16, args.enc_weights)
    paths = sorted((tmp_path / "samples/a/images").glob("*.png"))
    pixels = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    cosines = torch.cosine_similarity(torch.from_numpy(tokens), encoder(pixels).cls_token)
    assert scores["coherence"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert set(scores) == {"coherence", "coherence_shuffled", "coherence_class_mean", "cls_tokens_right"}
    with pytest.raises(InputError, match="nowhere: no such folder"):
        run_generate(flags(checkpoint, tmp_path, "b", "--coherence", "nowhere"), monkeypatch)


def test_a_folder_of_other_settings_is_refused(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a"), monkeypatch)
    before = hashes(tmp_path / "samples" / "a")
    with pytest.raises(InputError, match="made with --num-steps 3, not --num-steps 4"):
        run_generate(flags(checkpoint, tmp_path, "a", "--num-steps", "4"), monkeypatch)
    with pytest.raises(InputError, match="made with --global-seed 0, not --global-seed 1"):
        run_generate(flags(checkpoint, tmp_path, "a", "--global-seed", "1"), monkeypatch)
    assert hashes(tmp_path / "samples" / "a") == before


def test_the_digest_is_that_of_the_loaded_checkpoint(untrained, tmp_path, monkeypatch):
    """A checkpoint that is replaced before all tensors are read is an error."""
    path, load = untrained, generate.load_with_digest

    def load_and_replace(name):
        content = load(name)
        path.with_name("new.pt").write_bytes(path.read_bytes())
        path.with_name("new.pt").replace(path)
        return content

    monkeypatch.setattr(generate, "load_with_digest", load_and_replace)
    with pytest.raises(InputError, match="was replaced or changed while it was read"):
        run_generate(flags(path, tmp_path, "set", "--num-fid-samples", "1"), monkeypatch)
    assert not (tmp_path / "samples").exists()
