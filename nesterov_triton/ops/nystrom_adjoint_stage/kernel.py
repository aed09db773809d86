"""Triton kernel: from the field's output at one stage of a method of `nesterov_triton.nystrom` to its next argument,
and to the cotangent of the output, which goes back through the field.

What is stored was decided by counting rows of N values, of a whole step of state and adjoint whose first force F_0 and
v_0 are known, its finish included, without a gate on the momentum and with one:

| kept of earlier stages                  | nystrom4   | nystrom6 | blanes_moan4 |
|-----------------------------------------|------------|----------|--------------|
| F_j and the adjoint's own, P_j          | 53, 57     | 90       | 113, 120     |
| F_j and v_j, P_j and W_j computed again | **50, 54** | **86**   | **107, 114** |
| u_j and v_j, everything computed again  | 48, 52     | 82       | 102, 109     |

v_j is what the field's vector-Jacobian product leaves in memory anyway, and is of a itself: the last one of a step is
the next one's first, whatever the damping. The last line is the floor; it is not what is done, for the reasons that
`momentum_stage.kernel` gives. The last force is formed by the finish, which needs the output no less than the force.
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
from nesterov_triton.ops.momentum.kernel import coefficient, load_all
from nesterov_triton.ops.nystrom.kernel import adjoint_path, force, position
from nesterov_triton.ops.nystrom.reference import plan_of, size_of
from nesterov_triton.ops.nystrom_adjoint_stage.reference import AdjointStage
from nesterov_triton.ops.runge_kutta.kernel import launch_shape, start


@triton.jit
def adjoint_stage_kernel(
    z_ptr, adjoint_ptr, output_ptr, forces, through, coefficients_ptr, weights_ptr, force_ptr, g_ptr, h_ptr, n,
    POSITIONS: tl.constexpr, PATHS: tl.constexpr, GROWTH: tl.constexpr,
    gate_x: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
    gate_f: tl.constexpr, pullback_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the stage after those of `forces`, and of the features of the one after it.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        adjoint_ptr: (a_x, a_m) at the step's start, [2 N].
        output_ptr: the field's output at the stage, [N].
        forces: F_0, F_1, …, [N] each.
        through: v_0, v_1, …, as many, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        weights_ptr: the step's weights, with its growth.
        force_ptr: where the new force goes, [N]; None at the last stage.
        g_ptr: where the output's cotangent goes, [N].
        h_ptr: where the features go, [N]; None if nobody wants them.
        POSITIONS, PATHS: rows of the `Plan`.
        GROWTH: where the growth begins.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    a_x = tl.load(adjoint_ptr + offsets, mask=mask).to(WIDE)
    a_m = tl.load(adjoint_ptr + n + offsets, mask=mask).to(WIDE)
    u = tl.load(output_ptr + offsets, mask=mask).to(WIDE)
    known = load_all(forces, offsets, mask, WIDE)
    vs = load_all(through, offsets, mask, WIDE)
    positions, _ = adjoint_path(
        x, m, known, a_x, a_m, vs, coefficients_ptr, weights_ptr, POSITIONS, PATHS, GROWTH, pullback_x, BOUND_X
    )
    of_m = tl.load(weights_ptr + (GROWTH + len(through))).to(WIDE) * positions[len(through)]
    g = pullback_f(coefficient(coefficients_ptr, len(through), 1, WIDE) * of_m, u, BOUND_F)
    if force_ptr is not None:
        at = position(x, m, known, weights_ptr, len(forces), POSITIONS, PATHS, gate_x, BOUND_X)
        new = force(
            u, at, coefficients_ptr, len(forces), len(PATHS) > 0, gate_f, BOUND_F, z_ptr.dtype.element_ty
        )  # fmt: skip
        if h_ptr is not None:
            known = known + (new,)
            at = position(x, m, known, weights_ptr, len(known), POSITIONS, PATHS, gate_x, BOUND_X)
            tl.store(h_ptr + offsets, coefficient(coefficients_ptr, len(known), 0, WIDE) * at, mask=mask)
        tl.store(force_ptr + offsets, new, mask=mask)
    tl.store(g_ptr + offsets, g, mask=mask)


def launch(
    output: Tensor,
    z: Tensor,
    forces: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    ahead: bool,
) -> AdjointStage:
    """As `nystrom_adjoint_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    h, new, g = (
        torch.empty(n, dtype=z.dtype, device=z.device) if wanted else None
        for wanted in (ahead, len(through) < method.stages - 1, True)
    )
    assert g is not None
    if n:
        gated = not isinstance(gate_x, Identity)
        plan = plan_of(method, gated)
        # In float64 the weights of a stage count, too.
        held = 7 + (5 if z.dtype == torch.float64 else 2) * len(through) + len(plan.paths)
        programs, block, options = launch_shape(n, z.dtype, held)
        start(
            adjoint_stage_kernel, programs, z, adjoint, output, tuple(forces), tuple(through), coefficients, weights,
            new, g, h, n, plan.positions, plan.paths, size_of(method, gated),
            FORMS[form_x[0]], PULLBACKS[form_x[0]], form_x[1], FORMS[form_f[0]], PULLBACKS[form_f[0]], form_f[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return AdjointStage(h, new, g)
