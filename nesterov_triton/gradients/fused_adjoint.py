"""Steps of the adjoint equation, backward in time, by the fused operators.

The state is (z, a), [2 D]. As in a forward step, nothing is written between two evaluations of the field but what it
reads and what later launches need; its cotangent g and its next arguments come from one launch. A stage is one
evaluation and one vector-Jacobian product. See `stepping.stepper.Stepper`, and `adjoint` for the equation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from nesterov_triton.flow import Flow, Packet
from nesterov_triton.gradients.leaves import check_leaves
from nesterov_triton.gradients.quadratures import ParameterQuadratures
from nesterov_triton.gradients.totals import Totals
from nesterov_triton.methods import Method
from nesterov_triton.network import Evaluation
from nesterov_triton.ops import control
from nesterov_triton.ops.first_order_finish import first_order_finish
from nesterov_triton.ops.first_order_stage import first_order_stage
from nesterov_triton.ops.momentum_adjoint_finish import momentum_adjoint_finish
from nesterov_triton.ops.momentum_adjoint_stage import momentum_adjoint_stage
from nesterov_triton.ops.momentum_stage import momentum_stage
from nesterov_triton.stepping.fused_rk import Attempt, Held, Overwritten, is_overwritten, scalar_tolerances
from nesterov_triton.stepping.loop import AcceptedStep
from nesterov_triton.stepping.stepper import TimeAxis, Tolerance, stage_times
from nesterov_triton.systems import Momentum
from nesterov_triton.tableaus import Tableau

M = TypeVar("M", bound=Method)


class Slope(NamedTuple):
    """What is kept of one stage, [N] each."""

    own: Tensor  # dm; the field's output for a first-order system, the force for a method of `nystrom`
    through: Tensor  # (∂f/∂h)ᵀ g
    through_m: Tensor | None  # (∂f/∂m)ᵀ g, where the field sees m
    places: tuple[int, ...] = ()  # where the last two lie, if they are held as they came
    own_place: int = 0  # and the first


class FusedAdjoint(Generic[M]):
    """Steps of (z, a), [2 D], with the quadratures of those that are accepted.

    Args:
        tableau: the method.
        flow: the system, bound for a backward pass.
        tolerance: numbers or 0-d tensors; None for fixed steps.
        totals: where the quadratures go.

    Attributes:
        rtol, atol: the tolerance on the device, one element each.
    """

    axis: TimeAxis | None = None

    def __init__(self, tableau: M, flow: Flow, tolerance: Tolerance | None, totals: Totals) -> None:
        self.tableau: M = tableau
        self.flow, self.tolerance, self.totals = flow, tolerance, totals
        self.outputs, self.pulled = Held(), Held()
        self.quadratures = ParameterQuadratures(tableau, totals)
        self.rtol, self.atol = scalar_tolerances(tolerance, flow.device)
        self._first: Slope | None = None
        self._slopes: list[Slope] = []
        self._error = torch.empty(0)
        # The parameters' cotangents at the state to go on from, for a loop on the device.
        self._kept = [torch.zeros_like(p) for p in totals.params] if tableau.fsal else []

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [2 D]; kept for the first step."""
        derivative, first = self._derivative(self.flow.packet((t, t), 0.0), z, 0)
        copies = [None if x is None else x.clone() for x in (first.through, first.through_m)]
        self._first = Slope(first.own.clone(), *copies)  # type: ignore[arg-type]
        return derivative

    def probe(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side somewhere else, [2 D]; what is kept is left as it is."""
        derivative, _ = self._derivative(self.flow.packet((t, t), 0.0), z, None)
        return derivative

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """(z, a) after one step from t to t1, [2 D], freshly allocated."""
        packet = self._pack(t, t1)
        self.quadratures.begin()
        self._release(self._first)
        try:
            z1 = self._step(packet, z)
        except (Overwritten, RuntimeError) as error:
            if not is_overwritten(error):
                raise
            # Copies from now on, and one stage after the other: what a field's graph keeps may be used again, too.
            self.outputs.copies = self.pulled.copies = True
            self._first = None  # may have been overwritten
            self.quadratures.begin()
            z1 = self._step(packet, z)
        self._first = self._slopes[0]  # for another try
        return z1

    # -- for a loop on the device --------------------------------------------------------------------------------------

    def bind(self, flow: Flow) -> None:
        """Go on with this flow, in another solve like the first; the totals start again from 0."""
        self.flow = flow
        self.totals.restart(flow)

    def release(self) -> None:
        """Hold nothing of the solve that is over."""
        self.flow = self.totals.flow = cast(Flow, None)
        self._slopes, self._first, self.quadratures.sums = [], None, []

    def derivative(self, packet: Packet, z: Tensor, start: bool) -> tuple[Tensor, list[Tensor]]:
        """The right-hand side at the first time of the packet, [2 D], and what a step that starts there starts with;
        `start` where one will."""
        derivative, first = self._derivative(packet, z, 0 if start else None)
        if start and self._kept:
            torch._foreach_copy_(self._kept, self.quadratures.first)
        return derivative, _rows(first)

    def attempt(self, packet: Packet, z: Tensor, first: Sequence[Tensor]) -> Attempt:
        """One step, from what `derivative` gave or the attempt before left, or without it.

        Raises:
            Overwritten: the field needs `outputs.copies` and `pulled.copies`.
        """
        self._first = Slope(first[0], first[1], first[2] if len(first) > 2 else None) if first else None
        self.quadratures.first = self._kept if first else []
        self.quadratures.begin()
        self._release()
        z1 = self._step(packet, z)
        return Attempt(z1, self._error, _rows(self._slopes[-1]) if self.tableau.fsal else [])

    def starts(self) -> list[Tensor]:
        """The slope that the attempt just made started with."""
        return _rows(self._slopes[0])

    def commit(self, decided: Tensor, attempt: Tensor) -> None:
        """The attempt just made has been decided about: if it was accepted, its quadratures are added."""
        sums, following = self.quadratures.sums, self.quadratures.following
        if not self.totals.params:
            return
        kept = self._kept if following else [None] * len(sums[0])
        for total, step, old, new in zip(self.totals.params, sums[0], kept, following or kept, strict=True):
            control.add_accepted(decided, attempt, total, step, old, new)

    # ------------------------------------------------------------------------------------------------------------------

    def error(self, z: Tensor, z1: Tensor) -> float:
        """The norm of the embedded error of the step just taken. The one host read of a step."""
        return float(self._error)

    def witness(self, z1: Tensor) -> Tensor:
        """0-d, of the step just taken: finite only where its end is."""
        return self._error

    def starts_finite(self) -> bool:
        """Whether the derivative that the step just taken started with is finite."""
        first = self._slopes[0]
        rows = (first.own, first.through, first.through_m)
        return all(bool(torch.isfinite(x).all()) for x in rows if x is not None)

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""
        self._first = self._slopes[-1] if self.tableau.fsal else None

    def restart(self) -> None:
        """Forget the state to go on from: the next step starts from another one."""
        self._first = None

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> Sequence[Tensor]:
        """Not wanted: the backward solve is cut at the requested times."""
        raise NotImplementedError

    def on_accept(self, step: AcceptedStep) -> None:
        """Add the step's quadratures to the totals."""
        self.quadratures.accept(step.t1 - step.t)

    def finish(self) -> None:
        """Every step has been taken: bring the totals up to date."""

    def _pack(self, t: float, t1: float) -> Packet:
        """What a step from t to t1 needs."""
        return self.flow.packet(stage_times(t, t1, self.tableau.c), t1 - t)

    def _derivative(self, packet: Packet, z: Tensor, stage: int | None) -> tuple[Tensor, Slope]:
        """The right-hand side at the packet's first time, [2 D], and its slope as the first of a step; the parameters'
        cotangents count as those of `stage`."""
        raise NotImplementedError

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        """The step; leaves its slopes and its error."""
        raise NotImplementedError

    def _release(self, first: Slope | None = None) -> None:
        """Nothing is held any more, but the slope at the start."""
        self.outputs.release(first.own_place if first else 0)
        self.pulled.release(*(first.places if first else ()))

    def _evaluate(self, packet: Packet, i: int, *features: Tensor) -> tuple[Evaluation, Tensor]:
        evaluation = self.flow.network.taped(packet.t[i], *(x.view(self.flow.shape) for x in features))
        if i <= 1:  # once an attempt at least: a field may use a tensor at some times only
            check_leaves(self.flow, evaluation)
        return evaluation, self.outputs.keep(evaluation.u.reshape(-1))

    def _slope(self, i: int | None, own: Tensor, evaluation: Evaluation, g: Tensor) -> Slope:
        """The slope of stage `i` by the field's vector-Jacobian product with `g`, [N]."""
        wanted = i is not None and self.quadratures.wants(i)
        through, _, grads = evaluation.pullback(g, self.flow.params if wanted else ())
        if i is not None:
            self.quadratures.add(i, grads)
        rows, places = [], []
        for v in through:
            rows.append(torch.zeros_like(g) if v is None else self.pulled.keep(v))
            places.append(0 if v is None else self.pulled.place)
        return Slope(own, rows[0], rows[1] if len(rows) > 1 else None, tuple(places))


def _rows(slope: Slope) -> list[Tensor]:
    return [x for x in (slope.own, slope.through, slope.through_m) if x is not None]


class OfMomentum(FusedAdjoint[M]):
    """Steps of (x, m, a_x, a_m), [4 N], by any method, with the integrals of ⟨h, a_m⟩ and ⟨m, a_m⟩ where ξ or γ wants
    them."""

    def __init__(self, tableau: M, flow: Flow, tolerance: Tolerance | None, totals: Totals) -> None:
        super().__init__(tableau, flow, tolerance, totals)
        system = flow.system
        assert isinstance(system, Momentum)
        self.gates, self.sees_momentum = (system.gate_x, system.gate_f), system.sees_momentum
        # ∫⟨h, a_m⟩ and ∫⟨m, a_m⟩, on the device until all steps are done.
        self._scalars = torch.zeros(2, dtype=torch.float64, device=flow.device)
        self._wants_scalars = flow.coefficient_grads and bool(flow.scalars)
        self._of_step: Tensor | None = None

    def on_accept(self, step: AcceptedStep) -> None:
        super().on_accept(step)
        if self._of_step is not None:
            self._scalars += self._of_step

    def finish(self) -> None:
        if self._wants_scalars:
            self.totals.add_scalars(self._scalars)

    def bind(self, flow: Flow) -> None:
        super().bind(flow)
        self._scalars.zero_()

    def commit(self, decided: Tensor, attempt: Tensor) -> None:
        super().commit(decided, attempt)
        if self._of_step is not None:
            self._scalars.add_(torch.where(decided[control.Slot.OK] != 0, self._of_step, 0.0))

    def _joined(self, coefficients: Tensor, z: Tensor, dm: Tensor, slope: Slope) -> Tensor:
        """The right-hand side at the state `z`, [4 N], from what is known there of m' and of the field's transpose."""
        scale, _, q, minus_gamma = coefficients[0].to(z.dtype).unbind(0)
        _, m, a_x, a_m = z.view(4, -1).unbind(0)
        dx = self.gates[0](m)
        of_x = scale * slope.through + q * a_m
        of_m = self.gates[0].pullback(a_x, m, dx) + minus_gamma * a_m
        if slope.through_m is not None:
            of_m = of_m + slope.through_m
        return torch.cat((dx, dm, -of_x, -of_m))


class FusedMomentumAdjoint(OfMomentum[Tableau]):
    """By Runge-Kutta methods."""

    @property
    def ahead(self) -> int:
        """How many stages are evaluated at once."""
        return 1 if self.sees_momentum or self.outputs.copies else 2

    def _derivative(self, packet: Packet, z: Tensor, stage: int | None) -> tuple[Tensor, Slope]:
        self._release()
        state, adjoint = z.view(2, -1).unbind(0)
        c, dt = packet.coefficients, packet.dt
        first = momentum_stage([], state, [], c, dt, self.tableau, *self.gates, 1, self.sees_momentum)
        evaluation, u = self._evaluate(packet, 0, *first.h, *(() if first.m is None else (first.m,)))
        done = momentum_adjoint_stage([u], state, [], adjoint, [], c, dt, self.tableau, *self.gates, 0)
        (own,), (g,) = done.slopes, done.cotangents
        slope = self._slope(stage, own, evaluation, g)
        return self._joined(c, z, own, slope), slope

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        c, dt, tableau = packet.coefficients, packet.dt, self.tableau
        state, adjoint = z.view(2, -1).unbind(0)
        first = [] if self._first is None else [self._first]
        slopes, through = [s.own for s in first], [s.through for s in first]
        through_m = [s.through_m for s in first if s.through_m is not None]
        ahead = min(self.ahead, tableau.stages - len(slopes))
        following = momentum_stage([], state, slopes, c, dt, tableau, *self.gates, ahead, self.sees_momentum)
        h, m = following.h, following.m
        last: Slope | None = None
        while h:
            evaluations: list[Evaluation] = []
            outputs: list[Tensor] = []
            known = len(slopes)
            self.outputs.release()
            for features in h:
                evaluation, u = self._evaluate(packet, known + len(outputs), features, *(() if m is None else (m,)))
                evaluations.append(evaluation)
                outputs.append(u)
            ahead = min(self.ahead, tableau.stages - known - len(outputs))
            done = momentum_adjoint_stage(
                outputs, state, slopes, adjoint, through, c, dt, tableau, *self.gates, ahead,
                self.sees_momentum and ahead > 0, through_m,
            )  # fmt: skip
            for own, evaluation, g in zip(done.slopes, evaluations, done.cotangents, strict=True):
                last = self._slope(len(slopes), own, evaluation, g)
                first.append(last)
                slopes.append(own)
                through.append(last.through)
                if last.through_m is not None:
                    through_m.append(last.through_m)
            h, m = done.h, done.m
        finish = momentum_adjoint_finish(
            state, slopes, adjoint, through, c, dt, self.rtol, self.atol, tableau, *self.gates, self._wants_scalars,
            through_m,
        )  # fmt: skip
        self._slopes, self._error, self._of_step = first, finish.error, finish.quadratures
        return finish.state


class FusedFirstOrderAdjoint(FusedAdjoint[Tableau]):
    """Steps of (y, a), [2 N], with y' = f(t, y) and a' = -(∂f/∂y)ᵀ a."""

    def _derivative(self, packet: Packet, z: Tensor, stage: int | None) -> tuple[Tensor, Slope]:
        self._release()
        slope = self._at(packet, 0, z, stage)
        return torch.cat((slope.own, -slope.through)), slope

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        dt, tableau = packet.dt, self.tableau
        slopes = [self._at(packet, 0, z, 0) if self._first is None else self._first]
        own, through = [slopes[0].own], [slopes[0].through]
        z1 = z
        for i in range(tableau.stages - 1):
            z1 = first_order_stage(z, own, dt, tableau, i, through)
            slopes.append(self._at(packet, i + 1, z1, i + 1))
            own.append(slopes[-1].own)
            through.append(slopes[-1].through)
        finish = first_order_finish(z, own, dt, self.rtol, self.atol, tableau, through)
        self._slopes, self._error = slopes, finish.error
        return z1 if finish.y is None else finish.y

    def _at(self, packet: Packet, i: int, z: Tensor, stage: int | None) -> Slope:
        """The slope at the stage `i` of the packet and the state `z`, counted as `stage`."""
        y, adjoint = z.view(2, -1).unbind(0)
        evaluation, u = self._evaluate(packet, i, y)
        place = self.outputs.place
        slope = self._slope(stage, u, evaluation, adjoint)
        return slope._replace(own_place=place)
