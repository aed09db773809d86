"""The states of a momentum system at requested times inside a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nesterov_triton import tableaus
from nesterov_triton.gates import Gate, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.momentum_dense_output import reference
from nesterov_triton.tableaus import Tableau

__all__ = ["momentum_dense_output"]


def momentum_dense_output(
    z: Tensor, slopes: Sequence[Tensor], weights: Tensor, dt: Tensor, tableau: Tableau, gate_x: Gate
) -> Tensor:
    """(x_n, m_n) + dt Σ_i weights[k, i] (σ_x(m_i), dm_i) for every requested time, [T, 2 N].

    m_i = m_n + dt Σ_j a_ij dm_j is computed again; every slope is read once, whatever T is.

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for a gate that has no Triton form, the torch reference.

    Args:
        z: (x_n, m_n), [2 N], float16, bfloat16, float32 or float64; other rows have its dtype. Contiguous, like all
            rows.
        slopes: dm_i of all stages that the method's interpolant needs, the extra ones included, N elements each.
        weights: b_i(θ_k) of the interpolant, [T, stages], float32 or float64; T may be 0.
        dt: the step size, one element, float32 or float64.
        tableau: the method. Slopes that its interpolant has no weight for, and that no m_i of the others contains,
            are not read.
        gate_x: σ_x.

    Raises:
        ValueError: sizes, dtypes, devices or the number of stages don't fit, or a row is not contiguous.
    """
    n = z.numel() // 2
    if len(slopes) != len(tableau.interpolant):
        raise ValueError(
            f"dense output of {tableau.name} with {len(slopes)} slopes, expected {len(tableau.interpolant)}"
        )
    dispatch.check_rows(z, 2 * n, z=z)
    dispatch.check_rows(z, n, slopes=slopes)
    dispatch.check_scalars(z, dt=dt, weights=weights)
    if weights.ndim != 2 or weights.shape[1] != len(slopes):
        raise ValueError(f"weights must have shape (times, {len(slopes)}), got {tuple(weights.shape)}")
    form = kernel_form(gate_x)
    if form is None:
        return reference.momentum_dense_output(z, slopes, weights, dt, tableau, gate_x)
    if dispatch.as_operator():
        found: Tensor = _operator(z, slopes, weights, dt, dispatch.method_name(tableau), *form)
        return found
    run: Callable[..., Tensor] = dispatch.implementation("momentum_dense_output", z)
    return run(z, slopes, weights, dt, tableau, gate_x)


def _run(
    z: Tensor, slopes: Sequence[Tensor], weights: Tensor, dt: Tensor, method: str, gate_x: str, bound_x: float
) -> Tensor:
    run: Callable[..., Tensor] = dispatch.implementation("momentum_dense_output", z)
    return run(z, slopes, weights, dt, tableaus.get(method), of_form(gate_x, bound_x))


def _fake(z: Tensor, slopes: Sequence[Tensor], weights: Tensor, *args: Any) -> Tensor:
    return z.new_empty((weights.shape[0], z.numel()))


_operator = dispatch.operator(
    "momentum_dense_output",
    "(Tensor z, Tensor[] slopes, Tensor weights, Tensor dt, str method, str gate_x, float bound_x) -> Tensor",
    _run,
    _fake,
)
