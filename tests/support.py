"""Fields, models and a numpy oracle that several test files use."""

import copy
import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import nesterov_triton as nt

ADAPTIVE = ["dopri5", "tsit5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8"]
FIXED = ["euler", "midpoint", "rk4", "rk4_38"]
METHODS = ADAPTIVE + FIXED
KEPT = nt.gradients.Discrete(recompute=False)
GRADIENTS = ["discrete", KEPT, "adjoint", "backprop"]
STRETCHED = nt.controllers.Integral(max_factor=1.3)


def options_for(method: str) -> dict:
    """Options under which a method takes a few uneven steps on t in [1, 2], the same ones whatever the input."""
    if method in FIXED:
        return {"method": method, "step_size": 0.3}
    return {"method": method, "first_step": 0.17, "rtol": 0.0, "atol": 1e6, "controller": STRETCHED}


class Field(nn.Module):
    """tanh(h A + m M + t b + c) B, float64, smooth and time-dependent; with `numpy` the same thing over again."""

    def __init__(self, n: int = 2, hidden: int = 3, *, sees_momentum: bool = False, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64))

        self.a, self.b, self.c, self.out = random(n, hidden), random(hidden), random(hidden), random(hidden, n)
        self.m = random(n, hidden) if sees_momentum else None

    def forward(self, t: Tensor, h: Tensor, m: Tensor | None = None) -> Tensor:
        inner = h @ self.a + t * self.b + self.c
        if self.m is not None:
            inner = inner + m @ self.m
        return torch.tanh(inner) @ self.out

    def numpy(self, t: float, h: np.ndarray, m: np.ndarray | None = None) -> np.ndarray:
        a, b, c, out = (p.detach().numpy() for p in (self.a, self.b, self.c, self.out))
        inner = h @ a + t * b + c
        if self.m is not None:
            inner = inner + m @ self.m.detach().numpy()
        return np.tanh(inner) @ out


