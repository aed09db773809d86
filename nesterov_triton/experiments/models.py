"""The compared models: their systems, how a system is solved, and the networks around it."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

import nesterov_triton as nt
from nesterov_triton.solve import Settings
from nesterov_triton.systems import Momentum, Xi, nesterov_scale

COMPARED = ("NODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE")
PAPER = ("NODE", "ANODE", "SONODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE")
PUBLISHED = ("NesterovNODE-published", "GNesterovNODE-published")
MODELS = (*PAPER, *PUBLISHED)
AUGMENT = 1  # zeros that ANODE appends to the features
GATED = ("GHBNODE", "GNesterovNODE", "GNesterovNODE-published")
START, END = 1.0, 2.0  # the interval of every solve


def parse_gate(text: str) -> nt.gates.Gate:
    """A gate by name, with a bound if one is given: softclip, hardtanh:0.5.

    Raises:
        ValueError: an unknown name, or a bound that this gate does not take.
    """
    name, colon, bound = text.partition(":")
    gate = nt.gates.get(name)
    if not colon:
        return gate
    if not isinstance(gate, nt.gates.Hardtanh) and type(gate) is not nt.gates.Softclip:
        raise ValueError(f"gate {name} takes no bound, got {text!r}; softclip and hardtanh do, as in hardtanh:0.5")
    try:
        return type(gate)(float(bound))
    except ValueError as error:
        raise ValueError(f"gate {text!r}: the bound must be a positive number") from error


def perceptron(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers of the given widths with an activation between each two."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*modules[:-1])


class TimedField(nn.Module):
    """f(t, h) or f(t, h, m): a perceptron on the state with the time appended. [batch, width] -> [batch, width]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, *states: Tensor) -> Tensor:
        time = t.to(states[0]).expand(*states[0].shape[:-1], 1)
        result: Tensor = self.network(torch.cat([*states, time], dim=-1))
        return result


