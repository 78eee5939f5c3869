"""Command lines made from dataclasses: one class for each program, one field for each flag.

    @dataclass(frozen=True, kw_only=True)
    class Sampler(Config):
        num_steps: int = setting(250, "steps of the solver", check=POSITIVE)

    config = parse(Sampler, "Generate images.")

A field states its type, default, help, allowed values, and whether a resumed run may change it. The parser, the range
checks, the check of a resumed run and the tables in docs/flags.md are made from these fields.

Each program also reads settings from a JSON file, `--config FILE`. Its keys are the names of the fields, and flags
of the command line replace its values.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from common.arguments import SHOWN, Parser, finite_float, suggestion, whole_number
from common.checks import AUTO, Check
from common.errors import InputError
from common.io import read_json

CONFIG = "config"
CONFIG_HELP = "JSON file of settings, such as args.json of a run; flags replace its values"
LARGEST_NUMBER = 2**63  # whole numbers are smaller: files and tensors have 64 bits


def setting(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    choices: Sequence[str] = (),
    changeable: bool = False,
    flag: str | None = None,
    parse: Callable[[str], Any] | None = None,
    environment: str | None = None,
    bare: tuple[str, str] | None = None,
) -> Any:
    """Return the dataclass field of one flag.

    Args:
        default: value of the flag if it is not given; `dataclasses.MISSING` for a required flag.
        help: what the flag does. The default is appended.
        check: condition on a value that is not None.
        choices: allowed values.
        changeable: whether a resumed run may have another value.
        flag: name on the command line; default: the field's name with dashes. Without dashes in front it is positional.
        parse: text to value; default: from the field's type (int, float, str, Path, bool).
        environment: variable that gives the value if the flag is not given; "no" counts as not set.
        bare: values for --NAME without a value and for --no-NAME, and for true and false in a --config file.
    """
    metadata = {
        "help": help, "check": check, "choices": tuple(choices), "changeable": changeable, "flag": flag, "parse": parse,
        "environment": environment, "bare": bare,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def adjustable(default: Any, help: str, **more: Any) -> Any:
    """Return the field of a flag that may differ between a run and its continuation; see `setting`."""
    return setting(default, help, changeable=True, **more)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a program. Subclasses declare their fields by `setting`; their base classes are groups of flags.

    Attributes:
        given: names of the settings that the command line or its --config file contains; the others have their default.
        recorded: names in a --config file that are not settings, but what a program recorded there about its work.
        example: a command line for the message about a missing flag; made from the required flags if empty.

    Raises:
        InputError: a value is outside its range; the message names flag, value and what is allowed.
    """

    given: ClassVar[frozenset[str]] = frozenset()  # `parse` gives each configuration its own
    recorded: ClassVar[frozenset[str]] = frozenset()
    example: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, item in settings(type(self)).items():
            value, rules = getattr(self, name), item.metadata
            if value is None:
                continue
            for one in value if isinstance(value, tuple) else (value,):
                if not is_possible_text(one):
                    raise InputError(f"{flag_of(item)} {one!a:.80}: has characters that no file name and text can have")
                if rules["choices"] and one not in rules["choices"]:
                    raise InputError(f"{flag_of(item)} {one}: allowed: {', '.join(rules['choices'])}")
                if rules["check"] and not rules["check"].fits(one):
                    raise InputError(f"{flag_of(item)} {str(one)[:SHOWN]}: must be {rules['check'].allowed}")
                if isinstance(one, int) and abs(one) >= LARGEST_NUMBER:
                    raise InputError(f"{flag_of(item)} {str(one)[:SHOWN]}: must be less than {LARGEST_NUMBER:,}")
        self.check_combination()

    def check_combination(self) -> None:
        """Raise InputError for settings that exclude each other. Subclasses override it."""

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Return the settings in a --config file that a program wrote about its own work."""
        return {name: value for name, value in record.items() if name not in cls.recorded}


AnyConfig = TypeVar("AnyConfig", bound=Config)


def settings(config_class: type[Config]) -> dict[str, dataclasses.Field]:
    """Return the fields made by `setting`, by name."""
    return {item.name: item for item in dataclasses.fields(config_class) if "help" in item.metadata}


def fixed_settings(config_class: type[Config]) -> set[str]:
    """Return the names of the settings that a resumed run must not change."""
    return {name for name, item in settings(config_class).items() if not item.metadata["changeable"]}


def flag_of(item: dataclasses.Field) -> str:
    """Return how a setting is given on the command line."""
    return item.metadata["flag"] or flag(item.name)


def flag(name: str) -> str:
    """Return the flag of a setting with the default name."""
    return "--" + name.replace("_", "-")


def parse(config_class: type[AnyConfig], description: str, argv: Sequence[str] | None = None) -> AnyConfig:
    """Return the settings of a command line.

    Raises:
        InputError: an unknown flag, a missing one, or a value that is not allowed.
    """
    try:
        return _parse(config_class, description, argv)
    except InputError as error:  # all processes of a launcher have the same command line
        texts = [os.environ.get(name, "") for name in ("LOCAL_RANK", "WORLD_SIZE")]
        rank, size = (int(text) if re.fullmatch("[0-9]{1,9}", text) else 0 for text in texts)
        error.said_by_another = 0 < rank < size
        raise


def _parse(config_class: type[AnyConfig], description: str, argv: Sequence[str] | None) -> AnyConfig:
    parser = make_parser(config_class, description)
    values = _parsed(parser, sys.argv[1:] if argv is None else argv)
    if source := values.pop(CONFIG, None):
        values = _from_file(config_class, parser, source) | values
    required = {name: item for name, item in settings(config_class).items() if item.default is MISSING}
    if missing := [flag_of(item) for name, item in required.items() if name not in values]:
        words = [f"{flag_of(item)} " * flag_of(item).startswith("-") + name.upper() for name, item in required.items()]
        example = config_class.example or " ".join(["python", sys.argv[0], *words])
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{' and '.join(missing)} {verb} required; example: {example}; --help lists all flags")
    return _with_given(config_class(**(_from_environment(config_class) | values)), values)


def changed(config: AnyConfig, **values: Any) -> AnyConfig:
    """Return a configuration with other values of some settings; `given` stays."""
    return _with_given(dataclasses.replace(config, **values), config.given)


def _with_given(config: AnyConfig, names: Iterable[str]) -> AnyConfig:
    object.__setattr__(config, "given", frozenset(names))
    return config


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the values that a command line contains, without defaults."""
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise InputError(f"{unknown[0]}: unknown argument; {suggestion(unknown[0], known)}")
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
    return {name: value for name, value in found.items() if value not in (None, ())}  # positional, and not given


