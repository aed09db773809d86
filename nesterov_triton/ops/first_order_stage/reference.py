"""Torch reference of a first-order stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.runge_kutta import weighted
from nesterov_triton.tableaus import Tableau


def state_slopes(slopes: Sequence[Tensor], through: Sequence[Tensor]) -> list[Tensor]:
    """The slopes of the whole state: k_j, [D] each, or (k_j, -v_j), [2 D] each."""
    rows = [k.reshape(-1) for k in slopes]
    if not through:
        return rows
    return [torch.cat((k, -v.reshape(-1))) for k, v in zip(rows, through, strict=True)]


def first_order_stage(
    y: Tensor, slopes: Sequence[Tensor], dt: Tensor, tableau: Tableau, stage: int, through: Sequence[Tensor] = ()
) -> Tensor:
    """See `ops.first_order_stage.first_order_stage`."""
    base = y.reshape(-1).to(wide(y.dtype))
    rows = state_slopes(slopes, through)
    return (base + dt.to(base.dtype) * weighted(rows, tableau.all_a[stage + 1], base)).to(y.dtype)
