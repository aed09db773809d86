"""The continuous adjoint: a second solve, backward in time, of state and cotangent together.

With a = ∂L/∂z the adjoint of z' = F(t, z) is a' = -(∂F/∂z)ᵀ a. For the momentum family this is again a momentum system
with the same damping, coupling and residual (Nguyen et al. 2022), and the transpose in `Flow.pullback` is its
right-hand side; `nystrom_adjoint` solves it by the methods for such systems.
The cotangents of parameters and scalars are quadratures: nothing depends on them, so they are summed over the accepted
steps beside the solve and stay out of its error norm (Kidger, Chen, Lyons 2021, "Hey, that's not an ODE").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from nesterov_triton import methods
from nesterov_triton._numbers import is_number, plain
from nesterov_triton.flow import Cotangents, Flow, OpenState, StageTimes
from nesterov_triton.gradients.forward import forward
from nesterov_triton.gradients.fused_adjoint import FusedAdjoint, FusedFirstOrderAdjoint, FusedMomentumAdjoint
from nesterov_triton.gradients.fused_nystrom_adjoint import FusedNystromAdjoint
from nesterov_triton.gradients.leaves import apart, check_cotangents, check_leaves, check_parameters, refuse_graph
from nesterov_triton.gradients.nystrom_adjoint import NystromAdjoint
from nesterov_triton.gradients.on_device import declined, on_device
from nesterov_triton.gradients.problem import Problem
from nesterov_triton.gradients.quadratures import ParameterQuadratures
from nesterov_triton.gradients.totals import Totals
from nesterov_triton.methods import Method
from nesterov_triton.nystrom import Nystrom, check
from nesterov_triton.ops.rows import Row
from nesterov_triton.status import SolveError
from nesterov_triton.stepping import controllers, device_loop
from nesterov_triton.stepping.device_loop import DeviceLoop
from nesterov_triton.stepping.explicit_rk import ExplicitRK, error_norm
from nesterov_triton.stepping.loop import AcceptedStep, LoopOptions, Progress, integrate
from nesterov_triton.stepping.stepper import Stepper, Tolerance, stage_times
from nesterov_triton.tableaus import Tableau


@dataclass(frozen=True)
class Adjoint:
    """Gradient from the adjoint equation, as accurate as its tolerances. Memory: independent of the number of steps.

    Args:
        rtol, atol: tolerances of the backward solve; None for the forward ones.
        method: its method; None for the forward one. A fixed-step method takes the forward step size; one for momentum
            systems does where there is one and no tolerance is given here.
        quadratures_in_norm: let the parameters' quadratures take part in the error control of the backward solve, as
            torchdiffeq does unless told otherwise; the norm is then the larger of the state's and theirs.
        options: what its loop is told; None for what the forward loop is told.
        measure: what an error is, in place of the tolerances: measure(errors, before, after) of sequences that hold the
            state's, [D], the cotangent's, [D], and with `quadratures_in_norm` those of each parameter that needs a
            gradient; a number or 0-d, at most 1 where a step is good enough.
    """

    rtol: float | None = None
    atol: float | None = None
    method: str | Method | None = None
    quadratures_in_norm: bool = False
    options: LoopOptions | None = None
    measure: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor | float] | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_number(value):
                raise TypeError(f"Adjoint {name} must be a positive number or None, got {value!r}")
            if not (value >= 0 if self.measure is not None else 0 < value < math.inf):
                raise ValueError(f"Adjoint {name} must be positive or None, got {value}")
            object.__setattr__(self, name, plain(value))
        if self.method is not None and isinstance(self._method(self.method), Nystrom) and self.quadratures_in_norm:
            raise ValueError(f"Adjoint method {self.method!r} keeps quadratures out of the norm; take 'dopri5'")

    def solve(self, problem: Problem) -> list[Tensor]:
        """The states at the requested times after the first, [D] each, with their graph."""
        rest = (*problem.scalars.values(), *problem.params)
        back = self.backward_problem(problem)
        states = _Adjoint.apply(problem, back, self, problem.z, problem.times, *rest)  # type: ignore[no-untyped-call]
        return list(states)

    @staticmethod
    def _method(method: str | Method) -> Method:
        return methods.get(method) if isinstance(method, str) else method

    def backward_problem(self, problem: Problem) -> Problem:
        """Method and tolerances of the backward solve.

        Raises:
            ValueError: a fixed-step method is asked for and the forward solve has no step size, or the reverse; or a
                method that does not fit the system, or what is asked of it.
        """
        method, options = problem.method, problem.options if self.options is None else self.options
        if self.method is not None:
            method = self._method(self.method)
            if isinstance(method, Nystrom):
                check(method, problem.system)
            usual, own = (controllers.get(methods.controller_of(m)) for m in (problem.method, method))
            if self.options is None and options.controller == usual:
                options = replace(options, controller=own)
        elif isinstance(method, Nystrom) and self.quadratures_in_norm:
            method = methods.GENERAL
        if isinstance(method, Nystrom) and problem.inside:
            raise ValueError(f"jumps of the field are not for Adjoint method {method.name!r}; take 'dopri5'")
        tolerance, given = problem.tolerance, [x for x in (self.rtol, self.atol) if x is not None]
        stepped = options.step_size is not None and isinstance(method, Nystrom) and not given
        if not method.adaptive or stepped:
            if options.step_size is None and self.options is None:
                raise ValueError(f"Adjoint method {method.name!r} takes fixed steps: pass step_size to the solve")
            return replace(problem, method=method, tolerance=None, options=options)
        if tolerance is None and len(given) < 2:
            raise ValueError(
                f"Adjoint method {method.name!r} is adaptive and the forward one is not: give it rtol and atol"
            )
        rtol = self.rtol if self.rtol is not None else tolerance.rtol  # type: ignore[union-attr]
        atol = self.atol if self.atol is not None else tolerance.atol  # type: ignore[union-attr]
        twice = [torch.cat((x, x)) if isinstance(x, Tensor) and x.ndim else x for x in (rtol, atol)]
        tolerance = Tolerance(twice[0], twice[1], None if self.measure is None else self._of_halves)
        return replace(problem, method=method, tolerance=tolerance, options=options)

    def _of_halves(self, error: Tensor, z: Tensor, z1: Tensor) -> Tensor | float:
        """`measure` of the joint state alone, [2 D]."""
        assert self.measure is not None
        return self.measure(*(x.view(2, -1).unbind(0) for x in (error, z, z1)))


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, back: Problem, strategy: Adjoint, z: Tensor, times: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        states = forward(problem, problem.flow())
        ctx.back, ctx.strategy = back, strategy
        ctx.save_for_backward(*rest, *problem.frozen, z, *states)
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_graph("adjoint's")
        problem: Problem = ctx.back
        check_parameters(problem)
        check_cotangents(cotangents)
        states = ctx.saved_tensors[-len(problem.times) :]
        needs = ctx.needs_input_grad[3:]
        n = len(problem.scalars)
        # The times' gradients come from the solution's slope at each of them, not from the stages.
        flow = problem.flow_back(time_grads=False, coefficient_grads=any(needs[2 : 2 + n]))
        try:
            with problem.without_autocast(), apart(flow.params):
                adjoint, of_times, totals = _solve_back(problem, flow, ctx.strategy, states, cotangents, needs[1])
        finally:
            problem.stats.nfe_backward += flow.network.evaluations
        return None, None, None, adjoint, of_times, *totals.scalars.values(), *totals.of_params()


Cotangent = tuple[Tensor, Tensor | None, Totals]  # of the first state, of the requested times, of all else


def _solve_back(
    problem: Problem,
    flow: Flow,
    strategy: Adjoint,
    states: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    wants_times: bool,
) -> Cotangent:
    objection = None
    if strategy.quadratures_in_norm and problem.tolerance is not None:
        objection = "the parameters' quadratures are to be in the norm"
    path = problem.backward_path(objection)
    given = problem, flow, states, cotangents, wants_times
    found = None if declined(problem, "adjoint", objection) else _by_device_loop(*given)
    if found is not None:
        return found
    stepper: Stepper
    quadratures: FusedAdjoint[Any] | NystromAdjoint | _AdjointDynamics
    if path.kernels:
        stepper = quadratures = _fused(problem, flow)
    elif isinstance(problem.method, Nystrom):
        stepper = quadratures = NystromAdjoint(problem.method, flow, states[0], problem.tolerance, Totals(flow))
    else:
        dynamics = quadratures = _AdjointDynamics(flow, problem.tableau, Totals(flow), states[0], objection is not None)
        like = torch.cat((states[0], states[0]))
        given_to = (problem.tableau, dynamics, 2 * flow.rows, like, problem.tolerance)
        if objection is None:
            stepper = ExplicitRK(*given_to, inside=problem.edge)
        else:
            stepper = _WithQuadratures(*given_to, inside=problem.edge, measure=strategy.measure)
    progress = Progress()

    def advance(joint: Tensor, t: float, t1: float) -> Tensor:
        stepper.restart()
        (end,) = integrate(stepper, joint, (t, t1), problem.options, progress, quadratures.on_accept)
        return end

    adjoint, of_times = _back(*given, advance)
    quadratures.finish()
    if isinstance(stepper, ExplicitRK):
        stepper.release()
    return adjoint, of_times, quadratures.totals


def _fused(problem: Problem, flow: Flow) -> FusedAdjoint[Any]:
    if isinstance(problem.method, Nystrom):
        return FusedNystromAdjoint(problem.method, flow, problem.tolerance, Totals(flow))
    kind = FusedFirstOrderAdjoint if flow.rows == 1 else FusedMomentumAdjoint
    return kind(problem.tableau, flow, problem.tolerance, Totals(flow))


def _by_device_loop(
    problem: Problem,
    flow: Flow,
    states: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    wants_times: bool,
) -> Cotangent | None:
    """The same decided on the device; None where the eager loop is to do it after all."""
    grads = flow.coefficient_grads
    own = problem.flow_back(time_grads=False, coefficient_grads=grads, aliased=problem.z.device.type == "cuda")

    def solve(loop: DeviceLoop) -> Cotangent:
        loop.bind(own)
        stepper = cast(FusedAdjoint[Any], loop.stepper)
        progress = Progress()

        def advance(joint: Tensor, t: float, t1: float) -> Tensor:
            return device_loop.integrate(loop, joint, (t, t1), problem.tolerance, problem.options, progress)[-1]

        adjoint, of_times = _back(problem, flow, states, cotangents, wants_times, advance)
        stepper.finish()
        totals = Totals(own)
        totals.take(stepper.totals)
        return adjoint, of_times, totals

    def make() -> DeviceLoop:
        return DeviceLoop(_fused(problem, own), 2 * own.rows, torch.cat((states[0], states[0])))

    found = on_device(
        problem, own, "adjoint", (grads, len(states) > 2), states[-1], float(problem.times[-1]), make, solve,
        lambda done: [done[0], *done[2].params],
    )  # fmt: skip
    flow.network.evaluations += own.network.evaluations
    return found


def _back(
    problem: Problem,
    flow: Flow,
    states: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    wants_times: bool,
    advance: Callable[[Tensor, float, float], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Cotangents of the first state and of the requested times; `advance` solves for (z, a), [2 D], from one requested
    time to the one before it."""
    times = problem.times.tolist()
    adjoint = torch.zeros_like(states[0])
    of_times = torch.zeros(len(times), dtype=torch.float64, device="cpu") if wants_times else None
    for k in range(len(times) - 1, 0, -1):
        g = cotangents[k - 1]
        if g is not None:
            if of_times is not None:  # y(t_k) moves along the solution
                of_times[k] += float(torch.sum(g * _slope(flow, times[k], states[k])))
            adjoint = adjoint + g
        try:
            end = advance(torch.cat((states[k], adjoint)), times[k], times[k - 1])
        except SolveError as e:
            raise SolveError(e.status, e.t, e.dt, e.steps, where="the adjoint's backward solve") from None
        adjoint = end[states[0].numel() :]
    if of_times is not None:
        of_times[0] -= float(torch.sum(adjoint * _slope(flow, times[0], states[0])))
    return adjoint, of_times


