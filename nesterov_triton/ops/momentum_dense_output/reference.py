"""Torch reference of a momentum system's dense output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.first_order_dense_output.reference import interpolated, put, weighing
from nesterov_triton.ops.runge_kutta import weighted
from nesterov_triton.tableaus import Tableau


def momentum_dense_output(
    z: Tensor,
    slopes: Sequence[Tensor],
    weights: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    out: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    """See `ops.momentum_dense_output.momentum_dense_output`."""
    dtype, used = wide(z.dtype), weighing(tableau)
    x, m = z.reshape(-1).view(2, -1).to(dtype)
    dm = [k.reshape(-1) for k in slopes]
    dx = [gate_x(m + dt.to(dtype) * weighted(dm, row, m)) for row in tableau.all_a]
    parts = (interpolated(base, rows, weights, dt, used) for base, rows in ((x, dx), (m, dm)))
    return put(torch.cat(tuple(parts), dim=1).to(z.dtype), out, span)