class Network(nn.Module):
    """A neural-ODE layer and a readout of its final features: [batch, features] -> [batch, outputs]."""

    def __init__(self, layer: nn.Module, readout: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.readout = readout

    @property
    def stats(self) -> Any:
        return self.layer.stats

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.readout(self.layer(inputs))
        return result


def is_second_order(model: str) -> bool:
    return model not in ("NODE", "ANODE")


def feature_width(model: str, features: int) -> int:
    """Width of the state that the field of ``model`` maps to itself."""
    return features + AUGMENT if model == "ANODE" else features


def field_inputs(model: str, features: int) -> int:
    """Width of what the field sees: the state, SONODE's velocity, and the time."""
    width = feature_width(model, features)
    return 2 * width + 1 if model == "SONODE" else width + 1


def build_layer(
    model: str,
    field: nn.Module,
    initial_velocity: nn.Module | None,
    *,
    gate: str,
    xi: Xi = "learnable",
    damping_factor: float = 3.0,
    **solver: Any,
) -> nn.Module:
    """The layer called ``model``; ``solver`` is passed on (method, rtol, atol, gradient, step_size)."""
    if is_second_order(model):
        solver["initial_velocity"] = initial_velocity
    if model in PUBLISHED:
        return PublishedLayer(build_system(model, field, gate, xi, damping_factor), **solver)
    if model in ("NesterovNODE", "GNesterovNODE"):
        solver["damping_factor"] = damping_factor
    if model in GATED:
        solver |= {"gate": parse_gate(gate), "xi": xi}
    if model == "ANODE":
        solver["augment"] = AUGMENT
    layer: nn.Module = getattr(nt, model)(field, **solver)
    return layer


def build_system(
    model: str, field: nn.Module, gate: str, xi: Xi = "learnable", damping_factor: float = 3.0
) -> nt.systems.System:
    """The system of ``model`` around ``field``."""
    sigma = parse_gate(gate)
    match model:
        case "NODE" | "ANODE":
            return nt.systems.FirstOrder(field)
        case "SONODE":
            return nt.systems.second_order(field)
        case "HBNODE":
            return nt.systems.heavy_ball(field)
        case "GHBNODE":
            return nt.systems.generalised_heavy_ball(field, sigma, xi)
        case "NesterovNODE":
            return nt.systems.nesterov(field, damping_factor=damping_factor)
        case "GNesterovNODE":
            return nt.systems.gnesterov(field, sigma, xi, damping_factor=damping_factor)
        case "NesterovNODE-published":
            return nt.systems.FirstOrder(PublishedField(field, nt.gates.Identity(), 0.0, damping_factor))
        case "GNesterovNODE-published":
            return nt.systems.FirstOrder(PublishedField(field, sigma, xi, damping_factor))
    raise ValueError(f"no model {model}")


class PublishedField(nn.Module):
    """What the authors' released code integrates, kept to be run beside the paper's system: it is another one.

    The state is (h, d), taken for (h, h'); with k(t) = t^(-r/2) e^(t/2)

        m  = ((r/(2t) - 1/2) h + d) / k,     h' = σ(m),     d' = -σ(f(t, h)) - m - ξ h

    The right-hand side is that of (x, m), given out as the derivative of (h, d). What comes out is taken for (x, m) all
    the same, and made to features; see `outputs`.

    Args:
        field: f(t, h).
        gate: σ.
        xi: ξ, a number or "learnable".
        factor: r.
    """

    def __init__(self, field: nn.Module, gate: nt.gates.Gate, xi: Xi, factor: float) -> None:
        super().__init__()
        self.field, self.gate, self.factor = field, gate, factor
        self.fixed_xi = 0.0 if xi == "learnable" else float(xi)
        self.raw_xi = nn.Parameter(torch.tensor(math.log(math.expm1(0.5)))) if xi == "learnable" else None

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """The derivative of the state, both [batch, 2 channels, ...]: h, then d."""
        h, d = state.chunk(2, dim=1)
        m = ((0.5 * self.factor / t - 0.5) * h + d) / nesterov_scale(t, self.factor)
        force = -self.gate(self.field(t, h)) - m
        xi = self.fixed_xi if self.raw_xi is None else nn.functional.softplus(self.raw_xi)
        return torch.cat([self.gate(m), force - xi * h], dim=1)

    def outputs(self, t: Tensor, h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """What the released code makes of the state at a time after the first, with κ = σ(k(t)):

            κ h,     κ (d - (r/(2 t k) - 1/(2 κ)) κ h)

        `t` is 0-d, or broadcasts with the state.
        """
        k = nesterov_scale(t, self.factor)
        kappa = self.gate(k)
        out = kappa * h
        return out, kappa * (d - (0.5 * self.factor / (t * k) - 0.5 / kappa) * out)


class PublishedLayer(nt.NODE):
    """The released code's NesterovNODE and GNesterovNODE; see `PublishedField`. h, [batch, ...], to its h(T)."""

    def __init__(self, system: nt.systems.System, *, initial_velocity: nn.Module | None = None, **solver: Any) -> None:
        super().__init__(system.field, **solver)
        self.initial_velocity = initial_velocity

    def forward(self, h: Tensor, t: Any = None, *, args: Sequence[Any] = ()) -> Tensor:
        velocity = torch.zeros_like(h) if self.initial_velocity is None else self.initial_velocity(h)
        states = super().forward(torch.cat([h, velocity], dim=1), t, args=args)
        times = self._times(t).to(h)
        assert isinstance(self.field, PublishedField)
        if len(times) == 2:
            return self.field.outputs(times[-1], *states.chunk(2, dim=1))[0]
        hs, ds = states.chunk(2, dim=2)
        later = times[1:].view(-1, *[1] * h.ndim)
        return torch.cat([hs[:1], self.field.outputs(later, hs[1:], ds[1:])[0]])


class Evolution(nn.Module):
    """A model's solve from t = 1 to t = 2, for networks that make feature and velocity together.

    Args:
        model: its name.
        field: f(t, h), or f(t, h, m) for SONODE.
        gate, xi, damping_factor: see `build_system`.
        scaled: whether it will be called with a scale, for which only the methods for first-order systems are.
        solver: options of `nesterov_triton.solve`.

    Attributes:
        stats: counts of the last solve.

    Raises:
        ValueError, TypeError: an option that is wrong, or not for this model.
    """

    def __init__(
        self,
        model: str,
        field: nn.Module,
        *,
        gate: str,
        xi: Xi = "learnable",
        damping_factor: float = 3.0,
        scaled: bool = False,
        **solver: Any,
    ) -> None:
        super().__init__()
        self.system = build_system(model, field, gate, xi, damping_factor)
        # Now, not in the first batch.
        Settings.make(**solver).of(nt.systems.FirstOrder(field) if scaled else self.system)
        self.solver = solver
        self.stats = nt.Stats()

    def forward(
        self, h: Tensor, velocity: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(h, m) at t = 2; no m for a first-order system.

        Args:
            h: features at t = 1, [batch, ...].
            velocity: m at t = 1, of h's shape; zeros without.
            scale: a factor on the right-hand side for each sample, [batch, 1, ...], as where each sample has gone its
                own distance in time since it was last seen.
        """
        start, end = (torch.tensor(t, dtype=torch.float64) for t in (START, END))
        system = self.system
        m = torch.zeros_like(h) if velocity is None else velocity
        if isinstance(system, Momentum):
            state = system.initial_state(h, m, start)
            if scale is None:
                x, m = self._solve(system, state)
            else:
                x, m = self._solve(Scaled(FirstOrderForm(system), scale), torch.cat(state, dim=1)).chunk(2, dim=1)
            return system.features(end, x), m
        field: Any = system.field
        right_hand_side = system if scale is None else Scaled(field, scale)
        if not isinstance(field, PublishedField):
            return self._solve(right_hand_side, h), None
        h, d = self._solve(right_hand_side, torch.cat([h, m], dim=1)).chunk(2, dim=1)
        return field.outputs(end.to(h), h, d)

    def path(self, h: Tensor, velocity: Tensor, times: Tensor) -> tuple[Tensor, Tensor | None]:
        """(h, h') at all of `times`, [n, batch, ...] each; no h' for a first-order system.

        The released code's variants have in its place what they take for h'.
        """
        system = self.system
        if isinstance(system, Momentum):
            x, m = nt.solve(system, system.initial_state(h, velocity, times[0]), times, **self.solver).ys
            return system.features(times, x), system.velocity(times, x, m)
        field: Any = system.field
        if not isinstance(field, PublishedField):
            return cast(Tensor, nt.solve(system, h, times, **self.solver).ys), None
        solution = nt.solve(system, torch.cat([h, velocity], dim=1), times, **self.solver)
        hs, ds = cast(Tensor, solution.ys).chunk(2, dim=2)
        later = times[1:].to(hs).view(-1, *[1] * h.ndim)
        made = field.outputs(later, hs[1:], ds[1:])
        return torch.cat([hs[:1], made[0]]), torch.cat([ds[:1], made[1]])

    def _solve(self, system: Any, state: Any) -> Any:
        params = (system.scale,) if isinstance(system, Scaled) and system.scale.requires_grad else ()
        solution = nt.solve(system, state, (START, END), params=params, **self.solver)
        self.stats = solution.stats
        return solution.final


class Scaled(nn.Module):
    """A right-hand side times a factor for each sample: one solve's, and held by nothing else.

    A tensor that stood on the shared field instead, to be overwritten before the next solve, would have the backward
    pass of every solve but the last see the wrong one: "discrete" and "adjoint" call the field again.

    Args:
        field: f(t, y) on y, [batch, ...].
        scale: [batch, 1, ...].
    """

    def __init__(self, field: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.field = field
        self.scale = scale

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.scale * self.field(t, y)
        return result


class FirstOrderForm(nn.Module):
    """A momentum system's right-hand side on (x, m) side by side, [batch, 2 width] -> the same.

    `Momentum` itself has one right-hand side for all samples: x' = σ_x(m) does not ask the field, so nothing that a
    field returns can scale it. As a first-order system it is a field like any other, and can be multiplied.
    """

    def __init__(self, system: Momentum) -> None:
        super().__init__()
        self.system = system

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        system = self.system
        x, m = y.chunk(2, dim=1)
        c = system.rule.coefficients(t, system.damping, system.xi)
        h = x if c.scale is None else c.scale * x
        force = system.gate_f(system.field(t, h, m) if system.sees_momentum else system.field(t, h))
        slope = force * (system.sign if c.drive is None else c.drive)
        if c.q is not None and c.minus_gamma is not None:
            slope = slope + c.q * x + c.minus_gamma * m
        return torch.cat([system.gate_x(m), slope], dim=1)
