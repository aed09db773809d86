"""Triton kernel: from what came back through the field at one stage of a method of `nesterov_triton.nystrom` to the
cotangent that goes back through it at the stage before.

Kept of other stages are F_j and the cotangents of X_j; the cotangent of F_j, and with a gate M_q and its cotangent, are
a few products of these, formed again wherever they are wanted. Forces are read for the gates' σ_x'(M_q) alone. Rows of
a whole step, its stages forward again from nothing but (x, m), its stages back, and the finish: 37 of nystrom4 and 71
of nystrom6; 59 of nystrom4 with a gate on the momentum (`benchmarks.traffic`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, Identity, kernel_form
from nesterov_triton.gates_triton import PULLBACKS
from nesterov_triton.nystrom import Nystrom
from nesterov_triton.ops.momentum.kernel import coefficient, load_all
from nesterov_triton.ops.nystrom.kernel import first_cotangents, linear, sweep_back
from nesterov_triton.ops.nystrom.reference import plan_of
from nesterov_triton.ops.nystrom_reverse_stage.reference import ReverseStage
from nesterov_triton.ops.runge_kutta.kernel import launch_shape, start, stored


@triton.jit
def reverse_stage_kernel(
    z_ptr, cotangent_ptr, output_ptr, forces, of_positions, through_ptr, given_ptr, coefficients_ptr, weights_ptr,
    kick_ptr, new_ptr, g_ptr, n,
    STAGE: tl.constexpr, POSITIONS: tl.constexpr, PATHS: tl.constexpr, ENDS: tl.constexpr,
    pullback_x: tl.constexpr, BOUND_X: tl.constexpr, pullback_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the stage STAGE.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        cotangent_ptr: λ, [2 N].
        output_ptr: the field's output at the stage, [N].
        forces: F_0, F_1, …, [N] each; none without a gate.
        of_positions: the cotangents of X_STAGE+2 … X_s-2, [N] each; from X_STAGE+1 on where there is no v.
        through_ptr: v of the stage after it, [N]; None for the first launch of a step.
        given_ptr: [3 N]; looked at in stage 0; None for zeros.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        weights_ptr: the step's weights.
        kick_ptr: one number, looked at in stage 0.
        new_ptr: where the cotangent of X_STAGE+1 goes, [N]; None without v.
        g_ptr: where that of the output goes, [N].
        POSITIONS, PATHS, ENDS: rows of the `Plan`.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    of_x = tl.load(cotangent_ptr + offsets, mask=mask).to(WIDE)
    of_m = tl.load(cotangent_ptr + n + offsets, mask=mask).to(WIDE)
    u = tl.load(output_ptr + offsets, mask=mask).to(WIDE)
    known = load_all(forces, offsets, mask, WIDE)
    ys = load_all(of_positions, offsets, mask, WIDE) + (of_x,)
    if through_ptr is not None:
        v = tl.load(through_ptr + offsets, mask=mask).to(WIDE)
        _, of_force = sweep_back(
            m, m, known, ys, of_m, weights_ptr, STAGE + 1, POSITIONS, PATHS, ENDS, pullback_x, BOUND_X
        )
        new = coefficient(coefficients_ptr, STAGE + 1, 0, WIDE) * v
        new = stored(new + linear(coefficients_ptr, STAGE + 1, len(PATHS) > 0, WIDE) * of_force, z_ptr.dtype.element_ty)
        ys = (new,) + ys
    if STAGE == 0:
        _, _, _, of_force = first_cotangents(
            m, m, known, ys, of_m, weights_ptr, kick_ptr, given_ptr, offsets, mask, n,
            POSITIONS, PATHS, ENDS, pullback_x, BOUND_X,
        )  # fmt: skip
    else:
        _, of_force = sweep_back(m, m, known, ys, of_m, weights_ptr, STAGE, POSITIONS, PATHS, ENDS, pullback_x, BOUND_X)
    g = pullback_f(coefficient(coefficients_ptr, STAGE, 1, WIDE) * of_force, u, BOUND_F)
    tl.store(g_ptr + offsets, g, mask=mask)
    if through_ptr is not None:
        tl.store(new_ptr + offsets, new, mask=mask)


def launch(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    cotangent: Tensor,
    of_positions: Sequence[Tensor],
    through: Tensor | None,
    coefficients: Tensor,
    weights: Tensor,
    kick: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    given: Tensor | None,
) -> ReverseStage:
    """As `nystrom_reverse_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    g = torch.empty(n, dtype=z.dtype, device=z.device)
    new = None if through is None else torch.empty_like(g)
    if n:
        plan = plan_of(method, not isinstance(gate_x, Identity))
        stage = method.stages - 2 - len(of_positions) - (through is not None)
        held = 7 + len(forces) + len(of_positions) + len(plan.paths)
        programs, block, options = launch_shape(n, z.dtype, held)
        start(
            reverse_stage_kernel, programs, z, cotangent, output, tuple(forces), tuple(of_positions), through, given,
            coefficients, weights, kick, new, g, n,
            stage, plan.positions, plan.paths, plan.ends,
            PULLBACKS[form_x[0]], form_x[1], PULLBACKS[form_f[0]], form_f[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return ReverseStage(g, new)
