"""The end of a transposed first-order step: the cotangent of the state from which the step started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton.ops import dispatch

__all__ = ["first_order_reverse_finish"]


def first_order_reverse_finish(cotangent: Tensor, through: Sequence[Tensor]) -> Tensor:
    """λ + Σ_i v_i, [D]: every stage's state contains the one from which the step started.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere the torch reference.

    Args:
        cotangent: λ, of the state at the step's end, D elements, float16, bfloat16, float32 or float64. Contiguous,
            like all rows.
        through: v_0, v_1, … of `first_order_reverse_stage`, D elements of λ's dtype each.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    dispatch.check_rows(cotangent, cotangent.numel(), cotangent=cotangent, through=through)
    if dispatch.as_operator():
        found: Tensor = _operator(cotangent, through)
        return found
    return _run(cotangent, through)


def _run(cotangent: Tensor, through: Sequence[Tensor]) -> Tensor:
    run: Callable[..., Tensor] = dispatch.implementation("first_order_reverse_finish", cotangent)
    return run(cotangent, through)


def _fake(cotangent: Tensor, *args: Any) -> Tensor:
    return cotangent.new_empty(cotangent.numel())


_operator = dispatch.operator(
    "first_order_reverse_finish", "(Tensor cotangent, Tensor[] through) -> Tensor", _run, _fake
)
