"""The end of a first-order step: new state, embedded error and its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.first_order_finish import reference
from nesterov_triton.ops.first_order_finish.reference import Finish
from nesterov_triton.tableaus import Tableau

__all__ = ["Finish", "first_order_finish"]


def first_order_finish(
    y: Tensor, slopes: Sequence[Tensor], dt: Tensor, rtol: Tensor, atol: Tensor, tableau: Tableau
) -> Finish:
    """The step's end and the norm of its embedded error.

    The norm is that of `stepping.explicit_rk.error_norm`, in a fixed order of summation; it is NaN where the new state
    or the last slope is not finite (a finite error over an infinite size would count as 0). For a fixed-step method it
    is 0 or NaN.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device Triton kernels, two launches;
    elsewhere the torch reference.

    Args:
        y: y_n, D elements, float16, bfloat16, float32 or float64. Contiguous, like all rows.
        slopes: the field's output at every stage, D elements of y's dtype each.
        dt, rtol, atol: one element each, float32 or float64; the tolerances are not looked at in fixed-step methods.
        tableau: the method.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    if len(slopes) != tableau.stages:
        raise ValueError(f"finish of {tableau.name} with {len(slopes)} slopes, expected {tableau.stages}")
    dispatch.check_rows(y, y.numel(), y=y, slopes=slopes)
    dispatch.check_scalars(y, dt=dt, rtol=rtol, atol=atol)
    tensors = y, slopes, dt, rtol, atol
    if dispatch.as_operator():
        new, error = _operator(*tensors, dispatch.method_name(tableau))
        return Finish(None if tableau.fsal else new, error)
    run: Callable[..., Finish] = _kernel() if y.is_cuda else reference.first_order_finish
    return run(*tensors, tableau)


def _kernel() -> Callable[..., Finish]:
    if not dispatch.has_triton():
        return reference.first_order_finish
    from nesterov_triton.ops.first_order_finish import kernel

    return kernel.launch


def _run(implementation: Callable[..., Finish], *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, method = args
    new, error = implementation(*tensors, tableaus.get(method))
    return error.new_empty(0, dtype=tensors[0].dtype) if new is None else new, error


# (y, error) as in `Finish`, y without elements where that has None.
@torch.library.custom_op(
    "nesterov_triton::first_order_finish",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor y, Tensor[] slopes, Tensor dt, Tensor rtol, Tensor atol, str method) -> (Tensor, Tensor)",
)
def _operator(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(reference.first_order_finish, *args)


@_operator.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(_kernel(), *args)


@_operator.register_fake
def _(y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    fsal = tableaus.get(args[-1]).fsal
    return y.new_empty(0 if fsal else y.numel()), y.new_empty((), dtype=torch.float64)
