"""What is timed: a model, a size and its data, with the right-hand side in plain torch and a tight float64 solution.

Nothing here uses this package's solver: the right-hand side is written out once, for torch (`RightHandSide`), and the
true solution is torchdiffeq's dopri8 in float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
import torchdiffeq
from torch import Tensor, nn

from benchmarks.problems import XI, Field, kappa, relative_error, softclip

ModelName: TypeAlias = Literal["GNesterovNODE", "HBNODE", "NODE"]
Solve: TypeAlias = Callable[[Tensor, float, float], Tensor]

MODELS: tuple[ModelName, ...] = ("GNesterovNODE", "HBNODE", "NODE")
SIZES = ("small", "medium", "large", "convolutional", "ODE-RNN")
SHAPES = {
    "small": (64, 2),
    "medium": (256, 64),
    "large": (4096, 64),
    "convolutional": (64, 5, 28, 28),
    "ODE-RNN": (64, 32),
}
HIDDEN_CHANNELS = 50  # with five channels the field of the paper's MNIST experiment
OBSERVATIONS, INPUTS = 64, 4
TOLERANCE = 1e-5
# Relative errors that fail an entry: a hundred tolerances; for gradients two thousand, since a continuous adjoint's
# second solve multiplies the error of the first.
WRONG, WRONG_GRADIENT = 1e-3, 2e-2
# Over ReLU's kinks a gradient jumps: those of slightly different steps are some percent apart, whoever took them.
WRONG_OVER_KINKS = 0.1
# Samples do not know of each other, so an answer can be held against the truth of the first few.
CHECKED = {"convolutional": 2, "ODE-RNN": 4}


class ConvField(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with ReLU between and the time as a channel: the paper's field for MNIST."""

    def __init__(self, channels: int, hidden: int = HIDDEN_CHANNELS) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, hidden, 1)
        self.second = nn.Conv2d(hidden + 1, hidden, 3, padding=1)
        self.third = nn.Conv2d(hidden + 1, channels, 1)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        time = t.to(h).expand(len(h), 1, *h.shape[2:])
        out = torch.relu(self.first(torch.cat([h, time], dim=1)))
        out = torch.relu(self.second(torch.cat([out, time], dim=1)))
        result: Tensor = self.third(torch.cat([out, time], dim=1))
        return result


