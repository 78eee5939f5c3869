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


def is_best(folder, fid: float, **how) -> bool:
    return best.is_best(folder, {"step": 10, "fid": fid, **how})


@pytest.mark.parametrize("fid", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_the_best(folder, fid) -> None:
    assert not is_best(folder, fid)
    assert is_best(folder, 1e9)


def test_the_lowest_fid_is_the_best(folder, said) -> None:
    keep(folder, '{"step": 5, "fid": 20.0}')
    assert is_best(folder, 19.9) and not is_best(folder, 20.0)
    assert is_best(folder, 19.9, reference="a")  # an older best.json does not say its reference
    assert said == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"fid": NaN}', '{"fid": "3"}', None])
def test_the_rows_say_the_best_fid_where_best_json_does_not(folder, said, text) -> None:
    keep(folder, text or "")
    if text is None:
        (folder / "checkpoints" / "best.json").unlink()
    assert is_best(folder, 1e9)  # no row has a FID
    rows = [{"step": 5, "fid": 20.0}, {"step": 8, "fid": None}, {"step": 9, "loss": 1.0}, {"step": 10, "fid": 1.0}]
    rows.append({"step": 6, "fid": 2.0, "num_samples": 1000})  # not comparable
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert is_best(folder, 19.9, num_samples=50) and not is_best(folder, 20.0, num_samples=50)
    assert "best.json is missing or damaged: the FIDs in metrics.jsonl are used instead" in said[0]


@pytest.mark.parametrize("name", best.MEASURED_BY)
def test_a_best_checkpoint_of_another_reference_is_set_aside(folder, said, name) -> None:
    how = {"reference": "a", "num_samples": 10, "num_steps": 5}
    scores = json.dumps({"step": 5, "fid": 2.0, **how})
    keep(folder, scores)
    assert not is_best(folder, 3.0, **how)
    assert is_best(folder, 3.0, **{**how, name: "other"})
    assert "cannot be compared with this one; best.pt is now in" in said[0]
    assert not list((folder / "checkpoints").iterdir())
    aside = folder / "set-aside" / "1" / "checkpoints"
    assert (aside / "best.json").read_text() == scores and (aside / "best.pt").exists()


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
