"""The forward solve of every strategy."""

from __future__ import annotations

from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.flow import Flow
from nesterov_triton.gradients.on_device import declined, on_device
from nesterov_triton.gradients.problem import Problem
from nesterov_triton.kernels import Path
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.status import SolveError, Status
from nesterov_triton.stepping import device_loop, first_order
from nesterov_triton.stepping.device_loop import DeviceLoop
from nesterov_triton.stepping.explicit_rk import ExplicitRK
from nesterov_triton.stepping.first_order import FirstOrderSteps
from nesterov_triton.stepping.fused_nystrom import FusedNystrom
from nesterov_triton.stepping.fused_rk import FusedFirstOrderRK, FusedMomentumRK
from nesterov_triton.stepping.loop import AcceptedStep, OnAccept, Progress, finite_everywhere, integrate
from nesterov_triton.stepping.nystrom import NystromStepper
from nesterov_triton.stepping.stepper import Stepper, TimeAxis
from nesterov_triton.tableaus import Tableau


def forward(
    problem: Problem,
    flow: Flow,
    on_accept: OnAccept | None = None,
    *,
    differentiable: bool = False,
    stepper: Stepper | None = None,
) -> list[Tensor]:
    """The states, [D] each, at the requested times after the first; counts into the problem's stats.

    Args:
        differentiable: out of place, visible to autograd.
        stepper: takes the steps, where it must be a certain one.

    Raises:
        SolveError: the last time was not reached.
    """
    own = "gradient='backprop' records every operation" if differentiable else ""
    own = own or ("Discrete(recompute=False) keeps the field's graphs" if stepper is not None else "")
    path = Path(False, own) if own else problem.path()
    problem.stats.path = str(path)
    progress = Progress()
    try:
        if not own:
            states = _on_device(problem, flow, on_accept, progress)
            if states is not None:
                return _checked(problem, states, progress)
        else:
            problem.stats.loop = f"eager: {own}"
        stepper = _stepper(problem, flow, path, differentiable) if stepper is None else stepper
        z = problem.z if differentiable else problem.z.detach()
        states = integrate(stepper, z, problem.times.tolist(), problem.options, progress, on_accept)
        if isinstance(stepper, ExplicitRK):
            stepper.release()
        return _checked(problem, states, progress)
    finally:
        problem.count(flow, progress)


def _checked(problem: Problem, states: list[Tensor], progress: Progress) -> list[Tensor]:
    """The states. Of the evaluations that dopri8's states inside a step take the loops' own checks see nothing.

    Raises:
        SolveError: one is not finite.
    """
    method = problem.method
    if len(states) > 1 and isinstance(method, Tableau) and len(method.interpolant) > method.stages:
        for k, state in enumerate(states[:-1]):
            if not finite_everywhere(state):
                t = float(problem.times[k + 1].detach())
                raise SolveError(Status.NON_FINITE, t, 0.0, progress.attempted, tuple(states[:k]))
    return states


def _stepper(problem: Problem, flow: Flow, path: Path, differentiable: bool) -> Stepper:
    # Given steps may go past the last time.
    dense = len(problem.times) > 2 or problem.options.grid is not None
    if path.kernels:
        return _fused(problem, flow, dense)
    moving = problem.times.requires_grad or transforms.carries(problem.times)
    axis = TimeAxis(problem.times) if differentiable and moving else None
    if isinstance(problem.method, Nystrom):
        return NystromStepper(
            problem.method, flow, problem.z, problem.tolerance, differentiable=differentiable, axis=axis
        )
    like = problem.z if differentiable else problem.z.detach()
    if axis is None and first_order.takes(problem.method, flow):
        return FirstOrderSteps(problem.tableau, flow, like, dense=dense, inside=problem.edge)
    return ExplicitRK(
        problem.tableau,
        flow,
        flow.rows,
        like,
        problem.tolerance,
        dense=dense,
        differentiable=differentiable,
        axis=axis,
        inside=problem.edge,
    )


def _fused(problem: Problem, flow: Flow, dense: bool) -> FusedFirstOrderRK | FusedMomentumRK | FusedNystrom:
    if isinstance(problem.method, Nystrom):
        return FusedNystrom(problem.method, flow, problem.tolerance)
    kind = FusedFirstOrderRK if flow.rows == 1 else FusedMomentumRK
    return kind(problem.tableau, flow, problem.tolerance, dense=dense)


def _on_device(problem: Problem, flow: Flow, on_accept: OnAccept | None, progress: Progress) -> list[Tensor] | None:
    """The states by a loop on the device; None where the eager loop is to make them."""
    if declined(problem, "forward"):
        return None
    times, z = problem.times.tolist(), problem.z.detach()
    inside, taped = len(times) - 2, on_accept is not None

    def make() -> DeviceLoop:
        return DeviceLoop(_fused(problem, flow, inside > 0), flow.rows, z, inside, taped)

    def solve(loop: DeviceLoop) -> tuple[list[Tensor], list[AcceptedStep]]:
        tape: list[AcceptedStep] = []
        progress.accepted, progress.rejected, progress.dt = 0, 0, None
        loop.bind(flow)
        keep = tape.append if taped else None
        return device_loop.integrate(loop, z, times, problem.tolerance, problem.options, progress, keep), tape

    found = on_device(problem, flow, "forward", (inside, taped), z, times[0], make, solve, lambda done: done[0])
    if found is None:
        progress.accepted, progress.rejected, progress.dt = 0, 0, None  # of a try that came to nothing
        return None
    states, tape = found
    for step in tape:
        assert on_accept is not None
        on_accept(step)
    return states
