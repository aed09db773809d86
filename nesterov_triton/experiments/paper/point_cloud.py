"""Concentric point clouds: a disc inside a ring, which no flow of the plane (NODE) can separate linearly.

Settings as in the released code of Nguyen et al., NeurIPS 2022 (``nested_n_spheres.py``), after Dupont et al. 2019:
40 points r = 0.5 sqrt(U) with target -1, 80 points r = 0.85 + 0.15 sqrt(U) with target +1; SmoothL1, Adam at 1e-2,
batches of 50, 200 epochs, tolerance 1e-7, float64, 50 runs, gate hardtanh(±5), continuous adjoint. Started here with
the package's own gate and gradient and with 5 seeds; the published ones: ``--gate hardtanh --gradient adjoint --seeds``
and fifty numbers.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nesterov_triton as nt
from nesterov_triton.experiments.experiment import Experiment, Settings, Split
from nesterov_triton.experiments.models import (
    COMPARED as COMPARED_MODELS,
)
from nesterov_triton.experiments.models import (
    END,
    PAPER,
    START,
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
HIDDEN = 20  # of NODE and ANODE; ANODE appends one zero
HIDDEN_MOMENTUM = 14
HIDDEN_SONODE = 13  # its field sees the velocity too

DEFAULTS = Settings(
    experiment="point-cloud",
    models=PAPER,
    seeds=(0, 1, 2, 3, 4),
    epochs=200,
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


def load(seed: int, folder: Path = Path(".")) -> tuple[Split, Split]:
    """A cloud of its own for each seed, and a freshly drawn one to test on."""
    generator = torch.Generator().manual_seed(seed)
    return draw(INNER, OUTER, generator), draw(TEST_FACTOR * INNER, TEST_FACTOR * OUTER, generator)


def build(model: str, settings: Settings, bound: float | None = None) -> Network:
    """The published networks; the width brings all models to nearly the same number of parameters.

    ``bound``: of a hardtanh behind the readout; none without.
    """
    width = feature_width(model, DIMENSIONS)
    n = (HIDDEN_SONODE if model == "SONODE" else HIDDEN_MOMENTUM) if is_second_order(model) else HIDDEN
    layer = build_layer(
        model,
        TimedField(perceptron([field_inputs(model, DIMENSIONS), n, n, width], nn.ELU)),
        perceptron([DIMENSIONS, n, n, DIMENSIONS], partial(nn.Hardtanh, -5.0, 5.0)),
        **settings.layer_options(),
    )
    readout: nn.Module = nn.Linear(width, 1)
    if bound is not None:
        readout = nn.Sequential(readout, nn.Hardtanh(-bound, bound))
    return Network(layer, readout).double()


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.sign() == targets).double().mean().item()


@torch.no_grad()
def trajectories(networks: dict[str, Network], settings: Settings, data: tuple[Split, Split]) -> Any:
    """How each trained layer moves the training points, from t = 1 (dots) to t = 2: a matplotlib figure."""
    from matplotlib.figure import Figure

    columns = min(4, len(networks))
    rows = -(-len(networks) // columns)
    figure = Figure(figsize=(3 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    times = torch.linspace(START, END, 21, dtype=torch.float64)
    colours = {-1.0: "#0072b2", 1.0: "#d55e00"}
    split = data[0].first(settings.limit)
    for axis, (model, network) in zip(axes, networks.items(), strict=False):
        axis.set_title(model, fontsize=11)
        try:
            path = network.layer(split.inputs, t=times)[..., :2]
        except nt.SolveError as error:
            axis.set_title(f"{model}: {error.status.name}", fontsize=11)
            continue
        for i, target in enumerate(split.targets.flatten().tolist()):
            axis.plot(*path[:, i].T.tolist(), color=colours[target], linewidth=0.5, alpha=0.5)
            axis.plot(*path[-1, i].tolist(), ".", color=colours[target], markersize=4)
        axis.set_aspect("equal", adjustable="datalim")
        axis.grid(True, color="#e5e5e5", linewidth=0.8)
    for axis in axes[len(networks) :]:
        axis.set_visible(False)
    figure.suptitle("features from t = 1 to t = 2 (dots), first two dimensions", fontsize=12)
    return figure


EXPERIMENT = Experiment(
    title="concentric point clouds",
    defaults=DEFAULTS,
    load=load,
    build=partial(build, bound=1.0),  # the released code's readout ends in hardtanh(±1)
    loss=nn.functional.smooth_l1_loss,
    accuracy=accuracy,
    figures=(("features", trajectories),),
)
# The same task as a quick comparison: fewer epochs and models, one seed, a linear readout.
COMPARED = replace(
    EXPERIMENT,
    build=build,
    figures=(),
    defaults=replace(DEFAULTS, models=COMPARED_MODELS, seeds=(0,), epochs=100),
)
