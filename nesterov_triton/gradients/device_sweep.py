"""The reverse sweep of `discrete` with everything in memory that stays where it is, so that a transposed step can be
captured and replayed. The host knows the steps from the forward pass and waits for none of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nesterov_triton.flow import Flow
from nesterov_triton.gradients.fused_sweep import FusedSweep
from nesterov_triton.ops import control
from nesterov_triton.ops.control import SETTINGS, SLOTS, Setting, Slot
from nesterov_triton.stepping.device_loop import StageMemory, law_of


class DeviceSweep:
    """Transposed steps; see `discrete.Sweep`.

    Args:
        sweep: forms them. Its totals are added to in place.
        like: a state, [D].

    Attributes:
        replays, used: as `DeviceLoop`'s.
    """

    def __init__(self, sweep: FusedSweep, like: Tensor) -> None:
        self.sweep = sweep
        tableau = sweep.tableau
        self._law = law_of(sweep.flow.system)
        # A last stage without weight (FSAL) is evaluated for the error only: nothing to differentiate.
        self._count = tableau.stages - (tableau.b[-1] == 0)
        self._stages = StageMemory.of(self._count, like)
        self._nodes = torch.tensor(tableau.c[: self._count], dtype=torch.float64).to(like.device)
        self._numbers = torch.zeros(SLOTS + SETTINGS, dtype=torch.float64, device=like.device)
        self._attempted = torch.zeros(SLOTS, dtype=torch.float64, device=like.device)
        self.z, self.adjoint = torch.zeros_like(like), torch.zeros_like(like)
        self.replays: dict[str, Callable[[], None]] = {}
        self.used: set[str] = set()
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
        spans: Sequence[tuple[float, float, tuple[int, ...]]],
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
        rows = []
        for t, t1, _ in spans:
            slots, setting = [0.0] * SLOTS, [0.0] * SETTINGS
            # A step to the end, whatever its length.
            slots[Slot.T], slots[Slot.DT], slots[Slot.FINITE] = t, math.copysign(math.inf, t1 - t), 1.0
            setting[Setting.END], setting[Setting.MAX_STEPS], setting[Setting.CAPACITY] = t1, math.inf, math.inf
            setting[Setting.DAMPING], setting[Setting.XI] = damping, xi
            rows.append([*slots, *setting])
        numbers = torch.tensor(rows, dtype=torch.float64, device="cpu").to(adjoint.device, non_blocking=True)
        for i in reversed(range(len(spans))):
            t, t1, outputs = spans[i]
            given = [(k, g) for k in outputs if (g := cotangents[k - 1]) is not None]
            if any(sweep.requested[k] != t1 for k, _ in given):
                # States inside enter at every stage: such steps are few, and are taken one by one.
                adjoint.copy_(sweep.step(t, t1, starts[i], adjoint.clone(), given))
                continue
            for _, g in given:
                adjoint.add_(g)
            self.z.copy_(starts[i])
            self._numbers.copy_(numbers[i])
            before = network.evaluations
            self.replays.get("step", self._step)()
            self.used.add("step")
            network.evaluations = before + self._cost  # a replay is not seen
        sweep.finish()
        return adjoint.clone()

    def _step(self) -> None:
        sweep, before = self.sweep, self.sweep.flow.network.evaluations
        decided, setting = self._numbers[:SLOTS], self._numbers[SLOTS:]
        with torch.no_grad():
            control.begin(decided, self._attempted, setting, self._nodes, *self._stages, True, self._law)
        self.adjoint.copy_(sweep.transposed(self._stages.packet, self.z, self.adjoint, self._count))
        self._cost = sweep.flow.network.evaluations - before
