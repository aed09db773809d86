"""The loop whose decisions are made on the device: the host launches attempted steps and never waits for one.

The same steps as `loop`, decided by `ops.control`. All that an attempt reads and writes stays where it is, from attempt
to attempt and from solve to solve, so that an attempt can be captured once, as a CUDA graph, and replayed. On a CPU it
is simply called.

The device reports: after every attempt control is written to pinned memory, which the host looks at to see how many
attempts are done and whether the solve is. It launches some ahead, as many as the last solve took in all, and then one
at a time. An attempt launched after the end changes nothing. What is seen on the way is a hint; it counts when all that
was launched is done. The kernel writes it itself: a copy in a captured graph costs 8 µs of the host's and 8 µs of the
device's time (H200), the write 0.1 µs.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nesterov_triton.flow import Flow, Packet
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import control
from nesterov_triton.ops.control import INFINITE, SETTINGS, SLOTS, SPANS, Law, Setting, Slot
from nesterov_triton.status import SolveError, Status
from nesterov_triton.stepping.fused_rk import Attempt
from nesterov_triton.stepping.loop import AcceptedStep, LoopOptions, Progress, fixed_steps
from nesterov_triton.stepping.stepper import Tolerance
from nesterov_triton.systems import Momentum, System
from nesterov_triton.tableaus import Tableau

FAILURES = {
    control.MAX_STEPS: Status.MAX_STEPS,
    control.STEP_UNDERFLOW: Status.STEP_UNDERFLOW,
    control.NON_FINITE: Status.NON_FINITE,
}
TAPE_BYTES = 64 * 2**20  # of a tape, which holds at least 4 and at most 64 steps
AHEAD = 8  # attempts launched and not done, at most
SHORT = 2e-4  # seconds; a shorter attempt is launched while the one before is still under way


class DeviceStepper(Protocol):
    """Steps that a device loop can take; see `fused_rk.FusedStepper`."""

    flow: Flow
    tolerance: Tolerance | None
    rtol: Tensor
    atol: Tensor

    @property
    def tableau(self) -> Tableau | Nystrom: ...

    def bind(self, flow: Flow) -> None: ...

    def release(self) -> None: ...

    def derivative(self, packet: Packet, z: Tensor, start: bool) -> tuple[Tensor, list[Tensor]]: ...

    def attempt(self, packet: Packet, z: Tensor, first: Sequence[Tensor]) -> Attempt: ...

    def emit(self, z: Tensor, weights: Tensor, out: Tensor, span: Tensor) -> None: ...

    def starts(self) -> list[Tensor]: ...

    def commit(self, decided: Tensor, attempt: Tensor) -> None: ...


class StageMemory(NamedTuple):
    """Where `ops.control.begin` leaves what stages need."""

    times: Tensor  # [s] in the state's dtype
    coefficients: Tensor  # [s, 4] float64
    dt: Tensor  # [1] float64

    @classmethod
    def of(cls, stages: int, like: Tensor) -> StageMemory:
        wide: Any = {"dtype": torch.float64, "device": like.device}
        return cls(like.new_zeros(stages), torch.zeros((stages, 4), **wide), torch.zeros(1, **wide))

    @property
    def packet(self) -> Packet:
        return Packet(self.times.unbind(0), self.coefficients, self.dt)


@dataclass(frozen=True)
class Report:
    """Control as an attempt left it."""

    t: float
    dt: float  # of the next attempt
    status: int
    accepted: int
    rejected: int
    output: int
    taped: int
    h: float  # of the last attempt

    @property
    def attempts(self) -> int:
        return self.accepted + self.rejected

    def is_news(self, seen: Report | None) -> bool:
        """Whether an attempt has been reported since `seen`. By the counts: a time may be NaN, and then differs."""
        counts = self.attempts, self.taped, self.status
        return seen is None or counts != (seen.attempts, seen.taped, seen.status)

    @classmethod
    def of(cls, a: Sequence[float]) -> Report:
        """From the numbers of a control."""
        return cls(
            a[Slot.T], a[Slot.DT], int(a[Slot.STATUS]), int(a[Slot.ACCEPTED]), int(a[Slot.REJECTED]),
            int(a[Slot.OUTPUT]), int(a[Slot.TAPED]), a[Slot.H],
        )  # fmt: skip


@dataclass
class Ahead:
    """How far the host is with a solve.

    Attributes:
        taped: whether it unloads a tape.
        meanwhile: left to be called once, when there is nothing else to do.
        launched: attempts.
        unloaded: attempts that were done when the tape was unloaded last.
        marked: whether the loop's event is behind all that was launched.
    """

    taped: bool
    meanwhile: Callable[[], None] | None
    launched: int = 0
    unloaded: int = 0
    marked: bool = False

    def use_the_time(self) -> None:
        """Call what is left to be called."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()


