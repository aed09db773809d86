"""The exact gradient of the accepted steps.

The forward pass keeps the state at the start of each accepted step. The backward pass takes the steps in reverse: it computes
a step's stages again, each with the network's graph, and then transposes the step by hand. With λ the cotangent of the new
state and c_i those of the stages' states,

    c(k_i) = dt ( b_i λ + Σ_j>i a_ji c_j ),      c_i = (∂F/∂z)ᵀ c(k_i),      λ ← λ + Σ_i c_i.

Step sizes count as constants: the whole grid moves with the first time, and the last step ends at the last time. Memory is one
state an accepted step, and one step's graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nesterov_triton.flow import Cotangents, Flow, Linearisation, Totals
from nesterov_triton.gradients.common import check_leaves
from nesterov_triton.gradients.problem import Problem, forward
from nesterov_triton.ops import runge_kutta
from nesterov_triton.ops.rows import Row, empty_rows
from nesterov_triton.stepping.explicit_rk import dense_output, stage_times
from nesterov_triton.stepping.loop import AcceptedStep
from nesterov_triton.tableaus import Tableau


@dataclass(frozen=True)
class Discrete:
    """Gradient of the computed solution itself: exact to rounding, no error control and no rejected step in the backward
    pass. Memory: one state for each accepted step. The default.

    The field must give the same output when it is called again with the same input (no dropout inside).
    """

    def solve(self, problem: Problem) -> list[Tensor]:
        """The states at the requested times after the first, [D] each, with their graph."""
        return list(
            _Discrete.apply(problem, problem.z, problem.times, *problem.scalars.values(), *problem.params)  # type: ignore[no-untyped-call]
        )


class _Discrete(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, z: Tensor, times: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        tape: list[AcceptedStep] = []
        states = forward(problem, problem.flow(), tape.append)
        ctx.problem = problem
        ctx.spans = [(step.t, step.t1, step.outputs) for step in tape]
        # Saved as autograd saves: outputs without a reference cycle, parameters with a check that nobody changed them.
        ctx.save_for_backward(*rest, *(step.z for step in tape))
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        saved = ctx.saved_tensors
        starts = saved[len(problem.scalars) + len(problem.params) :]
        needs = ctx.needs_input_grad
        n = len(problem.scalars)
        scalars = [s.detach().requires_grad_() for s in problem.scalars.values()]
        flow = problem.flow(scalars)
        flow.time_grads = needs[2]
        flow.coefficient_grads = needs[2] or any(needs[3 : 3 + n])
        sweep = ReverseSweep(problem.tableau, flow, problem.times.tolist())
        adjoint = torch.zeros_like(problem.z)
        try:
            with problem.without_autocast():
                for (t, t1, outputs), z in zip(reversed(ctx.spans), reversed(starts), strict=True):
                    wanted = [(k, cotangents[k - 1]) for k in outputs]
                    adjoint = sweep.step(t, t1, z, adjoint, [(k, g) for k, g in wanted if g is not None])
        finally:
            problem.stats.nfe_backward += flow.evaluations
        totals = sweep.totals
        return (
            None,
            adjoint,
            sweep.times if needs[2] else None,
            *totals.scalars.values(),
            *totals.params,
        )


class ReverseSweep:
    """Transposed Runge-Kutta steps, last first.

    Attributes:
        totals: the cotangents of parameters and scalars so far.
        times: the cotangents of the requested times so far, [n] float64 on the CPU.
    """

    def __init__(self, tableau: Tableau, flow: Flow, times: Sequence[float]) -> None:
        self.flow, self.requested = flow, times
        self.totals = Totals(flow)
        self.times = torch.zeros(len(times), dtype=torch.float64)
        self._dense = dense_output(tableau)
        # A last stage without weight (FSAL) is evaluated for the error only: nothing to differentiate.
        self._plain = _Transpose(tableau, tableau.stages - (tableau.b[-1] == 0), flow)
        self._full = _Transpose(tableau, self._dense.stages, flow)
        self._checked = False

    def step(
        self, t: float, t1: float, z: Tensor, adjoint: Tensor, outputs: Sequence[tuple[int, Tensor]]
    ) -> Tensor:
        """The cotangent of the state `z` at t, [D], from that of the state at t1 and those of requested states.

        Args:
            outputs: (index of the requested time in (t, t1], cotangent [D]).
        """
        flow, dt = self.flow, t1 - t
        # A requested time at the end of a step, the last one apart, moves inside the step all the same.
        last = len(self.requested) - 1
        inside = [(k, g) for k, g in outputs if self.requested[k] != t1 or (flow.time_grads and k != last)]
        for k, g in outputs:
            if all(k != other for other, _ in inside):
                adjoint = adjoint + g
        transpose = self._full if inside else self._plain
        s = transpose.stages
        times = stage_times(t, t1, transpose.nodes)
        at = flow.at(times)
        buffers = transpose.buffers(z, len(inside))
        forward_weights, backward_weights = transpose.weights(dt, z)

        # Forward again, with the network's graph at every stage.
        lins: list[Linearisation] = []
        for i in range(s):
            stage = z if i == 0 else runge_kutta.combine(z, buffers.slope_columns[i], forward_weights[i, :i])
            lins.append(flow.linearise(at, i, stage, buffers.slope_rows[i], buffers.value_rows[i]))
            if not self._checked:
                check_leaves(flow, lins[0])
                self._checked = True

        # Rows of `cotangents`: those of the stages' states, then λ, then those of the states inside the step.
        buffers.cotangents[s].copy_(adjoint)
        thetas = [(self.requested[k] - t) / dt for k, _ in inside]
        for j, (_, g) in enumerate(inside):
            buffers.cotangents[s + 1 + j].copy_(g)
        if inside:
            extra = torch.stack([self._dense.weights(theta) * dt for theta in thetas], dim=1).to(backward_weights)
            backward_weights = torch.cat((backward_weights, extra), dim=1)
        found: list[Cotangents] = [Cotangents(())] * s
        moments: list[Tensor] = []
        for i in reversed(range(s)):
            of_slope = torch.mv(buffers.later_columns[i], backward_weights[i, i + 1 :])
            if flow.time_grads:
                moments.append(torch.dot(of_slope, buffers.slopes[i]))
            found[i] = flow.pullback(at, i, lins[i], Row.of(of_slope, flow.rows), buffers.cotangent_rows[i])
            lins[i] = None  # type: ignore[call-overload]  # frees the stage's graph
        self.totals.add_params(found)
        of_times = self.totals.add_coefficients(times, found)
        if of_times is not None:
            for i, c in enumerate(found):
                if c.time is not None:
                    of_times[i] += c.time.to(of_times)
            of_dt = float(sum(moments)) / dt + float(of_times @ torch.tensor(transpose.nodes, dtype=torch.float64))
            self._add_times(t1, of_times, of_dt, dt, inside, thetas, buffers.slopes)
        elif flow.time_grads:
            raise AssertionError("time cotangents were asked for and not computed")
        return buffers.cotangents.sum(0)

    def _add_times(
        self,
        t1: float,
        of_times: Tensor,
        of_dt: float,
        dt: float,
        inside: Sequence[tuple[int, Tensor]],
        thetas: Sequence[float],
        slopes: Tensor,
    ) -> None:
        """Stage times are t + c_i dt, requested times inside the step θ = (t_k - t) / dt."""
        of_t = float(of_times.sum())
        for (k, g), theta in zip(inside, thetas, strict=True):
            rate = torch.mv(slopes.t(), self._dense.slopes(theta).to(slopes))  # dy/dθ over dt
            of_output = float(torch.dot(g, rate))
            self.times[k] += of_output
            of_t -= of_output
            of_dt -= theta * of_output
        last = len(self.requested) - 1
        self.times[0] += of_t
        if t1 == self.requested[last]:
            self.times[last] += of_dt
            self.times[0] -= of_dt


class _Transpose:
    """A tableau's rows for going forward again, its columns for going back, and the buffers for one step."""

    def __init__(self, tableau: Tableau, stages: int, flow: Flow) -> None:
        self.stages, self._rows = stages, flow.rows
        self.nodes = (*tableau.c, *tableau.extra_c)[:stages]
        rows = [list(row) for row in (*tableau.a, *tableau.extra_a)][:stages]
        b = [*tableau.b, *(0.0 for _ in tableau.extra_c)][:stages]
        square = torch.tensor([row + [0.0] * (stages - len(row)) for row in rows], dtype=torch.float64)
        b_column = torch.tensor(b, dtype=torch.float64).unsqueeze(1)
        self._forward = square.to(flow.device, flow.dtype)
        self._backward = torch.cat((square.t(), b_column), dim=1).contiguous().to(flow.device, flow.dtype)
        self._buffers: dict[int, _Buffers] = {}

    def weights(self, dt: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """dt a_ij, [s, s], and dt (a_ji | b_i), [s, s + 1]."""
        return self._forward * dt, self._backward * dt

    def buffers(self, like: Tensor, inside: int) -> _Buffers:
        """Buffers for a step with so many requested times inside; kept for the next step like it."""
        if inside not in self._buffers:
            self._buffers = {inside: _Buffers(self.stages, inside, self._rows, like)}
        return self._buffers[inside]


class _Buffers:
    def __init__(self, stages: int, inside: int, rows: int, like: Tensor) -> None:
        self.slopes, self.slope_rows = empty_rows(stages, rows, like)
        _, self.value_rows = empty_rows(stages, rows, like)
        self.cotangents, self.cotangent_rows = empty_rows(stages + 1 + inside, rows, like)
        self.slope_columns = [self.slopes[:i].t() for i in range(stages + 1)]
        self.later_columns = [self.cotangents[i + 1 :].t() for i in range(stages)]
