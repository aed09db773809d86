"""The end of a momentum step: new state, embedded error and its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_finish import reference
from nesterov_triton.ops.momentum_finish.reference import Finish
from nesterov_triton.tableaus import Tableau

__all__ = ["Finish", "momentum_finish"]


def momentum_finish(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    keep: int = 1,
) -> Finish:
    """The step's last slopes, its end (x, m), and the norm of its embedded error over all of (x, m).

    The norm is that of `stepping.explicit_rk.error_norm`, in a fixed order of summation. It is NaN where the last slope
    is not finite or anything new is NaN; over an infinite size an error counts as 0, so a solve must look at its end.
    For a fixed-step method it is 0, or NaN where anything new is not finite.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device Triton kernels, two launches;
    elsewhere, and for gates that have no Triton form, the torch reference.

    Args:
        outputs: the field's outputs at the last one or two stages, N elements each.
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm of all stages before, N elements each.
        coefficients: rows (κ, s, q, -γ), one for each stage of the method, [stages, 4] or more, float32 or float64.
        dt, rtol, atol: one element each, float32 or float64; the tolerances are not looked at in fixed-step methods.
        tableau: the method.
        gate_x, gate_f: σ_x and σ_f.
        keep: how many of the outputs' slopes are wanted, counted from the last: with FSAL that is the next step's
            first, and dense output needs all.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    n = z.numel() // 2
    count = len(slopes) + len(outputs)
    if count != tableau.stages or not outputs:
        raise ValueError(f"{len(slopes)} slopes and {len(outputs)} outputs for {tableau.name}: {tableau.stages} stages")
    if not 0 <= keep <= len(outputs):
        raise ValueError(f"keep must lie in 0..{len(outputs)}, the number of outputs, got {keep}")
    dispatch.check_rows(z, 2 * n, z=z)
    dispatch.check_rows(z, n, outputs=outputs, slopes=slopes)
    dispatch.check_scalars(z, dt=dt, rtol=rtol, atol=atol)
    dispatch.check_coefficients(z, coefficients, tableau.stages)
    tensors = outputs, z, slopes, coefficients, dt, rtol, atol
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        return reference.momentum_finish(*tensors, tableau, gate_x, gate_f, keep)
    if dispatch.as_operator():
        new, kept, error = _operator(*tensors, dispatch.method_name(tableau), *form_x, *form_f, keep)
        return Finish(new, kept, error)
    run: Callable[..., Finish] = dispatch.implementation("momentum_finish", z)
    return run(*tensors, tableau, gate_x, gate_f, keep)


def _run(outputs: Sequence[Tensor], z: Tensor, *args: Any) -> Finish:
    *tensors, method, gate_x, bound_x, gate_f, bound_f, keep = args
    run: Callable[..., Finish] = dispatch.implementation("momentum_finish", z)
    gates = of_form(gate_x, bound_x), of_form(gate_f, bound_f)
    return run(outputs, z, *tensors, tableaus.get(method), *gates, keep)


def _fake(outputs: Sequence[Tensor], z: Tensor, *args: Any) -> Finish:
    kept = [z.new_empty(z.numel() // 2) for _ in range(args[-1])]
    return Finish(torch.empty_like(z), kept, z.new_empty((), dtype=torch.float64))


_operator = dispatch.operator(
    "momentum_finish",
    "(Tensor[] outputs, Tensor z, Tensor[] slopes, Tensor coefficients, Tensor dt, Tensor rtol, Tensor atol, "
    "str method, str gate_x, float bound_x, str gate_f, float bound_f, int keep) -> (Tensor, Tensor[], Tensor)",
    _run,
    _fake,
)
