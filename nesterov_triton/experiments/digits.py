"""Handwritten digits: the 1,797 images of 8 x 8 pixels that ship inside scikit-learn, ten classes.

The 64 pixels are the features; the layer moves them, a linear readout classifies them.
"""

from pathlib import Path

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
    perceptron,
)

PIXELS, CLASSES, HIDDEN = 64, 10, 64
TEST_FRACTION = 0.25

DEFAULTS = Settings(
    experiment="digits",
    models=COMPARED,
    seeds=(0,),
    epochs=20,
    batch_size=64,
    learning_rate=1e-2,
    decay=0.9,
    tolerance=1e-3,
    method="dopri5",
    step_size=None,
    gradient="discrete",
    gate="softclip",
    device="cpu",
)


def load(seed: int, folder: Path = Path(".")) -> tuple[Split, Split]:
    """The same stratified split whatever the seed, pixels scaled to [-1, 1] in float32."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 8 - 1, labels, test_size=TEST_FRACTION, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.long) for part in parts[2:])
    return Split(train_x, train_y), Split(test_x, test_y)


def build(model: str, settings: Settings) -> Network:
    width = feature_width(model, PIXELS)
    layer = build_layer(
        model,
        TimedField(perceptron([field_inputs(model, PIXELS), HIDDEN, width], nn.Tanh)),
        None,
        **settings.layer_options(),
    )
    return Network(layer, nn.Linear(width, CLASSES))


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).double().mean().item()


EXPERIMENT = Experiment(
    title="handwritten digits",
    defaults=DEFAULTS,
    load=load,
    build=build,
    loss=nn.functional.cross_entropy,
    accuracy=accuracy,
    requires=("sklearn",),
)
