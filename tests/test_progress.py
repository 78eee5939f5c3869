"""Progress bars, and lines of progress where there is no terminal."""

import io
import os
import subprocess
import sys

import pytest

from common.progress import progress_bar
from tests.conftest import ROOT


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
    code = "import sys; from common import progress; sys.stderr.isatty = lambda: True; list(progress.progress_bar([1]))"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | more
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and ("1/1" in found.stderr) == shown
