"""Triton kernel: from the field's outputs at one or two stages of a momentum system to its next one or two arguments,
and to the cotangents of the outputs, which go back through the field.

Two at a time as in `momentum_stage`, and for the same reason: a_m,i+1 depends on da_m,0 … da_m,i, these on a_x,0 …
a_x,i, hence on v_0 … v_{i-1}. Once v_{i-1} is there, the cotangents of stage i and of stage i + 1 can both be formed,
unless the field sees m.

What is stored was decided by counting rows of N values, here of a whole dopri5 step whose dm_0 and v_0 are known (FSAL,
or a rejected step tried again), its first features and its finish included; where the field sees m, its w_j are read
with the v_j, and the m_i that it is given are written:

| kept of earlier stages                          | field sees m, one stage a launch | two stages a launch |
|-------------------------------------------------|----------------------------------|---------------------|
| dm_j, da_x,j and da_m,j                         |                                  | 102                 |
| dm_j, v_j and da_m,j                            |                                  | 97                  |
| dm_j and v_j, everything else computed again    | 143                              | **79**              |
| u_j and v_j, everything else computed again     | 138                              | 74                  |

a_x,j and a_m,j need no rows of their own: (a_x, a_m) at the step's start, the v_j and, through σ_x'(m_j), the dm_j
give them all, and these are read anyway. A launch reads x, m, a_x, a_m, the outputs and the earlier dm_j and v_j, and
writes the new dm_j, the cotangents and h. The last line is the floor; it is not what is done, for the reasons that
`momentum_stage.kernel` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nesterov_triton.gates import Gate, kernel_form
from nesterov_triton.gates_triton import FORMS, PULLBACKS
from nesterov_triton.ops.momentum.kernel import all_cotangents, coefficient, further_slopes, load_all
from nesterov_triton.ops.momentum_adjoint_stage.reference import AdjointStage
from nesterov_triton.ops.runge_kutta.kernel import combine, launch_shape, start
from nesterov_triton.tableaus import Tableau


@triton.jit
def adjoint_stage_kernel(
    z_ptr, adjoint_ptr, outputs, slopes, through, through_m, coefficients_ptr, dt_ptr,
    slope_ptrs, cotangent_ptrs, h_ptrs, m_ptr, n,
    A: tl.constexpr, gate_x: tl.constexpr, pullback_x: tl.constexpr, BOUND_X: tl.constexpr,
    gate_f: tl.constexpr, pullback_f: tl.constexpr, BOUND_F: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of the stages after the first `len(slopes)`; the next stage is `len(slopes) + len(outputs)`.

    Args:
        z_ptr: (x_n, m_n), [2 N].
        adjoint_ptr: (a_x, a_m) at the step's start, [2 N].
        outputs: the field's outputs at one or two stages, [N] each.
        slopes: dm_0, dm_1, …, [N] each.
        through: v_0, v_1, …, as many, [N] each.
        through_m: w_0, w_1, …, as many, [N] each; none where the field does not see m.
        coefficients_ptr: rows (κ, s, q, -γ), [stages, 4].
        slope_ptrs: where the further dm go, [N] for each output.
        cotangent_ptrs: where the outputs' cotangents go, [N] for each output.
        h_ptrs: where the features of the next stages go, [N] each.
        m_ptr: where m of the next stage goes, [N]; None if nobody looks at it.
        A: what leads to each stage, and an empty row for what follows the last.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    dt = tl.load(dt_ptr).to(WIDE)
    x = tl.load(z_ptr + offsets, mask=mask).to(WIDE)
    m = tl.load(z_ptr + n + offsets, mask=mask).to(WIDE)
    known = load_all(slopes, offsets, mask, WIDE)
    u = load_all(outputs, offsets, mask, WIDE)
    dx, dm = further_slopes(
        u, x, m, dt, known, coefficients_ptr, A, len(slopes),
        gate_x, BOUND_X, gate_f, BOUND_F, z_ptr.dtype.element_ty,
    )  # fmt: skip
    for j in tl.static_range(len(outputs)):
        tl.store(slope_ptrs[j] + offsets, dm[len(slopes) + j], mask=mask)
    for j in tl.static_range(len(h_ptrs)):
        scale = coefficient(coefficients_ptr, len(slopes) + len(outputs) + j, 0, WIDE)
        tl.store(h_ptrs[j] + offsets, scale * combine(x, dt, dx, A, len(slopes) + len(outputs) + j), mask=mask)
    if m_ptr is not None:
        tl.store(m_ptr + offsets, combine(m, dt, dm, A, len(slopes) + len(outputs)), mask=mask)

    a_x = tl.load(adjoint_ptr + offsets, mask=mask).to(WIDE)
    a_m = tl.load(adjoint_ptr + n + offsets, mask=mask).to(WIDE)
    base_x, base_m, momenta = (), (), ()
    for j in tl.static_range(len(slopes) + len(outputs)):
        base_x = base_x + (a_x,)
        base_m = base_m + (a_m,)
        momenta = momenta + (combine(m, dt, dm, A, j),)
    _, y_m, _, _ = all_cotangents(
        base_x, base_m, momenta, load_all(through, offsets, mask, WIDE), load_all(through_m, offsets, mask, WIDE),
        coefficients_ptr, -dt, A, 0, 1, pullback_x, BOUND_X,
    )  # fmt: skip
    for j in tl.static_range(len(outputs)):
        drive = coefficient(coefficients_ptr, len(slopes) + j, 1, WIDE)
        tl.store(cotangent_ptrs[j] + offsets, pullback_f(drive * y_m[len(slopes) + j], u[j], BOUND_F), mask=mask)


def launch(
    outputs: Sequence[Tensor],
    z: Tensor,
    slopes: Sequence[Tensor],
    adjoint: Tensor,
    through: Sequence[Tensor],
    coefficients: Tensor,
    dt: Tensor,
    tableau: Tableau,
    gate_x: Gate,
    gate_f: Gate,
    ahead: int,
    momentum: bool,
    through_m: Sequence[Tensor],
) -> AdjointStage:
    """As `momentum_adjoint_stage`, by the kernel, on whatever device triton runs (a CPU under its interpreter)."""
    form_x, form_f = kernel_form(gate_x), kernel_form(gate_f)
    if form_x is None or form_f is None:
        raise ValueError(f"no Triton form of {gate_x if form_x is None else gate_f}")
    n, new = z.numel() // 2, len(outputs)
    counts = ahead, new, new, int(momentum and ahead > 0)
    h, dm, cotangents, m = ([torch.empty(n, dtype=z.dtype, device=z.device) for _ in range(k)] for k in counts)
    if n:
        held = 4 + new + len(slopes) + len(through) + len(through_m)
        programs, block, options = launch_shape(n, z.dtype, held)
        start(
            adjoint_stage_kernel, programs, z, adjoint, tuple(outputs), tuple(slopes), tuple(through),
            tuple(through_m), coefficients, dt, tuple(dm), tuple(cotangents), tuple(h), m[0] if m else None, n,
            (*tableau.all_a, ()), FORMS[form_x[0]], PULLBACKS[form_x[0]], form_x[1],
            FORMS[form_f[0]], PULLBACKS[form_f[0]], form_f[1],
            tl.float64 if z.dtype == torch.float64 else tl.float32, block, **options,
        )  # fmt: skip
    return AdjointStage(h, dm, m[0] if m else None, cotangents)
