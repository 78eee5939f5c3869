"""A sharded run equals the run of one process."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from models.checkpoint import load_checkpoint, load_model
from tests.conftest import read_rows, run_training
from tests.processes import Training
from tests.test_resume import LAST, STEPS, assert_same_run, finish, flags_of, poison, run_folder
from tests.test_sit import small
from training import parallelism
from training.preemption import EXIT_RESUMABLE

pytestmark = [
    pytest.mark.cpu,  # two processes
    pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on GPUs only"),
]
LOGGED = ("step", "loss", "denoise", "proj", "cls", "grad_norm")


def assert_close_runs(one, other):
    ours, theirs = ([[row[name] for name in LOGGED] for row in read_rows(run)] for run in (one, other))
    assert len(ours) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    a, b = (load_checkpoint(run / "checkpoints" / LAST) for run in (one, other))
    for part in ("model", "ema"):
        assert list(a[part]) == list(b[part])
        for key, value in a[part].items():
            torch.testing.assert_close(value, b[part][key], rtol=1e-4, atol=1e-5)
    assert a["opt"]["state"].keys() == b["opt"]["state"].keys()
    for index, state in a["opt"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(value, b["opt"]["state"][index][name], rtol=1e-3, atol=1e-5)


def test_same_losses_and_same_file_as_ddp_and_one_process(train_flags, tmp_path):
    more = ("--log-steps", "1", "--sampling-steps", str(STEPS), "--grid-samples", "2", "--grid-num-steps", "3")
    alone = finish(flags_of(train_flags, "alone", *more), tmp_path)
    ddp = finish(flags_of(train_flags, "ddp", *more), tmp_path, processes=2)
    sharded = finish(flags_of(train_flags, "sharded", "--fsdp", *more), tmp_path, processes=2)
    assert_close_runs(alone, sharded)
    assert_close_runs(ddp, sharded)
    model = load_model(sharded / "checkpoints" / LAST)  # rebuilt from the file alone
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in load_model(alone / "checkpoints" / LAST).parameters()
    )
    starts = [json.loads((run / "starts.jsonl").read_text()) for run in (ddp, sharded)]
    assert starts[0]["parameters"] == starts[0]["parameters_kept"] == starts[1]["parameters"]
    assert starts[1]["parameters_kept"] == pytest.approx(starts[1]["parameters"] / 2, rel=0.02)
    grids = [np.array(Image.open(run / "samples" / f"{STEPS:07d}.png"), dtype=int) for run in (alone, sharded)]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def print_gathered() -> None:
    """Have this training process print the dtypes in which it gathers weights."""
    original = parallelism.fully_shard

    def fully_shard(module, mp_policy=None, **options):
        os.write(1, f"gathers {mp_policy and mp_policy.param_dtype}\n".encode())
        original(module, **options, **({} if mp_policy is None else {"mp_policy": mp_policy}))

    parallelism.fully_shard = fully_shard


def test_autocast_gathers_in_its_dtype_and_has_the_bits_of_ddp(train_flags, tmp_path):
    """Gradients are not clipped, because the order of the sum in their norm differs."""
    runs = []
    for name, more in (("ddp", ()), ("sharded", ("--fsdp",))):
        flags = flags_of(train_flags, name, "--log-steps", "1", "--mixed-precision", "bf16", "--max-grad-norm", "1e6")
        flags = [*flags, *more, "--max-train-steps", "4", "--checkpointing-steps", "4"]
        training = Training(flags, tmp_path / f"{name}.txt", 2, print_gathered)
        assert training.wait() == 0, training.text()
        runs.append(run_folder(flags))
    gathered = [line for line in training.text().splitlines() if line.startswith("gathers")]
    blocks = 2 * 2  # on two processes
    assert gathered.count("gathers torch.bfloat16") == blocks, gathered
    assert gathered.count("gathers None") == blocks + 4  # those of the average, and twice what is outside of blocks
    losses = [[[row[name] for name in LOGGED if name != "grad_norm"] for row in read_rows(run)] for run in runs]
    assert losses[0] == losses[1]
    ddp, sharded = (load_checkpoint(run / "checkpoints" / "0000004.pt") for run in runs)
    pairs = [(ddp[part][name], sharded[part][name]) for part in ("model", "ema") for name in ddp[part]]
    for index, state in ddp["opt"]["state"].items():
        pairs += [(value, sharded["opt"]["state"][index][name]) for name, value in state.items()]
    assert all(one.dtype == other.dtype == torch.float32 and torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_only_weights_that_autocast_casts_are_gathered_in_its_dtype(autocast):
    policy = parallelism.gathering(small().blocks[0], autocast)
    assert (policy.param_dtype, policy.reduce_dtype) == (autocast, torch.float32) and not policy.cast_forward_inputs
    assert parallelism.gathering(small(qk_norm=True).blocks[0], autocast).param_dtype is None
    assert parallelism.gathering(small().blocks[0], None).param_dtype is None


def test_stopped_and_resumed_bit_for_bit(train_flags, tmp_path):
    more = ("--gradient-accumulation-steps", "2", "--mixed-precision", "bf16")
    undisturbed = finish(flags_of(train_flags, "undisturbed", "--fsdp", *more), tmp_path, processes=2)
    flags = flags_of(train_flags, "stopped", "--fsdp", *more, "--log-steps", "1")
    training = Training([*flags, "--checkpointing-steps", "100"], tmp_path / "output.txt", processes=2)
    training.wait_for_lines(run_folder(flags) / "metrics.jsonl", lines=4)
    training.signal(signal.SIGTERM)
    assert training.wait() == EXIT_RESUMABLE, training.text()
    finish(flags, tmp_path, processes=2)
    (run_folder(flags) / "metrics.jsonl").write_bytes((undisturbed / "metrics.jsonl").read_bytes())
    assert_same_run(undisturbed, run_folder(flags))


def test_sharded_and_unsharded_runs_resume_each_other(train_flags, tmp_path):
    """Sharded, then DDP on two processes, then sharded again, then one process."""
    undisturbed = finish(flags_of(train_flags, "undisturbed", "--log-steps", "1"), tmp_path)
    flags = flags_of(train_flags, "changed", "--log-steps", "1")
    finish([*flags, "--fsdp", "--max-train-steps", "3"], tmp_path, processes=2)
    finish([*flags, "--max-train-steps", "6"], tmp_path, processes=2)
    finish([*flags, "--fsdp", "--max-train-steps", "9"], tmp_path, processes=2)
    finish(flags, tmp_path)
    assert_close_runs(undisturbed, run_folder(flags))


def test_a_poisoned_sample_is_skipped(train_flags, data, tmp_path):
    poison(data, 7, float("nan"))
    flags = flags_of(train_flags, "poisoned", "--fsdp", "--data-dir", str(data))
    checkpoint = load_checkpoint(finish(flags, tmp_path, processes=2) / "checkpoints" / LAST)
    for part in ("model", "ema"):
        assert all(tensor.isfinite().all() for tensor in checkpoint[part].values())
    assert {state["step"].item() for state in checkpoint["opt"]["state"].values()} == {STEPS - 4}


def test_one_process_cannot_shard(train_flags):
    with pytest.raises(InputError, match="--fsdp with 1 process"):
        run_training(flags_of(train_flags, "alone", "--fsdp"))


def test_weights_that_are_not_finite_end_all_processes(train_flags, tmp_path):
    flags = [*flags_of(train_flags, "broken", "--fsdp"), "--adam-epsilon", "0", "--log-steps", "1"]
    training = Training(flags, tmp_path / "output.txt", processes=2)
    assert training.wait() == 2
    assert training.text().count("not finite at step 1; at step 0 they were finite") == 2, training.text()
    assert not list((run_folder(flags) / "checkpoints").glob("*.pt"))
