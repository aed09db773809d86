"""One Runge-Kutta step on a list of rows: stages, end, error, dense output. Tableaus are constants of the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nesterov_triton.tableaus import Tableau

Rows = Sequence[Tensor]
Slopes = Callable[[Tensor, Rows], Rows]


def combine(rows: Rows, dt: Tensor, stages: Sequence[Rows], weights: Sequence[float]) -> list[Tensor]:
    """rows + dt Σ_j weights_j k_j, for stages k_j; `dt` 0-d, in any dtype."""
    used = [(w, k) for w, k in zip(weights, stages, strict=False) if w != 0]
    if not used:
        return list(rows)
    step = dt.to(rows[0].dtype)
    return [row + step * _sum([k[r] * w for w, k in used]) for r, row in enumerate(rows)]


def all_stages(
    tableau: Tableau, slopes: Slopes, t: Tensor, t1: Tensor, rows: Rows, first: Rows | None, count: int
) -> tuple[list[Rows], list[Tensor]]:
    """The first `count` stages, those for dense output included, and the state of the last one; `first` is the first
    stage where it is known."""
    dt = t1 - t
    stages: list[Rows] = [slopes(t, rows) if first is None else first]
    state = list(rows)
    for i in range(1, count):
        c = tableau.all_c[i]
        state = combine(rows, dt, stages, tableau.all_a[i])
        # The node 1 is t1 itself, so that no rounding takes the field outside the interval.
        stages.append(slopes(t1 if c == 1.0 else t + c * dt, state))
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
    polynomials = torch.tensor(tableau.interpolant, dtype=torch.float64, device=theta.device)
    powers = torch.arange(1, polynomials.shape[1] + 1, dtype=torch.float64, device=theta.device)
    weights = dt * ((theta[:, None] ** powers) @ polynomials.T)  # [n, stages]
    found = []
    for r, row in enumerate(rows):
        shape = (-1,) + (1,) * row.ndim
        used = [i for i, p in enumerate(tableau.interpolant) if any(p)]
        found.append(row + _sum([weights[:, i].to(row.dtype).view(shape) * stages[i][r] for i in used]))
    return found


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
