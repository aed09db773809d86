"""Triton kernel: the end of an adjoint step by the methods of `nesterov_triton.nystrom`. New state, new adjoint, their
embedded error's norm and the quadratures in one pass over the rows, and a second launch that adds up what its programs
leave.

Read are x m a_x a_m, the field's last output, the other forces and all v_j; written x m a_x a_m and the last force: for
nystrom4 12 rows and 5. All else is computed again in registers (`nystrom_adjoint_stage.kernel` has the count); the
quadratures need no row more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, Identity, kernel_form
from nesterov_triton.gates_triton import FORMS, PULLBACKS
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.momentum.kernel import coefficient, load_all, store_sum
from nesterov_triton.ops.momentum_adjoint_finish.kernel import sums_kernel
from nesterov_triton.ops.nystrom.kernel import adjoint_path, combined, force, position
from nesterov_triton.ops.nystrom.reference import plan_of, size_of
from nesterov_triton.ops.nystrom_adjoint_finish.reference import AdjointFinish
from nesterov_triton.ops.runge_kutta.kernel import (
    CHUNK,
    launch_norm,
    launch_shape,
    scaled,
    start,
    stored,
    unless_finite,
)


@triton.jit
def weighed(columns, weights_ptr):
    """Σ_j weight_j columns[j] of weights that lie one after the other."""
    found = tl.load(weights_ptr).to(columns[0].dtype) * columns[0]
    for j in tl.static_range(1, len(columns)):
        found += tl.load(weights_ptr + j).to(columns[0].dtype) * columns[j]
    return found


@triton.jit
def adjoint_finish_kernel(
    z_ptr, adjoint_ptr, output_ptr, forces, through, coefficients_ptr, weights_ptr, dense_ptr, rtol_ptr, atol_ptr,
    new_ptr, force_ptr, partials_ptr, n,
    POSITIONS: tl.constexpr, PATHS: tl.constexpr, ENDS: tl.constexpr, GROWTH: tl.constexpr, B: tl.constexpr,
    ADAPTIVE: tl.constexpr, QUADRATURES: tl.constexpr,
    gate_x: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the step's end.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        adjoint_ptr: (a_x, a_m) at the step's start, [2 N].
        output_ptr: the field's output at the last stage, [N].
        forces: those of the stages before, [N] each.
        through: v of all stages, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        weights_ptr: the step's weights, with its growth.
        dense_ptr: the weights of (x, m) at `nystrom.POINTS`, [3, 2, ·]; None where ⟨m, a_m⟩ is not wanted.
        new_ptr: where (x, m, a_x, a_m) at the end goes, [4 N].
        force_ptr: where the force there goes, [N].
        partials_ptr: where this block's sums go, [rows, programs] float64: if wanted, 2 rows of the quadratures' over
            dt, then one of squares.
        POSITIONS, PATHS, ENDS: rows of the `Plan`.
        GROWTH: where the growth begins.
        B: the method's weights of the forces in m.
        ADAPTIVE, QUADRATURES: whether the error is wanted, and the quadratures.
    """
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    a_x = tl.load(adjoint_ptr + offsets, mask=mask).to(WIDE)
    a_m = tl.load(adjoint_ptr + n + offsets, mask=mask).to(WIDE)
    u = tl.load(output_ptr + offsets, mask=mask).to(WIDE)
    known = load_all(forces, offsets, mask, WIDE)
    vs = load_all(through, offsets, mask, WIDE)
    nothing = tl.zeros_like(x)
    grown = tl.load(weights_ptr + (GROWTH + len(forces))).to(WIDE)

    x_new = stored(position(x, m, known, weights_ptr, len(forces), POSITIONS, PATHS, gate_x, BOUND_X), dtype)
    last = force(u, x_new, coefficients_ptr, len(forces), len(PATHS) > 0, gate_f, BOUND_F, dtype)
    own = (x, m) + known + (last,)
    m_new = stored(combined(own, weights_ptr, nothing, ENDS, 0), dtype)
    positions, pulled = adjoint_path(
        x, m, known, a_x, a_m, vs, coefficients_ptr, weights_ptr, POSITIONS, PATHS, GROWTH, pullback_x, BOUND_X
    )
    other = (a_m, -a_x) + pulled
    other_m = combined(other, weights_ptr, nothing, ENDS, 0)
    a_x_new = stored(-grown * other_m, dtype)
    a_m_new = stored(grown * positions[len(forces)], dtype)

    if QUADRATURES:
        of_h, of_m = tl.zeros_like(x), tl.zeros_like(x)
        for i in tl.static_range(len(B)):
            if B[i] != 0:
                scale = coefficient(coefficients_ptr, i, 0, WIDE) * tl.load(weights_ptr + (GROWTH + i)).to(WIDE)
                at = position(x, m, known, weights_ptr, i, POSITIONS, PATHS, gate_x, BOUND_X)
                of_h += (scale * at * positions[i]) * B[i]
        if dense_ptr is not None:
            if len(PATHS) > 0:
                # Of x they weigh the first four of eight columns, of m the last four.
                of_x = (
                    a_m, pullback_x(-a_x, m, BOUND_X), positions[len(forces)], pullback_x(other_m, m_new, BOUND_X)
                )  # fmt: skip
                of_momentum = (m, known[0], m_new, last)
                for k in tl.static_range(3):
                    weight = tl.load(weights_ptr + (GROWTH + len(B) + k)).to(WIDE)
                    of_m += weight * weighed(of_x, dense_ptr + 16 * k) * weighed(of_momentum, dense_ptr + 16 * k + 12)
            else:
                of_x = (a_m, -a_x, pulled[0], positions[len(forces)], other_m, pulled[len(forces)])
                of_momentum = (x, m, known[0], x_new, m_new, last)
                for k in tl.static_range(3):
                    weight = tl.load(weights_ptr + (GROWTH + len(B) + k)).to(WIDE)
                    of_m += weight * weighed(of_x, dense_ptr + 12 * k) * weighed(of_momentum, dense_ptr + 12 * k + 6)
        store_sum(partials_ptr + program, of_h, mask)
        store_sum(partials_ptr + tl.num_programs(0) + program, of_m, mask)
        partials_ptr += 2 * tl.num_programs(0)

    squares = unless_finite(last) + unless_finite(pulled[len(forces)])  # the next step starts from them
    if ADAPTIVE:
        rtol = tl.load(rtol_ptr).to(WIDE)
        atol = tl.load(atol_ptr).to(WIDE)
        error_x = scaled(combined(own, weights_ptr, nothing, ENDS, 1), x, x_new, rtol, atol)
        error_m = scaled(combined(own, weights_ptr, nothing, ENDS, 2), m, m_new, rtol, atol)
        error_a_m = scaled(grown * combined(other, weights_ptr, nothing, ENDS, 1), a_m, a_m_new, rtol, atol)
        error_a_x = scaled(grown * combined(other, weights_ptr, nothing, ENDS, 2), a_x, a_x_new, rtol, atol)
        squares += error_x * error_x + error_m * error_m + error_a_x * error_a_x + error_a_m * error_a_m
    else:
        squares += unless_finite(x_new) + unless_finite(m_new) + unless_finite(a_x_new) + unless_finite(a_m_new)
    store_sum(partials_ptr + program, squares, mask)
    tl.store(new_ptr + offsets, x_new, mask=mask)
    tl.store(new_ptr + n + offsets, m_new, mask=mask)
    new_adjoint_ptr = new_ptr + tl.cast(n, tl.int64) * 2
    tl.store(new_adjoint_ptr + offsets, a_x_new, mask=mask)
    tl.store(new_adjoint_ptr + n + offsets, a_m_new, mask=mask)
    tl.store(force_ptr + offsets, last, mask=mask)


