"""What a loop asks of the thing that takes its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nesterov_triton.nystrom import Nystrom
from nesterov_triton.tableaus import Tableau

Measure = Callable[[Tensor, Tensor, Tensor], "Tensor | float"]


@dataclass(frozen=True)
class Tolerance:
    """rtol and atol: numbers, or tensors that broadcast with the flat state.

    With a `measure` that alone says what an error is: measure(error, z, z1), [D] each, 0-d or a number, at most 1 where
    a step from z to z1 is good enough.
    """

    rtol: Tensor | float
    atol: Tensor | float
    measure: Measure | None = None


class TimeAxis:
    """The differentiable times of a solve: its steps move with the first time, and the last step ends at the last time.

    Step sizes themselves are constants. What a step sees is the float plus a zero that carries the gradient, so that
    values do not depend on whether gradients are wanted.

    Args:
        times: [n], float64 on the CPU.
    """

    def __init__(self, times: Tensor) -> None:
        self._zeros = times - times.detach()
        self._last = float(times[-1].detach())

    def start(self, t: float) -> Tensor:
        """The time `t` at which a step starts."""
        return t + self._zeros[0]

    def end(self, t: float) -> Tensor:
        """The time `t` at which a step ends."""
        return t + self._zeros[-1 if t == self._last else 0]

    def output(self, t: float, index: int) -> Tensor:
        """The requested time of that index, `t`."""
        return t + self._zeros[index]


def stage_times(t: float, t1: float, nodes: Sequence[float], inside: torch.dtype | None = None) -> list[float]:
    """The times of the stages of a step from t to t1.

    Args:
        inside: take the step's ends as the nearest numbers of this dtype inside the step, so that a right-hand side
            which jumps there is seen from the step's own side.
    """
    dt = t1 - t
    if inside is None or dt == 0:
        return [t1 if c == 1.0 else t + c * dt for c in nodes]
    start, end = torch.tensor((t, t1), dtype=torch.float64, device="cpu").to(inside)
    start, end = torch.nextafter(start, end), torch.nextafter(end, start)
    ends = {0.0: float(start), 1.0: float(end)}
    return [ends.get(c, t + c * dt) for c in nodes]


class Stepper(Protocol):
    """Steps of one method on one right-hand side, from flat states, [D], to flat states.

    The derivative at the state to go on from is kept between steps.

    Attributes:
        tableau: the method.
        tolerance: for the embedded error's norm; None for fixed steps.
        axis: the differentiable times, where autograd is to give gradients with respect to them.
    """

    tolerance: Tolerance | None
    axis: TimeAxis | None

    @property
    def tableau(self) -> Tableau | Nystrom: ...

    def first_derivative(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side at the start, [D]; kept for the first step."""

    def probe(self, t: float, z: Tensor) -> Tensor:
        """The right-hand side somewhere else, [D]; what is kept is left as it is."""

    def step(self, t: float, t1: float, z: Tensor) -> Tensor:
        """The state after one step from t to t1, [D], freshly allocated."""

    def error(self, z: Tensor, z1: Tensor) -> float:
        """The norm of the embedded error of the step just taken, from z to z1. The one host read of a step."""

    def witness(self, z1: Tensor) -> Tensor:
        """0-d, of the step just taken, to z1: finite only where z1 is."""

    def starts_finite(self) -> bool:
        """Whether the derivative that the step just taken started with is finite."""

    def accept(self) -> None:
        """Go on from the state that the step just taken gave."""

    def restart(self) -> None:
        """Forget the state to go on from: the next step starts from another one."""

    def interpolate(
        self, t: float, t1: float, z: Tensor, times: Sequence[float], indices: Sequence[int]
    ) -> Sequence[Tensor]:
        """The states at `times`, the requested times of these indices, inside the step from z just taken and not yet
        accepted, [D] each."""
