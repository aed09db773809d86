"""Torch reference of a stage of the adjoint by the methods of `nesterov_triton.nystrom`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.nystrom.reference import adjoint_path, growth_of, plan_of
from nesterov_triton.ops.nystrom_stage.reference import nystrom_stage


class AdjointStage(NamedTuple):
    """What a launch leaves behind, [N] each; None for what the last stage does not want."""

    h: Tensor | None  # κ X of the next stage: the field's next argument
    force: Tensor | None  # of the stage whose output was given
    cotangent: Tensor  # g of that stage: what goes back through the field


def nystrom_adjoint_stage(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    ahead: bool,
) -> AdjointStage:
    """See `ops.nystrom_adjoint_stage.nystrom_adjoint_stage`."""
    stage, h, new = len(through), None, None
    if stage < method.stages - 1:
        h, new = nystrom_stage(output, z, forces, coefficients, weights, method, gate_x, gate_f, ahead)
    plan, dtype = plan_of(method, not isinstance(gate_x, Identity)), wide(z.dtype)
    coefficients, weights = coefficients.to(dtype), weights.to(dtype)
    growth = growth_of(weights, method.stages)
    x, m = z.view(2, -1).to(dtype)
    known, vs = ([row.to(dtype) for row in given] for given in (forces, through))
    positions, _ = adjoint_path(x, m, known, adjoint.to(dtype), vs, coefficients, weights, plan, gate_x)
    u = output.reshape(-1).to(dtype)
    g = gate_f.pullback(coefficients[stage, 1] * (growth[stage] * positions[stage]), u, gate_f(u))
    return AdjointStage(h, new, g.to(z.dtype))
