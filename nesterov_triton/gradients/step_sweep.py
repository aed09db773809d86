"""The reverse sweep of fixed-step methods on first-order systems: each step as a whole, by autograd.

Such a step is a handful of sums around the field. Its graph goes back in one call of autograd, which costs less than to
transpose it by hand, stage by stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nesterov_triton.flow import Flow
from nesterov_triton.gradients.leaves import Sight
from nesterov_triton.gradients.totals import Totals, accumulate
from nesterov_triton.methods import Method
from nesterov_triton.network import vjp
from nesterov_triton.stepping import first_order
from nesterov_triton.stepping.first_order import FirstOrderSteps
from nesterov_triton.stepping.loop import AcceptedStep
from nesterov_triton.tableaus import Tableau


def goes_by_steps(method: Method, flow: Flow) -> bool:
    """Whether `StepSweep` is for them. It gives no gradients of the times."""
    return first_order.takes(method, flow) and not flow.time_grads


@dataclass
class Recorded:
    """A step with its graph: from a leaf to its end, and to requested states inside of it, by their index."""

    start: Tensor
    end: Tensor
    inside: dict[int, Tensor] = field(default_factory=dict)


class RecordedSteps(FirstOrderSteps):
    """Steps that are recorded, each from a leaf of its own.

    Attributes:
        last: the step just taken.
    """

    last: Recorded

    def __init__(self, tableau: Tableau, flow: Flow, like: Tensor, dense: bool, inside: torch.dtype | None) -> None:
        super().__init__(tableau, flow, like, dense=dense, inside=inside)
        self._sight = Sight(flow.params)

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated and without its graph."""
        start = z.detach().requires_grad_()
        with torch.enable_grad():
            self.last = Recorded(start, super().step(t, t1, start))
        self._sight.check(self.stages.stage(0), start)  # at every step: a field may use a tensor at some times only
        return self.last.end.detach()

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> list[Tensor]:
        """The states at `times` inside the step just taken, [D] each, without their graph."""
        with torch.enable_grad():
            states = super().interpolate(t, t1, self.last.start, times, indices)
        self.last.inside.update(zip(indices, states, strict=True))
        return [state.detach() for state in states]

    def taken(self, step: AcceptedStep, inside: bool) -> Recorded:
        """The step just accepted."""
        return self.last


class StepSweep:
    """Transposed steps; see `discrete.Sweep`.

    Attributes:
        products: vector-Jacobian products of the field so far.
    """

    times = None

    def __init__(self, tableau: Tableau, flow: Flow, times: Sequence[float], inside: torch.dtype | None) -> None:
        self.tableau, self.flow, self.requested, self._edge = tableau, flow, times, inside
        self.totals, self.products = Totals(flow), 0
        self._stepper: RecordedSteps | None = None

    def step(
        self,
        t: float,
        t1: float,
        z: Tensor,
        adjoint: Tensor,
        outputs: Sequence[tuple[int, Tensor]],
        taken: Recorded | None = None,
    ) -> Tensor:
        """The cotangent of the state `z` at t, [D], from that of the state at t1 and those of requested states.

        Args:
            outputs: (index of the requested time in (t, t1], cotangent [D]).
            taken: the step, where it need not be taken again.
        """
        inside = [k for k, _ in outputs if self.requested[k] != t1]
        if taken is None:
            taken = self._take(t, t1, z, inside)
        ends, grads = [taken.end], [adjoint]
        for k, g in outputs:
            if self.requested[k] == t1:
                grads[0] = grads[0] + g
            else:
                ends.append(taken.inside[k])
                grads.append(g)
        flow = self.flow
        through, *found = vjp(ends, (taken.start, *flow.params), grads, flow.network.retain)
        self.products += self.tableau.stages
        accumulate(self.totals.params, found)
        assert through is not None  # a step starts with the state itself
        return through

    def _take(self, t: float, t1: float, z: Tensor, inside: Sequence[int]) -> Recorded:
        """The step from z again."""
        if self._stepper is None:
            self._stepper = RecordedSteps(self.tableau, self.flow, z, True, self._edge)
        stepper = self._stepper
        stepper.step(t, t1, z)
        if inside:
            stepper.interpolate(t, t1, z, [self.requested[k] for k in inside], inside)
        return stepper.last

    def finish(self) -> None:
        """Every step has been taken."""
