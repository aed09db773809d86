"""Torch reference of a first-order system's dense output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.ops.dispatch import wide
from nesterov_triton.tableaus import Tableau


def weighing(tableau: Tableau) -> tuple[bool, ...]:
    """Which stages a method's interpolant has a weight for."""
    return tuple(map(any, tableau.interpolant))


def interpolated(base: Tensor, rows: Sequence[Tensor], weights: Tensor, dt: Tensor, used: Sequence[bool]) -> Tensor:
    """base + dt Σ_i weights[k, i] rows_i, [T, D] in the dtype of `base`, [D]; rows not `used` are not looked at."""
    total = torch.zeros((weights.shape[0], base.numel()), dtype=base.dtype, device=base.device)
    weights = weights.to(base.dtype)
    for i, row in enumerate(rows):
        if used[i]:
            total.addcmul_(weights[:, i, None], row.to(base.dtype))
    return base + dt.to(base.dtype) * total


def put(found: Tensor, out: Tensor | None, span: Tensor | None) -> Tensor:
    """The states [T, D], in `out` if given: there only those in the span (first, count), which nobody reads."""
    if out is None or span is None:
        return found
    first, count = span.unbind(0)
    index = torch.arange(len(out), device=out.device)
    inside = (index >= first) & (index < first + count)
    return out.copy_(torch.where(inside[:, None], found, out))


def first_order_dense_output(
    y: Tensor,
    slopes: Sequence[Tensor],
    weights: Tensor,
    dt: Tensor,
    tableau: Tableau | None,
    out: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    """See `ops.first_order_dense_output.first_order_dense_output`."""
    used = (True,) * len(slopes) if tableau is None else weighing(tableau)
    rows = [k.reshape(-1) for k in slopes]
    return put(interpolated(y.reshape(-1).to(wide(y.dtype)), rows, weights, dt, used).to(y.dtype), out, span)
