"""From which checkpoint a start resumes: other runs are never overwritten, going back keeps what is later."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import InputError
from common.io import read_json
from models.checkpoint import checksum_path, load_checkpoint, save_checkpoint
from tests.conftest import ENCODER, read_rows, reset_accelerate, run_training
from training.config import parse_args
from training.resume import check_unchanged, contents, find_resume_point
from training.rewind import go_back
from training.setup import set_up

RESTART = {"TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.fixture(scope="module")
def trained(shared_data, encoder_weights, tmp_path_factory):
    """Flags of a run without its name, and the folder of runs with a run of 4 steps in it."""
    folder = tmp_path_factory.mktemp("trained")
    flags = f"""--output-dir {folder} --data-dir {shared_data} --device cpu --enc-type {ENCODER}
        --enc-weights {encoder_weights} --model SiT-S/4 --depth 2 --hidden-size 32 --num-heads 2 --encoder-depth 1
        --projector-dim 16 --batch-size 8 --num-workers 0 --log-steps 1 --sampling-steps 0 --ema-decay 0.9
        --checkpointing-steps 1 --max-train-steps 4""".split()
    run_training([*flags, "--exp-name", "run"])
    return flags[2:], folder


@pytest.fixture
def runs(trained, tmp_path):
    """A folder with the run and an identical copy of it named other."""
    for name in ("run", "other"):
        shutil.copytree(trained[1] / "run", tmp_path / name)
    return tmp_path


@pytest.fixture
def flags(trained, runs):
    return ["--output-dir", str(runs), *trained[0], "--exp-name", "run"]


def point(flags, *more, environment=None):
    return find_resume_point(parse_args([*flags, *map(str, more)]), environment or {})


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:07d}.pt"


def note_start(run: Path, asked: str | None, step: int = 0) -> None:
    with open(run / "starts.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "asked": asked}) + "\n")


def start(flags, *more):
    reset_accelerate()
    return set_up(parse_args([*flags, *map(str, more)]))


WAYS = {
    "file": lambda runs: checkpoint(runs / "other", 2),
    "folder": lambda runs: runs / "other",
    "outside": lambda runs: shutil.copy(checkpoint(runs / "run", 2), runs / "copy.pt"),
    "set aside": lambda runs: (go_back(runs / "run", 3), checkpoint(runs / "run" / "set-aside" / "1", 4))[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_another_run_does_not_overwrite_a_run(runs, flags, way):
    file = WAYS[way](runs)
    with pytest.raises(InputError, match=r"--resume .*: is not a checkpoint of the run in .*run, which would be"):
        point(flags, "--resume", file)
    for path in (runs / "run" / "checkpoints").glob("0*"):  # rows alone are a run as well
        path.unlink()
    with pytest.raises(InputError, match="which would be overwritten"):
        point(flags, "--resume", file)


def test_nothing_is_downloaded_for_a_folder_that_holds_a_run(flags):
    with pytest.raises(InputError, match=r"--resume owner/name/a\.pt: is not a checkpoint of the run"):
        point(flags, "--resume", "owner/name/a.pt")


def test_a_checkpoint_of_another_run_starts_a_new_one(runs, flags):
    found = point(flags, "--exp-name", "new", "--resume", checkpoint(runs / "run", 2))
    assert found.path == checkpoint(runs / "run", 2) and not found.goes_back
    run = start([*flags, "--exp-name", "new"], "--resume", checkpoint(runs / "run", 2))
    assert run.step == 2 and read_json(runs / "new" / "args.json")["exp_name"] == "new"
    # Killed before its first checkpoint: --resume latest must not start from random weights.
    with pytest.raises(InputError, match=r"new: its run was started with --resume .*0000002\.pt and has no checkpoint"):
        point(flags, "--exp-name", "new", "--resume", "latest")
    again = point(flags, "--exp-name", "new", "--resume", checkpoint(runs / "run", 2), environment=RESTART)
    assert again.path == checkpoint(runs / "run", 2)


OWN = {
    "file": lambda run: checkpoint(run, 2),
    "linked folder": lambda run: (os.symlink(run, run.parent / "link"), checkpoint(run.parent / "link", 2))[1],
    "hard link": lambda run: (os.link(checkpoint(run, 2), run.parent / "b.pt"), run.parent / "b.pt")[1],
}


@pytest.mark.parametrize("way", OWN)
def test_a_checkpoint_of_the_own_run_is_gone_back_to(runs, flags, way):
    found = point(flags, "--resume", OWN[way](runs / "run"))
    assert found.goes_back and found.path == checkpoint(runs / "run", 2)


def test_the_own_folder_means_its_newest_checkpoint_and_best_pt_is_one_of_the_run(runs, flags):
    assert point(flags, "--resume", runs / "run").path == checkpoint(runs / "run", 4)
    save_checkpoint(runs / "run" / "checkpoints" / "best.pt", load_checkpoint(checkpoint(runs / "run", 3)))
    found = point(flags, "--resume", runs / "run" / "checkpoints" / "best.pt")
    assert found.goes_back and found.path.name == "best.pt"


def test_a_run_whose_folder_is_a_link_is_that_run(runs, flags):
    os.symlink(runs / "run", runs / "link")
    assert point(flags, "--exp-name", "link", "--resume", checkpoint(runs / "run", 2)).goes_back


def test_checkpoints_that_are_a_link_to_those_of_another_run_are_refused(runs, flags):
    shutil.rmtree(runs / "run" / "checkpoints")
    os.symlink(runs / "other" / "checkpoints", runs / "run" / "checkpoints")
    for more in (["--resume", "latest"], ["--resume-step", "2"], ["--resume", checkpoint(runs / "other", 2)]):
        with pytest.raises(InputError, match=r"is a link to the checkpoints of the run .*other; use that run"):
            point(flags, *more)


def test_places_that_are_no_folder_for_a_run_are_refused(runs, flags, shared_data):
    with pytest.raises(InputError, match=r"--exp-name .*: .* is a folder of training data; choose another name"):
        point(flags, "--output-dir", shared_data.parent, "--exp-name", shared_data.name)
    shutil.rmtree(runs / "run" / "checkpoints")
    (runs / "run" / "checkpoints").touch()
    with pytest.raises(InputError, match=r"checkpoints: is not a folder; remove it, or choose another --exp-name"):
        point(flags, "--resume", "latest")


def test_resume_step_decides_over_latest_as_train_sh_gives_it(runs, flags):
    found = point(flags, "--resume", "latest", "--resume-step", "2")
    assert (found.path, found.goes_back, found.asked) == (checkpoint(runs / "run", 2), True, "--resume-step 2")
    with pytest.raises(InputError, match=r"--resume x\.pt and --resume-step 2: give one of them"):
        point(flags, "--resume", "x.pt", "--resume-step", "2")


def test_a_restart_of_the_same_command_continues_the_new_branch(runs, flags):
    variable, other = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"
    back = [*flags, "--resume", "latest", "--resume-step", "2"]
    # The first start was killed before it went back: the restart goes back.
    assert point(back, environment={variable: "1"}).path == checkpoint(runs / "run", 2)
    note_start(runs / "run", "--resume-step 2", 2)
    for name, count, step in ((variable, "1", 4), (other, "12", 4), (variable, "0", 2), (variable, "", 2)):
        assert point(back, environment={name: count}).path == checkpoint(runs / "run", step), count
    note_start(runs / "run", None, 4)  # another command was used since
    assert point(back, environment={variable: "1"}).path == checkpoint(runs / "run", 2)


def test_going_back_branches_the_run_and_latest_follows_the_branch(runs, flags, said, monkeypatch):
    run = runs / "run"
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    rows = (run / "metrics.jsonl").read_bytes()
    back = [*flags, "--resume", "latest", "--resume-step", "2", "--learning-rate", "1e-3"]
    run_training([*back, "--max-train-steps", "3"])
    assert any("what the run had after step 2 is now in" in line and "set-aside/1" in line for line in said)
    aside = run / "set-aside" / "1"
    assert (aside / "metrics.jsonl").read_bytes() == rows
    for name in ("0000003.pt", "0000003.pt.sha256", "0000004.pt", "0000004.pt.sha256"):
        assert (aside / "checkpoints" / name).read_bytes() == before[name]
    assert checkpoint(run, 3).read_bytes() != before["0000003.pt"] and not checkpoint(run, 4).exists()
    assert [row["step"] for row in read_rows(run)] == [1, 2, 3]
    noted = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    assert (noted["asked"], noted["set_aside"], noted["step"]) == ("--resume-step 2", "set-aside/1", 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert start(back).step == 3
    monkeypatch.undo()
    assert start(flags, "--resume", "latest").step == 3
    # The abandoned branch can be continued as a run of its own.
    assert start([*flags, "--exp-name", "old"], "--resume", aside / "checkpoints" / "0000004.pt").step == 4


def test_an_ordinary_restart_sets_nothing_aside(runs, flags):
    for path in (checkpoint(runs / "run", 4), checksum_path(checkpoint(runs / "run", 4))):
        path.unlink()
    assert start(flags, "--resume", "latest").step == 3
    assert [row["step"] for row in read_rows(runs / "run")] == [1, 2, 3]
    assert not (runs / "run" / "set-aside").exists()


def test_a_damaged_newest_checkpoint_is_set_aside_with_the_rows(runs, flags):
    rows = (runs / "run" / "metrics.jsonl").read_bytes()
    checkpoint(runs / "run", 4).write_bytes(b"damaged")
    assert start(flags, "--resume", "latest").step == 3
    aside = runs / "run" / "set-aside" / "1"
    assert (aside / "checkpoints" / "0000004.pt").read_bytes() == b"damaged"
    assert (aside / "metrics.jsonl").read_bytes() == rows and not checkpoint(runs / "run", 4).exists()


def test_an_unfinished_order_decides_what_latest_is_and_is_completed(runs, flags):
    (runs / "run" / "rewind.json").write_text('{"step": 2, "number": 1}')
    assert point(flags, "--resume", "latest").path == checkpoint(runs / "run", 2)
    with pytest.raises(InputError, match=r"--resume-step 3: .* does not exist; existing steps: 1, 2"):
        point(flags, "--resume-step", "3")
    with pytest.raises(InputError, match="an unfinished --resume-step sets this checkpoint aside"):
        point(flags, "--resume", checkpoint(runs / "run", 4))
    assert start(flags, "--resume", "latest").step == 2
    assert (runs / "run" / "set-aside/1/checkpoints/0000004.pt").exists()
    assert not (runs / "run" / "rewind.json").exists()


@pytest.mark.parametrize("more", [["--dry-run"], ["--seed", "1"], ["--vae", "none/here.pt"]])
def test_a_dry_run_and_a_start_with_bad_input_move_nothing(runs, flags, more):
    def files():
        return {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}

    before = files()
    more = [*more, "--sampling-steps", "1"] if "--vae" in more else more
    if more == ["--dry-run"]:
        start(flags, "--resume-step", "2", *more)
    else:
        with pytest.raises(InputError):
            start(flags, "--resume-step", "2", *more)
    assert files() == before


def test_a_run_that_another_process_trained_meanwhile_is_left_alone(runs, flags):
    seen = contents(runs / "run")
    check_unchanged(runs / "run", seen)
    with open(runs / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5}\n')
    with pytest.raises(InputError, match="another process trained this run while this start was checked; start again"):
        check_unchanged(runs / "run", seen)


def test_a_checkpoint_with_the_name_of_another_step_is_damaged(runs, flags, said):
    for path in (checkpoint(runs / "run", 4), checksum_path(checkpoint(runs / "run", 4))):
        path.unlink()
    shutil.copy(checkpoint(runs / "run", 2), checkpoint(runs / "run", 9))
    assert point(flags, "--resume", "latest").path == checkpoint(runs / "run", 3)
    assert any("its name says step 9, its content step 2" in line for line in said)
    with pytest.raises(InputError, match="its name says step 9, its content step 2"):
        point(flags, "--resume-step", "9")


def change(path: Path, edit) -> None:
    content = load_checkpoint(path)
    edit(content)
    save_checkpoint(path, content)


DAMAGED = {
    "empty state": (lambda file: file["opt"].update(state={}), "its optimizer has no state for"),
    "betas": (lambda file: file["opt"]["param_groups"][0].update(betas=(0.5, 0.5)), "its optimizer has betas"),
    "steps": (lambda file: file.update(steps=4.0), r"its steps are 4\.0"),
    "log": (lambda file: file.update(log={"sums": 3}), "its log is {"),
    "classes": (lambda file: file.update(classes={"labels": [0, 1]}), r"trained on 2 classes \(0-1\), the data have 3"),
    "heads": (lambda file: file["network"].update(num_heads=4), "its network has num_heads 4; by the flags it is 2"),
    "a tensor in network": (lambda file: file["network"].update(z_dims=[torch.ones(2)]), "its z_dims is"),
    "args": (lambda file: file.update(args=[1]), "args is a list"),
    "weights": (lambda file: file["model"]["pos_embed"].fill_(float("nan")), "model: pos_embed contains numbers"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_in_each_part_is_named_before_anything_is_written(runs, flags, case):
    edit, text = DAMAGED[case]
    change(checkpoint(runs / "run", 4), edit)
    before = (runs / "run" / "starts.jsonl").read_bytes()
    with pytest.raises(InputError, match=text) as caught:
        start(flags, "--resume-step", "4")
    assert "0000004.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert (runs / "run" / "starts.jsonl").read_bytes() == before


def test_the_flag_decides_over_a_learning_rate_in_the_file(runs, flags):
    change(checkpoint(runs / "run", 4), lambda file: file["opt"]["param_groups"][0].update(lr=0.5))
    with pytest.raises(InputError, match="--learning-rate decides"):
        start(flags, "--resume-step", "4")
    run = start(flags, "--resume-step", "4", "--learning-rate", "1e-5")
    assert [group["lr"] for group in run.optimizer.state_dict()["param_groups"]] == [1e-5]


def test_a_checkpoint_of_before_these_checks_resumes_and_gets_a_digest(runs, flags):
    def older(file):
        del file["args"].data_digest, file["args"].encoder_digest, file["classes"], file["network"]

    change(checkpoint(runs / "run", 4), older)
    run = start(flags, "--resume", "latest")
    assert run.step == 4
    assert all(len(read_json(run.folder / "args.json")[name]) == 64 for name in ("data_digest", "encoder_digest"))


def test_other_data_are_refused(runs, flags, shared_data, tmp_path, said):
    data = tmp_path / "moved"
    shutil.copytree(shared_data, data)
    flags = [*flags, "--resume", "latest", "--data-dir", str(data)]
    assert start(flags).step == 4  # moved folders are the same data
    shutil.make_archive(str(data / "images"), "zip", data / "images")
    shutil.rmtree(data / "images")
    assert start(flags).step == 4  # and so are zips
    files = [data / "vae-sd" / "00000" / f"img-mean-std-{number:08d}.npy" for number in (5, 9)]
    first, second = (file.read_bytes() for file in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    with pytest.raises(InputError, match=r"--data-dir .*: these are not the data of the run: .*--allow-changed-data"):
        start(flags)
    assert start([*flags, "--allow-changed-data"]).step == 4
    noted = json.loads((runs / "run" / "starts.jsonl").read_text().splitlines()[-1])
    assert noted["changed"] == ["data_digest"]
    assert parse_args(["--config", str(runs / "run" / "args.json"), "--exp-name", "x"]).allow_changed_data is False


def test_other_encoder_weights_are_refused(runs, flags, encoder_weights, tmp_path):
    state = load_file(encoder_weights)
    torch.save({"model": state}, tmp_path / "same.pth")
    flags = [*flags, "--resume", "latest", "--enc-weights"]
    assert start([*flags, str(tmp_path / "same.pth")]).step == 4  # the same weights in another file
    state["norm.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"--enc-weights .*other\.pth: these are not the encoder weights of the run\. "
    ):
        start([*flags, str(tmp_path / "other.pth")])
    start([*flags, str(tmp_path / "other.pth"), "--allow-changed-data"])
    noted = json.loads((runs / "run" / "starts.jsonl").read_text().splitlines()[-1])
    assert noted["changed"] == ["encoder_digest"]
