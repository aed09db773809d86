"""Triton kernel: from the field's outputs at one or two stages of a momentum system to its next one or two arguments.

Two at a time, because x' = σ_x(m) does not look at u: x_{i+1} depends on m_0 … m_i, hence on u_0 … u_{i-1}. Once
u_{i-1} is there, the features of stage i and of stage i + 1 can both be formed, unless the field sees m.

What is stored was decided by counting rows of N values, here of a whole dopri5 step whose first slope is known (FSAL,
or a rejected step tried again), its finish included:

| kept of earlier stages               | one stage a launch | two stages a launch |
|--------------------------------------|--------------------|---------------------|
| σ_x(m_j) and dm_j, m_i and h_i       | 89                 |                     |
| m_j and dm_j, σ_x computed again     | 84                 |                     |
| dm_j alone, m_j computed again too   | 55                 | **37**              |
| u_j alone, everything computed again | 50                 | 33                  |

m_j = m_n + dt Σ_k a_jk dm_k needs no row of its own: the dm_k are read anyway, and a few more products are hidden
behind the memory. Nor does x_j, hence q x_j. A launch reads x and m, the outputs and the earlier dm_j, and writes
the new dm_j and h.

The last line is the floor: nothing of it can be left out. It is not what is done, for 11 % fewer bytes: every σ_f
would be computed again in each later kernel, 14 gates an element instead of 9 in the finish, which makes arithmetic
the bound of an H200 in half precision and float64 (estimated from instruction counts, not measured); and all of the
field's outputs would have to stay as they are until the step's end.
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
from nesterov_triton.ops.momentum_stage.reference import Stage
from nesterov_triton.ops.runge_kutta.kernel import combine, launch_shape, load_rows, start
from nesterov_triton.tableaus import Tableau


@triton.jit
def stage_kernel(
    z_ptr, outputs, slopes, coefficients_ptr, dt_ptr, slope_ptrs, h_ptrs, m_ptr, n,
    A: tl.constexpr, KNOWN: tl.constexpr, NEW: tl.constexpr, AHEAD: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the stages after the first `len(KNOWN)`; the next stage is `len(KNOWN) + NEW`.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        outputs: the field's outputs at NEW stages, [N] each.
        slopes: dm_0, dm_1, …, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        slope_ptrs: where the NEW further dm go, [N] each.
        h_ptrs: where the features of the next AHEAD stages go, [N] each.
        m_ptr: where m of the next stage goes, [N]; None if nobody looks at it.
        KNOWN: True for each of the slopes.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    dm = load_rows(slopes, offsets, mask, WIDE, KNOWN)
    dx, dm = all_slopes(
        outputs, x, m, dt, dm, coefficients_ptr, slope_ptrs, offsets, mask, A, len(KNOWN), NEW, NEW,
        gate_x, BOUND_X, gate_f, BOUND_F, z_ptr.dtype.element_ty,
    )  # fmt: skip
    for j in tl.static_range(AHEAD):
        scale = tl.load(coefficients_ptr + (len(KNOWN) + NEW + j) * 4).to(WIDE)
        tl.store(h_ptrs[j] + offsets, scale * combine(x, dt, dx, A, len(KNOWN) + NEW + j), mask=mask)
    if m_ptr is not None:
        tl.store(m_ptr + offsets, combine(m, dt, dm, A, len(KNOWN) + NEW), mask=mask)


def launch(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    ahead: int,
    momentum: bool,
) -> Stage:
    """As `momentum_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    h, new = ([torch.empty(n, dtype=z.dtype, device=z.device) for _ in range(k)] for k in (ahead, len(outputs)))
    m = torch.empty(n, dtype=z.dtype, device=z.device) if momentum else None
    if n:
        programs, block, options = launch_shape(n, z.dtype)
        start(
            stage_kernel, programs, z, tuple(outputs), tuple(slopes), coefficients, dt, tuple(new), tuple(h), m, n,
            tableau.all_a, (True,) * len(slopes), len(outputs), ahead,
            FORMS[form_x[0]], form_x[1], FORMS[form_f[0]], form_f[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return Stage(h, new, m)
