import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest

from common.cli import (
    AUTO,
    BATCH_SIZE,
    BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    UNIT_INTERVAL,
    Config,
    batch_size,
    fixed_settings,
    flag_table,
    make_parser,
    parse,
    setting,
)
from common.io import InputError


@dataclass(frozen=True, kw_only=True)
class Sampler(Config):
    """sampler"""

    num_steps: int = setting(250, "steps of the solver", check=POSITIVE)
    mode: str = setting("sde", "SDE or ODE", choices=("sde", "ode"))
    scale: float = setting(1.0, "guidance scale, 100 % of it", check=NON_NEGATIVE, changeable=True)


@dataclass(frozen=True, kw_only=True)
class Example(Sampler):
    source: Path = setting(MISSING, "folder of images", flag="source")
    name: str = setting(MISSING, "name of the result")
    save_path: str | None = setting(None, "result file", flag="--save_path")
    size: int | str = setting(32, "images at a time", check=BATCH_SIZE, parse=batch_size)
    share: float | None = setting(None, "share of the images", check=UNIT_INTERVAL)
    decay: float = setting(0.9, "decay", check=BELOW_ONE)
    tf32: bool = setting(True, "TF32")
    qk_norm: bool | None = setting(None, "whether the network has it")

    def check_combination(self) -> None:
        if self.mode == "ode" and self.share is not None:
            raise InputError(f"--share {self.share} does not go with --mode ode")


def example(*flags: str) -> Example:
    return parse(Example, "Does things.", ["images", "--name", "x", *flags])


def test_values_have_the_types_of_their_fields_and_the_defaults():
    config = example()
    assert config == Example(source=Path("images"), name="x")
    assert (config.num_steps, config.scale, config.tf32, config.qk_norm, config.save_path) == (
        250,
        1.0,
        True,
        None,
        None,
    )
    config = example(
        "--num-steps", "3", "--no-tf32", "--qk-norm", "--save_path", "a.json", "--size", AUTO, "--share", "1"
    )
    assert (config.num_steps, config.tf32, config.qk_norm, config.save_path) == (3, False, True, "a.json")
    assert (config.size, config.share) == (AUTO, 1.0) and example("--size", "8").size == 8


def test_a_configuration_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().num_steps = 3


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--num-steps 0", r"--num-steps 0: must be greater than 0"),
        ("--num-steps many", r"--num-steps: invalid int value: 'many'"),
        ("--scale -1", r"--scale -1\.0: must be 0 or greater"),
        ("--scale nan", r"--scale: 'nan' is no finite number"),
        ("--decay 1", r"--decay 1\.0: must be at least 0 and less than 1"),
        ("--share 2", r"--share 2\.0: must be from 0 to 1"),
        ("--size 0", r"--size 0: must be 1 or greater, or auto"),
        ("--mode pde", r"--mode: invalid choice: 'pde' \(choose from .*sde.*ode"),
        ("--mode ode --share 0.5", r"--share 0\.5 does not go with --mode ode"),
        ("--num-step 3", r"--num-step: unknown argument; did you mean --num-steps\?"),
        ("--num_steps=3", r"--num_steps=3: unknown argument; did you mean --num-steps\?"),
        ("--ns 3", r"--ns: unknown argument; did you mean --num-steps\?"),
        ("--zzzzzz", r"--zzzzzz: unknown argument; --help lists all flags"),
        ("--name", r"--name: expected one argument"),
    ],
)
def test_a_bad_command_line_is_one_line_with_flag_value_and_what_is_allowed(flags, text):
    with pytest.raises(InputError, match=text):
        example(*flags.split())


def test_a_missing_flag_is_named():
    with pytest.raises(InputError, match="required: --name"):
        parse(Example, "Does things.", ["images"])


def test_values_are_checked_without_a_command_line_too():
    with pytest.raises(InputError, match="--mode pde: allowed: sde, ode"):
        Example(source=Path("images"), name="x", mode="pde")


def test_fixed_settings_are_those_that_a_resumed_run_keeps():
    assert fixed_settings(Sampler) == {"num_steps", "mode"}


def test_help_and_table_are_made_from_the_fields():
    text = make_parser(Example, "Does things.").format_help()
    assert "sampler:" in text and "steps of the solver (default: 250)" in " ".join(text.split())
    assert "100 % of it (default: 1)" in " ".join(text.split())
    lines = flag_table(Example).splitlines()
    assert lines[0] == "| sampler | default | |"
    assert "| `--num-steps` | 250 | steps of the solver (greater than 0) |" in lines
    assert "| `--mode` | sde | SDE or ODE (sde, ode) |" in lines
    assert "| `--scale`* | 1 | guidance scale, 100 % of it (0 or greater) |" in lines
    assert "| `source` | required | folder of images |" in lines and "| `--tf32` | on | TF32 |" in lines
