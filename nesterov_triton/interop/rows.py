"""`per_sample=True`: each row of the batch with steps of its own.

The steps are looked for without gradients. Where they are wanted each row's accepted steps are taken again, all rows
together, under autograd: one by one with their graph made anew in the backward pass, or all at once ("backprop").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nesterov_triton.gradients import Adjoint, Backprop, GradientLike
from nesterov_triton.gradients import get as gradient_of
from nesterov_triton.gradients.problem import parameters, trainable
from nesterov_triton.interop.call import Call
from nesterov_triton.interop.norms import Tolerances
from nesterov_triton.interop.options import CALLBACKS
from nesterov_triton.interop.states import Layout
from nesterov_triton.status import SolveError, Status
from nesterov_triton.stepping import per_sample
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.loop import finite_everywhere
from nesterov_triton.stepping.per_sample import Walk, combine, evaluate

REFUSED = ("norm", "step_t", "jump_t")


def solve_rows(call: Call, gradient: GradientLike | None) -> list[Tensor]:
    """The flat states, [D], at all requested times, with their graph; of a call that has been checked.

    Raises:
        SolveError: a row did not reach the last time.
    """
    if len(call.times) == 1:
        return [call.start]
    adapted, layout, stats = call.adapted, call.layout, call.stats
    assert adapted is not None
    rows = Rows(layout)
    backward = False

    def f(t: Tensor, y: Tensor) -> Tensor:
        if backward:
            stats.nfe_backward += 1
        else:
            stats.nfe_forward += 1
        time = t.to(layout.real).view(rows.batch, *(1,) * (len(layout.shapes[0]) - 1))
        return rows.apart(adapted(time, y.view(layout.shapes[0]) if layout.simple else rows.flat(y)).reshape(-1))

    times, start, tableau = call.times.tolist(), rows.apart(call.start), call.method.tableau
    with torch.no_grad():
        measure = RowMeasure(rows, call.tolerances)
        found, walk = per_sample.integrate(f, tableau, start.detach(), times, measure, call.method.loop)
    stats.accepted, stats.rejected, stats.path = walk.accepted, walk.rejected, "torch: each row has steps of its own"
    stats.loop = "eager: each row has steps of its own"
    if not torch.is_grad_enabled():
        return [call.start, *map(rows.flat, found)]

    steps, dense = Steps(walk, call.times, start.device), dense_output(tableau)
    inner = call.times[1:-1].to(start.device)

    def step(y: Tensor, t: Tensor, h: Tensor, t1: Tensor, wanted: list[int]) -> tuple[Tensor, ...]:
        stages = evaluate(f, tableau, t, h, t1, y)
        inside = [per_sample.inside_step(dense, stages, y, t, h, inner[k]) for k in wanted]
        return combine(y, stages, tableau.b, h), *inside

    at_once = isinstance(_strategy(gradient), Backprop)
    y, outputs = start, [torch.zeros_like(start) for _ in inner]
    for k in range(steps.count):
        t, h, t1 = steps[k]
        held = [steps.holds(k, x) for x in times[1:-1]]
        wanted = [j for j, those in enumerate(held) if bool(those.any())]
        if at_once:
            y, *inside = step(y, t, h, t1, wanted)
        else:
            y, *inside = checkpoint(step, y, t, h, t1, wanted, use_reentrant=False, preserve_rng_state=False)
        for j, at in zip(wanted, inside, strict=True):
            outputs[j] = torch.where(held[j][:, None], at, outputs[j])
    backward = True
    if not all(map(finite_everywhere, (*outputs, y))):  # the same steps again: func is not what it was
        raise SolveError(Status.NON_FINITE, times[-1], 0.0, stats.accepted + stats.rejected)
    states = [rows.flat(x) for x in (*outputs, y)]
    params = trainable((*parameters(call.system.field), *call.params))
    if params and not at_once:
        states = list(_Watched.apply(len(params), *params, *states))  # type: ignore[no-untyped-call]
    return [call.start, *states]


class Rows:
    """A state as one real tensor, [B, D]: each row holds its own part of every tensor of the state."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.batch = layout, layout.shapes[0][0]
        self.widths = [math.prod(shape[1:]) for shape in layout.shapes]
        self._real = [2 * w for w in self.widths] if layout.complex else self.widths

    def apart(self, z: Tensor) -> Tensor:
        """The rows, [B, D], of the flat state [B D]."""
        if len(self._real) == 1:
            return z.view(self.batch, self._real[0])
        pieces = torch.split(z, [self.batch * w for w in self._real])
        return torch.cat([p.view(self.batch, w) for p, w in zip(pieces, self._real, strict=True)], dim=1)

    def flat(self, y: Tensor) -> Tensor:
        """The flat state, [B D], of the rows."""
        if len(self._real) == 1:
            return y.reshape(-1)
        return torch.cat([p.reshape(-1) for p in torch.split(y, self._real, dim=1)])

    def elements(self, y: Tensor) -> Sequence[Tensor]:
        """Of each tensor of the state its elements, [B, w], complex ones of a complex state."""
        pieces = torch.split(y, self._real, dim=1)
        if not self.layout.complex:
            return pieces
        return [torch.view_as_complex(p.reshape(self.batch, -1, 2)) for p in pieces]


