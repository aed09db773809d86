"""`odeint_dense`: a solution as a function of time."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nesterov_triton.gradients import Backprop, Discrete
from nesterov_triton.interop import options as opt
from nesterov_triton.interop.call import Call
from nesterov_triton.interop.names import untraced
from nesterov_triton.interop.states import Function, Layout, State
from nesterov_triton.ops import runge_kutta
from nesterov_triton.solve import bind
from nesterov_triton.status import Stats
from nesterov_triton.stepping.dense_output import DenseOutput
from nesterov_triton.stepping.explicit_rk import ExplicitRK
from nesterov_triton.stepping.loop import AcceptedStep, Progress, integrate


class Piece(NamedTuple):
    """One step: the state it started from, [D], and its stages as columns, [D, s]."""

    t: float
    t1: float
    z: Tensor
    stages: Tensor


class DenseSolution:
    """A solution as a function of time, from the steps' own interpolants.

    Attributes:
        t0, t1: the interval.
        stats: counts of the solve.
    """

    def __init__(self, layout: Layout, dense: DenseOutput, pieces: Sequence[Piece], stats: Stats) -> None:
        self._layout, self._dense, self._pieces = layout, dense, pieces
        self.t0, self.t1, self.stats = pieces[0].t, pieces[-1].t1, stats
        self._sign = math.copysign(1.0, self.t1 - self.t0)
        self._ends = [self._sign * p.t1 for p in pieces]

    def __call__(self, t: Tensor | float) -> State:
        """The state at `t`, in the form of y0 with t's axes in front: a time, or a tensor of times of any shape.

        Differentiable in t, and in all that the solve was differentiable in.

        Raises:
            ValueError: a time outside the interval.
        """
        times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        wide = times.reshape(-1).to("cpu", torch.float64)
        states = [self._at(x, time) for x, time in zip(wide.tolist(), wide.unbind(0), strict=True)]
        size = self._pieces[0].z.numel()
        stacked = torch.stack(states) if states else self._pieces[0].z.new_empty((0, size))
        return self._layout.state(stacked.view(*times.shape, size))

    def _at(self, x: float, time: Tensor) -> Tensor:
        lowest, highest = sorted((self.t0, self.t1))
        if not lowest <= x <= highest:
            raise ValueError(f"t must lie between {self.t0:.9g} and {self.t1:.9g}, got {x:.9g}")
        piece = self._pieces[min(bisect.bisect_left(self._ends, self._sign * x), len(self._pieces) - 1)]
        dt = piece.t1 - piece.t
        weights = self._dense.weights((time - piece.t) / dt) * dt
        return runge_kutta.combine(piece.z, piece.stages, weights.to(piece.z.device, piece.z.dtype))


@untraced
def odeint_dense(
    func: Function,
    y0: Tensor | tuple[Tensor, ...],
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    args: Sequence[Any] = (),
) -> DenseSolution:
    """Solve dy/dt = func(t, y), y(t0) = y0, for a function of time, as `torchdiffeq.odeint_dense` does.

    Memory is all stages of all steps. Where gradients are wanted, autograd sees every operation.

    Args:
        func, y0, rtol, atol, method, options, args: see `odeint`; the method is one of this package's own.
        t0, t1: the interval, in either direction; numbers or 0-d tensors; t0 without a gradient.

    Returns:
        y(t) for t from t0 to t1, times of any shape; differentiable.

    Raises:
        ValueError, TypeError: bad input, before any work; the message names the argument and the fix.
        SolveError: t1 was not reached.
    """
    if torch.is_grad_enabled() and isinstance(t0, Tensor) and t0.requires_grad:
        raise ValueError(
            "t0 needs a gradient, and a dense solution has none for where it starts: pass t0.detach(), or ask odeint "
            "for the states at given times"
        )
    name = opt.check_method(method)
    if name in opt.HANDED_OVER:
        raise ValueError(
            f"odeint_dense knows this package's own methods only, not {name!r}; use one of {[*opt.NATIVE]}"
        )
    ends = [x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64) for x in (t0, t1)]
    call = Call(
        func, y0, torch.stack([x.reshape(()).to("cpu", torch.float64) for x in ends]), rtol, atol, name, options, args
    )
    method_ = call.method
    if not method_.tableau.adaptive and method_.step_size is None:
        raise ValueError(f"options['step_size'] is missing: method {name!r} would take one step from t0 to t1")
    call.look()
    recorded = torch.is_grad_enabled() and not call.inert
    settings = call.settings(Backprop() if recorded else Discrete(), method_.loop)
    problem = bind(call.system, call.state, call.h, call.times.detach(), settings, call.params, call.stats)
    flow, progress, pieces = problem.flow(), Progress(), list[Piece]()
    with torch.set_grad_enabled(recorded), problem.without_autocast():
        z = problem.z if recorded else problem.z.detach()
        stepper = ExplicitRK(
            problem.tableau, flow, flow.rows, z, problem.tolerance, dense=True, differentiable=recorded,
            inside=problem.edge,
        )  # fmt: skip

        def keep(step: AcceptedStep) -> None:
            pieces.append(Piece(step.t, step.t1, step.z, stepper.kept(step.t, step.t1, step.z)))

        try:
            integrate(stepper, z, problem.times.tolist(), problem.options, progress, keep)
        finally:
            problem.count(flow, progress)
    return DenseSolution(call.layout, stepper.dense, pieces, call.stats)
