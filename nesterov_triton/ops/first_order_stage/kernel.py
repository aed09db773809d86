"""Triton kernel: one stage of y' = f(t, y). The slopes are the field's outputs themselves, so nothing but the next
stage's y is written; rows whose coefficient is 0 are not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.ops.runge_kutta.kernel import combine, launch_shape, load_rows, start, used
from nesterov_triton.tableaus import Tableau


@triton.jit
def stage_kernel(
    y_ptr, slopes, dt_ptr, next_ptr, n,
    A: tl.constexpr, STAGE: tl.constexpr, USED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: y_{STAGE+1} = y_n + dt Σ_j A[STAGE+1][j] k_j.

    Args:
        y_ptr: y_n, [D].
        slopes: k_0 … k_I, [D] each.
        next_ptr: where y_{STAGE+1} goes, [D].
        USED: which slopes A[STAGE+1] has a coefficient for.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    y = tl.load(y_ptr + offsets, mask=mask).to(WIDE)
    rows = load_rows(slopes, offsets, mask, WIDE, USED)
    tl.store(next_ptr + offsets, combine(y, tl.load(dt_ptr).to(WIDE), rows, A, STAGE + 1), mask=mask)


def launch(y: Tensor, slopes: Sequence[Tensor], dt: Tensor, tableau: Tableau, stage: int) -> Tensor:
    """As `first_order_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    n = y.numel()
    out = torch.empty(n, dtype=y.dtype, device=y.device)
    if n:
        programs, block, options = launch_shape(n, y.dtype)
        start(
            stage_kernel, programs, y, tuple(slopes), dt, out, n,
            tableau.all_a, stage, used(tableau.all_a[stage + 1]),
            tl.float64 if y.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return out
