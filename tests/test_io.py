"""Files are written completely or not at all, and programs end with one line."""

import errno
import fcntl
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import temporary as files
from common.errors import InputError, LostProcess, explain, memory_message, printable, run_cli
from common.io import OwnFile, check_writable, parse_json, read_file, read_json, read_metrics, write_json
from common.progress import progress_bar
from common.temporary import atomic_write, clear_leftovers
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


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if ".tmp" in path.name)


def killed_writer(path: Path, end: str = "os.kill(os.getpid(), 9)") -> subprocess.Popen:
    """Start a process that writes half a file and then ends as `end` says; return it when the half is written."""
    code = f"""
import os, sys
from common.temporary import atomic_write
with atomic_write({str(path)!r}) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    {end}
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "written\n"
    return process


def write(path: Path, content: bytes = b"complete", **options: bool) -> None:
    with atomic_write(path, **options) as file:
        file.write(content)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_kept(tmp_path):
    path = tmp_path / "out.npz"
    living = killed_writer(path, end="sys.stdin.read()")
    killed_writer(path).wait()
    killed_writer(tmp_path / "other.npz").wait()
    assert len(leftovers(tmp_path)) == 3
    write(path, clear=False)
    assert len(leftovers(tmp_path)) == 3
    write(path)
    assert len(leftovers(tmp_path)) == 2 and path.read_bytes() == b"complete"
    living.communicate("")
    assert living.returncode == 0 and path.read_bytes() == b"half"
    clear_leftovers(tmp_path)
    assert leftovers(tmp_path) == []


def test_threads_of_one_process_write_one_file(tmp_path):
    """The second writer does not remove the first one's temporary file."""
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first" and leftovers(tmp_path) == []


@pytest.mark.parametrize("age", [0, 2])
@pytest.mark.parametrize("name", [".out.npz.0123456789abcdef.tmp", f"out.npz.{'0' * 32}.partial"])
def test_without_locks_only_old_leftovers_are_removed(tmp_path, monkeypatch, name, age):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / name, (time.time() - age * files.DEAD_AFTER,) * 2)
    write(tmp_path / "out.npz")
    assert (tmp_path / name).exists() == (age == 0) and (tmp_path / "out.npz").read_bytes() == b"complete"


