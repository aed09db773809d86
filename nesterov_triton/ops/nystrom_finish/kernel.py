"""Triton kernel: the end of a step by the methods of `nesterov_triton.nystrom`, and its embedded error's norm, in one
pass over the rows.

Read are x m, the field's last output and the other forces; written x m and the last force: for nystrom4 6 rows and 3.
The last position, at which the output was taken, is computed again (`nystrom_stage.kernel` has the count).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, Identity, kernel_form
from nesterov_triton.gates_triton import FORMS
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.momentum.kernel import load_all
from nesterov_triton.ops.nystrom.kernel import combined, force, position
from nesterov_triton.ops.nystrom.reference import plan_of
from nesterov_triton.ops.nystrom_finish.reference import Finish
from nesterov_triton.ops.runge_kutta.kernel import (
    launch_norm,
    launch_shape,
    scaled,
    start,
    store_squares,
    stored,
    unless_finite,
)


@triton.jit
def finish_kernel(
    z_ptr, output_ptr, forces, coefficients_ptr, weights_ptr, rtol_ptr, atol_ptr, new_ptr, force_ptr, partials_ptr, n,
    POSITIONS: tl.constexpr, PATHS: tl.constexpr, ENDS: tl.constexpr, ADAPTIVE: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the step's end.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        output_ptr: the field's output at the last stage, [N].
        forces: those of the stages before, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        weights_ptr: the step's weights.
        new_ptr: where (x, m) at the end goes, [2 N].
        force_ptr: where the force there goes, [N].
        partials_ptr: where this block's sum of squares goes, [programs] float64.
        POSITIONS, PATHS, ENDS: rows of the `Plan`.
        ADAPTIVE: whether the error is wanted.
    """
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    u = tl.load(output_ptr + offsets, mask=mask).to(WIDE)
    known = load_all(forces, offsets, mask, WIDE)
    nothing = tl.zeros_like(x)

    x_new = position(x, m, known, weights_ptr, len(forces), POSITIONS, PATHS, gate_x, BOUND_X)
    x_new = stored(x_new, dtype)
    last = force(u, x_new, coefficients_ptr, len(forces), len(PATHS) > 0, gate_f, BOUND_F, dtype)
    columns = (x, m) + known + (last,)
    m_new = stored(combined(columns, weights_ptr, nothing, ENDS, 0), dtype)
    fit = unless_finite(last)  # the next step starts from it
    if ADAPTIVE:
        rtol = tl.load(rtol_ptr).to(WIDE)
        atol = tl.load(atol_ptr).to(WIDE)
        error_x = scaled(combined(columns, weights_ptr, nothing, ENDS, 1), x, x_new, rtol, atol)
        error_m = scaled(combined(columns, weights_ptr, nothing, ENDS, 2), m, m_new, rtol, atol)
        store_squares(partials_ptr + program, error_x + fit, error_m, mask)
    else:
        store_squares(partials_ptr + program, unless_finite(x_new) + fit, unless_finite(m_new), mask)
    tl.store(new_ptr + offsets, x_new, mask=mask)
    tl.store(new_ptr + n + offsets, m_new, mask=mask)
    tl.store(force_ptr + offsets, last, mask=mask)


def launch(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    rtol: Tensor,
    atol: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    adaptive: bool,
) -> Finish:
    """As `nystrom_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n, new = z.numel() // 2, torch.empty_like(z)
    last = torch.empty(n, dtype=z.dtype, device=z.device)
    if not n:
        return Finish(new, last, torch.zeros((), dtype=torch.float64, device=z.device))
    plan = plan_of(method, not isinstance(gate_x, Identity))
    programs, block, options = launch_shape(n, z.dtype)
    partials = torch.empty((1, programs), dtype=torch.float64, device=z.device)
    start(
        finish_kernel, programs, z, output, tuple(forces), coefficients, weights, rtol, atol, new, last, partials, n,
        plan.positions, plan.paths, plan.ends, adaptive,
        FORMS[form_x[0]], form_x[1], FORMS[form_f[0]], form_f[1],
        tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    return Finish(new, last, launch_norm(partials, 2 * n, int(adaptive)))
