"""Torch reference of a stage of the reverse sweep over a step by the methods of `nesterov_triton.nystrom`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nesterov_triton.gates import Gate, Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.nystrom.reference import Plan, linear, plan_of, start_cotangents, sweep_back


class ReverseStage(NamedTuple):
    """What a launch leaves behind, [N] each."""

    cotangent: Tensor  # g: what goes back through the field
    of_position: Tensor | None  # the cotangent of the position after it, where its v was given


class First(NamedTuple):
    """What comes to a step's start, [N] each."""

    nodes: list[Tensor]  # the cotangents of M_0, M_1, …
    of_x: Tensor  # of x, but for what comes through the force
    of_m: Tensor
    of_force: Tensor


def first_cotangents(
    x: Tensor,
    m: Tensor,
    forces: Sequence[Tensor],
    of_positions: Sequence[Tensor],
    of_m: Tensor,
    weights: Tensor,
    plan: Plan,
    gate_x: Gate,
    kick: Tensor,
    given: Tensor | None,
) -> First:
    """The sweep's end, in the dtype that is computed in, to which everything has been converted; arguments as
    `reference.sweep_back` and `nystrom_reverse_stage`. The force at the step's start is the step before's last, which
    gives m there a kick."""
    nodes, of_force = sweep_back(0, x, m, forces, of_positions, of_m, weights, plan, gate_x)
    of_x, of_start = start_cotangents(nodes, of_positions, of_m, weights, plan)
    if given is not None:
        given_x, given_m, given_force = given.view(3, -1)
        of_x, of_start, of_force = of_x + given_x, of_start + given_m, of_force + given_force
    return First(nodes, of_x, of_start, of_force + kick * of_start)


def position_cotangent(
    i: int,
    through: Tensor,
    x: Tensor,
    m: Tensor,
    forces: Sequence[Tensor],
    of_positions: Sequence[Tensor],
    of_m: Tensor,
    coefficients: Tensor,
    weights: Tensor,
    plan: Plan,
    gate_x: Gate,
) -> Tensor:
    """κ v + q c_i, the cotangent of X_i for 0 < i < s - 1; arguments as `first_cotangents`."""
    _, of_force = sweep_back(i, x, m, forces, of_positions, of_m, weights, plan, gate_x)
    return coefficients[i, 0] * through + linear(coefficients, plan.gated)[i] * of_force


def nystrom_reverse_stage(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    cotangent: Tensor,
    of_positions: Sequence[Tensor],
    through: Tensor | None,
    coefficients: Tensor,
    weights: Tensor,
    kick: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    given: Tensor | None,
) -> ReverseStage:
    """See `ops.nystrom_reverse_stage.nystrom_reverse_stage`."""
    plan, dtype = plan_of(method, not isinstance(gate_x, Identity)), wide(z.dtype)
    stage = method.stages - 2 - len(of_positions) - (through is not None)
    x, m = z.view(2, -1).to(dtype)
    of_x, of_m = cotangent.view(2, -1).to(dtype)
    coefficients, weights = coefficients.to(dtype), weights.to(dtype)
    known, ys, new = [f.to(dtype) for f in forces], [*(y.to(dtype) for y in of_positions), of_x], None
    if through is not None:
        v = through.reshape(-1).to(dtype)
        new = position_cotangent(stage + 1, v, x, m, known, ys, of_m, coefficients, weights, plan, gate_x).to(z.dtype)
        ys = [new.to(dtype), *ys]  # as later launches will read it
    if stage == 0:
        more = None if given is None else given.to(dtype)
        of_force = first_cotangents(x, m, known, ys, of_m, weights, plan, gate_x, kick.to(dtype), more).of_force
    else:
        _, of_force = sweep_back(stage, x, m, known, ys, of_m, weights, plan, gate_x)
    u = output.reshape(-1).to(dtype)
    g = gate_f.pullback(coefficients[stage, 1] * of_force, u, gate_f(u))
    return ReverseStage(g.to(z.dtype), new)
