"""train.sh and eval.sh with a stand-in for python, which prints what they start: recipes, paths, machines, SLURM."""

import json
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.processes import SECONDS
from training.preemption import EXIT_RESUMABLE

# Stands for python: prints the number of GPUs, or what torchrun would be given, and leaves an exit status.
FAKE_PYTHON = """#!/bin/sh
[ "$1" = -W ] && echo "$GPUS" && exit
echo "in $PWD: $*"
echo "signals ${PET_SIGNALS_TO_HANDLE:-all}"
echo "${STATUS:-0}" > "$REG_STATUS_FILE"
"""
TOOLS = ("bash", "sh", "dirname", "basename", "sed", "mktemp", "cat", "rm", "getconf", "nohup", "head", "realpath")


@pytest.fixture
def place(tmp_path):
    """A PATH without scontrol, the scripts in a folder of their own, and another folder, that of the caller."""
    for name in ("bin", "reg", "caller"):
        (tmp_path / name).mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    executable(tmp_path / "bin" / "python", FAKE_PYTHON)
    shutil.copytree(ROOT / "launch", tmp_path / "reg" / "launch")
    shutil.copytree(ROOT / "recipes", tmp_path / "reg" / "recipes")
    for name in ("train.sh", "eval.sh"):
        shutil.copy(ROOT / name, tmp_path / "reg")
    return tmp_path


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def call(place, *command, **settings):
    """Return exit status and output of a command of the caller."""
    environment = {"PATH": str(place / "bin"), "NUM_GPUS": "0", **settings}
    done = subprocess.run(
        command, cwd=place / "caller", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_relative_paths_are_those_of_the_caller(place):
    reg, caller = place / "reg", place / "caller"
    status, text = call(place, "bash", "../reg/train.sh", "--init-from", "a.pt", DATA_DIR="data")
    assert status == 0 and text.startswith(f"in {caller}: -m torch.distributed.run ")
    assert f"bash {reg}/launch/worker.sh {reg}/train.py" in text and "--init-from a.pt" in text
    assert f"--data-dir data --output-dir {reg}/exps" in text
    for name in ("a.pt", "ref.npz"):
        (caller / name).touch()
    status, text = call(place, "bash", "../reg/eval.sh", CKPT="a.pt", REF_BATCH="ref.npz")
    assert status == 0 and f"worker.sh {reg}/generate.py --ckpt a.pt --sample-dir {reg}/samples" in text
    assert f"worker.sh {reg}/evaluations/evaluator.py --ref_batch ref.npz --sample_batch {reg}/samples/" in text


@pytest.mark.parametrize("recipe", [None, "repa", "sit", "srdit", "srdit-muon"])
def test_a_recipe_sets_the_defaults_of_the_scripts(place, recipe):
    reg, name = place / "reg", recipe or "reg"
    given = {"RECIPE": recipe} if recipe else {}
    settings = json.loads((ROOT / "recipes" / "train" / f"{name}.json").read_text())
    status, text = call(place, "bash", "../reg/train.sh", **given)
    model, encoder = settings["model"], settings["enc_type"]
    assert status == 0 and f" --model {model} --data-dir {reg}/data/imagenet256 " in text
    assert f" --exp-name {name}-{model.replace('/', '-')} --enc-type {encoder} --batch-size 256 " in text
    file = f"{reg}/recipes/train/{name}.json"
    assert f" --max-train-steps 400000 --report-to none --resume latest --config {file}\n" in text

    status, text = call(place, "bash", "../reg/eval.sh", CKPT="a.pt", REF_BATCH="/dev/null", **given)
    labels = "balanced" if name.startswith("srdit") else "random"
    assert status == 0 and f"-250-cfg-1.0-1.0-to-1.0-{labels} --num-fid-samples 50000 --label-sampling {labels}" in text
    assert f" --config {reg}/recipes/generate/{name}.json\n" in text and " --num_steps 250 " in text


def test_variables_replace_the_values_of_a_recipe(place):
    given = {"RECIPE": "srdit", "MODEL": "SiT-XL/1", "STEPS": "7", "ENCODER": "dinov2-vit-l", "BATCH_SIZE": "8"}
    status, text = call(place, "bash", "../reg/train.sh", "--no-rope", **given)
    assert status == 0 and " --model SiT-XL/1 " in text and text.split("\n")[0].endswith("srdit.json --no-rope")
    assert " --exp-name srdit-SiT-XL-1 --enc-type dinov2-vit-l --batch-size 8 --max-train-steps 7 " in text
    settings = {"CKPT": "a.pt", "REF_BATCH": "/dev/null", "LABELS": "random", "NUM_STEPS": "9"}
    status, text = call(place, "bash", "../reg/eval.sh", RECIPE="srdit", **settings)
    assert status == 0 and " --label-sampling random --mode sde --num-steps 9 " in text


@pytest.mark.parametrize("script", ["train.sh", "eval.sh"])
@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("sr-dit", [], "RECIPE sr-dit: unknown; allowed: reg, repa, sit, srdit"),
        ("../train/reg", [], "RECIPE ../train/reg: unknown; allowed: reg, repa, "),
        ("repa", ["--config=a.json"], "--config replaces the settings of RECIPE repa; give one of them"),
        ("reg", ["--config", "a.json"], None),
    ],
)
def test_recipes_that_are_refused(place, script, recipe, flags, message):
    settings = {"RECIPE": recipe, "CKPT": "a.pt", "REF_BATCH": "/dev/null"}
    status, text = call(place, "bash", f"../reg/{script}", *flags, **settings)
    if message is None:  # the last file is read
        assert status == 0 and "/reg.json --config a.json\n" in text
    else:
        assert status == 2 and text.startswith(f"{script}: error: {message}") and text.count("\n") == 1


