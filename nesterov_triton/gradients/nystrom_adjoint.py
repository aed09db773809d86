"""Steps of the adjoint of a momentum system by the methods of `nystrom`.

The adjoint of  x' = σ_x(m),  m' = -γ m + F(t, x)  is

    a_m' = γ a_m - σ_x'(m) a_x,    a_x' = -(∂F/∂x)ᵀ a_m

so that x and a_m are positions, which alone the forces F and (∂F/∂x)ᵀ a_m see, and one call of the field, forth and
back, gives both. Without a gate μ = a_m' makes the second pair a momentum system like the first, of damping -γ. With
one e^(-γ t) a_m is the integral of -e^(-γ t) σ_x'(m) a_x over the nodes where the method takes gated momenta, and a_x,
which nothing damps, an integral of forces: the same partitioned method, so that order and error estimate are its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton import flow as flows
from nesterov_triton.flow import Flow
from nesterov_triton.force import Cotangents, Force, Moments
from nesterov_triton.gradients.leaves import check_leaves
from nesterov_triton.gradients.quadratures import ParameterQuadratures
from nesterov_triton.gradients.totals import Totals
from nesterov_triton.nystrom import POINTS, Nystrom
from nesterov_triton.stepping.explicit_rk import error_norm
from nesterov_triton.stepping.loop import AcceptedStep
from nesterov_triton.stepping.nystrom import Layout
from nesterov_triton.stepping.stepper import TimeAxis, Tolerance, stage_times


class NystromAdjoint:
    """Steps of (x, m, a_x, a_m), [2 D], backward in time, and the integrals over them; see `Stepper`.

    Args:
        method: the method, which must fit the system (see `nystrom.check`).
        flow: the system, on leaves.
        like: a state, [D].
        tolerance: for the embedded error's norm; None for fixed steps.
        totals: where the integrals go.
    """

    axis: TimeAxis | None = None

    def __init__(self, method: Nystrom, flow: Flow, like: Tensor, tolerance: Tolerance | None, totals: Totals) -> None:
        self.tableau, self.flow, self.tolerance, self.totals = method, flow, tolerance, totals
        self.layout, self.force = Layout(method, flow), Force(flow)
        self.quadratures = ParameterQuadratures(method, totals)
        self._gate = self.layout.system.gate_x
        self._gamma, _ = flow.numbers
        s, n, nodes = method.stages, like.numel() // 2, self.layout.nodes
        # x, m and the forces; a_m, its momentum and the forces on it.
        self._forth, self._back = like.new_empty((s + 2, n)), like.new_empty((s + 2, n))
        self._gates, self._through = like.new_empty((nodes, n)), like.new_empty((nodes, n))
        self._errors = like.new_empty((1, 4 * n))
        self._counted = [flows.Cotangents(())] * s  # of each force, without the parameters'
        self._has_first = False
        self._magnitudes: tuple[Tensor, Tensor] | None = None

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [2 D]; the forces in it are kept."""
        x, _, _, a_m = z.view(4, -1).unbind(0)
        self.quadratures.begin()
        self._evaluate(self._moments(t), 0, x, a_m)
        self._has_first = True
        return self._slope(z, self._forth[2], self._back[2])

    def probe(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side somewhere else, [2 D]; what is kept is left as it is."""
        x, _, _, a_m = z.view(4, -1).unbind(0)
        at, force = self._moments(t), torch.empty_like(x)
        lin = self.force.linearise(at, 0, x, force)
        of_x = self.force.pullback(at, 0, lin, a_m, wrt_params=False).x
        return self._slope(z, force, -of_x if self.layout.gated else of_x)

    def _moments(self, t: float) -> Moments:
        vector = self.layout.vector((t,) * self.tableau.stages, 0.0)
        return self.layout.cut(vector.to(self._forth)).at

    def _slope(self, z: Tensor, force: Tensor, back: Tensor) -> Tensor:
        x, m, a_x, a_m = z.view(4, -1).unbind(0)
        gamma, gated = self._gamma, self.layout.gated
        if not gated:  # both forces have γ²/4 times the position in them
            force, back = force - gamma**2 / 4 * x, gamma**2 / 4 * a_m - back
        slope = self._gate(m)
        return torch.cat((slope, force - gamma * m, back, gamma * a_m - self._gate.pullback(a_x, m, slope)))

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """(z, a) after one step from t to t1, [2 D], freshly allocated."""
        layout, s, n, forth, back = self.layout, self.tableau.stages, z.numel() // 4, self._forth, self._back
        self._numbers = numbers = layout.cut(layout.vector(stage_times(t, t1, self.tableau.c), t1 - t).to(z))
        self._set_weights(t1 - t)
        x, m, a_x, a_m = z.view(4, n).unbind(0)
        for row, value in zip((*forth[:2], *back[:2]), (x, m, a_m, self._momentum(a_x, a_m)), strict=True):
            row.copy_(value)
        self.quadratures.begin()
        if not self._has_first:
            self._evaluate(numbers.at, 0, x, a_m)
            self._has_first = True
        z1 = torch.empty_like(z)
        x1, m1, a_x1, a_m1 = z1.view(4, n).unbind(0)
        for i in range(1, s):
            last = i == s - 1
            x, a = (x1, a_m1) if last else (torch.empty_like(x1), torch.empty_like(x1))
            if layout.gated:
                self._drift(i, x, a)
            else:
                torch.mv(forth[: 2 + i].t(), numbers.positions[i - 1], out=x)
                torch.mv(back[: 2 + i].t(), self._rows[i - 1, : 2 + i], out=a)
            self._evaluate(numbers.at, i, x, a)
        driven = 1 if layout.gated else 0  # a gated momentum depends on no position
        torch.mv(forth[driven:].t(), numbers.momentum, out=m1)
        torch.mv(back[driven:].t(), self._rows[-1], out=a_x1)
        if not layout.gated:
            a_x1.copy_(self._momentum(a_x1, a_m1))
        self._ends = z, z1
        return z1

    def _momentum(self, a: Tensor, a_m: Tensor) -> Tensor:
        """What drives a_m, from a_x, or the reverse: without a gate μ = γ a_m - a_x, with one a_x itself."""
        return a if self.layout.gated else self._gamma * a_m - a

    def _drift(self, i: int, x: Tensor, a: Tensor) -> None:
        """The positions of force `i`, through gates."""
        forth, back, numbers = self._forth, self._back, self._numbers
        first, fresh, end = numbers.nodes[i - 1]
        for q in range(fresh, end):
            row = numbers.paths[q]
            momentum = torch.mv(forth[1 : 1 + len(row)].t(), row)
            of_gate = torch.mv(back[1 : 1 + len(row)].t(), self._rows[q, : len(row)])
            self._gate(momentum, out=self._gates[q])
            self._through[q].copy_(self._gate.pullback(of_gate, momentum, self._gates[q]))
        torch.addmv(forth[0], self._gates[first:end].t(), numbers.positions[i - 1], out=x)
        drift = self._drifts[i - 1]
        torch.mv(self._through[first:end].t(), drift[1 + first : 1 + end], out=a)
        a.addcmul_(back[0], drift[0])

    def _set_weights(self, h: float) -> None:
        """The weights of a step of size h for what goes back."""
        layout, gamma, method = self.layout, self._gamma, self.tableau
        numbers = layout.weights(0.0 if layout.gated else -gamma, h)
        shapes = layout.shapes[len(layout.moments) :]
        if layout.gated:
            gated = method.gated
            assert gated is not None
            # Those of the positions make way for weights that grow with the age of each node.
            size = math.prod(shapes[0])
            numbers = numbers[:size]
            for c, row in zip(method.c[1:], gated.w, strict=True):
                ages = [math.exp(gamma * (c - d) * h) for d in gated.d]
                numbers += [math.exp(gamma * c * h), *(-h * w * age for w, age in zip(row, ages, strict=False))]
                numbers += [0.0] * (len(gated.d) - len(row))
            of_a_m, of_a_x = method.error
            numbers += [h * h * e * math.exp(gamma * (1 - c) * h) for e, c in zip(of_a_m, method.c, strict=True)]
            numbers += [h * e for e in of_a_x]
            shapes = [shapes[0], (method.stages - 1, len(gated.d) + 1), shapes[2]]
        flat = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(self._forth)
        cut = torch.split(flat, [math.prod(shape) for shape in shapes])
        parts = [part.view(shape) for part, shape in zip(cut, shapes, strict=True)]
        self._rows, self._drifts, self._error_rows = parts[0], parts[-2], parts[-1]

    def _evaluate(self, at: Moments, i: int, x: Tensor, a: Tensor) -> None:
        """Forces `i` at the positions x and a, and what else the field's backward pass gives."""
        lin = self.force.linearise(at, i, x, self._forth[2 + i])
        if i <= 1:  # once an attempt at least: a field may use a tensor at some times only
            check_leaves(self.flow, lin.network)
        found = self.force.pullback(at, i, lin, a, wrt_params=self.quadratures.wants(i))
        self.quadratures.add(i, found.params)
        self._counted[i] = _of_coefficients(found)
        torch.mul(found.x, -1.0 if self.layout.gated else 1.0, out=self._back[2 + i])

    def error(self, z: Tensor, z1: Tensor) -> float:
        """The norm of the embedded error of the step just taken. The one host read of a step."""
        tolerance = self.tolerance
        assert tolerance is not None
        of_x, of_m, of_a_x, of_a_m = self._errors.view(4, -1).unbind(0)
        pairs = (self._forth, self._numbers.error, (of_x, of_m)), (self._back, self._error_rows, (of_a_m, of_a_x))
        for columns, rows, outs in pairs:
            for row, out in zip(rows, outs, strict=True):
                torch.mv(columns[2:].t(), row, out=out)
        of_a_x.copy_(self._momentum(of_a_x, of_a_m))
        if tolerance.measure is not None:
            return float(tolerance.measure(self._errors[0], z, z1))
        if self._magnitudes is None:
            self._magnitudes = (z.abs(), torch.empty_like(z))
        old, new = self._magnitudes
        return error_norm(self._errors, torch.maximum(old, torch.abs(z1, out=new)), tolerance.rtol, tolerance.atol)

    def witness(self, z1: Tensor) -> Tensor:
        """0-d, of the step just taken, to z1: finite only where z1 is."""
        return z1.sum()

    def starts_finite(self) -> bool:
        """Whether the forces that the step just taken started with are finite."""
        return bool(torch.isfinite(self._forth[2]).all() & torch.isfinite(self._back[2]).all())

    def on_accept(self, step: AcceptedStep) -> None:
        """Add the step's integrals to the totals."""
        t, dt, c = step.t, step.t1 - step.t, self.tableau.c
        self.quadratures.accept(dt)
        if not self.flow.coefficient_grads:
            return
        self.totals.add_coefficients(stage_times(t, step.t1, c), self._counted, [-dt * b for b in self.tableau.b])
        if self.layout.system.damped:  # -γ has the cotangent a_m · m, which is no force's
            times, weights = [t + p * dt for p, _ in POINTS], [-dt * w for _, w in POINTS]
            self.totals.add_coefficients(times, self._of_damping(dt), weights)

    def _of_damping(self, h: float) -> list[flows.Cotangents]:
        """The cotangents of -γ at `POINTS` inside the step just taken, from its dense output."""
        layout, gamma, forth, back = self.layout, self._gamma, self._forth, self._back
        (x0, m0, *_), (x1, m1, *_) = (z.view(4, -1).unbind(0) for z in self._ends)
        momenta = torch.stack(layout.ends(x0, m0, forth[2], x1, m1, forth[-1])).t()
        ends = []
        for z, force in zip(self._ends, (back[2], back[-1]), strict=True):
            _, m, a_x, a_m = z.view(4, -1).unbind(0)
            rate = gamma * a_m - self._gate.pullback(a_x, m, self._gate(m))
            ends += [a_m, rate] if layout.gated else [a_m, rate, force]
        cotangents = torch.stack(ends).t()
        found = []
        for theta, _ in POINTS:
            of_m = layout.dense(theta, h, gamma)[1].to(momenta)
            of_a = layout.dense(theta, h, -gamma)[0, : len(ends)].to(momenta)
            product = torch.dot(torch.mv(momenta, of_m), torch.mv(cotangents, of_a))
            found.append(flows.Cotangents((), linear=torch.stack((torch.zeros_like(product), product))))
        return found

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""
        if self._magnitudes is not None:
            self._magnitudes = (self._magnitudes[1], self._magnitudes[0])
        for columns in (self._forth, self._back):
            columns[2].copy_(columns[-1])
        self._counted[0] = self._counted[-1]

    def restart(self) -> None:
        """Forget the state to go on from: the next step starts from another one."""
        self._has_first, self._magnitudes = False, None

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> Sequence[Tensor]:
        """Not wanted: the backward solve is cut at the requested times."""
        raise NotImplementedError

    def finish(self) -> None:
        """Every step has been taken: bring the totals up to date."""
        self.totals.settle()


def _of_coefficients(found: Cotangents) -> flows.Cotangents:
    linear = None if found.q is None else torch.stack((found.q, torch.zeros_like(found.q)))
    return flows.Cotangents((), scale=found.scale, drive=found.drive, linear=linear)
