"""The compared models: their fields, their layers, and the network around a layer."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import nesterov_triton as nt

COMPARED = ("NODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE")
MODELS = ("NODE", "ANODE", "SONODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE")
AUGMENT = 1  # zeros that ANODE appends to the features
GATED = ("GHBNODE", "GNesterovNODE")


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
    """A neural-ODE layer and a linear readout of its final features: [batch, features] -> [batch, outputs]."""

    def __init__(self, layer: nn.Module, readout: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.readout = readout

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
    model: str, field: nn.Module, initial_velocity: nn.Module | None, *, gate: str, **solver: Any
) -> nn.Module:
    """The layer called ``model``; ``solver`` is passed on (method, rtol, atol, gradient, step_size)."""
    if is_second_order(model):
        solver["initial_velocity"] = initial_velocity
    if model in GATED:
        solver["gate"] = gate
    if model == "ANODE":
        solver["augment"] = AUGMENT
    layer: nn.Module = getattr(nt, model)(field, **solver)
    return layer
