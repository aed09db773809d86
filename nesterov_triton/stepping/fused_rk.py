"""Explicit Runge-Kutta steps by the fused operators: one launch between two evaluations of the field.

The same arithmetic as `explicit_rk`, which writes every stage's right-hand side; here nothing is written but what the
field or a later launch reads (`ops.momentum_stage`, `ops.first_order_stage`). Not differentiable: the strategies that
call it know the transpose. The steps' scalars live on the device, and the norm of the error is all that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from nesterov_triton.flow import Flow, Packet
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.first_order_dense_output import first_order_dense_output
from nesterov_triton.ops.first_order_finish import first_order_finish
from nesterov_triton.ops.first_order_stage import first_order_stage
from nesterov_triton.ops.momentum_dense_output import momentum_dense_output
from nesterov_triton.ops.momentum_finish import momentum_finish
from nesterov_triton.ops.momentum_stage import Stage, momentum_stage
from nesterov_triton.stepping.dense_output import dense_output
from nesterov_triton.stepping.stepper import TimeAxis, Tolerance, stage_times
from nesterov_triton.systems import Momentum
from nesterov_triton.tableaus import Tableau

M = TypeVar("M", Tableau, Nystrom)


class Attempt(NamedTuple):
    """What a step leaves for a loop on the device to decide about."""

    z: Tensor  # the state at its end
    error: Tensor  # the norm of the embedded error, 0-d float64
    last: list[Tensor]  # what the next step starts with, where the method is FSAL; rows of N elements


class Overwritten(Exception):
    """A field has returned memory in which something still needed was."""


def is_overwritten(error: Exception) -> bool:
    """Whether an error says that a field has overwritten what is still needed; torch's own message, of outputs of its
    CUDA graphs, included."""
    return isinstance(error, Overwritten) or (isinstance(error, RuntimeError) and "output of CUDAGraphs" in str(error))


class Held:
    """Rows that a field, or its vector-Jacobian product, has returned, and that must stay as they are for a while.

    It may hand out the same memory every time (a captured graph does). Copies of everything would cost what the kernels
    save, so rows are held as they come, and their addresses compared: the first time that one lies where another is
    still held, `Overwritten` says so, and from then on all are copied.

    Attributes:
        copies: whether rows are copied.
        place: the address of the last one, 0 where it is a copy.
    """

    def __init__(self, copies: bool = False) -> None:
        self.copies = copies
        self.place = 0
        self._places: set[int] = set()

    def release(self, *places: int) -> None:
        """Nothing is held any more, but what lies at `places`."""
        self._places = {place for place in places if place}

    def keep(self, row: Tensor) -> Tensor:
        """The row, [N], contiguous, as it is or copied.

        Raises:
            Overwritten: it lies in the memory of another one.
        """
        row = row.detach()
        self.place = 0
        if self.copies:
            return row.clone(memory_format=torch.contiguous_format)
        if not row.is_contiguous():
            return row.contiguous()
        self.place = row.untyped_storage().data_ptr()
        if self.place in self._places:
            self.copies = True
            raise Overwritten
        if self.place:
            self._places.add(self.place)
        return row


class FusedStepper(Generic[M]):
    """Steps of one method on one system, by the fused operators; see `stepping.stepper.Stepper`.

    Args:
        tableau: the method.
        flow: the system, bound.
        tolerance: for the embedded error's norm, numbers or 0-d tensors; None for fixed steps.

    Attributes:
        rtol, atol: the tolerance on the device, one element each.
    """

    axis: TimeAxis | None = None

    def __init__(self, tableau: M, flow: Flow, tolerance: Tolerance | None) -> None:
        self.tableau: M = tableau
        self.flow, self.tolerance = flow, tolerance
        self.outputs = Held()
        self.rtol, self.atol = scalar_tolerances(tolerance, flow.device)
        self._first: Tensor | None = None  # slope at the state to go on from: dm, [N], or the field's output
        self._last: Tensor | None = None  # slope at the end of the step just taken, for FSAL methods
        self._slopes: list[Tensor] = []  # of the step just taken: the first, and where it is dense all of them
        self._error = torch.empty(0)
        self._packet: Packet | None = None

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [D]; kept for the first step."""
        derivative, self._first = self._derivative(self.flow.packet((t, t), 0.0), z)
        return derivative

    def probe(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side somewhere else, [D]; what is kept is left as it is."""
        derivative, _ = self._derivative(self.flow.packet((t, t), 0.0), z)
        return derivative

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated."""
        self._packet = self._pack(t, t1)
        try:
            z1 = self._step(self._packet, z)
        except (Overwritten, RuntimeError) as error:
            if not is_overwritten(error):
                raise
            self.outputs.copies = True
            self._first = None  # the slope at the start may have been overwritten, too
            z1 = self._step(self._packet, z)
        if self._slopes:  # of one stage not even that is kept
            self._first = self._slopes[0]  # for another try
        return z1

    # -- for a loop on the device --------------------------------------------------------------------------------------

    def bind(self, flow: Flow) -> None:
        """Go on with this flow, in another solve like the first."""
        self.flow = flow

    def release(self) -> None:
        """Hold nothing of the solve that is over."""
        self.flow = cast(Flow, None)
        self._slopes, self._first, self._last, self._packet = [], None, None, None

    def derivative(self, packet: Packet, z: Tensor, start: bool) -> tuple[Tensor, list[Tensor]]:
        """The right-hand side at the first time of the packet, [D], and what a step that starts there starts with;
        `start` where one will."""
        derivative, first = self._derivative(packet, z)
        return derivative, [first]

    def attempt(self, packet: Packet, z: Tensor, first: Sequence[Tensor]) -> Attempt:
        """One step, from what `derivative` gave or the attempt before left, or without it.

        Raises:
            Overwritten: the field needs `outputs.copies`.
        """
        self._packet, self._first = packet, first[0] if first else None
        z1 = self._step(packet, z)
        return Attempt(z1, self._error, [] if self._last is None else [self._last])

    def emit(self, z: Tensor, weights: Tensor, out: Tensor, span: Tensor) -> None:
        """The states inside the attempt just made, written into those rows of `out`, [T, D], that are in the span; see
        `ops.control.weigh`."""
        raise NotImplementedError

    def starts(self) -> list[Tensor]:
        """The slope that the attempt just made started with."""
        return self._slopes[:1]

    def commit(self, decided: Tensor, attempt: Tensor) -> None:
        """The attempt just made has been decided about: a forward step has nothing to add up."""

    # ------------------------------------------------------------------------------------------------------------------

    def error(self, z: Tensor, z1: Tensor) -> float:
        """The norm of the embedded error of the step just taken. The one host read of a step."""
        return float(self._error)

    def witness(self, z1: Tensor) -> Tensor:
        """0-d, of the step just taken: finite only where its end is."""
        return self._error

    def starts_finite(self) -> bool:
        """Whether the derivative that the step just taken started with is finite."""
        return bool(torch.isfinite(self._slopes[0]).all())

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""
        self._first = self._last

    def restart(self) -> None:
        """Forget the state to go on from: the next step starts from another one."""
        self._first = None

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> Sequence[Tensor]:
        """The states at `times` inside the step just taken and not yet accepted, [D] each; one launch for all."""
        raise NotImplementedError

    def _pack(self, t: float, t1: float) -> Packet:
        """What a step from t to t1 needs."""
        raise NotImplementedError

    def _output(self, t: Tensor, *features: Tensor) -> Tensor:
        """The field's output, [N], held."""
        shape = self.flow.shape
        return self.outputs.keep(self.flow.network(t, *(x.view(shape) for x in features)).reshape(-1))

    def _derivative(self, packet: Packet, z: Tensor) -> tuple[Tensor, Tensor]:
        """The right-hand side at the packet's first time, [D], and its slope as the first of a step."""
        raise NotImplementedError

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        """The step; leaves its slopes and its error."""
        raise NotImplementedError


class FusedRK(FusedStepper[Tableau]):
    """Steps of a Runge-Kutta method; with `dense` where `interpolate` will be called."""

    def __init__(self, tableau: Tableau, flow: Flow, tolerance: Tolerance | None, *, dense: bool = False) -> None:
        super().__init__(tableau, flow, tolerance)
        self.dense = dense

    def _pack(self, t: float, t1: float) -> Packet:
        # Of all stages, the extra ones too: their features may be wanted.
        nodes = self.tableau.all_c if self.dense else self.tableau.c
        return self.flow.packet(stage_times(t, t1, nodes), t1 - t)

    def emit(self, z: Tensor, weights: Tensor, out: Tensor, span: Tensor) -> None:
        assert self._packet is not None
        needed = len(self.tableau.interpolant)
        if len(self._slopes) < needed:
            self._add_slopes(self._packet, z, needed)
        with torch.no_grad():
            self._emit(self._packet, z, weights, out, span)

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> Sequence[Tensor]:
        assert self._packet is not None
        needed = dense_output(self.tableau)
        if len(self._slopes) < needed.stages:
            self._add_slopes(self._packet, z, needed.stages)
        weights = torch.stack([needed.weights((time - t) / (t1 - t)) for time in times]).to(z.device, non_blocking=True)
        return self._dense_output(self._packet, z, weights).unbind(0)

    def _add_slopes(self, packet: Packet, z: Tensor, count: int) -> None:
        """Those of the extra stages up to `count`."""
        raise NotImplementedError

    def _dense_output(self, packet: Packet, z: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def _emit(self, packet: Packet, z: Tensor, weights: Tensor, out: Tensor, span: Tensor) -> None:
        raise NotImplementedError


class FusedMomentumRK(FusedRK):
    """Steps of a momentum system. Its slopes are the dm_i; the dx_i are computed again wherever they are needed."""

    def __init__(self, tableau: Tableau, flow: Flow, tolerance: Tolerance | None, *, dense: bool = False) -> None:
        super().__init__(tableau, flow, tolerance, dense=dense)
        system = flow.system
        assert isinstance(system, Momentum)
        self.gate_x, self.gate_f, self.sees_momentum = system.gate_x, system.gate_f, system.sees_momentum
        self.ahead = 1 if self.sees_momentum else 2

    def _derivative(self, packet: Packet, z: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self._evaluate(packet, z, [], [], 1)
        with torch.no_grad():
            (slope,) = self._stage(packet, z, [], outputs, 0).slopes
            return torch.cat((self.gate_x(z.view(2, -1)[1]), slope)), slope

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        tableau = self.tableau
        slopes = [] if self._first is None else [self._first]
        outputs: list[Tensor] = []
        while len(slopes) + len(outputs) < tableau.stages:
            left = tableau.stages - len(slopes) - len(outputs)
            outputs = self._evaluate(packet, z, slopes, outputs, min(self.ahead, left))
        # The first slope is wanted for another try, too.
        keep = len(outputs) if self.dense or (tableau.adaptive and not slopes) else int(tableau.fsal)
        with torch.no_grad():
            finish = momentum_finish(
                outputs, z, slopes, packet.coefficients, packet.dt, self.rtol, self.atol, tableau, self.gate_x,
                self.gate_f, keep,
            )  # fmt: skip
        self._slopes, self._error = [*slopes, *finish.slopes], finish.error
        self._last = self._slopes[-1] if tableau.fsal else None
        return finish.z

    def _add_slopes(self, packet: Packet, z: Tensor, count: int) -> None:
        outputs: list[Tensor] = []
        while len(self._slopes) + len(outputs) < count:
            left = count - len(self._slopes) - len(outputs)
            outputs = self._evaluate(packet, z, self._slopes, outputs, min(self.ahead, left))
        with torch.no_grad():
            self._stage(packet, z, self._slopes, outputs, 0)

    def _dense_output(self, packet: Packet, z: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            return momentum_dense_output(z, self._slopes, weights, packet.dt, self.tableau, self.gate_x)

    def _emit(self, packet: Packet, z: Tensor, weights: Tensor, out: Tensor, span: Tensor) -> None:
        run = dispatch.implementation("momentum_dense_output", z)
        run(z, self._slopes, weights, packet.dt, self.tableau, self.gate_x, out, span)

    def _evaluate(
        self, packet: Packet, z: Tensor, slopes: list[Tensor], outputs: Sequence[Tensor], ahead: int
    ) -> list[Tensor]:
        """The field's outputs at the `ahead` stages after those of `outputs`, whose slopes are appended to `slopes`."""
        with torch.no_grad():
            stage = self._stage(packet, z, slopes, outputs, ahead)
        self.outputs.release()
        found: list[Tensor] = []
        for h in stage.h:
            features = (h,) if stage.m is None else (h, stage.m)
            found.append(self._output(packet.t[len(slopes) + len(found)], *features))
        return found

    def _stage(self, packet: Packet, z: Tensor, slopes: list[Tensor], outputs: Sequence[Tensor], ahead: int) -> Stage:
        """The launch for these stages; the outputs' slopes are appended to `slopes`."""
        stage = momentum_stage(
            outputs, z, slopes, packet.coefficients, packet.dt, self.tableau, self.gate_x, self.gate_f, ahead,
            self.sees_momentum and ahead > 0,
        )  # fmt: skip
        slopes.extend(stage.slopes)
        return stage


class FusedFirstOrderRK(FusedRK):
    """Steps of y' = f(t, y). Its slopes are the field's outputs themselves."""

    def __init__(self, tableau: Tableau, flow: Flow, tolerance: Tolerance | None, *, dense: bool = False) -> None:
        super().__init__(tableau, flow, tolerance, dense=dense)
        self._places = [0]  # where the slopes of the step just taken lie
        self._first_place = 0

    def accept(self) -> None:
        super().accept()
        self._first_place = self._places[self.tableau.stages - 1] if self.tableau.fsal else 0

    def _derivative(self, packet: Packet, z: Tensor) -> tuple[Tensor, Tensor]:
        self.outputs.release()
        u = self._output(packet.t[0], z).clone()
        self._first_place = 0
        return u, u

    def _step(self, packet: Packet, z: Tensor) -> Tensor:
        tableau = self.tableau
        if self._first is None:
            self.outputs.release()
            slopes = [self._output(packet.t[0], z)]
            self._first_place = self.outputs.place
        else:
            self.outputs.release(self._first_place)
            slopes = [self._first]
        self._places = [self._first_place]
        z1 = z
        for i in range(tableau.stages - 1):
            z1 = self._extend(packet, z, slopes, i)
        with torch.no_grad():
            finish = first_order_finish(z, slopes, packet.dt, self.rtol, self.atol, tableau)
        self._slopes, self._error = slopes, finish.error
        self._last = slopes[-1] if tableau.fsal else None
        return z1 if finish.y is None else finish.y

    def _add_slopes(self, packet: Packet, z: Tensor, count: int) -> None:
        for i in range(len(self._slopes) - 1, count - 1):
            self._extend(packet, z, self._slopes, i)

    def _dense_output(self, packet: Packet, z: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            return first_order_dense_output(z, self._slopes, weights, packet.dt, self.tableau)

    def _emit(self, packet: Packet, z: Tensor, weights: Tensor, out: Tensor, span: Tensor) -> None:
        run = dispatch.implementation("first_order_dense_output", z)
        run(z, self._slopes, weights, packet.dt, self.tableau, out, span)

    def _extend(self, packet: Packet, z: Tensor, slopes: list[Tensor], stage: int) -> Tensor:
        """Evaluate the stage after `stage` and append its slope; return its state."""
        with torch.no_grad():
            state = first_order_stage(z, slopes, packet.dt, self.tableau, stage)
        slopes.append(self._output(packet.t[stage + 1], state))
        self._places.append(self.outputs.place)
        return state


def scalar_tolerances(tolerance: Tolerance | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """rtol and atol as float64 of one element on the device; anything for fixed steps, which look at neither."""
    given = (1.0, 1.0) if tolerance is None else (tolerance.rtol, tolerance.atol)
    rtol, atol = (torch.as_tensor(x, dtype=torch.float64).to(device, non_blocking=True) for x in given)
    return rtol, atol
