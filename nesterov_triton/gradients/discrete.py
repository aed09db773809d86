"""The exact gradient of the accepted steps.

The forward pass keeps the state at the start of each accepted step. The backward pass takes the steps in reverse: it
computes a step's stages again, each with the network's graph, and then transposes the step by hand. With λ the
cotangent of the new state and c_i those of the stages' states,

    c(k_i) = dt ( b_i λ + Σ_j>i a_ji c_j ),      c_i = (∂F/∂z)ᵀ c(k_i),      λ ← λ + Σ_i c_i.

Step sizes count as constants: the whole grid moves with the first time, and the last step ends at the last time. Memory
is one state an accepted step, and one step's graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.flow import Cotangents, Flow, Linearisation, OpenState, StageTimes
from nesterov_triton.gradients.device_sweep import DeviceNystromSweep, DeviceSweep
from nesterov_triton.gradients.forward import forward
from nesterov_triton.gradients.fused_nystrom_sweep import FusedNystromSweep
from nesterov_triton.gradients.fused_sweep import FusedFirstOrderSweep, FusedMomentumSweep
from nesterov_triton.gradients.leaves import (
    apart,
    check_cotangents,
    check_leaves,
    check_parameters,
    refuse_unseen,
)
from nesterov_triton.gradients.nystrom_sweep import KeptNystrom, NystromSweep, given
from nesterov_triton.gradients.on_device import declined, on_device
from nesterov_triton.gradients.problem import Problem, ways_between
from nesterov_triton.gradients.step_sweep import RecordedSteps, StepSweep, goes_by_steps
from nesterov_triton.gradients.totals import Totals, accumulate
from nesterov_triton.network import Seen
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import runge_kutta
from nesterov_triton.ops.rows import Row, empty_rows
from nesterov_triton.status import Stats
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.explicit_rk import ExplicitRK, StageBuffer
from nesterov_triton.stepping.fused_rk import Overwritten, is_overwritten
from nesterov_triton.stepping.loop import AcceptedStep, LoopOptions
from nesterov_triton.stepping.scratch import SHELF
from nesterov_triton.stepping.stepper import Tolerance, stage_times
from nesterov_triton.tableaus import Tableau


@dataclass(frozen=True)
class Discrete:
    """Gradient of the computed solution itself: exact to rounding, no error control and no rejected step in the
    backward pass. The default.

    Args:
        recompute: in the backward pass the field is called again, step by step. Memory: one state for each accepted
            step, and one step's graph; the field must give the same output for the same input (no dropout inside).
            False keeps the field's graphs from the forward pass, which saves their time: memory as that of a
            network as deep as the accepted steps have evaluations. Steps are then taken in plain torch, by the eager
            loop; torch.compile calls the field again all the same.

    Second derivatives (create_graph=True) are autograd's through the same steps, taken again with every operation kept.
    """

    recompute: bool = True

    def solve(self, problem: Problem) -> list[Tensor]:
        """The states at the requested times after the first, [D] each, with their graph."""
        rest = (*problem.scalars.values(), *problem.params)
        keep = not self.recompute
        states = _Discrete.apply(problem, keep, problem.z, problem.times, *rest)  # type: ignore[no-untyped-call]
        return list(states)


Spans = Sequence[tuple[float, float, tuple[int, ...]]]  # t, t1, and the requested times in (t, t1], of each step


class _Discrete(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, keep: bool, z: Tensor, times: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        tape: list[AcceptedStep] = []
        ctx.kept = ctx.first = None
        if keep and not ways_between(problem.params):  # a graph behind parameters is cut off while a solve goes back
            ctx.kept = kept = Kept(problem, _back_flow(problem, ctx.needs_input_grad))
            states = forward(problem, kept.flow, kept.on_accept(tape), stepper=kept.stepper)
            states = [z.clone() for z in states]  # or graphs would hold what holds them, and never go
        else:
            flow = problem.flow(remember=True)
            states = forward(problem, flow, tape.append)
            ctx.first = flow.network.first
        ctx.problem = problem
        ctx.spans = [(step.t, step.t1, step.outputs) for step in tape]
        # Saved as autograd saves: outputs without a reference cycle, parameters with a check that nobody changed them.
        ctx.save_for_backward(*rest, *problem.frozen, *(step.z for step in tape))
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        check_parameters(problem)
        check_cotangents(cotangents)
        if torch.is_grad_enabled():
            return (None, None, *_with_graph(problem, ctx.spans, cotangents))
        starts = ctx.saved_tensors[-len(ctx.spans) :]
        wants_times = ctx.needs_input_grad[3]
        kept: Kept | None = ctx.kept
        if kept is not None:  # once: its graphs go as they are used
            ctx.kept = None
            with problem.without_autocast(), apart(kept.flow.params):
                adjoint, of_times, totals = kept.back(ctx.spans, starts, cotangents)
            problem.stats.path_backward, problem.stats.loop_backward = problem.stats.path, problem.stats.loop
            return None, None, adjoint, of_times if wants_times else None, *totals.scalars.values(), *totals.of_params()
        flow = _back_flow(problem, ctx.needs_input_grad)
        objection = "gradients with respect to times are wanted" if wants_times else None
        path = problem.backward_path(objection)
        try:
            with problem.without_autocast(), apart(flow.params):
                found = _on_device(problem, flow, objection, ctx.spans, starts, cotangents)
                if found is None:
                    found = _one_by_one(problem, flow, path.kernels, ctx.spans, starts, cotangents, ctx.first)
        finally:
            problem.stats.nfe_backward += flow.network.evaluations
        adjoint, of_times, totals = found
        return None, None, adjoint, of_times if wants_times else None, *totals.scalars.values(), *totals.of_params()


def _back_flow(problem: Problem, needs: Sequence[bool]) -> Flow:
    """For a backward pass that owes these of `_Discrete`'s arguments a gradient."""
    n = len(problem.scalars)
    return problem.flow_back(time_grads=needs[3], coefficient_grads=needs[3] or any(needs[4 : 4 + n]))


