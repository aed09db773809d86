"""The transposed Runge-Kutta step of `discrete`, by the fused operators.

Launches form the cotangents of the field's outputs, as many of them as can be formed at once, from everything that is
already known of the step; nothing else is written. The arithmetic is `discrete.ReverseSweep`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, cast

import torch
from torch import Tensor

from nesterov_triton.flow import Flow, Packet
from nesterov_triton.gradients.leaves import check_leaves
from nesterov_triton.gradients.totals import Totals, accumulate
from nesterov_triton.network import Evaluation
from nesterov_triton.ops.first_order_reverse_finish import first_order_reverse_finish
from nesterov_triton.ops.first_order_reverse_stage import first_order_reverse_stage
from nesterov_triton.ops.first_order_stage import first_order_stage
from nesterov_triton.ops.momentum_reverse_finish import momentum_reverse_finish
from nesterov_triton.ops.momentum_reverse_stage import momentum_reverse_stage
from nesterov_triton.ops.momentum_stage import momentum_stage
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.fused_rk import Held, M
from nesterov_triton.stepping.stepper import stage_times
from nesterov_triton.systems import Momentum
from nesterov_triton.tableaus import Tableau


class FusedTranspose(Generic[M]):
    """What transposed steps by the fused operators have in common, last first, without the cotangents of times.

    Args:
        tableau: the method.
        flow: the system, bound for a backward pass.
        times: the requested times.
        copies: for a field that uses its memory again: copy what it returns, and evaluate a stage once more right
            before its pullback, since what its graph has kept is gone, too.
    """

    times: Tensor | None = None

    def __init__(self, tableau: M, flow: Flow, times: Sequence[float], copies: bool = False) -> None:
        self.tableau: M = tableau
        self.flow, self.requested, self.copies = flow, times, copies
        self.totals = Totals(flow)
        self.outputs, self.pulled = Held(copies), Held(copies)

    def finish(self) -> None:
        """Every step has been taken: bring the totals up to date."""

    # -- for a sweep that is captured ----------------------------------------------------------------------------------

    def bind(self, flow: Flow, times: Sequence[float]) -> None:
        """Go on with this flow, in another backward pass like the first; the totals start again from 0."""
        self.flow, self.requested = flow, times
        self.totals.restart(flow)

    def release(self) -> None:
        """Hold nothing of the backward pass that is over."""
        self.flow = self.totals.flow = cast(Flow, None)

    # ------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, t: Tensor, first: bool, *features: Tensor) -> tuple[Evaluation, Tensor]:
        evaluation = self.flow.network.taped(t, *(x.view(self.flow.shape) for x in features))
        if first:  # at every step: a field may use a tensor at some times only
            check_leaves(self.flow, evaluation)
        return evaluation, self.outputs.keep(evaluation.u.reshape(-1))

    def _through(self, t: Tensor, evaluation: Evaluation, g: Tensor) -> list[Tensor]:
        """The features' cotangents at the stage time `t`, [N] each; the parameters' go into the totals at once."""
        if self.copies:
            evaluation = self.flow.network.taped(t, *evaluation.leaves)
        through, _, grads = evaluation.pullback(g, self.flow.params)
        accumulate(self.totals.params, grads)
        return [torch.zeros_like(g) if v is None else self.pulled.keep(v) for v in through]


class FusedSweep(FusedTranspose[Tableau]):
    """Transposed Runge-Kutta steps; see `discrete.Sweep`."""

    def __init__(self, tableau: Tableau, flow: Flow, times: Sequence[float], copies: bool = False) -> None:
        super().__init__(tableau, flow, times, copies)
        self._dense = dense_output(tableau)

    def step(self, t: float, t1: float, z: Tensor, adjoint: Tensor, outputs: Sequence[tuple[int, Tensor]]) -> Tensor:
        """The cotangent of the state `z` at t, [D], from that of the state at t1 and those of requested states.

        Args:
            outputs: (index of the requested time in (t, t1], cotangent [D]).

        Raises:
            Overwritten: without `copies` the field needs them; the sweep is spoiled.
        """
        inside = [(self.requested[k], g) for k, g in outputs if self.requested[k] != t1]
        end = sum((g for k, g in outputs if self.requested[k] == t1), adjoint)
        # A last stage without weight (FSAL) is evaluated for the error only: nothing to differentiate.
        stages = self._dense.stages if inside else self.tableau.stages - (self.tableau.b[-1] == 0)
        packet = self.flow.packet(stage_times(t, t1, self.tableau.all_c[:stages]), t1 - t)
        seeds: Sequence[Tensor] = ()
        if inside:
            # Weighted sums one by one: a matrix product may run in TF32, where so configured.
            weights = torch.stack([self._dense.weights((time - t) / (t1 - t)) for time, _ in inside], dim=1)
            weights = weights.to(z.device, z.dtype, non_blocking=True)
            columns = torch.stack([g for _, g in inside], dim=1)
            seeds = [torch.mv(columns, w) for w in weights.unbind(0)]
        self.outputs.release()
        self.pulled.release()
        start = self._step(packet, z, end, stages, seeds)
        return sum((g for _, g in inside), start)

    def transposed(self, packet: Packet, z: Tensor, end: Tensor, stages: int) -> Tensor:
        """As `step`, of a step without requested states inside, whose times are on the device.

        Args:
            end: the cotangent of the state at t1, [D].
            stages: how many are in the packet.

        Raises:
            Overwritten: as `step`.
        """
        self.outputs.release()
        self.pulled.release()
        return self._step(packet, z, end, stages, ())

    def _step(self, packet: Packet, z: Tensor, end: Tensor, stages: int, seeds: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class FusedMomentumSweep(FusedSweep):
    """Transposed steps of a momentum system."""

    def __init__(self, tableau: Tableau, flow: Flow, times: Sequence[float], copies: bool = False) -> None:
        super().__init__(tableau, flow, times, copies)
        system = flow.system
        assert isinstance(system, Momentum)
        self.gates, self.sees_momentum = (system.gate_x, system.gate_f), system.sees_momentum
        self.ahead = 1 if self.sees_momentum else 2
        # ∫⟨h, c_m⟩ and ∫⟨m, c_m⟩, on the device until all steps are done.
        self._scalars = torch.zeros(2, dtype=torch.float64, device=flow.device)
        self._wants_scalars = flow.coefficient_grads and bool(flow.scalars)

    def bind(self, flow: Flow, times: Sequence[float]) -> None:
        super().bind(flow, times)
        self._scalars.zero_()

    def finish(self) -> None:
        if self._wants_scalars:
            self.totals.add_scalars(-self._scalars)

    def _step(self, packet: Packet, z: Tensor, end: Tensor, stages: int, seeds: Sequence[Tensor]) -> Tensor:
        c, dt, tableau = packet.coefficients, packet.dt, self.tableau
        slopes: list[Tensor] = []
        group: list[Tensor] = []  # the outputs whose slopes are not known yet
        evaluations: list[Evaluation] = []
        held: list[Tensor] = []
        while len(held) < stages:
            ahead = min(self.ahead, stages - len(held))
            stage = momentum_stage(group, z, slopes, c, dt, tableau, *self.gates, ahead, self.sees_momentum)
            slopes += stage.slopes
            group = []
            for h in stage.h:
                features = (h,) if stage.m is None else (h, stage.m)
                evaluation, u = self._evaluate(packet.t[len(held)], not held, *features)
                evaluations.append(evaluation)
                group.append(u)
                held.append(u)
        through: list[Tensor] = []
        through_m: list[Tensor] = []
        while held:
            reverse = momentum_reverse_stage(
                group, z, slopes, end, through, c, dt, tableau, stages, *self.gates, seeds, through_m
            )
            slopes += reverse.slopes
            found = []
            for g in reversed(reverse.cotangents):
                held.pop()
                # Popped, so that the stage's graph goes when it has been used.
                found.append(self._through(packet.t[len(held)], evaluations.pop(), g))
            through = [*(v for v, *_ in reversed(found)), *through]
            if self.sees_momentum:
                through_m = [*(w for _, w in reversed(found)), *through_m]
            group = held[-self.ahead :]
        done = momentum_reverse_finish(
            z, slopes, end, through, c, dt, tableau, stages, *self.gates, self._wants_scalars, seeds, through_m
        )
        if done.quadratures is not None:
            self._scalars += done.quadratures
        return done.cotangent


class FusedFirstOrderSweep(FusedSweep):
    """Transposed steps of y' = f(t, y)."""

    def _step(self, packet: Packet, z: Tensor, end: Tensor, stages: int, seeds: Sequence[Tensor]) -> Tensor:
        dt, tableau = packet.dt, self.tableau
        slopes: list[Tensor] = []
        evaluations: list[Evaluation] = []
        for i in range(stages):
            y = first_order_stage(z, slopes, dt, tableau, i - 1) if i else z
            evaluation, u = self._evaluate(packet.t[i], i == 0, y)
            evaluations.append(evaluation)
            slopes.append(u)
        through: list[Tensor] = []
        for i in reversed(range(stages)):
            g = first_order_reverse_stage(end, through, dt, tableau, stages, seeds[i] if seeds else None)
            through = [*self._through(packet.t[i], evaluations.pop(), g), *through]
        return first_order_reverse_finish(end, through)
