"""Triton kernel: the states of a momentum system at all requested times inside a step.

Read are x m and the dm_j, once each; the σ_x(m_j) are computed again, once, and stay in registers beside the dm_j while
the times go by. Written are the states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS
from nesterov_triton.ops.first_order_dense_output.kernel import interpolated, requested
from nesterov_triton.ops.first_order_dense_output.reference import weighing
from nesterov_triton.ops.runge_kutta.kernel import combine, launch_shape, load_rows, start
from nesterov_triton.tableaus import Tableau


# Not specialised: neither 1 nor any other number of times gets a kernel of its own.
@triton.jit(do_not_specialize=["times"])
def dense_output_kernel(
    z_ptr, slopes, weights_ptr, dt_ptr, out_ptr, span_ptr, n, times,
    A: tl.constexpr, USED: tl.constexpr, KNOWN: tl.constexpr, gate_x: tl.constexpr, BOUND_X: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of all the states.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        slopes: dm_0, dm_1, …, [N] each.
        weights_ptr: [times, stages].
        out_ptr: where the states go, [times, 2 N].
        span_ptr: see `requested`; None for all.
        n: N.
        USED: which stages are weighed.
        KNOWN: True for each of the slopes.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    dm = load_rows(slopes, offsets, mask, WIDE, KNOWN)
    dx = ()
    for i in tl.static_range(len(USED)):
        # The compiler leaves out those that are not weighed, and the dm_j that none of the others contains.
        dx = dx + (gate_x(combine(m, dt, dm, A, i), BOUND_X),)
    first, count = requested(span_ptr, times)
    out_ptr += first * 2 * n
    weights_ptr += first * len(USED)
    # The pointers move: a product of the time's index and n may need more than 32 bits.
    for _ in range(count):
        tl.store(out_ptr + offsets, interpolated(x, dt, dx, weights_ptr, USED), mask=mask)
        out_ptr += n
        tl.store(out_ptr + offsets, interpolated(m, dt, dm, weights_ptr, USED), mask=mask)
        out_ptr += n
        weights_ptr += len(USED)


def launch(
    z: Tensor,
    slopes: Sequence[Tensor],
    weights: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    out: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    """As `momentum_dense_output`, by the kernel, on whatever device triton runs (a CPU under its interpreter).

    Args:
        out: where the states go, [T, 2 N]; new memory without.
        span: the first of the requested times that count and how many do, [2] int64; without, all.
    """
    form = kernel_form(gate_x)
    if form is None:
        raise ValueError(f"no Triton form of {gate_x}")
    n, times = z.numel() // 2, weights.shape[0]
    out = torch.empty((times, 2 * n), dtype=z.dtype, device=z.device) if out is None else out
    if out.numel():
        used = weighing(tableau)
        # For dopri8 26: 132 and 136 registers (sm_80, sm_90) in float64 with all elements, 82 and 80 with half.
        programs, block, options = launch_shape(n, z.dtype, held=2 + 2 * sum(used))
        start(
            dense_output_kernel, programs, z, tuple(slopes), weights, dt, out, span, n, times,
            tableau.all_a, used, (True,) * len(slopes), FORMS[form[0]], form[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return out
