"""Adaptive steps for each row of a batch by itself: its own times, its own error, its own step sizes.

All rows are evaluated together, each at its own time; one that has arrived waits, with steps of size 0. Everything but
the right-hand side works row by row and element by element, so that a row takes the same steps whatever the others do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nesterov_triton.status import SolveError, Status
from nesterov_triton.stepping.controllers import Integral
from nesterov_triton.stepping.dense_output import DenseOutput, dense_output
from nesterov_triton.stepping.loop import LoopOptions
from nesterov_triton.tableaus import Tableau

RightHandSide = Callable[[Tensor, Tensor], Tensor]  # times [B] float64 and states [B, D] to slopes [B, D]
# An error and the states that it lies between, [B, D] each, to sizes, [B] float64: at most 1 where it is small enough.
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Walk:
    """The steps of all rows.

    Attributes:
        starts, sizes: of the accepted steps, a list of float64 numbers for each row.
        accepted, rejected: over all rows.
    """

    starts: list[list[float]]
    sizes: list[list[float]] = field(default_factory=list)
    accepted: int = 0
    rejected: int = 0


def integrate(
    f: RightHandSide,
    tableau: Tableau,
    y: Tensor,
    times: Sequence[float],
    measure: Measure,
    options: LoopOptions,
) -> tuple[list[Tensor], Walk]:
    """The states, [B, D] each, at times[1:], from `y` at times[0], and the steps that led there.

    Args:
        measure: the error over the tolerance, row by row.
        options: max_steps counts each row's attempts.

    Raises:
        SolveError: a row did not reach the last time; the message says which.
    """
    batch, sign = len(y), math.copysign(1.0, times[-1] - times[0])
    t = torch.full((batch,), times[0], dtype=torch.float64, device=y.device)
    end = times[-1]
    slope = f(t, y)
    dt = _first_sizes(f, tableau, y, slope, t, end, measure, options)
    q, dense = tableau.error_order + 1, dense_output(tableau)
    found = [torch.empty_like(y) for _ in times[1:]]
    after_rejection = torch.zeros(batch, dtype=torch.bool, device=y.device)
    attempts = torch.zeros(batch, dtype=torch.int64, device=y.device)
    log: list[tuple[Tensor, Tensor, Tensor]] = []
    active = torch.ones_like(after_rejection)

    def fail(status: Status, rows: Tensor) -> SolveError:
        row = int(rows.nonzero()[0])
        return SolveError(status, float(t[row]), float(dt[row]), int(attempts[row]), where=f"solve of row {row}")

    while batch and bool(active.any()):
        size = dt.clamp(options.min_step, options.max_step)
        stretched = torch.where(after_rejection | (size == options.max_step), size, 1.01 * size)
        last = stretched >= (end - t).abs()
        t1 = torch.where(last, torch.full_like(t, end), t + sign * size)
        t1 = torch.where(active, t1, t)
        h = t1 - t
        short = active & (h.abs() <= 4 * torch.finfo(t.dtype).eps * t.abs()) & (~last | after_rejection)
        over = active & (attempts >= options.max_steps)
        if bool((short | over).any()):
            raise fail(Status.MAX_STEPS, over) if bool(over.any()) else fail(Status.STEP_UNDERFLOW, short)
        stages = evaluate(f, tableau, t, h, t1, y, slope)
        y1 = combine(y, stages, tableau.b, h)
        error = combine(torch.zeros_like(y), stages, tableau.error[0], h)
        norm = measure(error, y, y1)
        good = active & ((norm <= 1) | ((size <= options.min_step) & norm.isfinite()))
        bad = active & ~good
        dead = bad & ~norm.isfinite() & ((size <= options.min_step) | ~slope.isfinite().all(1))
        dead |= good & last & ~y1.isfinite().all(1)
        if bool(dead.any()):
            raise fail(Status.NON_FINITE, dead)
        attempts += active
        log.append((good, t, h))
        for k, time in enumerate(times[1:]):
            inside = good & (sign * (time - t) > 0) & (sign * (t1 - time) >= 0)
            if bool(inside.any()):
                at = y1 if time == end else inside_step(dense, stages, y, t, h, time)
                found[k] = torch.where(inside[:, None], at, found[k])
        factor = _factors(options.controller, norm, q)
        dt = torch.where(active, h.abs() * factor, dt)
        kept = good[:, None]
        y = torch.where(kept, y1, y)
        if tableau.fsal:
            slope = torch.where(kept, stages[-1], slope)
        t = torch.where(good, t1, t)
        if not tableau.fsal:
            slope = torch.where(kept, f(t, y), slope)
        after_rejection = bad
        active = active & (t != end)
    return found, _walk(log, batch)


def evaluate(
    f: RightHandSide, tableau: Tableau, t: Tensor, h: Tensor, t1: Tensor, y: Tensor, first: Tensor | None = None
) -> list[Tensor]:
    """The stages, [B, D] each, of a step from t to t1 = t + h; `first` is the first one, where it is known."""
    stages = [f(t, y) if first is None else first]
    for i in range(1, tableau.stages):
        time = t1 if tableau.c[i] == 1.0 else t + tableau.c[i] * h
        stages.append(f(time, combine(y, stages, tableau.a[i], h)))
    return stages


def combine(y: Tensor, stages: Sequence[Tensor], weights: Sequence[float] | Tensor, h: Tensor) -> Tensor:
    """y + h Σ w_j k_j, element by element; the weights are numbers, or [s, B]."""
    for k, w in zip(stages, weights, strict=False):
        if isinstance(w, Tensor) or w != 0:
            y = y + (h * w).to(y.dtype)[:, None] * k
    return y


def inside_step(
    dense: DenseOutput, stages: Sequence[Tensor], y: Tensor, t: Tensor, h: Tensor, time: Tensor | float
) -> Tensor:
    """The states, [B, D], of all rows at one time inside of their steps."""
    one = torch.ones_like(h)
    theta = torch.where(h == 0, one, (time - t) / torch.where(h == 0, one, h))
    return combine(y, stages, dense.weights_of(theta.cpu()).to(y.device), h)


def _factors(controller: Integral, norms: Tensor, q: int) -> Tensor:
    """The controller's factor of each row, [B]."""
    found = [controller.factor(x, 1.0, q, False) for x in norms.tolist()]
    return torch.tensor(found, dtype=torch.float64, device=norms.device)


