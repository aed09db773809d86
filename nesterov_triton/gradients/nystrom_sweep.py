"""Transposed steps of the methods of `nystrom`, last first.

A step is transposed by going through its columns backwards: a position gives its cotangent to the columns that it is a
combination of, a force gives its own to its position, through the field. The last force of a step is the first of the
next: it is evaluated once, with the next step, and its graph is kept until this one's turn.

The weights depend on step size and damping. Their cotangents are inner products of columns, which one call of autograd
for all steps, on the CPU in float64, takes to the times, γ and ξ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.flow import Flow
from nesterov_triton.force import Force, Linearisation
from nesterov_triton.gradients.leaves import check_leaves
from nesterov_triton.gradients.totals import Totals, accumulate
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.stepping.loop import AcceptedStep
from nesterov_triton.stepping.nystrom import Layout, Numbers, NystromStepper
from nesterov_triton.stepping.stepper import Tolerance, stage_times

Outputs = Sequence[tuple[int, Tensor]]  # index of a requested time, cotangent [D]


def given(outputs: Sequence[int], cotangents: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """The cotangents of these requested states that there are, with their indices."""
    wanted = [(k, cotangents[k - 1]) for k in outputs]
    return [(k, g) for k, g in wanted if g is not None]


class Checkpoint(NamedTuple):
    """What `NystromSweep` had found at some step."""

    totals: Totals
    counted: int
    owed: Tensor | None
    step: _Step | None


class Counted(NamedTuple):
    """A step from t to t1, the cotangents of its numbers, flat float64 on the CPU, and for each requested time inside
    of it the index and the cotangents of its weights."""

    t: float
    t1: float
    numbers: Tensor
    inside: list[tuple[int, Tensor]]


class NystromSweep:
    """Transposed steps in plain torch.

    Args:
        method: the method.
        flow: the system, on leaves.
        requested: the requested times.

    Attributes:
        totals: the cotangents of parameters so far; of scalars once `finish` has been called.
        times: the cotangents of the requested times, likewise, [n] float64 on the CPU.
        counted: the steps whose numbers have cotangents.
        products: vector-Jacobian products of the field so far.
    """

    def __init__(self, method: Nystrom, flow: Flow, requested: Sequence[float]) -> None:
        self.method, self.flow, self.requested = method, flow, requested
        self.layout, self.force = Layout(method, flow), Force(flow)
        self.totals = Totals(flow)
        self.times = torch.zeros(len(requested), dtype=torch.float64, device="cpu")
        self.counted: list[Counted] = []
        self.products = 0
        # The first force of the step after the one in hand, and what that step gave it.
        self._next: Linearisation | None = None
        self._value: Tensor | None = None
        self._owed: Tensor | None = None
        self._step: _Step | None = None

    def forth_and_back(self, t: float, t1: float, z: Tensor, adjoint: Tensor, outputs: Outputs) -> Tensor:
        """The cotangent of the state `z` at t, [D], from that of the state at t1 and those of requested states in
        (t, t1]; without what comes through the force at t, which the step before or `finish` adds."""
        step = _Step(self, t, t1, self._value)
        step.take(z, forward=True)
        return self.transpose(step, adjoint, outputs)

    def back(self, t: float, t1: float, z1: Tensor, adjoint: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """The same from the state at t1, by a method that is reversible; and the state at t, [D]."""
        step = _Step(self, t, t1, self._value)
        z = step.take(z1, forward=False)
        return self.transpose(step, adjoint, outputs), z

    def checkpoint(self) -> Checkpoint:
        """All that was found so far, for `restore`."""
        totals = Totals(self.flow)
        totals.take(self.totals)
        return Checkpoint(totals, len(self.counted), self._owed, self._step)

    def restore(self, found: Checkpoint) -> None:
        """Go on from there again."""
        self.totals, counted, self._owed, self._step = found
        del self.counted[counted:]
        self._next = self._value = None  # used up

    def finish(self, adjoint: Tensor) -> Tensor:
        """The cotangent of the first state, [D], from what its step gave."""
        step = self._step
        if step is None:
            return adjoint
        assert self._next is not None
        assert self._owed is not None
        of_x = step.pull(0, self._next, self._owed)
        step.counted()
        self._settle()
        x, m = adjoint.view(2, -1).unbind(0)
        return torch.cat((x + of_x, m))

    def _settle(self) -> None:
        """Take the cotangents of all steps' numbers to times and scalars."""
        steps, flow, last = self.counted, self.flow, len(self.requested) - 1
        if not steps:
            return
        system = self.layout.system
        gamma, xi = flow.scalars.get("damping", system.fixed_damping), flow.scalars.get("xi", system.fixed_xi)
        inside = [(n, k, w) for n, step in enumerate(steps) for k, w in step.inside]
        numbers = [[s.t for s in steps], [s.t1 for s in steps], [self.requested[k] for _, k, _ in inside]]
        leaves = [torch.tensor(x, dtype=torch.float64, device="cpu", requires_grad=flow.time_grads) for x in numbers]
        t, t1, at = leaves
        with torch.enable_grad():
            h = t1 - t
            times = torch.stack([t1 if c == 1.0 else t + c * h for c in self.method.c], dim=-1)
            of_numbers = torch.stack([s.numbers for s in steps])
            pairs = [(self.layout.graph(times, h, gamma, xi)[:, : of_numbers.shape[1]], of_numbers)]
            if inside:
                n = [n for n, _, _ in inside]
                weights = self.layout.dense((at - t[n]) / h[n], h[n], gamma)
                pairs.append((weights, torch.stack([w for *_, w in inside], dim=-1)))
        pairs = [(value, c) for value, c in pairs if value.requires_grad]
        if not pairs:
            return
        # What each number moves with: a requested time, by its index, or a scalar.
        ends = [last if s.t1 == self.requested[last] else 0 for s in steps]
        owners = [[0] * len(steps), ends, [k for _, k, _ in inside]] if flow.time_grads else []
        found = torch.autograd.grad(
            [value for value, _ in pairs],
            [*leaves[: len(owners)], *flow.scalars.values()],
            [c for _, c in pairs],
            allow_unused=True,
        )
        for owner, g in zip(owners, found, strict=False):
            if g is not None:
                self.times.index_add_(0, torch.tensor(owner, dtype=torch.int64), g)
        for name, g in zip(flow.scalars, found[len(owners) :], strict=True):
            if g is not None:
                self.totals.scalars[name] += g

    def transpose(self, step: _Step, adjoint: Tensor, outputs: Outputs) -> Tensor:
        """As `forth_and_back`, for a step that has been taken."""
        if self._step is not None:
            self._step.counted()
        found, owed = step.transpose(adjoint, outputs, step.last if self._next is None else self._next, self._owed)
        self._next, self._value, self._owed, self._step = step.lins[0], step.columns[2], owed, step
        return found


