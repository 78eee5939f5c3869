"""The output of a preprocessing program: who may write there, and which files it consists of."""

import subprocess
import sys
import zipfile

import pytest

from common.errors import InputError
from common.temporary import atomic_write
from preprocessing.destination import Destination
from tests.conftest import ROOT, contents

HOLDER = """
import sys
from preprocessing.destination import Destination
Destination(sys.argv[1], "convert").claim({})
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_one_run_at_a_time(name, tmp_path):
    destination, pipes = tmp_path / name, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLDER, str(destination)]
    first = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert first.stdout.readline() == "claimed\n"
    half_written = Destination(destination, "convert").folder / ".img00000000.png.123.tmp"
    half_written.write_bytes(b"")
    with pytest.raises(InputError, match=rf"out.*: process {first.pid} on .* is writing there; wait"):
        Destination(destination, "convert").claim({})
    assert half_written.exists()
    first.kill()
    first.communicate()
    mine = Destination(destination, "convert")
    mine.claim({})
    assert not half_written.exists()
    mine.finish({"labels": []})
    left = contents(destination) if not mine.is_zip else zipfile.ZipFile(destination).namelist()
    assert set(left) == {".convert.json", "dataset.json"} and [*tmp_path.iterdir()] == [destination]


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_files_of_a_zip_are_not_collected_through_a_link(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.zip.parts").symlink_to(target)
    with pytest.raises(InputError, match=r"\.out\.zip\.parts: is a link; remove it"):
        Destination(tmp_path / "out.zip", "convert").claim({})
    assert not any((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "missing").exists()


def test_a_file_that_a_lost_process_still_writes_is_not_packed(tmp_path):
    destination = Destination(tmp_path / "out.zip", "convert")
    destination.claim({})
    lost = atomic_write(destination.folder / "a.png", clear=False)
    with pytest.raises(FileNotFoundError), lost as file:  # its folder is removed when the zip is complete
        file.write(b"half")
        destination.finish({"labels": []})
    assert set(zipfile.ZipFile(tmp_path / "out.zip").namelist()) == {".convert.json", "dataset.json"}
