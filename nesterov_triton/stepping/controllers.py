"""Step-size controllers: from the embedded error's norm E (accept when E ≤ 1) to the next step's factor.

Controllers are immutable; what they must remember of the last accepted step is handed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from nesterov_triton._names import lookup, public
from nesterov_triton._numbers import make_plain


@dataclass(frozen=True)
class Integral:
    """dt ← dt · clip(safety · E^(-1/q), min_factor, max_factor), no growth right after a rejection.

    The elementary controller (Hairer, Nørsett, Wanner, Solving ODEs I, II.4), and torchdiffeq's; q is the embedded
    order plus one.

    Raises:
        ValueError: not 0 < safety < 1, or not 0 < min_factor < 1 < max_factor.
    """

    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0

    def __post_init__(self) -> None:
        make_plain(self, "controller")
        if not 0 < self.safety < 1:
            raise ValueError(f"controller safety must lie between 0 and 1, got {self.safety}")
        if not 0 < self.min_factor < 1 < self.max_factor < math.inf:
            raise ValueError(
                f"controller needs 0 < min_factor < 1 < max_factor, got {self.min_factor} and {self.max_factor}"
            )

    def exponents(self, q: int) -> tuple[float, float]:
        """(α, β) of the factor safety · E_n^(-α) E_{n-1}^β."""
        return 1 / q, 0.0

    def factor(self, error: float, previous: float, q: int, after_rejection: bool) -> float:
        """The next step over this one.

        Args:
            error: E of this attempt; not finite counts as far too large.
            previous: E of the accepted step before, 1 if there is none.
            q: the embedded order plus one.
            after_rejection: whether the attempt before this one was rejected.
        """
        if not math.isfinite(error):
            return self.min_factor
        accepted = error <= 1
        alpha, beta = self.exponents(q)
        if not accepted:
            alpha, beta = 1 / q, 0.0
        highest = 1.0 if after_rejection or not accepted else self.max_factor
        if error == 0:
            return highest
        wanted: float = self.safety * error**-alpha * previous**beta
        return min(max(wanted, self.min_factor), highest)


@dataclass(frozen=True)
class PI(Integral):
    """dt ← dt · clip(safety · E_n^(-α/q) E_{n-1}^(β/q), ...): smoother step sizes, fewer rejections where the error
    varies.

    Defaults α = 0.7, β = 0.4 (Gustafsson 1991). After a rejection the elementary rule is used.

    Raises:
        ValueError: as `Integral`, or alpha ≤ 0 or beta < 0.
    """

    alpha: float = 0.7
    beta: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 0 or self.beta < 0:
            raise ValueError(f"controller needs alpha > 0 and beta ≥ 0, got {self.alpha} and {self.beta}")

    def exponents(self, q: int) -> tuple[float, float]:
        return self.alpha / q, self.beta / q


ControllerName: TypeAlias = Literal["integral", "pi"]
ControllerLike: TypeAlias = ControllerName | Integral

CONTROLLERS: dict[str, Integral] = {"integral": Integral(), "pi": PI()}


def get(controller: ControllerLike | str) -> Integral:
    """The controller of that name, or the controller itself.

    Raises:
        ValueError: unknown name (the message gives the nearest valid one).
        TypeError: neither a name nor a controller.
    """
    if isinstance(controller, Integral):
        return controller
    if isinstance(controller, str):
        return lookup("controller", controller, CONTROLLERS)
    raise TypeError(f"controller must be a name or a controller object, got {type(controller).__name__}")


__all__ = ["CONTROLLERS", "PI", "ControllerLike", "ControllerName", "Integral", "get"]


def __dir__() -> list[str]:
    return public(globals())
