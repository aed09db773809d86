"""The momentum right-hand side on blocks, shared by the stage and finish kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from nesterov_triton.ops.runge_kutta.kernel import combine, stored


@triton.jit
def position_slopes(m, dt, slopes, A: tl.constexpr, STAGE: tl.constexpr, gate_x: tl.constexpr, BOUND_X: tl.constexpr):
    """dx_j = σ_x(m_j) for the stages j ≤ STAGE, from m_n and the dm_j with j < STAGE alone."""
    dx = ()
    for j in tl.static_range(STAGE + 1):
        dx = dx + (gate_x(combine(m, dt, slopes, A, j), BOUND_X),)
    return dx


@triton.jit
def momentum_slope(
    u, x, m, dt, slopes, dx, row_ptr, A: tl.constexpr, STAGE: tl.constexpr,
    gate_f: tl.constexpr, BOUND_F: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dm_I = s σ_f(u) + q x_I - γ m_I, rounded as it will be stored: later kernels read it from there.

    Args:
        row_ptr: the stage's coefficients (κ, s, q, -γ).
    """
    drive = tl.load(row_ptr + 1).to(m.dtype)
    q = tl.load(row_ptr + 2).to(m.dtype)
    minus_gamma = tl.load(row_ptr + 3).to(m.dtype)
    x_i = combine(x, dt, dx, A, STAGE)
    m_i = combine(m, dt, slopes, A, STAGE)
    return stored(drive * gate_f(u, BOUND_F) + q * x_i + minus_gamma * m_i, DTYPE)
