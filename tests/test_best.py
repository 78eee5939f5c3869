"""Which evaluation becomes best.pt, whatever best.json holds."""

import json
import math

import pytest

from common import io
from training import best


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def keep(folder, text: str) -> None:
    (folder / "checkpoints" / "best.json").write_text(text)
    (folder / "checkpoints" / "best.pt").touch()


@pytest.mark.parametrize("fid", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_the_best(folder, fid) -> None:
    assert not best.is_best(folder, 10, fid)
    assert best.is_best(folder, 10, 1e9)


def test_the_lowest_fid_is_the_best(folder, said) -> None:
    keep(folder, '{"step": 5, "fid": 20.0}')
    assert best.is_best(folder, 10, 19.9) and not best.is_best(folder, 10, 20.0)
    assert said == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"fid": null}', '{"fid": NaN}', '{"fid": "3"}', None])
def test_the_rows_say_the_best_fid_where_best_json_does_not(folder, said, text) -> None:
    keep(folder, text or "")
    if text is None:
        (folder / "checkpoints" / "best.json").unlink()
    assert best.is_best(folder, 10, 1e9)  # no row has a FID
    rows = [{"step": 5, "fid": 20.0}, {"step": 8, "fid": None}, {"step": 9, "loss": 1.0}, {"step": 10, "fid": 1.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert best.is_best(folder, 10, 19.9) and not best.is_best(folder, 10, 20.0)
    assert "best.json is missing or damaged: the FIDs in metrics.jsonl are used instead" in said[0]


def test_a_full_disk_leaves_no_scores_of_another_checkpoint(folder, said, monkeypatch) -> None:
    keep(folder, '{"step": 5, "fid": 20.0}')

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(io.os, "fsync", full)
        best.write_best(folder, {"step": 10, "fid": 9.0})
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["best.pt"]
    assert "best.json cannot be written, training continues" in said[0]
    best.write_best(folder, {"step": 10, "fid": 9.0, "coherence": math.nan})
    assert io.read_json(folder / "checkpoints" / "best.json") == {"step": 10, "fid": 9.0, "coherence": None}
