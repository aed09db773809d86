"""Steps by the methods of `nystrom` by the fused operators: one launch between two evaluations of the field.

The same arithmetic as `nystrom.NystromStepper`, which writes positions and gated momenta too; here nothing is written
but the forces and what the field reads (`ops.nystrom_stage`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nesterov_triton.flow import Flow, Packet
from nesterov_triton.gates import Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch, nystrom
from nesterov_triton.ops.nystrom.reference import hermite
from nesterov_triton.ops.nystrom_dense_output import nystrom_dense_output
from nesterov_triton.ops.nystrom_finish import nystrom_finish
from nesterov_triton.ops.nystrom_stage import Stage, nystrom_stage
from nesterov_triton.stepping.fused_rk import FusedStepper
from nesterov_triton.stepping.nystrom import plain_weights
from nesterov_triton.stepping.stepper import Tolerance, stage_times
from nesterov_triton.systems import Momentum


class FusedNystrom(FusedStepper[Nystrom]):
    """Steps of a momentum system by a method that fits it (see `nystrom.check`). Its slopes are forces; of a step's the
    first and the last are kept."""

    def __init__(self, tableau: Nystrom, flow: Flow, tolerance: Tolerance | None) -> None:
        super().__init__(tableau, flow, tolerance)
        system = flow.system
        assert isinstance(system, Momentum)
        self.gate_x, self.gate_f, self.gated = system.gate_x, system.gate_f, not isinstance(system.gate_x, Identity)
        self._z1 = torch.empty(0)

    def release(self) -> None:
        super().release()
        self._z1 = torch.empty(0)

    def emit(self, z: Tensor, weights: Tensor, out: Tensor, span: Tensor) -> None:
        assert self._packet is not None
        packet, (first, last) = self._packet, self._slopes
        with torch.no_grad():
            weights = nystrom.dense_weights(weights[:, 0], packet.dt, packet.coefficients, self.gated)
            run = dispatch.implementation("nystrom_dense_output", z)
            run(z, first, self._z1, last, weights, self.gate_x, out, span)

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> Sequence[Tensor]:
        theta = torch.tensor([(time - t) / (t1 - t) for time in times], dtype=torch.float64, device="cpu")
        weights = hermite(theta, t1 - t, self.flow.numbers[0], self.gated).permute(2, 0, 1).contiguous()
        weights = weights.to(z.device, non_blocking=True)
        with torch.no_grad():
            first, last = self._slopes
            return nystrom_dense_output(z, first, self._z1, last, weights, self.gate_x).unbind(0)

    def _pack(self, t: float, t1: float) -> Packet:
        h = t1 - t
        weights = plain_weights(self.tableau, self.flow.numbers[0], h, self.gated)
        return self.flow.packet(stage_times(t, t1, self.tableau.c), h, weights)

    def _derivative(self, packet: Packet, z: Tensor) -> tuple[Tensor, Tensor]:
        packet = self._weighted(packet)
        force = self._force(packet, z)
        x, m = z.view(2, -1)
        with torch.no_grad():
            minus_gamma = packet.coefficients[0, 3].to(z.dtype)
            slope = force + minus_gamma * m
            if not self.gated:
                slope = slope - 0.25 * minus_gamma * minus_gamma * x
            return torch.cat((self.gate_x(m), slope)), force

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        self._packet = packet = self._weighted(packet)
        forces, output = [self._force(packet, z) if self._first is None else self._first], None
        for i in range(1, self.tableau.stages):
            h, force = self._stage(packet, z, forces, output)
            forces += [] if force is None else [force]
            output = self._evaluate(packet, i, h)
        assert output is not None
        assert packet.weights is not None
        with torch.no_grad():
            self._z1, self._last, self._error = nystrom_finish(
                output, z, forces, packet.coefficients, packet.weights, self.rtol, self.atol, self.tableau, self.gate_x,
                self.gate_f, self.tolerance is not None,
            )  # fmt: skip
        self._slopes = [forces[0], self._last]
        return self._z1

    def _force(self, packet: Packet, z: Tensor) -> Tensor:
        """The force at the start of the step."""
        h, _ = self._stage(packet, z, [], None)
        _, force = self._stage(packet, z, [], self._evaluate(packet, 0, h), ahead=False)
        assert force is not None
        return force

    def _stage(
        self, packet: Packet, z: Tensor, forces: Sequence[Tensor], output: Tensor | None, ahead: bool = True
    ) -> Stage:
        assert packet.weights is not None
        with torch.no_grad():
            return nystrom_stage(
                output, z, forces, packet.coefficients, packet.weights, self.tableau, self.gate_x, self.gate_f, ahead
            )

    def _evaluate(self, packet: Packet, i: int, h: Tensor | None) -> Tensor:
        """The field's output at stage `i`, which only the next launch reads."""
        assert h is not None
        self.outputs.release()
        return self._output(packet.t[i], h)

    def _weighted(self, packet: Packet) -> Packet:
        """The packet with its weights, made on the device where the host has not."""
        if packet.weights is not None:
            return packet
        with torch.no_grad():
            weights = nystrom.step_weights(packet.dt, packet.coefficients, self.tableau, self.gated)
        return packet._replace(weights=weights)
