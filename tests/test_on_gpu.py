"""on_gpu.sh: its commands are allowed, jobs that fail do not stop the others, and part 1 runs on a CPU."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from pytest import approx

from benchmarks import attention, encode, evaluate, on_gpu, on_gpu_summary, real_run, sample, train_step
from benchmarks.on_gpu_jobs import PARTS, Job
from common.cli import parse
from common.errors import InputError
from experiments import convergence
from models.checkpoint import save_checkpoint
from tests.conftest import ROOT

CONFIGS = {
    "benchmarks/attention.py": attention.AttentionBenchmark,
    "benchmarks/encode.py": encode.Encode,
    "benchmarks/evaluate.py": evaluate.Evaluate,
    "benchmarks/real_run.py": real_run.RealRun,
    "benchmarks/sample.py": sample.Sample,
    "benchmarks/train_step.py": train_step.TrainStep,
    "experiments/convergence.py": convergence.Convergence,
}
LONGEST_PART = 570  # seconds; a part has to end within 590, including its start and the end of its last job
JOBS = [job for jobs in PARTS.values() for job in jobs]


def script(code: str) -> str:
    """Return the flags of a job that runs Python code; {out} is `out` in it."""
    imports = "import fcntl, os, pathlib, signal, subprocess, sys, time"
    code = f"{imports}; out = pathlib.Path(sys.argv[1]); result = out.with_suffix('.json'); {code}"
    return f"-c {shlex.quote(code)} {{out}}"


#: Code that writes an empty result.
WRITE = "result.write_text(str(dict()))"


def run_jobs(monkeypatch, tmp_path: Path, jobs: list[Job]) -> tuple[int, dict[str, dict], set[str]]:
    """Run jobs as a part; return the exit status, how each job ended, and the names in the archive."""
    monkeypatch.setitem(PARTS, "part1", jobs)
    monkeypatch.setattr(on_gpu, "GRACE", 1)
    status = 0
    try:
        on_gpu.main(["part1", "--size", "tiny", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    except SystemExit as end:
        status = end.code
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        outcomes = json.load(archive.extractfile("results/jobs.json"))
        return status, {outcome["job"]: outcome for outcome in outcomes}, set(archive.getnames())


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_command_is_one_that_its_program_accepts(monkeypatch, tmp_path, job, size):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, program, *flags = job.command(tmp_path, size)
    if program == "-m":
        assert flags[0] == "pytest" and all((ROOT / flag).exists() for flag in flags if flag.startswith("tests/"))
    else:
        parse(CONFIGS[program], "", flags)


def test_all_benchmarks_are_run_and_parts_fit_into_ten_minutes():
    assert set(CONFIGS) == {program for job in JOBS if (program := job.flags.split()[0]) != "-m"}
    assert len({job.name for job in JOBS}) == len(JOBS)
    assert all(sum(job.limit for job in jobs) <= LONGEST_PART for jobs in PARTS.values())


def test_jobs_that_fail_are_named_and_the_others_run(monkeypatch, tmp_path, capfd):
    (tmp_path / "work" / "results").mkdir(parents=True)
    (tmp_path / "work" / "results" / "nothing.json").write_text("{}")  # of an earlier call
    held = tmp_path / "held"  # locked as long as the job's own child, or the job, is alive
    child = f"file = open('{held}', 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    child += "subprocess.Popen(['sleep', '60'], pass_fds=[file.fileno()]); "
    hang = f"{child} {WRITE}; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    jobs = [
        Job("hangs", 2, script(hang), ""),
        Job("fails", 30, script("print('reason'); sys.exit(3)"), ""),
        Job("nothing", 30, script("pass"), ""),
        Job("large", 30, script(f"{WRITE}; out.with_suffix('.trace').write_bytes(os.urandom(5_000_000))"), ""),
    ]
    start = time.monotonic()
    status, outcomes, names = run_jobs(monkeypatch, tmp_path, jobs)
    assert status == 1
    assert [outcome["status"] for outcome in outcomes.values()] == [None, 3, None, 0]
    assert outcomes["large"]["limit"] > 60  # the jobs before it did not use their time
    assert {f"results/{name}" for name in ("fails.log", "hangs.json", "large.json", "versions.json")} <= names
    assert "results/large.trace" not in names and "results/nothing.json" not in names
    out, err = capfd.readouterr()
    named = "hangs (reached its limit of 2 s), fails (status 3), nothing (wrote no nothing.json)"
    assert err.strip() == f"on_gpu: failed: {named}"
    assert "fails.log:\nreason\n" in out and out.strip().endswith("results.tar.gz: all results, without large.trace")
    with open(held) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for a minute if the job's child is still running
    assert time.monotonic() - start < 50


def test_a_signal_ends_the_job_and_the_results_are_kept(monkeypatch, tmp_path):
    stop = f"{WRITE}; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    jobs = [Job("first", 30, script(WRITE), ""), Job("stopped", 90, script(stop), ""), Job("later", 30, "-c 0", "")]
    status, outcomes, names = run_jobs(monkeypatch, tmp_path, jobs)
    assert status == 1 and outcomes["stopped"]["seconds"] < 30
    assert [outcome["end"] for outcome in outcomes.values()] == ["complete", "stopped by a signal", "not run"]
    assert {"results/first.json", "results/stopped.json"} <= names


def test_output_is_shown_at_once_and_compiled_code_is_kept(monkeypatch, tmp_path):
    wanted = ("PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in wanted:
        monkeypatch.delenv(name, raising=False)
    code = f"print(*[os.environ[name] for name in {wanted}]); {WRITE}"
    assert run_jobs(monkeypatch, tmp_path, [Job("shows", 30, script(code), "")])[0] == 0
    cache = tmp_path / "work" / "cache"
    log = (tmp_path / "work" / "results" / "shows.log").read_text()
    assert log.split() == ["1", str(cache / "inductor"), str(cache / "triton")]


def test_bad_settings_are_refused_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for flags, text in (
        (["slot", "xl", "--size", "tiny"], "parts xl: allowed: part1, "),
        ([], "parts is required; example: bash benchmarks/on_gpu.sh part1"),
        (["part1", "--out", str(ROOT / "README.md")], "--out .*README.md/results.tar.gz: .*not a writable folder"),
    ):
        with pytest.raises(InputError, match=text):
            on_gpu.main(flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--size full: needs a CUDA device; allowed here: tiny"):
        on_gpu.main(["part1"])
    assert not list(tmp_path.iterdir())


def test_the_summary_names_failed_tests_and_ignores_damaged_results(tmp_path):
    case = '<testcase name="test_a[{}]">{}</testcase>'
    suite = '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">{}</testsuite></testsuites>'
    (tmp_path / "tests.xml").write_text(suite.format(case.format(1, "") + case.format(2, "<failure>text</failure>")))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.xml").write_text("<testsuites>")
    assert on_gpu_summary.tables(tmp_path, "broken") == []
    (line,) = on_gpu_summary.tables(tmp_path, "tests")
    assert line == "tests 2, failures 1, errors 0, skipped 0; failed: test_a[2]"


def write_run(folder: Path, weights: dict[str, float], losses: dict[int, float | None]) -> Path:
    for name, value in weights.items():
        state = {"blocks.0.weight": torch.full((4,), value)}
        save_checkpoint(folder / "checkpoints" / name, {"model": state, "ema": {"blocks.0.weight": torch.zeros(4)}})
    rows = [{"step": step, **({} if loss is None else {"loss": loss})} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_are_compared_from_the_checkpoint_on(tmp_path):
    first = write_run(tmp_path / "a", {"2.pt": 1, "4.pt": 3}, {1: 5.0, 2: 4.0, 3: None, 4: 2.0, 5: 1.0})
    close = write_run(tmp_path / "b", {"4.pt": 2.5}, {3: None, 4: 2.002, 5: 1.01})
    found = real_run.compare(first, close, "2.pt", "4.pt")
    assert found == {"first_loss": approx(1e-3), "later_losses": approx(1e-2), "weights": approx(0.25), "equal": False}
    again = write_run(tmp_path / "c", {"4.pt": 3}, {3: None, 4: 2.0, 5: 1.0})
    found = real_run.compare(first, again, "2.pt", "4.pt")
    assert found == {"first_loss": 0, "later_losses": 0, "weights": 0, "equal": True}
    # A step that only one of the runs has skipped.
    for number, losses in enumerate(({3: 3.0, 4: 2.0, 5: 1.0}, {3: None, 4: None, 5: 1.0}, {3: None})):
        other = write_run(tmp_path / f"d{number}", {"4.pt": 3}, losses)
        assert real_run.compare(first, other, "2.pt", "4.pt")["first_loss"] == float("inf")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"first_loss": 9e-4, "later_losses": 1e-2}, None),
        ({"first_loss": 2e-3, "later_losses": 0.0}, r"differ from those of the first by 2\.0e-03 in its first step"),
        ({"first_loss": 0.0, "later_losses": 0.1}, r"and 1\.0e-01 later; allowed: 0\.001 and 0\.02"),
        ({"first_loss": float("nan"), "later_losses": 0.0}, "by nan in its first step"),
    ],
)
def test_a_resumed_run_whose_losses_differ_is_an_error(row, message):
    if message is None:
        real_run.check_losses(row)
    else:
        with pytest.raises(InputError, match=message):
            real_run.check_losses(row)


def test_the_first_parts_run_completely_on_a_cpu(tmp_path):
    places = {"OUT": tmp_path / "out", "WORK": tmp_path / "work", "SIZE": "tiny", "PYTHON": sys.executable}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in places.items()}}
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), "part1", "checks"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.tar.gz"]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}
    assert results.keys() == {"versions", "jobs", "train_step", "sample", "evaluate", "attention", "run"}
    assert results["versions"]["torch"] == torch.__version__
    assert {job["end"] for job in results["jobs"]} == {"complete"}
    assert len(results["jobs"]) == len(PARTS["part1"]) + len(PARTS["checks"])
    assert ElementTree.parse(tmp_path / "results" / "tests.xml").getroot().find("testsuite").get("failures") == "0"

    assert [row["form"] for row in results["train_step"]["rows"]] == ["plain", "train.py", "train.py --compile"]
    assert results["train_step"]["profile"]["kinds"]
    assert all(row["images_per_s"] > 0 for row in results["sample"]["rows"])
    assert results["evaluate"]["evaluation"]["samples"] > 0 and len(results["attention"]["rows"]) > 4
    run = {row["program"]: row for row in results["run"]["rows"]}
    assert list(run) == ["data", "train.py, first", "train.py, resumed", "generate.py"]
    assert run["train.py, resumed"]["equal"] is True and run["generate.py"]["images"] == 3
    assert len(done.stdout) < 60_000 and "| train.py, resumed |" in done.stdout[-12_000:]
