"""The exact gradient of the accepted steps of a splitting, which are taken back instead of kept.

A symmetric splitting's step from z_n to z_n+1 is undone, to rounding, by its step of the opposite size: the backward
pass walks from the last state to the first and transposes each step on the way, with the one evaluation of each force
that any backward pass needs. Rounding adds up along the way, and damping that shrinks states forwards stretches their
errors backwards. So one state in many is kept; where the walk arrives at it, the difference is looked at, and a stretch
of which too much was lost is taken forward again from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nesterov_triton._numbers import is_number, is_whole, plain
from nesterov_triton.gradients.forward import forward
from nesterov_triton.gradients.leaves import apart, check_cotangents, check_parameters, refuse_graph
from nesterov_triton.gradients.nystrom_sweep import NystromSweep, given
from nesterov_triton.gradients.problem import Problem
from nesterov_triton.nystrom import METHODS, Nystrom
from nesterov_triton.stepping.loop import AcceptedStep
from nesterov_triton.stepping.nystrom import NystromStepper


@dataclass(frozen=True)
class Reversible:
    """Gradient of the computed solution itself, as `Discrete`, for the methods whose steps can be taken back (strang,
    blanes_moan4). Memory: one state in `every`, whatever the number of steps.

    Args:
        every: steps from one kept state to the next.
        bound: how far, relative to its norm, a state that was walked back to may be from the kept one; None for ten
            times the root of the dtype's precision. Beyond it the stretch is taken forward again, and all of its states
            are kept meanwhile; `Stats.path_backward` says how many were.

    Raises:
        ValueError: an argument out of range.
    """

    every: int = 50
    bound: float | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.every) or self.every < 1:
            raise ValueError(f"Reversible every must be an integer of at least 1, got {self.every!r}")
        if self.bound is not None and not (is_number(self.bound) and self.bound >= 0):
            raise ValueError(f"Reversible bound must be a number ≥ 0 or None, got {self.bound!r}")
        object.__setattr__(self, "every", int(self.every))
        object.__setattr__(self, "bound", None if self.bound is None else plain(self.bound))

    def solve(self, problem: Problem) -> list[Tensor]:
        """The states at the requested times after the first, [D] each, with their graph."""
        check(problem.method)
        rest = (*problem.scalars.values(), *problem.params)
        states = _Reversible.apply(problem, self, problem.z, problem.times, *rest)  # type: ignore[no-untyped-call]
        return list(states)


def check(method: object) -> None:
    """Raise where the method's steps cannot be taken back.

    Raises:
        ValueError: naming those that can.
    """
    if not (isinstance(method, Nystrom) and method.reversible):
        able = " or ".join(repr(m.name) for m in METHODS.values() if m.reversible)
        raise ValueError(f"gradient='reversible' takes steps back: pass method={able}, or gradient='discrete'")


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, strategy: Reversible, z: Tensor, times: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        spans: list[tuple[float, float, tuple[int, ...]]] = []
        kept: list[Tensor] = []

        def keep(step: AcceptedStep) -> None:
            if len(spans) % strategy.every == 0:
                kept.append(step.z)
            spans.append((step.t, step.t1, step.outputs))

        states = forward(problem, problem.flow(), keep)
        ctx.problem, ctx.strategy, ctx.spans, ctx.kept = problem, strategy, spans, len(kept)
        ctx.save_for_backward(*rest, *problem.frozen, *kept, states[-1])
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_graph("reversible")
        problem: Problem = ctx.problem
        check_parameters(problem)
        check_cotangents(cotangents)
        *kept, end = ctx.saved_tensors[-ctx.kept - 1 :]
        needs = ctx.needs_input_grad[2:]
        n = len(problem.scalars)
        flow = problem.flow_back(time_grads=needs[1], coefficient_grads=needs[1] or any(needs[2 : 2 + n]))
        path = problem.path()
        problem.backward_path("kernels take no step back" if path.kernels else path.reason)
        problem.stats.loop_backward = "eager: steps are taken back one by one"
        assert isinstance(problem.method, Nystrom)
        sweep = NystromSweep(problem.method, flow, problem.times.tolist())
        strategy: Reversible = ctx.strategy
        bound = 10 * torch.finfo(end.dtype).eps ** 0.5 if strategy.bound is None else strategy.bound
        adjoint, again = torch.zeros_like(problem.z), 0
        try:
            with problem.without_autocast(), apart(flow.params):
                for index in reversed(range(len(kept))):
                    spans = ctx.spans[index * strategy.every : (index + 1) * strategy.every]
                    before, before_adjoint, z = sweep.checkpoint(), adjoint, end
                    for t, t1, outputs in reversed(spans):
                        adjoint, z = sweep.back(t, t1, z, adjoint, given(outputs, cotangents))
                    end = kept[index]
                    if not bool(torch.linalg.vector_norm(z - end) <= bound * torch.linalg.vector_norm(end)):
                        again += 1
                        sweep.restore(before)
                        adjoint = before_adjoint
                        stepper = NystromStepper(problem.method, flow, end, None)
                        starts = [end]
                        for t, t1, _ in spans[:-1]:
                            starts.append(stepper.step(t, t1, starts[-1]))
                            stepper.accept()
                        for (t, t1, outputs), start in zip(reversed(spans), reversed(starts), strict=True):
                            adjoint = sweep.forth_and_back(t, t1, start, adjoint, given(outputs, cotangents))
                adjoint = sweep.finish(adjoint)
        finally:
            problem.stats.nfe_backward += flow.network.evaluations
        if again:
            problem.stats.path_backward += f"; {again} of {len(kept)} stretches were taken forward again"
        of_times = sweep.times if needs[1] else None
        return None, None, adjoint, of_times, *sweep.totals.scalars.values(), *sweep.totals.of_params()
