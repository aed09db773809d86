"""Torch reference of the Runge-Kutta arithmetic. D is the number of elements of the whole state."""

from __future__ import annotations

import torch
from torch import Tensor

from nesterov_triton.gates import constant


def combine(z: Tensor, stages: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """z + Σ_j weights_j k_j, [D], into `out` if given.

    Args:
        z: the state, [D].
        stages: k_j as columns, [D, j]: the transpose of stage-major storage, so that one matrix-vector product streams
            over contiguous stages.
        weights: dt a_ij, [j].
    """
    return torch.addmv(z, stages, weights, out=out)


def scaled_squares(errors: Tensor, size: Tensor, rtol: Tensor | float, atol: Tensor | float) -> Tensor:
    """Sums of squares of errors / (atol + rtol · size), [n], accumulated in at least float32.

    Args:
        errors: [n, D], overwritten.
        size: max(\\|z_n\\|, \\|z_{n+1}\\|), [D], overwritten.
        rtol, atol: numbers, or tensors that broadcast with [D].
    """
    if errors.dtype in (torch.float16, torch.bfloat16):  # before the division: 2 / 1e-5 is infinite in float16
        errors, size = errors.float(), size.float()
    if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
        scale = size.mul_(rtol).add_(atol)
    else:
        scale = torch.add(constant(atol, size.dtype), size, alpha=rtol, out=size)
    if isinstance(atol, float) and atol == 0:
        scale.clamp_min_(torch.finfo(scale.dtype).tiny)  # 0 / 0 is no error
    errors.div_(scale)
    if len(errors) == 1:  # half the time of a norm along a dimension
        return torch.mv(errors, errors[0])
    squares: Tensor = torch.linalg.vector_norm(errors, dim=1).square()
    return squares
