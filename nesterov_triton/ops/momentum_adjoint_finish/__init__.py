"""The end of a step of a momentum system's continuous adjoint: new state, new adjoint, embedded error and its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_adjoint_finish import reference
from nesterov_triton.ops.momentum_adjoint_finish.reference import AdjointFinish
from nesterov_triton.tableaus import Tableau

__all__ = ["AdjointFinish", "momentum_adjoint_finish"]


def momentum_adjoint_finish(
    z: Tensor,
    slopes: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    quadratures: bool = False,
    through_m: Sequence[Tensor] = (),
) -> AdjointFinish:
    """The step's end (x, m) and (a_x, a_m), and the norm of its embedded error over all four.

    The norm is that of `stepping.explicit_rk.error_norm`, in a fixed order of summation. It is NaN where a last slope
    is not finite or anything new is NaN; over an infinite size an error counts as 0, so a solve must look at its end.
    For a fixed-step method it is 0, or NaN where anything new is not finite. The quadratures are dt Σ_i b_i times
    ⟨h_i, a_m,i⟩ and ⟨m_i, a_m,i⟩, summed in a fixed order too: what the step adds to the gradients of the residual's
    and the damping's coefficient.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device Triton kernels, two launches;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm of all stages, N elements each.
        adjoint: (a_x, a_m) at the step's start, [2 N].
        through: v = (∂f/∂h)ᵀ g of all stages, N elements each; see `ops.momentum_adjoint_stage`.
        coefficients: rows (κ, s, q, -γ), one for each stage of the method, [stages, 4] or more, float32 or float64.
        dt, rtol, atol: one element each, float32 or float64; the tolerances are not looked at in fixed-step methods.
        tableau: the method.
        gate_x, gate_f: σ_x and σ_f.
        quadratures: whether they are wanted.
        through_m: w = (∂f/∂m)ᵀ g of all stages, N elements each; none where the field does not see m.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    n, stages = z.numel() // 2, tableau.stages
    if len(slopes) != stages or len(through) != stages or len(through_m) not in (0, stages):
        raise ValueError(
            f"{len(slopes)} slopes, {len(through)} through and {len(through_m)} through_m for {tableau.name}: "
            f"{stages} stages"
        )
    dispatch.check_rows(z, 2 * n, z=z, adjoint=adjoint)
    dispatch.check_rows(z, n, slopes=slopes, through=through, through_m=through_m)
    dispatch.check_scalars(z, dt=dt, rtol=rtol, atol=atol)
    dispatch.check_coefficients(z, coefficients, stages)
    tensors = z, slopes, adjoint, through, coefficients, dt, rtol, atol
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.momentum_adjoint_finish(*tensors, tableau, gate_x, gate_f, quadratures, through_m)
    if dispatch.as_operator():
        new, error, sums = _operator(*tensors, dispatch.method_name(tableau), *form_x, *form_f, quadratures, through_m)
        return AdjointFinish(new, error, sums if quadratures else None)
    run: Callable[..., AdjointFinish] = dispatch.implementation("momentum_adjoint_finish", z)
    return run(*tensors, tableau, gate_x, gate_f, quadratures, through_m)


def _run(z: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, quadratures, through_m = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("momentum_adjoint_finish", z)
    new, error, sums = run(z, *tensors, tableaus.get(method), *gates, quadratures, through_m)
    return new, error, z.new_empty(0, dtype=torch.float64) if sums is None else sums


def _fake(z: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, quadratures, _ = args
    error, sums = (z.new_empty(shape, dtype=torch.float64) for shape in ((), 2 if quadratures else 0))
    return z.new_empty(2 * z.numel()), error, sums


# (state, error, quadratures) as in `AdjointFinish`, the last without elements where that has None.
_operator = dispatch.operator(
    "momentum_adjoint_finish",
    "(Tensor z, Tensor[] slopes, Tensor adjoint, Tensor[] through, Tensor coefficients, Tensor dt, Tensor rtol, "
    "Tensor atol, str method, str gate_x, float bound_x, str gate_f, float bound_f, bool quadratures, "
    "Tensor[] through_m) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
