"""The right-hand sides: first order, and the momentum family that covers every second-order model here.

    h  = κ(t) x                                       the features the network sees
    x' = σ_x(m)                                       momentum coupling
    m' = -γ m + s(t) σ_f(f(t, h)) + q(t) x            damping, gradient-feature nonlinearity, position

| model          | κ          | γ        | s(t)   | q(t)                      | σ_x | σ_f |
|----------------|------------|----------|--------|---------------------------|-----|-----|
| NesterovNODE   | k(t)       | 1        | -1     | 0                         | id  | id  |
| GNesterovNODE  | σ(k(t))    | 1        | -1     | -ξ κ                      | σ   | σ   |
| ... form=exact | the same   | 1        | -1 / κ | (r²/4 - r/2)/t² - 1/4 - ξ κ | " | "  |
| HBNODE         | 1          | learned  | +1     | 0                         | id  | id  |
| GHBNODE        | 1          | learned  | +1     | -ξ                        | σ   | id  |
| SONODE         | 1          | 0        | +1     | 0                         | id  | id, f sees (h, m) |

with k(t) = t^(-r/2) e^(t/2), which takes the singular damping out of Nesterov's limit h'' + (r/t) h' = F, r = 3 (Su,
Boyd, Candès 2014). In the absorbed form (Nguyen et al., NeurIPS 2022) the network stands for all that is left, in the
exact form for -F alone.

A system is what a solver integrates; it holds the user's network and knows nothing of methods. The state of a
first-order system is a tensor y, that of a momentum system a pair (x, m) of tensors of one shape. Solvers see either as
one tensor ``[rows, N]``: one row for y, two for (x, m).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from nesterov_triton import gates, transforms
from nesterov_triton._fields import check_field, check_instance
from nesterov_triton._names import lookup, public
from nesterov_triton._numbers import is_number

Field: TypeAlias = Callable[..., Tensor]
Form: TypeAlias = Literal["absorbed", "exact"]
Number: TypeAlias = float | Tensor
N = TypeVar("N", float, Tensor)
Xi: TypeAlias = float | Literal["learnable"]

_EARLIEST, _LATEST = 1e-100, 1000.0  # between them k(t) fits into a float64


class Coefficients(NamedTuple, Generic[N]):
    """What a momentum system's right-hand side needs of the time alone: numbers at one time, or tensors [s] at s times.

    Attributes:
        scale: κ; None where κ = 1.
        drive: s(t); None where it is the system's constant sign.
        q, minus_gamma: the factors of x and m in m'; both None where both are 0.
    """

    scale: N | None
    drive: N | None
    q: N | None
    minus_gamma: N | None


class Rule(NamedTuple):
    """What a momentum system's right-hand side is made of, but the field, γ and ξ; the attributes are `Momentum`'s."""

    nesterov: bool
    exact: bool
    damped: bool
    residual: bool
    sign: float
    gate_x: gates.Gate
    gate_f: gates.Gate
    factor: float = 3.0

    @property
    def curvature(self) -> float:
        """What the exact form's factor of x has of 1/t²: r²/4 - r/2."""
        return 0.25 * self.factor * self.factor - 0.5 * self.factor

    def of_time(self, t: Any) -> tuple[Any, Any, Any]:
        """What the time alone decides: κ, s and the exact form's own part of q; None for what is constant."""
        if not self.nesterov:
            return None, None, None
        k = nesterov_scale(t, self.factor)
        scale = self.gate_x(k) if isinstance(k, Tensor) else self.gate_x.number(k)
        return (scale, self.sign / scale, self.curvature / (t * t) - 0.25) if self.exact else (scale, None, None)

    def coefficients(self, t: Any, damping: Any, xi: Any) -> Coefficients[Any]:
        """The right-hand side's time-dependent factors: for a number, numbers; for times [s], float64 on the CPU,
        tensors [s], differentiable."""
        scale, drive, own = self.of_time(t)
        if not self.damped and not self.exact and not self.residual:
            return Coefficients(scale, drive, None, None)
        zero = 0.0 * t
        q = zero - xi * (1.0 if scale is None else scale)
        return Coefficients(scale, drive, q if own is None else q + own, zero - damping)


