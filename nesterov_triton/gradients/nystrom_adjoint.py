"""The continuous adjoint by the methods of `nystrom`: of a momentum system it is a momentum system again.

For x' = σ_x(m), m' = -γ m + F(t, x) and cotangents (a_x, a_m) of (x, m), let w = e^(-γ τ) a with the time τ since a
step began. Then positions and momenta

    X = (x, w_m),  M = (m, -w_x)    obey    X' = (σ_x(m), σ_x'(m) M_2),  M' = -γ M + (F(t, x), (∂F/∂x)ᵀ X_2)

a system of twice the size with the same damping, whose force sees the position alone and whose gate sees the momentum
alone. So a step is the method's own, with its order and its embedded error, and one evaluation of the field with its
transpose a force. It comes out in w; only its end is taken back to a. Here in plain torch; `fused_nystrom_adjoint` has
the same by the fused operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.flow import Cotangents, Flow
from nesterov_triton.force import Moments
from nesterov_triton.gradients.leaves import check_leaves
from nesterov_triton.gradients.quadratures import ParameterQuadratures
from nesterov_triton.gradients.totals import Totals
from nesterov_triton.nystrom import POINTS, Nystrom
from nesterov_triton.stepping.loop import AcceptedStep
from nesterov_triton.stepping.nystrom import FARTHEST, NystromStepper
from nesterov_triton.stepping.stepper import Tolerance, stage_times


class NystromAdjoint(NystromStepper):
    """Steps of (z, a) = (x, m, a_x, a_m), [2 D], and the quadratures of those that are accepted; see `Stepper`.

    Args:
        method: the method, which must fit the system (see `nystrom.check`).
        flow: the system, on leaves.
        like: a state, [D].
        tolerance: for the embedded error's norm, of [2 D]; None for fixed steps.
        totals: where the quadratures go.
    """

    def __init__(self, method: Nystrom, flow: Flow, like: Tensor, tolerance: Tolerance | None, totals: Totals) -> None:
        super().__init__(method, flow, torch.cat((like, like)), tolerance)
        self.totals = totals
        self._quadratures = ParameterQuadratures(method, totals)
        self._kept = [Cotangents(())] * method.stages  # without the parameters'
        self._growth = [1.0] * method.stages  # e^(γ τ) at the stages of the step under way

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        slope, self._first = self._slope(t, z, 0)
        return slope

    def probe(self, t: float, z: Tensor) -> Tensor:
        slope, _ = self._slope(t, z, 1)
        return slope

    def _slope(self, t: float, z: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The right-hand side, [2 D], and the force in it, [D], evaluated as stage `i`."""
        gamma, _ = self.flow.numbers
        self._begin(0.0)
        moments = self.layout.cut(self.layout.vector([t] * self.tableau.stages, 0.0).to(z.device, z.dtype)).at
        x, m = _inwards(z).view(2, -1).unbind(0)
        force = self._force(moments, i, x, torch.empty_like(x))
        undamped = force if self.layout.gated else force - gamma * gamma / 4 * x
        slope = _outwards(torch.cat((self._gate(m), undamped - gamma * m)), 1.0)
        slope.view(2, -1)[1].add_(z.view(2, -1)[1], alpha=gamma)  # a' = e^(γ τ) (w' + γ w)
        return slope, force

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        self._begin(t1 - t)
        return _outwards(super().step(t, t1, _inwards(z)), self._growth[-1])

    def _begin(self, h: float) -> None:
        gamma, _ = self.flow.numbers
        self._growth = [math.exp(min(gamma * c * h, FARTHEST)) for c in self.tableau.c]
        self._quadratures.begin()

    def _force(self, at: Moments, i: int, x: Tensor, out: Tensor) -> Tensor:
        """(F, (∂F/∂x)ᵀ X_2). What else there is to pull back is pulled back to, from the cotangent a_m itself."""
        growth = self._growth[i]
        position, of_momentum = x.view(2, -1).unbind(0)
        value, pulled = out.view(2, -1).unbind(0)
        lin = self.force.linearise(at, i, position, value)
        if i <= 1:  # once an attempt at least: a field may use a tensor at some times only
            check_leaves(self.flow, lin.network)
        found = self.force.pullback(at, i, lin, of_momentum * growth, wrt_params=self._quadratures.wants(i))
        torch.mul(found.x, 1 / growth, out=pulled)
        self._quadratures.add(i, found.params)
        linear = None if found.q is None else torch.stack((found.q, torch.zeros_like(found.q)))
        self._kept[i] = Cotangents((), scale=found.scale, drive=found.drive, linear=linear)
        return out

    def _gate(self, m: Tensor, out: Tensor | None = None) -> Tensor:
        """(σ_x(m), σ_x'(m) M_2) of momenta M, [..., D]."""
        gate = self.layout.system.gate_x
        momentum, other = m.view(*m.shape[:-1], 2, -1).unbind(-2)
        value = gate(momentum)
        found = torch.cat((value, gate.pullback(other, momentum, value)), dim=-1)
        return found if out is None else out.copy_(found)

    def _estimate(self, z: Tensor) -> Tensor:
        return _outwards(super()._estimate(z)[0], self._growth[-1]).unsqueeze(0)

    def accept(self) -> None:
        super().accept()
        assert self._first is not None
        self._first.view(2, -1)[1].mul_(self._growth[-1])

    def on_accept(self, step: AcceptedStep) -> None:
        """Add the quadratures of the step just taken."""
        t, h, method = step.t, step.t1 - step.t, self.tableau
        self._quadratures.accept(h)
        self.totals.add_coefficients(stage_times(t, step.t1, method.c), self._kept, [-h * b for b in method.b])
        self._kept[0] = self._kept[-1]
        if self.flow.coefficient_grads and "damping" in self.flow.scalars:
            times, weights = [t + point * h for point, _ in POINTS], [-h * weight for _, weight in POINTS]
            self.totals.add_coefficients(times, self._of_damping(step, times), weights)

    def _of_damping(self, step: AcceptedStep, times: Sequence[float]) -> list[Cotangents]:
        """The cotangents of -γ, a_m · m, at times inside the step, by dense output: no stage knows the momentum."""
        gamma, _ = self.flow.numbers
        found = []
        states = self.interpolate(step.t, step.t1, _inwards(step.z), times, range(len(times)))
        for t, state in zip(times, states, strict=True):
            _, w_m, m, _ = state.view(4, -1).unbind(0)
            product = torch.dot(w_m, m) * math.exp(gamma * (t - step.t))
            found.append(Cotangents((), linear=torch.stack((torch.zeros_like(product), product))))
        return found

    def finish(self) -> None:
        """Every step has been taken: bring the totals up to date."""
        self.totals.settle()


def _inwards(z: Tensor) -> Tensor:
    """(X, M), [2 D], at τ = 0 from (x, m, a_x, a_m)."""
    x, m, a_x, a_m = z.view(4, -1).unbind(0)
    return torch.cat((x, a_m, m, -a_x))


def _outwards(z: Tensor, growth: float) -> Tensor:
    """(x, m, a_x, a_m), [2 D], from (X, M) where e^(γ τ) is `growth`."""
    x, w_m, m, minus_w_x = z.view(4, -1).unbind(0)
    return torch.cat((x, m, minus_w_x * -growth, w_m * growth))
