"""Triton kernel: one stage of y' = f(t, y), alone or together with its adjoint. The slopes are the field's outputs
themselves, so nothing but the next stage's state is written; rows whose coefficient is 0 are not read."""

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
    y_ptr, slopes, through, dt_ptr, next_ptr, n,
    A: tl.constexpr, STAGE: tl.constexpr, USED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: y_{STAGE+1} = y_n + dt Σ_j A[STAGE+1][j] k_j, and a_{STAGE+1} = a_n - dt Σ_j A[STAGE+1][j] v_j.

    Args:
        y_ptr: y_n, [D], or (y_n, a_n), [2 D].
        slopes: k_0 … k_STAGE, [D] each.
        through: v_0 … v_STAGE, [D] each; none for y alone.
        next_ptr: where the state of the next stage goes, of the size of y_ptr.
        n: D.
        USED: which slopes A[STAGE+1] has a coefficient for.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    y = tl.load(y_ptr + offsets, mask=mask).to(WIDE)
    rows = load_rows(slopes, offsets, mask, WIDE, USED)
    tl.store(next_ptr + offsets, combine(y, dt, rows, A, STAGE + 1), mask=mask)
    if len(through) > 0:
        a = tl.load(y_ptr + n + offsets, mask=mask).to(WIDE)
        rows_a = load_rows(through, offsets, mask, WIDE, USED)
        tl.store(next_ptr + n + offsets, combine(a, -dt, rows_a, A, STAGE + 1), mask=mask)


def launch(
    y: Tensor, slopes: Sequence[Tensor], dt: Tensor, tableau: Tableau, stage: int, through: Sequence[Tensor] = ()
) -> Tensor:
    """As `first_order_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    n = slopes[0].numel()
    out = torch.empty(y.numel(), dtype=y.dtype, device=y.device)
    if n:
        programs, block, options = launch_shape(n, y.dtype)
        start(
            stage_kernel, programs, y, tuple(slopes), tuple(through), dt, out, n,
            tableau.all_a, stage, used(tableau.all_a[stage + 1]),
            tl.float64 if y.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return out
