"""One thread, the same hypothesis examples in every run, and triton's interpreter where there is no CUDA device."""

import os
import sys

import pytest
import torch

try:
    import hypothesis
except ImportError:  # the kernels' tests, which run on a GPU machine too, do without
    hypothesis = None

# Before anything imports triton, which reads it once. A process is interpreter or compiler, never both.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
if hypothesis is not None:
    settings = {"deadline": None, "derandomize": True, "max_examples": 20, "database": None}
    hypothesis.settings.register_profile("repeatable", **settings)
    hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def runs_kernels() -> None:
    """Skips where triton is missing, or would compile for a device that is not there."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton was imported before TRITON_INTERPRET was set")


@pytest.fixture
def poisoned(runs_kernels, monkeypatch) -> None:
    """For tests that run kernels: memory that nobody wrote is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def take(monkeypatch):
    """`take(path)` sends solves that follow down "torch", "references" or "kernels", on any device."""
    from nesterov_triton.ops import dispatch

    load = dispatch._load  # before the test changes it

    def choose(path: str) -> None:
        monkeypatch.setattr(dispatch, "runs_kernels", lambda device: path != "torch")
        monkeypatch.setattr(dispatch, "_load", lambda op, kernel: load(op, path == "kernels"))

    return choose


# Of the interpreter: numpy's, where a kernel computes infinities on purpose.
def pytest_configure(config) -> None:
    for kind in ("DeprecationWarning", "RuntimeWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}:triton")