def _slope(flow: Flow, t: float, z: Tensor) -> Tensor:
    return torch.cat(tuple(flow.derivative(flow.at((t,)), 0, flow.open(z))))


class _AdjointDynamics:
    """The right-hand side of (z, a), [2 D], in plain torch, and the quadratures of its accepted steps."""

    def __init__(self, flow: Flow, tableau: Tableau, totals: Totals, like: Tensor, with_errors: bool) -> None:
        self.flow, self.tableau, self.totals = flow, tableau, totals
        self.quadratures = ParameterQuadratures(tableau, totals, with_errors)
        self._kept: list[Cotangents] = [Cotangents(())] * tableau.stages  # without the parameters'
        self._values = Row.of(like.clone(), flow.rows)

    @property
    def copies(self) -> bool:
        return self.flow.copies

    def at(self, times: Sequence[float] | Tensor) -> StageTimes:
        self.quadratures.begin()
        return self.flow.at(times)

    def open(self, z: Tensor) -> OpenState:
        # Of the joint state only the flat tensor is read; its halves are opened where they are used.
        return OpenState(z, (), (), z)

    def derivative(self, at: StageTimes, i: int, z: OpenState, out: Row | None = None) -> Sequence[Tensor]:
        assert out is not None
        flow = self.flow
        state, adjoint = z.flat.view(2, -1).unbind(0)
        slope, of_state = out.split()
        lin = flow.linearise(at, i, flow.open(state), slope, self._values)
        if i <= 1:  # once an attempt at least: a field may use a tensor at some times only
            check_leaves(flow, lin.network)
        adjoint_row = Row.of(adjoint, flow.rows)
        found = flow.pullback(at, i, lin, adjoint_row, of_state, wrt_params=self.quadratures.wants(i))
        self.quadratures.add(i, found.params)
        found.params = ()
        self._kept[i] = found
        of_state.flat.neg_()
        return out.parts

    def on_accept(self, step: AcceptedStep) -> None:
        dt = step.t1 - step.t
        self.quadratures.accept(dt)
        weights = [-dt * w for w in self.tableau.b]
        self.totals.add_coefficients(stage_times(step.t, step.t1, self.tableau.c), self._kept, weights)
        if self.tableau.fsal:
            self._kept[0] = self._kept[-1]

    def finish(self) -> None:
        """Every step has been taken: bring the totals up to date."""
        self.totals.settle()


