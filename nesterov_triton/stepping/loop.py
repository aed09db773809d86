"""The loops: from the first requested time to the last, step by step.

A loop decides; it knows neither the method nor the right-hand side nor who differentiates it. What a gradient strategy
needs of the accepted steps it gets through `on_accept`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class LoopOptions:
    """What a loop is told beside method, right-hand side and times.

    Attributes:
        controller: the step-size controller of adaptive methods.
        step_size: the step of fixed-step methods, > 0.
        first_step: the first step of adaptive methods, > 0; None to choose it (Hairer, Nørsett, Wanner II.4).
        max_steps: attempted steps allowed.
    """

    controller: Integral
    step_size: float | None = None
    first_step: float | None = None
    max_steps: int = 10_000


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
        stretch = 1.0 if after_rejection else 1.01
        t1 = end if stretch * abs(dt) >= abs(end - t) else t + dt
        h = t1 - t
        if progress.attempted >= options.max_steps:
            raise fail(Status.MAX_STEPS, h)
        # An interval as short as that is taken whole, once.
        if abs(h) <= 4 * math.ulp(t) and (t1 != end or after_rejection):
            raise fail(Status.STEP_UNDERFLOW if finite else Status.NON_FINITE, h)
        z1 = stepper.step(t, t1, z)
        error = stepper.error(z, z1)
        factor = controller.factor(error, previous, q, after_rejection)
        if not error <= 1:  # NaN included
            progress.rejected += 1
            # A step too long may overflow and is tried again shorter; nothing mends a field that is not finite here.
            finite = math.isfinite(error)
            if not finite and not stepper.starts_finite():
                raise fail(Status.NON_FINITE, h)
            dt, after_rejection = h * factor, True
            continue
        progress.accepted += 1
        # Beside an infinite state every error is small. It stays infinite, so that one look at the end is enough.
        if t1 == end and not _finite(z1):
            raise SolveError(Status.NON_FINITE, t, h, progress.attempted, tuple(itertools.takewhile(_finite, reached)))
        outputs = _emit(stepper, t, t1, z, z1, times, reached)
        if on_accept is not None:
            on_accept(AcceptedStep(t, t1, z, outputs))
        if t1 == end:
            # The step that ended here was cut short: what it was planned to be says more of the next interval.
            progress.dt = sign * max(abs(h * factor), abs(dt))
            return reached
        stepper.accept()
        t, z, dt = t1, z1, h * factor
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
    start = t
    size, count = fixed_steps(t, end, options)
    reached: list[Tensor] = []
    witnesses: list[Tensor] = []
    starts: list[float] = []
    for n in range(1, count + 1):
        t1 = end if n == count else start + n * size
        z1 = stepper.step(t, t1, z)
        progress.accepted += 1
        starts.append(t)
        witnesses.append(stepper.witness(z1))
        outputs = _emit(stepper, t, t1, z, z1, times, reached)
        if on_accept is not None:
            on_accept(AcceptedStep(t, t1, z, outputs))
        stepper.accept()
        t, z = t1, z1
    if not _finite(z):
        bad = torch.isfinite(torch.stack(witnesses)).tolist().index(False)
        good = [r for k, r in enumerate(reached, 1) if sign * (times[k] - starts[bad]) <= 0]
        raise SolveError(Status.NON_FINITE, starts[bad], size, bad + 1, tuple(good))
    return reached


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


def _finite(z: Tensor) -> bool:
    """Whether all elements are, as far as they can be read. A sum may overflow where no element does, hence the second
    look."""
    return not transforms.readable(z) or math.isfinite(z.detach().sum()) or bool(torch.isfinite(z).all())
