"""Triton kernel: the states of y' = f(t, y) at all requested times inside a step. The slopes stay in registers while
the times go by, so each is read once and each state written once; slopes without a weight are not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.ops.first_order_dense_output.reference import weighing
from nesterov_triton.ops.runge_kutta.kernel import launch_shape, load_rows, start
from nesterov_triton.tableaus import Tableau


@triton.jit
def requested(span_ptr, times):
    """The first of the requested times that count, and how many do: all, or what `ops.control.weigh` has left."""
    first = times.to(tl.int64) * 0
    if span_ptr is not None:
        first = tl.load(span_ptr)
        times = tl.load(span_ptr + 1).to(tl.int32)
    return first, times


@triton.jit
def interpolated(base, dt, rows, weights_ptr, USED: tl.constexpr):
    """base + dt Σ_i weights_i rows_i.

    Args:
        base, rows: blocks of one shape and type.
        weights_ptr: of one time, [len(USED)].
        USED: which rows count.
    """
    total = tl.zeros_like(base)
    for i in tl.static_range(len(USED)):
        if USED[i]:
            total += rows[i] * tl.load(weights_ptr + i).to(base.dtype)
    return base + dt * total


# Not specialised: neither 1 nor any other number of times gets a kernel of its own.
@triton.jit(do_not_specialize=["times"])
def dense_output_kernel(
    y_ptr, slopes, weights_ptr, dt_ptr, out_ptr, span_ptr, n, times,
    USED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of all the states.

    Args:
        y_ptr: y_n, [D].
        slopes: k_0, k_1, …, [D] each.
        weights_ptr: [times, stages].
        out_ptr: where the states go, [times, D].
        span_ptr: see `requested`; None for all.
        n: D.
        USED: which slopes are weighed.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    y = tl.load(y_ptr + offsets, mask=mask).to(WIDE)
    rows = load_rows(slopes, offsets, mask, WIDE, USED)
    first, count = requested(span_ptr, times)
    out_ptr += first * n
    weights_ptr += first * len(USED)
    # The pointers move: a product of the time's index and n may need more than 32 bits.
    for _ in range(count):
        tl.store(out_ptr + offsets, interpolated(y, dt, rows, weights_ptr, USED), mask=mask)
        out_ptr += n
        weights_ptr += len(USED)


def launch(
    y: Tensor,
    slopes: Sequence[Tensor],
    weights: Tensor,
    dt: Tensor,
    tableau: Tableau | None = None,
    out: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    """As `first_order_dense_output`, by the kernel, on whatever device triton runs (a CPU under its interpreter).

    Args:
        out: where the states go, [T, D]; new memory without.
        span: the first of the requested times that count and how many do, [2] int64; without, all.
    """
    n, times = y.numel(), weights.shape[0]
    out = torch.empty((times, n), dtype=y.dtype, device=y.device) if out is None else out
    if out.numel():
        used = (True,) * len(slopes) if tableau is None else weighing(tableau)
        programs, block, options = launch_shape(n, y.dtype)
        start(
            dense_output_kernel, programs, y, tuple(slopes), weights, dt, out, span, n, times, used,
            tl.float64 if y.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return out
