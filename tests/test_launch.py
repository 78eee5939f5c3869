"""train.sh and launch/launch.sh in real processes: torchrun, signals, restarts, exit statuses and SLURM."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.checkpoint import verify_checkpoint
from tests.conftest import ROOT, read_rows
from tests.processes import SECONDS, Training
from tests.test_resume import STEPS, assert_same_run, flags_of
from training.preemption import EXIT_RESUMABLE

# A program without torch. It writes a line into the file of its rank, then does what its second argument says.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from common.errors import InputError, run_cli
from training.preemption import StopSignal, exit_status

def main():
    listener = StopSignal()
    listener.listen()
    names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    with open(Path(sys.argv[1], os.environ["RANK"]), "a") as file:
        print(os.getpid(), *(os.environ.get(name) for name in names), file=file)
    if sys.argv[2] == "bad input":
        raise InputError("--seed -1: must be at least 0")
    if sys.argv[2] == "crash":
        sys.exit(7)
    if sys.argv[2] == "crash once" and len(Path(sys.argv[1], os.environ["RANK"]).read_text().splitlines()) == 1:
        if os.environ["RANK"] == "0":
            sys.exit(7)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    if sys.argv[2] == "wait":
        while not listener.received:
            time.sleep(0.01)
    sys.exit(exit_status(finished=not listener.received))

run_cli(main)
"""

# Makes each checkpoint take long to write, and tells when that begins. Python runs it at its start.
SLOW_CHECKPOINTS = """
import os, time
rename = os.replace

def rename_later(source, target, **kwargs):
    if str(target).endswith(".pt"):
        open(os.environ["SAVING"], "w").close()
        time.sleep(0.7)
    rename(source, target, **kwargs)

os.replace = rename_later
"""


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a script: the interpreter of these tests, and one process on the CPU."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUM_GPUS": "0", **settings}


