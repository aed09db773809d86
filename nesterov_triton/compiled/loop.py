"""The loop over attempted steps: `stepping.loop`, with tensors for decisions.

One body serves forward and adjoint solves, adaptive and fixed steps. What it carries from attempt to attempt is one
flat tuple of tensors, since a `while_loop` knows nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from nesterov_triton.compiled.step import Attempt, Flow, Rows, attempt, combine, error_norm, kept
from nesterov_triton.compiled.step import inside as states_inside
from nesterov_triton.compiled.step import scaled_squares as scaled
from nesterov_triton.methods import Method
from nesterov_triton.ops.control import MAX_STEPS, NON_FINITE, RUNNING, STEP_UNDERFLOW
from nesterov_triton.stepping.controllers import Integral
from nesterov_triton.stepping.loop import LoopOptions


@dataclass(frozen=True)
class Plan:
    """A method and its settings. rtol and atol are numbers, or tensors that broadcast with h; fixed steps use none."""

    tableau: Method
    rtol: Tensor | float
    atol: Tensor | float
    options: LoopOptions

    @property
    def adaptive(self) -> bool:
        """Whether the error decides about steps."""
        return self.tableau.adaptive and self.options.step_size is None


class Control(NamedTuple):
    """What decides, 0-d each."""

    t: Tensor  # float64
    dt: Tensor  # the step to try next, float64
    previous: Tensor  # error of the last accepted step, float64
    after_rejection: Tensor  # bool
    finite: Tensor  # whether the last attempt's error was, bool
    status: Tensor  # int64
    accepted: Tensor  # int64
    rejected: Tensor  # int64


class Walk(NamedTuple):
    """What a loop leaves behind."""

    control: Control
    rows: list[Tensor]
    outputs: list[Tensor]  # at the requested times inside, [n, *shape] each; none where they are not asked for
    quadratures: list[Tensor]  # the integrals of what the slopes have beyond the rows
    # With `keep`: t, accepted, and the rows after every attempt, [attempts, ...] each. With `every`: when the steps of
    # each stretch started, [stretches, every] float64, and the rows after each, [stretches, ...].
    taken: tuple[Tensor, ...]


def start(
    plan: Plan, flow: Flow, t: Tensor, end: Tensor, rows: Rows, dt: Tensor | None = None
) -> tuple[Control, list[Tensor], int]:
    """The control before the first step, its first stage if that is carried from step to step, and how many evaluations
    that took; `dt` is the step to try first, if it is known."""
    options, fsal = plan.options, plan.tableau.fsal
    chosen = plan.adaptive and dt is None and options.first_step is None
    first = flow.at(t, rows) if fsal or chosen else []
    sign = torch.sign(end - t)
    if not plan.adaptive:
        assert options.step_size is not None
        dt = sign * options.step_size
    elif dt is not None:
        pass
    elif options.first_step is not None:
        dt = sign * options.first_step
    else:
        dt = sign * _initial_step(plan, flow, t, end, rows, first)
    return _control(t, dt), kept(plan.tableau, flow, rows, first) if fsal else [], (1 if first else 0) + chosen


def _control(t: Tensor, dt: Tensor) -> Control:
    def of(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((), value, dtype=dtype, device=t.device)

    no, yes = (of(x, torch.bool) for x in (0, 1))
    zero = [of(0, torch.int64) for _ in range(3)]
    return Control(t.clone(), dt.clone(), of(1.0, torch.float64), no, yes, *zero)


def walk(
    plan: Plan,
    flow: Flow,
    control: Control,
    first: Rows,
    rows: Rows,
    t0: Tensor,
    end: Tensor,
    times: Tensor | None = None,
    quadratures: Rows = (),
    keep: bool = False,
    every: int | None = None,
) -> Walk:
    """Steps from the control's time to `end`.

    Args:
        flow: may give more than the rows' slopes: of the rest only the integrals over the accepted steps are formed.
        t0: where the solve started, for the grid of fixed steps.
        quadratures: what these integrals are added to.
        times: requested times inside, [n] float64: their states come from dense output.
        keep: whether every attempt's state is to be kept.
        every: one state in so many accepted steps is to be kept; a stretch is so many steps.
    """
    tableau, count = plan.tableau, len(rows)
    kept_first = len(first) if tableau.fsal else 0
    held = [] if times is None else [row.new_zeros((len(times), *row.shape)) for row in rows]
    sizes = (8, count, kept_first, len(quadratures), len(held))

    def condition(*carried: Tensor) -> Tensor:
        c = Control(*carried[:8])
        return (c.t != end) & (c.status == RUNNING)

    def body(*carried: Tensor) -> tuple[Tensor, ...]:
        control, state, known, sums, outputs = _split(carried, sizes)
        c = Control(*control)
        target, last, stuck = _target(plan, c, t0, end)
        # On a CPU Inductor keeps what is stacked in memory; it takes no part of it for the result of a loop in a loop.
        t, t1, dt = torch.stack((c.t, target, target - c.t)).unbind()
        tried = attempt(tableau, flow, t, t1, dt, state, known if kept_first else None, times is not None)
        own, new = tried.stages[: tableau.stages], tried.new
        c1, ok = _decide(plan, c, target, last, stuck, state, tried)

        def chosen(a: Rows, b: Rows) -> list[Tensor]:
            return [torch.where(ok, x, y) for x, y in zip(a, b, strict=True)]

        following = chosen(own[-1], own[0]) if kept_first else []
        integrands = [k[len(k) - len(sums) :] for k in own]
        totals = chosen(combine(sums, dt, integrands, tableau.b), sums) if sums else []
        if times is not None:
            inside = ok & within(times, t, t1)
            found = states_inside(tableau, flow, dt, state, tried, (times - t) / dt)
            outputs = select(inside, found, outputs)
        # A loop's results must not be its arguments.
        return (*(x.clone() for x in c1), *chosen(new, state), *following, *totals, *outputs)

    def stretch(known: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        def within_stretch(n: Tensor, starts: Tensor, *carried: Tensor) -> Tensor:
            return condition(*carried) & (n < len(starts))

        def noted(n: Tensor, starts: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            before, after = Control(*carried[:8]), body(*carried)
            ok = Control(*after[:8]).accepted - before.accepted
            here = (torch.arange(len(starts), device=starts.device) == n) & (ok == 1)
            return (n + ok, torch.where(here, before.t, starts), *after)

        begin = (torch.zeros_like(carried[6]), torch.zeros_like(known), *(x.clone() for x in carried))
        _, starts, *after = while_loop(within_stretch, noted, begin)  # type: ignore[no-untyped-call]
        return (starts, *after)

    carried = (*control, *(x.clone() for x in (*rows, *first[:kept_first], *quadratures)), *held)
    stacked = torch.ops.higher_order.while_loop_stack_output
    if keep:
        taken = stacked(condition, body, carried, ())
        done = [x[-1] for x in taken]
        kept = (taken[0], taken[6], *taken[8 : 8 + count])
    elif every is not None:
        starts = control.t.new_zeros(min(every, plan.options.max_steps))
        starts, *taken = stacked(lambda _, *carried: condition(*carried), stretch, (starts, *carried), ())
        done = [x[-1] for x in taken]
        kept = (starts, *taken[8 : 8 + count])
    else:
        done, kept = list(while_loop(condition, body, carried)), ()  # type: ignore[no-untyped-call]
    ended, ends, _, totals, outputs = _split([x.clone() for x in done], sizes)
    return Walk(Control(*ended), ends, outputs, totals, kept)


def select(mask: Tensor, a: Rows, b: Rows) -> list[Tensor]:
    """Of rows [n, *shape] those of `a` where the mask, [n], is set, else those of `b`."""
    return [torch.where(mask.view(-1, *(1,) * (x.ndim - 1)), x, y) for x, y in zip(a, b, strict=True)]


def _split(carried: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Cut into lists of these lengths."""
    rest, parts = list(carried), []
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


