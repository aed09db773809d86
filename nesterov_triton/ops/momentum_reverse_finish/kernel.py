"""Triton kernel: the cotangent of a momentum step's start, where its reverse sweep ends, and the quadratures in the
same pass over the rows; a second launch adds up what its programs leave of these.

Read are m, λ_x, λ_m, all v_j and all dm_j but the last, and x for the quadratures; written is the cotangent: for dopri5
14 rows (15) and 2. All else is computed again in registers (`momentum_reverse_stage.kernel` has the count).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS, PULLBACKS
from nesterov_triton.ops.momentum.kernel import inner_products, load_all, store_sum
from nesterov_triton.ops.momentum_reverse_finish.reference import ReverseFinish
from nesterov_triton.ops.momentum_reverse_stage.kernel import sweep_back
from nesterov_triton.ops.momentum_reverse_stage.reference import last_weights, transposed
from nesterov_triton.ops.runge_kutta.kernel import CHUNK, combine, launch_shape, start, total
from nesterov_triton.tableaus import Tableau


@triton.jit
def reverse_finish_kernel(
    z_ptr, cotangent_ptr, slopes, through, through_m, seeds, coefficients_ptr, dt_ptr, start_ptr, partials_ptr, n,
    A: tl.constexpr, W: tl.constexpr, B: tl.constexpr, ONES: tl.constexpr,
    gate_x: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the cotangent of the step's start.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        slopes: dm of all stages but the last, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        start_ptr: where the cotangent goes, [2 N].
        partials_ptr: where this block's sums of the quadratures go, [2, programs] float64; None if nobody wants them.
        ONES: 1.0 for each stage.

    The others as in `momentum_reverse_stage.kernel.sweep_back`.
    """
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    dm = load_all(slopes, offsets, mask, WIDE)
    of_x, of_m, momenta, y_m, p_x, p_m = sweep_back(
        m, dt, dm, cotangent_ptr, seeds, through, through_m, coefficients_ptr, offsets, mask, n,
        A, W, B, len(B), pullback_x, BOUND_X,
    )  # fmt: skip
    for p in tl.static_range(len(B)):
        of_x += p_x[p]
        of_m += p_m[p]
    tl.store(start_ptr + offsets, of_x, mask=mask)
    tl.store(start_ptr + n + offsets, of_m, mask=mask)
    if partials_ptr is not None:
        x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
        dx = ()
        for j in tl.static_range(len(slopes)):
            dx = dx + (gate_x(combine(m, dt, dm, A, j), BOUND_X),)
        product_h, product_m = inner_products(x, dt, dx, momenta, y_m, coefficients_ptr, A, ONES, len(B) - 1, -1)
        store_sum(partials_ptr + program, product_h, mask)
        store_sum(partials_ptr + tl.num_programs(0) + program, product_m, mask)


@triton.jit(do_not_specialize=["blocks"])
def sums_kernel(partials_ptr, quadratures_ptr, blocks, CHUNK: tl.constexpr):
    """The quadratures, [2] float64, from the blocks' sums, [2, blocks] float64, one program each."""
    row = tl.program_id(0)
    tl.store(quadratures_ptr + row, total(partials_ptr + row * blocks, blocks, CHUNK))


def launch(
    z: Tensor,
    slopes: Sequence[Tensor],
    cotangent: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stages: int,
    gate_x: Gate,
    gate_f: Gate,
    quadratures: bool,
    seeds: Sequence[Tensor],
    through_m: Sequence[Tensor],
) -> ReverseFinish:
    """As `momentum_reverse_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x = kernel_form(gate_x)
    if form_x is None:
        raise ValueError(f"no Triton form of {gate_x}")
    n, found = z.numel() // 2, torch.empty_like(cotangent)
    if not n:
        return ReverseFinish(found, torch.zeros(2, dtype=torch.float64, device=z.device) if quadratures else None)
    held = 3 + quadratures + (2 + quadratures) * stages + len(through_m)  # seeds are added up at once
    programs, block, options = launch_shape(n, z.dtype, held)
    partials = torch.empty((2, programs), dtype=torch.float64, device=z.device) if quadratures else None
    start(
        reverse_finish_kernel, programs, z, cotangent, tuple(slopes), tuple(through), tuple(through_m), tuple(seeds),
        coefficients, dt, found, partials, n,
        tableau.all_a, transposed(tableau.all_a, stages), last_weights(tableau, stages), (1.0,) * stages,
        FORMS[form_x[0]], PULLBACKS[form_x[0]], form_x[1],
        tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    if partials is None:
        return ReverseFinish(found, None)
    sums = torch.empty(2, dtype=torch.float64, device=z.device)
    start(sums_kernel, 2, partials, sums, programs, CHUNK, num_warps=8)
    return ReverseFinish(found, sums)
