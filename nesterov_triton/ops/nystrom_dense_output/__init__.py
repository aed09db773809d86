"""The states at requested times inside a step by the methods of `nesterov_triton.nystrom`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nesterov_triton.gates import Gate, Identity, kernel_form, of_form
from nesterov_triton.ops import dispatch
from nesterov_triton.ops.nystrom_dense_output import reference

__all__ = ["nystrom_dense_output"]


def nystrom_dense_output(
    z: Tensor, force: Tensor, end: Tensor, end_force: Tensor, weights: Tensor, gate_x: Gate
) -> Tensor:
    """The states for these weights of what is known at the ends of a step, one for each requested time, [T, 2 N].

    Not differentiable: under autograd it raises in the backward pass. On a CUDA device a Triton kernel, one launch;
    elsewhere, and for a gate that has no Triton form, the torch reference.

    Args:
        z, end: (x, m) at the step's start and at its end, [2 N], float16, bfloat16, float32 or float64; other rows have
            their dtype. Contiguous, like all rows.
        force, end_force: the forces there, N elements each.
        weights: as `ops.nystrom.dense_weights`, [T, 2, 8] with a gate, [T, 2, 6] without, float32 or float64; T may
            be 0.
        gate_x: σ_x.

    Raises:
        ValueError: sizes, dtypes or devices don't fit, or a row is not contiguous.
    """
    n, width = z.numel() // 2, 6 if isinstance(gate_x, Identity) else 8
    dispatch.check_rows(z, 2 * n, z=z, end=end)
    dispatch.check_rows(z, n, force=force, end_force=end_force)
    dispatch.check_scalars(z, weights=weights)
    if weights.ndim != 3 or weights.shape[1:] != (2, width):
        raise ValueError(f"weights must have shape (times, 2, {width}), got {tuple(weights.shape)}")
    tensors, form = (z, force, end, end_force, weights), kernel_form(gate_x)
    if form is None:
        return reference.nystrom_dense_output(*tensors, gate_x)
    if dispatch.as_operator():
        found: Tensor = _operator(*tensors, *form)
        return found
    run: Callable[..., Tensor] = dispatch.implementation("nystrom_dense_output", z)
    return run(*tensors, gate_x)


def _run(*args: Any) -> Tensor:
    *tensors, gate_x, bound_x = args
    run: Callable[..., Tensor] = dispatch.implementation("nystrom_dense_output", tensors[0])
    return run(*tensors, of_form(gate_x, bound_x))


def _fake(z: Tensor, force: Tensor, end: Tensor, end_force: Tensor, weights: Tensor, *form: Any) -> Tensor:
    return z.new_empty((weights.shape[0], z.numel()))


_operator = dispatch.operator(
    "nystrom_dense_output",
    "(Tensor z, Tensor force, Tensor end, Tensor end_force, Tensor weights, str gate_x, float bound_x) -> Tensor",
    _run,
    _fake,
)
