"""Silverbox: how fast the state of untrained networks grows, driven by a measured voltage.

As in the released code of Nguyen et al., NeurIPS 2022 (``silverbox_init.py``): fields Linear(state and input voltage),
t = 1, 2, ..., 63 in samples, ten initialisations, tolerance 1e-7; gates hardtanh(±0.25), residual softplus(0). Done
differently here: the input voltage is interpolated between its samples, which that code means to do but extrapolates
the first two; GHBNODE's residual pulls back, there it pushes; for all second-order models the state is (h, h').
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_triton.experiments.data import silverbox
from nesterov_triton.experiments.experiment import Measurement, Settings
from nesterov_triton.experiments.models import PAPER, Evolution, is_second_order

TIMES = range(1, 64)
SHOWN = (16, 32, 48, 63)  # in the table

DEFAULTS = Settings(
    experiment="silverbox",
    models=PAPER,
    seeds=tuple(range(10)),
    epochs=1,
    batch_size=1,
    learning_rate=1.0,
    decay=1.0,
    tolerance=1e-7,
    method="dopri5",
    step_size=None,
    gradient="discrete",
    gate="softclip:0.25",
    xi=math.log(2),
    device="cpu",
)


class DrivenField(nn.Module):
    """f(t, h) or f(t, h, m): linear in the state and the input voltage at time t, in samples."""

    def __init__(self, seen: int, width: int, voltage: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(seen + 1, width)
        self.voltage = voltage

    def forward(self, t: Tensor, *states: Tensor) -> Tensor:
        i = min(int(t), len(self.voltage) - 2)
        v = torch.lerp(self.voltage[i], self.voltage[i + 1], t - i)
        result: Tensor = self.linear(torch.cat([*states, v.expand(len(states[0]), 1)], dim=1))
        return result


def build(model: str, settings: Settings, voltage: Tensor) -> tuple[Evolution, nn.Linear]:
    """A model and the weight that is its initial velocity, drawn from torch's generator."""
    width = 2 if model == "ANODE" else 1
    field = DrivenField(2 if model == "SONODE" else width, width, voltage)
    return Evolution(model, field, **settings.layer_options()).double(), nn.Linear(1, 1, bias=False).double()


def norms(model: str, settings: Settings, seed: int, data: tuple[Tensor, Tensor]) -> list[dict[str, float]]:
    """The norms of state and features at every time, for one initialisation."""
    voltage, output = data
    torch.manual_seed(seed)
    evolution, velocity = build(model, settings, voltage)
    h = output[:1].view(1, 1)
    if model == "ANODE":
        h = torch.cat([h, torch.zeros_like(h)], dim=1)
    start = velocity.weight.detach() if is_second_order(model) else torch.zeros_like(h)
    evolution.solver["throw"] = False  # a state that overflows is a result here
    path, speed = evolution.path(h, start, torch.tensor(TIMES, dtype=torch.float64))
    state = path if speed is None else torch.cat([path, speed], dim=2)
    return [
        {"t": float(t), "norm": size(whole), "norm_of_features": size(features)}
        for t, whole, features in zip(TIMES, state, path, strict=True)
    ]


def size(state: Tensor) -> float:
    """The norm; infinity where the solve did not get."""
    norm = state.norm().item()
    return math.inf if math.isnan(norm) else norm


def measure(model: str, seed: int, settings: Settings, folder: Path) -> list[dict[str, float]]:
    return norms(model, settings, seed, silverbox.load(folder))


def present(rows: list[dict[str, Any]], settings: Settings) -> tuple[list[str], list[list[str]], Any]:
    """The table at some times and the curves at all, of log10 of the mean norm over the seeds."""
    from matplotlib.figure import Figure

    from nesterov_triton.experiments.report import style

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    cells = []
    for model in settings.models:
        curve = logarithms(rows, model, TIMES)
        axis.plot(TIMES, curve, label=model, linewidth=1.8, **style(model))
        found = (curve[TIMES.index(t)] for t in SHOWN)
        cells.append([model, *("overflow" if math.isinf(value) else f"{value:.2f}" for value in found)])
    axis.set_ylim(-2, 20)  # the published range; what leaves it does not come back
    axis.set_xlabel("t, samples")
    axis.set_ylabel(f"log10 of the state's norm, mean of {len(settings.seeds)}")
    axis.grid(True, color="#e5e5e5", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.suptitle(f"{EXPERIMENT.title}: untrained networks, gate {settings.gate}", fontsize=12)
    return ["model", *(f"log10 norm at t = {t}" for t in SHOWN)], cells, figure


def logarithms(rows: list[dict[str, Any]], model: str, times: Sequence[int]) -> list[float]:
    """log10 of the mean norm of the state over the seeds, at these times; infinite where one of them overflowed."""
    found: list[float] = []
    for t in times:
        mean = fmean(row["norm"] for row in rows if row["model"] == model and row["t"] == t)
        found.append(math.inf if math.isinf(mean) else math.log10(mean))
    return found


EXPERIMENT = Measurement(
    title="Silverbox",
    defaults=DEFAULTS,
    load=lambda seed, folder: silverbox.load(folder),
    build=lambda model, settings: build(model, settings, torch.zeros(len(TIMES) + 1)),
    measure=measure,
    present=present,
)
