"""The momentum right-hand side on blocks, shared by the stage and finish kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from nesterov_triton.ops.runge_kutta.kernel import combine, stored


@triton.jit
def all_slopes(
    outputs, x, m, dt, dm, coefficients_ptr, slope_ptrs, offsets, mask,
    A: tl.constexpr, KNOWN: tl.constexpr, NEW: tl.constexpr, KEPT: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dx_0 … dx_{KNOWN + NEW} and dm_0 … dm_{KNOWN + NEW - 1}, as two tuples of blocks.

    dx_j = σ_x(m_j), and m_j needs the dm before it alone, so dx is one longer.

    Args:
        outputs: pointers to the field's outputs at the stages KNOWN … KNOWN + NEW - 1, [N] each.
        x, m: blocks of x_n and m_n.
        dm: blocks of dm_0 … dm_{KNOWN - 1}.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        slope_ptrs: where the last KEPT of the new dm go, [N] each.
        DTYPE: the type of the rows; new dm are rounded to it, since that is how later kernels will read them.
    """
    dx = ()
    for j in tl.static_range(KNOWN + 1):
        dx = dx + (gate_x(combine(m, dt, dm, A, j), BOUND_X),)
    for j in tl.static_range(NEW):
        u = tl.load(outputs[j] + offsets, mask=mask).to(m.dtype)
        drive = tl.load(coefficients_ptr + (KNOWN + j) * 4 + 1).to(m.dtype)
        q = tl.load(coefficients_ptr + (KNOWN + j) * 4 + 2).to(m.dtype)
        minus_gamma = tl.load(coefficients_ptr + (KNOWN + j) * 4 + 3).to(m.dtype)
        x_j = combine(x, dt, dx, A, KNOWN + j)
        m_j = combine(m, dt, dm, A, KNOWN + j)
        slope = stored(drive * gate_f(u, BOUND_F) + q * x_j + minus_gamma * m_j, DTYPE)
        if j >= NEW - KEPT:
            tl.store(slope_ptrs[j - NEW + KEPT] + offsets, slope, mask=mask)
        dm = dm + (slope,)
        # After the last stage this is σ_x of the step's end, which nobody uses and the compiler leaves out.
        dx = dx + (gate_x(combine(m, dt, dm, A, KNOWN + j + 1), BOUND_X),)
    return dx, dm
