"""Torch reference of a stage of the adjoint of a momentum system: what the kernel computes, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.momentum_stage.reference import all_slopes
from nesterov_triton.ops.runge_kutta import weighted
from nesterov_triton.tableaus import Tableau


class AdjointStage(NamedTuple):
    """What a launch leaves behind, [N] each."""

    h: Sequence[Tensor]  # κ x of the next stages: the field's next arguments
    slopes: Sequence[Tensor]  # dm of the stages whose outputs were given
    m: Tensor | None  # m of the next stage, if asked for and there is one
    cotangents: Sequence[Tensor]  # g of the stages whose outputs were given: what goes back through the field


class Sweep(NamedTuple):
    """Stages on the way back through the right-hand side, in the order in which they are gone through, [N] each."""

    y_x: list[Tensor]  # the cotangent that comes to the stage
    y_m: list[Tensor]
    p_x: list[Tensor]  # what the stage's right-hand side makes of it
    p_m: list[Tensor]


def all_momenta(
    z: Tensor, slopes: Sequence[Tensor], dt: Tensor, rows: Sequence[Sequence[float]], count: int
) -> list[Tensor]:
    """m_0 … m_{count - 1}, [N] each, in the dtype that is computed in."""
    m = z.view(2, -1)[1].to(wide(z.dtype))
    return [m + dt.to(m.dtype) * weighted([k.reshape(-1) for k in slopes], rows[j], m) for j in range(count)]


def all_cotangents(
    base: Sequence[Sequence[Tensor]],
    momenta: Sequence[Tensor],
    through: Sequence[Tensor],
    through_m: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    step: Tensor,
    weights: Sequence[Sequence[float]],
    gate_x: Gate,
) -> Sweep:
    """Y_p = base_p + step Σ_{r<p} weights_pr P_r  with  P_p = (κ v_p + q Y_m,p, σ_x'(m_p) Y_x,p - γ Y_m,p + w_p).

    The adjoint goes through the stages from the first to the last, base the adjoint at the step's start, weights those
    of the method and step = -dt; the reverse sweep from the last to the first, weights transposed and step = dt.

    P_m,p does not look at v_p: unless there are w, Y_m goes on for one stage more than all else.

    Args:
        base: (of x, of m) for each Y_m wanted: as many as there are v, and one or two more; in the dtype that is
            computed in.
        momenta: m_p; one more than there are v where that is needed.
        through: v_p.
        through_m: w_p; none where the field does not see m.
        coefficients: rows (κ, s, q, -γ).
    """
    y_x, y_m, p_x, p_m = sweep = Sweep([], [], [], [])
    for p, (of_x, of_m) in enumerate(base):
        y_m.append(of_m + step * weighted(p_m, weights[p], of_m))
        if p >= len(through) and (through_m or p == len(base) - 1):
            break
        y_x.append(of_x + step * weighted(p_x, weights[p], of_x))
        scale, _, q, minus_gamma = coefficients[p]
        through_gate = gate_x.pullback(y_x[p], momenta[p], gate_x(momenta[p]))
        p_m.append(through_gate + minus_gamma * y_m[p])
        if through_m:
            p_m[p] = p_m[p] + through_m[p].reshape(-1).to(of_m.dtype)
        if p < len(through):
            p_x.append(scale * through[p].reshape(-1).to(of_x.dtype) + q * y_m[p])
    return sweep


def field_cotangent(y_m: Tensor, u: Tensor, drive: Tensor, gate_f: Gate) -> Tensor:
    """s σ_f'(u) Y_m, [N], for the field's output u and the cotangent Y_m of m'."""
    u = u.reshape(-1).to(y_m.dtype)
    return gate_f.pullback(drive * y_m, u, gate_f(u))


def momentum_adjoint_stage(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    ahead: int,
    momentum: bool,
    through_m: Sequence[Tensor],
) -> AdjointStage:
    """See `ops.momentum_adjoint_stage.momentum_adjoint_stage`."""
    known, rows = len(slopes), (*tableau.all_a, ())  # nothing follows the last stage
    dx, dm = all_slopes(outputs, z, [k.reshape(-1) for k in slopes], coefficients, dt, gate_x, gate_f, rows)
    dtype = wide(z.dtype)
    x, m = z.view(2, -1).to(dtype)
    dt, coefficients = dt.to(dtype), coefficients.to(dtype)
    following = range(len(dm), len(dm) + ahead)
    h = [(coefficients[i, 0] * (x + dt * weighted(dx, rows[i], x))).to(z.dtype) for i in following]
    m_next = (m + dt * weighted(dm, rows[len(dm)], m)).to(z.dtype) if momentum and ahead else None

    base = [adjoint.view(2, -1).to(dtype).unbind(0)] * len(dm)
    momenta = all_momenta(z, slopes, dt, rows, known + 1)
    y_m = all_cotangents(base, momenta, through, through_m, coefficients.unbind(0), -dt, rows, gate_x).y_m
    cotangents = [
        field_cotangent(y_m[i], u, coefficients[i, 1], gate_f).to(z.dtype) for i, u in enumerate(outputs, known)
    ]
    return AdjointStage(h, [k.to(z.dtype) for k in dm[known:]], m_next, cotangents)
