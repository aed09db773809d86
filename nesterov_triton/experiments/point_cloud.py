"""Concentric point clouds: a disc inside a ring, which no flow of the plane (NODE) can separate linearly.

As published (Nguyen et al., NeurIPS 2022, after Dupont et al. 2019): 40 points r = 0.5 sqrt(U) with target -1 and
80 points r = 0.85 + 0.15 sqrt(U) with target +1; SmoothL1, Adam at 1e-2, batches of 50, tolerance 1e-7, float64.
"""

from functools import partial

import torch
from torch import Tensor, nn

from nesterov_triton.experiments.experiment import Experiment, Settings, Split
from nesterov_triton.experiments.models import (
    COMPARED,
    Network,
    TimedField,
    build_layer,
    feature_width,
    field_inputs,
    is_second_order,
    perceptron,
)

INNER, OUTER = 40, 80
TEST_FACTOR = 10  # the held-out cloud has ten times as many points
DIMENSIONS = 2

DEFAULTS = Settings(
    experiment="point-cloud",
    models=COMPARED,
    seeds=(0,),
    epochs=100,
    batch_size=50,
    learning_rate=1e-2,
    decay=1.0,
    tolerance=1e-7,
    method="dopri5",
    step_size=None,
    gradient="discrete",
    gate="softclip",
    device="cpu",
)


def draw(inner: int, outer: int, generator: torch.Generator) -> Split:
    """``inner`` points of the disc, then ``outer`` points of the ring: inputs [n, 2], targets [n, 1]."""
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    radius = torch.cat([0.5 * uniform(inner).sqrt(), 0.85 + 0.15 * uniform(outer).sqrt()])
    angle = 2 * torch.pi * uniform(inner + outer)
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    targets = torch.ones(inner + outer, 1, dtype=torch.float64)
    targets[:inner] = -1
    return Split(points, targets)


def load(seed: int) -> tuple[Split, Split]:
    """A cloud of its own for each seed, and a freshly drawn one to test on."""
    generator = torch.Generator().manual_seed(seed)
    return draw(INNER, OUTER, generator), draw(TEST_FACTOR * INNER, TEST_FACTOR * OUTER, generator)


def build(model: str, settings: Settings) -> Network:
    """The published networks; the width brings all models to nearly the same number of parameters."""
    width = feature_width(model, DIMENSIONS)
    n = 14 if is_second_order(model) else 20
    layer = build_layer(
        model,
        TimedField(perceptron([field_inputs(model, DIMENSIONS), n, n, width], nn.ELU)),
        perceptron([DIMENSIONS, n, n, DIMENSIONS], partial(nn.Hardtanh, -5.0, 5.0)),
        **settings.layer_options(),
    )
    return Network(layer, nn.Linear(width, 1)).double()


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.sign() == targets).double().mean().item()


EXPERIMENT = Experiment(
    title="concentric point clouds",
    defaults=DEFAULTS,
    load=load,
    build=build,
    loss=nn.functional.smooth_l1_loss,
    accuracy=accuracy,
)
