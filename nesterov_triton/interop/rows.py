"""`per_sample=True`: each row of the batch with steps of its own.

The steps are looked for without gradients. Where they are wanted each row's accepted steps are taken again, all rows
together, under autograd: one by one with their graph made anew in the backward pass, or all at once ("backprop").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nesterov_triton.gradients import Backprop, GradientLike
from nesterov_triton.gradients import get as gradient_of
from nesterov_triton.interop.call import Call
from nesterov_triton.interop.options import CALLBACKS
from nesterov_triton.stepping import per_sample
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.per_sample import combine, evaluate
from nesterov_triton.stepping.stepper import Tolerance

REFUSED = ("norm", "step_t", "jump_t")


def solve_rows(call: Call, gradient: GradientLike | None) -> list[Tensor]:
    """The flat states, [D], at all requested times, with their graph.

    Raises:
        ValueError: what is asked for goes not with steps of each row's own.
        SolveError: a row did not reach the last time.
    """
    _check(call, gradient)
    adapted, layout, stats = call.adapted, call.layout, call.stats
    assert adapted is not None
    batch, shape = layout.shapes[0][0], layout.shapes[0]
    backward = False

    def f(t: Tensor, y: Tensor) -> Tensor:
        if backward:
            stats.nfe_backward += 1
        else:
            stats.nfe_forward += 1
        u = adapted(t.to(layout.real).view(batch, *(1,) * (len(shape) - 1)), y.view(shape))
        return u.reshape(y.shape)

    def flat(value: Tensor | float) -> Tensor | float:
        return value.view(batch, -1) if isinstance(value, Tensor) else value

    times = call.times.tolist()
    tolerance = Tolerance(flat(call.tolerances.rtol), flat(call.tolerances.atol))
    start = call.start.view(batch, -1)
    tableau = call.method.tableau
    with torch.no_grad():
        found, walk = per_sample.integrate(f, tableau, start.detach(), times, tolerance, call.method.loop)
    stats.accepted, stats.rejected, stats.path = walk.accepted, walk.rejected, "torch: each row has steps of its own"
    stats.loop = "eager: each row has steps of its own"
    if not torch.is_grad_enabled():
        return [call.start, *(y.reshape(-1) for y in found)]

    # Again, the k-th accepted step of every row at once; a row that has no more takes steps of size 0.
    count = max(map(len, walk.sizes), default=0)
    starts = torch.tensor(
        [row + [times[-1]] * (count - len(row)) for row in walk.starts], dtype=torch.float64, device=start.device
    ).view(batch, count)
    sizes = torch.tensor(
        [row + [0.0] * (count - len(row)) for row in walk.sizes], dtype=torch.float64, device=start.device
    ).view(batch, count)
    dense, sign = dense_output(tableau), 1.0 if times[-1] > times[0] else -1.0
    inner = times[1:-1]

    def step(y: Tensor, t: Tensor, h: Tensor, t1: Tensor, wanted: list[int]) -> tuple[Tensor, ...]:
        stages = evaluate(f, tableau, t, h, t1, y)
        inside = [per_sample.inside_step(dense, stages, y, t, h, inner[k]) for k in wanted]
        return combine(y, stages, tableau.b, h), *inside

    y, outputs = start, [torch.zeros_like(start) for _ in inner]
    for k in range(count):
        t, h = starts[:, k], sizes[:, k]
        t1 = starts[:, k + 1] if k + 1 < count else torch.full_like(t, times[-1])
        t1 = torch.where(h == 0, t, t1)
        held = [(sign * (x - t) > 0) & (sign * (t1 - x) >= 0) for x in inner]
        wanted = [j for j, rows in enumerate(held) if bool(rows.any())]
        if isinstance(_strategy(gradient), Backprop):
            y, *inside = step(y, t, h, t1, wanted)
        else:
            y, *inside = checkpoint(step, y, t, h, t1, wanted, use_reentrant=False, preserve_rng_state=False)
        for j, at in zip(wanted, inside, strict=True):
            outputs[j] = torch.where(held[j][:, None], at, outputs[j])
    backward = True
    return [call.start, *(x.reshape(-1) for x in (*outputs, y))]


def _strategy(gradient: GradientLike | None) -> Any:
    return gradient_of("discrete" if gradient is None else gradient)


def _check(call: Call, gradient: GradientLike | None) -> None:
    layout = call.layout
    if call.adapted is None or not layout.simple or not layout.shapes[0]:
        raise ValueError("per_sample=True is for a y0 of one real tensor, [batch, ...]")
    if not call.method.tableau.adaptive:
        raise ValueError(f"per_sample=True is for adaptive methods, and {call.name!r} takes fixed steps; drop it")
    for name in REFUSED:
        if call.options.get(name) is not None:
            raise ValueError(f"options[{name!r}] does not go with per_sample=True; drop one of them")
    if any(getattr(call.func, name, None) is not None for name in CALLBACKS):
        raise ValueError("callbacks do not go with per_sample=True: there is no one time and step to tell")
    if call.times.requires_grad:
        raise ValueError("t has no gradient with per_sample=True; detach it, or drop per_sample")
    if gradient == "adjoint" or type(_strategy(gradient)).__name__ == "Adjoint":
        raise ValueError("per_sample=True is for gradient='discrete' or 'backprop'")
