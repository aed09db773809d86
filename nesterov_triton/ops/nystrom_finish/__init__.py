"""The end of a step by the methods of `nesterov_triton.nystrom`: new state, its force, the embedded error's norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import nystrom
from nesterov_triton.gates import Gate, Identity, kernel_form, of_form
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom import check_weights
from nesterov_triton.ops.nystrom_finish import reference
from nesterov_triton.ops.nystrom_finish.reference import Finish

__all__ = ["Finish", "nystrom_finish"]


def nystrom_finish(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    rtol: Tensor,
    atol: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    adaptive: bool = True,
) -> Finish:
    """The step's end (x, m), the force there, and the norm of its embedded error over all of (x, m).

    The norm is as that of `ops.momentum_finish`: NaN where the last force is not finite or anything new is NaN, and for
    fixed steps 0, or NaN where anything new is not finite.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device Triton kernels, two launches;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        output: the field's output at the last stage, N elements.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        forces: those of all stages before, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage, [stages, 4] or more, float32 or float64.
        weights: the step's, as `ops.nystrom.step_weights`, float32 or float64.
        rtol, atol: one element each, float32 or float64; for fixed steps not looked at.
        method: the method.
        gate_x, gate_f: σ_x and σ_f.
        adaptive: whether the error is wanted; not for fixed steps.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    n = z.numel() // 2
    if len(forces) != method.stages - 1:
        raise ValueError(f"{len(forces)} forces and an output for {method.name}, which has {method.stages} stages")
    dispatch.check_rows(z, 2 * n, z=z)
    dispatch.check_rows(z, n, output=output, forces=forces)
    dispatch.check_scalars(z, rtol=rtol, atol=atol)
    dispatch.check_coefficients(z, coefficients, method.stages)
    check_weights(z, weights, method, not isinstance(gate_x, Identity))
    tensors = output, z, forces, coefficients, weights, rtol, atol
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.nystrom_finish(*tensors, method, gate_x, gate_f, adaptive)
    if dispatch.as_operator():
        return Finish(*_operator(*tensors, dispatch.method_name(method), *form_x, *form_f, adaptive))
    run: Callable[..., Finish] = dispatch.implementation("nystrom_finish", z)
    return run(*tensors, method, gate_x, gate_f, adaptive)


def _run(output: Tensor, z: Tensor, *args: Any) -> Finish:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, adaptive = args
    run: Callable[..., Finish] = dispatch.implementation("nystrom_finish", z)
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    return run(output, z, *tensors, nystrom.METHODS[method], *gates, adaptive)


def _fake(output: Tensor, z: Tensor, *args: Any) -> Finish:
    return Finish(torch.empty_like(z), z.new_empty(z.numel() // 2), z.new_empty((), dtype=torch.float64))


_operator = dispatch.operator(
    "nystrom_finish",
    "(Tensor output, Tensor z, Tensor[] forces, Tensor coefficients, Tensor weights, Tensor rtol, Tensor atol, "
    "str method, str gate_x, float bound_x, str gate_f, float bound_f, bool adaptive) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
