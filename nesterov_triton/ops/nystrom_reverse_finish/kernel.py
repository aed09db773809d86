"""Triton kernel: the cotangent of the start of a step by the methods of `nesterov_triton.nystrom`, where its reverse
sweep ends, and the quadratures in the same pass over the rows; a second launch adds up what its programs leave of them.

Read are λ_x, λ_m, the cotangents of the other positions and v of the first stage, with a gate m and the forces, and for
the quadratures x too; written is the cotangent: for nystrom4 5 rows and 2, with a gate 9 and 2. All else is computed
again in registers (`nystrom_reverse_stage.kernel` has the count).
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
from nesterov_triton.ops.momentum_reverse_finish.kernel import sums_kernel
from nesterov_triton.ops.nystrom.kernel import combined, first_cotangents, linear, position, sweep_back
from nesterov_triton.ops.nystrom.reference import plan_of
from nesterov_triton.ops.nystrom_reverse_finish.reference import ReverseFinish
from nesterov_triton.ops.runge_kutta.kernel import CHUNK, launch_shape, start


@triton.jit
def after(rows, FIRST: tl.constexpr):
    """The tuple without its first FIRST entries."""
    found = ()
    for k in tl.static_range(FIRST, len(rows)):
        found = found + (rows[k],)
    return found


@triton.jit
def before(rows, END: tl.constexpr):
    """The first END entries of the tuple."""
    found = ()
    for k in tl.static_range(END):
        found = found + (rows[k],)
    return found


@triton.jit
def reverse_finish_kernel(
    z_ptr, cotangent_ptr, forces, of_positions, through_ptr, given_ptr, coefficients_ptr, weights_ptr, rates_ptr,
    kick_ptr, start_ptr, partials_ptr, n,
    POSITIONS: tl.constexpr, PATHS: tl.constexpr, ENDS: tl.constexpr,
    gate_x: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the cotangent of the step's start.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        cotangent_ptr: λ, [2 N].
        forces: F_0, F_1, …, [N] each; none without a gate and quadratures.
        of_positions: the cotangents of X_1 … X_s-2, [N] each.
        through_ptr: v of the first stage, [N].
        given_ptr: [3 N]; None for zeros.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        weights_ptr, rates_ptr: the step's weights, and their derivatives with respect to γ.
        kick_ptr: one number.
        start_ptr: where the cotangent goes, [2 N].
        partials_ptr: where this block's sums of the quadratures go, [2, programs] float64; None if nobody wants them.
        POSITIONS, PATHS, ENDS: rows of the `Plan`.
    """
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    of_end = tl.load(cotangent_ptr + offsets, mask=mask).to(WIDE)
    of_m = tl.load(cotangent_ptr + n + offsets, mask=mask).to(WIDE)
    v = tl.load(through_ptr + offsets, mask=mask).to(WIDE)
    known = load_all(forces, offsets, mask, WIDE)
    ys = load_all(of_positions, offsets, mask, WIDE) + (of_end,)
    nodes, of_x, of_start, of_first = first_cotangents(
        x, m, known, ys, of_m, weights_ptr, kick_ptr, given_ptr, offsets, mask, n,
        POSITIONS, PATHS, ENDS, pullback_x, BOUND_X,
    )  # fmt: skip
    of_x += coefficient(coefficients_ptr, 0, 0, WIDE) * v + linear(coefficients_ptr, 0, len(PATHS) > 0, WIDE) * of_first
    if partials_ptr is not None:
        columns, nothing = (x, m) + known, tl.zeros_like(x)
        of_gamma = of_m * combined(columns, rates_ptr, nothing, ENDS, 0)
        if len(PATHS) > 0:
            for q in tl.static_range(len(PATHS)):
                of_gamma += nodes[q] * combined(columns, rates_ptr, nothing, PATHS, q)
        else:
            for k in tl.static_range(len(POSITIONS)):
                of_gamma += ys[k] * combined(columns, rates_ptr, nothing, POSITIONS, k)
        of_xi = tl.zeros_like(x)
        for i in tl.static_range(len(forces)):
            of_force = of_first
            if i > 0:
                _, of_force = sweep_back(
                    x, m, known, after(ys, i), of_m, weights_ptr, i, POSITIONS, PATHS, ENDS, pullback_x, BOUND_X
                )
            product = position(x, m, before(known, i), weights_ptr, i, POSITIONS, PATHS, gate_x, BOUND_X) * of_force
            of_xi -= coefficient(coefficients_ptr, i, 0, WIDE) * product
            if len(PATHS) == 0:
                of_gamma -= coefficient(coefficients_ptr, 0, 3, WIDE) * product * 0.5
        store_sum(partials_ptr + program, of_xi, mask)
        store_sum(partials_ptr + tl.num_programs(0) + program, of_gamma, mask)
    tl.store(start_ptr + offsets, of_x, mask=mask)
    tl.store(start_ptr + n + offsets, of_start, mask=mask)


def launch(
    z: Tensor,
    forces: Sequence[Tensor],
    cotangent: Tensor,
    of_positions: Sequence[Tensor],
    through: Tensor,
    coefficients: Tensor,
    weights: Tensor,
    kick: Tensor,
    method: Nystrom,
    gate_x: Gate,
    given: Tensor | None,
    rates: Tensor | None,
) -> ReverseFinish:
    """As `nystrom_reverse_finish`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form = kernel_form(gate_x)
    if form is None:
        raise ValueError(f"no Triton form of {gate_x}")
    n, found = z.numel() // 2, torch.empty_like(cotangent)
    if not n:
        return ReverseFinish(found, None if rates is None else torch.zeros(2, dtype=torch.float64, device=z.device))
    plan = plan_of(method, not isinstance(gate_x, Identity))
    held = 5 + len(forces) + len(of_positions) + (1 if rates is None else 2) * len(plan.paths)
    if rates is not None and not plan.gated:
        held += 3 * len(plan.positions)  # X_i, the cotangent of F_i, and what the rates make of them
    programs, block, options = launch_shape(n, z.dtype, held)
    partials = None if rates is None else torch.empty((2, programs), dtype=torch.float64, device=z.device)
    start(
        reverse_finish_kernel, programs, z, cotangent, tuple(forces), tuple(of_positions), through, given, coefficients,
        weights, rates, kick, found, partials, n,
        plan.positions, plan.paths, plan.ends, FORMS[form[0]], PULLBACKS[form[0]], form[1],
        tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
    )  # fmt: skip
    if partials is None:
        return ReverseFinish(found, None)
    sums = torch.empty(2, dtype=torch.float64, device=z.device)
    start(sums_kernel, 2, partials, sums, programs, CHUNK, num_warps=8)
    return ReverseFinish(found, sums)
