"""Triton kernel: the end of a transposed first-order step, a sum of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.ops.runge_kutta.kernel import launch_shape, load_rows, start


@triton.jit
def reverse_finish_kernel(sum_ptr, rows, n, USED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One block of Σ_j rows_j.

    Args:
        sum_ptr: where the sum goes, [D].
        rows: λ, v_0, v_1, …, [D] each.
        USED: True for each of them.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    blocks = load_rows(rows, offsets, mask, WIDE, USED)
    total = blocks[0]
    for j in tl.static_range(1, len(USED)):
        total += blocks[j]
    tl.store(sum_ptr + offsets, total, mask=mask)


def launch(cotangent: Tensor, through: Sequence[Tensor]) -> Tensor:
    """As `first_order_reverse_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    n = cotangent.numel()
    out = torch.empty(n, dtype=cotangent.dtype, device=cotangent.device)
    if n:
        programs, block, options = launch_shape(n, cotangent.dtype)
        start(
            reverse_finish_kernel, programs, out, (cotangent, *through), n, (True,) * (1 + len(through)),
            tl.float64 if cotangent.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return out
