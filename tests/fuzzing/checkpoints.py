"""Seeded changes to checkpoints: files of torch.save with other tensors, other settings, or code in them."""

from __future__ import annotations

import argparse
import io
import os
import random
from typing import Any

import torch
from torch import Tensor

from tests.fuzzing.mutations import LONG_NAME, ODD_VALUES, change_value

CANARY = "executed"  # a file that code in a checkpoint would create
OTHER_DTYPES = (torch.int8, torch.bool, torch.uint8, torch.int64, torch.complex64)
EXPANDED = 1 << 31  # elements of a tensor that shares one number


class Code:
    """An object whose pickle runs a command when it is read without protection."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _save(content: Any, like: bytes) -> bytes:
    """Return a file of the format of `like`: the zip, or that before 2020."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=like.startswith(b"PK"))
    return file.getvalue()


def tensors_of(content: Any) -> list[tuple[dict, Any]]:
    """Return (dict, key) of every tensor in nested dicts that is not a scalar."""
    if not isinstance(content, dict):
        return []
    here = [(content, key) for key, value in content.items() if isinstance(value, Tensor) and value.ndim]
    return here + [place for value in content.values() for place in tensors_of(value)]


def code(rng: random.Random, data: bytes) -> bytes:
    """Put an object that would run a command into the file."""
    content = _load(data)
    if rng.random() < 0.3:
        return _save(Code(), data)
    holder, key = rng.choice(tensors_of(content))
    holder[rng.choice((key, "x"))] = rng.choice((Code(), [Code()], {Code(): 1}))
    return _save(content, data)


def tensor(rng: random.Random, data: bytes) -> bytes:
    """Give one tensor another dtype or shape, NaN, or another name; or remove it, or make it seem huge."""
    content = _load(data)
    holder, key = rng.choice(tensors_of(content))
    value, number = holder[key], rng.choice((float("nan"), float("inf"), -float("inf")))
    one_changed = value.clone().view(-1).index_fill(0, torch.tensor(rng.randrange(value.numel())), number)
    shapes = (value[:-1], value[None], value.flatten()[:0], value.reshape(-1, 1, 1), value.sum())
    others = (None, 1, "a", [], value.to_sparse(), torch.nn.Parameter(value[None]))
    change = rng.randrange(8)
    if change < 2:
        del holder[key]
        holder |= {f"{key}x": value} if change else {}
    else:
        same_shape = (value.to(rng.choice(OTHER_DTYPES)), torch.full_like(value, number), one_changed.view_as(value))
        expanded = torch.zeros(1).expand(EXPANDED, *[1] * (value.ndim - 1))
        holder[key] = (*same_shape, expanded, rng.choice(shapes), rng.choice(others))[change - 2]
    return _save(content, data)


def entry(rng: random.Random, data: bytes) -> bytes:
    """Change an entry that is no tensor: settings, steps, network, classes; or the kind of the whole content."""
    content = _load(data)
    kind = rng.random()
    if kind < 0.1:
        return _save(rng.choice((None, 1, [], {}, [content], {"model": content}, torch.zeros(3), LONG_NAME)), data)
    values = (*ODD_VALUES[:10], *ODD_VALUES[11:], torch.zeros(2), argparse.Namespace(a=1))
    names = [name for name, value in content.items() if not tensors_of({"": value})]
    name = rng.choice(names or list(content))
    if isinstance(content[name], argparse.Namespace) and kind < 0.9:
        content[name] = argparse.Namespace(**change_value(rng, vars(content[name]), values))
    elif isinstance(content[name], dict) and kind < 0.7:
        content[name] = change_value(rng, content[name], values)
    else:
        content[name] = rng.choice(values)
    return _save(content, data)


def optimizer(rng: random.Random, data: bytes) -> bytes:
    """Change the state of the optimizer: emptied, half missing, other counts, other shapes, other settings."""
    content = _load(data)
    state, groups = content["opt"]["state"], content["opt"]["param_groups"]
    one = state[rng.choice(sorted(state))]
    removed = {0: list(state), 1: [number for number in state if number % 2], 2: [rng.choice(sorted(state))]}
    change = rng.randrange(8)
    for number in removed.get(change, ()):
        del state[number]
    if change == 3:
        del one[rng.choice(sorted(one))]
    elif change == 4:
        one["step"] = rng.choice((*map(torch.tensor, (-1.0, float("nan"), 1e30)), "a", None))
    elif change == 5:
        one["exp_avg_sq"] = -one["exp_avg_sq"].abs() - 1
    elif change == 6:
        groups[0]["params"] = rng.choice(([], groups[0]["params"][::-1], groups[0]["params"][:-1], ["a"], None))
    elif change == 7:
        content["opt"] = rng.choice(({}, None, [], {"state": {}, "param_groups": []}, {"state": state}))
    return _save(content, data)
