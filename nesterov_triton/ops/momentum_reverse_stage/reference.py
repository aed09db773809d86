"""Torch reference of a stage of the reverse sweep over a momentum step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nesterov_triton.gates import Gate
from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.momentum_adjoint_stage.reference import (
    Sweep,
    all_cotangents,
    all_momenta,
    field_cotangent,
)
from nesterov_triton.ops.momentum_stage.reference import all_slopes
from nesterov_triton.tableaus import Tableau


class ReverseStage(NamedTuple):
    """What a launch leaves behind, [N] each."""

    cotangents: Sequence[Tensor]  # g of the stages whose outputs were given: what goes back through the field
    slopes: Sequence[Tensor]  # dm of the last stage but one, where it was not known; else none


def transposed(rows: Sequence[Sequence[float]], stages: int) -> tuple[tuple[float, ...], ...]:
    """What leads to each of so many stages on the way back: from the last of them, row p with the p coefficients of the
    stages after it, the last one first."""
    return tuple(tuple(rows[stages - 1 - r][stages - 1 - p] for r in range(p)) for p in range(stages))


def last_weights(tableau: Tableau, stages: int) -> tuple[float, ...]:
    """b of so many stages; 0 for those of dense output."""
    return (*tableau.b, *(0.0,) * len(tableau.extra_c))[:stages]


def sweep_back(
    z: Tensor,
    slopes: Sequence[Tensor],
    cotangent: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stages: int,
    count: int,
    gate_x: Gate,
    seeds: Sequence[Tensor],
    through_m: Sequence[Tensor],
) -> Sweep:
    """The last `count` stages, the last one first; the other arguments as `momentum_reverse_finish`."""
    dtype = wide(z.dtype)
    dt, end = dt.to(dtype), cotangent.view(2, -1).to(dtype)
    base = [weight * end for weight in last_weights(tableau, stages)]
    if seeds:
        base = [of + seed.view(2, -1).to(dtype) for of, seed in zip(base, seeds, strict=True)]
    momenta = all_momenta(z, slopes, dt, tableau.all_a, stages)
    return all_cotangents(
        [(dt * of).unbind(0) for of in base[::-1]][:count],
        momenta[::-1],
        through[::-1],
        through_m[::-1],
        coefficients[:stages].to(dtype).flip(0).unbind(0),
        dt,
        transposed(tableau.all_a, stages),
        gate_x,
    )


def momentum_reverse_stage(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    cotangent: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stages: int,
    gate_x: Gate,
    gate_f: Gate,
    seeds: Sequence[Tensor],
    through_m: Sequence[Tensor],
) -> ReverseStage:
    """See `ops.momentum_reverse_stage.momentum_reverse_stage`."""
    known = [k.reshape(-1) for k in slopes]
    missing = outputs[: stages - 1 - len(known)]
    _, dm = all_slopes(missing, z, known, coefficients, dt, gate_x, gate_f, tableau.all_a)
    new = [k.to(z.dtype) for k in dm[len(known) :]]
    count = len(through) + len(outputs)
    y_m = sweep_back(
        z, [*known, *new], cotangent, through, coefficients, dt, tableau, stages, count, gate_x, seeds, through_m
    ).y_m
    first, drive = stages - count, coefficients[:, 1].to(wide(z.dtype))
    cotangents = [
        field_cotangent(y_m[stages - 1 - i], u, drive[i], gate_f).to(z.dtype) for i, u in enumerate(outputs, first)
    ]
    return ReverseStage(cotangents, new)