class _WithQuadratures(ExplicitRK):
    """Steps whose error norm counts the parameters' quadratures too; `measure` is `Adjoint`'s."""

    def __init__(self, *args: Any, measure: Any = None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._measure = measure

    def error(self, z: Tensor, z1: Tensor) -> float:
        if self._measure is not None:
            return self._measured(z, z1)
        norm = super().error(z, z1)
        dynamics, tolerance = self.dynamics, self.tolerance
        assert isinstance(dynamics, _AdjointDynamics)
        assert tolerance is not None
        if not dynamics.totals.params:
            return norm

        def flat(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([x.reshape(-1).to(z.dtype) for x in tensors])

        before = flat(dynamics.totals.params)
        rows = [self.dt * flat(sums) for sums in dynamics.quadratures.sums]
        size = torch.maximum(before.abs(), (before - rows[0]).abs())
        # A tolerance that differs from element to element of the state says nothing of parameters: its smallest.
        own = [x if not isinstance(x, Tensor) else x.min() for x in (tolerance.rtol, tolerance.atol)]
        return max(norm, error_norm(torch.stack(rows[1:]), size, *own))

    def _measured(self, z: Tensor, z1: Tensor) -> float:
        dynamics = self.dynamics
        assert isinstance(dynamics, _AdjointDynamics)
        sums, before = dynamics.quadratures.sums, dynamics.totals.params
        # The integrals run backward in time: a total grows by -dt times the weighted sum.
        after = torch._foreach_add(before, sums[0], alpha=-self.dt) if before else []
        errors = torch._foreach_mul(sums[1], -self.dt) if before else []
        state, old, new = (x.view(2, -1).unbind(0) for x in (self._estimate(z)[0], z, z1))
        return float(self._measure((*state, *errors), (*old, *before), (*new, *after)))
