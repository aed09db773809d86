"""`odeint_event`: the time of an event, with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton.interop.names import untraced
from nesterov_triton.interop.odeint import odeint
from nesterov_triton.interop.states import Adapted, Function, Layout
from nesterov_triton.interop.until import combined
from nesterov_triton.status import SolveError, Status
from nesterov_triton.stepping.loop import finite_everywhere


@untraced
def odeint_event(
    func: Function,
    y0: Tensor | tuple[Tensor, ...],
    t0: Tensor,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """Solve dy/dt = func(t, y), y(t0) = y0, until an event, as `torchdiffeq.odeint_event` does.

    The event's time has a gradient, by the implicit function theorem: with g the event function, dt = -dg / (∂g/∂t +
    ∂g/∂y · func), where dg is its change at a fixed time, through y and through tensors that g itself uses.

    Args:
        func, y0: see `odeint`.
        t0: one time; it may require gradients.
        event_fn: event_fn(t, y) -> tensor; the event is where one of its elements changes its sign.
        reverse_time: look for the event before t0.
        odeint_interface: what solves: `odeint`, `odeint_adjoint`, or a function like them.
        kwargs: its keyword arguments.

    Returns:
        (event time, 0-d, like t0; states at t0 and at the event in the form of y0, each with a first axis of 2), and
        with return_stats=True the counts.

    Raises:
        ValueError, TypeError: bad input; the message names the argument and the fix.
        SolveError: no event was reached, or func is not finite there.
    """
    if not isinstance(t0, Tensor) or t0.numel() != 1 or not t0.is_floating_point():
        raise TypeError("t0 must be a floating-point tensor of one time; for example torch.tensor(0.0)")
    first = t0.reshape(1)
    times = torch.cat((first, first.detach() + (-1.0 if reverse_time else 1.0)))
    event_t, solution, *rest = odeint_interface(func, y0, times, event_fn=event_fn, **kwargs)
    layout = Layout(y0)
    parts = (solution,) if layout.single else tuple(solution)
    if torch.is_grad_enabled():
        args = kwargs.get("args", ())
        event_t, last = _with_gradient(func, args, layout, event_fn, y0, first[0], event_t, [p[-1] for p in parts])
        parts = tuple(torch.cat((p[:-1], x.unsqueeze(0))) for p, x in zip(parts, last, strict=True))
    return event_t, parts[0] if layout.single else parts, *rest


def _with_gradient(
    func: Function,
    args: Sequence[Any],
    layout: Layout,
    event_fn: Callable[..., Tensor],
    y0: Any,
    t0: Tensor,
    event_t: Tensor,
    last: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The event's time and the state there, the same values, that move with the event."""

    def form(parts: Sequence[Tensor]) -> Any:
        return parts[0] if layout.single else tuple(parts)

    wide = event_t.detach().double()
    g = combined(event_fn, t0.detach().double(), form([x.detach() for x in _parts(y0, layout)]))
    live = g(wide, form(list(last)))
    if not live.requires_grad:
        return event_t, list(last)
    with torch.no_grad():
        time = wide.to(last[0].device, layout.real)
        z = layout.flat(form([x.detach() for x in last]))
        slope = Adapted(func, layout, args)(time, z.view(layout.shapes[0]) if layout.simple else z).reshape(-1)
        slopes = layout.parts(slope)
    if not finite_everywhere(slope):
        raise SolveError(Status.NON_FINITE, float(wide), 0.0, 0, where="the event's gradient")
    t, leaves = wide.clone().requires_grad_(), [x.detach().requires_grad_() for x in last]
    with torch.enable_grad():
        value = g(t, form(leaves))
    of_t, *of_y = torch.autograd.grad(value, (t, *leaves), allow_unused=True)
    rate = torch.zeros_like(value) if of_t is None else of_t.to(value)
    for found, s in zip(of_y, slopes, strict=True):
        if found is not None:
            rate = rate + torch.sum((found.conj() * s).real if s.is_complex() else found * s).to(value)
    # Where the event is only touched its time has no derivative; infinite, and not NaN.
    rate = torch.where(rate == 0, torch.full_like(rate, torch.finfo(rate.dtype).tiny), rate)
    moved = -(live - live.detach()) / rate
    return (
        event_t + moved.to(event_t),
        [x + (moved.to(x.device) * s).to(x.dtype) for x, s in zip(last, slopes, strict=True)],
    )


def _parts(y: Any, layout: Layout) -> list[Tensor]:
    return [y] if layout.single else [part.to(layout.dtype) for part in y]
