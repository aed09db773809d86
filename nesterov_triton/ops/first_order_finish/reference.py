"""Torch reference of a first-order step's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nesterov_triton.ops.dispatch import wide
from nesterov_triton.ops.first_order_stage.reference import state_slopes
from nesterov_triton.ops.runge_kutta import finished_norm, weighted
from nesterov_triton.tableaus import Tableau


class Finish(NamedTuple):
    """What a step leaves behind."""

    y: (
        Tensor | None
    )  # the state at its end, [D], or with its adjoint, [2 D]; None for an FSAL method, whose last stage was there
    error: Tensor  # norm of the embedded error, 0-d float64


def first_order_finish(
    y: Tensor,
    slopes: Sequence[Tensor],
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    through: Sequence[Tensor] = (),
) -> Finish:
    """See `ops.first_order_finish.first_order_finish`."""
    dtype = wide(y.dtype)
    old, dt = y.reshape(-1).to(dtype), dt.to(dtype)
    rows = state_slopes(slopes, through)
    new = (old + dt * weighted(rows, tableau.b, old)).to(y.dtype)
    errors = [dt * weighted(rows, row, old) for row in tableau.error]
    error = finished_norm(errors, y.reshape(-1), new, rows[-1], rtol, atol, dtype)
    return Finish(None if tableau.fsal else new, error)
