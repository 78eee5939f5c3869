"""The fuzzing harness: it sees each kind of failure, it knows every reader, and a small part of it finds no failure."""

from __future__ import annotations

import ast
import os
import random
import signal
import time

import pytest

from common.errors import InputError
from tests.conftest import ROOT, run_program
from tests.fuzzing import commands
from tests.fuzzing.command_lines import PROGRAMS, command
from tests.fuzzing.mutations import RANDOM
from tests.fuzzing.readers import READERS
from tests.fuzzing.worker import Outcome, Watch, run_inputs

# Calls that read bytes from outside.
READ_CALLS = {
    "Image.open", "json.loads", "json.load", "torch.load", "np.load", "read_array", "zipfile.ZipFile", "tarfile.open",
    "safe_open", "load_file", "from_pretrained",
}  # fmt: skip
# The functions that make such calls, and a reader or a program of the harness by which each is fuzzed.
FUZZED_BY = {
    ("common/images.py", "open_image"): "png",
    ("common/io.py", "parse_json"): "json",
    ("common/io.py", "parse_row"): "metrics",
    ("common/packed.py", "_first_members"): "tar",
    ("common/zip_files.py", "_directory"): "zip",
    ("evaluations/npz.py", "_archive"): "npz",
    ("experiments/demo.py", "score"): "demo.py",
    ("experiments/judge.py", "load_judge"): "demo.py",
    ("generation/sample_set.py", "_read_cls_tokens"): "cls-tokens",
    ("models/autoencoder.py", "_load_autoencoder"): "codec",
    ("models/checkpoint.py", "_verify"): "checkpoint-sum",
    ("models/weights_file.py", "_check_header"): "encoder",
    ("models/weights_file.py", "_check_pickle"): "checkpoint",
    ("models/weights_file.py", "read_safetensors"): "export",
    ("models/weights_file.py", "read_weights_file"): "checkpoint",
    ("preprocessing/destination.py", "_settings_in_zip"): "destination",
}
# They read back what they have just written, or write only.
OWN = {
    ("benchmarks/encode.py", "copy_files"), ("evaluations/npz.py", "write_npz"),
    ("preprocessing/destination.py", "_pack"),
    ("models/safetensors_format.py", "write_network"), ("preprocessing/destination.py", "_check"),
}  # fmt: skip


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


@pytest.mark.parametrize("name", READERS)
def test_inputs_depend_on_seed_and_number_only(name):
    reader = READERS[name]
    valid = {file: (b"PK" + bytes(200), b"PK" + bytes(100)) for file in reader.files}
    plain = type(reader)(reader.make, reader.read, reader.files, checked=reader.checked)
    inputs = [plain.input(random.Random(f"0/{n}"), valid) for n in range(50)]
    assert inputs == [plain.input(random.Random(f"0/{n}"), valid) for n in range(50)]
    assert {change.kind for _, change in inputs} == {change.__name__ for change in RANDOM}


def test_command_lines_depend_on_the_seed_only():
    made = [command(random.Random(n)) for n in range(300)]
    assert made == [command(random.Random(n)) for n in range(300)]
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
    assert commands.classify(status, 0.1, 25, said)[0] == kind


def test_overwritten_inputs_are_told_from_other_files():
    made = command(random.Random(0), "plot.py")._replace(argv=["exps/old/fid.jsonl", "--out", "exps/old/fid.jsonl"])
    before = {"exps/old/fid.jsonl": "1", "text.txt": "1"}
    for name, kind in (("exps/old/fid.jsonl", "overwritten"), ("text.txt", "replaced")):
        assert commands.changed_files(PROGRAMS["plot.py"], made, before, before | {name: "2"})[0] == kind
    assert commands.changed_files(PROGRAMS["plot.py"], made, before, before | {"new": "2"}) is None


def reading_functions() -> set[tuple[str, str]]:
    """Return file and name of each function of the product that calls one of READ_CALLS."""
    found = set()
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("tests/", ".", "docs/", "build/")) or "site-packages" in name:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                calls = (ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call))
                if any(call in READ_CALLS or call.rpartition(".")[2] in READ_CALLS for call in calls):
                    found.add((name, function.name))
    return found


def test_every_function_that_reads_files_is_fuzzed():
    assert reading_functions() - OWN == set(FUZZED_BY)
    assert set(FUZZED_BY.values()) <= {*READERS, *PROGRAMS}


def test_a_small_part_finds_no_failure(tmp_path):
    """The long form: python tests/fuzz.py --inputs 5000 --commands 1000."""
    done = run_program("tests/fuzz.py", "--inputs", "3", "--commands", "10", "--keep", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
