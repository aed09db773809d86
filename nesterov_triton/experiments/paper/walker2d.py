"""Walker2d: the next state of a simulated walker from its states so far, by a recurrent network with a solve between.

Settings as in the released code of Nguyen et al., NeurIPS 2022 (``walker2d/``): windows of 64, 24 hidden units,
tolerance 1e-7, Adam at 1e-3 and from epoch 50 at 3e-3, the gradient's norm clipped at 1, batches of 256, 500 epochs,
continuous adjoint. Done differently here:

- A step's Δt, which scales its right-hand side, is part of that solve. The released code sets it on the shared field
  before each solve, so that the backward pass of all of them sees the last one's.
- Prediction i sees input i in every model. There NODE's and ANODE's see the inputs before i only.
- One optimiser, not a new one at epoch 50; one schedule for all models (there NODE and ANODE start at 3e-3).
- float64, there float32, which does not resolve the tolerance: rounding in GNesterovNODE's gates then looks like an
  error of the step, and a trained network takes 1664 evaluations for a window instead of 1280.
- SONODE's field there declares a second layer of 46 inputs and gives it 23, which cannot run; here those 23 come with
  the velocity, which keeps its 10,390 parameters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nesterov_triton.experiments.data import walker
from nesterov_triton.experiments.experiment import Experiment, Settings, Split
from nesterov_triton.experiments.models import PAPER, Evolution, is_second_order, perceptron

WIDTH = walker.WIDTH
HIDDEN, HIDDEN_SONODE = 24, 23
LIFTED = 5  # of ANODE's first features; the others start at zero
WARM_UP, AFTERWARDS = 50, 3.0  # epochs, and the factor on the learning rate after them

DEFAULTS = Settings(
    experiment="walker2d",
    models=PAPER,
    seeds=(0,),
    epochs=500,
    batch_size=256,
    learning_rate=1e-3,
    decay=1.0,
    clip=1.0,
    tolerance=1e-7,
    method="dopri5",
    step_size=None,
    gradient="discrete",
    gate="softclip",
    device="cpu",
)


class Field(nn.Module):
    """f(t, h): a perceptron that does not see the time."""

    def __init__(self) -> None:
        super().__init__()
        self.network = perceptron([HIDDEN] * 4, nn.Tanh)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        result: Tensor = self.network(h)
        return result


class SecondOrderField(nn.Module):
    """f(t, h, m) of SONODE; see the module's last point."""

    def __init__(self) -> None:
        super().__init__()
        n = HIDDEN_SONODE
        self.first, self.second, self.third = nn.Linear(2 * n, n), nn.Linear(2 * n, n), nn.Linear(n, n)

    def forward(self, t: Tensor, h: Tensor, m: Tensor) -> Tensor:
        out = torch.tanh(self.first(torch.cat([h, m], dim=1)))
        out = torch.tanh(self.second(torch.cat([out, m], dim=1)))
        result: Tensor = self.third(out)
        return result


@dataclass
class Counts:
    """The counts of several solves together, which grow as their backward passes run."""

    solves: list[Any]

    @property
    def nfe_forward(self) -> int:
        return sum(stats.nfe_forward for stats in self.solves)

    @property
    def nfe_backward(self) -> int:
        return sum(stats.nfe_backward for stats in self.solves)


class OdeRnn(nn.Module):
    """A recurrent network with a solve for each step: inputs [batch, steps, 18], state and Δt, to [batch, steps, 17].

    A first-order model solves over Δt and then takes the step's input in; a second-order one takes it in, on feature
    and velocity, and then solves. Both predict from what they have then.
    """

    def __init__(self, model: str, settings: Settings) -> None:
        super().__init__()
        self.momentum = is_second_order(model)
        self.n = n = HIDDEN_SONODE if model == "SONODE" else HIDDEN
        field = SecondOrderField() if model == "SONODE" else Field()
        self.layer = Evolution(model, field, scaled=True, **settings.layer_options())
        widths = [WIDTH + 2 * n, 2 * n, 2 * n, 2 * n] if self.momentum else [WIDTH + n, 3 * n, 2 * n, n]
        self.cell = perceptron(widths, nn.Tanh)
        self.lift = nn.Linear(WIDTH, LIFTED) if model == "ANODE" else None
        self.readout = nn.Linear(n, WIDTH)
        self.stats = Counts([])

    def forward(self, inputs: Tensor) -> Tensor:
        self.stats = Counts([])
        h = inputs.new_zeros(len(inputs), self.n)
        if self.lift is not None:
            h = torch.cat([self.lift(inputs[:, 0, :WIDTH]), h[:, LIFTED:]], dim=1)
        m = torch.zeros_like(h)
        predictions = []
        for seen in inputs.unbind(dim=1):
            x, elapsed = seen[:, :WIDTH], seen[:, WIDTH:]
            if self.momentum:
                kick_h, kick_m = self.cell(torch.cat([h, m, x], dim=1)).chunk(2, dim=1)
                h, m = self.layer(h + kick_h, m + kick_m, elapsed)
            else:
                h, _ = self.layer(h, None, elapsed)
                h = self.cell(torch.cat([h, x], dim=1))
            self.stats.solves.append(self.layer.stats)
            predictions.append(h)
        result: Tensor = self.readout(torch.stack(predictions, dim=1))
        return result


def load(seed: int, folder: Path) -> tuple[Split, Split]:
    """Training and test windows, whatever the seed. The validation windows are left alone."""
    train, _, test = walker.load(folder)
    return train, test


def build(model: str, settings: Settings) -> OdeRnn:
    return OdeRnn(model, settings).double()


def schedule(settings: Settings, epoch: int, iteration: int) -> float:
    return (AFTERWARDS if epoch > WARM_UP else 1.0) * settings.decay ** (epoch - 1)


EXPERIMENT = Experiment(
    title="Walker2d",
    defaults=DEFAULTS,
    load=load,
    build=build,
    loss=nn.functional.mse_loss,
    accuracy=None,
    requires=walker.REQUIRES,
    schedule=schedule,
    test_batch_size=2000,
)
