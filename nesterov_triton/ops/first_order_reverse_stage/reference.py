"""Torch reference of a transposed first-order stage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.runge_kutta import weighted
from nesterov_triton.tableaus import Tableau


def column(tableau: Tableau, stage: int, stages: int) -> tuple[float, ...]:
    """b_i and a_{i+1,i} … a_{stages-1,i}: what a step of so many stages takes of stage i's slope."""
    of_end = tableau.b[stage] if stage < tableau.stages else 0.0
    return (of_end, *(row[stage] for row in tableau.all_a[stage + 1 : stages]))


def first_order_reverse_stage(
    cotangent: Tensor, through: Sequence[Tensor], dt: Tensor, tableau: Tableau, stages: int, seed: Tensor | None
) -> Tensor:
    """See `ops.first_order_reverse_stage.first_order_reverse_stage`."""
    like = cotangent.reshape(-1).to(wide(cotangent.dtype))
    rows = [cotangent, *through, *([] if seed is None else [seed])]
    weights = (*column(tableau, stages - 1 - len(through), stages), 1.0)
    total = weighted([row.reshape(-1) for row in rows], weights, like)
    return (dt.to(like.dtype) * total).to(cotangent.dtype)
