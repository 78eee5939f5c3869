"""The fuzzing harness: it sees each kind of failure, it knows every reader, and a small part of it finds no failure."""

from __future__ import annotations

import ast
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import InputError
from tests.conftest import ROOT, run_program
from tests.fuzzing import commands
from tests.fuzzing.command_lines import PROGRAMS, command
from tests.fuzzing.mutations import RANDOM
from tests.fuzzing.readers import READERS
from tests.fuzzing.worker import Outcome, Watch, run_inputs

PACKAGES = ("common", "models", "training", "generation", "preprocessing", "evaluations", "experiments", "benchmarks")
# Calls that read bytes from outside.
READ_CALLS = {
    "Image.open", "json.loads", "json.load", "torch.load", "np.load", "read_array", "zipfile.ZipFile", "tarfile.open",
    "safe_open", "load_file", "from_pretrained",
}  # fmt: skip
# The modules that make such calls, and a reader or a program of the harness by which each is fuzzed.
FUZZED_BY = {
    "common/images.py": "png", "common/io.py": "json", "common/packed.py": "tar", "common/zip_files.py": "zip",
    "evaluations/npz.py": "npz", "experiments/demo.py": "demo.py", "experiments/encoder.py": "demo.py",
    "experiments/judge.py": "demo.py", "models/autoencoder.py": "codec", "models/checkpoint.py": "checkpoint-sum",
    "models/weights_file.py": "checkpoint", "training/rewind.py": "rewind",
}  # fmt: skip
# They read back what they have just written, or write only.
OWN = {
    "benchmarks/encode.py",
    "benchmarks/on_gpu.py",
    "benchmarks/profiling.py",
    "preprocessing/encode_tokens.py",
    "preprocessing/destination.py",
    "models/safetensors_format.py",
}


def memory() -> None:
    bytearray(1 << 40)


def hang() -> None:
    time.sleep(60)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrong_type() -> None:
    raise TypeError("a text of a library")


def unclear() -> None:
    raise InputError("<class 'int'>")


def refuse() -> None:
    raise InputError("a.png: damaged")


def talk() -> None:
    os.write(2, b"a text of a library")


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (memory, "memory"), (hang, "hang"), (die, "died"), (wrong_type, "traceback"), (unclear, "message"),
        (refuse, "clear"), (talk, "printed"), (lambda: os.system("true"), "executed"), (lambda: None, "same"),
    ],
)  # fmt: skip
def test_each_way_to_end_is_seen(action, kind):
    def job(number: int) -> Outcome:
        return Watch().outcome(number, lambda: str(action() if number == 1 else None), "None", damaged=True)

    found = run_inputs(job, [0, 1, 2], seconds=0.5 if kind == "hang" else 20)
    assert [(outcome.number, outcome.kind) for outcome in found] == [(0, "same"), (1, kind), (2, "same")]


@pytest.mark.parametrize(("damaged", "kind"), [(True, "silent"), (False, "changed")])
def test_another_result_is_wrong_only_after_damage(damaged, kind):
    (outcome,) = run_inputs(lambda n: Watch().outcome(n, lambda: "b", "a", damaged), [0])
    assert outcome.kind == kind


def test_inputs_depend_on_seed_and_number_only():
    reader = replace(READERS["zip"], odd=(), invalid=())
    valid = {"a.zip": (b"PK" + bytes(200), b"PK" + bytes(100))}
    inputs = [reader.input(random.Random(f"0/{n}"), valid) for n in range(50)]
    assert inputs == [reader.input(random.Random(f"0/{n}"), valid) for n in range(50)]
    assert {change.kind for _, change in inputs} == {change.__name__ for change in RANDOM}


def test_command_lines_depend_on_the_seed_only():
    made = [command(random.Random(n)) for n in range(300)]
    assert made == [command(random.Random(n), made[n].program) for n in range(300)]  # as with --only and --input
    assert {one.program for one in made} == set(PROGRAMS)
    assert not any("\0" in word for one in made for word in one.argv)


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (0, "", "accepted"), (75, "", "resumable"), (2, "a.py: error: --seed x: allowed: 0 or greater", "clear"),
        (2, "nothing", "message"), (1, "", "message"), (-11, "", "died"), (None, "", "hang"),
        (1, "Traceback (most recent call last):\n  File \"x\", line 1\nKeyError: 'a'", "traceback"),
        (0, "/x.py:3: UserWarning: a library", "printed"),
    ],
)  # fmt: skip
def test_each_end_of_a_program_is_classified(status, said, kind):
    assert commands.classify(status, 0.0, said)[0] == kind


def test_work_in_progress_is_told_from_waiting():
    found = []
    for action in (hang, lambda: [None for _ in iter(int, 1)]):
        if not (process := os.fork()):
            os.setsid()
            action()
        found.append(commands.classify(*commands._wait(process, 0.8, quiet=0.5), "")[0])
    assert found == ["hang", "long"]


def test_overwritten_inputs_are_told_from_other_files():
    made = command(random.Random(0), "plot.py")._replace(argv=["exps/old/fid.jsonl", "--out", "exps/old/fid.jsonl"])
    before = {"exps/old/fid.jsonl": "1", "text.txt": "1"}
    for name, kind in (("exps/old/fid.jsonl", "overwritten"), ("text.txt", "replaced")):
        assert commands.changed_files(PROGRAMS["plot.py"], made, before, before | {name: "2"})[0] == kind
    assert commands.changed_files(PROGRAMS["plot.py"], made, before, before | {"new": "2"}) is None


def reads_files(path: Path) -> bool:
    """Return whether a module of the product calls one of READ_CALLS."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return any(call in READ_CALLS or call.rpartition(".")[2] in READ_CALLS for call in calls)


def test_every_module_that_reads_files_is_fuzzed():
    modules = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
    assert {path.relative_to(ROOT).as_posix() for path in modules if reads_files(path)} <= OWN | FUZZED_BY.keys()
    assert set(FUZZED_BY.values()) <= {*READERS, *PROGRAMS}


def test_a_small_part_finds_no_failure(tmp_path):
    """The long form: python tests/fuzz.py --inputs 5000 --commands 1000."""
    done = run_program("tests/fuzz.py", "--inputs", "2", "--commands", "6", "--keep", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
