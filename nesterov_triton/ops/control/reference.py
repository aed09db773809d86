"""Torch reference of the on-device control: no value is looked at from Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.ops import dispatch
from nesterov_triton.ops.control import (
    INFINITE,
    MAX_STEPS,
    NON_FINITE,
    RUNNING,
    SLOTS,
    SPANS,
    STEP_UNDERFLOW,
    Law,
    Setting,
    Slot,
)


def begin(
    decided: Tensor,
    attempt: Tensor,
    setting: Tensor,
    nodes: Tensor,
    times: Tensor,
    coefficients: Tensor,
    dt: Tensor,
    adaptive: bool,
    law: Law | None,
) -> None:
    """See `ops.control.begin`."""
    c, s = decided.unbind(0), setting.unbind(0)
    t, planned, status = c[Slot.T], c[Slot.DT], c[Slot.STATUS]
    goal, attempted = s[Setting.END], c[Slot.ACCEPTED] + c[Slot.REJECTED]
    active = (status == RUNNING) & (t != goal) & (c[Slot.TAPED] < s[Setting.CAPACITY])
    if adaptive:
        after_rejection = c[Slot.AFTER_REJECTION] != 0
        # A last step up to 1 % longer than planned rather than a sliver after it, but not after a rejection.
        stretch = torch.where(after_rejection, 1.0, 1.01)
        last = stretch * planned.abs() >= (goal - t).abs()
        t1 = torch.where(last, goal, t + planned)
        last = t1 == goal
        size = t.abs()
        grain = torch.nextafter(size, torch.full_like(size, math.inf)) - size
        stuck = ((t1 - t).abs() <= 4 * grain) & (~last | after_rejection)
        why = torch.where(c[Slot.FINITE] != 0, STEP_UNDERFLOW, NON_FINITE)
        failed = torch.where(attempted >= s[Setting.MAX_STEPS], MAX_STEPS, torch.where(stuck, why, RUNNING))
        status = torch.where(active, failed, status)
        active = active & (status == RUNNING)
    else:
        number = c[Slot.ACCEPTED] + 1
        last = number >= s[Setting.COUNT]
        t1 = torch.where(last, goal, s[Setting.START] + number * s[Setting.STEP_SIZE])
    h = t1 - t
    attempt.copy_(decided)
    attempt[Slot.STATUS].copy_(status)
    for slot, value in ((Slot.T1, t1), (Slot.H, h), (Slot.LAST, last), (Slot.ACTIVE, active)):
        attempt[slot].copy_(value)
    at = torch.where(nodes == 1, t1, t + nodes * h)
    times.copy_(at)
    dt.copy_(h)
    if law is not None:
        coefficients.copy_(factors(at, law, s[Setting.DAMPING], s[Setting.XI]))


def factors(t: Tensor, law: Law, damping: Tensor, xi: Tensor) -> Tensor:
    """Rows (κ, s, q, -γ) at the times `t`, [s] float64: [s, 4]."""
    scale = law.gate(t ** (-0.5 * law.factor) * torch.exp(0.5 * t)) if law.nesterov else torch.ones_like(t)
    drive = law.sign / scale if law.exact else torch.full_like(t, law.sign)
    q = -xi * scale
    if law.exact:
        q = q + (law.curvature / (t * t) - 0.25)
    return torch.stack((scale, drive, q, -damping * torch.ones_like(t)), dim=1)


def weigh(
    attempt: Tensor,
    error: Tensor,
    requested: Tensor,
    weights: Tensor,
    span: Tensor,
    interpolant: Sequence[Sequence[float]],
) -> None:
    """See `ops.control.weigh`."""
    a = attempt.unbind(0)
    theta = (requested - a[Slot.T]) / a[Slot.H]
    polynomials = torch.tensor(interpolant, dtype=torch.float64, device=attempt.device)
    powers = torch.arange(1, polynomials.shape[1] + 1, dtype=torch.float64, device=attempt.device)
    weights.copy_((theta[:, None] ** powers) @ polynomials.T)
    ok = (a[Slot.ACTIVE] != 0) & (error <= 1)
    span[0].copy_(a[Slot.OUTPUT])
    span[1].copy_(torch.where(ok, _passed(requested, a[Slot.T1], a[Slot.H]) - a[Slot.OUTPUT], 0))


def _passed(requested: Tensor, t1: Tensor, h: Tensor) -> Tensor:
    """How many of the times lie up to t1."""
    return (torch.sign(h) * (requested - t1) <= 0).sum()


def end(
    attempt: Tensor,
    decided: Tensor,
    setting: Tensor,
    error: Tensor,
    requested: Tensor | None,
    kept: Sequence[Tensor],
    new: Sequence[Tensor],
    states: int,
    tape: Tensor | None,
    report: Tensor,
    adaptive: bool,
) -> None:
    """See `ops.control.end`."""
    a, s = attempt.unbind(0), setting.unbind(0)
    active, t1, h = a[Slot.ACTIVE] != 0, a[Slot.T1], a[Slot.H]
    finite = torch.isfinite(error)
    ok = active & (error <= 1)
    rejected = active & ~ok
    after = list(a)
    if adaptive:
        after_rejection = a[Slot.AFTER_REJECTION] != 0
        factor = _factor(s, error, a[Slot.PREVIOUS], after_rejection)
        dt = h * factor
        # The step that ended here was cut short: what it was planned to be says more of the next interval.
        longest = torch.sign(h) * torch.maximum(dt.abs(), a[Slot.DT].abs())
        dt = torch.where(ok & (a[Slot.LAST] != 0), longest, dt)
        after[Slot.DT] = torch.where(active, dt, a[Slot.DT])
        after[Slot.PREVIOUS] = torch.where(ok, error.clamp_min(1e-4), a[Slot.PREVIOUS])
        after[Slot.AFTER_REJECTION] = torch.where(active, rejected, after_rejection)
        after[Slot.FINITE] = torch.where(active, ok | finite, a[Slot.FINITE] != 0)
        # A step too long may overflow and is tried again shorter; nothing mends a slope that is not finite.
        bad = rejected & ~finite & (a[Slot.FIRST_FINITE] == 0)
    else:
        bad, rejected = rejected, torch.zeros_like(rejected)
    after[Slot.STATUS] = torch.where(bad, NON_FINITE, a[Slot.STATUS])
    after[Slot.T] = torch.where(ok, t1, a[Slot.T])
    after[Slot.ACCEPTED] = a[Slot.ACCEPTED] + (active & ~rejected)
    after[Slot.REJECTED] = a[Slot.REJECTED] + rejected
    after[Slot.TAPED] = a[Slot.TAPED] + ok
    after[Slot.FIRST_FINITE] = torch.where(ok, 1.0, a[Slot.FIRST_FINITE])
    after[Slot.OK] = ok
    if requested is not None:
        after[Slot.OUTPUT] = torch.where(ok, _passed(requested, t1, h), a[Slot.OUTPUT])
    decided.copy_(torch.stack([x.to(torch.float64) for x in after]))
    report[:SLOTS].copy_(decided)
    fit = torch.stack([torch.isfinite(value).all() for value in new[:states]]).all()
    report[INFINITE].copy_(torch.where(ok & ~fit, 1.0, report[INFINITE]))
    if tape is not None:
        slot = a[Slot.TAPED].to(torch.int64).clamp_max(len(tape) - 1).view(1)
        state, ends = torch.stack(tuple(kept[:states])).unsqueeze(0), torch.stack((a[Slot.T], t1)).unsqueeze(0)
        for memory, value in ((tape, state), (report[SPANS:].view(-1, 2), ends)):
            memory.index_copy_(0, slot, torch.where(ok, value, memory.index_select(0, slot)))
    for row, value in zip(kept, new, strict=True):
        row.copy_(torch.where(ok, value, row))


def _factor(s: Sequence[Tensor], error: Tensor, previous: Tensor, after_rejection: Tensor) -> Tensor:
    """`Integral.factor`."""
    accepted = error <= 1
    highest = torch.where(after_rejection | ~accepted, 1.0, s[Setting.MAX_FACTOR])
    smooth = error ** (-s[Setting.ALPHA]) * previous ** s[Setting.BETA]
    wanted = s[Setting.SAFETY] * torch.where(accepted, smooth, error ** (-s[Setting.PLAIN]))
    factor = torch.minimum(torch.maximum(wanted, s[Setting.MIN_FACTOR]), highest)
    factor = torch.where(error == 0, highest, factor)
    return torch.where(torch.isfinite(error), factor, s[Setting.MIN_FACTOR])


def add_accepted(
    decided: Tensor, attempt: Tensor, total: Tensor, step: Tensor, kept: Tensor | None, new: Tensor | None
) -> None:
    """See `ops.control.add_accepted`."""
    ok = decided[Slot.OK] != 0
    total.copy_(torch.where(ok, total - attempt[Slot.H].to(total.dtype) * step, total))
    if kept is not None and new is not None:
        kept.copy_(torch.where(ok, new, kept))


def propose(
    decided: Tensor, trial: Tensor, setting: Tensor, z: Tensor, slope: Tensor, sizes: Tensor, choose: bool
) -> None:
    """See `ops.control.propose`."""
    fit = torch.isfinite(slope).all()
    decided[Slot.FIRST_FINITE].copy_(fit)
    if not choose:
        return
    decided[Slot.STATUS].copy_(torch.where(fit, RUNNING, NON_FINITE))
    t, goal = decided[Slot.T], setting[Setting.END]
    d0, d1 = _norm(z, z, setting), _norm(slope, z, setting)
    span = (goal - t).abs()
    known = torch.isfinite(d0) & torch.isfinite(d1)
    small = ~known | (d0 < 1e-5) | (d1 < 1e-5)
    guess = torch.where(small, 1e-6, 0.01 * d0 / d1)
    h0 = torch.minimum(guess, span)
    sizes.copy_(torch.stack((h0, guess, d1)))
    trial.copy_(decided)
    trial[Slot.T].copy_(torch.where(h0 < span, t + torch.sign(goal - t) * h0, goal))


def extrapolate(decided: Tensor, setting: Tensor, z: Tensor, slope: Tensor, sizes: Tensor, out: Tensor) -> None:
    """See `ops.control.extrapolate`."""
    wide = dispatch.wide(z.dtype)
    h0 = torch.sign(setting[Setting.END] - decided[Slot.T]) * sizes[0]
    out.copy_(z.to(wide) + h0.to(wide) * slope.to(wide))


def choose(decided: Tensor, setting: Tensor, z: Tensor, slope: Tensor, second: Tensor, sizes: Tensor) -> None:
    """See `ops.control.choose`."""
    distance = setting[Setting.END] - decided[Slot.T]
    h0, guess, d1 = sizes.unbind(0)
    wide = dispatch.wide(z.dtype)
    d2 = _norm(second.to(wide) - slope.to(wide), z, setting) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** setting[Setting.PLAIN])
    known = torch.isfinite(d1) & torch.isfinite(d2)
    decided[Slot.DT].copy_(torch.sign(distance) * torch.where(known, torch.minimum(100 * guess, h1), h0))


def _norm(values: Tensor, z: Tensor, setting: Tensor) -> Tensor:
    """Of values, [D], relative to the tolerance at z; 0-d float64."""
    wide = dispatch.wide(z.dtype)
    scale = setting[Setting.ATOL].to(wide) + setting[Setting.RTOL].to(wide) * z.abs().to(wide)
    squares = torch.square(values.to(wide) / scale.clamp_min(torch.finfo(wide).tiny))
    return torch.sqrt(squares.sum(dtype=torch.float64) / max(values.numel(), 1))
