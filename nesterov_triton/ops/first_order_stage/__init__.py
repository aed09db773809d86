"""One stage of a first-order system: from the field's outputs to its next argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.ops import dispatch
from nesterov_triton.tableaus import Tableau

__all__ = ["first_order_stage"]


def first_order_stage(
    y: Tensor, slopes: Sequence[Tensor], dt: Tensor, tableau: Tableau, stage: int, through: Sequence[Tensor] = ()
) -> Tensor:
    """The state y_n + dt Σ_j a_j k_j, [D], at which the field is evaluated next.

    With `through` the state and its adjoint a, da/dt = -(∂f/∂y)ᵀ a, together: from (y_n, a_n) the pair
    (y_n + dt Σ_j a_j k_j, a_n - dt Σ_j a_j v_j), [2 D].

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere the torch reference.

    Args:
        y: y_n, D elements, or (y_n, a_n), 2 D elements; float16, bfloat16, float32 or float64. Contiguous, like all
            rows.
        slopes: k_0 … k_stage, the field's outputs, D elements of y's dtype each. They are read again at later stages:
            what a field will overwrite must be copied first.
        dt: the step size, one element, float32 or float64.
        tableau, stage: the method and the stage just evaluated. The extra stages for dense output follow upon the
            others.
        through: v_0 … v_stage, v_j = (∂f/∂y)ᵀ a_j at stage j, D elements each; none for the state alone.

    Raises:
        ValueError: sizes, dtypes, devices or the stage don't fit, or a row is not contiguous.
    """
    if not 0 <= stage <= len(tableau.all_a) - 2 or len(slopes) != stage + 1:
        raise ValueError(f"stage {stage} of {tableau.name} with {len(slopes)} slopes, expected {stage + 1}")
    if through and len(through) != len(slopes):
        raise ValueError(f"through must have as many rows as slopes, {len(slopes)}, or none; got {len(through)}")
    n = y.numel() // 2 if through else y.numel()
    dispatch.check_rows(y, 2 * n if through else n, y=y)
    dispatch.check_rows(y, n, slopes=slopes, through=through)
    dispatch.check_scalars(y, dt=dt)
    if dispatch.as_operator():
        found: Tensor = _operator(y, slopes, dt, dispatch.method_name(tableau), stage, through)
        return found
    run: Callable[..., Tensor] = dispatch.implementation("first_order_stage", y)
    return run(y, slopes, dt, tableau, stage, through)


def _run(y: Tensor, slopes: Sequence[Tensor], dt: Tensor, method: str, stage: int, through: Sequence[Tensor]) -> Tensor:
    run: Callable[..., Tensor] = dispatch.implementation("first_order_stage", y)
    return run(y, slopes, dt, tableaus.get(method), stage, through)


def _fake(y: Tensor, *args: Any) -> Tensor:
    return y.new_empty(y.numel())


_operator = dispatch.operator(
    "first_order_stage",
    "(Tensor y, Tensor[] slopes, Tensor dt, str method, int stage, Tensor[] through) -> Tensor",
    _run,
    _fake,
)
