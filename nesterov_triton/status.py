"""What became of a solve: counts, and a status that carries its message."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor


class Status(enum.Enum):
    """How a solve ended. The value is the message for the user."""

    SUCCESS = "the last time was reached"
    MAX_STEPS = "the solver took max_steps steps without reaching the last time; raise max_steps or the tolerances"
    STEP_UNDERFLOW = (
        "the step size fell below what the time can resolve; the problem may be stiff or singular here, or the "
        "tolerances tighter than the dtype allows: loosen them or use float64"
    )
    NON_FINITE = "the field or the state became infinite or NaN; look at the field at this time"


@dataclass
class Stats:
    """Counts of one solve: numbers, or 0-d tensors from inside of torch.compile.

    Attributes:
        nfe_forward: evaluations of the field in the forward pass.
        nfe_backward: evaluations of the field, each with its vector-Jacobian product, in the backward pass; 0 until it
            has run. Where nothing is evaluated again ("backprop", `Discrete(recompute=False)`), it counts the
            vector-Jacobian products.
        accepted: accepted steps, forward.
        rejected: rejected steps, forward.
        method: the method's name.
        path: what did the solver's elementwise work in the forward pass: "kernels", or "torch: " and why not; see
            `nesterov_triton.kernels`.
        path_backward: the same for the backward pass; empty until it has run.
        loop: what decided about the steps of the forward pass: "graph", "device: ..." for the same without a graph, or
            "eager" and why; see `solve`.
        loop_backward: the same for the backward pass.
    """

    nfe_forward: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    method: str = ""
    path: str = ""
    path_backward: str = ""
    loop: str = ""
    loop_backward: str = ""

    def as_dict(self) -> dict[str, int | str]:
        """All of it by name, as Python's own numbers and words, to be logged. Counts of a compiled call are read from
        the device."""
        return {f.name: value if isinstance(value := getattr(self, f.name), str) else int(value) for f in fields(self)}

    def __add__(self, other: Stats) -> Stats:
        """The counts of two calls together; where their words differ, both. What a backward pass counts later is not in
        the sum: keep each call's stats, and add them up when it has run, by `sum(stats)`."""
        if not isinstance(other, Stats):
            return NotImplemented
        return Stats(*(_together(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def __radd__(self, other: Literal[0]) -> Stats:
        """For `sum`, which starts from 0."""
        return self + Stats() if isinstance(other, int) and other == 0 else NotImplemented


def _together(a: Any, b: Any) -> Any:
    return "; ".join(dict.fromkeys(filter(None, (*a.split("; "), *b.split("; "))))) if isinstance(a, str) else a + b


class SolveError(RuntimeError):
    """A solve that did not reach its last time.

    Attributes:
        status: why.
        t, dt: time and step size of the last attempt, in units of the time.
        steps: attempted steps.
        reached: the states, [D] each, at those requested times after the first that were reached.
        stats: the counts up to there, where `solve` or a layer raised it.
    """

    stats: Stats | None = None

    def __init__(
        self, status: Status, t: float, dt: float, steps: int, reached: tuple[Tensor, ...] = (), where: str = "solve"
    ) -> None:
        super().__init__(f"{where} failed at t = {t:.9g}, dt = {dt:.3g}, after {steps} steps: {status.value}")
        self.status, self.t, self.dt, self.steps, self.reached, self.where = status, t, dt, steps, reached, where

    def __reduce__(self) -> tuple[object, ...]:
        # Beside the arguments what was set later: stats, notes.
        return type(self), (self.status, self.t, self.dt, self.steps, self.reached, self.where), self.__dict__.copy()
