"""The loops: from the first requested time to the last, step by step.

A loop decides; it knows neither the method nor the right-hand side nor who differentiates it. What a gradient strategy
needs of the accepted steps it gets through `on_accept`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.status import SolveError, Status
from nesterov_triton.stepping.controllers import Integral
from nesterov_triton.stepping.initial_step import initial_step
from nesterov_triton.stepping.stepper import Stepper


@dataclass(frozen=True)
class AcceptedStep:
    """One accepted step: its ends, the state [D] it started from, and the requested times strictly inside or at its
    end, as indices."""

    t: float
    t1: float
    z: Tensor
    outputs: tuple[int, ...]


@dataclass
class Progress:
    """Counts of a loop, and the size that its last step would be followed by."""

    accepted: int = 0
    rejected: int = 0
    dt: float | None = None

    @property
    def attempted(self) -> int:
        return self.accepted + self.rejected


OnAccept = Callable[[AcceptedStep], None]
OnStep = Callable[[float, Tensor, float], object]  # time, state [D], signed step size


@dataclass(frozen=True)
class Watchers:
    """Who is told of steps: of each that is attempted, before it; of each that is accepted or rejected, after it. All
    are given the step's start."""

    attempt: OnStep | None = None
    accept: OnStep | None = None
    reject: OnStep | None = None


@dataclass(frozen=True)
class LoopOptions:
    """What a loop is told beside method, right-hand side and times.

    Attributes:
        controller: the step-size controller of adaptive methods.
        step_size: the step of fixed-step methods, > 0; None for one step to each requested time.
        first_step: the first step of adaptive methods, > 0; None to choose it (Hairer, Nørsett, Wanner II.4).
        max_steps: attempted steps allowed.
        min_step, max_step: bounds of an adaptive step; one of the smallest size is accepted whatever its error.
        stops: times that an adaptive step must end at; those outside the interval do not matter.
        jumps: those of them where the right-hand side jumps, so that the next step evaluates it anew.
        grid: from the requested times to those where fixed steps start and end, the first requested time first. It may
            go past the last one. For an adaptive method too, which then takes these steps whatever their error.
        until: is shown each accepted step as (t, t1, z, z1), and ends the solve there where it says so.
        watchers: who is told of steps.
    """

    controller: Integral
    step_size: float | None = None
    first_step: float | None = None
    max_steps: int = 10_000
    min_step: float = 0.0
    max_step: float = math.inf
    stops: tuple[float, ...] = ()
    jumps: tuple[float, ...] = ()
    grid: Callable[[Sequence[float]], Sequence[float]] | None = None
    until: Callable[[float, float, Tensor, Tensor], bool] | None = None
    watchers: Watchers | None = None

    @property
    def plain(self) -> bool:
        """Whether these are options that every loop knows."""
        return self == LoopOptions(self.controller, self.step_size, self.first_step, self.max_steps)


def integrate(
    stepper: Stepper,
    z: Tensor,
    times: Sequence[float],
    options: LoopOptions,
    progress: Progress,
    on_accept: OnAccept | None = None,
) -> list[Tensor]:
    """The states, [D] each, at times[1:], from the state `z` at times[0].

    Requested times never change the steps taken; the last one ends the last step. `progress` is counted on, and its
    `dt`, if it has one, is the first step to try.

    Raises:
        SolveError: the last time was not reached; the error carries the states that were.
    """
    run = _adaptive if stepper.tolerance is not None else _fixed
    return run(stepper, z, times, options, progress, on_accept)


