"""Command lines made from dataclasses: one class for each program, one field for each flag.

    @dataclass(frozen=True, kw_only=True)
    class Sampler(Config):
        num_steps: int = setting(250, "steps of the solver", check=POSITIVE)

    config = parse(Sampler, "Generate images.")

A field states its type, default, help, allowed values, and whether a resumed run may change it. The parser, the range
checks, the check of a resumed run and the tables in docs/flags.md are made from these fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from common.io import InputError

AUTO = "auto"  # value of a batch size: the largest that fits, see `common.distributed.largest_batch`


@dataclass(frozen=True)
class Check:
    """A condition on one value. `allowed` completes the sentence "must be ..."."""

    allowed: str
    fits: Callable[[Any], bool]


POSITIVE = Check("greater than 0", lambda value: value > 0)
NON_NEGATIVE = Check("0 or greater", lambda value: value >= 0)
BELOW_ONE = Check("at least 0 and less than 1", lambda value: 0 <= value < 1)
UNIT_INTERVAL = Check("from 0 to 1", lambda value: 0 <= value <= 1)
GUIDANCE_SCALE = Check(
    "1 (no guidance) or greater; the published scripts treat smaller values as 1", lambda value: value >= 1
)
BATCH_SIZE = Check(f"1 or greater, or {AUTO}", lambda value: value == AUTO or value >= 1)


def setting(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    choices: Sequence[str] = (),
    changeable: bool = False,
    flag: str | None = None,
    parse: Callable[[str], Any] | None = None,
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
    """
    metadata = {
        "help": help, "check": check, "choices": tuple(choices), "changeable": changeable, "flag": flag, "parse": parse,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def adjustable(default: Any, help: str, **more: Any) -> Any:
    """Return the field of a flag that may differ between a run and its continuation; see `setting`."""
    return setting(default, help, changeable=True, **more)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a program. Subclasses declare their fields by `setting`; their base classes are groups of flags.

    Raises:
        InputError: a value is outside its range; the message names flag, value and what is allowed.
    """

    def __post_init__(self) -> None:
        for name, item in settings(type(self)).items():
            value, rules = getattr(self, name), item.metadata
            if value is None:
                continue
            for one in value if isinstance(value, tuple) else (value,):
                if rules["choices"] and one not in rules["choices"]:
                    raise InputError(f"{flag_of(item)} {one}: allowed: {', '.join(rules['choices'])}")
                if rules["check"] and not rules["check"].fits(one):
                    raise InputError(f"{flag_of(item)} {one}: must be {rules['check'].allowed}")
        self.check_combination()

    def check_combination(self) -> None:
        """Raise InputError for settings that exclude each other. Subclasses override it."""


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
    parser = make_parser(config_class, description)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise InputError(f"{unknown[0]}: unknown argument; {_suggestion(unknown[0], known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
    return config_class(**values)


def _suggestion(given: str, known: list[str]) -> str:
    """Return a hint at the known flag that is nearest to an unknown one, by its spelling or by its initials (--lr)."""
    name = given.split("=")[0].strip("-").replace("_", "-")
    by_name = {option.strip("-"): option for option in known}
    nearest = [n for n in by_name if "".join(word[0] for word in n.split("-")) == name and len(name) > 1]
    nearest += difflib.get_close_matches(name, by_name, n=1)
    return f"did you mean {by_name[nearest[0]]}?" if nearest else "--help lists all flags"


def make_parser(config_class: type[Config], description: str) -> argparse.ArgumentParser:
    """Return the parser of a program's command line."""
    parser = _Parser(description=description, allow_abbrev=False)
    hints = get_type_hints(config_class)
    for title, items in groups(config_class).items():
        group = parser.add_argument_group(title)
        for item in items:
            group.add_argument(flag_of(item), **_argument(item, hints[item.name]))
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


def finite_float(text: str) -> float:
    """Return a number that is neither NaN nor infinite: NaN passes every comparison made to refuse it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def batch_size(text: str) -> int | str:
    """Return a number of images, or AUTO."""
    return text if text == AUTO else int(text)


def require(package: str, purpose: str, module: str | None = None) -> None:
    """Raise InputError if a package is not installed. `module`: its import name, if that differs."""
    if importlib.util.find_spec(module or package) is None:
        raise InputError(f"{purpose}: needs the package {package}, which is not installed (pip install {package})")


def uses_cuda(device: str) -> bool:
    """Return whether --device, which is auto, cpu or cuda, means a GPU. Raises InputError if there is none."""
    import torch  # only here: programs that crop photographs start faster without it

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; allowed here: cpu, auto")
    return device != "cpu" and torch.cuda.is_available()


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as InputError instead of printing a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _argument(item: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Return the keyword arguments of `add_argument` for a field of type `hint`."""
    rules, required = item.metadata, item.default is MISSING
    text = rules["help"].replace("%", "%%") + ("" if required else _suffix(item.default))
    if not flag_of(item).startswith("-"):
        how = {} if required else {"nargs": "?", "default": item.default}
    else:
        how = {"required": True} if required else {"default": item.default}
        how["dest"] = item.name
    kind = _value_type(hint)
    if kind is bool:
        return {**how, "help": text, "action": argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:  # several values after one flag, unless `parse` splits a single one
        kind = get_args(kind)[0]
        how |= {} if rules["parse"] else {"nargs": "+"}
    how["type"] = rules["parse"] or (finite_float if kind is float else kind)
    if rules["choices"]:
        how["choices"] = rules["choices"]
    return {**how, "help": text}


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
