"""One Runge-Kutta step on a list of rows: stages, end, error, dense output. Tableaus are constants of the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.compiled import nystrom
from nesterov_triton.compiled.system import Moment
from nesterov_triton.methods import Method
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.tableaus import Tableau

Rows = Sequence[Tensor]


class Flow(NamedTuple):
    """A right-hand side: its value at a moment and a state, and the moments of times [s], float64."""

    slopes: Callable[[Moment, Rows], Rows]
    moments: Callable[[Tensor], list[Moment]]
    parts: nystrom.Parts | None = None  # of a momentum system, for the methods that need them

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


class Attempt(NamedTuple):
    """A step that was tried: its stages, the state at its end, and what estimates its error."""

    stages: Sequence[Rows]
    new: Rows
    errors: Sequence[Rows]


def nodes(method: Method, dense: bool) -> tuple[float, ...]:
    """Those of the stages of a step; with those that only dense output needs."""
    return method.all_c if dense else method.c


def stages_back(method: Method, dense: bool) -> int:
    """How many stages the state at a step's end (and those inside) depends on: not on an FSAL stage without weight."""
    return len(nodes(method, dense)) - (not dense and method.b[-1] == 0)


def kept(method: Method, flow: Flow, rows: Rows, slope: Rows) -> list[Tensor]:
    """The first stage of a step, from the right-hand side at its start."""
    if not isinstance(method, Nystrom):
        return list(slope)
    assert flow.parts is not None
    return flow.parts.forces_of(rows, slope)


def attempt(
    method: Method,
    flow: Flow,
    t: Tensor,
    t1: Tensor,
    dt: Tensor,
    rows: Rows,
    first: Rows | None,
    dense: bool,
    count: int | None = None,
) -> Attempt:
    """The step from t to t1 = t + dt.

    Args:
        first: its first stage where that is known.
        dense: whether stages are evaluated that only dense output needs.
        count: of a Runge-Kutta method's stages, where not all of them are evaluated; then there are no errors.
    """
    if isinstance(method, Nystrom):
        assert flow.parts is not None
        moments = flow.moments(stage_times(method.c[0 if first is None else 1 :], t, t1, dt))
        if flow.parts.back is not None:
            stages, new, error = nystrom.adjoint_attempt(method, flow.parts, moments, dt, rows, first)
            return Attempt(stages, new, [error])
        forces, new, error = nystrom.attempt(method, flow.parts, moments, dt, rows, None if first is None else first[0])
        return Attempt(forces, new, [error])
    whole = len(nodes(method, dense))
    stages, reached = all_stages(method, flow, t, t1, dt, rows, first, whole if count is None else count)
    own = stages[: method.stages]
    if count is not None:
        return Attempt(stages, combine(rows, dt, own, method.b), [])
    new = reached if method.fsal and whole == method.stages else combine(rows, dt, own, method.b)
    zeros = [torch.zeros_like(row) for row in rows]
    return Attempt(stages, new, [combine(zeros, dt, own, row) for row in method.error])


def inside(method: Method, flow: Flow, dt: Tensor, rows: Rows, tried: Attempt, theta: Tensor) -> list[Tensor]:
    """The states at the fractions `theta`, [n] float64, of the step: [n, *shape] each."""
    if not isinstance(method, Nystrom):
        return dense_output(method, dt, rows, tried.stages, theta)
    assert flow.parts is not None
    first, last = tried.stages[0][0], tried.stages[-1][0]
    return nystrom.dense_output(flow.parts, dt, rows, tried.new, first, last, theta)


def error_norm(
    errors: Sequence[Rows],
    rows: Rows,
    new: Rows,
    rtol: Tensor | float,
    atol: Tensor | float,
) -> Tensor:
    """As `stepping.explicit_rk.error_norm`, 0-d float64."""
    sizes = [torch.maximum(old.abs(), end.abs()) for old, end in zip(rows, new, strict=True)]
    squares = [scaled_squares(error, sizes, rtol, atol) for error in errors]
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