class RightHandSide(nn.Module):
    """The model's system on the state z, [rows, *h.shape]: y, or x and m.

    Args:
        model: its name.
        field: f(t, h).
        raw_damping: HBNODE's parameter, whose sigmoid is γ.
    """

    def __init__(self, model: ModelName, field: nn.Module, raw_damping: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.field = field
        self.raw_damping = raw_damping
        self.rows = 1 if model == "NODE" else 2

    def rates(self, t: Tensor, scale: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """(x', m') of a momentum model; `scale` is κ(t), of any shape that goes with x."""
        if self.model == "HBNODE":
            assert self.raw_damping is not None
            return m, self.field(t, x) - torch.sigmoid(self.raw_damping) * m
        h = scale * x
        return softclip(m), -m - softclip(self.field(t, h)) - XI * h

    def scale(self, t: Tensor) -> Tensor:
        """κ(t), shape of `t`."""
        return kappa(t) if self.model == "GNesterovNODE" else torch.ones_like(t)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        if self.rows == 1:
            slope: Tensor = self.field(t, z[0])
            return slope[None]
        x, m = z
        return torch.stack(self.rates(t, self.scale(t), x, m))

    def start(self, h: Tensor, t: Tensor) -> Tensor:
        """The state at time `t` with features h, at rest."""
        return h[None] if self.rows == 1 else torch.stack([h / self.scale(t), torch.zeros_like(h)])

    def features(self, z: Tensor, t: Tensor) -> Tensor:
        return z[0] if self.rows == 1 else self.scale(t) * z[0]


@dataclass(frozen=True, eq=False)
class Recurrence:
    """What makes one solve into an ODE-RNN: a cell, the observations [n, batch, inputs], and the times between."""

    cell: nn.RNNCell
    observations: Tensor
    ends: Sequence[float]


@dataclass(frozen=True, eq=False)
class Case:
    """One model at one size.

    Attributes:
        model, size: their names.
        field: f(t, h).
        h0: features at the start, float32.
        cotangent: the loss's weights, shape of h0.
        raw_damping: HBNODE's parameter.
        recurrence: of the ODE-RNN; every solve starts at rest.
        t0, t1: the interval of a solve.
        tolerance: rtol and atol.
    """

    model: ModelName
    size: str
    field: nn.Module
    h0: Tensor
    cotangent: Tensor
    raw_damping: nn.Parameter | None = None
    recurrence: Recurrence | None = None
    t0: float = 1.0
    t1: float = 2.0
    tolerance: float = TOLERANCE
    _truth: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list, repr=False)

    @classmethod
    def draw(cls, model: ModelName, size: str, device: str = "cpu", shape: Sequence[int] | None = None) -> Case:
        """The case of that name, always with the same numbers.

        Args:
            shape: of h0 instead of the size's own.
        """
        if model not in MODELS or size not in SIZES:
            raise ValueError(f"no case {model!r}, {size!r}; models are {MODELS}, sizes {SIZES}")
        torch.manual_seed(0)
        shape = tuple(shape or SHAPES[size])
        network: nn.Module = ConvField(shape[1]) if size == "convolutional" else Field(shape[1])
        recurrence = None
        if size == "ODE-RNN":
            ends = [1.0 + gap for gap in torch.empty(OBSERVATIONS).uniform_(0.05, 0.15).tolist()]
            observations = torch.randn(OBSERVATIONS, shape[0], INPUTS, device=device)
            recurrence = Recurrence(nn.RNNCell(INPUTS, shape[1]).to(device), observations, ends)
        damping = nn.Parameter(torch.tensor(-3.0, device=device)) if model == "HBNODE" else None
        h0, cotangent = torch.randn(*shape), torch.randn(*shape) / shape[0]
        return cls(
            model, size, network.to(device), h0.to(device).requires_grad_(), cotangent.to(device), damping, recurrence
        )  # fmt: skip

    @property
    def name(self) -> str:
        return f"{self.model}, {self.size}"

    @property
    def inputs(self) -> list[Tensor]:
        """What a training step differentiates by."""
        damping = [] if self.raw_damping is None else [self.raw_damping]
        cell = [] if self.recurrence is None else list(self.recurrence.cell.parameters())
        return [self.h0, *self.field.parameters(), *damping, *cell]

    def right_hand_side(self) -> RightHandSide:
        return RightHandSide(self.model, self.field, self.raw_damping)

    def run(self, solve: Solve) -> Tensor:
        """The features at the end, of one solve or of a sequence of them, by `solve(h, t0, t1)`."""
        h = self.h0
        if self.recurrence is None:
            return solve(h, self.t0, self.t1)
        for seen, end in zip(self.recurrence.observations, self.recurrence.ends, strict=True):
            h = self.recurrence.cell(seen, solve(h, self.t0, end))
        return h

    def gradients(self, h1: Tensor, cotangent: Tensor | None = None) -> list[Tensor]:
        weights = self.cotangent if cotangent is None else cotangent
        return list(torch.autograd.grad((h1 * weights).sum(), self.inputs))

    # --- the truth

    @property
    def checked(self) -> int:
        """So many samples are held against the truth."""
        return min(CHECKED.get(self.size, 64), len(self.h0))

    @property
    def checked_cotangent(self) -> Tensor:
        """The loss's weights with zeros for the samples that are not checked."""
        mask = torch.zeros_like(self.cotangent)
        mask[: self.checked] = 1
        return self.cotangent * mask

    def truth(self) -> tuple[Tensor, list[Tensor]]:
        """Features at the end and gradients of the checked samples' loss, in float64 at a tight tolerance."""
        if not self._truth:
            self._truth.append(self._solve_exactly())
        return self._truth[0]

    def _solve_exactly(self) -> tuple[Tensor, list[Tensor]]:
        n, recurrence = self.checked, self.recurrence
        if recurrence is not None:
            seen = recurrence.observations[:, :n].double()
            recurrence = replace(recurrence, cell=copy.deepcopy(recurrence.cell).double(), observations=seen)
        # ReLU has kinks, over which no method keeps its order.
        tolerance, method = (1e-7, "dopri5") if self.size == "convolutional" else (1e-10, "dopri8")
        exact = replace(
            self,
            field=copy.deepcopy(self.field).double(),
            h0=self.h0[:n].detach().double().requires_grad_(),
            cotangent=self.cotangent[:n].double(),
            raw_damping=None if self.raw_damping is None else nn.Parameter(self.raw_damping.detach().double()),
            recurrence=recurrence,
            _truth=[],
        )
        system = exact.right_hand_side()

        def solve(h: Tensor, t0: float, t1: float) -> Tensor:
            t = torch.tensor([t0, t1], dtype=torch.float64, device=h.device)
            # A step that ends at t1: the interpolant of dopri8 is of lower order than its steps.
            options = {"step_t": t[1:]}
            z0 = system.start(h, t[0])
            z = torchdiffeq.odeint(system, z0, t, rtol=tolerance, atol=tolerance, method=method, options=options)
            return system.features(z[-1], t[1])

        h1 = exact.run(solve)
        return h1.detach(), exact.gradients(h1)

    def errors(self, features: Tensor, gradients: Sequence[Tensor] | None) -> tuple[float, float]:
        """Relative errors of the checked samples' features and of the gradients of their loss (0 without any).

        Raises:
            WrongAnswer: one of them is above its bound, or NaN.
        """
        true_features, true_gradients = self.truth()
        error, worst = relative_error(features[: self.checked], true_features), 0.0
        if gradients is not None:
            first = gradients[0][: self.checked]
            found = zip([first, *gradients[1:]], true_gradients, strict=True)
            # torch's max keeps a NaN, Python's may lose it.
            worst = float(torch.tensor(list(itertools.starmap(relative_error, found))).max())
        most = WRONG_OVER_KINKS if self.size == "convolutional" else WRONG_GRADIENT
        if not (error < WRONG and worst < most):
            raise WrongAnswer(f"{self.name}: wrong answer, error {error:.1e}, of the gradients {worst:.1e}")
        return error, worst


class WrongAnswer(RuntimeError):
    """An answer or a gradient that is not the solution's."""