def _adaptive(
    stepper: Stepper,
    z: Tensor,
    times: Sequence[float],
    options: LoopOptions,
    progress: Progress,
    on_accept: OnAccept | None,
) -> list[Tensor]:
    t, end = times[0], times[-1]
    sign = math.copysign(1.0, end - t)
    controller, q = options.controller, stepper.tableau.error_order + 1
    shortest, longest, watchers = options.min_step, options.max_step, options.watchers or _NOBODY
    stops = sorted((s for s in options.stops if sign * (s - t) > 0 < sign * (end - s)), key=lambda s: -sign * s)
    target = stops.pop() if stops else end
    reached: list[Tensor] = []
    previous, after_rejection, finite = 1.0, False, True

    def fail(status: Status, dt: float) -> SolveError:
        return SolveError(status, t, dt, progress.attempted, tuple(reached))

    if progress.dt is not None:
        dt = progress.dt
    elif options.first_step is not None:
        dt = sign * options.first_step
    else:
        dt = sign * initial_step(stepper, t, end, z)
        if not math.isfinite(dt):
            raise fail(Status.NON_FINITE, 0.0)
    while True:
        # A last step up to 1 % longer than planned rather than a sliver after it; the error is controlled all the same.
        # Not after a rejection: stretched back to what was rejected, it would be tried for ever.
        size = min(max(abs(dt), shortest), longest)
        stretch = 1.0 if after_rejection or size == longest else 1.01
        t1 = target if stretch * size >= abs(target - t) else t + math.copysign(size, dt)
        h = t1 - t
        if progress.attempted >= options.max_steps:
            raise fail(Status.MAX_STEPS, h)
        # An interval as short as that is taken whole, once.
        if abs(h) <= 4 * math.ulp(t) and (t1 != target or after_rejection):
            raise fail(Status.STEP_UNDERFLOW if finite else Status.NON_FINITE, h)
        if watchers.attempt is not None:
            watchers.attempt(t, z, h)
        z1 = stepper.step(t, t1, z)
        error = stepper.error(z, z1)
        factor = controller.factor(error, previous, q, after_rejection)
        if not error <= 1 and not (size <= shortest and math.isfinite(error)):  # NaN included
            progress.rejected += 1
            if watchers.reject is not None:
                watchers.reject(t, z, h)
            # A step too long may overflow and is tried again shorter; nothing mends a field that is not finite here.
            finite = math.isfinite(error)
            if not finite and (size <= shortest or not stepper.starts_finite()):
                raise fail(Status.NON_FINITE, h)
            dt, after_rejection = h * factor, True
            continue
        progress.accepted += 1
        if watchers.accept is not None:
            watchers.accept(t, z, h)
        # Beside an infinite state every error is small. It stays infinite, so that one look at the end is enough.
        if t1 == end and not finite_everywhere(z1):
            raise SolveError(
                Status.NON_FINITE, t, h, progress.attempted, tuple(itertools.takewhile(finite_everywhere, reached))
            )
        outputs = _emit(stepper, t, t1, z, z1, times, reached)
        if on_accept is not None:
            on_accept(AcceptedStep(t, t1, z, outputs))
        following = h * factor
        if t1 == target:
            # The step that ended here was cut short: what it was planned to be says more of the next interval.
            following = sign * max(abs(following), size)
        if t1 == end:
            progress.dt = following
            return reached
        if options.until is not None and options.until(t, t1, z, z1):
            return reached
        stepper.accept()
        if t1 == target:
            target = stops.pop() if stops else end
            if t1 in options.jumps:
                stepper.restart()
        t, z, dt = t1, z1, following
        previous, after_rejection, finite = max(error, 1e-4), False, True


