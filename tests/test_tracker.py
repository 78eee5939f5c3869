"""A tracker that cannot start, or fails later, is a warning."""

import importlib.machinery
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import read_rows, run_training
from tests.test_train import with_flags
from training import tracker
from training.tracker import SafeTracker, cause_of


def fail(*_, **__):
    raise RuntimeError("No API key configured. Use `wandb login` to log in.")


class Wandb:
    """Stands for the package."""

    __spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def __init__(self, started: list):
        self.started = started

    def init(self, **how):
        self.started.append(how)
        config = SimpleNamespace(update=lambda *_, **__: None)
        return SimpleNamespace(config=config, log=fail, finish=fail)

    config = SimpleNamespace(update=lambda *_, **__: None)


def test_a_tracker_that_is_not_installed_is_a_warning(train_flags, monkeypatch, capsys):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    run = run_training(with_flags(train_flags, "--report-to", "wandb"))
    assert len(read_rows(run)) == 4
    expected = (
        "warning: --report-to wandb: the package is not installed (pip install wandb). The run continues; metrics"
    )
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("where", ["start", "later"])
def test_a_tracker_that_fails_is_one_warning(train_flags, monkeypatch, capsys, where):
    pytest.importorskip("wandb")
    started = []
    fake = Wandb(started)
    if where == "start":
        fake.init = fail
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = run_training(with_flags(train_flags, "--report-to", "wandb", "--exp-name", "a/b"))
    assert len(read_rows(run)) == 4
    assert capsys.readouterr().err.count("--report-to wandb: not logged in: `wandb login`, or WANDB_MODE=offline.") == 1
    assert all("/" not in how["id"] and how["id"].startswith("a-b-") and how["name"] == "a/b" for how in started)
    assert bool(started) == (where == "later")


def test_a_tracker_gets_nothing_after_a_failure(capsys):
    calls = []

    def log(values, step):
        calls.append(step)
        raise OSError("disk full")

    safe = SafeTracker(SimpleNamespace(name="tensorboard", log=log, finish=lambda: calls.append("finish")))
    for step in (1, 2):
        safe.log({"loss": 1.0}, step=step)
    safe.finish()
    assert calls == [1] and capsys.readouterr().err.count("--report-to tensorboard: disk full. The run") == 1


def test_causes_say_what_to_do():
    assert cause_of(ConnectionError("Run initialization has timed out after 90.0 sec")).startswith(
        "no connection; WANDB"
    )
    assert cause_of(ValueError("strange")) == "strange"