def _from_environment(config_class: type[Config]) -> dict[str, str]:
    """Return the values of settings that environment variables give."""
    values = {}
    for name, item in settings(config_class).items():
        variable = item.metadata["environment"]
        value = os.environ.get(variable, "no") if variable else "no"
        if value not in ("no", "", *item.metadata["choices"]):
            allowed = ", ".join(item.metadata["choices"])
            raise InputError(f"environment variable {variable}={value}: allowed: {allowed}; or give {flag_of(item)}")
        if value not in ("no", ""):
            values[name] = value
    return values


def _from_file(config_class: type[Config], parser: argparse.ArgumentParser, source: str) -> dict[str, Any]:
    """Return the values in a --config file. Raises InputError, naming file and key, for all that is not allowed."""
    try:
        content = read_json(source)
    except InputError as error:
        raise InputError(f"--config {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {source}: must be a JSON object, with names of settings as keys")
    items = settings(config_class)
    if config_class.recorded & content.keys():
        content = config_class.from_record(content)
    for key in content:
        if key not in items:
            near = difflib.get_close_matches(key.replace("-", "_"), items, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--config {source}: {key}: no setting of this program{hint}")
    hints = get_type_hints(config_class)
    arguments = []
    for key, value in content.items():
        try:
            arguments += _as_arguments(items[key], _value_type(hints[key]), value)
        except InputError as error:
            raise InputError(f"--config {source}: {key}: {error}") from error
    try:
        return _parsed(parser, arguments)
    except InputError as error:
        raise InputError(f"--config {source}: {error}") from error


def _as_arguments(item: dataclasses.Field, kind: Any, value: Any) -> list[str]:
    """Return a value of a --config file as a command line gives it. Null stands for the default."""
    name = flag_of(item)
    if value is None:
        return []
    is_switch = kind is bool or (isinstance(value, bool) and item.metadata["bare"] is not None)
    if isinstance(value, bool) != is_switch:
        raise InputError(f"{value!r}: must be {'true or false' if kind is bool else 'a value, not true or false'}")
    if is_switch:
        return [name if value else "--no-" + name.removeprefix("--")]
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) for one in several) or (
        len(several) != 1 and (get_origin(kind) is not tuple or item.metadata["parse"])
    ):
        raise InputError(f"{value!r}: must be a single number or text")
    texts = [str(one) for one in several]
    if not name.startswith("-"):
        return texts
    return [f"{name}={texts[0]}"] if len(texts) == 1 else [name, *texts]


