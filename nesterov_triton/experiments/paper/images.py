"""What MNIST and CIFAR-10 share: convolutional fields, and the network around a solve."""

import torch
from torch import Tensor, nn

from nesterov_triton.experiments.experiment import Settings
from nesterov_triton.experiments.models import Evolution, is_second_order

CLASSES = 10


class ConvField(nn.Module):
    """f(t, h) or f(t, h, m) on images: convolutions 1 x 1, 3 x 3, 1 x 1 with the time as one more channel of each.

    Args:
        seen: channels of what it is given, together.
        hidden: channels between.
        channels: of what it returns.
    """

    def __init__(self, seen: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(seen + 1, hidden, 1)
        self.second = nn.Conv2d(hidden + 1, hidden, 3, padding=1)
        self.third = nn.Conv2d(hidden + 1, channels, 1)

    def forward(self, t: Tensor, *states: Tensor) -> Tensor:
        time = t.to(states[0]).expand(len(states[0]), 1, *states[0].shape[2:])
        out = torch.relu(self.first(torch.cat([*states, time], dim=1)))
        out = torch.relu(self.second(torch.cat([out, time], dim=1)))
        result: Tensor = self.third(torch.cat([out, time], dim=1))
        return result


class ImageNetwork(nn.Module):
    """Images [batch, colours, size, size], as bytes, to scores [batch, 10].

    First-order models pad the image with zero channels. For the others a network draws from the image what is missing
    of the features, and all of the velocity.

    Args:
        model: its name.
        settings: of the run.
        colours, size: of an image.
        channels, hidden: of the field.
    """

    def __init__(self, model: str, settings: Settings, colours: int, size: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.channels = channels
        self.initial: nn.Module | None = None
        if is_second_order(model):
            self.initial = nn.Sequential(
                nn.Conv2d(colours, hidden, 1),
                nn.LeakyReLU(0.3),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.LeakyReLU(0.3),
                nn.Conv2d(hidden, 2 * channels - colours, 1),
            )
        seen = 2 * channels if model == "SONODE" else channels
        self.layer = Evolution(model, ConvField(seen, hidden, channels), **settings.layer_options())
        self.head = nn.Linear(channels * size * size, CLASSES)

    @property
    def stats(self) -> object:
        return self.layer.stats

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.head.weight.dtype) / 255
        h, velocity = x, None
        if self.initial is not None:
            h, velocity = torch.cat([x, self.initial(x)], dim=1).chunk(2, dim=1)
        elif x.shape[1] < self.channels:
            padding = x.new_zeros(len(x), self.channels - x.shape[1], *x.shape[2:])
            h = torch.cat([x, padding], dim=1)
        h, _ = self.layer(h, velocity)
        scores: Tensor = self.head(h.flatten(1))
        return scores


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).double().mean().item()
