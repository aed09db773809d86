"""Torch reference of a stage by the methods of `nesterov_triton.nystrom`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.nystrom.reference import Plan, force, plan_of, position


class Stage(NamedTuple):
    """What a launch leaves behind, [N] each; None for what was not asked for."""

    h: Tensor | None  # κ X of the next stage: the field's next argument
    force: Tensor | None  # of the stage whose output was given


def all_forces(
    output: Tensor | None,
    z: Tensor,
    forces: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    plan: Plan,
    gate_x: Gate,
    gate_f: Gate,
) -> list[Tensor]:
    """`forces` and that of the output, if there is one, in the dtype that is computed in, to which everything else has
    been converted; the others as `nystrom_stage`."""
    x, m = z.view(2, -1)
    found = [f.to(z.dtype) for f in forces]
    if output is not None:
        at = position(len(found), x, m, found, weights, plan, gate_x)
        found.append(force(output, at, len(found), coefficients, plan.gated, gate_f))
    return found


def nystrom_stage(
    output: Tensor | None,
    z: Tensor,
    forces: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    ahead: bool,
) -> Stage:
    """See `ops.nystrom_stage.nystrom_stage`."""
    plan = plan_of(method, not isinstance(gate_x, Identity))
    dtype, new, h = wide(z.dtype), None, None
    state, coefficients, weights = z.to(dtype), coefficients.to(dtype), weights.to(dtype)
    known = all_forces(output, state, forces, coefficients, weights, plan, gate_x, gate_f)
    if output is not None:
        new = known[-1].to(z.dtype)
        known[-1] = new.to(dtype)  # as later stages will read it
    if ahead:
        x, m = state.view(2, -1)
        at = position(len(known), x, m, known, weights, plan, gate_x)
        h = (coefficients[len(known), 0] * at).to(z.dtype)
    return Stage(h, new)
