"""Torch reference of the Runge-Kutta arithmetic. D is the number of elements of the whole state."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(z: Tensor, stages: Tensor, weights: Tensor) -> Tensor:
    """z + Σ_j weights_j k_j, [D].

    Args:
        z: the state, [D].
        stages: k_j as columns, [D, j]: the transpose of stage-major storage, so that one matrix-vector product streams
            over contiguous stages.
        weights: dt a_ij, [j].
    """
    return torch.addmv(z, stages, weights)


def scaled_norms(errors: Tensor, size: Tensor, rtol: Tensor | float, atol: Tensor | float) -> Tensor:
    """Root mean squares of errors / (atol + rtol · size), [rows of errors], accumulated in at least float32.

    Args:
        errors: [n, D], overwritten.
        size: max(\\|z_n\\|, \\|z_{n+1}\\|), [D], overwritten.
        rtol, atol: numbers, or tensors that broadcast with [D].
    """
    errors.div_(size.mul_(rtol).add_(atol))
    wide = torch.float32 if errors.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(errors, dim=1, dtype=wide) / max(errors.shape[1], 1) ** 0.5
