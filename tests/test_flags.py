import argparse

import pytest
import torch

from files import InputError
from flags import AUTO, SWITCH, batch_size, check_batch_size, finite_float, flag, parse, uses_cuda


def test_groups_of_flags_become_one_command_line(capsys):
    groups = {
        "first": lambda add: add("--num-steps", type=int, default=3),
        "second": lambda add: add("--flip", action=SWITCH, default=False),
    }
    assert vars(parse("Does things.", groups, ["--flip"])) == {"num_steps": 3, "flip": True}
    with pytest.raises(SystemExit):
        parse("Does things.", groups, ["--num", "4"])  # a flag cut short may mean another one tomorrow
    assert "unrecognized arguments: --num 4" in capsys.readouterr().err
    assert flag("num_steps") == "--num-steps"


def test_batch_sizes():
    assert batch_size("12") == 12 and batch_size("auto") == AUTO
    check_batch_size("--batch-size", AUTO)
    with pytest.raises(InputError, match="--batch-size 0: must be at least 1, or auto"):
        check_batch_size("--batch-size", 0)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "many"])
def test_numbers_that_are_none(text):
    assert finite_float("-2.5e-3") == -2.5e-3
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no finite number"):
        finite_float(text)


@pytest.mark.parametrize("there", [True, False])
def test_the_device_of_a_flag(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert not uses_cuda("cpu") and uses_cuda("auto") == there
    if there:
        assert uses_cuda("cuda")
    else:
        with pytest.raises(InputError, match="--device cuda: no CUDA device is available"):
            uses_cuda("cuda")
