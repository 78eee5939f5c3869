"""The kills themselves: they land in a program whose first run was a slow one."""

from __future__ import annotations

from tests.interrupt import survives_kills

FIRST_RUN_IS_SLOW = """
import sys, time
from pathlib import Path
folder, seen = Path(sys.argv[2]), Path(__file__).with_name("seen")
time.sleep(0 if seen.exists() else 0.4)
folder.mkdir(exist_ok=True)
(folder / "file").touch()
time.sleep(0.25)
seen.touch()
"""


def test_kills_land_after_a_slow_first_run(tmp_path):
    (tmp_path / "program.py").write_text(FIRST_RUN_IS_SLOW)
    (tmp_path / "work").mkdir()
    assert survives_kills(str(tmp_path / "program.py"), [], tmp_path / "work", "", kills=2) == 1
