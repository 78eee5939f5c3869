"""The classes of a data set: which labels occur, and their names.

A network has an embedding for each label from 0 to `num_classes - 1`, but its data may contain only some of them. Data
sets, checkpoints and exports record the set, and labels are drawn from it.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

from common.errors import InputError, printable, shown

# The network has an embedding per class. With its gradient, average and AdamW's two moments, a million of them take
# 23 GB in SiT-XL. ImageNet-21k has 21,841 classes; a label above a million is a mistake.
MAX_CLASSES = 1_000_000
MAX_NAME = 1000  # characters of a class name; those of ImageNet have up to 131
NAMES_SHOWN = 5  # in errors


@dataclass(frozen=True)
class ClassSet:
    """Labels that occur in training data.

    Attributes:
        labels: the labels, ascending.
        names: the name of each label, in the order of `labels`; empty if the data has no names.

    Raises InputError if the labels are not ascending whole numbers from 0 to MAX_CLASSES - 1, if the number of names
    differs, or if a name is too long.
    """

    labels: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels or not all(type(label) is int and 0 <= label < MAX_CLASSES for label in self.labels):
            allowed = f"whole numbers from 0 to {MAX_CLASSES - 1:,}"
            raise InputError(f"class labels {shown(self.labels)}; expected {allowed}")
        if list(self.labels) != sorted(set(self.labels)):
            raise InputError(f"class labels {shown(self.labels)}; expected ascending numbers")
        if not all(isinstance(name, str) for name in self.names) or len(self.names) not in (0, len(self.labels)):
            raise InputError(f"classes {shown(self.labels)} have names {shown(self.names)}; expected a text for each")
        _check_names(self.names, "classes")

    @classmethod
    def of_network(cls, num_classes: int) -> ClassSet:
        """Return all labels of a network, for checkpoints that do not record their classes."""
        if not 1 <= num_classes <= MAX_CLASSES:
            raise InputError(f"{shown(num_classes)} classes; allowed: 1 to {MAX_CLASSES:,}")
        return cls(tuple(range(num_classes)))

    @classmethod
    def of_data(cls, labels: Iterable[int], names: Sequence[str] | None = None) -> ClassSet:
        """Return the labels that occur in `labels`; `names[label]` is the name of a label, if there is one."""
        found = tuple(sorted({int(label) for label in labels}))
        return cls(found, tuple(names[label] for label in found) if names and found[-1] < len(names) else ())

    @classmethod
    def from_json(cls, content: Any) -> ClassSet:
        """Return the set that `to_json` described. Raises InputError for other content."""
        if not isinstance(content, dict) or not isinstance(content.get("labels"), list):
            raise InputError(f'classes are {shown(content)}; expected {{"labels": [...], "names": [...]}}')
        names = content.get("names") or []
        if not isinstance(names, list):
            raise InputError(f"classes have names {shown(names)}; expected a list of texts")
        return cls(tuple(content["labels"]), tuple(names))

    def to_json(self) -> dict[str, Any]:
        """Return the content for JSON files and checkpoints."""
        return {"labels": list(self.labels), **({"names": list(self.names)} if self.names else {})}

    def name(self, label: int) -> str:
        """Return the name of a label, its number if it has none."""
        return self.names[self.labels.index(label)] if self.names and label in self.labels else str(label)

    def caption(self, label: int) -> str:
        """Return the name of a label without accents, or its number if the name needs more letters than ASCII has.

        For `common.images.image_grid`, whose font has ASCII only.
        """
        name = "".join(c for c in unicodedata.normalize("NFKD", self.name(label)) if not unicodedata.combining(c))
        return name if name.isascii() else str(label)

    def select(self, text: str, num_classes: int) -> tuple[int, ...]:
        """Return the labels that a text names, in its order, such as "207,360-365,tench".

        Elements are labels of the network (0 .. `num_classes` - 1), ranges with both ends, and names; a name may
        contain commas if it is the only element. Raises InputError for anything else, and for an element that stands
        for several labels.
        """
        if "," in text and text in self.names:
            return (self._named(text),)
        selected: list[int] = []
        for part in map(str.strip, text.split(",")):
            if match := re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part):
                first, last = int(match[1]), int(match[2] or match[1])
                if part in self.names and first != (named := self._named(part)):
                    clear = f"write {first}-{first} or {named}-{named}"
                    raise InputError(f"{part}: is a label, and the name of label {named}; {clear}")
                if first > last:
                    raise InputError(f"{part}: a range starts with its smaller number")
                if last >= num_classes:
                    raise InputError(f"{part}: the network has classes 0 .. {num_classes - 1}")
                selected += range(first, last + 1)
            elif part in self.names:
                selected.append(self._named(part))
            else:
                raise InputError(f"{shown(part)}: {self._expected(part)}")
        return tuple(selected)

    def _named(self, name: str) -> int:
        """Return the label of a name. Raises InputError if several labels have it."""
        found = [label for label, other in zip(self.labels, self.names, strict=True) if other == name]
        if len(found) > 1:
            raise InputError(f"{name}: is the name of labels {', '.join(map(str, found))}; write the number")
        return found[0]

    def untrained(self, labels: Iterable[int]) -> str:
        """Return a warning that names the labels that are not in the set, "" if there are none."""
        known = set(self.labels)
        outside = sorted({label for label in labels if label not in known})
        if not outside:
            return ""
        which = f"label {outside[0]} does" if len(outside) == 1 else f"labels {label_ranges(outside)} do"
        return f"{which} not occur in the training data; the network was never trained on it"

    def _expected(self, part: str) -> str:
        """Return what would be allowed instead of `part`."""
        forms = "expected labels (207), ranges (360-365)"
        if not self.names:
            return f"{forms}, comma-separated; the classes have no names here"
        similar = difflib.get_close_matches(part, self.names, NAMES_SHOWN) or self.names[:NAMES_SHOWN]
        more = ", ..." if len(similar) < len(self.names) else ""
        return f"{forms} or names, comma-separated; names are {printable(', '.join(similar))}{more}"


def class_names(contents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the "classes" in the contents of some dataset.json files, given by their paths; [] if there are none.

    Raises InputError for classes that are not a list of names, that are too many, or that differ between the files.
    """
    found: dict[str, list[str]] = {}
    for path, content in contents.items():
        names = content.get("classes") or []
        if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
            raise InputError(f"{path}: classes is {shown(names)}; expected a list of names, in the order of the labels")
        if len(names) > MAX_CLASSES:
            raise InputError(f"{path}: classes has {len(names):,} names; allowed: {MAX_CLASSES:,}")
        _check_names(map(str, names), f"{path}: classes")
        if names:
            found[path] = list(map(str, names))
    for (one, names), (other, others) in pairwise(found.items()):
        if names != others:
            pairs = enumerate(zip_longest(names, others))
            label, (name, other_name) = next(item for item in pairs if item[1][0] != item[1][1])
            raise InputError(
                f"{one} and {other} have different names for class {label}: {shown(name)} and {shown(other_name)}"
            )
    return next(iter(found.values()), [])


def _check_names(names: Iterable[str], where: str) -> None:
    """Raise InputError, starting with `where`, if a name is too long."""
    if long := next((name for name in names if len(name) > MAX_NAME), None):
        problem = f"the name {shown(long)}... has {len(long):,} characters; allowed: {MAX_NAME:,}"
        raise InputError(f"{where}: {problem}")


def label_ranges(labels: Iterable[int]) -> str:
    """Return labels as the shortest text that `ClassSet.select` reads, such as "0-4,17,940"."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][-1] + 1:
            runs[-1][1:] = [label]
        else:
            runs.append([label])
    return ",".join("-".join(map(str, run)) for run in runs)
