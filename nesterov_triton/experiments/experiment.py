"""What an experiment is: data, a network for each model, a loss and the settings it starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nesterov_triton.systems import Xi


class CommandError(Exception):
    """The command cannot do what it was asked; the message says what to change."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run; stored in the output folder for ``--resume``.

    ``decay`` multiplies the learning rate as the experiment's schedule says; ``clip`` bounds the gradient's norm;
    ``limit`` is the number of training rows, and of test rows, that are used at most.
    """

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
    xi: Xi = "learnable"
    damping_factor: float = 3.0
    clip: float | None = None
    limit: int | None = None

    def layer_options(self) -> dict[str, Any]:
        """What of them a layer is built with."""
        return {
            "gate": self.gate,
            "xi": self.xi,
            "damping_factor": self.damping_factor,
            "method": self.method,
            "rtol": self.tolerance,
            "atol": self.tolerance,
            "step_size": self.step_size,
            "gradient": self.gradient,
        }


@dataclass(frozen=True)
class Split:
    """Inputs [n, ...] and targets [n, ...]."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: str) -> "Split":
        return Split(self.inputs.to(device), self.targets.to(device))

    def first(self, rows: int | None) -> "Split":
        """At most so many rows."""
        return Split(self.inputs[:rows], self.targets[:rows])


class Counted(Protocol):
    """What a network tells of its last call; the backward pass adds to it."""

    nfe_forward: int
    nfe_backward: int


class Trainable(Protocol):
    """A network that can be trained: a module with counts."""

    @property
    def stats(self) -> Counted: ...
    def __call__(self, inputs: Tensor) -> Tensor: ...


def every_epoch(settings: Settings, epoch: int, iteration: int) -> float:
    """The usual schedule: one factor ``decay`` after every epoch."""
    return settings.decay ** (epoch - 1)


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        title: what it is called on the screen.
        defaults: the settings it starts from.
        load: ``load(seed, folder)`` gives (train, test); ``folder`` is where data files are, or go.
        build: ``build(model, settings)`` draws the network from torch's generator; raises ValueError or TypeError for
            settings that are not for this model.
        loss: of outputs and targets, a mean over the rows.
        accuracy: the fraction of rows predicted correctly; None where there is no such thing.
        requires: packages beyond those that every experiment needs.
        schedule: the factor on the learning rate in an epoch, from 1, and an iteration of the whole training, from 0.
        test_batch_size: rows evaluated at once.
        threads: of torch on a CPU; None for torch's own choice. On networks this small a second one gains nothing, and
            each wait for it while another process holds its core made an epoch of the digits take 2.9 s instead of 0.4.
        figures: further figures of the trained networks, by file name.
    """

    title: str
    defaults: Settings
    load: Callable[[int, Path], tuple[Split, Split]]
    build: Callable[[str, Settings], Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    accuracy: Callable[[Tensor, Tensor], float] | None
    requires: tuple[str, ...] = ()
    schedule: Callable[[Settings, int, int], float] = every_epoch
    test_batch_size: int = 10_000
    threads: int | None = 1
    figures: tuple[tuple[str, Callable[[dict[str, Any], Settings, tuple[Split, Split]], Any]], ...] = ()


@dataclass(frozen=True)
class Measurement:
    """An experiment that trains nothing.

    Attributes:
        title, defaults, load, requires: as in `Experiment`; of the settings those of ``unused`` play no part.
        build: ``build(model, settings)`` raises ValueError or TypeError for settings that are not for this model.
        measure: ``measure(model, seed, settings, folder)`` gives rows of columns for the CSV.
        unused: settings that cannot be asked for.
        present: the table and the figure of all rows: ``present(rows, settings)`` gives (headings, table rows, figure).
    """

    title: str
    defaults: Settings
    load: Callable[[int, Path], Any]
    build: Callable[[str, Settings], object]
    measure: Callable[[str, int, Settings, Path], list[dict[str, float]]]
    present: Callable[[list[dict[str, Any]], Settings], tuple[list[str], list[list[str]], Any]]
    unused: tuple[str, ...] = ("epochs", "batch_size", "learning_rate", "decay", "clip", "limit", "gradient")
    requires: tuple[str, ...] = ()
