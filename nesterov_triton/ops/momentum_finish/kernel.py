"""Triton kernel: the end of a momentum step. New state, embedded error and its norm in one pass over the rows.

Read are u x m and the s - 1 rows dm_j; written x m and, if kept, dm_{s-1}: for dopri5 9 rows and 3. The m_j and
σ_x(m_j) are computed again in registers (`momentum_stage.kernel` has the count).
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
from nesterov_triton.ops.momentum_finish.reference import Finish
from nesterov_triton.ops.runge_kutta.kernel import (
    combine,
    launch_norm,
    launch_shape,
    load_rows,
    scaled,
    store_squares,
    stored,
    unless_finite,
    weighted,
    weights,
)
from nesterov_triton.tableaus import Tableau


@triton.jit
def finish_kernel(
    u_ptr, z_ptr, slopes, coefficients_ptr, dt_ptr, rtol_ptr, atol_ptr, new_ptr, slope_ptr, partials_ptr, n,
    A: tl.constexpr, E: tl.constexpr, STAGE: tl.constexpr, KNOWN: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the last stage, STAGE, and of the step's end.

    Args:
        u_ptr: the field's output at the last stage, [N].
        z_ptr: (x_n, m_n), [2 N].
        slopes: dm_0 … dm_{STAGE-1}, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        new_ptr: where (x, m) at the end goes, [2 N].
        slope_ptr: where dm_I goes, [N]; None if it is not kept.
        partials_ptr: where this block's sums of squares go, [max(len(E), 1), programs] float64.
        E: the error rows.
        KNOWN: True for each of the slopes.
    """
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    u = tl.load(u_ptr + offsets, mask=mask).to(WIDE)
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    dm = load_rows(slopes, offsets, mask, WIDE, KNOWN)

    dx = position_slopes(m, dt, dm, A, STAGE, gate_x, BOUND_X)
    row_ptr = coefficients_ptr + STAGE * 4
    slope = momentum_slope(
        u, x, m, dt, dm, dx, row_ptr, A, STAGE, gate_f, BOUND_F, new_ptr.dtype.element_ty
    )  # fmt: skip
    dm = dm + (slope,)
    if slope_ptr is not None:
        tl.store(slope_ptr + offsets, slope, mask=mask)

    x_new = stored(combine(x, dt, dx, A, STAGE + 1), new_ptr.dtype.element_ty)
    m_new = stored(combine(m, dt, dm, A, STAGE + 1), new_ptr.dtype.element_ty)
    tl.store(new_ptr + offsets, x_new, mask=mask)
    tl.store(new_ptr + n + offsets, m_new, mask=mask)

    # dopri8's error does not look at the last slope, from which the next step starts.
    fit = unless_finite(slope)
    if len(E) == 0:
        store_squares(partials_ptr + program, unless_finite(x_new) + fit, unless_finite(m_new), mask)
    else:
        rtol = tl.load(rtol_ptr).to(WIDE)
        atol = tl.load(atol_ptr).to(WIDE)
        for row in tl.static_range(len(E)):
            error_x = scaled(dt * weighted(x, dx, E, row), x, x_new, rtol, atol)
            error_m = scaled(dt * weighted(m, dm, E, row), m, m_new, rtol, atol)
            store_squares(partials_ptr + row * tl.num_programs(0) + program, error_x + fit, error_m, mask)


def launch(
    u: Tensor,
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    keep: bool,
) -> Finish:
    """As `momentum_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    new = torch.empty_like(z)
    slope = torch.empty(n, dtype=z.dtype, device=z.device) if keep else None
    if not n:
        return Finish(new, slope, torch.zeros((), dtype=torch.float64, device=z.device))
    programs, block, options = launch_shape(n, z.dtype)
    errors = len(tableau.error)
    partials = torch.empty((max(errors, 1), programs), dtype=torch.float64, device=z.device)
    kernel: Any = finish_kernel
    kernel[(programs,)](
        u, z, tuple(slopes), coefficients, dt, rtol, atol, new, slope, partials, n,
        weights(tableau), tableau.error, tableau.stages - 1, (True,) * len(slopes),
        FORMS[form_x[0]], form_x[1], FORMS[form_f[0]], form_f[1],
        tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    return Finish(new, slope, launch_norm(partials, 2 * n, errors))
