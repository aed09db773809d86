"""Torch reference of the end of an adjoint step of a momentum system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.momentum_adjoint_stage.reference import all_cotangents, all_momenta
from nesterov_triton.ops.runge_kutta import finished_norm, weighted
from nesterov_triton.tableaus import Tableau


class AdjointFinish(NamedTuple):
    """What an adjoint step leaves behind."""

    state: Tensor  # (x, m, a_x, a_m) at its end, [4 N]
    error: Tensor  # norm of the embedded error over all four, 0-d float64
    quadratures: Tensor | None  # the integrals of ⟨h, a_m⟩ and ⟨m, a_m⟩, [2] float64, if asked for


def inner_products(
    z: Tensor,
    momenta: Sequence[Tensor],
    y_m: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rows: Sequence[Sequence[float]],
    weights: Sequence[float] | None,
    gate_x: Gate,
) -> Tensor:
    """Σ_i weights_i ⟨h_i, Y_m,i⟩ and Σ_i weights_i ⟨m_i, Y_m,i⟩ over the stages, [2] float64; None for weights of 1.
    All in stage order, and in the dtype that is computed in."""
    x, dx = z.view(2, -1)[0].to(wide(z.dtype)), [gate_x(m_i) for m_i in momenta]
    totals = [torch.zeros_like(x), torch.zeros_like(x)]
    for i, (m_i, y_i) in enumerate(zip(momenta, y_m, strict=True)):
        weight = 1.0 if weights is None else weights[i]
        if weight != 0:
            h_i = coefficients[i, 0] * (x + dt * weighted(dx, rows[i], x))
            totals = [total + weight * (row * y_i) for total, row in zip(totals, (h_i, m_i), strict=True)]
    return torch.stack([total.sum(dtype=torch.float64) for total in totals])


def momentum_adjoint_finish(
    z: Tensor,
    slopes: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    quadratures: bool,
    through_m: Sequence[Tensor],
) -> AdjointFinish:
    """See `ops.momentum_adjoint_finish.momentum_adjoint_finish`."""
    dtype, exact = wide(z.dtype), dt.to(torch.float64)
    dt, coefficients = dt.to(dtype), coefficients.to(dtype)
    momenta = all_momenta(z, slopes, dt, tableau.a, tableau.stages)
    base = [adjoint.view(2, -1).to(dtype).unbind(0)] * tableau.stages
    _, y_m, p_x, p_m = all_cotangents(base, momenta, through, through_m, coefficients.unbind(0), -dt, tableau.a, gate_x)
    dx, dm = [gate_x(m_i) for m_i in momenta], [k.reshape(-1) for k in slopes]
    joint = dx, dm, [-p for p in p_x], [-p for p in p_m]
    old = torch.cat((z.view(2, -1), adjoint.view(2, -1)))
    like = old[0].to(dtype)
    ends = [row.to(dtype) + dt * weighted(k, tableau.b, like) for row, k in zip(old, joint, strict=True)]
    new = torch.stack(ends).to(z.dtype)
    errors = [dt * torch.stack([weighted(k, row, like) for k in joint]) for row in tableau.error]
    last = torch.stack([k[-1].to(dtype) for k in joint[1:]])
    error = finished_norm(errors, old, new, last, rtol, atol, dtype)
    sums = None
    if quadratures:
        sums = inner_products(z, momenta, y_m, coefficients, dt, tableau.a, tableau.b, gate_x) * exact
    return AdjointFinish(new.view(-1), error, sums)
