"""Torch reference of the start of a step by the methods of `nesterov_triton.nystrom`, where its reverse sweep ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.nystrom.reference import combined, linear, plan_of, position, sweep_back
from nesterov_triton.ops.nystrom_reverse_stage.reference import first_cotangents


class ReverseFinish(NamedTuple):
    """What the sweep over a step leaves behind."""

    cotangent: Tensor  # of (x, m) at the step's start, [2 N]
    quadratures: Tensor | None  # the cotangents of ξ and γ, [2] float64, if asked for


def nystrom_reverse_finish(
    z: Tensor,
    forces: Sequence[Tensor],
    cotangent: Tensor,
    of_positions: Sequence[Tensor],
    through: Tensor,
    coefficients: Tensor,
    weights: Tensor,
    kick: Tensor,
    method: Nystrom,
    gate_x: Gate,
    given: Tensor | None,
    rates: Tensor | None,
) -> ReverseFinish:
    """See `ops.nystrom_reverse_finish.nystrom_reverse_finish`."""
    plan, dtype = plan_of(method, not isinstance(gate_x, Identity)), wide(z.dtype)
    x, m = z.view(2, -1).to(dtype)
    end_x, end_m = cotangent.view(2, -1).to(dtype)
    coefficients, weights = coefficients.to(dtype), weights.to(dtype)
    known, ys = [f.to(dtype) for f in forces], [*(y.to(dtype) for y in of_positions), end_x]
    more = None if given is None else given.to(dtype)
    first = first_cotangents(x, m, known, ys, end_m, weights, plan, gate_x, kick.to(dtype), more)
    v = through.reshape(-1).to(dtype)
    of_x = first.of_x + coefficients[0, 0] * v + linear(coefficients, plan.gated)[0] * first.of_force
    start = torch.cat((of_x, first.of_m)).to(z.dtype)
    if rates is None:
        return ReverseFinish(start, None)
    columns, rates = (x, m, *known), rates.to(dtype)
    rows, cotangents = (plan.paths, first.nodes) if plan.gated else (plan.positions, ys)
    of_gamma, of_xi = end_m * combined(columns, rates, plan.ends[0]), torch.zeros_like(x)
    for row, of_row in zip(rows, cotangents, strict=True):
        of_gamma = of_gamma + of_row * combined(columns, rates, row)
    for i in range(len(known)):
        at, of_force = x, first.of_force
        if i:
            at = position(i, x, m, known[:i], weights, plan, gate_x)
            _, of_force = sweep_back(i, x, m, known, ys[i:], end_m, weights, plan, gate_x)
        of_xi = of_xi - coefficients[i, 0] * (at * of_force)
        if not plan.gated:
            of_gamma = of_gamma - 0.5 * coefficients[0, 3] * (at * of_force)
    sums = torch.stack((of_xi.sum(dtype=torch.float64), of_gamma.sum(dtype=torch.float64)))
    return ReverseFinish(start, sums)
