"""Text for a terminal: messages that can contain names and values from a damaged or hostile file."""

from __future__ import annotations

import re

LONGEST_WORD, LONGEST_LINE = 400, 2000  # characters; the commands that messages contain are shorter


def for_terminal(message: str) -> str:
    """Return a message of one or several lines with control characters escaped, and long words and lines cut."""
    lines = ("".join(map(_escaped, line)) for line in message.split("\n"))
    cut = (re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _cut(word[0]), line) for line in lines)
    return "\n".join(line if len(line) <= LONGEST_LINE else _cut(line) for line in cut)


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _cut(text: str) -> str:
    return f"{text[: LONGEST_WORD // 2]}... ({len(text):,} characters)"
