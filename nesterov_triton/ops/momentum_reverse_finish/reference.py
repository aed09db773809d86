"""Torch reference of the start of a momentum step, where its reverse sweep ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.momentum_adjoint_finish.reference import inner_products
from nesterov_triton.ops.momentum_adjoint_stage.reference import all_momenta
from nesterov_triton.ops.momentum_reverse_stage.reference import sweep_back
from nesterov_triton.tableaus import Tableau


class ReverseFinish(NamedTuple):
    """What the sweep over a step leaves behind."""

    cotangent: Tensor  # of (x, m) at the step's start, [2 N]
    quadratures: Tensor | None  # the sums of ⟨h, K_m⟩ and ⟨m, K_m⟩ over the stages, [2] float64, if asked for


def momentum_reverse_finish(
    z: Tensor,
    slopes: Sequence[Tensor],
    cotangent: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stages: int,
    gate_x: Gate,
    gate_f: Gate,
    quadratures: bool,
    seeds: Sequence[Tensor],
    through_m: Sequence[Tensor],
) -> ReverseFinish:
    """See `ops.momentum_reverse_finish.momentum_reverse_finish`."""
    dtype = wide(z.dtype)
    _, y_m, p_x, p_m = sweep_back(
        z, slopes, cotangent, through, coefficients, dt, tableau, stages, stages, gate_x, seeds, through_m
    )
    start = cotangent.view(2, -1).to(dtype)
    # From the last stage to the first, as they come.
    for of_x, of_m in zip(p_x, p_m, strict=True):
        start = start + torch.stack((of_x, of_m))
    sums = None
    if quadratures:
        dt, coefficients, rows = dt.to(dtype), coefficients.to(dtype), tableau.all_a
        momenta = all_momenta(z, slopes, dt, rows, stages)
        sums = inner_products(z, momenta, y_m[::-1], coefficients, dt, rows, None, gate_x)
    return ReverseFinish(start.to(z.dtype).view(-1), sums)