class DeviceLoop:
    """Attempted steps of one method on states of one size, all in memory of their own.

    Args:
        stepper: takes the steps.
        rows: of the state, [D] = rows · N.
        like: a state, [D]: gives size, dtype and device.
        inside: how many times are requested strictly inside the interval.
        taped: whether every accepted step's start is kept.

    Attributes:
        replays: what is called in the place of a part that has been captured, by name.
        used: the parts that have been called.
        meanwhile: called once in a solve, when the host would wait for the device.
        spent: evaluations of the field in the last solve.
    """

    def __init__(self, stepper: Any, rows: int, like: Tensor, inside: int = 0, taped: bool = False) -> None:
        self.stepper: DeviceStepper = stepper
        self._adaptive = stepper.tolerance is not None
        tableau, system, device = stepper.tableau, stepper.flow.system, like.device
        self._law = law_of(system)
        stages = len(tableau.all_c) if inside else tableau.stages
        wide: Any = {"dtype": torch.float64, "device": device}

        # One transfer brings a solve's numbers: control, settings, requested times, nodes.
        nodes = tableau.all_c[: max(stages, 2)]
        self._nodes = [float(c) for c in nodes] + [0.0] * (2 - len(nodes))
        sizes = [SLOTS, SETTINGS, inside, len(self._nodes)]
        self._numbers = torch.zeros(sum(sizes), **wide)
        self.decided, self.setting, requested, self._all_nodes = torch.split(self._numbers, sizes)
        self.requested = requested if inside else None
        self.attempted = torch.zeros(SLOTS, **wide)
        self._trial = torch.zeros(SLOTS, **wide)
        self._sizes = torch.zeros(3, **wide)
        stepper.rtol, stepper.atol = self.setting[Setting.RTOL], self.setting[Setting.ATOL]

        self.z = torch.zeros_like(like)
        self._rows = list(self.z.view(rows, -1).unbind(0))
        self._first: list[Tensor] | None = None  # what the next step starts with, of FSAL methods
        n = self._rows[0].numel()
        room = TAPE_BYTES // max(like.numel() * like.element_size(), 1)
        self.capacity = min(64, max(4, room)) if taped else 0
        self.tape = like.new_zeros((self.capacity, rows, n)) if taped else None
        pinned = device.type == "cuda"
        self._report = torch.zeros(SPANS + 2 * self.capacity, dtype=torch.float64, device="cpu", pin_memory=pinned)
        # Looked at without a call to torch.
        self._values = (ctypes.c_double * len(self._report)).from_address(self._report.data_ptr())
        self._control = memoryview(self._values).cast("B")[: 8 * SLOTS]
        self.outputs = like.new_zeros((inside, like.numel()))
        self._weights = torch.zeros((inside, len(tableau.interpolant)), **wide)
        self._span = torch.zeros(2, dtype=torch.int64, device=device)
        self._stages = StageMemory.of(len(self._nodes), like)
        self._trial_stages = StageMemory.of(2, like)

        self.replays: dict[str, Callable[[], None]] = {}
        self.used: set[str] = set()
        self.meanwhile: Callable[[], None] | None = None
        self._costs: dict[str, int] = {}  # evaluations of the field in each part
        self.spent = 0
        self._solves = 0
        self._end = math.nan
        self._expected = 1
        self._seconds = 0.0  # of an attempt, as seen from the host
        self._event: Any = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def bind(self, flow: Flow) -> None:
        """Go on with this flow, in solves like the first."""
        self.stepper.bind(flow)

    def release(self) -> None:
        """Hold nothing of the solve that is over."""
        self.stepper.release()

    def part(self, name: str) -> Callable[[], None]:
        """What is called again and again: "attempt", "begin" or "begin and choose"."""
        return {"attempt": self._attempt, "begin": self._start}.get(name, lambda: self._start(choose=True))

    def _call(self, name: str) -> None:
        self.used.add(name)
        replay = self.replays.get(name)
        if replay is None:
            self.part(name)()
        else:
            replay()

    # -- on the device -------------------------------------------------------------------------------------------------

    def _attempt(self) -> None:
        """One attempted step, decided; nothing is read."""
        stepper, adaptive = self.stepper, self._adaptive
        before = stepper.flow.network.evaluations
        with torch.no_grad():
            self._begin(self.decided, self._stages, adaptive)
        started = self._first or []
        done = stepper.attempt(self._stages.packet, self.z, started)
        with torch.no_grad():
            if self.requested is not None:
                weighed = (self.requested, self._weights, self._span, stepper.tableau.interpolant)
                control.weigh(self.attempted, done.error, *weighed)
                stepper.emit(self.z, self._weights, self.outputs, self._span)
            if adaptive and not started:
                # Where the slope at the start is not carried, whether it is finite is seen here.
                fit = torch.stack([torch.isfinite(x).all() for x in stepper.starts()]).all()
                self.attempted[Slot.FIRST_FINITE].copy_(fit)
            kept, new = [*self._rows, *started], [*done.z.view(len(self._rows), -1).unbind(0), *done.last]
            control.end(
                self.attempted, self.decided, self.setting, done.error, self.requested, kept, new, len(self._rows),
                self.tape, self._report, adaptive,
            )  # fmt: skip
            stepper.commit(self.decided, self.attempted)
        self._costs["attempt"] = stepper.flow.network.evaluations - before

    def _start(self, choose: bool = False) -> None:
        """The slope at the start, and the first step size if it is to be chosen; as `initial_step`."""
        stepper, before, z = self.stepper, self.stepper.flow.network.evaluations, self.z
        packet = self._trial_stages.packet
        with torch.no_grad():
            self._begin(self.decided, self._trial_stages, True)
        slope, first = stepper.derivative(packet, z, True)
        with torch.no_grad():
            if self._first is None:
                with torch.inference_mode(False):  # it outlives this solve
                    self._first = [torch.empty_like(x) for x in first] if stepper.tableau.fsal else []
            for kept, x in zip(self._first, first, strict=False):
                kept.copy_(x)
            slope = slope.detach()
            control.propose(self.decided, self._trial, self.setting, z, slope, self._sizes, choose)
            if choose:
                trial = torch.empty_like(z)
                control.extrapolate(self.decided, self.setting, z, slope, self._sizes, trial)
                self._begin(self._trial, self._trial_stages, True)
        if choose:
            second, _ = stepper.derivative(packet, trial, False)
            with torch.no_grad():
                control.choose(self.decided, self.setting, z, slope, second.detach(), self._sizes)
        self._costs["begin and choose" if choose else "begin"] = stepper.flow.network.evaluations - before

    def _begin(self, decided: Tensor, stages: StageMemory, adaptive: bool) -> None:
        nodes = self._all_nodes[: len(stages.times)]
        control.begin(decided, self.attempted, self.setting, nodes, *stages, adaptive, self._law)

    # -- on the host ---------------------------------------------------------------------------------------------------

    def start(
        self, z: Tensor, times: Sequence[float], tolerance: Tolerance | None, options: LoopOptions,
        dt: float | None = None,
    ) -> None:  # fmt: skip
        """A new solve, from the state `z` at times[0]; `dt` is the step to try first, if it is known.

        Raises:
            SolveError: of fixed steps, where their size says so.
        """
        stepper, tableau = self.stepper, self.stepper.tableau
        self._solves += 1
        self._end = times[-1]
        t, end = times[0], times[-1]
        sign = math.copysign(1.0, end - t)
        step_size, count = 0.0, 0
        chosen = self._adaptive and dt is None and options.first_step is None
        if not self._adaptive:
            step_size, count = fixed_steps(t, end, options)
        elif dt is None:
            dt = 0.0 if options.first_step is None else sign * options.first_step
        controller, order = options.controller, tableau.error_order + 1
        alpha, beta = controller.exponents(order)
        given = dict.fromkeys(Slot, 0.0) | {
            Slot.T: t, Slot.DT: dt or 0.0, Slot.PREVIOUS: 1.0, Slot.FINITE: 1.0, Slot.FIRST_FINITE: 1.0,
            Slot.SOLVE: float(self._solves),
        }  # fmt: skip
        damping, xi = stepper.flow.numbers
        setting = {
            Setting.START: t, Setting.END: end, Setting.STEP_SIZE: step_size, Setting.COUNT: count,
            Setting.MAX_STEPS: options.max_steps, Setting.SAFETY: controller.safety,
            Setting.MIN_FACTOR: controller.min_factor, Setting.MAX_FACTOR: controller.max_factor,
            Setting.ALPHA: alpha, Setting.BETA: beta, Setting.PLAIN: 1 / order,
            Setting.RTOL: 1.0 if tolerance is None else float(tolerance.rtol),
            Setting.ATOL: 1.0 if tolerance is None else float(tolerance.atol),
            Setting.DAMPING: damping, Setting.XI: xi, Setting.CAPACITY: self.capacity or math.inf,
        }  # fmt: skip
        slots = [given[slot] for slot in Slot] + [0.0] * (SLOTS - len(Slot))
        numbers = [*slots, *(setting[name] for name in Setting), *times[1:-1], *self._nodes]
        self._numbers.copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"), non_blocking=True)
        self.z.copy_(z)
        self._values[INFINITE] = 0.0
        self.spent = 0
        if tableau.fsal or chosen:
            name = "begin and choose" if chosen else "begin"
            self._call(name)
            self.spent = self._costs[name]

    def run(self, unload: Callable[[int], None] | None = None) -> Report:
        """Launch attempts until the solve is over.

        Args:
            unload: called with their number when the tape is full, and at the end.

        Raises:
            RuntimeError: the device stopped reporting.
        """
        ahead, self.meanwhile = Ahead(unload is not None, self.meanwhile), None
        begun = time.perf_counter()
        while True:
            seen = self._look()
            if seen is not None and (self._over(seen) or self._full(seen, ahead)):
                seen = self._settle(ahead)
                if self._over(seen):
                    self._learn(seen, time.perf_counter() - begun)
                    if unload is not None:
                        unload(seen.taped)
                    return seen
                if unload is not None and seen.taped == self.capacity:
                    unload(seen.taped)
                    self.decided[Slot.TAPED].zero_()
                    ahead.unloaded = ahead.launched = seen.attempts
            if ahead.launched < self._limit(ahead, 0 if seen is None else seen.attempts):
                self._call("attempt")
                ahead.launched += 1
                ahead.marked = False
            elif ahead.meanwhile is not None:
                ahead.use_the_time()
            elif self._event is not None:
                self._idle(ahead, seen)

    def _over(self, seen: Report) -> bool:
        """Whether the solve is."""
        return seen.status != control.RUNNING or seen.t == self._end

    def _full(self, seen: Report, ahead: Ahead) -> bool:
        """Whether the tape is, and has not been unloaded since."""
        return ahead.taped and seen.taped == self.capacity and seen.attempts > ahead.unloaded

    def _limit(self, ahead: Ahead, finished: int) -> int:
        """How many attempts may have been launched while that many are known to be done: as many as the last solve
        took, some ahead, and in any case one."""
        least = finished + 1
        hurried = least + int(self._event is not None and self._seconds < SHORT)
        limit = max(min(self._expected, finished + AHEAD), hurried)
        if ahead.taped:  # behind a full tape an attempt is for nothing
            limit = min(limit, ahead.unloaded + self.capacity)
        return max(limit, least)

    def _settle(self, ahead: Ahead) -> Report:
        """What is there when all that was launched is done: what was seen before was a hint."""
        ahead.use_the_time()
        return self._read()

    def _learn(self, last: Report, seconds: float) -> None:
        """From a solve that is over, for the next one; what was launched after its end was for nothing, and does not
        count."""
        if last.status == control.RUNNING:
            self._expected = max(last.attempts, 1)
            self._seconds = seconds / self._expected
        self.spent += last.attempts * self._costs["attempt"]

    def _idle(self, ahead: Ahead, seen: Report | None) -> None:
        """Nothing may be launched: wait a moment for more to be `seen`.

        Raises:
            RuntimeError: all is done, and there is nothing more; or the device has failed.
        """
        if not ahead.marked:
            self._event.record()
            ahead.marked = True
        if self._event.query():
            latest = self._look()
            if latest is None or not latest.is_news(seen):
                raise RuntimeError("the device has finished the attempts launched and reports nothing of them")
        time.sleep(0)

    def _read(self) -> Report:
        """What the device has reported, when it has done all that was launched.

        Raises:
            RuntimeError: it reports nothing of this solve.
        """
        if self._event is not None:
            self._event.record()
            self._event.synchronize()
        report = self._look()
        if report is None:
            raise RuntimeError("the device has finished the attempts launched and reports nothing of them")
        return report

    @property
    def infinite(self) -> bool:
        """Whether an accepted state held a value that is not finite; when all that was launched is done."""
        return self._values[INFINITE] != 0

    def spans(self, count: int) -> list[tuple[float, float]]:
        """The ends of the steps on the tape, likewise."""
        ends = self._values[SPANS : SPANS + 2 * count]
        return list(zip(ends[::2], ends[1::2], strict=True))

    def _look(self) -> Report | None:
        """What the device has reported of this solve last, if anything; a hint, for it may be half written."""
        while True:
            seen, again = bytes(self._control), bytes(self._control)
            if seen == again:
                break
        numbers = struct.unpack(f"{SLOTS}d", seen)
        return Report.of(numbers) if numbers[Slot.SOLVE] == self._solves else None


