"""Torch reference of the end of a step by the methods of `nesterov_triton.nystrom`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.nystrom.reference import combined, force, plan_of, position
from nesterov_triton.ops.runge_kutta import finished_norm


class Finish(NamedTuple):
    """What a step leaves behind."""

    z: Tensor  # (x, m) at its end, [2 N]
    force: Tensor  # there, [N]
    error: Tensor  # norm of the embedded error, 0-d float64


def nystrom_finish(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    rtol: Tensor,
    atol: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    adaptive: bool,
) -> Finish:
    """See `ops.nystrom_finish.nystrom_finish`."""
    plan, dtype, last = plan_of(method, not isinstance(gate_x, Identity)), wide(z.dtype), method.stages - 1
    x, m = z.view(2, -1).to(dtype)
    coefficients, weights = coefficients.to(dtype), weights.to(dtype)
    known = [f.to(dtype) for f in forces]
    x_new = position(last, x, m, known, weights, plan, gate_x).to(z.dtype)
    new = force(output, x_new.to(dtype), last, coefficients, plan.gated, gate_f).to(z.dtype)
    columns = (x, m, *known, new.to(dtype))
    end = torch.stack((x_new, combined(columns, weights, plan.ends[0]).to(z.dtype)))
    errors = [torch.stack([combined(columns, weights, row) for row in plan.ends[1:]])] if adaptive else []
    return Finish(end.view(-1), new, finished_norm(errors, z.view(2, -1), end, new, rtol, atol, dtype))