def make_parser(config_class: type[Config], description: str) -> argparse.ArgumentParser:
    """Return the parser of a program's command line. It sets no defaults, so its result shows what was given."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(f"--{CONFIG}", metavar="FILE", help=CONFIG_HELP)
    hints = get_type_hints(config_class)
    for title, items in groups(config_class).items():
        group = parser.add_argument_group(title)
        for item in items:
            group.add_argument(flag_of(item), **_argument(item, hints[item.name]))
            if bare := item.metadata["bare"]:
                off = {"dest": item.name, "action": "store_const", "const": bare[1], "help": argparse.SUPPRESS}
                group.add_argument(flag_of(item).replace("--", "--no-", 1), **off)
    return parser


def groups(config_class: type[Config]) -> dict[str, list[dataclasses.Field]]:
    """Return the settings by group: the first docstring line of the class that declares them, in the order of bases."""
    declaring = [base for base in config_class.__bases__ if base is not Config] + [config_class]
    found, listed = {}, set()
    for owner in declaring:
        names = [name for name in settings(owner) if name not in listed]
        listed.update(names)
        if names:
            title = owner.__doc__.splitlines()[0].rstrip(".") if owner is not config_class else "options"
            found[title] = [settings(config_class)[name] for name in names]
    return found


def flag_table(config_class: type[Config]) -> str:
    """Return a Markdown table of a program's flags."""
    lines = []
    for title, items in groups(config_class).items():
        lines += ["", f"| {title} | default | |", "|---|---|---|"]
        for item in items:
            rules = item.metadata
            allowed = ", ".join(rules["choices"]) or (rules["check"].allowed if rules["check"] else "")
            text = rules["help"] + (f" ({allowed})" if allowed else "")
            star = "*" if rules["changeable"] else ""
            lines.append(f"| `{flag_of(item)}`{star} | {_shown(item.default)} | {text} |".replace("\n", " "))
    return "\n".join(lines[1:]) + "\n"


def is_possible_text(value: Any) -> bool:
    """Return whether a value can be used as a file name if it is a text. JSON may contain NUL and surrogates."""
    try:
        return not isinstance(value, str | Path) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def batch_size(text: str) -> int | str:
    """Return a number of images, or AUTO."""
    return text if text == AUTO else whole_number(text)


def number_or_auto(text: str) -> float | str:
    """Return a number, or AUTO."""
    return text if text == AUTO else finite_float(text)


def require(package: str, purpose: str, module: str | None = None) -> None:
    """Raise InputError if a package is not installed. `module`: its import name, if that differs."""
    if importlib.util.find_spec(module or package) is None:
        raise InputError(f"{purpose}: needs the package {package}, which is not installed (pip install {package})")


def uses_cuda(device: str) -> bool:
    """Return whether --device, which is auto, cpu or cuda, means a GPU.

    `accelerate launch --cpu` and launch/launch.sh without GPUs set ACCELERATE_USE_CPU, which auto follows.
    Raises InputError if there is no GPU, or if it must not be used.
    """
    import torch  # only here: programs that crop photographs start faster without it

    only_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
    if device == "cuda" and only_cpu:
        raise InputError("--device cuda: ACCELERATE_USE_CPU (accelerate launch --cpu, or NUM_GPUS=0) says CPU")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; allowed here: cpu, auto")
    return device != "cpu" and not only_cpu and torch.cuda.is_available()


def _argument(item: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for a field of type `hint`."""
    rules, required = item.metadata, item.default is MISSING
    text = rules["help"].replace("%", "%%") + (" (required)" if required else _suffix(item.default))
    how: dict[str, Any] = {"help": text}
    if flag_of(item).startswith("-"):
        how["dest"] = item.name
    else:
        how |= {"nargs": "?", "default": None}  # `parse` reports it if it is missing
    kind = _value_type(hint)
    if kind is bool:
        return {**how, "action": argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:  # several values after one flag, unless `parse` splits a single one
        kind = get_args(kind)[0]
        how |= {} if rules["parse"] else {"nargs": "+" if "dest" in how else "*"}
    if rules["bare"]:
        how |= {"nargs": "?", "const": rules["bare"][0]}
    how["type"] = rules["parse"] or {float: finite_float, int: whole_number}.get(kind, kind)
    if rules["choices"]:  # checked by Config
        how["metavar"] = "{" + ",".join(rules["choices"]) + "}"
    return how


def _value_type(hint: Any) -> type:
    """Return the type of a field's values, None aside."""
    if get_origin(hint) in (Union, UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _suffix(default: Any) -> str:
    return "" if default is None else f" (default: {_shown(default)})"


def _shown(default: Any) -> str:
    """Return a default as help and tables show it."""
    if default is MISSING:
        return "required"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(_shown, default))
    if isinstance(default, float | int) or default is None:
        return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    return str(default)
