"""Files are written completely or not at all, folders are locked, and programs end with one line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.io import (
    InputError,
    LostProcess,
    atomic_write,
    check_writable,
    explain,
    lock_folder,
    memory_message,
    printable,
    progress_bar,
    read_json,
    read_metrics,
    run_cli,
    unlock_folder,
    write_json,
)
from tests.conftest import ROOT


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(RuntimeError, match="power cut"), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("power cut")
    assert list(path.parent.iterdir()) == []
    with atomic_write(path) as file:
        file.write(b"complete")
        assert not path.exists()
    assert path.read_bytes() == b"complete" and list(path.parent.iterdir()) == [path]


def test_an_old_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError), atomic_write(path, "w") as file:
        file.write("new")
        raise OSError("no space left on device")
    assert path.read_text() == "old"


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b\.json: not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match=r"c\.json: no such file"):
        read_json(tmp_path / "c.json")


ROW = '{"step": %d, "loss": 1.5, "proj": null, "notes": ["a\\u2028b"]}'


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    lines = [ROW % 1, '{"step": 2, "lo', "", "[1]", '{"loss": 3}', '{"step": "3"}', '{"step": true}', '{"step": 4.5}']
    content = "\n".join([*lines, "[" * 100_000, ROW % 5]).encode() + b'\n\xff\xfe{"step"\n' + (ROW % 6).encode()
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"step": 7, "loss"')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5, 6]


LOCKER = """
import sys
from common.io import lock_folder
lock_folder(sys.argv[1], "training")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    folder = tmp_path / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", LOCKER, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, **pipes)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match=rf"run: process {first.pid} on .* is training there"):
        lock_folder(folder, "training")
    first.kill()
    first.communicate()
    lock_folder(folder, "training")
    lock_folder(folder, "training")  # the own lock is no error
    command = [sys.executable, "-c", LOCKER, str(folder)]
    assert "locked" not in subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **pipes).stdout
    unlock_folder(folder)
    assert not list(folder.iterdir())
    assert "locked" in subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **pipes).stdout


@pytest.mark.parametrize("place", ["there", "there/file/out.png", "file"])
def test_check_writable_names_the_flag(tmp_path, place):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    if place == "file":
        check_writable(tmp_path / "new" / "file", "--out")
        return
    with pytest.raises(InputError, match=r"--out .*there"):
        check_writable(tmp_path / place, "--out")


ENDS = {
    "raise io.InputError('--flag 1: bad')": (2, "x.py: error: --flag 1: bad"),
    "raise KeyboardInterrupt": (130, "x.py: interrupted"),
    "open('/nowhere/file')": (2, "x.py: error: /nowhere/file: No such file or directory"),
    "raise OSError(28, 'No space left on device')": (2, "x.py: error: No space left on device"),
    "raise MemoryError": (2, "x.py: error: the memory of this machine is full; give it smaller batches, or end other"),
    "raise RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer')": (
        1,
        "x.py: error: another process of this run has ended or does not answer; its own message says why",
    ),
}


@pytest.mark.parametrize("cause", ENDS)
def test_a_program_ends_with_one_line(cause):
    code = f"import sys\nfrom common import io\nsys.argv = ['a/x.py']\ndef main():\n    {cause}\nio.run_cli(main)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    status, text = ENDS[cause]
    assert result.returncode == status and text in result.stderr and "Traceback" not in result.stderr


def test_more_loader_processes_than_cores_are_no_warning():
    code = (
        "from torch.utils.data import DataLoader\nfrom common import io\n"
        "io.run_cli(lambda: DataLoader([0], num_workers=99999))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


def test_names_fit_on_one_line():
    assert printable("caf\udce9/a\n\tb é 香.jpg") == "caf\\udce9/a\\n\\tb é 香.jpg"


@pytest.mark.parametrize("end", ["", "raise io.InputError(name)"])
def test_any_name_can_be_printed_in_any_encoding(end):
    code = (
        f"from common import io\nname = 'caf\\udce9 \\u9999'\ndef main():\n    print(name)\n    {end}\nio.run_cli(main)"
    )
    for encoding in ("ascii", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
        assert result.returncode == (2 if end else 0) and b"Traceback" not in result.stderr
        assert result.stdout.startswith(b"caf\\udce9 ")


def test_a_text_file_keeps_the_bytes_of_names(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("caf\udce9")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "main", "shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False), (lambda: None, True, False)],
)
def test_a_bar_is_shown_by_the_main_process_on_a_terminal_only(monkeypatch, stream, main, shown):
    stream = stream()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress_bar([1, 2], main, desc="copying")) == [1, 2]
    with progress_bar(total=3, main=main) as bar:
        bar.update(2)
    assert ("copying" in stream.getvalue() if stream else False) == shown


def test_without_a_terminal_a_long_run_prints_lines(monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr("common.io.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(lines=True, desc="encoding", total=4000, unit="image") as bar:
        for _ in range(40):
            now[0] += 3
            bar.update(100)
    assert bar.n == 4000 and stream.getvalue() == "encoding: 2,000 of 4,000, 33.3 images/s, 0:01:00 left\n"


@pytest.mark.parametrize("more", [{"main": False}, {"lines": False}])
def test_no_lines_of_other_processes_or_short_work(monkeypatch, more):
    monkeypatch.setattr("common.io.LINE_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress_bar(**{"lines": True, "desc": "x", "total": 2, "unit": "image"} | more) as bar:
        bar.update()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("more", "shown"), [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_tqdm_disable_is_honoured(more, shown):
    code = "import sys; from common.io import progress_bar; sys.stderr.isatty = lambda: True; list(progress_bar([1]))"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | more
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and ("1/1" in found.stderr) == shown


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
        "the memory of GPU 1 (79.25 GiB) is full, 2.00 GiB more were needed, in step (test_io.py); give a smaller "
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
    ("value", "place"),
    [
        ({"fid": float("nan")}, "fid is nan"),
        ({"a": [1, {"b": float("-inf")}]}, r"a\[1\].b is -inf"),
        (float("inf"), "value"),
    ],
)
def test_json_never_holds_numbers_that_are_not_finite(tmp_path, value, place):
    (tmp_path / "x.json").write_text("before")
    with pytest.raises(InputError, match=rf"x\.json is not written: .*{place}.* finite numbers only"):
        write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


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