def start(*command: str, **settings: str) -> subprocess.Popen:
    """Start a command in a session of its own. `text_of` reads its output after its end."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )  # fmt: skip


def launch(tmp_path: Path, action: str, **settings: str) -> subprocess.Popen:
    """Start PROGRAM as train.sh starts train.py; print its exit status and whether Ctrl-C was pressed."""
    (tmp_path / "program.py").write_text(PROGRAM)
    script = 'source launch/launch.sh; status=0; launch "$@" || status=$?; echo "status $status $INTERRUPTED"'
    program = (str(tmp_path / "program.py"), str(tmp_path), action)
    return start("bash", "-euo", "pipefail", "-c", script, "launch", *program, **settings)


def text_of(process: subprocess.Popen) -> str:
    return process.communicate(timeout=SECONDS)[0]


def wait_for(path: Path, process: subprocess.Popen, lines: int = 1) -> None:
    """Wait until a file has `lines` lines; fail if the process has ended before."""
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines, process)


def wait_until(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, text_of(process)
        assert time.monotonic() < end
        time.sleep(0.01)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return str(listener.getsockname()[1])


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_two_machines_restart_together(tmp_path):
    settings = {"NUM_MACHINES": "2", "HEAD_ADDRESS": "127.0.0.1", "HEAD_PORT": free_port(), "NUM_PROCESSES": "2"}
    machines = [launch(tmp_path, "crash once", **settings, MACHINE_RANK=rank) for rank in ("0", "1")]
    assert all(text_of(machine).endswith("status 0 0\n") for machine in machines)
    starts = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(4)]
    for attempt in zip(*starts, strict=True):
        ((world_size, _, _, threads),) = {tuple(line.split()[1:]) for line in attempt}  # all meet at the same address
        assert (world_size, threads) == ("4", "1")
    assert len(starts[0]) == 2 and not (tmp_path / "4").exists()


def test_a_program_that_fails_is_restarted(tmp_path):
    process = launch(tmp_path, "crash", NUM_PROCESSES="2", MAX_RESTARTS="1")
    assert text_of(process).endswith("status 1 0\n")
    assert len({line.split()[0] for line in (tmp_path / "0").read_text().splitlines()}) == 2


def test_bad_input_is_not_restarted(tmp_path):
    text = text_of(launch(tmp_path, "bad input", NUM_PROCESSES="2"))
    assert text.endswith("status 2 0\n")
    assert "program.py: error: --seed -1: must be at least 0\n" in text and "Traceback" not in text
    assert all((tmp_path / rank).read_text().count("\n") == 1 for rank in "01" if (tmp_path / rank).exists())


def test_a_used_port_is_refused_and_a_free_one_is_chosen(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        process = launch(tmp_path, "end", NUM_PROCESSES="2", HEAD_PORT=taken)
        text = text_of(process)
    assert text.endswith("status 1 0\n") and "EADDRINUSE" in text and taken in text
    assert not (tmp_path / "0").exists()
    both = [launch(tmp_path, "end", NUM_PROCESSES="2") for _ in range(2)]
    assert [text_of(process) for process in both] == ["status 0 0\n"] * 2
    assert len({line.split()[3] for line in (tmp_path / "0").read_text().splitlines()}) == 2


def test_a_signal_reaches_all_processes(tmp_path):
    """bash sends SIGHUP and Ctrl-C to its group, as a terminal does."""
    for number, interrupted in ((signal.SIGHUP, 0), (signal.SIGINT, 1)):
        folder = tmp_path / number.name
        folder.mkdir()
        process = launch(folder, "wait", NUM_PROCESSES="2")
        wait_for(folder / "0", process)
        wait_for(folder / "1", process)
        os.killpg(process.pid, number)
        assert text_of(process) == f"status {EXIT_RESUMABLE} {interrupted}\n"


def test_a_signal_before_the_program_starts(tmp_path):
    process = launch(tmp_path, "end")
    wait_until(lambda: any("torch.distributed.run" in command_of(child) for child in children(process.pid)), process)
    process.send_signal(signal.SIGTERM)
    assert text_of(process) == f"status {EXIT_RESUMABLE} 0\n"
    assert not (tmp_path / "0").exists()


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, "--ntasks-per-node 1"),
        ({"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, "--ntasks-per-node 1"),
        (
            {"NUM_MACHINES": "2", "MACHINE_RANK": "2", "HEAD_ADDRESS": "head"},
            "MACHINE_RANK 2 with NUM_MACHINES 2: allowed are 0 to 1",
        ),
        ({"NUM_MACHINES": "2"}, "NUM_MACHINES 2: HEAD_ADDRESS is required"),
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES two: must be a whole number"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS -1: must be a whole number"),
        ({"NUM_PROCESSES": "0"}, "must be 1 or greater"),
    ],
)
def test_settings_that_are_refused(settings, message):
    process = start("bash", "train.sh", **settings)
    assert message in text_of(process) and process.returncode == 2


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


@pytest.mark.cpu
def test_a_run_that_is_stopped_while_saving_and_loses_a_process(train_flags, tmp_path):
    """train.sh with two processes on the CPU, under a fake SLURM: the result is that of a run without interruptions."""
    flags = flags_of(train_flags, "quiet", "--log-steps", "1")
    quiet = Training(flags, tmp_path / "quiet.txt", processes=2)
    assert quiet.wait() == 0, quiet.text()
    flags[flags.index("quiet")] = "run"
    folder, saving = tmp_path / "exps" / "run", tmp_path / "saving"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sitecustomize.py").write_text(SLOW_CHECKPOINTS)
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    settings = {"PYTHONPATH": f"{tmp_path / 'bin'}:{ROOT}", "SAVING": str(saving), "NUM_PROCESSES": "2"}
    settings |= {"PATH": f"{tmp_path / 'bin'}:{environment()['PATH']}", "SLURM_JOB_ID": "4711"}

    def stop_while_saving(process: subprocess.Popen, number: signal.Signals) -> str:
        """Send a signal while a checkpoint is being written; return the output after checking what the run left."""
        wait_until(saving.exists, process)
        process.send_signal(number)
        text = text_of(process)
        assert process.returncode == EXIT_RESUMABLE, text
        checkpoints = sorted((folder / "checkpoints").glob("*.pt"))
        for path in checkpoints:
            verify_checkpoint(path)
        assert int(checkpoints[-1].stem) == read_rows(folder)[-1]["step"] < STEPS
        return text

    assert "Traceback" not in stop_while_saving(start("bash", "train.sh", *flags, **settings), signal.SIGUSR1)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"

    # One process is killed: torchrun restarts both, and they resume. Then the run is stopped again.
    saving.unlink()
    process = start("bash", "train.sh", *flags, **settings)
    wait_until(saving.exists, process)
    (torchrun,) = children(process.pid)
    os.kill(children(torchrun)[-1], signal.SIGKILL)
    wait_for(folder / "starts.jsonl", process, lines=3)
    saving.unlink()
    assert re.search(r"exitcode: -9\b", stop_while_saving(process, signal.SIGTERM))
    assert (tmp_path / "asked").read_text() == "requeue 4711\n" * 2

    assert (last := Training(flags, tmp_path / "last.txt", processes=2)).wait() == 0, last.text()
    assert_same_run(tmp_path / "exps" / "quiet", folder)
