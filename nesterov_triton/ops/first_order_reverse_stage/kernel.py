"""Triton kernel: one stage of a transposed first-order step. Of what came back through the later stages, and of the
end's cotangent, rows whose coefficient is 0 are not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.ops.first_order_reverse_stage.reference import column
from nesterov_triton.ops.runge_kutta.kernel import launch_shape, load_rows, start, used, weighted
from nesterov_triton.tableaus import Tableau


@triton.jit
def reverse_stage_kernel(
    slope_ptr, rows, dt_ptr, n,
    W: tl.constexpr, USED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: K = dt Σ_j W[0][j] rows_j.

    Args:
        slope_ptr: where K goes, [D].
        rows: λ, v_{i+1}, …, and the seed if there is one, [D] each.
        W: one row of weights.
        USED: which of them are not 0.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    blocks = load_rows(rows, offsets, mask, WIDE, USED)
    tl.store(slope_ptr + offsets, dt * weighted(blocks[0], blocks, W, 0), mask=mask)


def launch(
    cotangent: Tensor, through: Sequence[Tensor], dt: Tensor, tableau: Tableau, stages: int, seed: Tensor | None = None
) -> Tensor:
    """As `first_order_reverse_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    n = cotangent.numel()
    out = torch.empty(n, dtype=cotangent.dtype, device=cotangent.device)
    if n:
        weights = column(tableau, stages - 1 - len(through), stages)
        rows = cotangent, *through
        if seed is not None:
            rows, weights = (*rows, seed), (*weights, 1.0)
        programs, block, options = launch_shape(n, cotangent.dtype)
        start(
            reverse_stage_kernel, programs, out, rows, dt, n, (weights,), used(weights),
            tl.float64 if cotangent.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return out
