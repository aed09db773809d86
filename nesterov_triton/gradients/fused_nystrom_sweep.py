"""The transposed steps of `nystrom_sweep`, by the fused operators.

The last force of a step is the first of the next. It goes back with that one, whose pass forward has its graph, when
all that comes to it is known: through the step it begins, through the kick that it gives m at the end of the one
before, and through requested states inside of either. So the cotangent between two steps is complete, and nothing else
is handed on. The very last force alone goes back before the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton.flow import Flow, Packet
from nesterov_triton.gates import Identity
from nesterov_triton.gradients.fused_sweep import FusedTranspose
from nesterov_triton.network import Evaluation
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import nystrom
from nesterov_triton.ops.nystrom.reference import ends_of, hermite
from nesterov_triton.ops.nystrom_finish import nystrom_finish
from nesterov_triton.ops.nystrom_reverse_finish import nystrom_reverse_finish
from nesterov_triton.ops.nystrom_reverse_stage import nystrom_reverse_stage
from nesterov_triton.ops.nystrom_stage import nystrom_stage
from nesterov_triton.stepping.nystrom import plain_weights
from nesterov_triton.stepping.stepper import stage_times
from nesterov_triton.systems import Momentum

Spans = Sequence[tuple[float, float, tuple[int, ...]]]  # t, t1, and the requested times in (t, t1], of each step


class Inside(NamedTuple):
    """What the weights of a requested state inside a step are given."""

    theta: float
    h: float
    products: Tensor  # [2, ·] float64


class FusedNystromSweep(FusedTranspose[Nystrom]):
    """Transposed steps of a momentum system by a method that fits it (see `nystrom.check`)."""

    def __init__(self, tableau: Nystrom, flow: Flow, times: Sequence[float], copies: bool = False) -> None:
        super().__init__(tableau, flow, times, copies)
        system = flow.system
        assert isinstance(system, Momentum)
        self.gate_x, self.gate_f, self.gated = system.gate_x, system.gate_f, not isinstance(system.gate_x, Identity)
        self._gate = system.gate_x if self.gated else None
        self._wants_scalars = flow.coefficient_grads and bool(flow.scalars)
        self._scalars = torch.zeros(2, dtype=torch.float64, device=flow.device)  # of ξ and γ, until all steps are done
        self._inside: list[Inside] = []
        self._next: tuple[Tensor, Tensor] | None = None  # state and force at the end of the step in hand

    def bind(self, flow: Flow, times: Sequence[float]) -> None:
        super().bind(flow, times)
        self._scalars.zero_()
        self._inside, self._next = [], None

    def release(self) -> None:
        super().release()
        self._inside, self._next = [], None

    def finish(self) -> None:
        if not self._wants_scalars:
            return
        self.totals.add_scalars(self._scalars)
        if self._inside and "damping" in self.totals.scalars:
            numbers = [[s.theta, s.h] for s in self._inside]
            theta, h = torch.tensor(numbers, dtype=torch.float64, device="cpu").unbind(1)
            products = torch.stack([s.products for s in self._inside], dim=-1).cpu()
            gamma = torch.tensor(self.flow.numbers[0], dtype=torch.float64, device="cpu", requires_grad=True)
            with torch.enable_grad():
                weights = hermite(theta, h, gamma, self.gated)
            self.totals.scalars["damping"] += torch.autograd.grad(weights, gamma, products)[0]
        self._inside = []

    def back(self, spans: Spans, starts: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Tensor:
        """The cotangent of the first state, [D], from those of the requested states after it.

        Args:
            spans: of the accepted steps.
            starts: the states that they started from, [D] each.

        Raises:
            Overwritten: without `copies` the field needs them; the sweep is spoiled.
        """
        adjoint = torch.zeros_like(starts[0])
        for k in reversed(range(len(spans))):
            adjoint = self.step(k, spans, starts[k], adjoint, cotangents)
        self.finish()
        return adjoint

    def step(self, k: int, spans: Spans, z: Tensor, adjoint: Tensor, cotangents: Sequence[Tensor | None]) -> Tensor:
        """The cotangent of the state `z` at the start of step `k`, [D], from that of the state at its end; with what
        the requested states give that are at its start, or inside of the step before, but for the last step, which
        begins with those at its end."""
        t, t1, _ = spans[k]
        weights = plain_weights(self.tableau, self.flow.numbers[0], t1 - t, self.gated)
        packet = self.flow.packet(stage_times(t, t1, self.tableau.c), t1 - t, [*weights, self.kick(k, spans)])
        assert packet.weights is not None
        numbers = packet._replace(weights=packet.weights[:-1])
        given = self._given(spans[k - 1] if k else None, spans[k], z, cotangents)
        return self._step(numbers, packet.weights[-1:], z, adjoint, given, spans[k], cotangents, k == len(spans) - 1)

    def transposed(self, packet: Packet, kick: Tensor, z: Tensor, adjoint: Tensor) -> Tensor:
        """As `step`, of one that is not the last, where no requested states are at its start, inside of it or of the
        step before, and whose numbers are on the device."""
        weights = nystrom.step_weights(packet.dt, packet.coefficients, self.tableau, self.gated)
        return self._step(packet._replace(weights=weights), kick, z, adjoint, None, None, (), False)

    def kick(self, k: int, spans: Spans) -> float:
        """The weight of the first force of step `k` in m at the end of the step before."""
        return self.tableau.b[-1] * (spans[k - 1][1] - spans[k - 1][0]) if k else 0.0

    def is_plain(self, k: int, spans: Spans, cotangents: Sequence[Tensor | None]) -> bool:
        """Whether `transposed` can take step `k`."""
        inside = [i for i in spans[k][2] if self.requested[i] != spans[k][1]]
        early = spans[k - 1][2] if k else ()
        return k < len(spans) - 1 and all(cotangents[i - 1] is None for i in (*inside, *early))

    # ------------------------------------------------------------------------------------------------------------------

    def _step(
        self,
        packet: Packet,
        kick: Tensor,
        z: Tensor,
        adjoint: Tensor,
        given: Tensor | None,
        span: tuple[float, float, tuple[int, ...]] | None,
        cotangents: Sequence[Tensor | None],
        is_last: bool,
    ) -> Tensor:
        self.outputs.release()
        method, c, weights = self.tableau, packet.coefficients, packet.weights
        assert weights is not None
        s, forces = method.stages, list[Tensor]()
        evaluations, outputs = list[Evaluation](), list[Tensor]()
        rates = nystrom.step_weights(packet.dt, c, method, self.gated, rates=True) if self._wants_scalars else None
        needed = self.gated or rates is not None  # forces, on the way back
        h, _ = nystrom_stage(None, z, [], c, weights, method, self.gate_x, self.gate_f)
        for i in range(s if is_last else s - 1):
            assert h is not None
            evaluation, u = self._evaluate(packet.t[i], i == 0, h)
            evaluations.append(evaluation)
            outputs.append(u)
            ahead = i < s - 2 or (is_last and i == s - 2)
            if ahead or (needed and i < s - 1):
                h, force = nystrom_stage(u, z, forces, c, weights, method, self.gate_x, self.gate_f, ahead)
                assert force is not None
                forces.append(force)
        if is_last:
            assert span is not None
            adjoint = self._last(packet, z, forces, evaluations.pop(), outputs.pop(), span, cotangents)
        if span is not None and rates is not None:
            self._add_inside(z, forces[0], span, cotangents)
            self._next = (z, forces[0])
        known = forces if self.gated else []
        of_positions: list[Tensor] = []
        through: Tensor | None = None
        for i in reversed(range(s - 1)):
            found = nystrom_reverse_stage(
                outputs.pop(), z, known, adjoint, of_positions, through, c, weights, kick, method, self.gate_x,
                self.gate_f, given,
            )  # fmt: skip
            if found.of_position is not None:
                of_positions.insert(0, found.of_position)
            self.pulled.release()
            # Popped, so that the stage's graph goes when it has been used.
            (through,) = self._through(packet.t[i], evaluations.pop(), found.cotangent)
        assert through is not None
        known = forces if needed else []
        done = nystrom_reverse_finish(
            z, known, adjoint, of_positions, through, c, weights, kick, method, self.gate_x, given, rates
        )
        if done.quadratures is not None:
            self._scalars += done.quadratures
        return done.cotangent

    def _last(
        self,
        packet: Packet,
        z: Tensor,
        forces: Sequence[Tensor],
        evaluation: Evaluation,
        output: Tensor,
        span: tuple[float, float, tuple[int, ...]],
        cotangents: Sequence[Tensor | None],
    ) -> Tensor:
        """The cotangent of the last state of all, [D], with what comes through the force there."""
        c, weights, i = packet.coefficients, packet.weights, self.tableau.stages - 1
        assert weights is not None
        end, force, _ = nystrom_finish(
            output, z, forces, c, weights, packet.dt, packet.dt, self.tableau, self.gate_x, self.gate_f, False
        )
        self._next = (end, force)
        given = self._given(span, None, end, cotangents)
        if given is None:
            given = torch.zeros(3 * force.numel(), dtype=z.dtype, device=z.device)
        of_x, of_m, of_force = given.view(3, -1)
        scale, drive, q, minus_gamma = c[i].to(z.dtype)
        linear = q if self.gated else q + 0.25 * minus_gamma * minus_gamma
        of_force = of_force + self.tableau.b[-1] * (span[1] - span[0]) * of_m
        self.pulled.release()
        g = self.gate_f.pullback(drive * of_force, output, self.gate_f(output))
        (through,) = self._through(packet.t[i], evaluation, g)
        if self._wants_scalars:
            product = torch.dot(of_force, end.view(2, -1)[0]).to(torch.float64)
            of_gamma = torch.zeros_like(product) if self.gated else -0.5 * c[i, 3] * product
            self._scalars += torch.stack((-c[i, 0] * product, of_gamma))
        return torch.cat((of_x + scale * through + linear * of_force, of_m))

    # -- requested states ----------------------------------------------------------------------------------------------

    def _given(
        self,
        before: tuple[float, float, tuple[int, ...]] | None,
        after: tuple[float, float, tuple[int, ...]] | None,
        z: Tensor,
        cotangents: Sequence[Tensor | None],
    ) -> Tensor | None:
        """What the requested states give x, m and the force at the state `z` between two steps, [3 N], if anything."""
        found: list[Tensor] = []
        for span, at_end in ((before, True), (after, False)):
            if span is None:
                continue
            t, t1, outputs = span
            for index in outputs:
                g = cotangents[index - 1]
                if g is not None and self.requested[index] != t1:
                    found.append(self._share(self.requested[index], t, t1, z, g, at_end))
                elif g is not None and at_end:
                    found.append(torch.cat((g, torch.zeros_like(g[: len(g) // 2]))))
        return sum(found[1:], found[0]) if found else None

    def _share(self, time: float, t: float, t1: float, z: Tensor, g: Tensor, at_end: bool) -> Tensor:
        """What the state requested at `time`, inside the step from t to t1, gives one end of it, [3 N]."""
        weights = self._weights(time, t, t1).to(g.device, g.dtype)
        x, m = g.view(2, -1)
        through = [of_x * x + of_m * m for of_x, of_m in weights.unbind(1)]
        if not self.gated:
            return torch.cat(through[3:] if at_end else through[:3])
        of_x, of_gate = through[2:4] if at_end else through[:2]
        of_m, of_force = through[6:] if at_end else through[4:6]
        momentum = z.view(2, -1)[1]
        of_m = of_m + self.gate_x.pullback(of_gate, momentum, self.gate_x(momentum))
        return torch.cat((of_x, of_m, of_force))

    def _add_inside(
        self,
        z: Tensor,
        force: Tensor,
        span: tuple[float, float, tuple[int, ...]],
        cotangents: Sequence[Tensor | None],
    ) -> None:
        """Keep what the weights of the requested states inside of a step from `z` are given, which depend on γ."""
        t, t1, outputs = span
        assert self._next is not None
        (x, m), (end, end_force) = z.view(2, -1), self._next
        x1, m1 = end.view(2, -1)
        for k in outputs:
            g = cotangents[k - 1]
            if g is not None and self.requested[k] != t1:
                columns = torch.stack(ends_of(self._gate, x, m, force, x1, m1, end_force))
                products = torch.stack([torch.mv(columns, row) for row in g.view(2, -1)]).to(torch.float64)
                self._inside.append(Inside((self.requested[k] - t) / (t1 - t), t1 - t, products))

    def _weights(self, time: float, t: float, t1: float) -> Tensor:
        theta = torch.tensor((time - t) / (t1 - t), dtype=torch.float64, device="cpu")
        return hermite(theta, t1 - t, self.flow.numbers[0], self.gated)
