"""The start of a momentum step, where the discrete reverse sweep over it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_reverse_finish import reference
from nesterov_triton.ops.momentum_reverse_finish.reference import ReverseFinish
from nesterov_triton.tableaus import Tableau

__all__ = ["ReverseFinish", "momentum_reverse_finish"]


def momentum_reverse_finish(
    z: Tensor,
    slopes: Sequence[Tensor],
    cotangent: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stages: int,
    gate_x: Gate,
    gate_f: Gate,
    quadratures: bool = False,
    seeds: Sequence[Tensor] = (),
    through_m: Sequence[Tensor] = (),
) -> ReverseFinish:
    """The cotangent λ + Σ_i c_i of the step's start; λ, c_i and K_i as in `ops.momentum_reverse_stage`.

    The quadratures are Σ_i ⟨h_i, K_m,i⟩ and Σ_i ⟨m_i, K_m,i⟩, summed in a fixed order: what the step adds to the
    gradients of the residual's and the damping's coefficient.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch, and
    one more for the quadratures; elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm_0 … dm_{stages - 2}, N elements each.
        cotangent: λ = (λ_x, λ_m), [2 N].
        through: v of all stages, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage, [stages, 4] or more, float32 or float64.
        dt: the step size, one element, float32 or float64.
        tableau: the method; its extra stages for dense output follow upon the others.
        stages: how many of them were evaluated.
        gate_x, gate_f: σ_x and σ_f.
        quadratures: whether they are wanted.
        seeds: [2 N] for each of the stages, as in `ops.momentum_reverse_stage`; or none.
        through_m: w of all stages, N elements each; none where the field does not see m.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    n = z.numel() // 2
    if not 1 <= stages <= len(tableau.all_a):
        raise ValueError(f"{stages} stages of {tableau.name}, which has {len(tableau.all_a)}")
    if len(slopes) != stages - 1 or len(through) != stages:
        raise ValueError(
            f"{len(slopes)} slopes and {len(through)} through with {stages} stages, expected {stages - 1} and {stages}"
        )
    if len(seeds) not in (0, stages) or len(through_m) not in (0, stages):
        raise ValueError(f"{len(seeds)} seeds and {len(through_m)} through_m with {stages} stages")
    dispatch.check_rows(z, 2 * n, z=z, cotangent=cotangent, seeds=seeds)
    dispatch.check_rows(z, n, slopes=slopes, through=through, through_m=through_m)
    dispatch.check_scalars(z, dt=dt)
    dispatch.check_coefficients(z, coefficients, stages)
    tensors = z, slopes, cotangent, through, coefficients, dt
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.momentum_reverse_finish(
            *tensors, tableau, stages, gate_x, gate_f, quadratures, seeds, through_m
        )
    if dispatch.as_operator():
        start, sums = _operator(
            *tensors, dispatch.method_name(tableau), stages, *form_x, *form_f, quadratures, seeds, through_m
        )
        return ReverseFinish(start, sums if quadratures else None)
    run: Callable[..., ReverseFinish] = dispatch.implementation("momentum_reverse_finish", z)
    return run(*tensors, tableau, stages, gate_x, gate_f, quadratures, seeds, through_m)


def _run(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, method, stages, gate_x, bound_x, gate_f, bound_f, quadratures, seeds, through_m = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("momentum_reverse_finish", z)
    start, sums = run(z, *tensors, tableaus.get(method), stages, *gates, quadratures, seeds, through_m)
    return start, z.new_empty(0, dtype=torch.float64) if sums is None else sums


def _fake(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *_, quadratures, _, _ = args
    return z.new_empty(z.numel()), z.new_empty(2 if quadratures else 0, dtype=torch.float64)


# (cotangent, quadratures) as in `ReverseFinish`, the last without elements where that has None.
_operator = dispatch.operator(
    "momentum_reverse_finish",
    "(Tensor z, Tensor[] slopes, Tensor cotangent, Tensor[] through, Tensor coefficients, Tensor dt, str method, "
    "int stages, str gate_x, float bound_x, str gate_f, float bound_f, bool quadratures, Tensor[] seeds, "
    "Tensor[] through_m) -> (Tensor, Tensor)",
    _run,
    _fake,
)
