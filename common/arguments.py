"""argparse's parser with messages of our own, a hint at the flag that an unknown one may stand for, and numbers."""

from __future__ import annotations

import argparse
import difflib
import math
from typing import NoReturn

from common.errors import InputError

# argparse's words and ours
MESSAGES = {
    "expected one argument": "needs a value",
    "expected at least one argument": "needs one or more values",
    "ignored explicit argument": "takes no value; given:",
}
MOST_SHOWN = 4
SHOWN = 40  # characters of a wrong number in an error


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as InputError instead of printing a page of usage."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        for theirs, ours in MESSAGES.items():
            message = message.replace(theirs, ours)
        flag, _, problem = message.rpartition(": ")
        if problem == MESSAGES["expected one argument"]:
            message += f"; if it begins with a dash, write {flag.split('/')[-1]}=VALUE"
        raise InputError(message)


def suggestion(given: str, known: list[str]) -> str:
    """Return a hint at the known flags nearest to an unknown one, by beginning, initials (--lr) or spelling."""
    name = given.split("=")[0].strip("-").replace("_", "-").lower()
    by_name = {option.strip("-").replace("_", "-"): option for option in known}
    nearest = [n for n in by_name if n == name] or [n for n in by_name if len(name) > 1 and n.startswith(name)]
    nearest += [n for n in by_name if len(name) > 1 and "".join(word[:1] for word in n.split("-")) == name]
    nearest = nearest or difflib.get_close_matches(name, by_name, n=1)
    if not nearest:
        return "--help lists all flags"
    return f"did you mean {' or '.join(by_name[n] for n in nearest[:MOST_SHOWN])}?"


def finite_float(text: str) -> float:
    """Return a number that is neither NaN nor infinite: NaN passes every comparison made to refuse it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def whole_number(text: str) -> int:
    """Return an integer."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:SHOWN]!r} is not a whole number") from error
