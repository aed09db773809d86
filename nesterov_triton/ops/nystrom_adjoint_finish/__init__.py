"""The end of a step of the continuous adjoint by the methods of `nesterov_triton.nystrom`: new state, its force, new
adjoint, the embedded error's norm and the quadratures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import nystrom
from nesterov_triton.gates import Gate, Identity, kernel_form, of_form
from nesterov_triton.nystrom import POINTS, Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom import check_weights
from nesterov_triton.ops.nystrom_adjoint_finish import reference
from nesterov_triton.ops.nystrom_adjoint_finish.reference import AdjointFinish

__all__ = ["AdjointFinish", "nystrom_adjoint_finish"]


def nystrom_adjoint_finish(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    adaptive: bool = True,
    quadratures: bool = False,
    dense: Tensor | None = None,
) -> AdjointFinish:
    """The step's end (x, m) and (a_x, a_m), the force there, and the norm of its embedded error over all four.

    The norm is as that of `ops.nystrom_finish`. The quadratures are what the step adds to the gradients of the
    residual's and the damping's coefficient, in a fixed order of summation: the integral of ⟨h, a_m⟩ by the method's
    weights, and that of ⟨m, a_m⟩, which no stage knows, by dense output at `nystrom.POINTS`.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device Triton kernels, two launches;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        output: the field's output at the last stage, N elements.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        forces: those of all stages before, N elements each.
        adjoint: (a_x, a_m) at the step's start, [2 N].
        through: v = (∂f/∂h)ᵀ g of all stages, N elements each; see `ops.nystrom_adjoint_stage`.
        coefficients: rows (κ, s, q, -γ), one for each stage, [stages, 4] or more, float32 or float64.
        weights: the step's with its growth, as `ops.nystrom.step_weights`, float32 or float64.
        dt, rtol, atol: one element each, float32 or float64; the step size is looked at for the quadratures alone, the
            tolerances not for fixed steps.
        method: the method.
        gate_x, gate_f: σ_x and σ_f.
        adaptive: whether the error is wanted; not for fixed steps.
        quadratures: whether they are wanted.
        dense: for that of ⟨m, a_m⟩, as `ops.nystrom.dense_weights` at `nystrom.POINTS`, [3, 2, 8], or [3, 2, 6] where
            σ_x is the identity, float32 or float64; without, it is 0.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    n, stages, gated = z.numel() // 2, method.stages, not isinstance(gate_x, Identity)
    if len(forces) != stages - 1 or len(through) != stages:
        raise ValueError(
            f"{len(forces)} forces, an output and {len(through)} through for {method.name}, which has {stages} stages"
        )
    dispatch.check_rows(z, 2 * n, z=z, adjoint=adjoint)
    dispatch.check_rows(z, n, output=output, forces=forces, through=through)
    dispatch.check_scalars(z, dt=dt, rtol=rtol, atol=atol)
    dispatch.check_coefficients(z, coefficients, stages)
    check_weights(z, weights, method, gated, growth=True)
    if dense is not None:
        dispatch.check_scalars(z, dense=dense)
        if dense.shape != (shape := (len(POINTS), 2, 8 if gated else 6)):
            raise ValueError(f"dense must have shape {shape}, got {tuple(dense.shape)}")
    tensors = output, z, forces, adjoint, through, coefficients, weights, dt, rtol, atol
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.nystrom_adjoint_finish(*tensors, method, gate_x, gate_f, adaptive, quadratures, dense)
    if dispatch.as_operator():
        name = dispatch.method_name(method)
        new, force, error, sums = _operator(*tensors, name, *form_x, *form_f, adaptive, quadratures, dense)
        return AdjointFinish(new, force, error, sums if quadratures else None)
    run: Callable[..., AdjointFinish] = dispatch.implementation("nystrom_adjoint_finish", z)
    return run(*tensors, method, gate_x, gate_f, adaptive, quadratures, dense)


def _run(output: Tensor, z: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, adaptive, quadratures, dense = args
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    run = dispatch.implementation("nystrom_adjoint_finish", z)
    found = run(output, z, *tensors, nystrom.METHODS[method], *gates, adaptive, quadratures, dense)
    new, force, error, sums = found
    return new, force, error, z.new_empty(0, dtype=torch.float64) if sums is None else sums


def _fake(output: Tensor, z: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, quadratures, _ = args
    error, sums = (z.new_empty(shape, dtype=torch.float64) for shape in ((), 2 if quadratures else 0))
    return z.new_empty(2 * z.numel()), z.new_empty(z.numel() // 2), error, sums


# As in `AdjointFinish`, the last without elements where that has None.
_operator = dispatch.operator(
    "nystrom_adjoint_finish",
    "(Tensor output, Tensor z, Tensor[] forces, Tensor adjoint, Tensor[] through, Tensor coefficients, Tensor weights, "
    "Tensor dt, Tensor rtol, Tensor atol, str method, str gate_x, float bound_x, str gate_f, float bound_f, "
    "bool adaptive, bool quadratures, Tensor? dense) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
