"""Triton kernel: the end of an adjoint step of a momentum system. New state, new adjoint, embedded error, its norm and
the quadratures in one pass over the rows, and a second launch that adds up what its programs leave.

Read are x m a_x a_m, all dm_j and all v_j; written x m a_x a_m: for dopri5 18 rows and 4. All else is computed again in
registers (`momentum_adjoint_stage.kernel` has the count); the quadratures need no row more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS, PULLBACKS
from nesterov_triton.ops.momentum.kernel import all_cotangents, inner_products, load_all, store_sum
from nesterov_triton.ops.momentum_adjoint_finish.reference import AdjointFinish
from nesterov_triton.ops.runge_kutta.kernel import (
    CHUNK,
    combine,
    launch_norm,
    launch_shape,
    norm_kernel,
    scaled,
    start,
    stored,
    total,
    unless_finite,
    weighted,
)
from nesterov_triton.tableaus import Tableau


@triton.jit
def adjoint_finish_kernel(
    z_ptr, adjoint_ptr, slopes, through, through_m, coefficients_ptr, dt_ptr, rtol_ptr, atol_ptr,
    new_ptr, partials_ptr, n,
    A: tl.constexpr, B: tl.constexpr, E: tl.constexpr, QUADRATURES: tl.constexpr,
    gate_x: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the step's end.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        adjoint_ptr: (a_x, a_m) at the step's start, [2 N].
        slopes: dm of all stages, [N] each.
        through: v of all stages, [N] each.
        through_m: w of all stages, [N] each; none where the field does not see m.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        new_ptr: where (x, m, a_x, a_m) at the end goes, [4 N].
        partials_ptr: where this block's sums go, [rows, programs] float64: if wanted, 2 rows of the quadratures' over
            dt, then max(len(E), 1) rows of squares.
        A: what leads to each stage, and to the step's end.
        B: the method's weights.
        E: the error rows.
    """
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    a_x = tl.load(adjoint_ptr + offsets, mask=mask).to(WIDE)
    a_m = tl.load(adjoint_ptr + n + offsets, mask=mask).to(WIDE)
    dm = load_all(slopes, offsets, mask, WIDE)
    momenta, dx, base_x, base_m = (), (), (), ()
    for j in tl.static_range(len(slopes)):
        momenta = momenta + (combine(m, dt, dm, A, j),)
        dx = dx + (gate_x(momenta[j], BOUND_X),)
        base_x = base_x + (a_x,)
        base_m = base_m + (a_m,)
    # The adjoint's slopes are -P.
    _, y_m, p_x, p_m = all_cotangents(
        base_x, base_m, momenta, load_all(through, offsets, mask, WIDE), load_all(through_m, offsets, mask, WIDE),
        coefficients_ptr, -dt, A, 0, 1, pullback_x, BOUND_X,
    )  # fmt: skip

    x_new = stored(combine(x, dt, dx, A, len(slopes)), new_ptr.dtype.element_ty)
    m_new = stored(combine(m, dt, dm, A, len(slopes)), new_ptr.dtype.element_ty)
    a_x_new = stored(combine(a_x, -dt, p_x, A, len(slopes)), new_ptr.dtype.element_ty)
    a_m_new = stored(combine(a_m, -dt, p_m, A, len(slopes)), new_ptr.dtype.element_ty)
    tl.store(new_ptr + offsets, x_new, mask=mask)
    tl.store(new_ptr + n + offsets, m_new, mask=mask)
    new_adjoint_ptr = new_ptr + tl.cast(n, tl.int64) * 2
    tl.store(new_adjoint_ptr + offsets, a_x_new, mask=mask)
    tl.store(new_adjoint_ptr + n + offsets, a_m_new, mask=mask)

    if QUADRATURES:
        of_h, of_m = inner_products(x, dt, dx, momenta, y_m, coefficients_ptr, A, B, 0, 1)
        store_sum(partials_ptr + program, of_h, mask)
        store_sum(partials_ptr + tl.num_programs(0) + program, of_m, mask)
        partials_ptr += 2 * tl.num_programs(0)

    # dopri8's error does not look at the last slopes, from which the next step starts.
    fit = unless_finite(dm[len(slopes) - 1]) + unless_finite(p_x[len(slopes) - 1]) + unless_finite(p_m[len(slopes) - 1])
    if len(E) == 0:
        fit += unless_finite(x_new) + unless_finite(m_new) + unless_finite(a_x_new) + unless_finite(a_m_new)
        store_sum(partials_ptr + program, fit, mask)
    else:
        rtol = tl.load(rtol_ptr).to(WIDE)
        atol = tl.load(atol_ptr).to(WIDE)
        for row in tl.static_range(len(E)):
            error_x = scaled(dt * weighted(x, dx, E, row), x, x_new, rtol, atol)
            error_m = scaled(dt * weighted(m, dm, E, row), m, m_new, rtol, atol)
            error_a_x = scaled(dt * weighted(a_x, p_x, E, row), a_x, a_x_new, rtol, atol)
            error_a_m = scaled(dt * weighted(a_m, p_m, E, row), a_m, a_m_new, rtol, atol)
            squares = error_x * error_x + error_m * error_m + error_a_x * error_a_x + error_a_m * error_a_m + fit
            store_sum(partials_ptr + row * tl.num_programs(0) + program, squares, mask)


