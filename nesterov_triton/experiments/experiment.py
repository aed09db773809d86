"""What an experiment is: data, a network for each model, a loss, an accuracy and the settings it starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nesterov_triton.experiments.models import Network


class CommandError(Exception):
    """The command cannot do what it was asked; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a comparison; stored in the output folder for ``--resume``."""

    experiment: str
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    decay: float
    tolerance: float
    method: str
    step_size: float | None
    gradient: str
    gate: str
    device: str

    def layer_options(self) -> dict[str, Any]:
        """What of them a layer is built with."""
        return {
            "gate": self.gate,
            "method": self.method,
            "rtol": self.tolerance,
            "atol": self.tolerance,
            "step_size": self.step_size,
            "gradient": self.gradient,
        }


@dataclass(frozen=True)
class Split:
    """Inputs [n, features] and targets [n] or [n, 1]."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: str) -> "Split":
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Experiment:
    """One experiment. ``accuracy`` gives the fraction of rows predicted correctly.

    ``load(seed)`` returns (train, test); ``build(model, settings)`` draws the network from torch's generator.
    """

    title: str
    defaults: Settings
    load: Callable[[int], tuple[Split, Split]]
    build: Callable[[str, Settings], Network]
    loss: Callable[[Tensor, Tensor], Tensor]
    accuracy: Callable[[Tensor, Tensor], float]
    requires: tuple[str, ...] = ()
