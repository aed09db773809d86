"""One thread, the same hypothesis examples in every run, and triton's interpreter where there is no CUDA device."""

import os
import sys

import hypothesis
import pytest
import torch

# Before anything imports triton, which reads it once. A process is interpreter or compiler, never both.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=20, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
