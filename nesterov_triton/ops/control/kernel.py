"""Triton kernels of the on-device control: a handful of float64 numbers, and the rows that an accepted step moves.

`end` is one launch for decision and rows. Every program forms the decision for itself, from `attempt`, which nobody
writes meanwhile; the first one leaves it in `decided`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Identity, kernel_form
from nesterov_triton.gates_triton import FORMS
from nesterov_triton.ops import control
from nesterov_triton.ops.control import MAX_STEPS, NON_FINITE, RUNNING, STEP_UNDERFLOW, Law, Setting, Slot
from nesterov_triton.ops.runge_kutta.kernel import CHUNK, launch_shape, positive, start, total, unless_finite


def constants(*members: int) -> list[tl.constexpr]:
    return [tl.constexpr(int(member)) for member in members]


# A kernel sees no enumeration.
T, DT, PREVIOUS, FINITE = constants(Slot.T, Slot.DT, Slot.PREVIOUS, Slot.FINITE)
AFTER_REJECTION, STATUS = constants(Slot.AFTER_REJECTION, Slot.STATUS)
ACCEPTED, REJECTED, OUTPUT, TAPED = constants(Slot.ACCEPTED, Slot.REJECTED, Slot.OUTPUT, Slot.TAPED)
FIRST_FINITE, T1, H, LAST = constants(Slot.FIRST_FINITE, Slot.T1, Slot.H, Slot.LAST)
ACTIVE, OK = constants(Slot.ACTIVE, Slot.OK)
START, END, STEP_SIZE, COUNT = constants(Setting.START, Setting.END, Setting.STEP_SIZE, Setting.COUNT)
LIMIT, SAFETY, CAPACITY = constants(Setting.MAX_STEPS, Setting.SAFETY, Setting.CAPACITY)
MIN_FACTOR, MAX_FACTOR = constants(Setting.MIN_FACTOR, Setting.MAX_FACTOR)
ALPHA, BETA, PLAIN = constants(Setting.ALPHA, Setting.BETA, Setting.PLAIN)
DAMPING, XI = constants(Setting.DAMPING, Setting.XI)
RUNS, TOO_MANY, UNDERFLOW, BAD = (tl.constexpr(float(x)) for x in (RUNNING, MAX_STEPS, STEP_UNDERFLOW, NON_FINITE))
SLOTS, INFINITE, SPANS = constants(control.SLOTS, control.INFINITE, control.SPANS)
RTOL, ATOL = constants(Setting.RTOL, Setting.ATOL)


@triton.jit
def begin_kernel(
    decided_ptr, attempt_ptr, setting_ptr, nodes_ptr, times_ptr, coefficients_ptr, dt_ptr, stages,
    ADAPTIVE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, EXACT: tl.constexpr, SIGN: tl.constexpr,
    gate: tl.constexpr, BOUND: tl.constexpr, FACTOR: tl.constexpr, CURVATURE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program; see `ops.control.begin`. MOMENTUM to CURVATURE: the law."""
    t = tl.load(decided_ptr + T)
    planned = tl.load(decided_ptr + DT)
    status = tl.load(decided_ptr + STATUS)
    goal = tl.load(setting_ptr + END)
    accepted = tl.load(decided_ptr + ACCEPTED)
    active = (status == RUNS) & (t != goal) & (tl.load(decided_ptr + TAPED) < tl.load(setting_ptr + CAPACITY))
    if ADAPTIVE:
        after_rejection = tl.load(decided_ptr + AFTER_REJECTION) != 0
        # A last step up to 1 % longer than planned rather than a sliver after it, but not after a rejection.
        stretched = tl.where(after_rejection, tl.abs(planned), tl.abs(planned) * 1.01)
        last = stretched >= tl.abs(goal - t)
        t1 = tl.where(last, goal, t + planned)
        last = t1 == goal
        size = tl.abs(t)
        grain = (size.to(tl.int64, bitcast=True) + 1).to(tl.float64, bitcast=True) - size
        stuck = (tl.abs(t1 - t) <= 4 * grain) & ((last == 0) | after_rejection)
        zero = t - t  # float64, which the numbers by themselves are not
        why = tl.where(tl.load(decided_ptr + FINITE) != 0, zero + UNDERFLOW, zero + BAD)
        attempted = accepted + tl.load(decided_ptr + REJECTED)
        failed = tl.where(attempted >= tl.load(setting_ptr + LIMIT), TOO_MANY, tl.where(stuck, why, RUNS))
        status = tl.where(active, failed, status)
        active = active & (status == RUNS)
    else:
        number = accepted + 1
        last = number >= tl.load(setting_ptr + COUNT)
        t1 = tl.where(last, goal, tl.load(setting_ptr + START) + number * tl.load(setting_ptr + STEP_SIZE))
    h = t1 - t
    slots = tl.arange(0, SLOTS).to(tl.int64)
    after = tl.load(decided_ptr + slots)
    after = tl.where(slots == STATUS, status, after)
    after = tl.where(slots == T1, t1, after)
    after = tl.where(slots == H, h, after)
    after = tl.where(slots == LAST, last.to(tl.float64), after)
    after = tl.where(slots == ACTIVE, active.to(tl.float64), after)
    tl.store(attempt_ptr + slots, after)

    lanes = tl.arange(0, LANES).to(tl.int64)
    mask = lanes < stages
    node = tl.load(nodes_ptr + lanes, mask=mask, other=0.0)
    at = tl.where(node == 1, t1, t + node * h)
    tl.store(times_ptr + lanes, at, mask=mask)
    tl.store(dt_ptr, h)
    if MOMENTUM:
        one = tl.zeros_like(at) + 1.0
        scale = one
        if NESTEROV:
            safe = tl.where(mask, at, one)
            if FACTOR == 3.0:  # Nesterov's own
                k = tl.exp(0.5 * safe) / (safe * tl.sqrt(safe))
            else:
                k = tl.exp(0.5 * (safe - FACTOR * tl.log(safe)))
            scale = gate(k, BOUND)
        q = -tl.load(setting_ptr + XI) * scale
        drive = one * SIGN
        if EXACT:
            drive = drive / scale
            q += CURVATURE / (at * at) - 0.25
        rows = coefficients_ptr + lanes * 4
        tl.store(rows, scale, mask=mask)
        tl.store(rows + 1, drive, mask=mask)
        tl.store(rows + 2, q, mask=mask)
        tl.store(rows + 3, one * -tl.load(setting_ptr + DAMPING), mask=mask)


