"""The measured system, GNesterovNODE with softclip gates, and its right-hand side written for torchdiffeq."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import nesterov_triton as nt

BATCH = 256
WIDTH = 64
BOUND = 5.0
XI = 0.5
T0, T1 = 1.0, 2.0
TOLERANCE = 1e-5
SYSTEM = (
    f"GNesterovNODE, softclip({BOUND:g}), xi {XI:g}, field {WIDTH}-{WIDTH}-{WIDTH} tanh, batch {BATCH}, float32, "
    f"dopri5, rtol = atol = {TOLERANCE:g}, t from {T0:g} to {T1:g}"
)


class Field(nn.Module):
    """Linear, tanh, linear of one width; weights of standard deviation 2 / sqrt(width), which make a flow that takes
    several steps (torch's default initialisation leaves it nearly linear: the start of a solve would be all of it)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=2 / width**0.5 if parameter.dim() == 2 else 0.1)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        u: Tensor = self.net(h)
        return u


def softclip(x: Tensor) -> Tensor:
    return BOUND * torch.tanh(x / BOUND)


def kappa(t: Tensor) -> Tensor:
    return softclip(t**-1.5 * torch.exp(t / 2))


class PackageSystem:
    """The system as a user of the package without its layers writes it.

    `stats` are those of the last solve.
    """

    def __init__(self, field: nn.Module) -> None:
        self.system = nt.systems.gnesterov(field, gate=nt.gates.Softclip(BOUND), xi=XI)
        self.t = torch.tensor([T0, T1])
        self.stats = nt.Stats()

    def solve(self, h0: Tensor, **options: Any) -> Tensor:
        """Features at the end from features at the start, at rest; `options` as for `nt.solve`."""
        solution = nt.solve(self.system, self.system.initial_state(h0, None, self.t[0]), self.t, **options)
        self.stats = solution.stats
        return self.system.features(self.t[1], solution.final[0])

    @property
    def accepted(self) -> int:
        return self.stats.accepted

    @property
    def rejected(self) -> int:
        return self.stats.rejected


class TorchdiffeqSystem(nn.Module):
    """GNesterovNODE's right-hand side on one stacked tensor `[2, batch, width]`, as a user of torchdiffeq writes it.

    Counts accepted and rejected steps through torchdiffeq's own callbacks.
    """

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.accepted = 0
        self.rejected = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        x, m = z
        h = kappa(t) * x
        return torch.stack([softclip(m), -m - softclip(self.field(t, h)) - XI * h])

    def callback_accept_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.rejected += 1

    def solve(self, h0: Tensor, *, rtol: float, atol: float, method: str = "dopri5", adjoint: bool = False) -> Tensor:
        """Features at the end from features at the start, at rest."""
        t = torch.tensor([T0, T1], dtype=h0.dtype, device=h0.device)
        z0 = torch.stack([h0 / kappa(t[0]), torch.zeros_like(h0)])
        odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        z1: Tensor = odeint(self, z0, t, rtol=rtol, atol=atol, method=method)[-1]
        return kappa(t[1]) * z1[0]


@dataclass(frozen=True)
class Problem:
    """Input `h0` and loss weights `cotangent`, both `[batch, width]`, and the field between them."""

    field: Field
    h0: Tensor
    cotangent: Tensor

    @classmethod
    def draw(cls, batch: int = BATCH, width: int = WIDTH, seed: int = 0) -> Problem:
        torch.manual_seed(seed)
        return cls(Field(width), torch.randn(batch, width, requires_grad=True), torch.randn(batch, width) / batch)

    @property
    def inputs(self) -> list[Tensor]:
        """What a training step differentiates by."""
        return [self.h0, *self.field.parameters()]

    def gradients(self, h1: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((h1 * self.cotangent).sum(), self.inputs)

    def truth(self, tolerance: float = 1e-11) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The features at the end and the gradients, in float64 at a tight tolerance by an eighth-order method."""
        exact = Problem(
            copy.deepcopy(self.field).double(),
            self.h0.detach().double().requires_grad_(),
            self.cotangent.double(),
        )
        h1 = TorchdiffeqSystem(exact.field).solve(exact.h0, rtol=tolerance, atol=tolerance, method="dopri8")
        return h1.detach(), exact.gradients(h1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest entry of the truth."""
    return float((value.detach().double() - truth).abs().max() / truth.abs().max())
