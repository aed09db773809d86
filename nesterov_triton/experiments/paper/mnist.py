"""MNIST, classified by one layer on the image.

Settings as in the released code of Nguyen et al., NeurIPS 2022 (``mnist/mnist_full_run.py``), after Xia et al. 2021:
batches of 64, Adam at 5e-4, the gradient's norm clipped at 10, 40 epochs, tolerance 1e-5, continuous adjoint; gates
there hardtanh(±0.5) in GNesterovNODE and tanh in GHBNODE. The learning-rate schedule in that file is never stepped.
"""

from pathlib import Path

from torch import nn

from nesterov_triton.experiments.data import images
from nesterov_triton.experiments.experiment import Experiment, Settings, Split
from nesterov_triton.experiments.models import PAPER
from nesterov_triton.experiments.paper.images import ImageNetwork, accuracy

COLOURS, SIZE = 1, 28
# (channels, hidden channels) of the field, which bring all models to about 86,000 parameters
WIDTHS = {"NODE": (1, 92), "ANODE": (6, 64)}
MOMENTUM_WIDTHS = (5, 50)

DEFAULTS = Settings(
    experiment="mnist",
    models=PAPER,
    seeds=(0,),
    epochs=40,
    batch_size=64,
    learning_rate=5e-4,
    decay=1.0,
    clip=10.0,
    tolerance=1e-5,
    method="dopri5",
    step_size=None,
    gradient="discrete",
    gate="softclip",
    device="cpu",
)


def load(seed: int, folder: Path) -> tuple[Split, Split]:
    """The 60,000 and the 10,000 images, whatever the seed."""
    return images.load(images.MNIST, folder)


def build(model: str, settings: Settings) -> ImageNetwork:
    return ImageNetwork(model, settings, COLOURS, SIZE, *WIDTHS.get(model, MOMENTUM_WIDTHS))


EXPERIMENT = Experiment(
    title="MNIST",
    defaults=DEFAULTS,
    load=load,
    build=build,
    loss=nn.functional.cross_entropy,
    accuracy=accuracy,
    requires=images.REQUIRES,
    test_batch_size=500,
    threads=None,
)
