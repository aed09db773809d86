"""The states of a first-order system at requested times inside a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.ops import dispatch
from nesterov_triton.tableaus import Tableau

__all__ = ["first_order_dense_output"]


def first_order_dense_output(
    y: Tensor, slopes: Sequence[Tensor], weights: Tensor, dt: Tensor, tableau: Tableau | None = None
) -> Tensor:
    """y_n + dt Σ_i weights[k, i] k_i for every requested time, [T, D]; every slope is read once, whatever T is.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere the torch reference.

    Args:
        y: y_n, D elements, float16, bfloat16, float32 or float64. Contiguous, like all rows.
        slopes: k_0, k_1, …, those of the extra stages included, D elements of y's dtype each.
        weights: b_i(θ_k) of the method's interpolant, [T, stages], float32 or float64; T may be 0.
        dt: the step size, one element, float32 or float64.
        tableau: the method, where slopes that its interpolant has no weight for need not be read.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    if tableau is not None and len(slopes) != len(tableau.interpolant):
        raise ValueError(
            f"dense output of {tableau.name} with {len(slopes)} slopes, expected {len(tableau.interpolant)}"
        )
    dispatch.check_rows(y, y.numel(), y=y, slopes=slopes)
    dispatch.check_scalars(y, dt=dt, weights=weights)
    if weights.ndim != 2 or weights.shape[1] != len(slopes):
        raise ValueError(f"weights must have shape (times, {len(slopes)}), got {tuple(weights.shape)}")
    if dispatch.as_operator():
        method = None if tableau is None else dispatch.method_name(tableau)
        found: Tensor = _operator(y, slopes, weights, dt, method)
        return found
    run: Callable[..., Tensor] = dispatch.implementation("first_order_dense_output", y)
    return run(y, slopes, weights, dt, tableau)


def _run(y: Tensor, slopes: Sequence[Tensor], weights: Tensor, dt: Tensor, method: str | None) -> Tensor:
    run: Callable[..., Tensor] = dispatch.implementation("first_order_dense_output", y)
    return run(y, slopes, weights, dt, None if method is None else tableaus.get(method))


def _fake(y: Tensor, slopes: Sequence[Tensor], weights: Tensor, *args: Any) -> Tensor:
    return y.new_empty((weights.shape[0], y.numel()))


_operator = dispatch.operator(
    "first_order_dense_output",
    "(Tensor y, Tensor[] slopes, Tensor weights, Tensor dt, str? method) -> Tensor",
    _run,
    _fake,
)
