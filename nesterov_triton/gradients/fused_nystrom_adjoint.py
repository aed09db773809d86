"""Steps of the adjoint equation by the methods of `nystrom`, backward in time, by the fused operators.

The same arithmetic as `nystrom_adjoint.NystromAdjoint`, of which nothing is kept but F_j and what came back through the
field, v_j. That is of a itself, not of w = e^(-γ τ) a, and so is the same at the end of a step and at the start of the
next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nesterov_triton.flow import Flow, Packet
from nesterov_triton.gates import Identity
from nesterov_triton.gradients.fused_adjoint import OfMomentum, Slope
from nesterov_triton.gradients.totals import Totals
from nesterov_triton.nystrom import POINTS, Nystrom
from nesterov_triton.ops import nystrom
from nesterov_triton.ops.nystrom.reference import size_of
from nesterov_triton.ops.nystrom_adjoint_finish import nystrom_adjoint_finish
from nesterov_triton.ops.nystrom_adjoint_stage import nystrom_adjoint_stage
from nesterov_triton.ops.nystrom_stage import nystrom_stage
from nesterov_triton.stepping.nystrom import plain_growth, plain_weights
from nesterov_triton.stepping.stepper import Tolerance, stage_times


class FusedNystromAdjoint(OfMomentum[Nystrom]):
    """Steps of (x, m, a_x, a_m), [4 N], by a method that fits the system (see `nystrom.check`)."""

    def __init__(self, tableau: Nystrom, flow: Flow, tolerance: Tolerance | None, totals: Totals) -> None:
        super().__init__(tableau, flow, tolerance, totals)
        self.gated = not isinstance(self.gates[0], Identity)
        self._size = size_of(tableau, self.gated)  # of a step's weights without its growth
        points = torch.tensor([point for point, _ in POINTS], dtype=torch.float64, device="cpu")
        self._points = points.to(flow.device, non_blocking=True)
        self._wants_damping = flow.coefficient_grads and "damping" in flow.scalars

    def _pack(self, t: float, t1: float) -> Packet:
        h, gamma = t1 - t, self.flow.numbers[0]
        weights = plain_weights(self.tableau, gamma, h, self.gated) + plain_growth(self.tableau, gamma, h)
        return self.flow.packet(stage_times(t, t1, self.tableau.c), h, weights)

    def _derivative(self, packet: Packet, z: Tensor, stage: int | None) -> tuple[Tensor, Slope]:
        self._release()
        state, adjoint = z.view(2, -1).unbind(0)
        c, weights = packet.coefficients, self._weights(packet)
        h, _ = nystrom_stage(None, state, [], c, self._own(weights), self.tableau, *self.gates)
        assert h is not None
        evaluation, u = self._evaluate(packet, 0, h)
        _, force, g = nystrom_adjoint_stage(
            u, state, [], adjoint, [], c, weights, self.tableau, *self.gates, ahead=False
        )
        assert force is not None
        slope = self._slope(stage, force, evaluation, g)
        minus_gamma, (x, m) = c[0, 3].to(z.dtype), state.view(2, -1).unbind(0)
        dm = force + minus_gamma * m
        if not self.gated:
            dm = dm - 0.25 * minus_gamma * minus_gamma * x
        return self._joined(c, z, dm, slope), slope

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        method, c, weights = self.tableau, packet.coefficients, self._weights(packet)
        state, adjoint = z.view(2, -1).unbind(0)
        slopes = [] if self._first is None else [self._first]
        forces, through = [s.own for s in slopes], [s.through for s in slopes]
        h, _ = nystrom_stage(None, state, forces, c, self._own(weights), method, *self.gates)
        output = None
        for i in range(len(slopes), method.stages):
            assert h is not None
            self.outputs.release()
            evaluation, output = self._evaluate(packet, i, h)
            ahead = i < method.stages - 1
            h, force, g = nystrom_adjoint_stage(
                output, state, forces, adjoint, through, c, weights, method, *self.gates, ahead
            )
            # The last force comes from the finish.
            slopes.append(self._slope(i, g if force is None else force, evaluation, g))
            through.append(slopes[-1].through)
            if force is not None:
                forces.append(force)
        assert output is not None
        dense = None
        if self._wants_damping:
            dense = nystrom.dense_weights(self._points, packet.dt, c, self.gated)
        done = nystrom_adjoint_finish(
            output, state, forces, adjoint, through, c, weights, packet.dt, self.rtol, self.atol, method, *self.gates,
            self.tolerance is not None, self._wants_scalars, dense,
        )  # fmt: skip
        slopes[-1] = slopes[-1]._replace(own=done.force)
        self._slopes, self._error, self._of_step = slopes, done.error, done.quadratures
        return done.state

    def _weights(self, packet: Packet) -> Tensor:
        """The step's weights with its growth, made on the device where the host has not."""
        if packet.weights is not None:
            return packet.weights
        return nystrom.step_weights(packet.dt, packet.coefficients, self.tableau, self.gated, growth=True)

    def _own(self, weights: Tensor) -> Tensor:
        """Those of the state's own step."""
        return weights[: self._size]
