"""Triton kernel: from the field's output at one stage of a method of `nesterov_triton.nystrom` to its next argument.

What is stored was decided by counting rows of N values, of a whole step whose first force is known, its finish
included, with a gate on the momentum or without:

| kept of earlier stages                | nystrom4 | nystrom6 | blanes_moan4 |
|---------------------------------------|----------|----------|--------------|
| F_j and X_j                           | 31       | 53       | 67           |
| F_j alone, X_j and M_q computed again | **26**   | **45**   | **56**       |
| u_j alone, everything computed again  | 24       | 41       | 51           |

A launch reads x, m, the output and the earlier forces, and writes the new force and h: with these in registers X_j is
a few more products, and the gates of M_q are hidden behind the memory. The last line is the floor; it is not what is
done, for the reasons that `momentum_stage.kernel` gives.
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
from nesterov_triton.ops.momentum.kernel import coefficient, load_all
from nesterov_triton.ops.nystrom.kernel import force, position
from nesterov_triton.ops.nystrom.reference import plan_of
from nesterov_triton.ops.nystrom_stage.reference import Stage
from nesterov_triton.ops.runge_kutta.kernel import launch_shape, start


@triton.jit
def stage_kernel(
    z_ptr, output_ptr, forces, coefficients_ptr, weights_ptr, force_ptr, h_ptr, n,
    POSITIONS: tl.constexpr, PATHS: tl.constexpr,
    gate_x: tl.constexpr, BOUND_X: tl.constexpr, gate_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the stage after those of `forces`, and of the features of the one after it.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        output_ptr: the field's output at the stage, [N]; None where there is none, and the features wanted are its own.
        forces: F_0, F_1, …, [N] each.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        weights_ptr: the step's weights.
        force_ptr: where the new force goes, [N]; None without an output.
        h_ptr: where the features go, [N]; None if nobody wants them.
        POSITIONS, PATHS: rows of the `Plan`.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    known = load_all(forces, offsets, mask, WIDE)
    if output_ptr is not None:
        u = tl.load(output_ptr + offsets, mask=mask).to(WIDE)
        at = position(x, m, known, weights_ptr, len(forces), POSITIONS, PATHS, gate_x, BOUND_X)
        new = force(
            u, at, coefficients_ptr, len(forces), len(PATHS) > 0, gate_f, BOUND_F, z_ptr.dtype.element_ty
        )  # fmt: skip
        known = known + (new,)
    if h_ptr is not None:
        at = position(x, m, known, weights_ptr, len(known), POSITIONS, PATHS, gate_x, BOUND_X)
        tl.store(h_ptr + offsets, coefficient(coefficients_ptr, len(known), 0, WIDE) * at, mask=mask)
    if output_ptr is not None:
        tl.store(force_ptr + offsets, new, mask=mask)


def launch(
    output: Tensor | None,
    z: Tensor,
    forces: Sequence[Tensor],
    coefficients: Tensor,
    weights: Tensor,
    method: Nystrom,
    gate_x: Gate,
    gate_f: Gate,
    ahead: bool,
) -> Stage:
    """As `nystrom_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n = z.numel() // 2
    h, new = (
        torch.empty(n, dtype=z.dtype, device=z.device) if wanted else None for wanted in (ahead, output is not None)
    )
    if n:
        plan = plan_of(method, not isinstance(gate_x, Identity))
        programs, block, options = launch_shape(n, z.dtype)
        start(
            stage_kernel, programs, z, output, tuple(forces), coefficients, weights, new, h, n,
            plan.positions, plan.paths, FORMS[form_x[0]], form_x[1], FORMS[form_f[0]], form_f[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return Stage(h, new)
