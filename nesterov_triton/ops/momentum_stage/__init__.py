"""One stage of a momentum system: from the field's output to the next stage's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_stage import reference
from nesterov_triton.ops.momentum_stage.reference import Stage
from nesterov_triton.tableaus import Tableau

__all__ = ["Stage", "momentum_stage"]


def momentum_stage(
    u: Tensor | None,
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stage: int,
    gate_x: Gate,
    gate_f: Gate,
    momentum: bool = False,
) -> Stage:
    """dm_i = s σ_f(u) + q x_i - γ m_i, and from it the next stage's h = κ (x_n + dt Σ_j a_j σ_x(m_j)).

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        u: f(t_i, h_i), N elements; None where `slopes` already has dm_i.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm_0 … dm_{i-1}, and dm_i where `u` is None; N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage of the method, [stages, 4] float32 or float64.
        dt: the step size, one element, float32 or float64.
        tableau, stage: the method and i, 0 ≤ i ≤ stages - 2.
        gate_x, gate_f: σ_x and σ_f.
        momentum: whether the next stage's m is wanted too.

    Raises:
        ValueError: sizes, dtypes, devices or the stage don't fit, or a row is not contiguous.
    """
    n = z.numel() // 2
    known = stage + (u is None)
    if not 0 <= stage <= tableau.stages - 2 or len(slopes) != known:
        raise ValueError(f"stage {stage} of {tableau.name} with {len(slopes)} slopes, expected {known}")
    dispatch.check_rows(z, 2 * n, z=z)
    dispatch.check_rows(z, n, u=u, slopes=slopes)
    dispatch.check_scalars(z, coefficients=coefficients, dt=dt)
    if coefficients.shape != (tableau.stages, 4):
        raise ValueError(f"coefficients must have shape {(tableau.stages, 4)}, got {tuple(coefficients.shape)}")
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.momentum_stage(u, z, slopes, coefficients, dt, tableau, stage, gate_x, gate_f, momentum)
    if dispatch.as_operator():
        h, slope, m = _operator(
            u, z, slopes, coefficients, dt, dispatch.method_name(tableau), stage, *form_x, *form_f, momentum
        )
        return Stage(h, None if u is None else slope, m if momentum else None)
    run: Callable[..., Stage] = _kernel() if z.is_cuda else reference.momentum_stage
    return run(u, z, slopes, coefficients, dt, tableau, stage, gate_x, gate_f, momentum)


def _kernel() -> Callable[..., Stage]:
    if not dispatch.has_triton():
        return reference.momentum_stage
    from nesterov_triton.ops.momentum_stage import kernel

    return kernel.launch


def _run(implementation: Callable[..., Stage], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, method, stage, gate_x, bound_x, gate_f, bound_f, momentum = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    h, slope, m = implementation(*tensors, tableaus.get(method), stage, *gates, momentum)
    return h, h.new_empty(0) if slope is None else slope, h.new_empty(0) if m is None else m


# (h, slope, m) as in `Stage`, without elements where that has None.
@torch.library.custom_op(
    "nesterov_triton::momentum_stage",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor? u, Tensor z, Tensor[] slopes, Tensor coefficients, Tensor dt, str method, int stage, str gate_x, "
    "float bound_x, str gate_f, float bound_f, bool momentum) -> (Tensor, Tensor, Tensor)",
)
def _operator(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _run(reference.momentum_stage, *args)


@_operator.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _run(_kernel(), *args)


@_operator.register_fake
def _(u: Tensor | None, z: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n = z.numel() // 2
    return z.new_empty(n), z.new_empty(0 if u is None else n), z.new_empty(n if args[-1] else 0)
