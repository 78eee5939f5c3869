import argparse

import numpy as np
import pytest
import torch

from common import distributed
from common.distributed import (
    broadcast_from_main,
    check_launch_settings,
    check_process_numbers,
    largest_batch,
    start_processes,
    to_host,
)
from common.errors import InputError
from tests.conftest import reset_accelerate, run_program

PROGRAM = r"""
import sys
sys.path.insert(0, ".")
from common.distributed import broadcast_from_main, largest_batch, start_processes
from common.errors import InputError

def attempt(size):
    if size > 8 >> accelerator.process_index:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

def refuse():
    raise InputError("no")

accelerator = start_processes("auto")
decided = broadcast_from_main(accelerator, lambda: f"by process {accelerator.process_index}")
print(f"decided {decided} batch {largest_batch(attempt, 16)}\n", end="", flush=True)  # as one write
try:
    broadcast_from_main(accelerator, refuse)
except InputError as error:
    print(f"refused: {error}\n", end="", flush=True)
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def test_all_processes_get_the_value_of_the_main_process(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    result = run_program(str(tmp_path / "program.py"), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(result.stdout.splitlines()) == ["decided by process 0 batch 4"] * 2 + ["refused: no"] * 2


def test_only_the_main_process_decides(monkeypatch):
    """A process that looked later by itself would not list the files that others have written by then."""
    sent = []
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda values: sent.append(values) or ["of the main one"])
    main, other = (argparse.Namespace(is_main_process=value, num_processes=2) for value in (True, False))
    for process in (main, other):
        assert broadcast_from_main(process, lambda: "decided") == "of the main one"
    assert sent == [["decided"], [None]]

    def refuse():
        raise InputError("no")

    monkeypatch.setattr(distributed, "broadcast_object_list", lambda values: [InputError("no")])
    for process in (main, other):
        with pytest.raises(InputError, match="no"):
            broadcast_from_main(process, refuse)


@pytest.mark.parametrize("variable", distributed.REFUSED_SETTINGS)
def test_settings_of_accelerate_that_the_code_does_otherwise_are_refused_by_name(variable):
    for value in ("", "no", "NO", "false"):
        check_launch_settings({variable: value})
    with pytest.raises(InputError, match=rf"environment variable {variable}=inductor \(.*\): not supported; .+"):
        check_launch_settings({variable: "inductor"})


def test_accelerates_accumulation_must_be_that_of_the_flag():
    variable = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    for steps, ours in (("1", 1), ("1", 4), ("4", 4)):
        check_launch_settings({variable: steps}, ours)
    with pytest.raises(InputError, match=f"{variable}=4 .*--gradient-accumulation-steps alone"):
        check_launch_settings({variable: "4"}, 2)


def test_the_flag_decides_the_accumulation(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    reset_accelerate()
    accelerator = start_processes("cpu", gradient_accumulation_steps=4)
    assert accelerator.gradient_accumulation_steps == 4 and accelerator.device.type == "cpu"


def test_convolutions_are_not_chosen_by_their_time(monkeypatch):
    monkeypatch.setattr("torch.backends.cudnn.benchmark", True)
    reset_accelerate()
    start_processes("cpu")
    assert not torch.backends.cudnn.benchmark


def test_a_process_without_a_gpu_and_apples_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 3 of this machine has no GPU: PyTorch finds 2 GPUs"):
        start_processes("auto")
    monkeypatch.undo()
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    reset_accelerate()
    assert start_processes("auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.cuda.is_available() or capsys.readouterr().out.count("this program runs on the CPU") == 1


def test_gpus_without_peer_access_are_told_to_nccl(monkeypatch):
    """Without it, accelerate ends a program that torchrun started on them."""
    monkeypatch.setattr(distributed, "uses_cuda", lambda device: True)
    monkeypatch.setattr(distributed, "check_cuda_p2p_ib_support", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(distributed, "Accelerator", lambda **how: how)
    monkeypatch.setattr(distributed.os, "environ", environment := {})
    assert start_processes("auto")["cpu"] is False
    assert environment == {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def device_that_holds(images, tried):
    """Return work that runs out of memory above a number of images."""

    def attempt(size):
        tried.append(size)
        if size > images:
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. {size} images do not fit")

    return attempt


@pytest.mark.parametrize(("holds", "found"), [(16, 16), (15, 8), (1, 1)])
def test_the_largest_batch_that_fits_is_found(holds, found, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: None)  # takes a second
    tried = []
    assert largest_batch(device_that_holds(holds, tried), 16) == found
    assert tried == [16 >> i for i in range(len(tried))] and tried[-1] == found


def test_no_batch_fits(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: None)
    with pytest.raises(InputError, match=r"^the GPU's memory is full: it is too small for a batch of one image$"):
        largest_batch(device_that_holds(0, []), 2)


def test_other_errors_do_not_count_as_out_of_memory():
    def attempt(size):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        largest_batch(attempt, 8)


def test_a_copy_to_the_host_gives_the_tensor():
    tensor = torch.arange(6).view(2, 3)
    assert np.array_equal(to_host(tensor)(), tensor.numpy())


@pytest.mark.gpu
def test_a_copy_from_the_gpu_is_complete_once_it_is_read():
    tensor = torch.randn(64, 1024, device="cuda")
    product = tensor @ tensor.T @ tensor
    arrived = to_host(product.T)
    product.zero_()  # after the copy, in the order of the stream
    assert np.array_equal(arrived(), (tensor @ tensor.T @ tensor).T.cpu().numpy())


@pytest.mark.parametrize(
    "variables",
    [
        "WORLD_SIZE=2",
        "LOCAL_RANK=x",
        "RANK=2 WORLD_SIZE=2",
        "LOCAL_RANK=1",
        "OMPI_COMM_WORLD_SIZE=x",
        "FORK_LAUNCHED=x",
    ],
)
def test_variables_of_a_launcher_that_describe_no_process_are_named(monkeypatch, variables):
    """A program would wait for processes that do not exist, or end with a traceback."""
    reset_accelerate()
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(InputError, match=r"^environment variables .*: no process can start with these") as found:
        start_processes("cpu")
    assert all(variable in str(found.value) for variable in variables.split())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        {"OMPI_COMM_WORLD_RANK": "0", "WORLD_SIZE": "2"},
    ],
)
def test_variables_of_a_launcher_are_accepted(environment):
    check_process_numbers(environment)
