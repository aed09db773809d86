"""Torch reference of a momentum stage: what the kernel computes, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.runge_kutta import weighted
from nesterov_triton.tableaus import Tableau


class Stage(NamedTuple):
    """What a stage leaves behind, [N] each."""

    h: Tensor  # κ x of the next stage: the field's next argument
    slope: Tensor | None  # dm of this stage; None where it was given
    m: Tensor | None  # m of the next stage, if asked for


def stage_slopes(
    u: Tensor | None,
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stage: int,
    gate_x: Gate,
    gate_f: Gate,
) -> tuple[list[Tensor], list[Tensor]]:
    """(dx_j, dm_j) for j ≤ stage, [N] each, in the dtype that is computed in. Arguments as `momentum_stage`."""
    dtype = wide(z.dtype)
    x, m = z.view(2, -1).to(dtype)
    dt, row = dt.to(dtype), coefficients[stage].to(dtype)
    dm = [k.to(dtype) for k in slopes]
    momenta = [m + dt * weighted(dm, tableau.a[j], m) for j in range(stage + 1)]
    dx = [gate_x(m_j) for m_j in momenta]
    if u is not None:
        x_i = x + dt * weighted(dx, tableau.a[stage], x)
        slope = row[1] * gate_f(u.reshape(-1).to(dtype)) + row[2] * x_i + row[3] * momenta[-1]
        dm.append(slope.to(z.dtype).to(dtype))  # as later stages will read it
    return dx, dm


def momentum_stage(
    u: Tensor | None,
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stage: int,
    gate_x: Gate,
    gate_f: Gate,
    momentum: bool,
) -> Stage:
    """See `ops.momentum_stage.momentum_stage`."""
    dx, dm = stage_slopes(u, z, slopes, coefficients, dt, tableau, stage, gate_x, gate_f)
    dtype = wide(z.dtype)
    x, m = z.view(2, -1).to(dtype)
    dt, scale = dt.to(dtype), coefficients[stage + 1, 0].to(dtype)
    row = (*tableau.a, tableau.b)[stage + 1]
    h = scale * (x + dt * weighted(dx, row, x))
    m_next = (m + dt * weighted(dm, row, m)).to(z.dtype) if momentum else None
    return Stage(h.to(z.dtype), None if u is None else dm[-1].to(z.dtype), m_next)
