"""Triton kernel: the states at all requested times inside a step by the methods of `nesterov_triton.nystrom`. The rows
of both ends are read once, and stay in registers while the times go by; each state is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS
from nesterov_triton.ops.first_order_dense_output.kernel import requested
from nesterov_triton.ops.runge_kutta.kernel import launch_shape, start


@triton.jit
def mixture(columns, weights_ptr):
    """Σ_j weights_j columns[j]."""
    total = tl.zeros_like(columns[0])
    for j in tl.static_range(len(columns)):
        total += tl.load(weights_ptr + j).to(total.dtype) * columns[j]
    return total


# Not specialised: neither 1 nor any other number of times gets a kernel of its own.
@triton.jit(do_not_specialize=["times"])
def dense_output_kernel(
    z_ptr, force_ptr, end_ptr, end_force_ptr, weights_ptr, out_ptr, span_ptr, n, times,
    GATED: tl.constexpr, gate_x: tl.constexpr, BOUND_X: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of all the states.

    Args:
        z_ptr, end_ptr: (x, m) at both ends of the step, [2 N].
        force_ptr, end_force_ptr: the forces there, [N].
        weights_ptr: [times, 2, 8] with a gate, [times, 2, 6] without.
        out_ptr: where the states go, [times, 2 N].
        span_ptr: see `requested`; None for all.
        n: N.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    f = tl.load(force_ptr + offsets, mask=mask).to(WIDE)
    x1 = tl.load(end_ptr + offsets, mask=mask).to(WIDE)
    m1 = tl.load(end_ptr + n + offsets, mask=mask).to(WIDE)
    f1 = tl.load(end_force_ptr + offsets, mask=mask).to(WIDE)
    width: tl.constexpr = 8 if GATED else 6
    of_m: tl.constexpr = 12 if GATED else 6
    if GATED:  # the weights of x are in the first half of their row, those of m in the second
        to_x = (x, gate_x(m, BOUND_X), x1, gate_x(m1, BOUND_X))
        to_m = (m, f, m1, f1)
    else:
        to_x = (x, m, f, x1, m1, f1)
        to_m = to_x
    first, count = requested(span_ptr, times)
    out_ptr += first * 2 * n
    weights_ptr += first * 2 * width
    # The pointers move: a product of the time's index and n may need more than 32 bits.
    for _ in range(count):
        tl.store(out_ptr + offsets, mixture(to_x, weights_ptr), mask=mask)
        out_ptr += n
        tl.store(out_ptr + offsets, mixture(to_m, weights_ptr + of_m), mask=mask)
        out_ptr += n
        weights_ptr += 2 * width


def launch(
    z: Tensor,
    force: Tensor,
    end: Tensor,
    end_force: Tensor,
    weights: Tensor,
    gate_x: Gate,
    out: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    """As `nystrom_dense_output`, by the kernel, on whatever device triton runs (a CPU under its interpreter).

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
        programs, block, options = launch_shape(n, z.dtype)
        start(
            dense_output_kernel, programs, z, force, end, end_force, weights, out, span, n, times,
            form[0] != "identity", FORMS[form[0]], form[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return out
