"""One Runge-Kutta step on a list of rows: stages, end, error, dense output. Tableaus are constants of the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.compiled.system import Moment
from nesterov_triton.tableaus import Tableau

Rows = Sequence[Tensor]


class Flow(NamedTuple):
    """A right-hand side: its value at a moment and a state, and the moments of times [s], float64."""

    slopes: Callable[[Moment, Rows], Rows]
    moments: Callable[[Tensor], list[Moment]]

    def at(self, t: Tensor, rows: Rows) -> list[Tensor]:
        """The value at the time `t`, 0-d float64."""
        return list(self.slopes(self.moments(t.reshape(1))[0], rows))


def combine(rows: Rows, dt: Tensor, stages: Sequence[Rows], weights: Sequence[float]) -> list[Tensor]:
    """rows + dt Σ_j weights_j k_j, for stages k_j; `dt` 0-d, in any dtype."""
    used = [(w, k) for w, k in zip(weights, stages, strict=False) if w != 0]
    if not used:
        return list(rows)
    step = dt.to(rows[0].dtype)
    return [row + step * _sum([k[r] * w for w, k in used]) for r, row in enumerate(rows)]


def stage_times(nodes: Sequence[float], t: Tensor, t1: Tensor, dt: Tensor) -> Tensor:
    """The times [s] of these nodes in the step from t to t1 = t + dt."""
    # The node 1 is t1 itself, so that no rounding takes the field outside the interval. Numbers, not a tensor of the
    # nodes: torch.export stores no program that holds a tensor's values.
    return torch.stack([t1 if c == 1.0 else t + c * dt for c in nodes])


def all_stages(
    tableau: Tableau, flow: Flow, t: Tensor, t1: Tensor, dt: Tensor, rows: Rows, first: Rows | None, count: int
) -> tuple[list[Rows], list[Tensor]]:
    """The first `count` stages of the step from t to t1 = t + dt, those for dense output included, and the state of the
    last one; `first` is the first stage where it is known."""
    begin = 0 if first is None else 1
    moments = flow.moments(stage_times(tableau.all_c[begin:count], t, t1, dt))
    stages: list[Rows] = [] if first is None else [first]
    state = list(rows)
    for i, moment in enumerate(moments, begin):
        state = combine(rows, dt, stages, tableau.all_a[i])
        stages.append(flow.slopes(moment, state))
    return stages, state


def error_norm(
    tableau: Tableau,
    dt: Tensor,
    rows: Rows,
    new: Rows,
    stages: Sequence[Rows],
    rtol: Tensor | float,
    atol: Tensor | float,
) -> Tensor:
    """As `stepping.explicit_rk.error_norm`, 0-d float64."""
    zeros = [torch.zeros_like(row) for row in rows]
    sizes = [torch.maximum(old.abs(), end.abs()) for old, end in zip(rows, new, strict=True)]
    squares = [scaled_squares(combine(zeros, dt, stages, row), sizes, rtol, atol) for row in tableau.error]
    count = sum(row.numel() for row in rows)
    if len(squares) == 1:
        return torch.sqrt(squares[0] / count)
    fifth, third = squares
    damped = torch.where(fifth == 0, fifth, fifth * torch.sqrt(1 / (count * (fifth + 0.01 * third))))
    return torch.where(torch.isfinite(third), damped, third)


def scaled_squares(values: Rows, sizes: Rows, rtol: Tensor | float, atol: Tensor | float) -> Tensor:
    """Σ (value / (atol + rtol size))² over all rows, accumulated in at least float32, 0-d float64."""
    total = None
    for value, size in zip(values, sizes, strict=True):
        wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        scale = atol + rtol * size.to(wide)
        if not isinstance(atol, Tensor) and atol == 0:
            scale = scale.clamp_min(torch.finfo(wide).tiny)  # 0 / 0 is no error
        square = torch.square(value.to(wide) / scale).sum().to(torch.float64)
        total = square if total is None else total + square
    assert total is not None
    return total


def dense_output(tableau: Tableau, dt: Tensor, rows: Rows, stages: Sequence[Rows], theta: Tensor) -> list[Tensor]:
    """The states at the fractions `theta`, [n] float64, of the step: [n, *shape] each."""
    used = [i for i, polynomial in enumerate(tableau.interpolant) if any(polynomial)]
    weights = {i: dt * _polynomial(tableau.interpolant[i], theta) for i in used}
    found = []
    for r, row in enumerate(rows):
        shape = (-1,) + (1,) * row.ndim
        found.append(row + _sum([weights[i].to(row.dtype).view(shape) * stages[i][r] for i in used]))
    return found


def _polynomial(coefficients: Sequence[float], theta: Tensor) -> Tensor:
    """Σ_j coefficients_j θ^(j+1), shape of `theta`."""
    value = torch.zeros_like(theta)
    for c in reversed(coefficients):
        value = (value + c) * theta
    return value


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
