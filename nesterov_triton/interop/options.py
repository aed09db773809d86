"""The options of torchdiffeq's methods, checked, as what this package's loop is told."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from nesterov_triton import methods, tableaus
from nesterov_triton._names import lookup, unknown
from nesterov_triton.interop.norms import Norm
from nesterov_triton.interop.states import Function
from nesterov_triton.stepping.controllers import Integral
from nesterov_triton.stepping.loop import LoopOptions, Watchers
from nesterov_triton.tableaus import Tableau

# What torchdiffeq's names stand for here. Its rk4 is the 3/8 rule, its dopri8 Prince and Dormand's pair.
NATIVE: dict[str, Tableau] = {
    "dopri5": tableaus.get("dopri5"),
    "dopri8": tableaus.get("prince_dormand8"),
    "tsit5": tableaus.get("tsit5"),
    "bosh3": tableaus.get("bosh3"),
    "fehlberg2": tableaus.get("fehlberg2"),
    "adaptive_heun": tableaus.get("adaptive_heun"),
    "euler": tableaus.get("euler"),
    "midpoint": tableaus.get("midpoint"),
    "heun2": tableaus.get("heun2"),
    "heun3": tableaus.get("heun3"),
    "rk4": tableaus.get("rk4_38"),
}
HANDED_OVER = ("explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver")
METHODS = dict.fromkeys((*NATIVE, *HANDED_OVER))

_ADAPTIVE = ("first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "max_num_steps", "dtype", "step_t",
             "jump_t", "norm")  # fmt: skip
_FIXED = ("step_size", "grid_constructor", "interp", "perturb", "max_num_steps", "norm")
_ADAMS = ("step_size", "grid_constructor", "interp", "perturb", "max_iters", "max_order", "norm")
_SCIPY = ("solver", "min_step", "max_step", "norm")
NO_LIMIT = 2**31 - 1  # torchdiffeq's default for max_num_steps

GridConstructor = Callable[[Function, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Controller(Integral):
    """dt ← dt · clip(safety · E^(-1/q), dfactor, ifactor), never smaller after an accepted step: torchdiffeq's rule.

    Raises:
        ValueError: not 0 < safety ≤ 1, or not 0 < dfactor < 1 ≤ ifactor.
    """

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ValueError(f"options['safety'] must lie in (0, 1], got {self.safety}")
        if not 0 < self.min_factor < 1 <= self.max_factor < math.inf:
            raise ValueError(
                f"options need 0 < dfactor < 1 ≤ ifactor, got dfactor={self.min_factor} and ifactor={self.max_factor}"
            )

    def factor(self, error: float, previous: float, q: int, after_rejection: bool) -> float:
        if not math.isfinite(error):
            return self.min_factor
        if error == 0:
            return self.max_factor
        wanted: float = self.safety * error ** (-1 / q)
        return min(self.max_factor, max(wanted, 1.0 if error < 1 else self.min_factor))


@dataclass(frozen=True)
class Method:
    """A native method with its options.

    Attributes:
        loop: what the loop is told; without the grid.
        norm: of the error, in the state's form; or "seminorm" in adjoint options; None for the default.
        inside: whether the function is seen from inside of a step at its ends.
        step_size, grid_constructor, interp: of a fixed-step method.
    """

    tableau: Tableau
    loop: LoopOptions
    norm: Norm | str | None = None
    inside: bool = False
    step_size: float | None = None
    grid_constructor: GridConstructor | None = None
    interp: str = "linear"


def check_method(method: object, prefix: str = "") -> str:
    """The method's name; dopri5 for None.

    Raises:
        ValueError: unknown (the message gives the nearest valid one).
    """
    name = "dopri5" if method is None else method
    if isinstance(name, str) and name not in METHODS and name in (*methods.METHODS, "auto"):
        # The methods for momentum systems are adaptive or not by one option, have another controller, and no events.
        here = next((theirs for theirs, tableau in NATIVE.items() if tableau.name == name), None)
        also = f"or {prefix}method={here!r}, its name here" if here else "whose gradients and options are its own"
        raise ValueError(
            f"{prefix}method {name!r} is solve's: call nt.solve(system, (x, m), t, method={name!r}), {also}"
        )
    lookup(f"{prefix}method", name, METHODS)
    assert isinstance(name, str)
    return name


def check_options(method: str, options: object, prefix: str = "") -> dict[str, Any]:
    """A copy of the options, which the method knows all of.

    Raises:
        TypeError: no mapping.
        ValueError: an unknown option.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"{prefix}options must be a dict, got {type(options).__name__}")
    known: tuple[str, ...]
    if method in NATIVE:
        known = _ADAPTIVE if NATIVE[method].adaptive else _FIXED
    else:
        known = _SCIPY if method == "scipy_solver" else _ADAMS
    for name in options:
        if name not in known:
            raise ValueError(unknown(f"option of method {method!r} in {prefix}options", name, dict.fromkeys(known)))
    return dict(options)