def within(times: Tensor, t: Tensor, t1: Tensor) -> Tensor:
    """Which times lie in (t, t1], whatever the direction; [n] bool."""
    sign = torch.sign(t1 - t)
    return (sign * (times - t) > 0) & (sign * (times - t1) <= 0)


def _target(plan: Plan, c: Control, t0: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the next step ends, whether that is the end, and whether it is too short to take."""
    if not plan.adaptive:
        size = plan.options.step_size
        assert size is not None
        count = torch.ceil((end - t0).abs() / size * (1 - 1e-12)).clamp_min(1)
        number = (c.accepted + 1).to(torch.float64)
        last = number >= count
        return torch.where(last, end, t0 + number * c.dt), last, torch.zeros_like(last)
    # A last step up to 1 % longer than planned rather than a sliver after it, but not after a rejection.
    stretch = torch.where(c.after_rejection, 1.0, 1.01)
    last = stretch * c.dt.abs() >= (end - c.t).abs()
    t1 = torch.where(last, end, c.t + c.dt)
    t = c.t.abs()
    grain = torch.nextafter(t, torch.full_like(t, math.inf)) - t
    return t1, last, ((t1 - c.t).abs() <= 4 * grain) & (~last | c.after_rejection)


def _decide(
    plan: Plan,
    c: Control,
    t1: Tensor,
    last: Tensor,
    stuck: Tensor,
    state: Rows,
    tried: Attempt,
) -> tuple[Control, Tensor]:
    """The control after an attempt, and whether it was accepted."""
    one, new, stages = torch.ones_like(c.accepted), tried.new, tried.stages
    if not plan.adaptive:
        fit = _finite(new) | ~last
        status = torch.where(fit, RUNNING, NON_FINITE)
        status = torch.where((c.accepted + 1 >= plan.options.max_steps) & ~last, MAX_STEPS, status)
        yes = torch.ones_like(last)
        return c._replace(t=t1, status=status.to(torch.int64), accepted=c.accepted + one), yes
    error = error_norm(tried.errors, state, new, plan.rtol, plan.atol)
    finite = torch.isfinite(error)
    ok = (error <= 1) & ~stuck
    factor = _factor(plan.options.controller, error, c.previous, plan.tableau.error_order + 1, c.after_rejection)
    attempted = c.accepted + c.rejected + 1
    done = ok & last
    # In the order in which the eager loop would come upon them.
    status = torch.where((attempted >= plan.options.max_steps) & ~done, MAX_STEPS, RUNNING)
    status = torch.where(~finite & ~_finite(stages[0]), NON_FINITE, status)
    status = torch.where(done & ~_finite(new), NON_FINITE, status)
    status = torch.where(stuck, torch.where(c.finite, STEP_UNDERFLOW, NON_FINITE), status)
    dt = (t1 - c.t) * factor
    # The step that ended here was cut short: what it was planned to be says more of the next interval.
    dt = torch.where(done, torch.sign(dt) * torch.maximum(dt.abs(), c.dt.abs()), dt)
    after = Control(
        t=torch.where(ok, t1, c.t),
        dt=dt,
        previous=torch.where(ok, error.clamp_min(1e-4), c.previous),
        after_rejection=~ok,
        finite=ok | finite,
        status=status.to(torch.int64),
        accepted=c.accepted + ok.to(torch.int64),
        rejected=c.rejected + (~ok & ~stuck).to(torch.int64),
    )
    return after, ok


def _factor(controller: Integral, error: Tensor, previous: Tensor, q: int, after_rejection: Tensor) -> Tensor:
    """`controller.factor` on tensors."""
    alpha, beta = controller.exponents(q)
    accepted = error <= 1
    highest = torch.where(after_rejection | ~accepted, 1.0, controller.max_factor)
    smooth = controller.safety * error ** (-alpha) * previous**beta
    plain = controller.safety * error ** (-1 / q)
    wanted = torch.where(accepted, smooth, plain)
    factor = torch.minimum(wanted.clamp_min(controller.min_factor), highest)
    factor = torch.where(error == 0, highest, factor)
    return torch.where(torch.isfinite(error), factor, controller.min_factor)


def _finite(rows: Rows) -> Tensor:
    fit = torch.isfinite(rows[0]).all()
    for row in rows[1:]:
        fit = fit & torch.isfinite(row).all()
    return fit


def _initial_step(plan: Plan, flow: Flow, t: Tensor, end: Tensor, rows: Rows, first: Rows) -> Tensor:
    """As `stepping.initial_step`, 0-d float64."""
    count = sum(row.numel() for row in rows)
    sizes = [row.abs() for row in rows]

    def norm(values: Rows) -> Tensor:
        return torch.sqrt(scaled(values, sizes, plan.rtol, plan.atol) / count)

    span = (end - t).abs()
    sign = torch.sign(end - t)
    n = len(rows)  # the rest are quadratures'
    d0, d1 = norm(rows), norm(first[:n])
    known = torch.isfinite(d0) & torch.isfinite(d1)
    small = ~known | (d0 < 1e-5) | (d1 < 1e-5)
    guess = torch.where(small, torch.full_like(d0, 1e-6), 0.01 * d0 / d1)
    h0 = torch.minimum(guess, span)
    trial = combine(rows, sign * h0, [first], (1.0,))
    second = flow.at(torch.where(h0 < span, t + sign * h0, end), trial)
    d2 = norm([b - a for a, b in zip(first[:n], second[:n], strict=True)]) / h0
    slope = torch.maximum(d1, d2)
    order = plan.tableau.error_order + 1
    h1 = torch.where(slope <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / slope) ** (1 / order))
    return torch.where(torch.isfinite(d2) & torch.isfinite(d1), torch.minimum(100 * guess, h1), h0)
