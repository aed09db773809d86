"""Steps of the methods of `nystrom`: their numbers at one step, and the eager stepper.

A step is a few linear combinations, whose weights depend on the step size and on the damping alone, with forces and
gates between them. Its columns are, [N] each,

    without a gate   x, m, G_0, ..., G_s-1          with one   m, F_0, ..., F_s-1   and   σ_x(M_0), σ_x(M_1), ...

where G = F + γ²/4 x: with it y'' = e^(γ t / 2) G for y = e^(γ t / 2) x. The exponentials are in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nesterov_triton import transforms
from nesterov_triton.flow import Flow
from nesterov_triton.force import Force, Moments
from nesterov_triton.gates import Identity
from nesterov_triton.nystrom import POINTS, Gated, Nystrom
from nesterov_triton.ops.nystrom.reference import hermite, table, weights_for
from nesterov_triton.stepping.explicit_rk import error_norm
from nesterov_triton.stepping.stepper import TimeAxis, Tolerance, stage_times
from nesterov_triton.systems import Momentum

FARTHEST = 700.0  # e to this power is a float64 still


class Layout:
    """Where a step's numbers are in one vector, and how they are made.

    Args:
        method: the method.
        flow: the system, bound.

    Attributes:
        shapes: of the parts: the stage times; κ, s and q at them where the system has these; the weights of a step;
            those of its error.
    """

    def __init__(self, method: Nystrom, flow: Flow) -> None:
        system = flow.system
        assert isinstance(system, Momentum)
        self.method, self.flow, self.system = method, flow, system
        self.gated = not isinstance(system.gate_x, Identity)
        s, n = method.stages, 0 if method.gated is None else len(method.gated.d)
        self.nodes = n if self.gated else 0
        # Without a gate γ²/4 joins q.
        self.has_q = system.exact or system.residual or (system.damped and not self.gated)
        moments = {"t": True, "scale": system.nesterov, "drive": system.exact, "q": self.has_q}
        self.moments = [name for name, has in moments.items() if has]
        weights = [(n + 1, s + 1), (s - 1, n)] if self.gated else [(s, s + 2)]
        self.shapes: list[tuple[int, ...]] = [*((s,) for _ in self.moments), *weights, (2, s)]

    def vector(self, times: Sequence[float], h: float) -> Tensor:
        """The numbers of a step of size h with these stage times, float64 on the CPU."""
        flow, system = self.flow, self.system
        gamma, xi = flow.numbers
        shift = 0.0 if self.gated else gamma * gamma / 4
        moments: list[Sequence[float]] = [times]
        if len(self.moments) > 1:
            at = [system.rule.coefficients(t, gamma, xi) for t in times]
            for name in self.moments[1:]:
                if name == "q":
                    moments.append([(c.q or 0.0) + shift for c in at])
                else:
                    moments.append([getattr(c, name) for c in at])
        numbers = [x for row in moments for x in row] + plain_weights(self.method, gamma, h, self.gated)
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def graph(self, times: Tensor, h: Tensor, gamma: Tensor | float, xi: Tensor | float) -> Tensor:
        """The same with a graph, to rounding: `times` [..., s], `h` [...], γ and ξ, float64 on the CPU."""
        c = self.system.rule.coefficients(times.reshape(-1), gamma, xi)
        moments = [times]
        for name in self.moments[1:]:
            value = getattr(c, name)
            if name == "q":
                value = torch.zeros_like(times).view(-1) if value is None else value
                if not self.gated:
                    value = value + gamma * gamma / 4
            moments.append(value.view(times.shape))
        weights = weights_for(table(self.method, self.gated, h.device), h, gamma, self.gated)
        return torch.cat([*moments, weights], dim=-1)

    def dense(self, theta: Tensor | float, h: Tensor | float, gamma: Tensor | float) -> Tensor:
        """The weights of x and m at the fraction θ of a step, [2, ·], of what `ends` gives; at n of them [2, ·, n]."""
        return hermite(torch.as_tensor(theta, dtype=torch.float64, device="cpu"), h, gamma, self.gated)

    def ends(
        self, gate: Callable[[Tensor], Tensor], x: Tensor, m: Tensor, f: Tensor, x1: Tensor, m1: Tensor, f1: Tensor
    ) -> tuple[Tensor, ...]:
        """The columns that `dense` weighs, from positions, momenta and forces at both ends of a step."""
        return (x, gate(m), x1, gate(m1), m, f, m1, f1) if self.gated else (x, m, f, x1, m1, f1)

    def cut(self, vector: Tensor) -> Numbers:
        """Its parts, as views."""
        parts = [
            part.view(shape)
            for part, shape in zip(torch.split(vector, [math.prod(x) for x in self.shapes]), self.shapes, strict=True)
        ]
        named = {name: part.unbind(0) for name, part in zip(self.moments, parts, strict=False)}
        nothing = (None,) * self.method.stages
        at = Moments(named["t"], *(named.get(name, nothing) for name in ("scale", "drive", "q")))
        return Numbers(at, parts[len(self.moments) : -1], parts[-1], self)


def plain_weights(method: Nystrom, gamma: float, h: float, gate: bool) -> list[float]:
    """As `weights_for`. Plain numbers: about a hundred cost less than twenty operators."""
    s, gated = method.stages, method.gated
    if not abs(gamma * h) <= FARTHEST:  # where math.exp would raise
        span = torch.tensor(h, dtype=torch.float64, device="cpu")
        return weights_for(table(method, gate, span.device), span, gamma, gate).tolist()
    rate = gamma * h if gate else 0.5 * gamma * h
    late = [math.exp(rate * c) for c in method.c]  # 1 / decay
    end, found = 1 / late[-1], list[float]()
    own_x, own_m = ([e * x * end for e, x in zip(row, late, strict=True)] for row in method.error)
    if gate:
        assert gated is not None
        driven = [h * x for x in late]
        for d, row in zip(gated.d, gated.p, strict=True):
            decay = math.exp(-rate * d)
            found += [decay, *(decay * p * x for p, x in zip(row, driven, strict=False)), *(0.0,) * (s - len(row))]
        found += [end, *(end * b * x for b, x in zip(method.b, driven, strict=True))]
        for row in gated.w:
            found += [*(h * w for w in row), *(0.0,) * (len(gated.d) - len(row))]
        return [*found, *(h * h * e for e in own_x), *(h * e for e in own_m)]
    half, square = 0.5 * gamma, h * h
    of_forces = list[float]()
    for c, x, row in zip(method.c[1:], late[1:], method.a[1:], strict=True):
        scale = square / x
        of_forces = [*(a * y * scale for a, y in zip(row, late, strict=False)), *(0.0,) * (s - len(row))]
        found += [(1 + c * half * h) / x, c * h / x, *of_forces]
    found += [-end * half * half * h, end * (1 - half * h)]
    found += [b * x * (end * h) - half * a for b, x, a in zip(method.b, late, of_forces, strict=True)]
    return [
        *found,
        *(square * e for e in own_x),
        *(h * m - half * square * x for x, m in zip(own_x, own_m, strict=True)),
    ]


def plain_growth(method: Nystrom, gamma: float, h: float) -> list[float]:
    """What a step of the adjoint has after its weights, as `ops.nystrom.step_weights` with its growth."""
    at = [*((c, 1.0) for c in method.c), *POINTS]
    return [weight * math.exp(min(gamma * c * h, FARTHEST)) for c, weight in at]


def nodes_of(gated: Gated) -> list[tuple[int, int, int]]:
    """For each stage but the first: the first node that it needs, the first that no stage before it did, and one past
    its last."""
    ends = [len(row) for row in gated.w]
    firsts = [next(q for q, x in enumerate(row) if x) for row in gated.w]
    return list(zip(firsts, [0, *ends], ends, strict=False))


class Numbers:
    """A step's numbers in the state's dtype, as views; rows without their padding.

    Attributes:
        at: the moments of its stages.
        weights: without a gate W, [s, s + 2]: X_1 to X_s-1, then m_new; with one P, [n + 1, s + 1], M_0 to M_n-1 and
            m_new, and D, [s - 1, n].
        error: [2, s].
        positions: what leads to the position of each stage but the first.
        momentum: what leads to m_new.
        paths, nodes: with a gate, what leads to each node's momentum, and `nodes_of` the method.
    """

    def __init__(self, at: Moments, weights: Sequence[Tensor], error: Tensor, layout: Layout) -> None:
        self.at, self.weights, self.error = at, weights, error
        s = layout.method.stages
        if layout.gated:
            gated = layout.method.gated
            assert gated is not None
            paths, drifts = weights
            self.paths = [paths[q, : 1 + len(row)] for q, row in enumerate(gated.p)]
            self.nodes = nodes_of(gated)
            self.positions = [drifts[i, first:end] for i, (first, _, end) in enumerate(self.nodes)]
            self.momentum = paths[-1]
        else:
            (rows,) = weights
            self.positions = [rows[i, : 3 + i] for i in range(s - 1)]
            self.momentum = rows[-1]


class NystromStepper:
    """Steps of one method on one momentum system; see `Stepper`.

    The force at the state to go on from is kept between steps.

    Args:
        method: the method, which must fit the system (see `check`).
        flow: the system, bound.
        like: a state, [D].
        tolerance: for the embedded error's norm; None for fixed steps.
        differentiable: run out of place, visible to autograd.
        axis: the differentiable times, where autograd is to give gradients with respect to them.
    """

    def __init__(
        self,
        method: Nystrom,
        flow: Flow,
        like: Tensor,
        tolerance: Tolerance | None,
        *,
        differentiable: bool = False,
        axis: TimeAxis | None = None,
    ) -> None:
        self.tableau, self.flow, self.tolerance, self.axis = method, flow, tolerance, axis
        self.layout, self.force = Layout(method, flow), Force(flow)
        self.differentiable = differentiable
        self._first: Tensor | None = None  # the force at the state to go on from
        self._magnitudes: tuple[Tensor, Tensor] | None = None
        self._errors: Tensor | None = None
        if not differentiable:
            s, n = method.stages, like.numel() // 2
            self._vector = like.new_empty(sum(math.prod(x) for x in self.layout.shapes))
            self._numbers = self.layout.cut(self._vector)
            self._columns = like.new_empty((s + 2, n))
            self._rows = self._columns.unbind(0)
            self._known = [self._columns[: k + 2].t() for k in range(s + 1)]  # x, m and the first k forces
            self._momenta = [self._columns[1 : k + 2].t() for k in range(s + 1)]  # m and the first k forces
            self._nodes = like.new_empty((self.layout.nodes, n))
            self._gates = self._nodes.unbind(0)
            self._spare = like.new_empty(n) if flow.copies else None

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [D]; the force in it is kept."""
        slope = self.probe(t, z)
        x, m = z.view(2, -1).unbind(0)
        gamma, _ = self._scalars()
        force = slope.view(2, -1)[1] + _times(m, gamma)
        if not self.layout.gated:
            force = force + _times(x, gamma * gamma / 4)
        self._first = force
        return slope

    def probe(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side somewhere else, [D]; what is kept is left as it is."""
        times: Sequence[float] | Tensor = (t,) if self.axis is None else self.axis.start(t).reshape(1)
        return torch.cat(tuple(self.flow.derivative(self.flow.at(times), 0, self.flow.open(z))))

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated."""
        self._z1 = self._recorded_step(t, t1, z) if self.differentiable else self._buffered_step(t, t1, z)
        return self._z1

    def _buffered_step(self, t: float, t1: float, z: Tensor) -> Tensor:
        layout, numbers, rows = self.layout, self._numbers, self._rows
        self._vector.copy_(layout.vector(stage_times(t, t1, self.tableau.c), t1 - t))
        n, s = z.numel() // 2, self.tableau.stages
        self._columns[:2].copy_(z.view(2, n))
        if self._first is None:
            self._force(numbers.at, 0, z.view(2, n)[0], out=rows[2])
        elif self._first is not rows[2]:
            rows[2].copy_(self._first)
        self._first = rows[2]
        z1 = torch.empty_like(z)
        x1, m1 = z1.view(2, n).unbind(0)
        for i in range(1, s):
            x = x1 if i == s - 1 else torch.empty_like(x1) if self._spare is None else self._spare
            if layout.gated:
                first, fresh, end = numbers.nodes[i - 1]
                for q in range(fresh, end):
                    row = numbers.paths[q]
                    torch.mv(self._momenta[len(row) - 1], row, out=self._gates[q])
                block = self._nodes[fresh:end]
                self._gate(block, out=block)
                torch.addmv(rows[0], self._nodes[first:end].t(), numbers.positions[i - 1], out=x)
            else:
                torch.mv(self._known[i], numbers.positions[i - 1], out=x)
            self._force(numbers.at, i, x, out=rows[2 + i])
        torch.mv(self._momenta[s] if layout.gated else self._known[s], numbers.momentum, out=m1)
        return z1

    def _recorded_step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The same, out of place."""
        layout, s = self.layout, self.tableau.stages
        numbers = layout.cut(self._recorded_vector(t, t1).to(z.device, z.dtype))
        x, m = z.view(2, -1).unbind(0)
        if self._first is None:
            self._first = self.force(numbers.at, 0, x)
        forces = [self._first]
        gates: list[Tensor] = []
        position = x
        for i in range(1, s):
            row = numbers.positions[i - 1]
            if layout.gated:
                first, fresh, end = numbers.nodes[i - 1]
                gates += [self._gate(_combine([m, *forces], numbers.paths[q])) for q in range(fresh, end)]
                position = x + _combine(gates[first:end], row)
            else:
                position = _combine([x, m, *forces], row)
            forces.append(self.force(numbers.at, i, position))
        self._recorded = (numbers, forces)
        columns = [m, *forces] if layout.gated else [x, m, *forces]
        return torch.cat((position, _combine(columns, numbers.momentum)))

    def _recorded_vector(self, t: float, t1: float) -> Tensor:
        nodes = stage_times(t, t1, self.tableau.c)
        vector = self.layout.vector(nodes, t1 - t) if self.flow.readable else None
        times = torch.tensor(nodes, dtype=torch.float64, device="cpu")
        h: Tensor = times.new_tensor(t1 - t)
        if self.axis is not None:
            start, end = self.axis.start(t), self.axis.end(t1)
            h = end - start
            moving = torch.stack([end if c == 1.0 else start + c * h for c in self.tableau.c])
            times = times + (moving - moving.detach())
        graph = self.layout.graph(times, h, *self._scalars())
        return graph if vector is None else vector + (graph - graph.detach())

    def _scalars(self) -> tuple[Tensor | float, Tensor | float]:
        """γ and ξ; with their graph where it is recorded."""
        if not self.differentiable:
            return self.flow.numbers
        scalars, system = self.flow.scalars, self.layout.system
        return scalars.get("damping", system.fixed_damping), scalars.get("xi", system.fixed_xi)

    def error(self, z: Tensor, z1: Tensor) -> float:
        """The norm of the embedded error of the step just taken. The one host read of a step."""
        transforms.check_readable(z1)
        tolerance = self.tolerance
        assert tolerance is not None
        with torch.no_grad():
            z, z1 = z.detach(), z1.detach()
            errors = self._estimate(z)
            if tolerance.measure is not None:
                return float(tolerance.measure(errors[0], z, z1))
            if self._magnitudes is None:
                self._magnitudes = (z.abs(), torch.empty_like(z))
            old, new = self._magnitudes
            return error_norm(errors, torch.maximum(old, torch.abs(z1, out=new)), tolerance.rtol, tolerance.atol)

    def _estimate(self, z: Tensor) -> Tensor:
        """The embedded error of the step just taken from z, [1, D], in memory that the next step's uses again."""
        if self.differentiable:
            numbers, forces = self._recorded
            columns, rows = torch.stack([f.detach() for f in forces]).t(), numbers.error.detach()
        else:
            columns, rows = self._columns[2:].t(), self._numbers.error
        if self._errors is None:
            self._errors = z.new_empty((1, z.numel()))
        for row, out in zip(rows, self._errors.view(2, -1), strict=True):
            torch.mv(columns, row, out=out)
        return self._errors

    def witness(self, z1: Tensor) -> Tensor:
        """0-d, of the step just taken, to z1: finite only where z1 is."""
        return z1.detach().sum()

    def starts_finite(self) -> bool:
        """Whether the force that the step just taken started with is finite."""
        return bool(torch.isfinite(self._forces()[0]).all())

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""
        if self._magnitudes is not None:
            self._magnitudes = (self._magnitudes[1], self._magnitudes[0])
        self._first = self._forces()[-1]

    def restart(self) -> None:
        """Forget the state to go on from."""
        self._first = self._magnitudes = None

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> list[Tensor]:
        """The states at `times`, the requested times of these indices, inside the step from z just taken and not yet
        accepted, [D] each."""
        x, m = z.view(2, -1).unbind(0)
        x1, m1 = self._z1.view(2, -1).unbind(0)
        forces = self._forces()
        columns = torch.stack(self.layout.ends(self._gate, x, m, forces[0], x1, m1, forces[-1])).t()
        gamma, _ = self._scalars()
        states = []
        for time, index in zip(times, indices, strict=True):
            theta: Tensor | float = (time - t) / (t1 - t)
            h: Tensor | float = t1 - t
            if self.axis is not None:
                h = self.axis.end(t1) - self.axis.start(t)
                theta = (self.axis.output(time, index) - self.axis.start(t)) / h
            weights = self.layout.dense(theta, h, gamma).to(z.device, z.dtype)
            states.append(torch.cat([torch.mv(columns, row) for row in weights.unbind(0)]))
        return states

    def _force(self, at: Moments, i: int, x: Tensor, out: Tensor) -> Tensor:
        """The force at moment `i` and position `x`, written into `out`."""
        return self.force(at, i, x, out)

    def _gate(self, m: Tensor, out: Tensor | None = None) -> Tensor:
        """σ_x of momenta, [..., N]; written into `out` if given."""
        return self.layout.system.gate_x(m, out)

    def _forces(self) -> Sequence[Tensor]:
        return self._recorded[1] if self.differentiable else self._rows[2:]


def _combine(columns: Sequence[Tensor], row: Tensor) -> Tensor:
    return torch.mv(torch.stack(tuple(columns)).t(), row)


def _times(x: Tensor, factor: Tensor | float) -> Tensor:
    return x * (factor.to(x.device, x.dtype) if isinstance(factor, Tensor) else factor)
