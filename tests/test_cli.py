import dataclasses
import json
from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest

from common.checks import AUTO, BATCH_SIZE, BELOW_ONE, NON_NEGATIVE, POSITIVE, UNIT_INTERVAL
from common.cli import Config, batch_size, changed, fixed_settings, flag_table, make_parser, parse, setting, uses_cuda
from common.errors import InputError


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
        ("--num-steps many", r"--num-steps: 'many' is not a whole number"),
        ("--scale -1", r"--scale -1\.0: must be 0 or greater"),
        ("--scale nan", r"--scale: 'nan' is not a finite number"),
        ("--decay 1", r"--decay 1\.0: must be at least 0 and less than 1"),
        ("--share 2", r"--share 2\.0: must be from 0 to 1"),
        ("--size 0", r"--size 0: must be from 1 to 100,000, or auto"),
        ("--mode pde", r"--mode pde: allowed: sde, ode"),
        ("--mode ode --share 0.5", r"--share 0\.5 does not go with --mode ode"),
        ("--num-step 3", r"--num-step: unknown argument; did you mean --num-steps\?"),
        ("--num_steps=3", r"--num_steps=3: unknown argument; did you mean --num-steps\?"),
        ("--ns 3", r"--ns: unknown argument; did you mean --num-steps\?"),
        ("--num", r"--num: unknown argument; did you mean --num-steps\?"),
        ("--s 2", r"--s: unknown argument; --help lists all flags"),
        ("--SCALE=2", r"--SCALE=2: unknown argument; did you mean --scale\?"),
        ("--tf32=yes", r"--tf32/--no-tf32: takes no value; given: 'yes'"),
        ("more", r"more: unknown argument"),
        ("--zzzzzz", r"--zzzzzz: unknown argument; --help lists all flags"),
        ("--name", r"--name: needs a value; if it begins with a dash, write --name=VALUE$"),
    ],
)
def test_a_bad_command_line_is_one_line_with_flag_value_and_what_is_allowed(flags, text):
    with pytest.raises(InputError, match=text):
        example(*flags.split())


def test_of_several_processes_the_first_prints_a_bad_command_line(monkeypatch):
    """If the environment says that there are several."""
    for rank, size, silent in (("0", "2", 0), ("", "2", 0), ("1", "2", 1), ("1", "", 0), ("2", "2", 0), ("a", "2", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError) as error:
            parse(Example, "An example.", ["--no-such-flag"])
        assert error.value.said_by_another == silent


def test_missing_flags_are_named_with_an_example(monkeypatch):
    monkeypatch.setattr("sys.argv", ["do.py"])
    example = "example: python do.py SOURCE --name NAME; --help lists all flags"
    with pytest.raises(InputError, match=f"^--name is required; {example}$"):
        parse(Example, "Does things.", ["images"])
    with pytest.raises(InputError, match=f"^source and --name are required; {example}$"):
        parse(Example, "Does things.", [])


def test_flags_that_were_given_are_known():
    assert example("--num-steps", "250").given == {"source", "name", "num_steps"}
    assert changed(example(), num_steps=3).given == {"source", "name"}
    assert example("--num-steps", "250") == example()


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_file_gives_values_and_flags_replace_them(tmp_path):
    content = {"name": "-x", "num_steps": 7, "scale": 2, "tf32": False, "qk_norm": None, "size": "auto", "source": "a"}
    file = write(tmp_path / "a.json", content)
    config = parse(Example, "Does things.", ["--config", file, "--scale", "3"])
    assert (config.name, config.num_steps, config.scale, config.tf32) == ("-x", 7, 3.0, False)
    assert (config.qk_norm, config.size, config.source, config.mode) == (None, AUTO, Path("a"), "sde")
    assert config.given == {"name", "num_steps", "scale", "tf32", "size", "source"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"num_step": 3}, r"a\.json: num_step: no setting of this program; did you mean num_steps?"),
        ({"num_steps": "many"}, r"a\.json: --num-steps: 'many' is not a whole number"),
        ({"num_steps": 2.5}, r"a\.json: --num-steps: '2\.5' is not a whole number"),
        ({"num_steps": True}, r"a\.json: num_steps: True: must be a value, not true or false"),
        ({"tf32": "yes"}, r"a\.json: tf32: 'yes': must be true or false"),
        ({"name": ["a", "b"]}, r"a\.json: name: .*: must be a single number or text"),
        ({"name": {"a": 1}}, r"a\.json: name: .*: must be a single number or text"),
        ({"num_steps": 0, "name": "x"}, r"--num-steps 0: must be greater than 0"),
        ([1], r"a\.json: must be a JSON object"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, content, text):
    with pytest.raises(InputError, match=text):
        parse(Example, "Does things.", ["images", "--config", write(tmp_path / "a.json", content)])
    with pytest.raises(InputError, match="no such file"):
        example("--config", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"--config .*: is a folder; allowed: a JSON file"):
        example("--config", str(tmp_path))