class Recorder(nn.Module):
    """Counts the calls of a field and keeps the times and features it was given."""

    def __init__(self, inner: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.times: list[Tensor] = []
        self.features: list[Tensor] = []

    def forward(self, t: Tensor, *features: Tensor) -> Tensor:
        self.times.append(t.detach())
        self.features.append(features[0].detach())
        return self.inner(t, *features)

    @property
    def calls(self) -> int:
        return len(self.times)


def one(x):
    return x


@dataclass
class Model:
    """A layer's constructor beside its row of the table in numpy: h = κ x, x' = σ_x(m), m' = -γ m + s σ_f(f) - ξ h."""

    build: Callable[..., nn.Module]
    kappa: Callable[[float], float] = lambda t: 1.0
    gamma: Callable[[nn.Module], float] = lambda layer: 0.0
    sign: float = 1.0
    gate_x: Callable = one
    gate_f: Callable = one
    xi: Callable[[nn.Module], float] = lambda layer: 0.0
    rows: int = 2
    exact: bool = False
    sees_momentum: bool = False
    augment: int = 0
    keywords: dict = field(default_factory=dict)

    def layer(self, n: int = 2, *, seed: int = 0, hidden: int = 3, **options) -> nn.Module:
        net = Field(n + self.augment, hidden, sees_momentum=self.sees_momentum, seed=seed)
        return self.build(net, **self.keywords, **options).double()

    def kappa_rate(self, t: float) -> float:
        """κ' by a central difference of sixth order."""
        d = 1e-2
        k = [self.kappa(t + j * d) - self.kappa(t - j * d) for j in (1, 2, 3, 4)]
        return (4 / 5 * k[0] - 1 / 5 * k[1] + 4 / 105 * k[2] - 1 / 280 * k[3]) / d

    def truth(self, layer: nn.Module, h0: np.ndarray, times: list[float], velocity: np.ndarray | None = None):
        """h and h' at all times by scipy, from the table."""
        net = layer.field
        if self.rows == 1:
            h0 = np.concatenate((h0, np.zeros((*h0.shape[:-1], self.augment))), axis=-1)
            hs = exact_solution(lambda t, h: net.numpy(t, h), h0, times)
            return hs, np.stack([net.numpy(t, h) for t, h in zip(times, hs, strict=True)])
        gamma, xi = self.gamma(layer), self.xi(layer)

        def rhs(t: float, z: np.ndarray) -> np.ndarray:
            x, m = z
            h = self.kappa(t) * x
            f = self.gate_f(net.numpy(t, h, m) if self.sees_momentum else net.numpy(t, h))
            force = self.sign * f
            if self.exact:
                force = (force + (3 / (4 * t * t) - 1 / 4) * h) / self.kappa(t)
            return np.stack((self.gate_x(m), -gamma * m + force - xi * h))

        t0 = times[0]
        x0 = h0 / self.kappa(t0)
        m0 = np.zeros_like(h0) if velocity is None else velocity
        if self.exact:
            m0 = (m0 - self.kappa_rate(t0) * x0) / self.kappa(t0)
        zs = exact_solution(rhs, np.stack((x0, m0)), times)
        scale = np.array([self.kappa(t) for t in times]).reshape(-1, *(1,) * h0.ndim)
        rate = np.array([self.kappa_rate(t) for t in times]).reshape(-1, *(1,) * h0.ndim)
        xs, ms = zs[:, 0], zs[:, 1]
        return scale * xs, scale * self.gate_x(ms) + rate * xs


def exact_solution(rhs: Callable, z0: np.ndarray, times: list[float]) -> np.ndarray:
    """The solution at all times by scipy's DOP853 at 1e-12, time by time: nothing is interpolated."""
    import scipy.integrate  # here, so that the kernels' tests run without it

    zs, z = [z0], z0
    for a, b in itertools.pairwise(times):
        solution = scipy.integrate.solve_ivp(
            lambda t, y: rhs(t, y.reshape(z0.shape)).reshape(-1),
            (a, b),
            z.reshape(-1),
            "DOP853",
            rtol=1e-12,
            atol=1e-12,
        )
        assert solution.success
        z = solution.y[:, -1].reshape(z0.shape)
        zs.append(z)
    return np.stack(zs)


def kappa(t: float) -> float:
    return t**-1.5 * math.exp(t / 2)


def clip(bound: float) -> Callable:
    return lambda x: np.clip(x, -bound, bound)


def softclip(bound: float) -> Callable:
    return lambda x: bound * np.tanh(x / bound)


def sigmoid_damping(layer: nn.Module) -> float:
    return 1 / (1 + math.exp(-layer.system.raw_damping.item()))


def softplus_xi(layer: nn.Module) -> float:
    return math.log1p(math.exp(layer.system.raw_xi.item()))


GATES = {
    "identity": ("identity", one),
    "tanh": ("tanh", np.tanh),
    "hardtanh": ("hardtanh", clip(5.0)),
    "hardtanh-inside": (nt.gates.Hardtanh(0.4), clip(0.4)),
    "softclip": ("softclip", softclip(5.0)),
    "softclip-inside": (nt.gates.Softclip(0.7), softclip(0.7)),
    "callable": (torch.atan, np.arctan),
}


def ghbnode(gate: str, xi: float | str = "learnable") -> Model:
    given, known = GATES[gate]
    return Model(
        nt.GHBNODE,
        gamma=sigmoid_damping,
        gate_x=known,
        xi=softplus_xi if xi == "learnable" else lambda layer: xi,
        keywords={"gate": given, "xi": xi},
    )


def gnesterov(gate: str, xi: float | str = "learnable", form: str = "absorbed") -> Model:
    given, known = GATES[gate]
    return Model(
        nt.GNesterovNODE,
        kappa=lambda t: float(known(kappa(t))),
        gamma=lambda layer: 1.0,
        sign=-1.0,
        gate_x=known,
        gate_f=known,
        xi=softplus_xi if xi == "learnable" else lambda layer: xi,
        exact=form == "exact",
        keywords={"gate": given, "xi": xi, "form": form},
    )


def nesterov(form: str = "absorbed") -> Model:
    return Model(
        nt.NesterovNODE,
        kappa=kappa,
        gamma=lambda layer: 1.0,
        sign=-1.0,
        exact=form == "exact",
        keywords={"form": form},
    )


MODELS: dict[str, Model] = {
    "NODE": Model(nt.NODE, rows=1),
    "ANODE": Model(nt.ANODE, rows=1, augment=2, keywords={"augment": 2}),
    "SONODE": Model(nt.SONODE, sees_momentum=True),
    "HBNODE": Model(nt.HBNODE, gamma=sigmoid_damping),
    "GHBNODE": ghbnode("softclip"),
    "NesterovNODE": nesterov(),
    "NesterovNODE-exact": nesterov("exact"),
    "GNesterovNODE": gnesterov("softclip"),
    "GNesterovNODE-exact": gnesterov("softclip", form="exact"),
}
GATED: dict[str, Model] = {
    **{f"GHBNODE-{g}": ghbnode(g, 0.3) for g in GATES},
    **{f"GNesterovNODE-{g}": gnesterov(g, 0.3) for g in GATES},
    **{f"GNesterovNODE-exact-{g}": gnesterov(g, 0.3, "exact") for g in GATES},
    "GHBNODE-xi0": ghbnode("tanh", 0.0),
    "GNesterovNODE-xi0": gnesterov("tanh", 0.0),
}
MOMENTUM = [name for name in MODELS if MODELS[name].rows == 2]


def features(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clone(module: nn.Module, **changed) -> nn.Module:
    """A copy of a layer that solves with other options."""
    return copy.deepcopy(module) if not changed else _with_settings(copy.deepcopy(module), changed)


def _with_settings(layer: nn.Module, changed: dict) -> nn.Module:
    old = layer.settings
    options = {
        "method": old.tableau.name,
        "rtol": old.rtol,
        "atol": old.atol,
        "gradient": old.gradient,
        "controller": old.options.controller,
        "step_size": old.options.step_size,
        "first_step": old.options.first_step,
        "max_steps": old.options.max_steps,
    }
    layer.settings = type(old).make(**{**options, **changed})
    return layer


def gradients(layer: nn.Module, loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of the loss in the inputs and in all parameters of the layer."""
    wanted = [*inputs, *layer.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def live_tensors() -> int:
    """How many tensors there are in this process. By their types: to ask isinstance of a weak proxy, as a compiler
    leaves some behind, raises where what it stands for is gone."""
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())
