"""Triton kernel: the end of a first-order step. New state, embedded error and its norm in one pass over the rows.

The end of an FSAL method is the argument of its last stage, which the field has seen: it is neither read nor written
but computed again in registers, for its size. Every slope with a coefficient in b or in an error row is read once, and
so is the last one, which must be finite. The same for the adjoint, where it is there: one launch, one norm over both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.ops.first_order_finish.reference import Finish
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
    used,
    weighted,
)
from nesterov_triton.tableaus import Tableau


@triton.jit
def finish_kernel(
    y_ptr, slopes, through, dt_ptr, rtol_ptr, atol_ptr, new_ptr, partials_ptr, n,
    A: tl.constexpr, E: tl.constexpr, S: tl.constexpr, USED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the end of a step of S stages.

    Args:
        y_ptr: y_n, [D], or (y_n, a_n), [2 D].
        slopes: k_0 … k_{S-1}, [D] each.
        through: v_0 … v_{S-1}, [D] each; none for y alone.
        new_ptr: where the state at the end goes, of the size of y_ptr; None where the caller has it.
        partials_ptr: where this block's sums of squares go, [max(len(E), 1), programs] float64.
        n: D.
        E: the error rows.
        USED: which slopes b or an error row has a coefficient for, and the last.
    """
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    y = tl.load(y_ptr + offsets, mask=mask).to(WIDE)
    rows = load_rows(slopes, offsets, mask, WIDE, USED)

    new = stored(combine(y, dt, rows, A, S), y_ptr.dtype.element_ty)
    if new_ptr is not None:
        tl.store(new_ptr + offsets, new, mask=mask)

    # dopri8's error does not look at the last slope, from which the next step starts.
    fit = unless_finite(rows[S - 1])
    if len(through) > 0:
        a = tl.load(y_ptr + n + offsets, mask=mask).to(WIDE)
        rows_a = load_rows(through, offsets, mask, WIDE, USED)
        new_a = stored(combine(a, -dt, rows_a, A, S), y_ptr.dtype.element_ty)
        if new_ptr is not None:
            tl.store(new_ptr + n + offsets, new_a, mask=mask)
        fit += unless_finite(rows_a[S - 1])

    if len(E) == 0:
        if len(through) > 0:
            fit += unless_finite(new_a)
        store_squares(partials_ptr + program, unless_finite(new), fit, mask)
    else:
        rtol = tl.load(rtol_ptr).to(WIDE)
        atol = tl.load(atol_ptr).to(WIDE)
        for row in tl.static_range(len(E)):
            error = scaled(dt * weighted(y, rows, E, row), y, new, rtol, atol)
            second = fit
            if len(through) > 0:
                second += scaled(dt * weighted(a, rows_a, E, row), a, new_a, rtol, atol)
            store_squares(partials_ptr + row * tl.num_programs(0) + program, error, second, mask)


def launch(
    y: Tensor,
    slopes: Sequence[Tensor],
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    tableau: Tableau,
    through: Sequence[Tensor] = (),
) -> Finish:
    """As `first_order_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    n = slopes[0].numel()
    new = None if tableau.fsal else torch.empty(y.numel(), dtype=y.dtype, device=y.device)
    if not n:
        return Finish(new, torch.zeros((), dtype=torch.float64, device=y.device))
    programs, block, options = launch_shape(n, y.dtype)
    errors = len(tableau.error)
    partials = torch.empty((max(errors, 1), programs), dtype=torch.float64, device=y.device)
    start(
        finish_kernel, programs, y, tuple(slopes), tuple(through), dt, rtol, atol, new, partials, n,
        tableau.step_rows, tableau.error, tableau.stages, (*used(tableau.b, *tableau.error)[:-1], True),
        tl.float64 if y.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    return Finish(new, launch_norm(partials, y.numel(), errors))