@dataclass(frozen=True, kw_only=True)
class Recorded(Sampler):
    """settings"""

    recorded = frozenset({"seconds"})
    dtype: str = setting("no", "number format", choices=("no", "fp16"), environment="TEST_DTYPE")

    @classmethod
    def from_record(cls, record):
        return {name: value for name, value in super().from_record(record).items() if name != "mode"}


@dataclass(frozen=True, kw_only=True)
class Switched(Config):
    """settings"""

    kind: str | None = setting(None, "kind", choices=("off", "plain", "round"), bare=("plain", "off"))


def test_a_flag_that_was_a_switch_takes_values(tmp_path):
    given = {("--kind",): "plain", ("--no-kind",): "off", ("--kind", "round"): "round", (): None}
    for flags, expected in given.items():
        assert parse(Switched, "Does things.", flags).kind == expected
    for value, expected in ((True, "plain"), (False, "off"), ("round", "round"), (None, None)):
        file = write(tmp_path / "a.json", {"kind": value})
        assert parse(Switched, "Does things.", ["--config", file]).kind == expected
    with pytest.raises(InputError, match="--kind flat: allowed: off, plain, round"):
        parse(Switched, "Does things.", ["--kind", "flat"])
    with pytest.raises(InputError, match="round: unknown argument"):
        parse(Switched, "Does things.", ["--no-kind", "round"])


def test_what_a_program_recorded_is_no_setting(tmp_path):
    plain, record = {"num_steps": 7, "mode": "ode"}, {"num_steps": 7, "mode": "ode", "seconds": 1.5}
    for content, mode in ((plain, "ode"), (record, "sde")):
        config = parse(Recorded, "Does things.", ["--config", write(tmp_path / "a.json", content)])
        assert (config.num_steps, config.mode) == (7, mode)


def test_the_environment_gives_a_value_that_no_flag_gives(monkeypatch):
    for value, flags, expected in (("fp16", [], "fp16"), ("fp16", ["--dtype", "no"], "no"), ("no", [], "no")):
        monkeypatch.setenv("TEST_DTYPE", value)
        config = parse(Recorded, "Does things.", flags)
        assert config.dtype == expected and ("dtype" in config.given) == bool(flags)
    monkeypatch.setenv("TEST_DTYPE", "fp8")
    with pytest.raises(InputError, match="environment variable TEST_DTYPE=fp8: allowed: no, fp16; or give --dtype"):
        parse(Recorded, "Does things.", [])


def test_auto_does_not_mean_a_gpu_that_must_not_be_used(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert uses_cuda("auto") and uses_cuda("cuda") and not uses_cuda("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not uses_cuda("auto")
    with pytest.raises(InputError, match="--device cuda: ACCELERATE_USE_CPU"):
        uses_cuda("cuda")


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


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_texts_that_no_file_name_can_have_are_refused(text, tmp_path):
    """A --config file may hold them."""
    (tmp_path / "c.json").write_text(json.dumps({"name": text}))
    with pytest.raises(InputError, match=r"--name .*: has characters that no file name and text can have"):
        parse(Named, "", ["--config", str(tmp_path / "c.json")])


@dataclass(frozen=True, kw_only=True)
class Named(Config):
    """A text."""

    name: str = setting("", "a name")
