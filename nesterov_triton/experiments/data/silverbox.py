"""Silverbox: voltages into and out of an electronic oscillator (Wigren and Schoukens 2013)."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nesterov_triton.experiments.data.files import DataFile, find

FILE = DataFile(
    "silverbox.csv",
    "https://raw.githubusercontent.com/hedixia/HeavyBallNODE/e8e32e1e3f5ed41a9d66745b299e6230c205cb32/data/sb.csv",
    "a CSV file of 131,072 samples",
    2_649_632,
    "e7076735427b0b9bbc18a2a43b78022219a76623b15b494be559dc58b0224279",
)
SCALE = 100.0  # of the published experiment


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[Tensor, Tensor]:
    """(input, output), each [131072] float64 with mean 0, times 100.

    Raises:
        CommandError: the file is missing or damaged.
    """
    lines = find(FILE, folder).read_text().splitlines()[1:]
    columns = torch.tensor([[float(cell) for cell in line.split(",")[:2]] for line in lines], dtype=torch.float64).T
    v1, v2 = SCALE * (columns - columns.mean(dim=1, keepdim=True))
    return v1, v2
