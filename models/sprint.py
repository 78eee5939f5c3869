"""Token routing (SPRINT, as in SR-DiT, arXiv 2512.12386): in training, the middle blocks see a part of the tokens.

    f: blocks 1 and 2, all tokens -> g: the blocks between, a part of the tokens -> h: the last two blocks, all tokens

The output of g is written back to the places of its tokens. Other places hold a learned mask token. One linear layer
(`fusion_proj`) of f's and g's outputs is the input of h. In some steps the mask token replaces all of g's output (path
drop); in sampling the unconditional branch may therefore skip g. Otherwise all tokens go through g in evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.rope import Rotation


class Tokens(NamedTuple):
    """Tokens between two blocks, and what their attention needs."""

    x: Tensor  # (N, T, D)
    rotation: Rotation | None = None  # of queries and keys; None without RoPE
    first_v: Tensor | None = None  # values of the first block (N, heads, T, d); None without value residual


def choose_tokens(route: Tensor, count: int) -> Tensor:
    """Return the indices (N, count) int64 of the `count` smallest numbers in each row of `route`, (N, T).

    The sort is stable, so that equal numbers give the same indices on each device.
    """
    return route.argsort(dim=1, stable=True)[:, :count]


def take_tokens(tokens: Tokens, kept: Tensor) -> Tokens:
    """Return the tokens with the indices `kept`, (N, K), of each sample, with their rotation and first values."""
    x = tokens.x.gather(1, _index_of(kept, tokens.x))  # (N, K, D)
    rotation, first_v = tokens.rotation, tokens.first_v
    if rotation is not None:
        cos, sin = (table[kept].unsqueeze(1) for table in rotation)  # each (N, 1, K, d)
        rotation = (cos, sin)
    if first_v is not None:
        index = kept[:, None, :, None].expand(-1, first_v.shape[1], -1, first_v.shape[3])
        first_v = first_v.gather(2, index)  # (N, heads, K, d)
    return Tokens(x, rotation, first_v)


def fill_in(middle: Tensor, mask: Tensor, kept: Tensor | None, path_drop: Tensor | None) -> Tensor:
    """Return the output of the middle blocks for all tokens, (N, T, D), with `mask` where there is none.

    Args:
        middle: output of the middle blocks, (N, K, D), or (N, T, D) if `kept` is None.
        mask: the mask token at all places, (N, T, D).
        kept: indices (N, K) of the tokens in `middle`; None if it has all tokens in order.
        path_drop: (N,) bool, samples without output; None: all samples have it. The device decides: the host does not
            wait, and the weights of the middle blocks get gradients in each step, which are zero for dropped samples.
    """
    if kept is not None:
        middle = mask.scatter(1, _index_of(kept, middle), middle)  # (N, T, D)
    return middle if path_drop is None else torch.where(path_drop[:, None, None], mask, middle)


def _index_of(kept: Tensor, x: Tensor) -> Tensor:
    return kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])  # (N, K, D)