class System(nn.Module):
    """A right-hand side around a user's network.

    Attributes:
        field: the network; an `nn.Module` is registered, so that its parameters are the system's.
        rows: how many blocks of the size of h the state has: 1 (first order) or 2 (x and m).
        sees_momentum: whether the network is called as f(t, h, m) rather than f(t, h).
    """

    rows: int = 1
    sees_momentum: bool = False
    field: Field

    def __init__(self, field: Field, arguments: str = "t, h") -> None:
        super().__init__()
        check_field(field, arguments)
        # Without the cast the type checker would take nn.Module.__setattr__'s narrower signature.
        self.field = cast(Any, field)

    def check_times(self, times: list[float]) -> None:
        """Raise ValueError where the system is not defined at some of `times`."""

    def check_range(self, times: list[float], dtype: torch.dtype) -> None:
        """Raise ValueError where what the system needs of `times` does not fit into the state's dtype."""

    def scalars(self) -> dict[str, Tensor]:
        """The learnable scalars of the right-hand side itself (γ, ξ), 0-d, differentiable."""
        return {}


class FirstOrder(System):
    """y' = f(t, y) for a tensor y of any shape."""


def as_system(system: object) -> System:
    """The system itself, or a plain callable f(t, y) as a first-order system."""
    if isinstance(system, System):
        return system
    check_instance("system", system)
    if callable(system):
        return FirstOrder(system)
    raise TypeError(f"system must be a nesterov_triton system or a callable f(t, y), got {type(system).__name__}")


