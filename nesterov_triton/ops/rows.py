"""Views of a flat state, made once: a view costs a microsecond, and a step would make sixty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """A flat state, [D], and its parts, [N] each: (y) or (x, m), or these and their cotangents."""

    flat: Tensor
    parts: Sequence[Tensor]

    @classmethod
    def of(cls, flat: Tensor, rows: int) -> Row:
        """`flat` cut into so many parts."""
        return cls(flat, (flat,) if rows == 1 else flat.view(rows, -1).unbind(0))

    def split(self) -> tuple[Row, Row]:
        """The first half and the second half of the parts."""
        n = len(self.parts) // 2
        first, second = self.flat.view(2, -1).unbind(0)
        return Row(first, self.parts[:n]), Row(second, self.parts[n:])


def empty_rows(count: int, rows: int, like: Tensor) -> tuple[Tensor, list[Row]]:
    """Uninitialised storage [count, D] for states like `like`, [D], and its rows."""
    storage = torch.empty((count, like.numel()), dtype=like.dtype, device=like.device)
    parts = storage.view(count * rows, like.numel() // rows).unbind(0)  # one call for all of them
    return storage, [Row(flat, parts[i * rows : (i + 1) * rows]) for i, flat in enumerate(storage.unbind(0))]
