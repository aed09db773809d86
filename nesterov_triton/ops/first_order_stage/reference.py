"""Torch reference of a first-order stage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.runge_kutta import weighted
from nesterov_triton.tableaus import Tableau


def first_order_stage(y: Tensor, slopes: Sequence[Tensor], dt: Tensor, tableau: Tableau, stage: int) -> Tensor:
    """See `ops.first_order_stage.first_order_stage`."""
    base = y.reshape(-1).to(wide(y.dtype))
    rows = [k.reshape(-1) for k in slopes]
    return (base + dt.to(base.dtype) * weighted(rows, tableau.all_a[stage + 1], base)).to(y.dtype)