@triton.jit(do_not_specialize=["blocks", "count"])
def sums_kernel(
    partials_ptr, dt_ptr, quadratures_ptr, error_ptr, blocks, count, ERRORS: tl.constexpr, CHUNK: tl.constexpr
):
    """The error norm and the quadratures from the blocks' sums, one program each; `norm_kernel` says why.

    Args:
        partials_ptr: [2 + max(ERRORS, 1), blocks] float64.
        quadratures_ptr: [2] float64.
        error_ptr: 0-d float64.
        count: elements of the whole joint state.
    """
    program = tl.program_id(0)
    if program == 2:
        norm_kernel(partials_ptr + 2 * blocks, error_ptr, blocks, count, ERRORS, CHUNK)
    else:
        found = total(partials_ptr + program * blocks, blocks, CHUNK)
        tl.store(quadratures_ptr + program, tl.load(dt_ptr).to(tl.float64) * found)


def launch(
    z: Tensor,
    slopes: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    quadratures: bool,
    through_m: Sequence[Tensor],
) -> AdjointFinish:
    """As `momentum_adjoint_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x = kernel_form(gate_x)
    if form_x is None:
        raise ValueError(f"no Triton form of {gate_x}")
    n, errors = z.numel() // 2, len(tableau.error)
    new = torch.empty(4 * n, dtype=z.dtype, device=z.device)
    if not n:
        nothing, sums = (torch.zeros(shape, dtype=torch.float64, device=z.device) for shape in ((), 2))
        return AdjointFinish(new, nothing, sums if quadratures else None)
    held = 4 + (2 + quadratures) * len(slopes) + len(through_m)
    programs, block, options = launch_shape(n, z.dtype, held)
    rows = max(errors, 1) + 2 * quadratures
    partials = torch.empty((rows, programs), dtype=torch.float64, device=z.device)
    start(
        adjoint_finish_kernel, programs, z, adjoint, tuple(slopes), tuple(through), tuple(through_m), coefficients,
        dt, rtol, atol, new, partials, n,
        tableau.step_rows, tableau.b, tableau.error, quadratures, FORMS[form_x[0]], PULLBACKS[form_x[0]], form_x[1],
        tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    if not quadratures:
        return AdjointFinish(new, launch_norm(partials, 4 * n, errors), None)
    error, sums = (torch.empty(shape, dtype=torch.float64, device=z.device) for shape in ((), 2))
    start(sums_kernel, 3, partials, dt, sums, error, programs, 4 * n, errors, CHUNK, num_warps=8)
    return AdjointFinish(new, error, sums)
