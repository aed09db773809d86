"""CIFAR-10, classified by one layer on the image.

Settings as in the released code of Nguyen et al., NeurIPS 2022 (``cifar/main.py``, ``cifar/utils.py``): batches of 256
as in the paper, Adam at 1e-3, the learning rate times 0.95 every 1,000 steps, the gradient's norm clipped at 1, 40
epochs, tolerance 1e-5, residual ξ = 1.5 fixed, continuous adjoint, gates tanh. The paper's ablations are options here:
``--damping-factor 3 | 5 | 10``, ``--xi 0.5 | 1 | 1.5 | 3``, ``--method euler --step-size 0.1 | 0.2 | 0.5``.
"""

from pathlib import Path

from torch import nn

from nesterov_triton.experiments.data import images
from nesterov_triton.experiments.experiment import Experiment, Settings, Split
from nesterov_triton.experiments.models import PAPER
from nesterov_triton.experiments.paper.images import ImageNetwork, accuracy

COLOURS, SIZE = 3, 32
# (channels, hidden channels) of the field, which bring all models to about 172,000 parameters
WIDTHS = {"NODE": (3, 125), "ANODE": (13, 64), "SONODE": (12, 50)}
MOMENTUM_WIDTHS = (12, 51)
DECAY_STEPS = 1000

DEFAULTS = Settings(
    experiment="cifar10",
    models=PAPER,
    seeds=(0,),
    epochs=40,
    batch_size=256,
    learning_rate=1e-3,
    decay=0.95,
    clip=1.0,
    tolerance=1e-5,
    method="dopri5",
    step_size=None,
    gradient="discrete",
    gate="softclip",
    xi=1.5,
    device="cpu",
)


def load(seed: int, folder: Path) -> tuple[Split, Split]:
    """The 50,000 and the 10,000 images, whatever the seed."""
    return images.load(images.CIFAR10, folder)


def build(model: str, settings: Settings) -> ImageNetwork:
    return ImageNetwork(model, settings, COLOURS, SIZE, *WIDTHS.get(model, MOMENTUM_WIDTHS))


def schedule(settings: Settings, epoch: int, iteration: int) -> float:
    return settings.decay ** (iteration // DECAY_STEPS)


EXPERIMENT = Experiment(
    title="CIFAR-10",
    defaults=DEFAULTS,
    load=load,
    build=build,
    loss=nn.functional.cross_entropy,
    accuracy=accuracy,
    requires=images.REQUIRES,
    schedule=schedule,
    test_batch_size=500,
    threads=None,
)
