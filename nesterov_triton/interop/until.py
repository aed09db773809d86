"""Solves that end at an event: where a function of time and state changes its sign.

The event is looked for without gradients. Where they are wanted the steps found are taken again, by the strategy that
is asked for: the states are the same, and so is the meaning of their gradients. The event's time counts as a constant
here; `odeint_event` gives it a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nesterov_triton.gradients import Gradient
from nesterov_triton.interop.call import Call
from nesterov_triton.interop.names import name_of
from nesterov_triton.interop.options import NO_LIMIT
from nesterov_triton.interop.states import Layout, State
from nesterov_triton.solve import bind
from nesterov_triton.stepping.explicit_rk import ExplicitRK
from nesterov_triton.stepping.loop import Progress, integrate

EventFunction = Callable[..., Tensor]
FIXED_LIMIT = 20_000  # fixed steps that torchdiffeq takes at most


def combined(event_fn: EventFunction, t: Tensor, y: State) -> Callable[[Tensor, State], Tensor]:
    """The smallest of the event function's elements, each taken positive at time t and state y; 0-d.

    Raises:
        TypeError, ValueError: it returns no real tensor, or NaN.
    """
    with torch.no_grad():
        found = _real(event_fn, event_fn(t, y))
        signs = torch.sign(found)

    def smallest(t: Tensor, y: State) -> Tensor:
        return (_real(event_fn, event_fn(t, y)) * signs).amin()

    return smallest


def _real(event_fn: EventFunction, found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.is_complex() or found.numel() == 0:
        got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"event_fn {name_of(event_fn)} must return a real tensor of at least one element, got {got}")
    return found if found.is_floating_point() else found.double()


def solve_until(call: Call, event_fn: EventFunction, gradient: Gradient) -> tuple[Tensor, list[Tensor]]:
    """The event's time, 0-d and like t, and the flat states, [D], at t[0] and at the event, with their graph.

    Raises:
        ValueError, TypeError: what is asked for goes not with an event.
        SolveError: no event within max_num_steps.
    """
    if not callable(event_fn):
        raise TypeError(f"event_fn must be a function (t, y) -> tensor, got {type(event_fn).__name__}")
    if len(call.times) != 2:
        raise ValueError(
            f"t must hold two times with event_fn, the first and which way from there, got {len(call.times)}"
        )
    adaptive = call.method.tableau.adaptive
    if not adaptive and (call.method.step_size is None or call.method.grid_constructor is not None):
        raise ValueError(
            f"options['step_size'] is missing: with event_fn, method {call.name!r} has no other end to go to"
        )
    loop = call.method.loop
    if not adaptive and loop.max_steps == NO_LIMIT:
        loop = replace(loop, max_steps=FIXED_LIMIT)
    settings = call.settings(gradient, loop)
    problem = bind(call.system, call.state, call.h, call.times, settings, call.params, call.stats)
    layout, start = call.layout, call.times[0].item()
    far = math.copysign(math.inf, call.times[1].item() - start)
    device = problem.z.device

    def at(t: float) -> Tensor:
        return torch.tensor(t, dtype=torch.float64, device=device)

    event = combined(event_fn, at(start), layout.state(problem.z.detach()))
    flow, progress = problem.flow(), Progress()
    ends: list[float] = [start]
    found: list[tuple[float, Tensor]] = []

    def reached(t: float, t1: float, z: Tensor, z1: Tensor) -> bool:
        ends.append(t1)
        if _before(event, at(t1), layout, z1):
            return False

        def inside(time: float) -> Tensor:
            return stepper.interpolate(t, t1, z, [time], [1])[0]

        time = _bisect(lambda x: _before(event, at(x), layout, inside(x)), t, t1, call.tolerances.smallest[1])
        found.append((time, inside(time)))
        return True

    with torch.no_grad(), problem.without_autocast():
        z = problem.z.detach()
        stepper = ExplicitRK(problem.tableau, flow, flow.rows, z, problem.tolerance, dense=True, inside=problem.edge)
        if float(event(at(start), layout.state(z))) == 0:
            found.append((start, z))
        else:
            try:
                integrate(stepper, z, (start, far), replace(loop, until=reached), progress)
            finally:
                problem.count(flow, progress)
    time, state = found[0]
    like = call.given_t if isinstance(call.given_t, Tensor) else call.times
    event_t = at(time).to(like.device, like.dtype)
    if time == start:
        return event_t, [call.start, call.start]
    if call.inert or not torch.is_grad_enabled():
        return event_t, [call.start, state]
    again = replace(settings, options=replace(loop, grid=lambda _: ends, watchers=None))
    accepted = call.stats.accepted
    times = torch.stack((call.times[0], torch.tensor(time, dtype=torch.float64)))
    states = call.states(times, again)
    call.stats.accepted = accepted
    return event_t, states


def _before(event: Callable[[Tensor, State], Tensor], t: Tensor, layout: Layout, z: Tensor) -> bool:
    """Whether the event is still to come."""
    value = float(event(t, layout.state(z)))
    if math.isnan(value):
        raise ValueError(f"event_fn returned NaN at t = {float(t):.9g}")
    return value > 0


def _bisect(before: Callable[[float], bool], t: float, t1: float, tolerance: float) -> float:
    """The time between t and t1 where `before` ends to hold, to the tolerance or to rounding."""
    halvings = 60 if tolerance == 0 else max(0, math.ceil(math.log2(abs(t1 - t) / tolerance)))
    for _ in range(min(halvings, 60)):
        middle = (t + t1) / 2
        if middle in (t, t1):
            break
        t, t1 = (middle, t1) if before(middle) else (t, middle)
    return (t + t1) / 2
