"""The end of a first-order step: new state, embedded error and its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.first_order_finish.reference import Finish
from nesterov_triton.tableaus import Tableau

__all__ = ["Finish", "first_order_finish"]


def first_order_finish(
    y: Tensor,
    slopes: Sequence[Tensor],
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    through: Sequence[Tensor] = (),
) -> Finish:
    """The step's end and the norm of its embedded error; with `through`, of the state and its adjoint together, as in
    `first_order_stage`.

    The norm is that of `stepping.explicit_rk.error_norm`, in a fixed order of summation. It is NaN where the last slope
    is not finite or anything new is NaN; over an infinite size an error counts as 0, so a solve must look at its end.
    For a fixed-step method it is 0, or NaN where anything new is not finite.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device Triton kernels, two launches;
    elsewhere the torch reference.

    Args:
        y: y_n, D elements, or (y_n, a_n), 2 D elements; float16, bfloat16, float32 or float64. Contiguous, like all
            rows.
        slopes: the field's output at every stage, D elements of y's dtype each.
        dt, rtol, atol: one element each, float32 or float64; the tolerances are not looked at in fixed-step methods.
        tableau: the method.
        through: v_j = (∂f/∂y)ᵀ a_j at every stage, D elements each; none for the state alone.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    if len(slopes) != tableau.stages:
        raise ValueError(f"finish of {tableau.name} with {len(slopes)} slopes, expected {tableau.stages}")
    if through and len(through) != len(slopes):
        raise ValueError(f"through must have as many rows as slopes, {len(slopes)}, or none; got {len(through)}")
    n = y.numel() // 2 if through else y.numel()
    dispatch.check_rows(y, 2 * n if through else n, y=y)
    dispatch.check_rows(y, n, slopes=slopes, through=through)
    dispatch.check_scalars(y, dt=dt, rtol=rtol, atol=atol)
    tensors = y, slopes, dt, rtol, atol
    if dispatch.as_operator():
        new, error = _operator(*tensors, dispatch.method_name(tableau), through)
        return Finish(None if tableau.fsal else new, error)
    run: Callable[..., Finish] = dispatch.implementation("first_order_finish", y)
    return run(*tensors, tableau, through)


def _run(y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, method, through = args
    run: Callable[..., Finish] = dispatch.implementation("first_order_finish", y)
    new, error = run(y, *tensors, tableaus.get(method), through)
    return y.new_empty(0) if new is None else new, error


def _fake(y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    fsal = tableaus.get(args[-2]).fsal
    return y.new_empty(0 if fsal else y.numel()), y.new_empty((), dtype=torch.float64)


# (y, error) as in `Finish`, y without elements where that has None.
_operator = dispatch.operator(
    "first_order_finish",
    "(Tensor y, Tensor[] slopes, Tensor dt, Tensor rtol, Tensor atol, str method, Tensor[] through) -> "
    "(Tensor, Tensor)",
    _run,
    _fake,
)
