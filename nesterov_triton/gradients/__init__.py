"""Gradient strategies: each owns forward and backward of one way to differentiate a solve."""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from nesterov_triton._names import lookup, public
from nesterov_triton.gradients.adjoint import Adjoint
from nesterov_triton.gradients.backprop import Backprop
from nesterov_triton.gradients.discrete import Discrete
from nesterov_triton.gradients.problem import Problem
from nesterov_triton.gradients.reversible import Reversible


@runtime_checkable
class Gradient(Protocol):
    """A way to differentiate a solve."""

    def solve(self, problem: Problem) -> list[Tensor]:
        """The states at the requested times after the first, [D] each, with their graph."""


GradientName: TypeAlias = Literal["discrete", "adjoint", "reversible", "backprop"]
GradientLike: TypeAlias = GradientName | Gradient

GRADIENTS: dict[str, Gradient] = {
    "discrete": Discrete(),
    "adjoint": Adjoint(),
    "reversible": Reversible(),
    "backprop": Backprop(),
}


def get(gradient: GradientLike | str) -> Gradient:
    """The strategy of that name, or the strategy itself.

    Raises:
        ValueError: unknown name (the message gives the nearest valid one).
        TypeError: neither a name nor a strategy.
    """
    if isinstance(gradient, str):
        return lookup("gradient", gradient, GRADIENTS)
    if isinstance(gradient, Gradient) and not isinstance(gradient, type):
        return gradient
    raise TypeError(f"gradient must be a name or a strategy object, got {gradient!r}")


__all__ = [
    "GRADIENTS",
    "Adjoint",
    "Backprop",
    "Discrete",
    "Gradient",
    "GradientLike",
    "GradientName",
    "Reversible",
    "get",
]


def __dir__() -> list[str]:
    return public(globals())
