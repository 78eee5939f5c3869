"""A loader process that is killed: the run saves its present step and ends, and the resumed run is the same."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from common.errors import LostProcess
from dataset import LatentDataset
from models.checkpoint import load_checkpoint
from tests.conftest import read_rows, run_training


def test_a_killed_loader_process_saves_the_run_and_ends_it(train_flags, monkeypatch, capsys) -> None:
    """With two micro-batches, and killed before the second one of a step."""
    flags = [*train_flags, "--max-train-steps", "4", "--gradient-accumulation-steps", "2", "--checkpointing-steps", "4"]
    expected = run_training([*flags, "--exp-name", "expected"])
    read, taken = LatentDataset.__getitem__, []

    def dies(self, i):
        taken.append(i)
        if get_worker_info() is not None and len(taken) == 8 * 1 + 4 + 1:
            time.sleep(0.5)  # the batches before are sent
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.05,))  # seconds; by default 5
        patch.setattr(LatentDataset, "__getitem__", dies)
        with pytest.raises(LostProcess, match=r"^a loader process was killed, probably because the memory"):
            run_training([*flags, "--exp-name", "run", "--num-workers", "1"])
    run = expected.with_name("run")
    assert [path.name for path in sorted((run / "checkpoints").glob("*.pt"))] == ["0000002.pt"]
    said = capsys.readouterr()
    assert "warning: a loader process was killed" in said.err and "stopped at step 2 of 4; the same command" in said.out
    run_training([*flags, "--exp-name", "run", "--resume", "latest"])
    found, wanted = (load_checkpoint(folder / "checkpoints" / "0000004.pt") for folder in (run, expected))
    for part in ("model", "ema"):
        assert all(torch.equal(found[part][name], wanted[part][name]) for name in wanted[part])
    losses = [[row["loss"] for row in read_rows(folder)] for folder in (run, expected)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
