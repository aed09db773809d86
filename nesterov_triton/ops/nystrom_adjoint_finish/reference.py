"""Torch reference of the end of an adjoint step by the methods of `nesterov_triton.nystrom`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.nystrom.reference import adjoint_path, combined, ends_of, force, growth_of, plan_of, position
from nesterov_triton.ops.runge_kutta import finished_norm


class AdjointFinish(NamedTuple):
    """What an adjoint step leaves behind."""

    state: Tensor  # (x, m, a_x, a_m) at its end, [4 N]
    force: Tensor  # there, [N]
    error: Tensor  # norm of the embedded error over all four, 0-d float64
    quadratures: Tensor | None  # the integrals of ⟨h, a_m⟩ and ⟨m, a_m⟩, [2] float64, if asked for


def nystrom_adjoint_finish(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    adaptive: bool,
    quadratures: bool,
    dense: Tensor | None,
) -> AdjointFinish:
    """See `ops.nystrom_adjoint_finish.nystrom_adjoint_finish`."""
    plan, dtype, last = plan_of(method, not isinstance(gate_x, Identity)), wide(z.dtype), method.stages - 1
    x, m = z.view(2, -1).to(dtype)
    coefficients, weights = coefficients.to(dtype), weights.to(dtype)
    growth = growth_of(weights, method.stages)
    known = [f.to(dtype) for f in forces]
    x_new = position(last, x, m, known, weights, plan, gate_x).to(z.dtype)
    new = force(output, x_new.to(dtype), last, coefficients, plan.gated, gate_f).to(z.dtype)
    own = (x, m, *known, new.to(dtype))
    wide_adjoint, vs = adjoint.to(dtype), [v.to(dtype) for v in through]
    positions, pulled = adjoint_path(x, m, known, wide_adjoint, vs, coefficients, weights, plan, gate_x)
    a_x, a_m = wide_adjoint.view(2, -1)
    other = (a_m, -a_x, *pulled)
    m_new, other_m = (combined(columns, weights, plan.ends[0]) for columns in (own, other))
    grown = growth[last]
    end = torch.stack([row.to(z.dtype) for row in (x_new, m_new, -grown * other_m, grown * positions[last])])
    errors = []
    if adaptive:
        of_x, of_m = ([combined(columns, weights, row) for row in plan.ends[1:]] for columns in (own, other))
        errors = [torch.stack((*of_x, -grown * of_m[1], grown * of_m[0]))]
    old, ends = torch.cat((z.view(2, -1), adjoint.view(2, -1))), torch.stack((new.to(dtype), pulled[last]))
    error = finished_norm(errors, old, end, ends, rtol, atol, dtype)
    if not quadratures:
        return AdjointFinish(end.view(-1), new, error, None)
    sums = torch.zeros((2, *x.shape), dtype=dtype, device=x.device)
    for i, b in enumerate(method.b):
        if b != 0:
            h = coefficients[i, 0] * position(i, x, m, known, weights, plan, gate_x)
            sums[0] += b * (growth[i] * (h * positions[i]))
    if dense is not None:
        x1, m1, first, final = x_new.to(dtype), end[1].to(dtype), known[0], own[-1]
        columns = ends_of(gate_x if plan.gated else None, x, m, first, x1, m1, final)
        of_w: tuple[Tensor, ...] = (a_m, -a_x, pulled[0], positions[last], other_m, pulled[last])
        if plan.gated:  # whose gate is (σ_x, σ_x' times the other momentum); of the last four nothing is weighed
            first_w, last_w = (gate_x.pullback(w, at, gate_x(at)) for w, at in ((-a_x, m), (other_m, m1)))
            of_w = (a_m, first_w, positions[last], last_w)
        for k, (of_x, of_momentum) in enumerate(dense.to(dtype)):
            w_m = sum(weight * column for weight, column in zip(of_x, of_w, strict=False))
            momentum = sum(weight * column for weight, column in zip(of_momentum, columns, strict=True))
            sums[1] += growth[last + 1 + k] * (w_m * momentum)
    exact = dt.to(torch.float64)
    return AdjointFinish(end.view(-1), new, error, sums.sum(dim=1, dtype=torch.float64) * exact)
