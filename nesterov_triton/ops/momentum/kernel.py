"""The momentum right-hand side and its transpose on blocks, shared by the kernels of the step, its adjoint and its
reverse sweep."""

from __future__ import annotations

import triton
import triton.language as tl

from nesterov_triton.ops.runge_kutta.kernel import combine, stored


@triton.jit
def load_all(rows, offsets, mask, WIDE: tl.constexpr):
    """A tuple of pointers as a tuple of blocks of the type WIDE; the compiler leaves out those that nobody uses."""
    blocks = ()
    for j in tl.static_range(len(rows)):
        blocks = blocks + (tl.load(rows[j] + offsets, mask=mask).to(WIDE),)
    return blocks


@triton.jit
def coefficient(coefficients_ptr, STAGE: tl.constexpr, WHICH: tl.constexpr, WIDE: tl.constexpr):
    """κ, s, q or -γ (0 to 3) at a stage."""
    return tl.load(coefficients_ptr + STAGE * 4 + WHICH).to(WIDE)


@triton.jit
def further_slopes(
    u, x, m, dt, dm, coefficients_ptr, A: tl.constexpr, KNOWN: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dx_0 … dx_{KNOWN + len(u)} and dm_0 … dm_{KNOWN + len(u) - 1}, as two tuples of blocks.

    dx_j = σ_x(m_j), and m_j needs the dm before it alone, so dx is one longer.

    Args:
        u: blocks of the field's outputs at the stages from KNOWN on.
        x, m: blocks of x_n and m_n.
        dm: blocks of dm_0 … dm_{KNOWN - 1}.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        DTYPE: the type of the rows; new dm are rounded to it, since that is how later kernels will read them.
    """
    dx = ()
    for j in tl.static_range(KNOWN + 1):
        dx = dx + (gate_x(combine(m, dt, dm, A, j), BOUND_X),)
    for j in tl.static_range(len(u)):
        drive = coefficient(coefficients_ptr, KNOWN + j, 1, m.dtype)
        q = coefficient(coefficients_ptr, KNOWN + j, 2, m.dtype)
        minus_gamma = coefficient(coefficients_ptr, KNOWN + j, 3, m.dtype)
        x_j = combine(x, dt, dx, A, KNOWN + j)
        m_j = combine(m, dt, dm, A, KNOWN + j)
        dm = dm + (stored(drive * gate_f(u[j], BOUND_F) + q * x_j + minus_gamma * m_j, DTYPE),)
        # After a step's last stage this is σ_x of its end, which nobody uses and the compiler leaves out.
        if KNOWN + j + 1 < len(A):
            dx = dx + (gate_x(combine(m, dt, dm, A, KNOWN + j + 1), BOUND_X),)
    return dx, dm


@triton.jit
def all_slopes(
    outputs, x, m, dt, dm, coefficients_ptr, slope_ptrs, offsets, mask,
    A: tl.constexpr, KNOWN: tl.constexpr, NEW: tl.constexpr, KEPT: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`further_slopes` of the outputs, whose last ones are stored.

    Args:
        outputs: pointers to the field's outputs at the stages KNOWN … KNOWN + NEW - 1, [N] each.
        slope_ptrs: where the last KEPT of the new dm go, [N] each.
    """
    u = load_all(outputs, offsets, mask, m.dtype)
    dx, dm = further_slopes(
        u, x, m, dt, dm, coefficients_ptr, A, KNOWN, gate_x, BOUND_X, gate_f, BOUND_F, DTYPE
    )  # fmt: skip
    for j in tl.static_range(KEPT):
        tl.store(slope_ptrs[j] + offsets, dm[KNOWN + NEW - KEPT + j], mask=mask)
    return dx, dm


@triton.jit
def all_cotangents(
    base_x, base_m, momenta, through, through_m, coefficients_ptr, step,
    W: tl.constexpr, FIRST: tl.constexpr, BY: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
):  # fmt: skip
    """Y_p = base_p + step Σ_{r<p} W_pr P_r  with  P_p = (κ v_p + q Y_m,p, σ_x'(m_p) Y_x,p - γ Y_m,p + w_p), as the four
    tuples Y_x, Y_m, P_x, P_m; see `momentum_adjoint_stage.reference.all_cotangents`.

    Args:
        base_x, base_m: blocks, one for each Y_m wanted: as many as there are v, and one or two more.
        momenta: blocks of m_p; one more than there are v where that is needed.
        through: blocks of v_p.
        through_m: blocks of w_p; none where the field does not see m.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        FIRST, BY: p stands for the stage FIRST + BY p.
    """
    y_x, y_m, p_x, p_m = (), (), (), ()
    for p in tl.static_range(len(base_m)):
        y_m = y_m + (combine(base_m[p], step, p_m, W, p),)
        # P_m does not look at v: without w it goes on for one stage more than they do.
        if p < len(through) or p + 1 < len(base_m):
            y_x = y_x + (combine(base_x[p], step, p_x, W, p),)
            of_m = pullback_x(y_x[p], momenta[p], BOUND_X)
            of_m += coefficient(coefficients_ptr, FIRST + BY * p, 3, step.dtype) * y_m[p]
            if len(through_m) > 0:
                of_m += through_m[p]
            p_m = p_m + (of_m,)
        if p < len(through):
            of_x = coefficient(coefficients_ptr, FIRST + BY * p, 0, step.dtype) * through[p]
            p_x = p_x + (of_x + coefficient(coefficients_ptr, FIRST + BY * p, 2, step.dtype) * y_m[p],)
    return y_x, y_m, p_x, p_m


@triton.jit
def inner_products(
    x, dt, dx, momenta, y_m, coefficients_ptr,
    A: tl.constexpr, WEIGHTS: tl.constexpr, FIRST: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """Σ_i WEIGHTS_i h_i Y_m,i and Σ_i WEIGHTS_i m_i Y_m,i, two blocks.

    Args:
        dx: blocks in stage order.
        momenta, y_m: blocks in the order of `all_cotangents`.
    """
    of_h, of_m = tl.zeros_like(x), tl.zeros_like(x)
    for p in tl.static_range(len(y_m)):
        if WEIGHTS[FIRST + BY * p] != 0:
            scale = coefficient(coefficients_ptr, FIRST + BY * p, 0, x.dtype)
            of_h += (scale * combine(x, dt, dx, A, FIRST + BY * p) * y_m[p]) * WEIGHTS[FIRST + BY * p]
            of_m += (momenta[p] * y_m[p]) * WEIGHTS[FIRST + BY * p]
    return of_h, of_m


@triton.jit
def store_sum(partial_ptr, value, mask):
    """Leave this program's sum over the mask for a second launch."""
    tl.store(partial_ptr, tl.sum(tl.where(mask, value, 0.0), axis=0).to(tl.float64))
