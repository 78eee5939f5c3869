"""Programs end with one line, and messages fit a terminal."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import (
    LONGEST_LINE,
    LONGEST_WORD,
    InputError,
    LostProcess,
    explain,
    for_terminal,
    memory_message,
    printable,
    run_cli,
)
from tests.conftest import ROOT

ENDS = {
    "raise InputError('--flag 1: bad')": (2, "x.py: error: --flag 1: bad"),
    "raise KeyboardInterrupt": (130, "x.py: interrupted"),
    "open('/nowhere/file')": (2, "x.py: error: /nowhere/file: No such file or directory"),
    "raise OSError(28, 'No space left on device')": (2, "x.py: error: No space left on device"),
    "raise MemoryError": (2, "x.py: error: the memory of this machine is full"),
    "raise RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer')": (
        1,
        "x.py: error: another process of this run has ended or does not answer; its own message says why",
    ),
}


@pytest.mark.parametrize("cause", ENDS)
def test_a_program_ends_with_one_line(cause, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["a/x.py"])
    monkeypatch.setattr("common.errors.signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: exec(cause))
    status, text = ENDS[cause]
    assert ended.value.code == status and text in capsys.readouterr().err


def test_more_loader_processes_than_cores_are_no_warning():
    with warnings.catch_warnings(record=True) as found:
        run_cli(lambda: DataLoader([0], num_workers=99999))
    assert not found


def test_names_fit_on_one_line():
    assert printable("caf\udce9/a\n\tb é 香.jpg") == "caf\\udce9/a\\n\\tb é 香.jpg"


@pytest.mark.parametrize("end", ["", "raise errors.InputError(name)"])
def test_any_name_can_be_printed_in_any_encoding(end):
    program = f"from common import errors\nname = 'caf\\udce9 \\u9999'\ndef main():\n    print(name)\n    {end}\n"
    code = program + "errors.run_cli(main)"
    for encoding in ("ascii", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
        assert result.returncode == (2 if end else 0) and b"Traceback" not in result.stderr
        assert result.stdout.startswith(b"caf\\udce9 ")


# What torch says, with the numbers that a message keeps.
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.25 GiB of which 1.10 GiB is "
    "free. Including non-PyTorch memory, this process has 78.14 GiB memory in use."
)


def test_a_full_memory_is_told_with_device_place_and_advice():
    def step():
        raise torch.OutOfMemoryError(FULL)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        step()
    message, status = explain(caught.value, "give a smaller --batch-size")
    assert message == (
        "the memory of GPU 1 (79.25 GiB) is full, 2.00 GiB more were needed, in step (test_errors.py); give a smaller "
        "--batch-size, or end other programs that use this memory"
    )
    assert status == 2


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory is full"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "the GPU's memory is full",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "the memory of this machine is full",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_other_forms_of_a_full_memory(error, text):
    assert memory_message(error) == text
    assert text is not None or explain(error, "") == (None, 1)


@pytest.mark.parametrize(
    ("error", "text", "status"),
    [
        (LostProcess("a loader process was killed"), "a loader process was killed", 1),
        (RuntimeError("can't start new thread"), "allows no more processes, threads or open files", 2),
        (BlockingIOError(11, "Resource temporarily unavailable"), "allows no more processes", 2),
        (OSError(24, "Too many open files"), "ulimit -u and -n", 2),
    ],
)
def test_helpers_that_end_or_cannot_start_are_one_line(error, text, status):
    message, found = explain(error, "")
    assert text in message and "\n" not in message and found == status


def test_an_error_that_another_process_prints_is_not_printed_again(monkeypatch, capsys):
    def refuse() -> None:
        error = InputError("bad")
        error.said_by_another = True
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(refuse)
    assert ended.value.code == 2 and capsys.readouterr().err == ""


def test_plain_messages_stay():
    message = "a.png: damaged; do this:\n  python a.py --x 'é'\n"
    assert for_terminal(message) == message


def test_control_characters_are_escaped():
    assert for_terminal("a\x1b[31m\r\x00\udcff\tb") == "a\\x1b[31m\\r\\x00\\udcff\\tb"


def test_long_words_and_lines_are_cut():
    assert for_terminal("label " + "a" * 60_000 + " of b") == f"label {'a' * 200}... (60,000 characters) of b"
    assert for_terminal("a" * LONGEST_WORD) == "a" * LONGEST_WORD
    assert len(for_terminal("a " * 100_000)) < LONGEST_LINE
