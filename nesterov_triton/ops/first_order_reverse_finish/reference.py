"""Torch reference of a transposed first-order step's end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nesterov_triton.ops.dispatch import wide


def first_order_reverse_finish(cotangent: Tensor, through: Sequence[Tensor]) -> Tensor:
    """See `ops.first_order_reverse_finish.first_order_reverse_finish`."""
    total = cotangent.reshape(-1).to(wide(cotangent.dtype), copy=True)
    for v in through:
        total += v.reshape(-1)
    return total.to(cotangent.dtype)
