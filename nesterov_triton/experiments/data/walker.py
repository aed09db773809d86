"""Walker2d: 400 rollouts of a policy in a simulator, seen at irregular times; prepared as by Lechner and Hasani (2020).

Next states are to be predicted from states; a tenth of the time points is left out at random.
"""

import io
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nesterov_triton.experiments.data.files import DataFile, damaged, find
from nesterov_triton.experiments.experiment import CommandError, Split

FILE = DataFile(
    "walker.zip",
    "https://pub.ist.ac.at/~mlechner/datasets/walker.zip",
    "the archive of 400 rollouts",
    32_632_158,
    "403b4c4ae644f552007de7351019aa2afe99a5f180a015a29083fc6208ea31fe",
)
REQUIRES = ("numpy",)
ROLLOUTS = 400
WIDTH = 17  # of a state
WINDOW, STRIDE = 64, 16
TEST, VALIDATION = 0.15, 0.1  # of the rollouts
KEPT = 0.9  # probability of a time point
SHUFFLE_SEED, DROP_SEED = 125487, 891374


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[Split, Split, Split]:
    """(train, validation, test): inputs [n, 64, 18], the state and the time since the last one in 64ths; targets
    [n, 64, 17], the next states; all float64.

    Raises:
        CommandError: the archive is missing or damaged.
    """
    return prepare(read(find(FILE, folder)))


def read(path: Path) -> list[Any]:
    """The rollouts in the order of their names, [steps, 17] each."""
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".npy"))
            rollouts = [np.load(io.BytesIO(archive.read(name))) for name in names]
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise CommandError(damaged(path, FILE, error)) from error
    if len(rollouts) != ROLLOUTS or any(each.ndim != 2 or each.shape[1] != WIDTH for each in rollouts):
        raise CommandError(damaged(path, FILE, ValueError(f"{len(rollouts)} rollouts")))
    return rollouts


def prepare(rollouts: list[Any]) -> tuple[Split, Split, Split]:
    """See `load`."""
    import numpy as np

    order = np.arange(len(rollouts))
    np.random.RandomState(SHUFFLE_SEED).shuffle(order)
    generator = np.random.RandomState(DROP_SEED)
    first, second = int(TEST * len(order)), int((TEST + VALIDATION) * len(order))
    # The generator is drawn from for training first, then for validation, then for the test.
    train = windows([rollouts[i] for i in order[second:]], generator)
    validation = windows([rollouts[i] for i in order[first:second]], generator)
    return train, validation, windows([rollouts[i] for i in order[:first]], generator)


def windows(rollouts: list[Any], generator: Any) -> Split:
    """All windows of some rollouts, with time points left out."""
    import numpy as np

    inputs, targets = [], []
    for rollout in rollouts:
        kept = np.flatnonzero([generator.rand() < KEPT for _ in range(len(rollout) - 1)])
        elapsed = np.diff(kept, prepend=-1) / WINDOW
        seen = np.concatenate([rollout[kept], elapsed[:, None]], axis=1)
        for start in range(0, len(kept) - WINDOW, STRIDE):
            inputs.append(seen[start : start + WINDOW])
            targets.append(rollout[kept[start : start + WINDOW] + 1])
    seen, following = (torch.tensor(np.array(each), dtype=torch.float64) for each in (inputs, targets))
    return Split(seen, following)
