"""All methods by name, and the choice among them that `method="auto"` makes."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from nesterov_triton import nystrom, tableaus
from nesterov_triton._names import public
from nesterov_triton.gates import Identity
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.systems import Momentum, System
from nesterov_triton.tableaus import Tableau

Method: TypeAlias = Tableau | Nystrom

METHODS: dict[str, Method] = {**tableaus.TABLEAUS, **nystrom.METHODS}
MethodName: TypeAlias = Literal[
    "dopri5", "tsit5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8", "prince_dormand8",
    "euler", "midpoint", "heun2", "heun3", "rk4", "rk4_38",
    "nystrom4", "nystrom6", "strang", "blanes_moan4", "auto",
]  # fmt: skip

GENERAL = tableaus.get("dopri5")  # what takes any system, and any loop


def get(name: str) -> Method:
    """The method of this name; the general one for "auto".

    Raises:
        TypeError: `name` is not a string.
        ValueError: no method has this name; the message gives the nearest one and all of them.
    """
    return tableaus.named(name, {**METHODS, "auto": GENERAL})


def takes_steps(name: str) -> bool:
    """Whether the method of this name takes fixed steps where it is given a step size."""
    method = get(name)
    return isinstance(method, Nystrom) or not method.adaptive


def reversible(name: str) -> bool:
    """Whether the steps of the method of this name can be taken back."""
    method = get(name)
    return isinstance(method, Nystrom) and method.reversible


def choose(system: System, rtol: Tensor | float, atol: Tensor | float, reversible: bool) -> Method:
    """The adaptive method that needs fewest evaluations of the field, as far as is known of the system beforehand.

    Measured by `python -m benchmarks.structure`: on trained fields nystrom4 needs half of what dopri5 and tsit5 need
    for the same error, with gates and without, down to 1e-8; where the field is smooth and the tolerance tighter than
    that, the higher orders need less.

    Args:
        rtol, atol: the solve's tolerances.
        reversible: whether its steps must be such as can be taken back.
    """
    if reversible:
        return METHODS["blanes_moan4"]
    if not isinstance(system, Momentum) or system.sees_momentum:
        return GENERAL
    tight = max(_smallest(rtol), _smallest(atol))
    if tight >= 1e-8:
        return METHODS["nystrom4"]
    return METHODS["nystrom6"] if isinstance(system.gate_x, Identity) else GENERAL


def _smallest(tolerance: Tensor | float) -> float:
    return float(tolerance.min()) if isinstance(tolerance, Tensor) else tolerance


def controller_of(method: Method) -> str:
    """The name of the controller that an adaptive solve by this method has unless it is told otherwise."""
    return method.controller if isinstance(method, Nystrom) else "integral"


__all__ = ["METHODS", "Method", "MethodName", "choose", "controller_of", "get"]


def __dir__() -> list[str]:
    return public(globals())