def law_of(system: System) -> Law | None:
    """What `ops.control.begin` needs of a system."""
    if not isinstance(system, Momentum):
        return None
    rule = system.rule
    return Law(rule.nesterov, rule.exact, rule.sign, rule.gate_x, rule.factor, rule.curvature)


def integrate(
    loop: DeviceLoop,
    z: Tensor,
    times: Sequence[float],
    tolerance: Tolerance | None,
    options: LoopOptions,
    progress: Progress,
    on_accept: Callable[[AcceptedStep], None] | None = None,
) -> list[Tensor]:
    """As `loop.integrate`, by a device loop that is bound; `on_accept` only where it keeps a tape, and when all is
    done.

    Raises:
        SolveError: the last time was not reached; the error carries the states that were.
    """
    chunks: list[Tensor] = []
    spans: list[tuple[float, float]] = []

    def unload(count: int) -> None:
        assert loop.tape is not None
        chunks.append(loop.tape[:count].flatten(1).clone())
        spans.extend(loop.spans(count))

    network = loop.stepper.flow.network
    before = network.evaluations
    loop.start(z, times, tolerance, options, progress.dt)
    report = loop.run(unload if loop.tape is not None else None)
    network.evaluations = before + loop.spent  # a replay is not seen, and an attempt after the end not wanted
    progress.accepted += report.accepted
    progress.rejected += report.rejected
    end = loop.z.clone()
    inside = loop.outputs.clone() if len(loop.outputs) else loop.outputs
    reached = inside.unbind(0)[: report.output]
    if report.status != control.RUNNING:
        chosen = report.status == control.NON_FINITE and not report.attempts  # already as the first size was chosen
        dt = 0.0 if chosen else report.h
        raise SolveError(FAILURES[report.status], report.t, dt, progress.attempted, tuple(reached))
    # Beside an infinite state every error is small, and it stays infinite.
    if loop.infinite and not bool(torch.isfinite(end).all()):
        good = itertools.takewhile(lambda x: bool(torch.isfinite(x).all()), reached)
        raise SolveError(Status.NON_FINITE, times[-1] - report.h, report.h, progress.attempted, tuple(good))
    progress.dt = report.dt
    if on_accept is not None:
        states = [state for chunk in chunks for state in chunk.unbind(0)]
        first, last = 1, len(times) - 1
        sign = math.copysign(1.0, times[-1] - times[0])
        for state, (t, t1) in zip(states, spans, strict=True):
            until = first
            while until <= last and sign * (times[until] - t1) <= 0:
                until += 1
            on_accept(AcceptedStep(t, t1, state, tuple(range(first, until))))
            first = until
    return [*reached, end]