def launch_begin(
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
    """As `ops.control.begin`, by the kernel."""
    known = law or Law(False, False, 1.0, Identity())
    form = kernel_form(known.gate)
    if form is None:
        raise ValueError("no Triton form of the gate")
    start(
        begin_kernel, 1, decided, attempt, setting, nodes, times, coefficients, dt, len(nodes),
        adaptive, law is not None, known.nesterov, known.exact, known.sign, FORMS[form[0]], form[1],
        known.factor, known.curvature, max(triton.next_power_of_2(len(nodes)), 2), num_warps=1,
    )  # fmt: skip


@triton.jit
def passed(requested_ptr, count, t1, h, LANES: tl.constexpr):
    """How many of the requested times lie up to t1."""
    lanes = tl.arange(0, LANES).to(tl.int64)
    found = tl.zeros([LANES], tl.int32)
    for first in range(0, count, LANES):
        inside = first + lanes < count
        beyond = tl.load(requested_ptr + first + lanes, mask=inside, other=0.0) - t1
        found += (inside & (tl.where(h < 0, -beyond, beyond) <= 0)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["count"])
def weigh_kernel(
    attempt_ptr, error_ptr, requested_ptr, weights_ptr, span_ptr, count,
    POLYNOMIALS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program; see `ops.control.weigh`. POLYNOMIALS: of the interpolant, a row a stage, without constants."""
    t, h, t1 = tl.load(attempt_ptr + T), tl.load(attempt_ptr + H), tl.load(attempt_ptr + T1)
    ok = (tl.load(attempt_ptr + ACTIVE) != 0) & (tl.load(error_ptr) <= 1)
    first = tl.load(attempt_ptr + OUTPUT).to(tl.int64)
    until = passed(requested_ptr, count, t1, h, LANES).to(tl.int64)
    tl.store(span_ptr, first)
    tl.store(span_ptr + 1, tl.where(ok, until - first, 0))
    lanes = tl.arange(0, LANES).to(tl.int64)
    for offset in range(0, count, LANES):
        mask = offset + lanes < count
        theta = (tl.load(requested_ptr + offset + lanes, mask=mask, other=0.0) - t) / h
        for stage in tl.static_range(len(POLYNOMIALS)):
            value = tl.zeros_like(theta)
            for k in tl.static_range(len(POLYNOMIALS[stage])):
                # Horner's scheme, the highest power first.
                value = theta * (value + POLYNOMIALS[stage][len(POLYNOMIALS[stage]) - 1 - k])
            tl.store(weights_ptr + (offset + lanes) * len(POLYNOMIALS) + stage, value, mask=mask)


def launch_weigh(
    attempt: Tensor,
    error: Tensor,
    requested: Tensor,
    weights: Tensor,
    span: Tensor,
    interpolant: Sequence[Sequence[float]],
) -> None:
    """As `ops.control.weigh`, by the kernel."""
    start(weigh_kernel, 1, attempt, error, requested, weights, span, len(requested), interpolant, 64, num_warps=2)


@triton.jit(do_not_specialize=["count"])
def end_kernel(
    attempt_ptr, decided_ptr, setting_ptr, error_ptr, requested_ptr, kept, new, tape_ptr, report_ptr, n, count,
    STATES: tl.constexpr, ADAPTIVE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the rows, and in the first program the decision; see `ops.control.end`.

    Args:
        kept, new: as tuples of pointers.
        STATES: how many of them are the state's.
    """
    error = tl.load(error_ptr)
    active = tl.load(attempt_ptr + ACTIVE) != 0
    ok = active & (error <= 1)
    taped = tl.load(attempt_ptr + TAPED)
    t, t1, h = tl.load(attempt_ptr + T), tl.load(attempt_ptr + T1), tl.load(attempt_ptr + H)
    if ok:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        infinite = tl.zeros([BLOCK], tl.int32)
        if tape_ptr is not None:
            for j in tl.static_range(STATES):
                place = tape_ptr + (taped.to(tl.int64) * STATES + j) * n
                tl.store(place + offsets, tl.load(kept[j] + offsets, mask=mask), mask=mask)
            # What one thread reads here another one may write over below: loads and stores need not be laid out alike.
            tl.debug_barrier()
        for j in tl.static_range(len(kept)):
            value = tl.load(new[j] + offsets, mask=mask, other=0.0)
            if j < STATES:
                # Widened: the interpreter's arithmetic on bfloat16 is garbage.
                wide = value if value.dtype == tl.float64 else value.to(tl.float32)
                infinite += (wide - wide != 0).to(tl.int32)
            tl.store(kept[j] + offsets, value, mask=mask)
        # Whoever finds one says so, all of them the same.
        if tl.sum(infinite, axis=0) > 0:
            tl.store(report_ptr + INFINITE, 1.0)

    if tl.program_id(0) == 0:
        if tape_ptr is not None:
            ends = report_ptr + SPANS + taped.to(tl.int64) * 2
            tl.store(ends, t, mask=ok)
            tl.store(ends + 1, t1, mask=ok)
        finite = tl.abs(error) < float("inf")
        rejected = active & ((error <= 1) == 0)
        slots = tl.arange(0, SLOTS).to(tl.int64)
        after = tl.load(attempt_ptr + slots)
        status = tl.load(attempt_ptr + STATUS)
        if ADAPTIVE:
            after_rejection = tl.load(attempt_ptr + AFTER_REJECTION) != 0
            previous = tl.load(attempt_ptr + PREVIOUS)
            planned = tl.load(attempt_ptr + DT)
            accepted = error <= 1
            # Powers by logarithms; of an error of 0 or one that is not finite they are not looked at.
            usable = finite & (error > 0)
            log = tl.log(tl.where(usable, error, 1.0))
            smooth = tl.exp(tl.load(setting_ptr + BETA) * tl.log(previous) - tl.load(setting_ptr + ALPHA) * log)
            plain = tl.exp(-tl.load(setting_ptr + PLAIN) * log)
            wanted = tl.load(setting_ptr + SAFETY) * tl.where(accepted, smooth, plain)
            highest = tl.where(after_rejection | (accepted == 0), 1.0, tl.load(setting_ptr + MAX_FACTOR))
            factor = tl.minimum(tl.maximum(wanted, tl.load(setting_ptr + MIN_FACTOR)), highest)
            factor = tl.where(error == 0, highest, factor)
            factor = tl.where(finite, factor, tl.load(setting_ptr + MIN_FACTOR))
            dt = h * factor
            # The step that ended here was cut short: what it was planned to be says more of the next interval.
            cut = ok & (tl.load(attempt_ptr + LAST) != 0) & (tl.abs(planned) > tl.abs(dt))
            dt = tl.where(cut, tl.where(h < 0, -tl.abs(planned), tl.abs(planned)), dt)
            after = tl.where(slots == DT, tl.where(active, dt, planned), after)
            # Not tl.maximum, which would take the number for a float32.
            least = tl.where(error > 1e-4, error, 1e-4)
            after = tl.where(slots == PREVIOUS, tl.where(ok, least, previous), after)
            after_rejection = tl.where(active, rejected, after_rejection).to(tl.float64)
            after = tl.where(slots == AFTER_REJECTION, after_rejection, after)
            was = tl.load(attempt_ptr + FINITE) != 0
            after = tl.where(slots == FINITE, tl.where(active, ok | finite, was).to(tl.float64), after)
            # A step too long may overflow and is tried again shorter; nothing mends a slope that is not finite.
            bad = rejected & (finite == 0) & (tl.load(attempt_ptr + FIRST_FINITE) == 0)
            count_rejected = rejected
        else:
            bad = rejected
            count_rejected = active != active
        after = tl.where(slots == STATUS, tl.where(bad, BAD, status), after)
        after = tl.where(slots == T, tl.where(ok, t1, t), after)
        counted = (active & (count_rejected == 0)).to(tl.float64)
        after = tl.where(slots == ACCEPTED, after + counted, after)
        after = tl.where(slots == REJECTED, after + count_rejected.to(tl.float64), after)
        after = tl.where(slots == TAPED, after + ok.to(tl.float64), after)
        after = tl.where(slots == FIRST_FINITE, tl.where(ok, 1.0, tl.load(attempt_ptr + FIRST_FINITE)), after)
        after = tl.where(slots == OK, ok.to(tl.float64), after)
        if requested_ptr is not None:
            until = passed(requested_ptr, count, t1, h, LANES).to(tl.float64)
            after = tl.where(slots == OUTPUT, tl.where(ok, until, tl.load(attempt_ptr + OUTPUT)), after)
        tl.store(decided_ptr + slots, after)
        tl.store(report_ptr + slots, after)


def launch_end(
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
    """As `ops.control.end`, by the kernel."""
    n = kept[0].numel()
    programs, block, options = launch_shape(n, kept[0].dtype)
    start(
        end_kernel, max(programs, 1), attempt, decided, setting, error, requested, tuple(kept), tuple(new), tape,
        report, n, 0 if requested is None else len(requested), states, adaptive, 64, block, **options,
    )  # fmt: skip


@triton.jit
def add_accepted_kernel(decided_ptr, attempt_ptr, total_ptr, step_ptr, kept_ptr, new_ptr, n, BLOCK: tl.constexpr):
    """One block; see `ops.control.add_accepted`."""
    if tl.load(decided_ptr + OK) != 0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        h = tl.load(attempt_ptr + H).to(total_ptr.dtype.element_ty)
        total = tl.load(total_ptr + offsets, mask=mask) - h * tl.load(step_ptr + offsets, mask=mask)
        tl.store(total_ptr + offsets, total, mask=mask)
        if kept_ptr is not None:
            tl.store(kept_ptr + offsets, tl.load(new_ptr + offsets, mask=mask), mask=mask)


def launch_add_accepted(
    decided: Tensor, attempt: Tensor, total: Tensor, step: Tensor, kept: Tensor | None, new: Tensor | None
) -> None:
    """As `ops.control.add_accepted`, by the kernel."""
    n = total.numel()
    if n:
        programs, block, options = launch_shape(n, total.dtype)
        start(add_accepted_kernel, programs, decided, attempt, total, step, kept, new, n, block, **options)


# -- the first step size -----------------------------------------------------------------------------------------------


@triton.jit
def store_norm(partials_ptr, value, scale, mask):
    """Leave this block's sum of (value / scale)²; float64 at once, as plain torch adds."""
    ratio = value / scale
    tl.store(partials_ptr, tl.sum(tl.where(mask, ratio * ratio, 0.0).to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["blocks"])
def measure_kernel(
    z_ptr, slope_ptr, second_ptr, setting_ptr, partials_ptr, n, blocks, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block's part of the norms of z and of the slope, and whether the slope is finite; or, where there is a second
    slope, of the norm of their difference. partials_ptr: [3, blocks], or [1, blocks], float64."""
    block = tl.program_id(0)
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(DTYPE)
    slope = tl.load(slope_ptr + offsets, mask=mask, other=0.0).to(DTYPE)
    scale = positive(tl.load(setting_ptr + ATOL).to(DTYPE) + tl.load(setting_ptr + RTOL).to(DTYPE) * tl.abs(z))
    if second_ptr is None:
        store_norm(partials_ptr + block, z, scale, mask)
        store_norm(partials_ptr + blocks + block, slope, scale, mask)
        fit = tl.sum(tl.where(mask, unless_finite(slope), 0.0), axis=0)
        tl.store(partials_ptr + 2 * blocks + block, fit.to(tl.float64))
    else:
        second = tl.load(second_ptr + offsets, mask=mask, other=0.0).to(DTYPE)
        store_norm(partials_ptr + block, second - slope, scale, mask)


def launch_measure(setting: Tensor, z: Tensor, slope: Tensor, second: Tensor | None) -> Tensor:
    """The partial sums of `measure_kernel`, [3 or 1, blocks] float64."""
    n = z.numel()
    programs, block, options = launch_shape(n, z.dtype)
    partials = torch.empty((3 if second is None else 1, programs), dtype=torch.float64, device=z.device)
    wide = tl.float64 if z.dtype == torch.float64 else tl.float32
    start(measure_kernel, programs, z, slope, second, setting, partials, n, programs, wide, block, **options)
    return partials


@triton.jit(do_not_specialize=["blocks", "count"])
def propose_kernel(
    partials_ptr, decided_ptr, trial_ptr, setting_ptr, sizes_ptr, blocks, count, CHOOSE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program; see `ops.control.propose`."""
    fit = total(partials_ptr + 2 * blocks, blocks, CHUNK) == 0
    tl.store(decided_ptr + FIRST_FINITE, fit.to(tl.float64))
    if CHOOSE:
        t, goal = tl.load(decided_ptr + T), tl.load(setting_ptr + END)
        zero = t - t  # float64, which the numbers by themselves are not
        status = tl.where(fit, zero + RUNS, zero + BAD)
        tl.store(decided_ptr + STATUS, status)
        elements = count.to(tl.float64)
        d0 = tl.sqrt(total(partials_ptr, blocks, CHUNK) / elements)
        d1 = tl.sqrt(total(partials_ptr + blocks, blocks, CHUNK) / elements)
        known = (d0 < float("inf")) & (d1 < float("inf"))
        small = (known == 0) | (d0 < 1e-5) | (d1 < 1e-5)
        guess = tl.where(small, 1e-6, 0.01 * d0 / tl.where(small, 1.0, d1))
        span = tl.abs(goal - t)
        h0 = tl.minimum(guess, span)
        tl.store(sizes_ptr, h0)
        tl.store(sizes_ptr + 1, guess)
        tl.store(sizes_ptr + 2, d1)
        at = tl.where(h0 < span, tl.where(goal < t, t - h0, t + h0), goal)
        slots = tl.arange(0, SLOTS).to(tl.int64)
        after = tl.load(decided_ptr + slots)
        after = tl.where(slots == STATUS, status, after)
        tl.store(trial_ptr + slots, tl.where(slots == T, at, after))


def launch_propose(
    decided: Tensor, trial: Tensor, setting: Tensor, z: Tensor, slope: Tensor, sizes: Tensor, choose: bool
) -> None:
    """As `ops.control.propose`, by the kernels."""
    partials = launch_measure(setting, z, slope, None)
    start(
        propose_kernel, 1, partials, decided, trial, setting, sizes, partials.shape[1], max(z.numel(), 1), choose,
        CHUNK, num_warps=8,
    )  # fmt: skip


@triton.jit
def extrapolate_kernel(
    decided_ptr, setting_ptr, z_ptr, slope_ptr, sizes_ptr, out_ptr, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block; see `ops.control.extrapolate`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    h0 = tl.load(sizes_ptr)
    h0 = tl.where(tl.load(setting_ptr + END) < tl.load(decided_ptr + T), -h0, h0).to(DTYPE)
    z = tl.load(z_ptr + offsets, mask=mask).to(DTYPE) + h0 * tl.load(slope_ptr + offsets, mask=mask).to(DTYPE)
    tl.store(out_ptr + offsets, z, mask=mask)


def launch_extrapolate(decided: Tensor, setting: Tensor, z: Tensor, slope: Tensor, sizes: Tensor, out: Tensor) -> None:
    """As `ops.control.extrapolate`, by the kernel."""
    n = z.numel()
    programs, block, options = launch_shape(n, z.dtype)
    wide = tl.float64 if z.dtype == torch.float64 else tl.float32
    start(extrapolate_kernel, programs, decided, setting, z, slope, sizes, out, n, wide, block, **options)


@triton.jit(do_not_specialize=["blocks", "count"])
def choose_kernel(partials_ptr, decided_ptr, setting_ptr, sizes_ptr, blocks, count, CHUNK: tl.constexpr):
    """One program; see `ops.control.choose`."""
    h0, guess, d1 = tl.load(sizes_ptr), tl.load(sizes_ptr + 1), tl.load(sizes_ptr + 2)
    d2 = tl.sqrt(total(partials_ptr, blocks, CHUNK) / count.to(tl.float64)) / h0
    distance = tl.load(setting_ptr + END) - tl.load(decided_ptr + T)
    steepest = tl.where(d2 > d1, d2, d1)
    flat = steepest <= 1e-15
    least = tl.where(h0 * 1e-3 > 1e-6, h0 * 1e-3, 1e-6)
    power = tl.exp(tl.load(setting_ptr + PLAIN) * tl.log(0.01 / tl.where(flat, 1.0, steepest)))
    known = (d1 < float("inf")) & (d2 < float("inf"))
    chosen = tl.where(known, tl.minimum(100 * guess, tl.where(flat, least, power)), h0)
    tl.store(decided_ptr + DT, tl.where(distance < 0, -chosen, chosen))


def launch_choose(decided: Tensor, setting: Tensor, z: Tensor, slope: Tensor, second: Tensor, sizes: Tensor) -> None:
    """As `ops.control.choose`, by the kernels."""
    partials = launch_measure(setting, z, slope, second)
    start(
        choose_kernel, 1, partials, decided, setting, sizes, partials.shape[1], max(z.numel(), 1), CHUNK, num_warps=8
    )  # fmt: skip
