"""A module whose buffers keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class FixedDtypeBuffers(nn.Module):
    """Base of modules with buffers only, which keep their dtype if the network is converted to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(table: Tensor) -> Tensor:
            moved = fn(table)
            return moved if moved.dtype == table.dtype else table.to(moved.device)

        return super()._apply(move_only, recurse)
