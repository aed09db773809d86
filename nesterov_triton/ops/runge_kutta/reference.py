"""Torch reference of the Runge-Kutta arithmetic. D is the number of elements of the whole state."""

from __future__ import annotations

from collections.abc import Sequence

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


def weighted(rows: Sequence[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """Σ_j weights_j rows_j in the dtype of `like`, which also gives the shape where nothing is summed."""
    total = torch.zeros_like(like)
    for row, weight in zip(rows, weights, strict=False):
        if weight != 0:
            total = total + row.to(like.dtype) * weight
    return total


def finished_norm(
    errors: Sequence[Tensor],
    old: Tensor,
    new: Tensor,
    slope: Tensor,
    rtol: Tensor,
    atol: Tensor,
    wide: torch.dtype,
) -> Tensor:
    """The norm of a finished step, 0-d float64: what `stepping.error_norm` computes, and NaN where `slope` holds a
    value that is not finite, or `new` NaN (where there is no error: a value that is not finite).

    Args:
        errors: the embedded error rows, [D] each, in the dtype `wide`; none for a fixed-step method, whose norm is 0
            or NaN.
        old, new: the states at both ends of the step, [D], as stored.
        slope: the last stage's, as stored; an FSAL method goes on from it, and dopri8's error does not look at it.
        rtol, atol: 0-d.
    """
    fit = torch.where(torch.isfinite(slope).all(), 0.0, torch.nan).to(torch.float64)
    bad = torch.isnan(new) if errors else ~torch.isfinite(new)
    size = torch.maximum(old.abs(), new.abs()).to(wide)
    scale = (atol.to(wide) + rtol.to(wide) * size).clamp_min(torch.finfo(wide).tiny)
    squares = [((error / scale).masked_fill(bad, torch.nan) ** 2).sum(dtype=torch.float64) for error in errors]
    if not squares:
        return fit + torch.zeros_like(new, dtype=wide).masked_fill(bad, torch.nan).sum(dtype=torch.float64)
    mean = 1 / max(new.numel(), 1)
    if len(squares) == 1:
        return fit + torch.sqrt(squares[0] * mean)
    fifth, third = squares
    # Hairer, Nørsett, Wanner II.10: the fifth-order estimate, damped by the third-order one. Where that overflows it
    # must not damp, or the step would look perfect.
    damped = torch.where(fifth == 0, fifth, fifth * torch.sqrt(mean / (fifth + 0.01 * third)))
    return fit + torch.where(torch.isfinite(third), damped, third)