class Momentum(System):
    """The momentum family; see the module's table. Built by the functions below.

    Args:
        field: f(t, h), or f(t, h, m) with `sees_momentum`; returns a tensor of h's shape and dtype.
        nesterov: κ(t) = gate_x(k(t)) if true, 1 if not.
        damping: γ as a number, or "learnable": sigmoid of a parameter that starts at -3.
        sign: s, +1 or -1.
        gate_x: σ_x, applied to m in x' and to k(t) in κ.
        gate_f: σ_f, applied to f.
        xi: ξ as a number ≥ 0, or "learnable": softplus of a parameter, 0.5 at the start.
        form: "absorbed" (the network stands for everything but damping and residual) or "exact" (Nesterov only: it
            stands for -F alone).
        sees_momentum: call the network as f(t, h, m).
        damping_factor: r ≥ 0 in Nesterov's damping r/t; 3 is that of his method.

    Raises:
        ValueError: an argument out of range or an unknown name.
    """

    rows = 2

    def __init__(
        self,
        field: Field,
        *,
        nesterov: bool = False,
        damping: float | Literal["learnable"] = 0.0,
        sign: float = 1.0,
        gate_x: gates.GateLike = "identity",
        gate_f: gates.GateLike = "identity",
        xi: Xi = 0.0,
        form: Form = "absorbed",
        sees_momentum: bool = False,
        damping_factor: float = 3.0,
    ) -> None:
        super().__init__(field, "t, h, m" if sees_momentum else "t, h")
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign!r}; scale the field instead")
        self.nesterov = nesterov
        self.sign = float(sign)
        self.damping_factor = _number("damping_factor", damping_factor, learnable=False)
        if self.damping_factor != 3 and not nesterov:
            raise ValueError("damping_factor is the Nesterov systems' r in r/t; leave it out for this one")
        self.gate_x = gates.get(gate_x)
        self.gate_f = gates.get(gate_f)
        self.exact = lookup("form", form, {"absorbed": False, "exact": True})
        if self.exact and not nesterov:
            raise ValueError("form='exact' is defined for the Nesterov systems only; leave form out for this one")
        self.sees_momentum = sees_momentum
        self.raw_damping: nn.Parameter | None = None
        self.raw_xi: nn.Parameter | None = None
        self.fixed_damping = self.fixed_xi = 0.0  # where they are not learnable
        if damping == "learnable":
            self.raw_damping = nn.Parameter(torch.tensor(-3.0))
        else:
            self.fixed_damping = _number("damping", damping)
        if xi == "learnable":
            self.raw_xi = nn.Parameter(torch.tensor(math.log(math.expm1(0.5))))
        else:
            self.fixed_xi = _number("xi", xi)
        self.damped = self.raw_damping is not None or self.fixed_damping != 0
        self.residual = self.raw_xi is not None or self.fixed_xi != 0

    @property
    def damping(self) -> Tensor | float:
        """γ: a 0-d tensor in (0, 1) where it is learnable."""
        return self.fixed_damping if self.raw_damping is None else torch.sigmoid(self.raw_damping)

    @property
    def xi(self) -> Tensor | float:
        """ξ ≥ 0: a 0-d tensor where it is learnable."""
        return self.fixed_xi if self.raw_xi is None else nn.functional.softplus(self.raw_xi)

    def scalars(self) -> dict[str, Tensor]:
        both = {"damping": self.damping, "xi": self.xi}
        return {name: value for name, value in both.items() if isinstance(value, Tensor)}

    def check_times(self, times: list[float]) -> None:
        if self.nesterov and min(times) <= 0:
            raise ValueError(
                f"t must be positive for a Nesterov system, whose damping {self.damping_factor:g}/t is singular at 0; "
                f"got {min(times)}. Shift the interval, for example t=(1.0, 2.0)"
            )
        if self.nesterov and not (min(times) > _EARLIEST and max(times) < _LATEST):
            raise ValueError(
                f"t must lie between {_EARLIEST:g} and {_LATEST:g} for a Nesterov system, whose k(t) overflows; "
                f"got {times}"
            )

    def check_range(self, times: list[float], dtype: torch.dtype) -> None:
        if not self.nesterov:
            return
        least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        for t in (min(times), max(times)):  # k has its largest values at an end
            scale, drive, q = self.rule.of_time(t)
            # x = h / κ has to fit, too.
            if not least <= scale <= min(most, 1 / least) or max(abs(drive or 0.0), abs(q or 0.0)) > most:
                raise ValueError(
                    f"t={t:g} is out of {dtype}'s range for this system, whose κ(t) is {scale:.3g} there; take times "
                    "nearer to 1, or float64"
                )

    def scale(self, t: Tensor) -> Tensor:
        """κ(t), shape of `t`; differentiable."""
        return self.gate_x(nesterov_scale(t, self.damping_factor)) if self.nesterov else torch.ones_like(t)

    def scale_and_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """κ(t) and κ'(t), shapes of `t`; differentiable."""
        if not self.nesterov:
            return torch.ones_like(t), torch.zeros_like(t)
        k = nesterov_scale(t, self.damping_factor)
        kappa = self.gate_x(k)
        return kappa, self.gate_x.pullback(k * (0.5 - 0.5 * self.damping_factor / t), k, kappa)

    @property
    def rule(self) -> Rule:
        """All that is constant about the right-hand side."""
        return Rule(
            self.nesterov, self.exact, self.damped, self.residual, self.sign, self.gate_x, self.gate_f,
            self.damping_factor,
        )  # fmt: skip

    def initial_state(self, h: Tensor, velocity: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x, m) at time `t` from features and an initial velocity, all of h's shape (zeros without a velocity).

        In the absorbed form and for the heavy-ball models the velocity is m itself; in the exact form it is h'(t), so
        that m = (h' - κ'(t) x) / κ(t) with x = h / κ(t).
        """
        v = torch.zeros_like(h) if velocity is None else velocity
        if not self.nesterov:
            return h, v
        if not self.exact:
            return h / self._scale_like(t, h), v
        kappa, rate = (c.to(h.device, h.dtype) for c in self.scale_and_rate(t))
        x = h / kappa
        return x, (v - rate * x) / kappa

    def features(self, t: Tensor, x: Tensor) -> Tensor:
        """h = κ(t) x, for a 0-d time and x of any shape, or times [n] and x [n, ...]."""
        if not self.nesterov:
            return x
        return x * self._scale_like(t, x)

    def _scale_like(self, t: Tensor, x: Tensor) -> Tensor:
        """κ(t) in x's dtype, to go with x."""
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and transforms.readable(t):
            # As numbers: a microsecond instead of ten operators on a tensor of one element.
            values = t.detach().reshape(-1).tolist()
            if all(_EARLIEST < value < _LATEST for value in values):
                rule = self.rule
                numbers = [rule.of_time(value)[0] for value in values]
                kappa = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(t.shape)
                if t.requires_grad or transforms.active():  # the same to the bit, plus a zero that carries the graph
                    exact = self.scale(t)
                    kappa = kappa + (exact - exact.detach())
                return _broadcast(kappa, x)
        return _broadcast(self.scale(t), x)

    def velocity(self, t: Tensor, x: Tensor, m: Tensor) -> Tensor:
        """h' = κ σ_x(m) + κ' x, shapes as in `features`."""
        speed = self.gate_x(m)
        if not self.nesterov:
            return speed
        kappa, rate = self.scale_and_rate(t)
        return _broadcast(kappa, x) * speed + _broadcast(rate, x) * x


