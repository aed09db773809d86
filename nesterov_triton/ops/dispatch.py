"""Which of an operator's implementations runs: by the tensor's device, nothing to configure.

An operator is a folder: `reference.py` has a function of the folder's name, `kernel.py` has `launch` with the same
arguments, `__init__.py` the public function and its registration with `operator`. In `control`, which no tracer sees,
it is several functions, each with its `launch_`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton.nystrom import METHODS, Nystrom
from nesterov_triton.tableaus import TABLEAUS, Tableau

SWITCH = "NESTEROV_TRITON_KERNELS"  # in the environment: 0 for plain torch, whatever the device
OLDEST = (8, 0)  # compute capability that the kernels are compiled and checked for


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def why_not(device: torch.device) -> str:
    """Why operators on tensors of this device run their torch reference; empty where they run Triton kernels."""
    if device.type != "cuda":
        return f"the state is on the {device.type.upper()}"
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if not has_triton():
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"the GPU is of compute capability {capability[0]}.{capability[1]}, and kernels need 8.0"
    return ""


def runs_kernels(device: torch.device) -> bool:
    """Whether operators on tensors of this device run Triton kernels rather than their torch reference."""
    return not why_not(device)


def implementation(op: str, like: Tensor) -> Callable[..., Any]:
    """What runs for tensors where `like` is: the kernel's launcher, or the reference."""
    return _load(op, runs_kernels(like.device))


@functools.cache
def _load(op: str, kernel: bool) -> Callable[..., Any]:
    folder, _, name = op.partition(".")
    module = importlib.import_module(f"nesterov_triton.ops.{folder}.{'kernel' if kernel else 'reference'}")
    launcher = f"launch_{name}" if name else "launch"
    found: Callable[..., Any] = getattr(module, launcher if kernel else name or op)
    return found


def operator(op: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `nesterov_triton::op`, for a tracer one node that it does not look into.

    Args:
        schema: of its arguments and results.
        run: from these arguments to these results, on a CPU or a CUDA device; calls `implementation`.
        fake: the same on tensors without data.
    """
    name = f"nesterov_triton::{op}"
    registered = torch.library.custom_op(name, run, mutates_args=(), device_types="cpu", schema=schema)
    registered.register_kernel("cuda")(run)
    registered.register_fake(fake)
    return registered


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in: float32 for half precision, the type itself for float32 and float64."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def as_operator() -> bool:
    """Whether a call must go through the registered operator: a tracer is to see one node, or autograd is to say that
    there is no derivative. Otherwise the implementation is called directly, 10 to 20 µs sooner."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def is_registered(method: Tableau | Nystrom) -> bool:
    """Whether the method is the one of its name in `tableaus.TABLEAUS` or `nystrom.METHODS`."""
    return (METHODS if isinstance(method, Nystrom) else TABLEAUS).get(method.name) is method


def method_name(method: Tableau | Nystrom) -> str:
    """What an operator's schema calls a method.

    Raises:
        ValueError: it is not registered; a schema has no place for one.
    """
    if not is_registered(method):
        kind, where = ("method", "nystrom.METHODS") if isinstance(method, Nystrom) else ("tableau", "tableaus.TABLEAUS")
        raise ValueError(f"{kind} {method.name!r} is not registered in {where}, so no operator can name it")
    return method.name


def check_rows(like: Tensor, size: int, **rows: Tensor | Sequence[Tensor] | None) -> None:
    """Raise ValueError for a row that a kernel would misread: of another size, dtype or device than `like`, or not
    contiguous. A kernel sees bare pointers and would return garbage."""
    for name, given in rows.items():
        for row in () if given is None else (given,) if isinstance(given, Tensor) else given:
            if row.numel() != size or row.dtype != like.dtype or row.device != like.device or not row.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous, of {size} elements, {like.dtype} on {like.device}; got "
                    f"{tuple(row.shape)} with strides {row.stride()}, {row.dtype} on {row.device}"
                )


def check_scalars(like: Tensor, **scalars: Tensor) -> None:
    """Raise ValueError for scalars that are not contiguous, float32 or float64, on the device of `like`."""
    for name, given in scalars.items():
        known = given.dtype in (torch.float32, torch.float64)
        if not known or given.device != like.device or not given.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 or float64 on {like.device}; got {given.dtype} on {given.device} "
                f"with strides {given.stride()}"
            )


def check_coefficients(like: Tensor, coefficients: Tensor, stages: int) -> None:
    """Raise ValueError unless these are the coefficients of at least so many stages, as `check_scalars`."""
    check_scalars(like, coefficients=coefficients)
    if coefficients.ndim != 2 or coefficients.shape[0] < stages or coefficients.shape[1] != 4:
        raise ValueError(f"coefficients must have shape ({stages}, 4) or more rows, got {tuple(coefficients.shape)}")