def _with_graph(problem: Problem, spans: Spans, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The cotangents of the problem's inputs with their own graph, for second derivatives (create_graph=True)."""
    if problem.stand_ins:
        raise RuntimeError("second derivatives with tensors in args need gradient='backprop'")
    given = [g for g in cotangents if g is not None]
    present = [g is not None for g in cotangents]
    found = _Second.apply(problem, spans, present, *problem.inputs, *given)  # type: ignore[no-untyped-call]
    return tuple(found)


class _Second(torch.autograd.Function):
    """The same steps taken again by autograd, with every operation kept, from leaves: so that what leads to the inputs
    stays out of it."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, spans: Spans, present: Sequence[bool], *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        n = len(problem.inputs)
        own = n - len(problem.params)  # the state, the times and the scalars; the field has the parameters itself
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors[:own]]
        given = [g.detach().requires_grad_() for g in tensors[n:]]
        grid = [spans[0][0], *(t1 for _, t1, _ in spans)]
        again = replace(
            problem,
            z=leaves[0],
            times=leaves[1],
            scalars=dict(zip(problem.scalars, leaves[2:], strict=True)),
            options=LoopOptions(problem.options.controller, grid=lambda _: grid, max_steps=len(spans)),
            tolerance=None,
            stats=Stats(),
        )
        with torch.enable_grad(), problem.without_autocast(), apart(problem.params):
            states = [
                z for z, used in zip(forward(again, again.flow(), differentiable=True), present, strict=True) if used
            ]
            inputs = [*leaves, *problem.params]
            for z in states:
                refuse_unseen(z, inputs)
            wanted = [x for x in inputs if x.requires_grad]
            first = torch.autograd.grad(states, wanted, given, create_graph=True, allow_unused=True)
        problem.stats.nfe_backward += again.stats.nfe_forward
        problem.stats.path_backward = again.stats.path
        ctx.first, ctx.leaves, ctx.wanted = first, [*inputs, *given], [x.requires_grad for x in inputs]
        ctx.params = problem.params
        each = iter(first)
        found = [next(each) if x.requires_grad else None for x in inputs]
        return tuple(None if g is None else g.detach() for g in found)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("third derivatives need gradient='backprop'")
        asked = [g for g, wanted in zip(cotangents, ctx.wanted, strict=True) if wanted]
        pairs = [
            (x, g) for x, g in zip(ctx.first, asked, strict=True) if x is not None and g is not None and x.requires_grad
        ]
        leaves = [x for x in ctx.leaves if x.requires_grad]
        if not pairs:
            return (None,) * (3 + len(ctx.leaves))
        with apart(ctx.params):
            grads = torch.autograd.grad(
                [x for x, _ in pairs], leaves, [g for _, g in pairs], retain_graph=True, allow_unused=True
            )
        each = iter(grads)
        return None, None, None, *(next(each) if x.requires_grad else None for x in ctx.leaves)


Cotangent = tuple[Tensor, Tensor | None, Totals]  # of the first state, of the requested times, of all else


def _one_by_one(
    problem: Problem,
    flow: Flow,
    kernels: bool,
    spans: Spans,
    starts: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    first: Seen | None,
) -> Cotangent:
    """The sweep over the accepted steps: t, t1 and the requested times in (t, t1] of each, and where it started.

    Args:
        first: what the field gave first in the forward pass, if that was kept: it must give it again.
    """
    method, times, begin = problem.method, problem.times.tolist(), spans[0][0]
    if isinstance(method, Nystrom) and not kernels:
        own = NystromSweep(method, flow, times)
        adjoint = torch.zeros_like(problem.z)
        for (t, t1, outputs), z in zip(reversed(spans), reversed(starts), strict=True):
            if t == begin:
                flow.network.expected = first
            adjoint = own.forth_and_back(t, t1, z, adjoint, given(outputs, cotangents))
        return own.finish(adjoint), own.times, own.totals

    def back(copies: bool) -> Cotangent:
        if isinstance(method, Nystrom):
            fused = FusedNystromSweep(method, flow, times, copies)
            return fused.back(spans, starts, cotangents), None, fused.totals
        sweep = _sweep(kernels, problem, flow, copies)
        adjoint = torch.zeros_like(problem.z)
        for (t, t1, outputs), z in zip(reversed(spans), reversed(starts), strict=True):
            if t == begin:
                flow.network.expected = first
            adjoint = sweep.step(t, t1, z, adjoint, given(outputs, cotangents))
        sweep.finish()
        return adjoint, sweep.times, sweep.totals

    try:
        return back(False)
    except (Overwritten, RuntimeError) as error:
        if not kernels or not is_overwritten(error):
            raise
        return back(True)


def _on_device(
    problem: Problem,
    flow: Flow,
    objection: str | None,
    spans: Spans,
    starts: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> Cotangent | None:
    """The same by a sweep that can be captured; None where the steps are to be taken one by one."""
    if declined(problem, "reverse sweep", objection):
        return None
    times, grads = problem.times.tolist(), flow.coefficient_grads
    own = problem.flow_back(time_grads=False, coefficient_grads=grads, aliased=problem.z.device.type == "cuda")

    def make() -> DeviceSweep | DeviceNystromSweep:
        if isinstance(problem.method, Nystrom):
            return DeviceNystromSweep(FusedNystromSweep(problem.method, own, times), starts[0])
        kind = FusedFirstOrderSweep if own.rows == 1 else FusedMomentumSweep
        return DeviceSweep(kind(problem.tableau, own, times), starts[0])

    def solve(loop: DeviceSweep | DeviceNystromSweep) -> Cotangent:
        loop.bind(own, times)
        adjoint = loop.run(spans, starts, cotangents)
        totals = Totals(own)
        totals.take(loop.sweep.totals)
        return adjoint, None, totals

    found = on_device(
        problem, own, "reverse sweep", grads, starts[0], spans[0][0], make, solve,
        lambda done: [done[0], *done[2].params],
    )  # fmt: skip
    flow.network.evaluations += own.network.evaluations
    return found


class Taken(NamedTuple):
    """A step's stages: linearised, and their slopes, [s, D]."""

    lins: list[Linearisation]
    slopes: Tensor


class Kept:
    """Steps that keep the field's graphs on their way forward, and go back by them.

    Attributes:
        flow: the system, on leaves.
        stepper: takes the steps.
    """

    def __init__(self, problem: Problem, flow: Flow) -> None:
        self.flow, self._problem = flow, problem
        method, times = problem.method, problem.times.tolist()
        self._sweep: NystromSweep | ReverseSweep | StepSweep
        self.stepper: KeptNystrom | _KeptRK | RecordedSteps
        dense = len(times) > 2 or problem.options.grid is not None
        if isinstance(method, Nystrom):
            self._sweep = NystromSweep(method, flow, times)
            self.stepper = KeptNystrom(self._sweep, problem.z, problem.tolerance)
        elif goes_by_steps(method, flow):
            self._sweep = StepSweep(method, flow, times, problem.edge)
            self.stepper = RecordedSteps(method, flow, problem.z.detach(), dense, problem.edge)
        else:
            self._sweep = ReverseSweep(method, flow, times, problem.edge)
            self.stepper = _KeptRK(method, flow, problem.z, problem.tolerance, dense, problem.edge)
        self._taken: list[Any] = []

    def on_accept(self, tape: list[AcceptedStep]) -> Callable[[AcceptedStep], None]:
        """What appends a step to the tape, and keeps its graphs."""
        times = self._problem.times.tolist()

        def keep(step: AcceptedStep) -> None:
            tape.append(step)
            # A requested time at the end of a step, the last one apart, moves inside of it all the same.
            moving = range(len(times) - 1) if self.flow.time_grads else ()
            inside = any(times[k] != step.t1 or k in moving for k in step.outputs)
            self._taken.append(self.stepper.taken(step, inside))

        return keep

    def back(self, spans: Spans, starts: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Cotangent:
        """The sweep over the steps; once."""
        sweep, adjoint = self._sweep, torch.zeros_like(starts[0])
        for (t, t1, outputs), z in zip(reversed(spans), reversed(starts), strict=True):
            at_times = given(outputs, cotangents)
            if isinstance(sweep, NystromSweep):
                adjoint = sweep.transpose(self._taken.pop(), adjoint, at_times)
            else:
                adjoint = sweep.step(t, t1, z, adjoint, at_times, self._taken.pop())
        if isinstance(sweep, NystromSweep):
            adjoint = sweep.finish(adjoint)
        else:
            sweep.finish()
        self._problem.stats.nfe_backward += sweep.products
        return adjoint, sweep.times, sweep.totals


class _KeptRK(ExplicitRK):
    """Steps whose stages are linearised, each in memory of its own."""

    def __init__(
        self,
        tableau: Tableau,
        flow: Flow,
        like: Tensor,
        tolerance: Tolerance | None,
        dense: bool,
        inside: torch.dtype | None,
    ) -> None:
        super().__init__(tableau, flow, flow.rows, like, tolerance, dense=dense, inside=inside)
        self._flow, self._count = flow, self.dense.stages if dense else tableau.stages
        self._between = None
        self._slope = like  # of the state to go on from, where that is known
        self._fresh()

    def _fresh(self) -> None:
        self.stages = self._buffer = StageBuffer(self._count, self._flow.rows, self._like)
        _, self._values = empty_rows(self._count, self._flow.rows, self._like)
        self._lins: dict[int, Linearisation] = {}

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated."""
        first = (self._lins[0], self._slope) if self._has_first else None
        self._fresh()
        if first is not None:
            self._lins[0] = first[0]
            self._buffer.out(0).flat.copy_(first[1])
        z1 = super().step(t, t1, z)
        self._slope = self.stages.stage(0)  # for another try
        return z1

    def taken(self, step: AcceptedStep, inside: bool) -> Taken:
        """The step just accepted; `inside` where requested states depend on all of its stages."""
        if inside:
            self._all_stages(step.t, step.t1, step.z)
        lins, last = [self._lins[i] for i in range(len(self._lins))], self.tableau.stages - 1
        if inside and self.tableau.fsal:  # the last stage then goes back twice, and a way back may use up the values
            lins[last].network.retain = True
            values = Row.of(lins[last].values.flat.clone(), self._flow.rows)
            lins[last] = replace(lins[last], values=values)
        return Taken(lins, self.stages.columns(len(lins)).t())

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""
        last = self.tableau.stages - 1
        self._has_first = self.tableau.fsal
        if self.tableau.fsal:
            self._lins, self._slope = {0: self._lins[last]}, self.stages.stage(last)
        if self._estimates is not None:
            self._estimates.accept()

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [D]; kept as the first stage."""
        self._slope = super().first_derivative(t, z)
        return self._slope

    def _put(self, at: StageTimes, i: int, z: OpenState) -> None:
        lin = self._flow.linearise(at, i, z, self._buffer.out(i), self._values[i])
        if i <= 1:  # at every step: a field may use a tensor at some times only
            check_leaves(self._flow, lin.network)
        self._lins[i] = lin


class Sweep(Protocol):
    """Transposed Runge-Kutta steps, last first.

    Attributes:
        totals: the cotangents of parameters and scalars so far.
        times: the cotangents of the requested times so far, [n] float64 on the CPU; None where they are not computed.
    """

    totals: Totals

    @property
    def times(self) -> Tensor | None: ...

    def step(self, t: float, t1: float, z: Tensor, adjoint: Tensor, outputs: Sequence[tuple[int, Tensor]]) -> Tensor:
        """The cotangent of the state `z` at t, [D], from that of the state at t1 and those of requested states.

        Args:
            outputs: (index of the requested time in (t, t1], cotangent [D]).
        """

    def finish(self) -> None:
        """Every step has been taken: bring the totals up to date."""


def _sweep(kernels: bool, problem: Problem, flow: Flow, copies: bool) -> Sweep:
    tableau, times = problem.tableau, problem.times.tolist()
    if not kernels:
        return (StepSweep if goes_by_steps(tableau, flow) else ReverseSweep)(tableau, flow, times, problem.edge)
    return (FusedFirstOrderSweep if flow.rows == 1 else FusedMomentumSweep)(tableau, flow, times, copies)


class ReverseSweep:
    """Transposed steps in plain torch; see `Sweep`.

    Attributes:
        products: vector-Jacobian products of the field so far.
    """

    def __init__(self, tableau: Tableau, flow: Flow, times: Sequence[float], inside: torch.dtype | None = None) -> None:
        self.tableau, self.flow, self.requested, self._edge = tableau, flow, times, inside
        self.totals = Totals(flow)
        self.times = torch.zeros(len(times), dtype=torch.float64, device="cpu")
        self._dense = dense_output(tableau)
        self._transpose: _Transpose | None = None
        self._key: Hashable = None
        self._like = torch.empty(0)
        self.products = 0

    def step(
        self,
        t: float,
        t1: float,
        z: Tensor,
        adjoint: Tensor,
        outputs: Sequence[tuple[int, Tensor]],
        taken: Taken | None = None,
    ) -> Tensor:
        """The cotangent of the state `z` at t, [D], from that of the state at t1 and those of requested states.

        Args:
            outputs: (index of the requested time in (t, t1], cotangent [D]).
            taken: the step, where it need not be taken again.
        """
        flow, dt = self.flow, t1 - t
        # A requested time at the end of a step, the last one apart, moves inside the step all the same.
        moves = range(len(self.requested) - 1) if flow.time_grads else ()
        inside = [(k, g) for k, g in outputs if self.requested[k] != t1 or k in moves]
        thetas = [(self.requested[k] - t) / dt for k, _ in inside]
        step = self._buffers(len(inside), z)
        step.scale(dt, [self._dense.weights(theta) for theta in thetas])
        times = stage_times(t, t1, step.nodes, self._edge)
        at = flow.at(times)

        if taken is None:
            taken = self._take(at, z, step)
        lins, slopes = taken.lins[: step.stages], taken.slopes[: step.stages]
        s = step.stages
        step.cotangents[s].flat.copy_(adjoint)
        for k, g in outputs:
            if self.requested[k] == t1 and k not in moves:
                step.cotangents[s].flat.add_(g)
        for j, (_, g) in enumerate(inside):
            step.cotangents[s + 1 + j].flat.copy_(g)
        found: list[Cotangents] = []
        moments = 0.0
        for i in reversed(range(s)):
            of_slope = step.of_slope
            torch.mv(step.later_cotangents[i], step.backward[i], out=of_slope.flat)
            if flow.time_grads:
                moments += float(torch.dot(of_slope.flat, slopes[i]))
            # Popped, so that the stage's graph goes when it has been used.
            found.append(flow.pullback(at, i, lins.pop(), of_slope, step.cotangents[i]))
            self.products += 1
            # At once: a stage's cotangents are as large as the network.
            accumulate(self.totals.params, found[-1].params)
            found[-1].params = ()
        found.reverse()
        of_times = self.totals.add_coefficients(times, found)
        if of_times is not None:
            of_dt = moments / dt + float(of_times @ of_times.new_tensor(step.nodes))
            self._add_times(t1, of_times, of_dt, dt, inside, thetas, slopes)
        return step.all_cotangents.sum(0)

    def _take(self, at: StageTimes, z: Tensor, step: _Transpose) -> Taken:
        """The step from z again, with the network's graph at every stage."""
        flow, lins = self.flow, list[Linearisation]()
        for i in range(step.stages):
            state = flow.open(z) if i == 0 else step.states[i - 1]
            if i > 0:
                runge_kutta.combine(z, step.earlier_slopes[i], step.forward[i], out=state.flat)
            lin = flow.linearise(at, i, state, step.slopes[i], step.values[i])
            if i == 0:  # at every step: a field may use a tensor at some times only
                check_leaves(flow, lin.network)
            lins.append(lin)
        return Taken(lins, step.all_slopes)

    def finish(self) -> None:
        """Every step has been taken: bring the totals up to date."""
        self.totals.settle()
        self._give_back()

    def _buffers(self, inside: int, like: Tensor) -> _Transpose:
        """Tables and buffers for a step with so many requested times inside; kept for the next step like it."""
        # A last stage without weight (FSAL) is evaluated for the error only: nothing to differentiate.
        stages = self._dense.stages if inside else self.tableau.stages - (self.tableau.b[-1] == 0)
        held, flow = self._transpose, self.flow
        if held is None or len(held.cotangents) != stages + 1 + inside or held.stages != stages:
            self._give_back()
            views = flow.rows, flow.system.sees_momentum, flow.shape
            self._key, self._like = (self.tableau, stages, inside, *views, like.dtype), like
            held = SHELF.take(self._key, like, lambda: _Transpose(self.tableau, stages, inside, flow, like))
            self._transpose = held
        return held

    def _give_back(self) -> None:
        if self._transpose is not None:
            SHELF.put(self._key, self._like, self._transpose)
            self._transpose = None

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
    """A tableau's rows for going forward again and its columns for going back, times dt, and the buffers of one step.

    Attributes:
        stages: how many stages are evaluated.
        nodes: their c_i.
        forward: dt a_ij for j < i, a row a stage.
        backward: dt (a_ji for j > i, b_i, and the weights of the states inside the step), a row a stage.
        states: the states of all stages but the first, with their views.
        slopes, values, cotangents: rows for the stages' k_i, for their gates' values, and for the cotangents of the
            stages' states, of the new state λ, and of the states inside the step, in this order.
        of_slope: a row for c(k_i).
    """

    def __init__(self, tableau: Tableau, stages: int, inside: int, flow: Flow, like: Tensor) -> None:
        rows = flow.rows
        self.stages = s = stages
        self.nodes = (*tableau.c, *tableau.extra_c)[:s]
        self._square, self._transposed = square(tableau, s, like.dtype, like.device)
        self._weights = weights = like.new_empty((s, s))
        self._back = back = like.new_empty((s, s + 1 + inside))
        self._back_of_step = back[:, : s + 1]
        self.forward = [weights[i, :i] for i in range(s)]
        self.backward = [back[i, i + 1 :] for i in range(s)]
        self.states = [flow.open(torch.empty_like(like)) for _ in range(s - 1)]
        slopes, self.slopes = empty_rows(s, rows, like)
        values, self.values = empty_rows(s, rows, like)
        cotangents, self.cotangents = empty_rows(s + 1 + inside, rows, like)
        self.of_slope = Row.of(torch.empty_like(like), rows)
        self.all_slopes, self.all_cotangents = slopes, cotangents
        self.earlier_slopes = [slopes[:i].t() for i in range(s)]
        self.later_cotangents = [cotangents[i + 1 :].t() for i in range(s)]
        self.nbytes = s * like.nbytes + slopes.nbytes + values.nbytes + cotangents.nbytes

    def scale(self, dt: float, inside: Sequence[Tensor]) -> None:
        """Set the weights for a step size and the interpolation weights, [stages] each, of the states inside."""
        torch.mul(self._square, dt, out=self._weights)
        torch.mul(self._transposed, dt, out=self._back_of_step)
        for j, weights in enumerate(inside):
            self._back[:, self.stages + 1 + j].copy_(weights * dt)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def square(tableau: Tableau, stages: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """a_ij of so many stages, [s, s] with zeros where the method has none; a_ji and b_i, [s, s + 1]. Made once."""
    rows = [[*row, *[0.0] * (stages - len(row))] for row in (*tableau.all_a[:stages], tableau.b[:stages])]
    numbers = torch.tensor(rows, dtype=torch.float64, device="cpu").to(device, dtype)
    return transforms.plain(numbers[:-1]), transforms.plain(numbers.t().contiguous())
