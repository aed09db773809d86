"""The reverse sweep of `discrete` with everything in memory that stays where it is, so that a transposed step can be
captured and replayed. The host knows the steps from the forward pass and waits for none of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nesterov_triton.flow import Flow
from nesterov_triton.gradients.fused_nystrom_sweep import FusedNystromSweep, Spans
from nesterov_triton.gradients.fused_sweep import FusedSweep
from nesterov_triton.ops import control
from nesterov_triton.ops.control import SETTINGS, SLOTS, Setting, Slot
from nesterov_triton.stepping.device_loop import StageMemory, law_of

S = TypeVar("S", FusedSweep, FusedNystromSweep)


class DeviceTranspose(Generic[S]):
    """Transposed steps; see `discrete.Sweep`.

    Args:
        sweep: forms them. Its totals are added to in place.
        like: a state, [D].

    Attributes:
        replays, used, meanwhile: as `DeviceLoop`'s.
    """

    def __init__(self, sweep: S, like: Tensor) -> None:
        self.sweep: S = sweep
        tableau = sweep.tableau
        self._law = law_of(sweep.flow.system)
        # A last stage without weight (FSAL) is evaluated for the error only: nothing to differentiate.
        self._count = tableau.stages - (tableau.b[-1] == 0)
        self._stages = StageMemory.of(self._count, like)
        self._nodes = torch.tensor(tableau.c[: self._count], dtype=torch.float64).to(like.device)
        self._numbers = torch.zeros(SLOTS + SETTINGS + 1, dtype=torch.float64, device=like.device)
        self._attempted = torch.zeros(SLOTS, dtype=torch.float64, device=like.device)
        self.z, self.adjoint = torch.zeros_like(like), torch.zeros_like(like)
        self.replays: dict[str, Callable[[], None]] = {}
        self.used: set[str] = set()
        self.meanwhile: Callable[[], None] | None = None
        self._cost = 0

    def bind(self, flow: Flow, times: Sequence[float]) -> None:
        """Go on with this flow, in another backward pass like the first; the totals start again from 0."""
        self.sweep.bind(flow, times)

    def release(self) -> None:
        """Hold nothing of the backward pass that is over."""
        self.sweep.release()

    def part(self, name: str) -> Callable[[], None]:
        """The one there is, a step."""
        return self._step

    def run(
        self,
        spans: Spans,
        starts: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
    ) -> Tensor:
        """The cotangent of the first state, [D], from those of the requested states after it; leaves the totals.

        Args:
            spans: of the accepted steps, t, t1 and the requested times in (t, t1], as indices.
            starts: the states that they started from, [D] each.
        """
        sweep, adjoint = self.sweep, self.adjoint
        network = sweep.flow.network
        adjoint.zero_()
        damping, xi = sweep.flow.numbers
        rows = list[list[float]]()
        for i, (t, t1, _) in enumerate(spans):
            slots: list[float] = [0.0] * SLOTS
            setting: list[float] = [0.0] * SETTINGS
            # A step to the end, whatever its length.
            slots[Slot.T], slots[Slot.DT], slots[Slot.FINITE] = t, math.copysign(math.inf, t1 - t), 1.0
            setting[Setting.END], setting[Setting.MAX_STEPS], setting[Setting.CAPACITY] = t1, math.inf, math.inf
            setting[Setting.DAMPING], setting[Setting.XI] = damping, xi
            rows.append([*slots, *setting, self._kick(i, spans)])
        numbers = torch.tensor(rows, dtype=torch.float64, device="cpu").to(adjoint.device, non_blocking=True)
        for i in reversed(range(len(spans))):
            if self._by_hand(i, spans, starts[i], cotangents):
                continue
            self.z.copy_(starts[i])
            self._numbers.copy_(numbers[i])
            before = network.evaluations
            self.replays.get("step", self._step)()
            self.used.add("step")
            network.evaluations = before + self._cost  # a replay is not seen
        if self.meanwhile is not None:
            self.meanwhile()
        sweep.finish()
        return adjoint.clone()

    def _step(self) -> None:
        sweep, before = self.sweep, self.sweep.flow.network.evaluations
        decided, setting = self._numbers[:SLOTS], self._numbers[SLOTS:-1]
        with torch.no_grad():
            control.begin(decided, self._attempted, setting, self._nodes, *self._stages, True, self._law)
        self.adjoint.copy_(self._transposed())
        self._cost = sweep.flow.network.evaluations - before

    def _transposed(self) -> Tensor:
        """The cotangent of the state at the start of the step in hand, [D]."""
        raise NotImplementedError

    def _by_hand(self, i: int, spans: Spans, z: Tensor, cotangents: Sequence[Tensor | None]) -> bool:
        """Take step `i` where it is not like the others, and say so; else add what requested states at its end give."""
        raise NotImplementedError

    def _kick(self, i: int, spans: Spans) -> float:
        """What else step `i` needs."""
        return 0.0


class DeviceSweep(DeviceTranspose[FusedSweep]):
    """Of Runge-Kutta methods."""

    def _transposed(self) -> Tensor:
        return self.sweep.transposed(self._stages.packet, self.z, self.adjoint, self._count)

    def _by_hand(self, i: int, spans: Spans, z: Tensor, cotangents: Sequence[Tensor | None]) -> bool:
        t, t1, outputs = spans[i]
        given = [(k, g) for k in outputs if (g := cotangents[k - 1]) is not None]
        if any(self.sweep.requested[k] != t1 for k, _ in given):
            # States inside enter at every stage: such steps are few, and are taken one by one.
            self.adjoint.copy_(self.sweep.step(t, t1, z, self.adjoint.clone(), given))
            return True
        for _, g in given:
            self.adjoint.add_(g)
        return False


class DeviceNystromSweep(DeviceTranspose[FusedNystromSweep]):
    """Of the methods of `nystrom`."""

    def _transposed(self) -> Tensor:
        return self.sweep.transposed(self._stages.packet, self._numbers[-1:], self.z, self.adjoint)

    def _by_hand(self, i: int, spans: Spans, z: Tensor, cotangents: Sequence[Tensor | None]) -> bool:
        if not self.sweep.is_plain(i, spans, cotangents):
            self.adjoint.copy_(self.sweep.step(i, spans, z, self.adjoint.clone(), cotangents))
            return True
        return False

    def _kick(self, i: int, spans: Spans) -> float:
        return self.sweep.kick(i, spans)
