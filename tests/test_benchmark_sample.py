"""The benchmarks of sampling and of codecs run and their reports are complete; no time is asserted."""

import json

import pytest

from benchmarks import encode, sample, timing
from common.errors import InputError
from tests.test_autoencoder import save_kl

TINY = "--device cpu --model SiT-S/8 --resolution 64 --batch-size 2 --steps 20 --timed-steps 1 --rounds 1"
TINY += " --deviation-steps 3 --pairs 2 --matrix-seconds 0 --seconds 0.01 --no-compile"


def run(*flags):
    sample.main([*TINY.split(), *map(str, flags)])


def test_the_report_is_complete(tmp_path, capsys):
    run("--json", tmp_path / "sample.json")
    result = json.loads((tmp_path / "sample.json").read_text())
    rows = result["rows"]
    assert [row["setting"] for row in rows] == [
        "published setting", "+ fused attention", "+ no projectors, time once", "+ network in bf16",
    ]  # fmt: skip
    for row in rows:
        assert all(row[name] > 0 for name in ("step_plain", "step_guided", "images_per_s", "ratio", "utilisation"))
        assert all(len(row[f"{kind}_quartiles"]) == 2 for kind in sample.KINDS)
    assert rows[0]["ratio"] == 1 and rows[0]["max_deviation"] == 0
    assert 0 <= rows[2]["rms_deviation"] < 1e-5 < rows[3]["rms_deviation"] < 0.05
    assert result["class_slot"]["flops"] > 0 and len(result["class_slot"]["latency_quartiles"]) == 2
    assert result["settings"]["batch_size"] == 2 and result["gflop"] > 0 and result["peak_memory_gb"] > 0
    assert capsys.readouterr().out.count("| + ") == 3


def test_a_form_that_was_measured_is_not_lost(tmp_path, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    path = tmp_path / "sample.json"
    monkeypatch.setattr(sample, "measure", lambda *given: given[-1]([{"setting": "first"}]) or stop())
    with pytest.raises(KeyboardInterrupt):
        run("--json", path)
    assert json.loads(path.read_text())["rows"] == [{"setting": "first"}]


def test_bad_flags_are_named():
    for flags, text in (
        (["--rounds", 0], "--rounds 0: must be greater than 0"),
        (["--batch-size", 0], "--batch-size 0: must be from 1 to 100,000, or auto"),
        (["--resolution", 20], "--resolution 20: must be a multiple of 8"),
        (["--resolution", 24, "--model", "SiT-S/2"], "--resolution 24: --model SiT-S/2 needs a multiple of 16"),
        (["--cfg-scale", 0.5], "--cfg-scale 0.5: must be 1"),
    ):
        with pytest.raises(InputError, match=text):
            run(*flags)


def test_the_codecs_report_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "matrix_rate", lambda *given: 1e9)
    flags = f"--vae {save_kl(tmp_path / 'codec')} --device cpu --resolution 32 --batch-size 2 --rounds 1 --no-compile"
    flags += f" --dtype bf16 --json {tmp_path / 'encode.json'}"
    encode.main(flags.split())
    result = json.loads((tmp_path / "encode.json").read_text())
    settings = ["one image at a time", "+ batch", "+ channels last", "+ network in bf16"]
    assert [(row["work"], row["setting"]) for row in result["rows"]] == [
        (work, setting) for work in ("encode", "decode") for setting in settings
    ]
    for row in result["rows"]:
        assert all(row[name] > 0 for name in ("images_per_s", "ratio", "utilisation", "memory_gb"))
        assert row["rms_deviation"] < (0.1 if "bf16" in row["setting"] else 0.01)
    assert result["flops"]["encode"] > 0 and result["flops"]["decode"] > 0
