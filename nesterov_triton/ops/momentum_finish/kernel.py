"""Triton kernel: the end of a momentum step. New state, embedded error and its norm in one pass over the rows.

Read are x m, the field's last one or two outputs and the other dm_j; written x m and the new dm_j that are kept: for
dopri5 9 rows and 3. The m_j and σ_x(m_j) are computed again in registers (`momentum_stage.kernel` has the count).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS
from nesterov_triton.ops.momentum.kernel import all_slopes
from nesterov_triton.ops.momentum_finish.reference import Finish
from nesterov_triton.ops.runge_kutta.kernel import (
    combine,
    launch_norm,
    launch_shape,
    load_rows,
    scaled,
    start,
    store_squares,
    stored,
    unless_finite,
    weighted,
)
from nesterov_triton.tableaus import Tableau


@triton.jit
def finish_kernel(
    z_ptr, outputs, slopes, coefficients_ptr, dt_ptr, rtol_ptr, atol_ptr, new_ptr, slope_ptrs, partials_ptr, n,
    A: tl.constexpr, E: tl.constexpr, KNOWN: tl.constexpr, NEW: tl.constexpr, KEPT: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the last NEW stages and of the step's end.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        outputs: the field's outputs at the last NEW stages, [N] each.
        slopes: dm of the stages before, [N] each.
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
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    dm = load_rows(slopes, offsets, mask, WIDE, KNOWN)

    dx, dm = all_slopes(
        outputs, x, m, dt, dm, coefficients_ptr, slope_ptrs, offsets, mask, A, len(KNOWN), NEW, KEPT,
        gate_x, BOUND_X, gate_f, BOUND_F, z_ptr.dtype.element_ty,
    )  # fmt: skip

    x_new = stored(combine(x, dt, dx, A, len(KNOWN) + NEW), new_ptr.dtype.element_ty)
    m_new = stored(combine(m, dt, dm, A, len(KNOWN) + NEW), new_ptr.dtype.element_ty)
    tl.store(new_ptr + offsets, x_new, mask=mask)
    tl.store(new_ptr + n + offsets, m_new, mask=mask)

    # dopri8's error does not look at the last slope, from which the next step starts.
    fit = unless_finite(dm[len(KNOWN) + NEW - 1])
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
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    keep: int,
) -> Finish:
    """As `momentum_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    new = torch.empty_like(z)
    kept = [torch.empty(n, dtype=z.dtype, device=z.device) for _ in range(keep)]
    if not n:
        return Finish(new, kept, torch.zeros((), dtype=torch.float64, device=z.device))
    programs, block, options = launch_shape(n, z.dtype)
    errors = len(tableau.error)
    partials = torch.empty((max(errors, 1), programs), dtype=torch.float64, device=z.device)
    start(
        finish_kernel, programs, z, tuple(outputs), tuple(slopes), coefficients, dt, rtol, atol, new, tuple(kept),
        partials, n,
        tableau.step_rows, tableau.error, (True,) * len(slopes), len(outputs), keep,
        FORMS[form_x[0]], form_x[1], FORMS[form_f[0]], form_f[1],
        tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    return Finish(new, kept, launch_norm(partials, 2 * n, errors))
