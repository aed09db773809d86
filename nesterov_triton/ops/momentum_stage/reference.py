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
    """What a launch leaves behind, [N] each."""

    h: Sequence[Tensor]  # κ x of the next stages: the field's next arguments
    slopes: Sequence[Tensor]  # dm of the stages whose outputs were given
    m: Tensor | None  # m of the next stage, if asked for


def all_slopes(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    gate_x: Gate,
    gate_f: Gate,
    rows: Sequence[Sequence[float]],
) -> tuple[list[Tensor], list[Tensor]]:
    """(dx_j, dm_j) of all stages up to the last output, [N] each, in the dtype that is computed in; dx has one more,
    unless no row leads further. `rows` leads to each stage and to what follows the last; the other arguments as
    `momentum_stage`."""
    dtype = wide(z.dtype)
    x, m = z.view(2, -1).to(dtype)
    dt, coefficients = dt.to(dtype), coefficients.to(dtype)
    dm = [k.to(dtype) for k in slopes]
    momenta = [m + dt * weighted(dm, rows[j], m) for j in range(len(dm) + 1)]
    dx = [gate_x(m_j) for m_j in momenta]
    for u in outputs:
        i = len(dm)
        _, drive, q, minus_gamma = coefficients[i]
        x_i = x + dt * weighted(dx, rows[i], x)
        slope = drive * gate_f(u.reshape(-1).to(dtype)) + q * x_i + minus_gamma * momenta[-1]
        dm.append(slope.to(z.dtype).to(dtype))  # as later stages will read it
        if i + 1 < len(rows):
            momenta.append(m + dt * weighted(dm, rows[i + 1], m))
            dx.append(gate_x(momenta[-1]))
    return dx, dm


def momentum_stage(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    ahead: int,
    momentum: bool,
) -> Stage:
    """See `ops.momentum_stage.momentum_stage`."""
    rows = tableau.all_a
    dx, dm = all_slopes(outputs, z, slopes, coefficients, dt, gate_x, gate_f, rows)
    dtype = wide(z.dtype)
    x, m = z.view(2, -1).to(dtype)
    dt, scale = dt.to(dtype), coefficients[:, 0].to(dtype)
    following = range(len(dm), len(dm) + ahead)
    h = [(scale[i] * (x + dt * weighted(dx, rows[i], x))).to(z.dtype) for i in following]
    m_next = (m + dt * weighted(dm, rows[len(dm)], m)).to(z.dtype) if momentum else None
    return Stage(h, [k.to(z.dtype) for k in dm[len(slopes) :]], m_next)