class KeptNystrom(NystromStepper):
    """Steps that are taken once, for `NystromSweep.transpose`."""

    def __init__(self, sweep: NystromSweep, like: Tensor, tolerance: Tolerance | None) -> None:
        super().__init__(sweep.method, sweep.flow, like, tolerance)
        self._sweep = sweep
        self._lin: Linearisation | None = None

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [D]."""
        slope = super().first_derivative(t, z)
        self._first = None  # evaluated again, with its graph
        return slope

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated."""
        self._step = step = _Step(self._sweep, t, t1, None)
        step.take(z, True, None if self._first is None or self._lin is None else (self._lin, self._first))
        self._columns, self._rows, self._numbers = step.columns, step.columns.unbind(0), step.numbers
        self._lin, self._first, self._z1 = step.lins[0], self._rows[2], step.end  # for another try
        return step.end

    def taken(self, step: AcceptedStep, inside: bool) -> _Step:
        """The step just accepted."""
        return self._step

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""
        super().accept()
        self._lin = self._step.last


class _Step:
    """One step, taken again with the field's graphs.

    Args:
        value: its last force, [N], where that is known.

    Attributes:
        columns: x, m and the forces, [s + 2, N].
        lins: of the forces but the last.
        last: of the last force, where it was not known.
    """

    def __init__(self, sweep: NystromSweep, t: float, t1: float, value: Tensor | None) -> None:
        self.sweep, self.t, self.t1, self.value = sweep, t, t1, value
        self.layout, self.force, self.flow = sweep.layout, sweep.force, sweep.flow
        self.nodes = stage_times(t, t1, sweep.method.c)
        self.vector = self.layout.vector(self.nodes, t1 - t)
        self.wants_graph = self.flow.coefficient_grads or self.flow.time_grads
        self.of_moments = {name: [0.0] * sweep.method.stages for name in self.layout.moments}
        self.of_weights: list[Tensor] = []
        self.last: Linearisation | None = None

    def take(self, z: Tensor, forward: bool, first: tuple[Linearisation, Tensor] | None = None) -> Tensor:
        """Take the step from `z` at its start, or back from `z` at its end; return the state at its start. `first` is
        the force that it starts with, and its value, where that is known."""
        layout, method = self.layout, self.sweep.method
        s, n = method.stages, z.numel() // 2
        self.numbers = layout.cut(self.vector.to(z.device, z.dtype))
        numbers = self.numbers
        if not forward:
            reverse = layout.vector(self.nodes[::-1], self.t - self.t1)
            numbers = layout.cut(reverse.to(z.device, z.dtype))
        columns = z.new_empty((s + 2, n))
        columns[:2].copy_(z.view(2, n))
        gates, momenta = z.new_empty((layout.nodes, n)), z.new_empty((layout.nodes, n))
        # Each in memory of its own: the fields' graphs keep them.
        positions = [z.view(2, n)[0], *(z.new_empty(n) for _ in range(s - 1))]
        lins: list[Linearisation] = []
        unchecked = True
        for i in range(s):
            if i > 0:
                self._position(numbers, i, columns, momenta, gates, positions[i])
            known = i == (s - 1 if forward else 0) and self.value is not None
            if known:
                assert self.value is not None
                columns[2 + i].copy_(self.value)
            elif i == 0 and first is not None:
                lins.append(first[0])
                columns[2].copy_(first[1])
            else:
                lins.append(self.force.linearise(numbers.at, i, positions[i], columns[2 + i]))
                if unchecked:  # at every step: a field may use a tensor at some times only
                    check_leaves(self.flow, lins[-1].network)
                    unchecked = False
        own = columns[1:] if layout.gated else columns
        m1 = torch.mv(own.t(), numbers.momentum)
        if not forward:
            columns = torch.cat((positions[-1].unsqueeze(0), m1.unsqueeze(0), columns[2:].flip(0)))
            gates, momenta, lins = gates.flip(0), momenta.flip(0), lins[::-1]
            self.end = z
        else:
            self.end = torch.cat((positions[-1], m1))
        if len(lins) == s:
            self.last = lins.pop()
        self.columns, self.gates, self.momenta, self.lins = columns, gates, momenta, lins
        return columns[:2].reshape(-1)

    def _position(self, numbers: Numbers, i: int, columns: Tensor, momenta: Tensor, gates: Tensor, out: Tensor) -> None:
        if not self.layout.gated:
            torch.mv(columns[: 2 + i].t(), numbers.positions[i - 1], out=out)
            return
        first, fresh, end = numbers.nodes[i - 1]
        for q in range(fresh, end):
            row = numbers.paths[q]
            torch.mv(columns[1 : 1 + len(row)].t(), row, out=momenta[q])
        self.layout.system.gate_x(momenta[fresh:end], out=gates[fresh:end])
        torch.addmv(columns[0], gates[first:end].t(), numbers.positions[i - 1], out=out)

    def transpose(
        self, adjoint: Tensor, outputs: Outputs, last: Linearisation | None, owed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The cotangents of the state at the start, but for what comes through its force, and of that force."""
        assert last is not None
        layout, numbers, gate = self.layout, self.numbers, self.layout.system.gate_x
        s = self.sweep.method.stages
        ends = self._ends(adjoint, outputs)
        of_x, of_m, of_first, of_x1, of_m1, of_last = ends
        n = of_x.numel()
        positions = adjoint.new_empty((s - 1, n))  # cotangents of X_1, ..., X_s-1
        if layout.gated:
            paths, drifts = numbers.weights
            momenta = adjoint.new_empty((layout.nodes + 1, n))
            momenta[-1].copy_(of_m1)
        else:
            (rows,) = numbers.weights
            joint = adjoint.new_empty((s, n))
            positions = joint[:-1]
            joint[-1].copy_(of_m1)
        for i in range(s - 1, 0, -1):
            if layout.gated:
                after = numbers.nodes[i][1] if i < s - 1 else layout.nodes
                of_force = torch.mv(momenta[after:].t(), paths[after:, 1 + i])
            else:
                of_force = torch.mv(joint[i:].t(), rows[i:, 2 + i])
            if i == s - 1:
                of_force = of_force + of_last
                if owed is not None:
                    of_force = of_force + owed
                torch.add(of_x1, self.pull(i, last, of_force), out=positions[i - 1])
            else:
                positions[i - 1].copy_(self.pull(i, self.lins.pop(), of_force))
            if layout.gated:
                _, fresh, end = numbers.nodes[i - 1]
                for q in range(fresh, end):
                    of_gate = torch.mv(positions[i - 1 :].t(), drifts[i - 1 :, q])
                    momenta[q].copy_(gate.pullback(of_gate, self.momenta[q], self.gates[q]))
        if layout.gated:
            owing = torch.mv(momenta.t(), paths[:, 1]) + of_first
            found = (positions.sum(0) + of_x, torch.mv(momenta.t(), paths[:, 0]) + of_m)
        else:
            owing = torch.mv(joint.t(), rows[:, 2]) + of_first
            found = (torch.mv(joint.t(), rows[:, 0]) + of_x, torch.mv(joint.t(), rows[:, 1]) + of_m)
        if self.wants_graph:
            if layout.gated:
                self.of_weights = [momenta @ self.columns[1:].t(), positions @ self.gates.t()]
            else:
                self.of_weights = [joint @ self.columns.t()]
        return torch.cat(found), owing

    def _ends(self, adjoint: Tensor, outputs: Outputs) -> list[Tensor]:
        """What the states at the end of the step and inside of it give to x, m and force at both ends, [N] each."""
        layout, sweep, gate = self.layout, self.sweep, self.layout.system.gate_x
        requested, t, h = sweep.requested, self.t, self.t1 - self.t
        moves = range(len(requested) - 1) if self.flow.time_grads else ()
        self.inside: list[tuple[int, Tensor]] = []  # index, cotangent of its weights
        total = adjoint.clone()
        found: list[Tensor] | None = None
        for k, g in outputs:
            if requested[k] == self.t1 and k not in moves:
                total += g
                continue
            x, m = self.columns[0], self.columns[1]
            x1, m1 = self.end.view(2, -1).unbind(0)
            weights = layout.dense((requested[k] - t) / h, h, self.flow.numbers[0]).to(g.device, g.dtype)
            pair = g.view(2, -1)
            given = weights.t() @ pair
            if self.wants_graph:
                columns = torch.stack(layout.ends(gate, x, m, self.columns[2], x1, m1, self.columns[-1]))
                self.inside.append((k, pair @ columns.t()))
            if layout.gated:
                of_x, of_s, of_x1, of_s1, of_m, of_f, of_m1, of_f1 = given.unbind(0)
                of_m = of_m + gate.pullback(of_s, m, gate(m))
                of_m1 = of_m1 + gate.pullback(of_s1, m1, gate(m1))
                given = torch.stack((of_x, of_m, of_f, of_x1, of_m1, of_f1))
            found = list(given) if found is None else [a + b for a, b in zip(found, given, strict=True)]
        x1, m1 = total.view(2, -1).unbind(0)
        if found is None:
            nothing = torch.zeros_like(x1)
            return [nothing, nothing, nothing, x1, m1, nothing]
        return [*found[:3], found[3] + x1, found[4] + m1, found[5]]

    def pull(self, i: int, lin: Linearisation, c: Tensor) -> Tensor:
        """The cotangent of the position of force `i`, from the force's."""
        found = self.force.pullback(self.numbers.at, i, lin, c)
        self.sweep.products += 1
        accumulate(self.sweep.totals.params, found.params)
        if self.wants_graph:
            for name, value in (("t", found.time), ("scale", found.scale), ("drive", found.drive), ("q", found.q)):
                if value is not None and name in self.of_moments:
                    self.of_moments[name][i] += float(value)
        return found.x

    def counted(self) -> None:
        """All forces of the step have been pulled back: the cotangents of its numbers are known."""
        if self.wants_graph:
            moments = [x for name in self.layout.moments for x in self.of_moments[name]]
            found = torch.tensor(moments, dtype=torch.float64, device="cpu")
            found = torch.cat([found, *(w.to(found).view(-1) for w in self.of_weights)])
            self.sweep.counted.append(Counted(self.t, self.t1, found, [(k, w.to(found)) for k, w in self.inside]))
