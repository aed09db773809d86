"""Triton kernel: one stage of a momentum system, from the field's output to the next stage's features.

What is stored was decided by counting rows of N values. Stage i of a dopri5 step that goes on from an earlier one, and
the whole step, its finish (in brackets) included:

| kept of earlier stages                | read at stage i > 0                | written          | whole step |
|---------------------------------------|------------------------------------|------------------|------------|
| σ_x(m_j) and dm_j                     | u x m, m_i h_i, up to 2 i - 1 rows | σ_x(m) dm m' h'  | 89 [16]    |
| m_j and dm_j, σ_x computed again      | u x m, m_i h_i, up to 2 i - 1 rows | dm m' h'         | 84 [16]    |
| **dm_j alone**, m_j computed again    | u x m, i rows                      | dm h'            | 55 [12]    |
| u_j alone, everything computed again  | u x m, i rows                      | h'               | 49 [11]    |

m_j = m_n + dt Σ_k a_jk dm_k needs no row of its own: the dm_k are read anyway, and a few more products are hidden
behind the memory. Nor does x_j, hence q x_j. Stage i reads 3 + i rows and writes 2; stage 0, whose slope is known
(FSAL, or a rejected step tried again), reads x and m and writes h': x_1 depends on m_n alone.

The last line is the floor: nothing of it can be left out. It is not what is done, for 11 % fewer bytes: every σ_f
would be computed again in each later kernel, 14 gates an element instead of 8 in the finish, which by instruction
counts makes arithmetic the bound of an H200 in half precision and float64; and the field's outputs would have to stay
as they are, which a field that reuses its output's memory does not grant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS
from nesterov_triton.ops.momentum.kernel import momentum_slope, position_slopes
from nesterov_triton.ops.momentum_stage.reference import Stage
from nesterov_triton.ops.runge_kutta.kernel import combine, launch_shape, load_rows, weights
from nesterov_triton.tableaus import Tableau


@triton.jit
def stage_kernel(
    u_ptr, z_ptr, slopes, coefficients_ptr, dt_ptr, slope_ptr, h_ptr, m_ptr, n,
    A: tl.constexpr, STAGE: tl.constexpr, KNOWN: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of stage STAGE.

    Args:
        u_ptr: the field's output, [N]; None where `slopes` already has dm_I.
        z_ptr: (x_n, m_n), [2 N].
        slopes: dm_0, dm_1, …, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        slope_ptr: where dm_I goes, [N]; None if it is known.
        h_ptr: where h_{STAGE+1} goes, [N].
        m_ptr: where m_{STAGE+1} goes, [N]; None if nobody looks at it.
        KNOWN: True for each of the slopes.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    scale = tl.load(coefficients_ptr + (STAGE + 1) * 4).to(WIDE)
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)

    dm = load_rows(slopes, offsets, mask, WIDE, KNOWN)
    dx = position_slopes(m, dt, dm, A, STAGE, gate_x, BOUND_X)

    if u_ptr is not None:
        u = tl.load(u_ptr + offsets, mask=mask).to(WIDE)
        row_ptr = coefficients_ptr + STAGE * 4
        slope = momentum_slope(
            u, x, m, dt, dm, dx, row_ptr, A, STAGE, gate_f, BOUND_F, slope_ptr.dtype.element_ty
        )  # fmt: skip
        tl.store(slope_ptr + offsets, slope, mask=mask)
        dm = dm + (slope,)

    tl.store(h_ptr + offsets, scale * combine(x, dt, dx, A, STAGE + 1), mask=mask)
    if m_ptr is not None:
        tl.store(m_ptr + offsets, combine(m, dt, dm, A, STAGE + 1), mask=mask)


def launch(
    u: Tensor | None,
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    stage: int,
    gate_x: Gate,
    gate_f: Gate,
    momentum: bool,
) -> Stage:
    """As `momentum_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    h = torch.empty(n, dtype=z.dtype, device=z.device)
    slope = None if u is None else torch.empty_like(h)
    m = torch.empty_like(h) if momentum else None
    if n:
        programs, block, options = launch_shape(n, z.dtype)
        kernel: Any = stage_kernel
        kernel[(programs,)](
            u, z, tuple(slopes), coefficients, dt, slope, h, m, n,
            weights(tableau), stage, (True,) * len(slopes), FORMS[form_x[0]], form_x[1], FORMS[form_f[0]], form_f[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return Stage(h, slope, m)