def make(method: str, options: Mapping[str, Any], watchers: Watchers | None, prefix: str = "") -> Method:
    """The native method of that name with checked options.

    Raises:
        TypeError, ValueError: naming the option and the fix.
    """
    tableau = NATIVE[method]
    get = _Options(options, prefix)
    norm = options.get("norm")
    if norm is not None and not callable(norm) and not (prefix and norm == "seminorm"):
        also = " or 'seminorm'" if prefix else ""
        raise TypeError(f"{prefix}options['norm'] must be a function{also}, got {norm!r}")
    steps = get.number("max_num_steps", NO_LIMIT, 1)
    if steps != int(steps):
        raise ValueError(f"{prefix}options['max_num_steps'] must be an integer, got {steps}")
    if tableau.adaptive:
        dtype = options.get("dtype")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"{prefix}options['dtype'] must be a floating-point dtype, got {dtype!r}")
        smallest, largest = get.number("min_step", 0.0, 0.0), get.number("max_step", math.inf, 0.0, above=True)
        if smallest > largest:
            raise ValueError(f"{prefix}options need min_step ≤ max_step, got {smallest} and {largest}")
        stops, jumps = get.times("step_t"), get.times("jump_t")
        if len({*stops, *jumps}) < len(stops) + len(jumps):
            raise ValueError(f"{prefix}options['step_t'] and ['jump_t'] hold a time twice; name each once")
        first = options.get("first_step")
        loop = LoopOptions(
            controller=Controller(get.number("safety", 0.9), get.number("dfactor", 0.2), get.number("ifactor", 10.0)),
            first_step=None if first is None else get.number("first_step", 0.0, 0.0, above=True),
            max_steps=int(steps),
            min_step=smallest,
            max_step=largest,
            stops=(*stops, *jumps),
            jumps=jumps,
            watchers=watchers,
        )
        return Method(tableau, loop, norm, inside=bool(jumps))
    size = None if options.get("step_size") is None else get.number("step_size", 0.0, 0.0, above=True)
    constructor = options.get("grid_constructor")
    if constructor is not None and not callable(constructor):
        raise TypeError(f"{prefix}options['grid_constructor'] must be a function (func, y0, t) -> grid")
    if size is not None and constructor is not None:
        raise ValueError(f"{prefix}options['step_size'] and ['grid_constructor'] exclude each other; drop one")
    interp = options.get("interp", "linear")
    lookup(f"{prefix}options['interp']", interp, {"linear": None, "cubic": None})
    loop = LoopOptions(Controller(), step_size=size, max_steps=int(steps), watchers=watchers)
    perturb = options.get("perturb", False)
    if not isinstance(perturb, bool):
        raise TypeError(f"{prefix}options['perturb'] must be True or False, got {perturb!r}")
    return Method(tableau, loop, norm, perturb, size, constructor, interp)


class _Options:
    def __init__(self, options: Mapping[str, Any], prefix: str) -> None:
        self.options, self.prefix = options, prefix

    def number(self, name: str, default: float, least: float = -math.inf, above: bool = False) -> float:
        """The option as a number ≥ `least`, or above it."""
        value = self.options.get(name)
        if value is None:
            return default
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            self._refuse(name, "a number", value)
        found = float(value)
        if math.isnan(found) or found < least or (above and found == least):
            self._refuse(name, f"{'above' if above else 'at least'} {least:g}", value)
        return found

    def times(self, name: str) -> tuple[float, ...]:
        value = self.options.get(name)
        if value is None:
            return ()
        try:
            found = tuple(float(x) for x in (value.tolist() if isinstance(value, Tensor) else value))
        except TypeError:
            self._refuse(name, "a 1-D tensor of times", value)
        if not all(map(math.isfinite, found)):
            self._refuse(name, "finite", value)
        return found

    def _refuse(self, name: str, wanted: str, value: object) -> NoReturn:
        raise ValueError(f"{self.prefix}options[{name!r}] must be {wanted}, got {value!r}")


CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def watchers(function: Function, suffix: str, state: Callable[[Tensor], Any], tableau: Tableau) -> Watchers | None:
    """The function's own callbacks, called with (t, state, dt), t and dt as 0-d float64 tensors, dt > 0.

    Args:
        suffix: "" or "_adjoint".
        state: from flat states to what callbacks are given.
    """
    found: Sequence[Any] = [getattr(function, name + suffix, None) for name in CALLBACKS]
    if not any(found):
        return None

    def told(callback: Any) -> Callable[[float, Tensor, float], object] | None:
        if callback is None:
            return None

        def tell(t: float, z: Tensor, dt: float) -> None:
            time, size = torch.tensor((t, abs(dt)), dtype=torch.float64, device=z.device).unbind(0)
            callback(time, state(z.detach()), size)

        return tell

    attempt, accept, reject = map(told, found)
    return Watchers(attempt, accept, reject) if tableau.adaptive else Watchers(attempt)