def launch(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    dt: Tensor,
    rtol: Tensor,
    atol: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    adaptive: bool,
    quadratures: bool,
    dense: Tensor | None,
) -> AdjointFinish:
    """As `nystrom_adjoint_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    new, last = (torch.empty(k * n, dtype=z.dtype, device=z.device) for k in (4, 1))
    if not n:
        nothing, sums = (torch.zeros(shape, dtype=torch.float64, device=z.device) for shape in ((), 2))
        return AdjointFinish(new, last, nothing, sums if quadratures else None)
    gated = not isinstance(gate_x, Identity)
    plan = plan_of(method, gated)
    # Of each stage F, v and P, and in float64 weights enough to count; without a gate dense output has more columns.
    held = 8 + (5 if z.dtype == torch.float64 else 3) * len(forces) + len(plan.paths)
    held += 2 * (dense is not None and not gated)
    programs, block, options = launch_shape(n, z.dtype, held)
    partials = torch.empty((1 + 2 * quadratures, programs), dtype=torch.float64, device=z.device)
    start(
        adjoint_finish_kernel, programs, z, adjoint, output, tuple(forces), tuple(through), coefficients, weights,
        dense if quadratures else None, rtol, atol, new, last, partials, n,
        plan.positions, plan.paths, plan.ends, size_of(method, gated), method.b, adaptive, quadratures,
        FORMS[form_x[0]], PULLBACKS[form_x[0]], form_x[1], FORMS[form_f[0]], form_f[1],
        tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    if not quadratures:
        return AdjointFinish(new, last, launch_norm(partials, 4 * n, int(adaptive)), None)
    error, sums = (torch.empty(shape, dtype=torch.float64, device=z.device) for shape in ((), 2))
    start(sums_kernel, 3, partials, dt, sums, error, programs, 4 * n, int(adaptive), CHUNK, num_warps=8)
    return AdjointFinish(new, last, error, sums)