def _first_sizes(
    f: RightHandSide, tableau: Tableau, y: Tensor, slope: Tensor, t: Tensor, end: float, measure: Measure,
    options: LoopOptions,
) -> Tensor:  # fmt: skip
    """Hairer, Nørsett, Wanner II.4, for each row."""
    if options.first_step is not None:
        return torch.full_like(t, options.first_step)
    span = (end - t).abs()
    d0, d1 = measure(y, y, y), measure(slope, y, y)
    tiny = (d0 < 1e-5) | (d1 < 1e-5) | ~d0.isfinite() | ~d1.isfinite()
    h0 = torch.where(tiny, torch.full_like(t, 1e-6), 0.01 * d0 / d1).minimum(span)
    signed = torch.copysign(h0, end - t)
    second = f(torch.where(h0 < span, t + signed, torch.full_like(t, end)), combine(y, [slope], [1.0], signed))
    rate = torch.maximum(d1, measure(second - slope, y, y) / h0)
    h1 = torch.where(rate <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / rate) ** (1 / (tableau.error_order + 1)))
    return torch.where(rate.isfinite(), torch.minimum(100 * h0, h1), h0).minimum(span)


def _walk(log: Sequence[tuple[Tensor, Tensor, Tensor]], batch: int) -> Walk:
    if not log:
        return Walk([[] for _ in range(batch)], [[] for _ in range(batch)])
    good, starts, sizes = (torch.stack(x).cpu() for x in zip(*log, strict=True))
    tried = sizes != 0
    each = [good[:, b] for b in range(batch)]
    return Walk(
        [starts[m, b].tolist() for b, m in enumerate(each)],
        [sizes[m, b].tolist() for b, m in enumerate(each)],
        int(good.sum()),
        int((tried & ~good).sum()),
    )