def test_files_that_somebody_placed_are_neither_followed_nor_removed(tmp_path, monkeypatch):
    """Even if the name of the temporary file were known."""
    names = iter(["a" * 16, "b" * 16, "c" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(names))
    (tmp_path / "precious").write_text("content")
    (tmp_path / f".out.{'a' * 16}.tmp").symlink_to("precious")
    os.mkfifo(tmp_path / f".out.{'b' * 16}.tmp")
    write(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "content" and (tmp_path / "out").read_bytes() == b"complete"
    assert leftovers(tmp_path) == [f".out.{'a' * 16}.tmp", f".out.{'b' * 16}.tmp"]


def test_a_temporary_file_that_is_removed_before_it_is_locked_is_created_again(tmp_path, monkeypatch):
    real, calls = files._lock_temporary, []

    def lock(descriptor, path):
        if not calls:
            os.unlink(path)  # by the clearing of another process
        calls.append(path)
        return real(descriptor, path)

    monkeypatch.setattr(files, "_lock_temporary", lock)
    write(tmp_path / "out")
    assert len(set(calls)) == 2 and (tmp_path / "out").read_bytes() == b"complete"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("target", ["precious", "missing"])
def test_a_link_is_replaced_and_its_target_kept(tmp_path, target):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "out").symlink_to(target)
    write(tmp_path / "out")
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out").read_bytes() == b"complete"
    assert (tmp_path / "precious").read_text() == "content" and sorted(os.listdir(tmp_path)) == ["out", "precious"]


def place_read_only(path: Path) -> None:
    path.write_text("old")
    path.chmod(0o444)


KEPT = {
    "is read-only; make it writable": place_read_only,
    "Is a directory": os.mkdir,
    "is a device, pipe or socket": os.mkfifo,
    "is a device, pipe or socket; allowed": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_is_no_writable_file_is_kept(tmp_path, reason):
    path = tmp_path / "out"
    KEPT[reason](path)
    before = path.lstat()
    with pytest.raises(OSError, match=reason) as error:
        write(path)
    assert path.lstat() == before and leftovers(tmp_path) == [] and error.value.filename == str(path)


def test_the_longest_name_can_be_written(tmp_path):
    name = "\u00e9" * 127 + "x"  # 255 bytes
    write(tmp_path / name)
    killed_writer(tmp_path / name).wait()
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(OSError, match="File name too long"):
        write(tmp_path / (name + "y"))


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "out"
    write(path, b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(OSError) as error:
            write(path, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert explain(error.value, "") == (f"{path}: File too large", 2)
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_for_the_next_writer(tmp_path, number):
    path = tmp_path / "out"
    killed_writer(path, end=f"os.kill(os.getpid(), {int(number)}); sys.stdin.read()").wait()
    assert len(leftovers(tmp_path)) == (number == signal.SIGTERM) and not path.exists()  # Ctrl-C removes it at once
    write(path)
    assert leftovers(tmp_path) == []


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b\.json: not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match=r"c\.json: no such file"):
        read_json(tmp_path / "c.json")
    with pytest.raises(InputError, match="is a folder; allowed: a JSON file"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,}', "line 1, column 9"),
        (b"{} x", "line 1, column 4"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b"[" + b"9" * 1_000_000 + b"]", "a number has too many digits"),
        (b'{"a": NaN}', "the number NaN is not finite"),
        (b"[-Infinity]", "the number -Infinity is not finite"),
        (b"[1e999]", "the number 1e999 is not finite"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "the name 'c' occurs twice"),
        (b"", "line 1, column 1"),
    ],
)
def test_bytes_that_are_not_json(data, message):
    with pytest.raises(InputError, match=f"^not valid JSON.*{message}"):
        parse_json(data)


def test_json_in_all_encodings_that_it_allows():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-le"):
        assert parse_json('{"ä": [1, 2.5]}'.encode(encoding)) == {"ä": [1, 2.5]}


def test_files_that_are_not_regular_are_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        server.bind("socket")
        for path in (tmp_path / "fifo", "/dev/zero", "/dev/null"):
            with pytest.raises(InputError, match="is not a regular file, but a fifo, a device or a socket"):
                read_file(path)
        with pytest.raises(InputError, match="socket: cannot be read"):
            read_json(tmp_path / "socket")


def test_a_file_that_is_too_large_or_grows_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a") == b"12345"
    monkeypatch.setattr("common.io.MAX_FILE", 4)
    with pytest.raises(InputError, match="has 5 bytes; allowed: 4"):
        read_file(tmp_path / "a")
    with pytest.raises(InputError, match="its size changed while it was read"):
        read_file("/proc/self/stat")  # states 0 bytes


ROW = '{"step": %d, "loss": 1.5, "proj": null, "notes": ["a\\u2028b"]}'


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    lines = [ROW % 1, '{"step": 2, "lo', "", "[1]", '{"loss": 3}', '{"step": "3"}', '{"step": true}', '{"step": 4.5}']
    content = "\n".join([*lines, "[" * 100_000, ROW % 5]).encode() + b'\n\xff\xfe{"step"\n' + (ROW % 6).encode()
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"step": 7, "loss"')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5, 6]


@pytest.mark.parametrize("place", ["there", "there/file/out.png", "file"])
def test_check_writable_names_the_flag(tmp_path, place):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    if place == "file":
        check_writable(tmp_path / "new" / "file", "--out")
        return
    with pytest.raises(InputError, match=r"--out .*there"):
        check_writable(tmp_path / place, "--out")


@pytest.fixture
def inputs(tmp_path):
    """A folder `data` with a file, a file, and links to both; the working directory is their folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/image.png").write_bytes(b"image")
    (tmp_path / "input.npz").write_bytes(b"input")
    os.link(tmp_path / "input.npz", tmp_path / "hard.npz")
    (tmp_path / "link.npz").symlink_to("input.npz")
    (tmp_path / "linked").symlink_to("data")
    return [tmp_path / "data", tmp_path / "input.npz", None, tmp_path / "missing"]


@pytest.mark.parametrize(
    "output",
    ["input.npz", "./data/../input.npz", "link.npz", "hard.npz", "data/image.png", "data/new.json", "linked/sub/new"],
)
def test_an_output_must_not_be_an_input_or_in_one(tmp_path, monkeypatch, inputs, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--out .*(is read by this program|, which this program reads); choose"):
        check_writable(output, "--out", inputs)


@pytest.mark.parametrize("output", ["other.npz", "database/x", "data.json", "new/input.npz"])
def test_an_output_may_be_next_to_the_inputs(tmp_path, inputs, output):
    check_writable(tmp_path / output, "--out", inputs)


def test_foreign_files_are_kept(tmp_path):
    own = OwnFile("a result", lambda path: path.read_text() == "result")
    (tmp_path / "foreign").write_text("thesis")
    (tmp_path / "result").write_text("result")
    for name in ("result", "new"):
        check_writable(tmp_path / name, "--out", own=own)
    with pytest.raises(InputError, match=r"--out .*foreign: exists and is not a result; choose another name"):
        check_writable(tmp_path / "foreign", "--out", own=own)


def test_names_that_no_file_can_have_are_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path, problem in (
        (tmp_path / ("x" * 60_000), "a name in it has 60,000 bytes; allowed: 255"),
        (tmp_path / ("ä" * 200), "a name in it has 400 bytes"),
        ("x/" * 3000 + "y", "cannot be used"),
        (loop / "file", "cannot be used|is not a writable folder"),
        (tmp_path / "pipe", "is a device or a pipe"),
        ("/dev/null", "is a device or a pipe"),
    ):
        with pytest.raises(InputError, match=problem) as caught:
            check_writable(path, "--out")
        assert str(caught.value).startswith("--out ") and len(str(caught.value)) < 500


ENDS = {
    "raise errors.InputError('--flag 1: bad')": (2, "x.py: error: --flag 1: bad"),
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
    code = (
        f"import sys\nfrom common import errors\nsys.argv = ['a/x.py']\ndef main():\n    {cause}\nerrors.run_cli(main)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    status, text = ENDS[cause]
    assert result.returncode == status and text in result.stderr and "Traceback" not in result.stderr


def test_more_loader_processes_than_cores_are_no_warning():
    code = (
        "from torch.utils.data import DataLoader\nfrom common import errors\n"
        "errors.run_cli(lambda: DataLoader([0], num_workers=99999))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


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
    monkeypatch.setattr("common.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(lines=True, desc="encoding", total=4000, unit="image") as bar:
        for _ in range(40):
            now[0] += 3
            bar.update(100)
    assert bar.n == 4000 and stream.getvalue() == "encoding: 2,000 of 4,000, 33.3 images/s, 0:01:00 left\n"


@pytest.mark.parametrize("more", [{"main": False}, {"lines": False}])
def test_no_lines_of_other_processes_or_short_work(monkeypatch, more):
    monkeypatch.setattr("common.progress.LINE_SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress_bar(**{"lines": True, "desc": "x", "total": 2, "unit": "image"} | more) as bar:
        bar.update()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("more", "shown"), [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_tqdm_disable_is_honoured(more, shown):
    code = (
        "import sys; from common.progress import progress_bar; sys.stderr.isatty = lambda: True; "
        "list(progress_bar([1]))"
    )
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


def test_json_never_holds_numbers_that_are_not_finite(tmp_path):
    (tmp_path / "x.json").write_text("before")
    with pytest.raises(InputError, match=r"x\.json is not written: a number is NaN or infinite"):
        write_json(tmp_path / "x.json", {"a": [1, {"b": float("-inf")}]})
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