def _fixed(
    stepper: Stepper,
    z: Tensor,
    times: Sequence[float],
    options: LoopOptions,
    progress: Progress,
    on_accept: OnAccept | None,
) -> list[Tensor]:
    t, end = times[0], times[-1]
    sign = math.copysign(1.0, end - t)
    watchers = options.watchers or _NOBODY
    reached: list[Tensor] = []
    witnesses: list[Tensor] = []
    starts: list[float] = []
    for t1 in _ends(times, options):
        if watchers.attempt is not None:
            watchers.attempt(t, z, t1 - t)
        z1 = stepper.step(t, t1, z)
        progress.accepted += 1
        if watchers.accept is not None:
            watchers.accept(t, z, t1 - t)
        starts.append(t)
        witnesses.append(stepper.witness(z1))
        outputs = _emit(stepper, t, t1, z, z1, times, reached)
        if on_accept is not None:
            on_accept(AcceptedStep(t, t1, z, outputs))
        if options.until is not None and options.until(t, t1, z, z1):
            return reached
        stepper.accept()
        if t1 in options.jumps:
            stepper.restart()
        t, z = t1, z1
    if not finite_everywhere(z):
        bad = torch.isfinite(torch.stack(witnesses)).tolist().index(False)
        good = [r for k, r in enumerate(reached, 1) if sign * (times[k] - starts[bad]) <= 0]
        ends = [*starts[1:], t]
        raise SolveError(Status.NON_FINITE, starts[bad], ends[bad] - starts[bad], bad + 1, tuple(good))
    return reached


def _ends(times: Sequence[float], options: LoopOptions) -> Iterator[float]:
    """The ends of fixed steps; without an end where the last time is infinite.

    Raises:
        SolveError: they are too many or too short.
    """
    start, end = times[0], times[-1]
    if options.grid is None and options.step_size is not None and math.isfinite(end):
        size, count = fixed_steps(start, end, options)
        yield from (start + n * size for n in range(1, count))
        yield end
        return
    if options.step_size is not None and options.grid is None:
        size = math.copysign(options.step_size, end)
        ends: Iterator[float] = (start + n * size for n in itertools.count(1))
    else:
        ends = iter((times if options.grid is None else options.grid(times))[1:])
    t = start
    for n, t1 in enumerate(ends):
        if n >= options.max_steps:
            raise SolveError(Status.MAX_STEPS, t, t1 - t, n)
        if t1 == t:
            raise SolveError(Status.STEP_UNDERFLOW, t, 0.0, n)
        yield t1
        t = t1


def fixed_steps(t: float, end: float, options: LoopOptions) -> tuple[float, int]:
    """The signed size of fixed steps from t to the end, and how many there are.

    Raises:
        SolveError: they are too many or too short.
    """
    step_size = options.step_size
    assert step_size is not None
    signed = math.copysign(step_size, end - t)
    # The last step is shorter where the size does not divide the interval; rounding must not add a sliver.
    count = max(1, math.ceil(abs(end - t) / step_size * (1 - 1e-12)))
    if count > options.max_steps:
        raise SolveError(Status.MAX_STEPS, t, signed, 0)
    if count > 1 and step_size <= 4 * math.ulp(max(abs(t), abs(end))):
        raise SolveError(Status.STEP_UNDERFLOW, t, signed, 0)
    return signed, count


def _emit(
    stepper: Stepper, t: float, t1: float, z: Tensor, z1: Tensor, times: Sequence[float], reached: list[Tensor]
) -> tuple[int, ...]:
    """Append the states at the requested times that the step from t to t1 has reached; return their indices."""
    first = k = len(reached) + 1
    sign, last = math.copysign(1.0, t1 - t), len(times) - 1
    while k <= last and sign * (times[k] - t1) <= 0:
        k += 1
    if k == first:
        return ()
    taken = range(first, k)
    # At the step's end the state is known; where times are differentiated, its time moves by itself all the same.
    inside = [k for k in taken if times[k] != t1 or (stepper.axis is not None and k != last)]
    found: dict[int, Tensor] = {}
    if inside:
        found.update(zip(inside, stepper.interpolate(t, t1, z, [times[k] for k in inside], inside), strict=True))
    for k in taken:
        if k not in found:
            reached.append(z1)
        elif times[k] != t1:
            reached.append(found[k])
        else:
            reached.append(z1.detach() + (found[k] - found[k].detach()))
    return tuple(taken)


_NOBODY = Watchers()


def finite_everywhere(z: Tensor) -> bool:
    """Whether all elements are, as far as they can be read. A sum may overflow where no element does, hence the second
    look."""
    return not transforms.readable(z) or math.isfinite(z.detach().sum()) or bool(torch.isfinite(z).all())