class RowMeasure:
    """What an error of each row is: over the tolerance the root of the mean square, the largest one of a tuple."""

    def __init__(self, rows: Rows, tolerances: Tolerances) -> None:
        self.rows = rows
        self._rtol, self._atol = self._of_parts(tolerances.rtol), self._of_parts(tolerances.atol)

    def _of_parts(self, tolerance: Tensor | float) -> Sequence[Tensor | float]:
        rows = self.rows
        if not isinstance(tolerance, Tensor):
            return [tolerance] * len(rows.widths)
        pieces = torch.split(tolerance, rows.layout.sizes)
        return [p.view(rows.batch, w) for p, w in zip(pieces, rows.widths, strict=True)]

    def __call__(self, values: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """[B] float64, of an error and the states that it lies between, [B, D] each."""
        found = []
        each = zip(*map(self.rows.elements, (values, before, after)), self._rtol, self._atol, strict=True)
        for error, a, b, rtol, atol in each:
            scale = atol + rtol * torch.maximum(a.abs(), b.abs()).double()
            ratio = error.abs().double() / scale.clamp_min(1e-300)
            found.append((ratio.square().sum(1) / max(ratio.shape[1], 1)).sqrt())
        return found[0] if len(found) == 1 else torch.stack(found).amax(0)


class Steps:
    """The k-th accepted step of every row at once; a row that has no more takes steps of size 0.

    Step sizes are constants: with the first requested time all of the steps move, and the last one ends at the last.
    """

    def __init__(self, walk: Walk, times: Tensor, device: torch.device) -> None:
        start, end = times.detach()[[0, -1]].tolist()
        self._end, self._sign = end, math.copysign(1.0, end - start)
        self.count = count = max(map(len, walk.sizes), default=0)

        def table(rows: list[list[float]], rest: float) -> Tensor:
            full = [row + [rest] * (count - len(row)) for row in rows]
            return torch.tensor(full, dtype=torch.float64, device=device).view(len(rows), count)

        self._starts, self._sizes = table(walk.starts, end), table(walk.sizes, 0.0)
        self._ends = torch.cat((self._starts[:, 1:], torch.full_like(self._starts[:, :1], end)), dim=1)
        self._moves: tuple[Tensor, Tensor] | None = None
        if times.requires_grad:  # zeros, with the times' graph
            first, last = (times[[0, -1]] - times[[0, -1]].detach()).to(device).unbind(0)
            self._moves = first, last

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where it starts, its size, and where it ends, [B] each."""
        t, h, t1 = self._starts[:, k], self._sizes[:, k], self._ends[:, k]
        t1 = torch.where(h == 0, t, t1)
        if self._moves is None:
            return t, h, t1
        first, last = self._moves
        final, none = (t1 == self._end) & (h != 0), torch.zeros_like(h)
        return t + first, h + torch.where(final, last - first, none), t1 + torch.where(final, last, first)

    def holds(self, k: int, time: float) -> Tensor:
        """The rows whose step holds the time, [B]."""
        t, t1 = self._starts[:, k], self._ends[:, k]
        return (self._sizes[:, k] != 0) & (self._sign * (time - t) > 0) & (self._sign * (t1 - time) >= 0)


class _Watched(torch.autograd.Function):
    """The states, and zeros for what they do not depend on; in the backward pass the parameters must be as they were,
    for the function is called with them again."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[:count])
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, *map(torch.zeros_like, ctx.saved_tensors), *cotangents


def _strategy(gradient: GradientLike | None) -> Any:
    return gradient_of("discrete" if gradient is None else gradient)


def check_rows(call: Call, gradient: GradientLike | None) -> None:
    """Raise for what does not go with steps of each row's own.

    Raises:
        ValueError: naming the argument and the fix.
    """
    shapes = call.layout.shapes
    if call.adapted is None:
        raise ValueError("per_sample=True is for functions, not for momentum systems; write func as f(t, (x, m))")
    if len({shape[:1] for shape in shapes}) > 1 or not shapes[0]:
        raise ValueError(f"per_sample=True needs a batch, y0 of [batch, ...], got {', '.join(map(_shape, shapes))}")
    if len(set(map(len, shapes))) > 1:
        raise ValueError(
            "per_sample=True gives func one tensor of times, [batch, 1, ...], for all tensors of y0, which must have "
            f"the same number of dimensions: unsqueeze some of them, got {', '.join(map(_shape, shapes))}"
        )
    if not call.method.tableau.adaptive:
        raise ValueError(f"per_sample=True is for adaptive methods, and {call.name!r} takes fixed steps; drop it")
    for name in REFUSED:
        if call.options.get(name) is not None:
            raise ValueError(f"options[{name!r}] does not go with per_sample=True; drop one of them")
    if any(getattr(call.func, name, None) is not None for name in CALLBACKS):
        raise ValueError("callbacks do not go with per_sample=True: there is no one time and step to tell")
    if isinstance(_strategy(gradient), Adjoint):
        raise ValueError(
            "per_sample=True is for gradient='discrete' or 'backprop': the adjoint's backward solve takes the same "
            "steps for all rows"
        )


def _shape(shape: torch.Size) -> str:
    return str(tuple(shape))