def test_a_copy_of_the_script_finds_its_folder(place):
    """As `sbatch train.sh` runs it."""
    job = place / "slurm_script"
    job.write_bytes((ROOT / "train.sh").read_bytes())
    status, text = call(place, "bash", str(job), SLURM_SUBMIT_DIR=str(place / "reg"))
    assert status == 0 and f"{place}/reg/train.py" in text
    status, text = call(place, "bash", str(job), SLURM_SUBMIT_DIR=str(place / "caller"))
    assert status == 2 and "call sbatch in that folder" in text
    executable(place / "bin" / "scontrol", f"#!/bin/sh\necho '   Command={place}/reg/train.sh --seed 1'\n")
    status, text = call(place, "bash", str(job), SLURM_SUBMIT_DIR=str(place / "caller"), SLURM_JOB_ID="7")
    assert status == 0 and f"{place}/reg/train.py" in text


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"NUM_GPUS": "3", "GPUS": "2"}, [], "NUM_GPUS 3: PyTorch finds 2: nvidia-smi shows GPUs and driver"),
        ({"NUM_GPUS": "", "GPUS": "0"}, [], "PyTorch finds no GPU: nvidia-smi shows"),
        ({"NUM_GPUS": "two"}, [], "NUM_GPUS two: must be a whole number"),
        ({"SLURM_NNODES": "2"}, [], "the job has 2 nodes, but only the first one runs this script; start it by srun"),
        (
            {"SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n[1-2]"},
            [],
            "scontrol is not in PATH; set HEAD_ADDRESS to the first node of n[1-2]",
        ),
        ({"NUM_GPUS": "", "GPUS": "2"}, [], None),
        ({"NUM_GPUS": "", "GPUS": "0"}, ["--device", "cpu"], None),
    ],
)
def test_what_the_machine_does_not_have_is_told(place, settings, flags, message):
    status, text = call(place, "bash", "../reg/train.sh", *flags, **settings)
    if message is None:
        assert status == 0 and f"--nproc-per-node {settings['GPUS'] if not flags else 1} " in text
    else:
        assert status == 2 and text.startswith(f"train.sh: error: {message}") and text.count("\n") == 1


def test_no_python(place):
    (place / "bin" / "python").unlink()
    status, text = call(place, "bash", "../reg/train.sh")
    assert status == 2 and text == "train.sh: error: python is not in PATH; activate the Python environment first\n"


@pytest.mark.parametrize(
    ("scontrol", "message"),
    [
        (None, "scontrol is not in PATH, so job 7 is not requeued; submit it again to resume"),
        ("exit 1", "job 7 cannot be requeued; submit it again to resume"),
        ("echo $@", "requeue 7\ntrain.sh: job 7 is back in the queue, restart 3"),
    ],
)
def test_a_stopped_job_is_requeued_or_says_what_to_do(place, scontrol, message):
    if scontrol:
        executable(place / "bin" / "scontrol", f"#!/bin/sh\n{scontrol}\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "STATUS": str(EXIT_RESUMABLE)}
    status, text = call(place, "bash", "../reg/train.sh", **job)
    assert status == EXIT_RESUMABLE and text.endswith(message + "\n")


def test_torchrun_ignores_sighup_under_nohup(place):
    for prefix, signals in ((["nohup"], "SIGTERM,SIGINT,SIGQUIT"), ([], "all")):
        status, text = call(place, *prefix, "bash", "../reg/train.sh")
        assert status == 0 and f"signals {signals}\n" in text
