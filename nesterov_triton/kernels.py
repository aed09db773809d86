"""Which path a solve takes, Triton kernels or plain torch, and why.

Nothing needs to be configured. NESTEROV_TRITON_KERNELS=0 in the environment, before the first solve, is for a machine
on which Triton cannot compile.

    layer.stats.path             # of the last call: "kernels", or "torch: the state is on the CPU"
    nt.kernels.path(layer.system, "cuda")
    nt.kernels.available()       # whether this machine can run them at all, in words
"""

from __future__ import annotations

import importlib.metadata
from typing import NamedTuple

import torch
from torch import Tensor

from nesterov_triton._names import public
from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.ops import dispatch
from nesterov_triton.systems import Momentum, System


class Path(NamedTuple):
    """What does the solver's elementwise work."""

    kernels: bool  # Triton kernels, or plain torch
    reason: str  # why not the kernels; empty where they run

    def __str__(self) -> str:
        return "kernels" if self.kernels else f"torch: {self.reason}"


def path(system: System, device: torch.device | str, *tolerances: Tensor | float) -> Path:
    """The path of a solve of `system` with its state on `device`, at these tolerances.

    Backpropagation (gradient="backprop") always takes plain torch, as do the backward passes of "discrete" with respect
    to times, of "adjoint" with its quadratures in the norm, and of "reversible": `Stats.path` and `Stats.path_backward`
    say what became of a solve.
    """
    where = torch.device(device)
    if not dispatch.runs_kernels(where):
        return Path(False, dispatch.why_not(where))
    if isinstance(system, Momentum):
        for name, gate in (("gate_x", system.gate_x), ("gate_f", system.gate_f)):
            if kernel_form(gate) is None:
                return Path(False, f"{name}={_name(gate)} has no Triton form")
    if any(isinstance(x, Tensor) and x.ndim for x in tolerances):
        return Path(False, "the tolerance differs from element to element")
    return Path(True, "")


def available() -> str:
    """Whether kernels can run here, and on what, in one line."""
    if not dispatch.has_triton():
        return "no: triton is not installed"
    triton = f"triton {importlib.metadata.version('triton')}"
    if not torch.cuda.is_available():
        return f"no: {triton} is installed, but torch sees no CUDA device"
    reason = dispatch.why_not(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        return f"no: {reason}"
    return f"yes: {triton} on {torch.cuda.get_device_name()}"


def _name(gate: Gate) -> str:
    function = getattr(gate, "function", gate)
    return getattr(function, "__name__", type(function).__name__)


__all__ = ["Path", "available", "path"]


def __dir__() -> list[str]:
    return public(globals())
