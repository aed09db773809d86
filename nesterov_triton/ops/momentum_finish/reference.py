"""Torch reference of a momentum step's end: what the kernel computes, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.momentum_stage.reference import all_slopes
from nesterov_triton.ops.runge_kutta import finished_norm, weighted
from nesterov_triton.tableaus import Tableau


class Finish(NamedTuple):
    """What a step leaves behind."""

    z: Tensor  # (x, m) at its end, [2 N]
    slopes: Sequence[Tensor]  # dm of its last stages, [N] each, as many as asked for
    error: Tensor  # norm of the embedded error, 0-d float64


def momentum_finish(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    keep: int,
) -> Finish:
    """See `ops.momentum_finish.momentum_finish`."""
    dx, dm = all_slopes(outputs, z, slopes, coefficients, dt, gate_x, gate_f, tableau.step_rows)
    dtype = wide(z.dtype)
    old, dt = z.view(2, -1).to(dtype), dt.to(dtype)
    x, m = old
    new = torch.stack((x + dt * weighted(dx, tableau.b, x), m + dt * weighted(dm, tableau.b, m))).to(z.dtype)
    errors = [dt * torch.stack((weighted(dx, row, x), weighted(dm, row, m))) for row in tableau.error]
    kept = [k.to(z.dtype) for k in dm[len(dm) - keep :]]
    error = finished_norm(errors, z.view(2, -1), new, dm[-1], rtol, atol, dtype)
    return Finish(new.view(-1), kept, error)
