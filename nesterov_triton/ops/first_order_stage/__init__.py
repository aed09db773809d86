"""One stage of a first-order system: from the field's outputs to its next argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.first_order_stage import reference
from nesterov_triton.tableaus import Tableau

__all__ = ["first_order_stage"]


def first_order_stage(y: Tensor, slopes: Sequence[Tensor], dt: Tensor, tableau: Tableau, stage: int) -> Tensor:
    """The state y_n + dt Σ_j a_j k_j, [D], at which the field is evaluated next.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere the torch reference.

    Args:
        y: y_n, D elements, float16, bfloat16, float32 or float64. Contiguous, like all rows.
        slopes: k_0 … k_stage, the field's outputs, D elements of y's dtype each. They are read again at later stages:
            what a field will overwrite must be copied first.
        dt: the step size, one element, float32 or float64.
        tableau, stage: the method and the stage just evaluated, 0 ≤ stage ≤ stages - 2.

    Raises:
        ValueError: sizes, dtypes, devices or the stage don't fit, or a row is not contiguous.
    """
    if not 0 <= stage <= tableau.stages - 2 or len(slopes) != stage + 1:
        raise ValueError(f"stage {stage} of {tableau.name} with {len(slopes)} slopes, expected {stage + 1}")
    dispatch.check_rows(y, y.numel(), y=y, slopes=slopes)
    dispatch.check_scalars(y, dt=dt)
    if dispatch.as_operator():
        found: Tensor = _operator(y, slopes, dt, dispatch.method_name(tableau), stage)
        return found
    run: Callable[..., Tensor] = _kernel() if y.is_cuda else reference.first_order_stage
    return run(y, slopes, dt, tableau, stage)


def _kernel() -> Callable[..., Tensor]:
    if not dispatch.has_triton():
        return reference.first_order_stage
    from nesterov_triton.ops.first_order_stage import kernel

    return kernel.launch


def _run(implementation: Callable[..., Tensor], *args: Any) -> Tensor:
    *tensors, method, stage = args
    return implementation(*tensors, tableaus.get(method), stage)


@torch.library.custom_op(
    "nesterov_triton::first_order_stage",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor y, Tensor[] slopes, Tensor dt, str method, int stage) -> Tensor",
)
def _operator(*args: Any) -> Tensor:
    return _run(reference.first_order_stage, *args)


@_operator.register_kernel("cuda")
def _(*args: Any) -> Tensor:
    return _run(_kernel(), *args)


@_operator.register_fake
def _(y: Tensor, *args: Any) -> Tensor:
    return y.new_empty(y.numel())