@overload
def nesterov_scale(t: float, factor: float = 3.0) -> float: ...
@overload
def nesterov_scale(t: Tensor, factor: float = 3.0) -> Tensor: ...
def nesterov_scale(t: Number, factor: float = 3.0) -> Number:
    """k(t) = t^(-r/2) e^(t/2) for t > 0, a number or a tensor of any shape, and r = `factor`."""
    return t ** (-0.5 * factor) * (torch.exp(0.5 * t) if isinstance(t, Tensor) else math.exp(0.5 * t))


def second_order(field: Field) -> Momentum:
    """SONODE (Norcliffe et al. 2020): h'' = f(t, h, h')."""
    return Momentum(field, sees_momentum=True)


def heavy_ball(field: Field) -> Momentum:
    """HBNODE (Xia et al. 2021): h'' + γ h' = f(t, h), γ learnable in (0, 1)."""
    return Momentum(field, damping="learnable")


def generalised_heavy_ball(field: Field, gate: gates.GateLike = "softclip", xi: Xi = "learnable") -> Momentum:
    """GHBNODE (Xia et al. 2021): h' = σ(m), m' = -γ m + f(t, h) - ξ h, γ learnable in (0, 1).

    For the arguments see `Momentum`; σ is its gate_x.
    """
    return Momentum(field, damping="learnable", gate_x=gate, xi=xi)


def nesterov(field: Field, form: Form = "absorbed", damping_factor: float = 3.0) -> Momentum:
    """NesterovNODE (Nguyen et al. 2022): h = k(t) x, x' = m, m' = -m - f(t, h), for t > 0.

    For the arguments (field, form, damping_factor) see `Momentum`."""
    return Momentum(field, nesterov=True, damping=1.0, sign=-1.0, form=form, damping_factor=damping_factor)


def gnesterov(
    field: Field,
    gate: gates.GateLike = "softclip",
    xi: Xi = "learnable",
    form: Form = "absorbed",
    damping_factor: float = 3.0,
) -> Momentum:
    """GNesterovNODE (Nguyen et al. 2022): h = σ(k(t)) x, x' = σ(m), m' = -m - σ(f(t, h)) - ξ h, for t > 0; for the
    arguments see `Momentum`, σ is its gate_x and gate_f."""
    return Momentum(
        field, nesterov=True, damping=1.0, sign=-1.0, gate_x=gate, gate_f=gate, xi=xi, form=form,
        damping_factor=damping_factor,
    )  # fmt: skip


def _number(name: str, value: object, learnable: bool = True) -> float:
    if isinstance(value, str) and learnable:
        lookup(name, value, {"learnable": None})
    if not is_number(value) or not math.isfinite(value) or value < 0:
        alternative = " or 'learnable'" if learnable else ""
        raise ValueError(f"{name} must be a finite number ≥ 0{alternative}, got {value!r}")
    return float(value)


def _broadcast(c: Tensor, x: Tensor) -> Tensor:
    if c.ndim == 0 and c.device.type == "cpu" and not c.requires_grad:
        return c.to(x.dtype)  # goes into the launch by value: a transfer takes the host as long as the product
    return c.to(x.device, x.dtype).reshape(c.shape + (1,) * (x.ndim - c.ndim))


__all__ = [
    "Coefficients",
    "Field",
    "FirstOrder",
    "Form",
    "Momentum",
    "System",
    "Xi",
    "as_system",
    "generalised_heavy_ball",
    "gnesterov",
    "heavy_ball",
    "nesterov",
    "nesterov_scale",
    "second_order",
]


def __dir__() -> list[str]:
    return public(globals())
